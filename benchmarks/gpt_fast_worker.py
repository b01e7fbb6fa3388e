"""gpt-fast's decoding of a shape with random weights, for gpu.sh: the same shape, card and hour.

    python benchmarks/gpt_fast_worker.py --directory GPT_FAST --modes bf16 int8 int4

Start at timed. The model and its quantised linears are those of a checkout of gpt-fast; decoding is
compiled as its generate.py does, with the same settings of Inductor. Two things favour it: a step
takes the likeliest token, where gpt-fast's own draws from the 200 likeliest, and the prompt's time
is left out. As there, the host does not wait for a step's token. Its int4 has int4 in the output
head too. Nothing of this project is imported here, as its files have the same names.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PROMPT = 128  # tokens
GROUP = 32  # weights to a scale of int4


def decode_one_token(model: torch.nn.Module, token: Tensor, pos: Tensor) -> Tensor:
    return model(token, pos)[:, -1].argmax(-1, keepdim=True)  # (1, 1)


class GptFast:
    """Its modules, imported from a checkout."""

    def __init__(self, directory: Path):
        sys.path.insert(0, str(directory))
        # quantize.py imports it for its command alone, and it needs packages that may be missing.
        tokenizer = types.ModuleType("tokenizer")
        tokenizer.get_tokenizer = None
        sys.modules["tokenizer"] = tokenizer
        import model
        import quantize

        self.model, self.quantize = model, quantize

    def make(self, shape: str, mode: str, device: str) -> torch.nn.Module:
        """Weights of the size of noise, so that no output is infinite; caches for the run."""
        with torch.device("meta"):
            model = self.model.Transformer.from_name(shape)
            if mode == "int8":
                model = self.quantize.WeightOnlyInt8QuantHandler(model).convert_for_runtime()
            if mode == "int4":
                handler = self.quantize.WeightOnlyInt4QuantHandler(model, GROUP)
                model = handler.convert_for_runtime()
        model = model.to(torch.bfloat16).to_empty(device=device).eval()
        for name, tensor in model.state_dict().items():
            fill(name, tensor)
        return model


def fill(name: str, tensor: Tensor) -> None:
    if "scales" in name:
        tensor.fill_(3e-4)
    elif "norm" in name:
        tensor.fill_(1)
    elif tensor.is_floating_point():
        tensor.normal_(0, 0.02)
    else:
        tensor.random_(-100, 100)


def step_bytes(model: torch.nn.Module) -> int:
    """What a step reads of the weights: all but the embedding's table."""
    return sum(t.nbytes for n, t in model.state_dict().items() if n != "tok_embeddings.weight")


@torch.inference_mode()
def timed(gpt_fast: GptFast, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of decoding alone, of some rounds; seconds of compiling before."""
    device = args.device
    model = gpt_fast.make(args.shape, mode, device)
    nbytes = step_bytes(model)
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=PROMPT + args.new)
    torch._dynamo.reset()
    step = torch.compile(decode_one_token, mode="reduce-overhead", fullgraph=True)
    prompt = torch.randint(1024, (1, PROMPT), device=device)
    first = decode_one_token(model, prompt, torch.arange(PROMPT, device=device))

    def decode(count: int) -> float:
        token, pos = first, torch.tensor([PROMPT], device=device)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            with sdpa_kernel(SDPBackend.MATH):  # as there: Inductor then makes the attention
                token = step(model, token, pos).clone()
            pos += 1
        synchronize(device)
        return time.perf_counter() - start

    compiling = decode(3)
    if args.warm:
        return {"compile_s": compiling}
    decode(args.new)
    rates = [args.new / decode(args.new) for _ in range(args.rounds)]
    rate = statistics.median(rates)
    print(f"gpt-fast {mode}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return {
        "compile_s": compiling,
        "tokens_per_s": rate,
        "runs": rates,
        "weight_bytes": nbytes,
        "bytes_per_s": nbytes * rate,
    }


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main(args: argparse.Namespace) -> None:
    torch._inductor.config.coordinate_descent_tuning = True
    torch._inductor.config.triton.unique_kernel_names = True
    gpt_fast, modes, failed = GptFast(args.directory), {}, []
    for mode in args.modes:
        try:
            modes[mode] = timed(gpt_fast, mode, args)
        except Exception as error:  # the other modes are to be timed all the same
            failed.append(f"{mode}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(failed[-1], file=sys.stderr, flush=True)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    git = ["git", "-C", str(args.directory), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    record = {"benchmark": "gpt_fast", "shape": args.shape, "prompt": PROMPT, "new": args.new}
    record |= {"prefill_included": False, "modes": modes, "failed": failed}
    record |= {"commit": commit or "unknown", "torch": torch.__version__}
    print(json.dumps(record | {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d")}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, modes = parser.add_argument, ["bf16", "int8", "int4"]
    add("--directory", type=Path, required=True, help="a checkout of gpt-fast")
    add("--modes", nargs="+", choices=modes, default=modes, help="(default: all)")
    add("--shape", default="llama-3.1-8b", help="by gpt-fast's names (default: llama-3.1-8b)")
    add("--device", default="cuda", help="(default: cuda)")
    add("--new", type=int, default=128, help="tokens decoded (default: 128)")
    add("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    add("--warm", action="store_true", help="compile, for processes to come; no timing")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())

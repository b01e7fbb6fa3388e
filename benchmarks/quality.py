"""What quantising costs: perplexity on held-out text of every mode, beside the dense model's.

    python benchmarks/quality.py --text ../shared/data/text/tinystories_val.txt \\
        --calibration ../shared/data/text/tinystories_train_2MiB_eot.txt

Start at main. Each model is quantised into a temporary directory by quantize.py's own functions
and evaluated in float32, so that what differs is the weights alone. The share of the gap is how
much of what rounding to int4 loses GPTQ wins back.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import quantize
from bench import provenance
from benchmarks.common import ROOT, exit_code, log
from decoding import LoadedModel
from evaluation.perplexity import nats_per_token, windows
from load import load_model

CPU = torch.device("cpu")
INT4 = (  # label, mode, options
    ("int4", "int4", ""),
    ("GPTQ", "int4-gptq", "--train_steps 0"),
    ("GPTQ, trained", "int4-gptq", "--train_steps 250"),
)


def loss(lm: LoadedModel, ids: list[int], length: int) -> float:
    """Nats per token over stretches of `length`, each after BOS."""
    bos = [] if lm.tokenizer.bos_id is None else [lm.tokenizer.bos_id]
    return nats_per_token(lm, list(windows(ids, bos, length, length - len(bos))))


def measure(source: Path, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        lm = load_model(folder, device="cpu", dtype=torch.float32)
        length = min(args.length, lm.model.args.context)
        ids = lm.tokenizer.encode(args.text.read_text()[: args.characters], bos=False)
        base = loss(lm, ids, length)
        log(f"{source.name}: {len(ids)} tokens, perplexity {math.exp(base):.4f} as stored")
        found: dict[str, Any] = {"dense": math.exp(base)}
        modes = [("int8", "int8", 32, "")]
        for size in args.groupsizes:
            modes += [(f"{name}, g{size}", mode, size, options) for name, mode, options in INT4]
        for label, mode, groupsize, options in modes:
            name, seconds = quantized(folder, mode, groupsize, options, args, length)
            nats = loss(load_model(folder / name, device="cpu", dtype=torch.float32), ids, length)
            found[label] = math.exp(nats)
            change = math.expm1(nats - base)
            log(f"  {label:20} {math.exp(nats):8.4f}  {change:+.2%}  {seconds:.1f} s")
        for label, mode, groupsize, _ in modes:
            if mode == "int4-gptq":
                lost = found[f"int4, g{groupsize}"] - found["dense"]
                closed = 1 - (found[label] - found["dense"]) / lost
                found[f"gap closed, {label}"] = closed
                log(f"  {label} closes {closed:.0%} of rounding's gap")
    return found


def quantized(
    folder: Path, mode: str, groupsize: int, options: str, args: argparse.Namespace, length: int
) -> tuple[str, float]:
    """The file's name, and the seconds that it took."""
    command = ["--checkpoint_path", folder, "--mode", mode, "--groupsize", groupsize]
    command += ["--calibration_file", args.calibration, "--calibration_samples", args.samples]
    command += ["--calibration_seq_length", length]
    command += [*options.split(), *args.options.split()]
    start = time.perf_counter()
    target = quantize.run(quantize.parse_args([str(word) for word in command]))
    return target.name, time.perf_counter() - start


def main(args: argparse.Namespace) -> dict[str, Any]:
    quantize.log = lambda line: None
    figures = {source.name: measure(source, args) for source in args.models}
    return {"benchmark": "quality", "text": args.text.name, "models": figures} | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    demos = [ROOT / "checkpoints" / name for name in ("demo", "demo-opt")]
    add("--models", nargs="+", type=Path, default=demos, help="(default: the demo models)")
    add("--text", type=Path, required=True, help="held-out text")
    add("--calibration", type=Path, required=True, help="other text, for GPTQ")
    add("--groupsizes", nargs="+", type=int, default=[32, 128], help="(default: 32 128)")
    add("--samples", type=int, default=128, help="calibration texts (default: 128)")
    add("--length", type=int, default=512, help="tokens of a text (default: 512)")
    add("--characters", type=int, default=400_000, help="of the text (default: 400,000)")
    add("--options", default="", help="more options for quantize.py, in one string")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

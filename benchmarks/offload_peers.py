"""Other programs on a model larger than memory: accelerate's disk offload, llama.cpp's mmap.

    python benchmarks/offload_peers.py write --folder /tmp/peers --peer_python /tmp/llama/bin/python
    python benchmarks/offload_peers.py accelerate --folder /tmp/peers/hf --memory 4e8 --batch 4
    /tmp/llama/bin/python benchmarks/offload_peers.py llama_cpp --model /tmp/peers/model.gguf

Start at beside_accelerate and beside_llama_cpp: each runs one of these commands in a process of its
own, under a memory limit and with the weights' page cache empty, and returns its line of JSON.
write_forms writes the same random weights for all sides; they must generate the same tokens, which
shows that all run the same model. Packages are imported where they are used, because no Python
environment has those of both sides.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CONFIG, exit_code, log
from benchmarks.limited import drop_cache, limited


@dataclass(frozen=True)
class Forms:
    """Paths of the same weights in the format of each side."""

    folder: Path

    @property
    def ours(self) -> Path:
        return self.folder / "ours"  # model.pth, config.json, a tokenizer

    @property
    def hf(self) -> Path:
        return self.folder / "hf"  # the same as safetensors

    @property
    def gguf(self) -> Path:
        return self.folder / "model.gguf"


def beside_accelerate(
    forms: Forms, limit_bytes: int, *, memory: float, offload_folder: Path, **options: object
) -> dict[str, Any]:
    """memory: of weights alone; options: batch, prompt_length, new_tokens, threads, cache, keep.

    keep=True is not in accelerate, and in its favour: see keep.
    """
    given = {"folder": forms.hf, "memory": memory, "offload_folder": offload_folder} | options
    return alone(sys.executable, "accelerate", forms.hf, limit_bytes, given)


def beside_llama_cpp(
    forms: Forms, limit_bytes: int, *, peer_python: str, **options: object
) -> dict[str, Any]:
    """options: prompt_length, new_tokens, threads, micro_batch."""
    given = {"model": forms.gguf} | options
    return alone(peer_python, "llama_cpp", forms.gguf, limit_bytes, given)


def beside_ourselves(
    forms: Forms, limit_bytes: int, *, memory: float, directory: Path, **options: object
) -> dict[str, Any]:
    """memory: of the whole process, as --host_memory means it; options: as accelerate's, where
    batch is the most rows that are to be had."""

    from kernels.cpu import build

    build.build()  # a compiler takes more memory than what it compiles for
    given = {"folder": forms.ours, "memory": memory, "directory": directory} | options
    return alone(sys.executable, "ours", forms.ours, limit_bytes, given)


def alone(
    python: str, side: str, weights: Path, limit_bytes: int, options: dict[str, object]
) -> dict[str, Any]:
    words: list[object] = []
    for name, value in options.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", value]
    drop_cache(weights)
    return limited([python, Path(__file__).resolve(), side, *words], limit_bytes)


class Clock:
    """When each token came, and what the process had read from disk by then.

    transformers takes it as a streamer: `put` is called with the prompt, then with each token.
    """

    def __init__(self):
        self.times: list[float] = []
        self.read: list[int] = []
        self.tokens: list[Any] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())
        self.read.append(bytes_read())
        self.tokens.append(tokens)

    def end(self) -> None:
        pass

    def figures(self, batch: int) -> dict[str, Any]:
        """Decoding is what follows the first token."""
        start, first, *_, last = self.times
        steps = len(self.times) - 2
        return {
            "prefill_s": first - start,
            "decode_s": last - first,
            "tokens_per_s": batch * steps / (last - first),
            "overall_tokens_per_s": batch * (steps + 1) / (last - start),
            "prefill_read_bytes": self.read[1] - self.read[0],
            "decode_read_bytes": self.read[-1] - self.read[1],
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def bytes_read() -> int:
    """What this process's threads had the disk deliver, page faults and read-ahead with it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def make_prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """Distinct, and the same in every Python."""
    generator = random.Random(0)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]


def run_accelerate(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy, one batch: the first tokens, then as many more as asked for."""
    torch, transformers = need("torch"), need("transformers")
    need("accelerate")
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": int(args.memory)},
        offload_folder=args.offload_folder,
    )
    placed = getattr(model, "hf_device_map", {"": "cpu"})  # it has none where all fits
    prompts = torch.tensor(make_prompts(model.config.vocab_size, args.batch, args.prompt_length))
    if args.keep:
        keep(model)
    model.generation_config.eos_token_id = None  # or an early end would flatter
    clock, count = Clock(), args.new_tokens + 1
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        cache_implementation=args.cache,
        pad_token_id=0,
        streamer=clock,
    )
    return {
        "peer": "accelerate",
        "versions": [need(name).__version__ for name in ("accelerate", "transformers", "torch")],
        "on_disk": sum(str(device) == "disk" for device in placed.values()),
        "in_memory": sorted(name for name, device in placed.items() if str(device) != "disk"),
        "tokens": [int(tokens.flatten()[0]) for tokens in clock.tokens[1:]],
        **clock.figures(args.batch),
    }


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    """The policy that the planner chooses for so many texts in so much memory."""
    import torch

    from checkpoint import Checkpoint
    from engine import generate
    from generate import GenerationConfig
    from load import load_model
    from plan import ModelSpec, Planner, Workload, machine, sizes
    from tiers.policy import Policy

    checkpoint, cpu = Checkpoint(args.folder), torch.device("cpu")
    spec = ModelSpec(checkpoint.args, None, checkpoint.dtype, None, cpu)
    planner = Planner(sizes(spec), machine(spec, args.directory, needed=True), True)
    work = Workload(args.batch, args.prompt_length, (args.answer or args.new_tokens) + 1)
    budgets = {"device": args.memory, "disk": 1e13}
    plan = planner.choose(work, budgets, Policy(directory=args.directory), args.batch)
    rows = min(args.batch, plan.policy.rows)
    lm = load_model(args.folder, device="cpu", policy=plan.policy)
    prompts = make_prompts(lm.model.args.vocab_size, rows, args.prompt_length)
    caches = lm.make_caches(rows, work.prompt + work.new)
    clock = Clock()
    clock.put(prompts)
    config = GenerationConfig(args.new_tokens + 1, 0, ignore_eos=True)
    for step in generate(lm, prompts, config, caches=caches):
        clock.put(step[0][0])
    return {
        "peer": "gpt-flex",
        "policy": str(plan.policy),
        "rows": rows,
        "planned_bytes": plan.memory,
        "planned_step_s": max(plan.step.values()),
        "planned_prompts_s": max(plan.prefill.values()),
        "tokens": clock.tokens[1:],
        **clock.figures(rows),
    }


def keep(model: Any) -> None:
    """Copy what accelerate leaves in memory out of the mapped file, where the kernel evicts it.

    Not the embedding, unless it is the head, too: a step reads few pages of it.
    """
    looked_up = None if model.config.tie_word_embeddings else model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter is not looked_up:
            parameter.data = parameter.data.clone()


def run_llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    """As decode.py's worker does, with the model mapped and nothing locked in memory."""
    llama_cpp = need("llama_cpp")
    llm = llama_cpp.Llama(
        str(args.model),
        n_ctx=args.prompt_length + args.new_tokens + 1,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_ubatch=args.micro_batch,
        use_mmap=True,
        use_mlock=False,
        verbose=False,
    )
    (prompt,) = make_prompts(llm.n_vocab(), 1, args.prompt_length)
    clock = Clock()
    clock.put(prompt)
    tokens = llm.generate(prompt, temp=0.0)
    for _ in range(args.new_tokens + 1):
        clock.put(next(tokens))
    return {
        "peer": "llama.cpp",
        "versions": [llama_cpp.__version__],
        "tokens": clock.tokens[1:],
        **clock.figures(1),
    }


def need(package: str) -> Any:
    """A package, or ValueError in one line."""
    try:
        return __import__(package)
    except ImportError as error:
        raise ValueError(f"skipped: {sys.executable} cannot import {package}: {error}") from error


def write_forms(config: Path, folder: Path, peer_python: str | None) -> Forms:
    """Random weights of a shape as model.pth, as safetensors and, with peer_python, as GGUF.

    All are in memory, twice for a while. Norms are ones, as in a real model: with noise there
    all values would shrink to nothing, and greedy choices to chance.
    """
    import torch

    from benchmarks.load_memory import write_prepared, write_safetensors
    from load import random_model
    from weights.allocation import stored_tensors
    from weights.weight_files import read_json

    forms, said = Forms(folder), read_json(config)
    model = random_model(config, device="cpu", dtype=torch.bfloat16).model
    tensors = {name: tensor.detach() for name, (tensor, _) in stored_tensors(model).items()}
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor.fill_(1)
    for path, write in ((forms.ours, write_prepared), (forms.hf, write_safetensors)):
        log(f"writing {path} ...")
        path.mkdir(parents=True, exist_ok=True)
        write(path, said, tensors)
    if peer_python:
        log(f"writing {forms.gguf} ...")
        script = [peer_python, Path(__file__).resolve(), "gguf"]
        subprocess.run([*script, "--folder", forms.hf, "--model", forms.gguf], check=True)
    return forms


def write_gguf(args: argparse.Namespace) -> dict[str, Any]:
    """A Llama of one bfloat16 safetensors file as llama.cpp's BF16, one tensor in memory at a time.

    Of queries and keys it rotates neighbouring channels where Hugging Face rotates halves.
    """
    gguf, np = need("gguf"), need("numpy")
    from benchmarks.random_gguf import describe, shapes

    config = json.loads((args.folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    file = args.folder / "model.safetensors"
    header, start = safetensors_header(file)
    temporary = args.model.with_name(args.model.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama", use_temp_file=False)
    describe(writer, config)
    kind = gguf.GGMLQuantizationType.BF16
    for name, shape in shapes(config):
        theirs = hugging_face_name(name)
        offset = start + header[theirs]["data_offsets"][0]
        stored = np.memmap(file, np.uint16, "r", offset, shape)
        if len(shape) == 1:
            wide = (stored.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(name, wide)
            continue
        if count := heads.get(theirs.split(".")[-2]):
            halves = stored.reshape(count, 2, -1, shape[1])  # (head, half, channel, in)
            stored = halves.swapaxes(1, 2).reshape(shape)
        writer.add_tensor(name, np.ascontiguousarray(stored).view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, args.model)
    return {"written": str(args.model), "bytes": args.model.stat().st_size}


def safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where the first begins."""
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(length)), 8 + length


LLAMA_CPP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """'blk.3.ffn_up.weight' -> 'model.layers.3.mlp.up_proj.weight'."""
    *layer, part, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{LLAMA_CPP_NAMES[part]}.{kind}"


def write(args: argparse.Namespace) -> dict[str, Any]:
    return {"folder": str(write_forms(args.config, args.folder, args.peer_python).folder)}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("--prompt_length", type=int, default=64, help="(default: 64)")
    run.add_argument("--new_tokens", type=int, default=16, help="after the first (default: 16)")
    run.add_argument("--threads", type=int, default=2, help="(default: 2)")

    def command(name: str, function: Any, *parents: argparse.ArgumentParser) -> Any:
        made = commands.add_parser(name, help=function.__doc__, parents=parents)
        made.set_defaults(run=function)
        return made.add_argument

    add = command("accelerate", run_accelerate, run)
    add("--folder", type=Path, required=True, help="a Hugging Face directory")
    add("--batch", type=int, default=1, help="rows (default: 1)")
    add("--memory", type=float, required=True, help="bytes of weights that stay in memory")
    add("--offload_folder", type=Path, help="where weights go that no safetensors file holds")
    add("--keep", action="store_true", help="copy it out of the file's mapping, to stay for sure")
    add("--cache", choices=("static", "dynamic"), default="dynamic", help="(default: dynamic)")
    add = command("llama_cpp", run_llama_cpp, run)
    add("--model", type=Path, required=True, help="a GGUF file")
    add("--batch", type=int, choices=[1], default=1, help="1: its Python loop takes one row")
    add("--micro_batch", type=int, default=512, help="ids of the prompt at once (default: 512)")
    add = command("ours", run_ours, run)
    add("--folder", type=Path, required=True, help="holds model.pth")
    add("--batch", type=int, default=1, help="texts, and the most rows at once (default: 1)")
    add("--memory", type=float, required=True, help="bytes, of the whole process")
    add("--directory", type=Path, required=True, help="for scratch files")
    add("--answer", type=int, help="tokens that the policy is chosen for (default: --new_tokens)")
    add = command("write", write)
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--folder", type=Path, required=True, help="will hold ours/, hf/ and model.gguf")
    add("--peer_python", help="a Python that has llama-cpp-python and gguf; without: no GGUF")
    add = command("gguf", write_gguf)
    add("--folder", type=Path, required=True, help="a Hugging Face directory")
    add("--model", type=Path, required=True, help="the GGUF file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()
    sys.exit(exit_code(args.run, args))

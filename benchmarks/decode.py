"""Measures decode and prefill against llama.cpp: same shape, bits and threads, alternating runs.

    python benchmarks/decode.py --peer_python /tmp/llama/bin/python

Start at main. All sides are loaded once and then take turns: compiled, llama.cpp, eager, compiled
and so on, greedy from the same random prompt. A waiting side uses no CPU, which is measured. A
shared machine's speed drifts, so ratios are taken within a round; the result is their median.
llama.cpp runs in a process of its own, if wanted in another Python environment: see Peer.
"""

import argparse
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bench import Stats, provenance
from benchmarks.common import CONFIG, Others, exit_code, log, show, spread
from decoding import LoadedModel
from engine import complete
from host.bandwidth import read_bandwidth
from host.measurements import cache_directory
from host.memory import size_text
from load import compile_now, make_views, random_model
from quant.linear import make_scheme
from text.generation_config import GenerationConfig

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parent
CACHE = cache_directory() or Path("gpt-flex")
GET_PEER = (
    "to get them: python3 -m venv /tmp/llama && CMAKE_ARGS=-DGGML_NATIVE=ON "
    "/tmp/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf; then give "
    "--peer_python /tmp/llama/bin/python; on a CPU with AMX, GCC 12 needs the flags in "
    "benchmarks/LOG.md, or llama.cpp crashes in 8 and 4 bits"
)
Run = dict[str, float]  # prefill and decode, in tokens per second


@dataclass(frozen=True)
class Precision:
    """The same bits per weight on both sides."""

    load: Callable[[Path], LoadedModel]  # from a config.json, with random weights
    gguf: str  # llama.cpp's name of the format


ours = partial(random_model, device="cpu", dtype=torch.bfloat16)
PRECISIONS = {
    "bf16": Precision(ours, "BF16"),
    "int8": Precision(partial(ours, scheme=make_scheme("int8")), "Q8_0"),
    "int4": Precision(partial(ours, scheme=make_scheme("int4", 32, "int4")), "Q4_0"),
}


class Ours:
    def __init__(self, lm: LoadedModel, prompt_length: int, new_tokens: int):
        self.lm, self.weight_bytes = lm, lm.model.bytes_per_step()
        self.caches = lm.make_caches(1, prompt_length + new_tokens + 1)
        self.config = GenerationConfig(
            max_new_tokens=new_tokens + 1, temperature=0, ignore_eos=True
        )
        compile_now(lm, self.caches)

    def __call__(self, prompt: list[int]) -> Run:
        stats = Stats(self.lm)
        complete(self.lm, [prompt], self.config, caches=self.caches, stats=stats)
        return {"prefill": stats.prefill_rate, "decode": stats.decode_rate}


class Peer:
    """llama.cpp in a process that waits on a pipe between its turns."""

    def __init__(self, python: str, model: Path, threads: int, prompt_length: int, new_tokens: int):
        self.new_tokens, self.idle_cpu, self.cpu = new_tokens, 0.0, None
        script, context = HERE / "llama_cpp_worker.py", prompt_length + new_tokens + 1
        command = [python, script, "--model", model, "--threads", threads, "--context", context]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the peer
        )
        self.weight_bytes = self.reply()["weight_bytes"]

    def reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise ChildProcessError("llama.cpp's process ended; its output is above")
        return json.loads(line)

    def __call__(self, prompt: list[int]) -> Run:
        request = {"prompt": prompt, "new_tokens": self.new_tokens}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        times = self.reply()
        self.idle_cpu += times["cpu_before"] - (self.cpu or times["cpu_before"])
        self.cpu = times["cpu_after"]
        return {
            "prefill": len(prompt) / times["prefill_s"],
            "decode": self.new_tokens / times["decode_s"],
        }

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def peer_version(python: str) -> str | None:
    """Return llama_cpp's version; None if that Python, llama_cpp or gguf is missing."""
    command = [python, "-c", "import gguf, llama_cpp; print(llama_cpp.__version__)"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def random_gguf(args: argparse.Namespace, kind: str) -> Path:
    """Return the peer's model file of this shape, written at the first call."""
    config = args.config.read_bytes()
    file = args.cache / f"{args.config.stem}-{zlib.crc32(config):08x}-{kind}.gguf"
    if not file.exists():
        log(f"writing {file} ...")
        file.parent.mkdir(parents=True, exist_ok=True)
        script = [args.peer_python, HERE / "random_gguf.py", "--config", args.config]
        subprocess.run([*script, "--type", kind, "--output", file], check=True)
    return file


def measure(precision: Precision, peer: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Return each side's figures of args.rounds rounds."""
    lengths = args.prompt, args.new_tokens
    lm = precision.load(args.config)
    eager = make_views(lm.model, lm.tokenizer, compile=False, compile_prefill=False)
    compiled = make_views(lm.model, lm.tokenizer, compile=True, compile_prefill=True)
    sides: dict[str, Callable[[list[int]], Run]] = {"compiled": Ours(compiled, *lengths)}
    if peer:
        model = random_gguf(args, precision.gguf)
        sides["llama.cpp"] = Peer(args.peer_python, model, args.threads, *lengths)
    sides["eager"] = Ours(eager, *lengths)
    try:
        runs, our_idle_cpu = alternate(sides, lm.model.args.vocab_size, args)
    finally:
        if peer:
            sides["llama.cpp"].close()
    cached = lm.model.kv_bytes(args.prompt + args.new_tokens // 2)
    peers = runs.get("llama.cpp")
    figures = {
        name: summary(of, peers if name != "llama.cpp" else None) for name, of in runs.items()
    }
    for name, side in sides.items():
        figures[name]["bytes_per_token"] = side.weight_bytes + cached
    if peer:
        figures["idle_cpu_s"] = {"ours": our_idle_cpu, "llama.cpp": sides["llama.cpp"].idle_cpu}
    return figures


def summary(runs: list[Run], peers: list[Run] | None) -> dict[str, Any]:
    """Return spreads of tokens per second, and of the ratios to the peer in the same round."""
    figures: dict[str, Any] = {test: spread([run[test] for run in runs]) for test in runs[0]}
    if peers:
        pairs = list(zip(runs, peers, strict=True))
        ratios = {
            test: spread([ours[test] / theirs[test] for ours, theirs in pairs]) for test in runs[0]
        }
        figures["over_llama_cpp"] = ratios
    return figures


def alternate(
    sides: dict[str, Callable[[list[int]], Run]], vocab_size: int, args: argparse.Namespace
) -> tuple[dict[str, list[Run]], float]:
    """Run each side once a round; the first round warms up and is dropped.

    Returns the runs, and the CPU seconds that this process used during the peer's turns.
    """
    generator = torch.Generator().manual_seed(0)
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    idle_cpu = 0.0
    for _ in tqdm(range(args.rounds + 1), desc="rounds", leave=False, disable=None):
        prompt = torch.randint(vocab_size, (args.prompt,), generator=generator).tolist()
        for name, side in sides.items():
            before = time.process_time()
            runs[name].append(side(prompt))
            idle_cpu += (time.process_time() - before) * isinstance(side, Peer)
    return {name: of[1:] for name, of in runs.items()}, idle_cpu


def table(figures: dict[str, Any], ceiling: float, args: argparse.Namespace) -> None:
    tests = f"pp{args.prompt}", f"tg{args.new_tokens}"
    log(f"{'tokens/s':12} {tests[0]:>28} {tests[1]:>26} {'reads':>12} {'of ceiling':>11}")
    for name in ("compiled", "llama.cpp", "eager"):
        if name in figures:
            side = figures[name]
            reads = side["decode"]["median"] * side["bytes_per_token"]
            log(
                f"{name:12} {show(side['prefill'], 1):>28} {show(side['decode']):>26} "
                f"{size_text(reads) + '/s':>12} {reads / ceiling:11.0%}"
            )
    for name in ("compiled", "eager"):
        if ratios := figures[name].get("over_llama_cpp"):
            log(
                f"{name} over llama.cpp, pair by pair: decode {show(ratios['decode'])}, "
                f"prefill {show(ratios['prefill'])}"
            )
    if idle := figures.get("idle_cpu_s"):
        ours, theirs = idle["ours"], idle["llama.cpp"]
        log(f"CPU used while waiting: gpt-flex {ours:.2f} s, llama.cpp {theirs:.2f} s")


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    before, others = read_bandwidth(CPU), Others()
    log(f"ceiling: {args.threads} threads read memory at {size_text(before)}/s")
    if not (peer := peer_version(args.peer_python)):
        log(f"llama.cpp is left out: {args.peer_python} cannot import it or gguf; {GET_PEER}")
    measured = {name: measure(PRECISIONS[name], peer, args) for name in args.precision}
    after = read_bandwidth(CPU)
    log(f"ceiling, measured again: {size_text(after)}/s; the higher one counts below")
    for name, figures in measured.items():
        log(f"{args.config.stem}, {name}, median (min to max) of {args.rounds} rounds")
        table(figures, max(before, after), args)
    return {
        "benchmark": "decode",
        "config": args.config.stem,
        "prompt_length": args.prompt,
        "new_tokens": args.new_tokens,
        "read_bytes_per_s": [before, after],
        "others_cpu_share": others.share(),
        "llama_cpp_python": peer,
        "precisions": measured,
    } | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], help="(default: bf16)")
    add("--threads", type=int, default=2, help="(default: 2)")
    add("--prompt", type=int, default=128, help="tokens of the prompt (default: 128)")
    add("--new_tokens", type=int, default=64, help="tokens decoded after the first (default: 64)")
    add("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    add("--peer_python", default=sys.executable, help="a Python that has llama-cpp-python and gguf")
    add("--cache", type=Path, default=CACHE, help=f"where GGUF files are kept (default: {CACHE})")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

"""Measures the time from the start of a process to the first compiled token.

    python benchmarks/compile.py

Start at main. Each run is a fresh process that does what generate.py does (see first_tokens):
eager, compiled with an empty compile cache (cold), and compiled again with that cache (warm). The
steps are import, load, compile, prefill (the first token) and the first compiled decode step (the
second token); over_eager is the time that compiling adds. load fills memory with random weights.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bench import provenance
from benchmarks.common import CONFIG, Others, exit_code, fresh_process, log, show, spread
from engine import generate
from load import compile_now, random_model
from text.generation_config import GenerationConfig

STEPS = ("import", "load", "compile", "prefill", "decode")  # seconds, one after the other
KINDS = ("eager", "cold", "warm")


def main(args: argparse.Namespace) -> dict[str, Any]:
    others = Others()
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in tqdm(range(args.repeats), desc="repeats", leave=False, disable=None):
        with tempfile.TemporaryDirectory() as cache:
            for kind in KINDS:
                took = run(kind, cache, args)
                eager = runs["eager"][-1]["total"] if kind != "eager" else took["total"]
                runs[kind].append(took | {"over_eager": took["total"] - eager})
    figures = {
        kind: {key: spread([run[key] for run in of]) for key in of[0]} for kind, of in runs.items()
    }
    torch.set_num_threads(args.threads)  # provenance records it; the runs had as many
    log(f"{args.config.stem}: seconds, median of {args.repeats} fresh processes each")
    columns = (*STEPS, "total", "over_eager", "tokens_per_s")
    log(f"{'':6}" + "".join(f"{column:>13}" for column in columns))
    for kind, of in figures.items():
        log(f"{kind:6}" + "".join(f"{of[column]['median']:13.2f}" for column in columns))
    for kind in KINDS[1:]:
        log(f"{kind}: {show(figures[kind]['over_eager'], 1)} s later than eager code")
    return {
        "benchmark": "compile",
        "config": args.config.stem,
        "others_cpu_share": others.share(),
        "seconds": figures,
    } | provenance(torch.device(args.device))


def run(kind: str, cache: str, args: argparse.Namespace) -> dict[str, float]:
    # Inductor keeps precompiled headers under TMPDIR, and the rest in its cache directory.
    env = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TMPDIR": cache}
    env |= {"TRITON_CACHE_DIR": f"{cache}/triton", "OMP_NUM_THREADS": str(args.threads)}
    options = ["--config", args.config, "--device", args.device, "--prompt", args.prompt]
    return fresh_process(__file__, *options, "--child", kind, time.perf_counter(), env=env)


def first_tokens(args: argparse.Namespace) -> dict[str, float]:
    """Run in a child process: return the seconds of each step, their total, and later tokens/s."""
    kind, started = args.child
    # On Linux and macOS perf_counter starts with the machine, so that processes can compare it.
    times = [float(started), time.perf_counter()]
    lm = random_model(args.config, device=args.device, compile=kind != "eager")
    times.append(time.perf_counter())
    caches = lm.make_caches(1, args.prompt + args.new_tokens + 2)
    compile_now(lm, caches)
    times.append(time.perf_counter())
    prompt = torch.arange(args.prompt).tolist()
    config = GenerationConfig(max_new_tokens=args.new_tokens + 2, temperature=0, ignore_eos=True)
    steps = generate(lm, [prompt], config, caches=caches)
    for _ in range(2):
        next(steps)
        times.append(time.perf_counter())
    more = sum(1 for _ in steps)
    rate = more / (time.perf_counter() - times[-1])
    took = {step: b - a for step, a, b in zip(STEPS, times, times[1:], strict=False)}
    return took | {"total": times[-1] - times[0], "tokens_per_s": rate}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--device", default="cpu", help="(default: cpu)")
    add("--threads", type=int, default=2, help="(default: 2)")
    add("--prompt", type=int, default=128, help="tokens of the prompt (default: 128)")
    add("--new_tokens", type=int, default=16, help="decoded for tokens/s (default: 16)")
    add("--repeats", type=int, default=5, help="fresh processes of each kind (default: 5)")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    if args.child:
        print(json.dumps(first_tokens(args)))
    else:
        sys.exit(exit_code(main, args))

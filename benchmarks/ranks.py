"""Several ranks beside one: what a pipeline makes of a batch, and shares of layers of one text.

    python benchmarks/ranks.py                  two stages, a core each, against one process on one
    python benchmarks/ranks.py --shares         the same by shares of each layer, for few rows

Start at main. The model has random weights, the batch distinct prompts. Each process has one core;
rounds alternate between one process and the ranks.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if "RANK" in os.environ:  # before torch counts cores
    os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"]) % os.cpu_count()})

import torch

from bench import Stats, provenance
from benchmarks.common import CONFIG, ROOT, Others, exit_code, log, show, spread
from engine import complete
from generate import GenerationConfig
from load import random_model
from ranks import join_process_group, leave_process_group

CPU = torch.device("cpu")


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """One rank: a few tokens to warm up, then the batch."""
    torch.set_num_threads(1)
    ranks = join_process_group(CPU)
    how = {"pipeline": not args.shares, "micro_batches": args.micro_batches} if ranks else {}
    lm = random_model(args.config, device="cpu", ranks=ranks, **how)
    generator = torch.Generator().manual_seed(0)
    size = args.rows, args.prompt
    prompts = torch.randint(lm.model.args.vocab_size, size, generator=generator).tolist()
    caches = lm.make_caches(args.rows, args.prompt + args.new)
    config = GenerationConfig(max_new_tokens=args.new, temperature=0, ignore_eos=True)
    short = GenerationConfig(max_new_tokens=2, temperature=0, ignore_eos=True)
    complete(lm, [prompt[:2] for prompt in prompts], short, caches=caches)
    stats, start = Stats(lm), time.perf_counter()
    complete(lm, prompts, config, caches=caches, stats=stats)
    seconds = time.perf_counter() - start
    leave_process_group()
    return {
        "seconds": seconds,
        "tokens_per_s": args.rows * args.new / seconds,
        "decode_per_s": stats.decode_rate,
        "prompt_per_s": stats.prefill_rate,
    }


def run(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """So many processes, each on a core of its own."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc_per_node={count}", __file__, "--worker"]
    for name in ("config", "rows", "prompt", "new"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--shares"] * args.shares
    words += ["--micro_batches", str(args.micro_batches)] if args.micro_batches else []
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{count} ranks failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.worker:
        return worker(args)
    others, runs = Others(), {1: [], args.ranks: []}
    for _ in range(args.repeats):
        for count, of in runs.items():
            of.append(run(args, count))
            log(
                f"{count} ranks: {of[-1]['tokens_per_s']:.1f} tokens/s, prompts included; "
                f"{of[-1]['decode_per_s']:.1f} of decoding, {of[-1]['prompt_per_s']:.1f} of prompts"
            )
    ratios = {
        name: spread([b[name] / a[name] for a, b in zip(*runs.values(), strict=True)])
        for name in ("tokens_per_s", "decode_per_s", "prompt_per_s")
    }
    for name, of in ratios.items():
        log(f"{args.ranks} ranks over one, {name}: {show(of)}")
    return {
        "benchmark": "ranks",
        "config": args.config.stem,
        "shares": args.shares,
        "rows": args.rows,
        "prompt": args.prompt,
        "new": args.new,
        "micro_batches": args.micro_batches,
        "over_one": ratios,
        "runs": runs,
        "others_cpu_share": others.share(),
    } | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--ranks", type=int, default=2, help="(default: 2)")
    add("--shares", action="store_true", help="of each layer, in place of a pipeline")
    add("--rows", type=int, default=64, help="texts (default: 64)")
    add("--prompt", type=int, default=32, help="tokens (default: 32)")
    add("--new", type=int, default=32, help="tokens (default: 32)")
    add("--micro_batches", type=int, help="of rows (default: the pipeline's own)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

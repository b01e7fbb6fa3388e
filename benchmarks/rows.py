"""Measures a step of several rows against one row: a batch, or a verify pass of draft tokens.

    python benchmarks/rows.py --mode int4

Start at main. One loaded model runs a step of 1, 2, 4, 8 and 16 tokens of one text, in turns, eager
or compiled; the result is the median time of each over that of one token in the same round.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bench import provenance
from benchmarks.common import CONFIG, Others, exit_code, log, show, spread
from load import random_model
from quant.linear import make_scheme

CPU = torch.device("cpu")
PAST_TOKENS = 128  # in the cache


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    scheme = None if args.mode == "dense" else make_scheme(args.mode, 32, args.mode)
    compiled = {"compile": args.compile, "compile_prefill": args.compile}
    lm, others = random_model(args.config, device="cpu", scheme=scheme, **compiled), Others()
    caches, key_pos = lm.make_caches(1, 256), torch.arange(192)
    seconds: dict[int, list[float]] = {rows: [] for rows in args.rows}
    for _ in tqdm(range(args.rounds + 1), desc="rounds", leave=False, disable=None):
        for rows, of in seconds.items():
            tokens, pos = (
                torch.ones(1, rows, dtype=torch.long),
                key_pos[PAST_TOKENS : PAST_TOKENS + rows],
            )
            step = lm.decode if rows == 1 else lm.prefill
            start = time.perf_counter()
            step(tokens, pos.unsqueeze(0), key_pos, caches)
            of.append(time.perf_counter() - start)
    figures = {}
    for rows, of in seconds.items():
        ratio = spread([a / b for a, b in zip(of[1:], seconds[1][1:], strict=True)])
        figures[rows] = {"over_one_row": ratio, "seconds": spread(of[1:])}
        log(f"{rows:3} rows: {1e3 * figures[rows]['seconds']['median']:7.1f} ms, {show(ratio)}x")
    return {
        "benchmark": "rows",
        "config": args.config.stem,
        "mode": args.mode,
        "compiled": args.compile,
        "rows": figures,
        "others_cpu_share": others.share(),
    } | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--mode", choices=["dense", "int8", "int4"], default="int4", help="(default: int4)")
    add("--compile", action="store_true", help="compiled steps")
    add("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="(default: 1 2 4 8 16)")
    add("--rounds", type=int, default=15, help="turns of each (default: 15)")
    add("--threads", type=int, default=2, help="(default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

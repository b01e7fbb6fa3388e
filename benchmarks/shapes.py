"""Measures how much of the memory's bandwidth the decoding of several models' shapes reaches.

    python benchmarks/shapes.py --config benchmarks/configs/{tinyllama-1.1b,qwen3-1.7b}.json

Start at main. All shapes are loaded with random weights, compiled (without --eager), and decode in
turns; the first round warms up and is not counted. After each turn the bandwidth is measured anew,
since that of a shared machine drifts. A share is the bytes that a step reads, over its seconds,
over that bandwidth. "over the first" is the share over that of the first --config in the same
round; "at its fastest" is the same for the bytes per second of each shape's fastest turn, which
neighbours disturb least.
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
from decoding import LoadedModel
from host.bandwidth import read_bandwidth
from load import random_model
from quant.linear import make_scheme

CPU = torch.device("cpu")
PAST_TOKENS = 128  # the position of every step; the contents of the caches do not matter
VISIBLE = 192  # slots given to attention; see visible_length in layers/kv_cache.py


class Shape:
    """A model of this shape, compiled unless `eager`, with its caches."""

    def __init__(self, config: Path, mode: str, eager: bool):
        scheme = None if mode == "dense" else make_scheme(mode, 32, mode)
        dtype, compiled = torch.bfloat16, {"compile": not eager, "compile_prefill": not eager}
        self.lm: LoadedModel = random_model(
            config, device="cpu", dtype=dtype, scheme=scheme, **compiled
        )
        self.caches, self.key_pos = self.lm.make_caches(1, 2 * VISIBLE), torch.arange(VISIBLE)
        model = self.lm.model
        self.bytes = model.bytes_per_step() + model.kv_bytes(PAST_TOKENS)

    def step_seconds(self, steps: int) -> float:
        """Returns the seconds of one step, a mean of `steps`."""
        tokens, pos = torch.ones(1, 1, dtype=torch.long), self.key_pos[None, PAST_TOKENS, None]
        start = time.perf_counter()
        for _ in range(steps):
            self.lm.decode(tokens, pos, self.key_pos, self.caches)
        return (time.perf_counter() - start) / steps


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict[str, Any]:
    """Logs a line for each shape, and returns the figures by its name, the stem of its config."""
    torch.set_num_threads(args.threads)
    shapes = {config.stem: Shape(config, args.mode, args.eager) for config in args.config}
    others = Others()
    seconds: dict[str, list[float]] = {name: [] for name in shapes}
    shares: dict[str, list[float]] = {name: [] for name in shapes}
    for _ in tqdm(range(args.rounds + 1), desc="rounds", leave=False, disable=None):
        for name, shape in shapes.items():
            seconds[name].append(shape.step_seconds(args.steps))
            shares[name].append(shape.bytes / seconds[name][-1] / read_bandwidth(CPU, repeats=2))
    first, figures, rates = args.config[0].stem, {}, {}
    for name, own in shares.items():
        relative = spread([a / b for a, b in zip(own[1:], shares[first][1:], strict=True)])
        figures[name] = {"bytes": shapes[name].bytes, "seconds": spread(seconds[name][1:])}
        figures[name] |= {"share": spread(own[1:]), "over_first": relative}
        rates[name] = shapes[name].bytes / figures[name]["seconds"]["min"]
        figures[name]["fastest_over_first"] = fastest = rates[name] / rates[first]
        milliseconds = 1e3 * figures[name]["seconds"]["median"]
        share = show(figures[name]["share"])
        ratios = f"{show(relative)}, at its fastest {fastest:.2f}"
        log(f"{name:16} {milliseconds:7.1f} ms, share {share}, over the first {ratios}")
    return {
        "benchmark": "shapes",
        "mode": args.mode,
        "eager": args.eager,
        "shapes": figures,
        "others_cpu_share": others.share(),
    } | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", nargs="+", type=Path, default=[CONFIG], help="shapes (default: TinyLlama-1.1B)")
    add("--mode", choices=["dense", "int8", "int4"], default="int4", help="(default: int4)")
    add("--eager", action="store_true", help="decode without compiling")
    add("--steps", type=int, default=8, help="decoding steps of a turn (default: 8)")
    add("--rounds", type=int, default=15, help="counted turns of each shape (default: 15)")
    add("--threads", type=int, default=2, help="(default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

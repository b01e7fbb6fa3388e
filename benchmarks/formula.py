"""Measures quantised products in plain PyTorch against a dense one, for CPUs without the kernels.

    python benchmarks/formula.py --threads 1

Start at main. A dense bfloat16 F.linear and the int8 and int4 layers of its shape take turns, each
of as many calls as multiply 32 rows: one call of a row takes less than a slice of the CPU. The
result is the time of each layer over the dense time of the same round; less is better. The formula
of quant/linear.py is the fallback where kernels/cpu do not run.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import provenance
from benchmarks.common import Others, exit_code, log, show, spread
from quant.linear import Int4Linear, Int8Linear, QuantizedLinear, round_to_nearest

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    others, figures = Others(), {}
    for N in args.outputs:
        weight = torch.randn(N, args.inputs).mul_(0.02)
        layers = quantised(weight)
        for rows in args.rows:
            x = torch.randn(rows, args.inputs).to(DTYPES[args.dtype])
            figures[f"{rows} rows, {N} outputs"] = over_dense(x, weight, layers, args.rounds)
    return {
        "benchmark": "formula",
        "inputs": args.inputs,
        "dtype": args.dtype,
        "threads": args.threads,
        "over_dense": figures,
        "others_cpu_share": others.share(),
    } | provenance(CPU)


def quantised(weight: Tensor) -> dict[str, QuantizedLinear]:
    """Return the int8 and the int4 layer of a dense weight, (N, K), by mode."""
    N, K = weight.shape
    layers = {"int8": Int8Linear(K, N, False), "int4": Int4Linear(K, N, False, 32)}
    for layer in layers.values():
        layer.load_state_dict(round_to_nearest(weight, layer))
    return layers


def over_dense(
    x: Tensor, weight: Tensor, layers: dict[str, QuantizedLinear], rounds: int
) -> dict[str, Any]:
    """Return the spread of each layer's time over the dense product's, and the dense seconds."""
    bfloat16, calls_per_turn = (x.bfloat16(), weight.bfloat16()), max(1, 32 // len(x))
    calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: F.linear(*bfloat16)}
    calls |= {name: lambda layer=layer: layer.reference(x) for name, layer in layers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(calls_per_turn):
                call()
            seconds[name].append((time.perf_counter() - start) / calls_per_turn)
    dense = seconds.pop("dense")[1:]  # the first round is warm-up
    figures = {"dense_seconds": spread(dense)}
    for name, times in seconds.items():
        figures[name] = spread([a / b for a, b in zip(times[1:], dense, strict=True)])
        shape = f"{len(x):3} rows, {len(weight):5} outputs"
        log(f"{shape}: {name} {show(figures[name])}x dense")
    return figures


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--inputs", type=int, default=2048, help="K (default: 2048)")
    add("--outputs", nargs="+", type=int, default=[2048, 5632], help="N (default: 2048 5632)")
    add("--rows", nargs="+", type=int, default=[1, 32], help="M (default: 1 32)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of activations (default: bfloat16)")
    add("--rounds", type=int, default=15, help="turns of each (default: 15)")
    add("--threads", type=int, default=2, help="(default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

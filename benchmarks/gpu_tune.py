"""Which tiles are fastest: times those of kernels/gpu at the shapes of a model's linears.

    python benchmarks/gpu_tune.py --output benchmarks/results/gpu-tune.json

Start at main. Kernels are compiled by several processes first; then each tile multiplies by more
weights than the GPU's caches hold, in one CUDA graph. The table of the fastest is printed last:
kernels/gpu/tiles.py is written from it.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench import provenance
from benchmarks.common import exit_code, log
from benchmarks.gpu_products import seconds_on_gpu
from kernels.gpu.fixed_point import INT4, INT8
from kernels.gpu.tiles import FewRows, OneRow, shape_class

SHAPES = (6144, 4096), (4096, 14336), (28672, 4096), (128256, 4096)  # Llama 3.1 8B's
CYCLED = 2**28  # bytes of weights in one turn
ROWS = 1, 8, 64
GROUP = 32
STEPS = (32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (256, 4), (256, 8), (512, 8)
ONE_ROW_TILES = [OneRow(n, chunks, warps) for n in (1, 2, 4) for chunks, warps in STEPS]
NARROW = (16, 1), (32, 1), (32, 2), (64, 2), (64, 4)  # outputs and warps of a program
FEW_ROWS_TILES = [
    FewRows(n, words, splits, warps, stages)
    for words, sizes, most_stages in ((32, NARROW, 4), (64, NARROW[:3:2], 3))
    for (n, warps), splits, stages in itertools.product(sizes, (1, 2, 4), range(2, most_stages + 1))
]
Tile = OneRow | FewRows


def cases(kinds: list[str], rows: list[int]) -> Iterator[tuple[str, int, Tile]]:
    """Kernel, rows and tile of all that is timed."""
    for kind in kinds:
        for M in rows:
            if M == 1:
                yield from ((kind, 1, tile) for tile in ONE_ROW_TILES)
            elif kind != "dense":
                yield from ((kind, M, tile) for tile in FEW_ROWS_TILES)


def random_weights(kind: str, N: int, K: int) -> tuple[Tensor, ...]:
    """The buffers of a linear with random numbers."""
    on_gpu = {"device": "cuda"}
    if kind == "dense":
        return (torch.randn(N, K, dtype=torch.bfloat16, **on_gpu),)
    if kind == "int8":
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8, **on_gpu)
        return weight, torch.rand(N, **on_gpu)
    weight = torch.randint(256, (N, K // 2), dtype=torch.uint8, **on_gpu)
    scales = torch.rand(N, K // GROUP, dtype=torch.float16, **on_gpu)
    return weight, scales, torch.randint(256, (N, K // GROUP // 2), dtype=torch.uint8, **on_gpu)


def product(kind: str, M: int, K: int, tile: Tile) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """What multiplies M rows by the buffers of a linear."""
    from kernels.gpu import launch

    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    if M > 1:
        call = {"int8": launch.int8_rows, "int4": launch.int4_rows}[kind]

        def few_rows(weights: tuple[Tensor, ...]) -> Tensor:
            zeros = weights[2] if kind == "int4" else None
            rows = launch.scaled_rows(x, launch.spans_of(M, *weights[:2], zeros, tile))
            return call(rows, *weights, None, None, x.dtype, tile)

        return few_rows
    if kind == "dense":
        return lambda weights: launch.dense_row(x, *weights, None, tile)
    call, order = {"int8": (launch.int8_row, INT8), "int4": (launch.int4_row, INT4)}[kind]
    fixed = launch.fixed_point(x[0], order)
    return lambda weights: call(fixed, *weights, None, None, x.dtype, tile)


def compile_some(cases: list[tuple[str, int, Tile]]) -> None:
    """In a process of its own: kernels are kept in Triton's cache."""
    for kind, M, tile in cases:
        for K in {K for _, K in SHAPES}:
            try:
                product(kind, M, K, tile)(random_weights(kind, 256, K))
            except Exception as error:  # the timing of this tile will say so
                log(f"{kind} {M} {tile}: {error}")


def compile_all(found: list[tuple[str, int, Tile]], processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pool.map(compile_some, [found[n::processes] for n in range(processes)])


def microseconds(kind: str, M: int, tile: Tile, weights: list[tuple[Tensor, ...]]) -> float:
    """Of one product; infinite where the tile does not run."""
    K = weights[0][0].shape[1] * (2 if kind == "int4" else 1)
    try:
        multiply = product(kind, M, K, tile)
        times = seconds_on_gpu(lambda: [multiply(w) for w in weights], 5)
    except Exception as error:
        log(f"{kind} {M} {tile}: {type(error).__name__}: {str(error)[:200]}")
        return math.inf
    return sorted(times)[len(times) // 2] / len(weights) * 1e6


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict[str, Any]:
    found = list(cases(args.kinds, args.rows))
    log(f"compiling {len(found)} kernels in {args.processes} processes ...")
    compile_all(found, args.processes)
    if args.lock:
        import fcntl

        lock = args.lock.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    timed: list[dict[str, Any]] = []
    for (N, K), kind in itertools.product(SHAPES, args.kinds):
        one = random_weights(kind, N, K)
        nbytes = sum(t.nbytes for t in one)
        weights = [one, *(random_weights(kind, N, K) for _ in range(CYCLED // nbytes))]
        for M in args.rows:
            tiles = [tile for k, m, tile in found if (k, m) == (kind, M)]
            results = sorted((microseconds(kind, M, tile, weights), tile) for tile in tiles)
            for us, tile in results[:3]:
                log(
                    f"{kind:5} {M:3} rows {N:6} x {K:5}: {us:8.2f} us, {nbytes / us / 1e6:5.2f} "
                    f"TB/s {tuple(tile)}"
                )
            timed += [
                {
                    "kind": kind,
                    "rows": M,
                    "N": N,
                    "K": K,
                    "class": shape_class(N, K),
                    "tile": tile,
                    "us": us if us < math.inf else None,
                }
                for us, tile in results
            ]
        del weights, one
    if args.output:
        args.output.write_text("\n".join(json.dumps(line) for line in timed) + "\n")
    best = {
        f"{t['kind']} {t['rows']} {t['class']}": (t["tile"], round(t["us"], 2))
        for t in reversed(timed)
        if t["us"]
    }
    return {"benchmark": "gpu_tune", "best": best} | provenance(torch.device("cuda"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=list(ROWS), help="(default: 1 8 64)")
    kinds = "dense", "int8", "int4"
    add("--kinds", nargs="+", choices=kinds, default=kinds, help="of weights (default: all)")
    add("--processes", type=int, default=12, help="that compile (default: 12)")
    add("--output", type=Path, help="all times, as JSON lines")
    add("--lock", type=Path, help="a file to lock while times are taken")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

"""One row by the linears of a shape: int4 and int8 as a step runs them, beside tinygemm.

    python benchmarks/gpu_products.py

Start at main. tinygemm, PyTorch's own int4 product, is the baseline to beat; it is given the same
integers. bfloat16 is there for scale. Each contestant cycles through more weights than the device's
caches hold, on a GPU in one CUDA graph, so that no launch is waited for. --device cpu tries the
script itself: there ours is the slow formula.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import provenance
from benchmarks.common import ROOT, exit_code, log, spread
from host.bandwidth import read_bandwidth
from host.devices import find_device
from layers.basic import Linear
from load import meta_model
from quant.linear import Int4Linear, Int8Linear, round_int4, round_int8, unpack_nibbles
from weights.hf import model_args
from weights.weight_files import read_json

GROUP = 32
CYCLED = {"cuda": 2**28, "cpu": 2**24}  # bytes of weights in one turn
TOLERANCE = 0.02  # of the largest output: bfloat16 sums differ by as much


def int4(weight: Tensor) -> Int4Linear:
    layer = Int4Linear(weight.shape[1], weight.shape[0], False, GROUP).to(weight.device)
    layer.load_state_dict(round_int4(weight, GROUP))
    return layer


def int8(weight: Tensor) -> Int8Linear:
    layer = Int8Linear(weight.shape[1], weight.shape[0], False).to(weight.device)
    layer.load_state_dict(round_int8(weight))
    return layer


class Tinygemm(torch.nn.Module):
    """An Int4Linear in PyTorch's packing, whose zeros are numbers added to (q - 8) * scale."""

    def __init__(self, layer: Int4Linear):
        super().__init__()
        self.dense = layer.dense
        q, scales = unpack_nibbles(layer.weight), layer.scales.float()  # (N, K), (N, P)
        offsets = (8 - unpack_nibbles(layer.zeros)[:, : scales.shape[1]].float()) * scales
        both = torch.stack((scales, offsets), 2).transpose(0, 1)  # (P, N, 2)
        self.register_buffer("scales_and_zeros", both.bfloat16().contiguous())
        ops = torch.ops.aten
        if q.is_cuda:
            packed = ops._convert_weight_to_int4pack(q[:, 0::2] << 4 | q[:, 1::2], 8)
            self.multiply = ops._weight_int4pack_mm
        else:
            packed = ops._convert_weight_to_int4pack_for_cpu(q.int(), 1)
            self.multiply = ops._weight_int4pack_mm_for_cpu
        self.register_buffer("weight", packed)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, GROUP, self.scales_and_zeros)


class Dense(torch.nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.clone())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


CONTESTANTS: dict[str, Callable[[Tensor], torch.nn.Module]] = {
    "bfloat16": Dense,
    "int8": int8,
    "int4": int4,
    "tinygemm": lambda weight: Tinygemm(int4(weight)),
}


def linear_shapes(config: Path) -> dict[tuple[int, int], int]:
    """(N, K) of the linears of a model, and how many of each it has."""
    model = meta_model(model_args(read_json(config)), None)
    linears = (module for module in model.modules() if isinstance(module, Linear))
    return Counter((linear.out_features, linear.in_features) for linear in linears)


def seconds(turn: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """The time that each of some turns takes."""
    turn()
    if device.type == "cuda":
        return seconds_on_gpu(turn, rounds)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        turn()
        times.append(time.perf_counter() - start)
    return times


def seconds_on_gpu(turn: Callable[[], Any], rounds: int) -> list[float]:
    side = torch.cuda.Stream()  # on which a graph's work has to have run before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        turn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times[1:]


def contest(
    make: Callable[[Tensor], torch.nn.Module], weight: Tensor, rounds: int
) -> dict[str, Any]:
    """Time, bytes and error of one contestant at one shape."""
    x = torch.randn(1, weight.shape[1], dtype=torch.bfloat16, device=weight.device)
    layers = [make(weight)]
    nbytes = sum(tensor.nbytes for tensor in layers[0].buffers())
    layers += [make(weight) for _ in range(CYCLED[weight.device.type] // nbytes)]
    torch.compiler.reset()
    product = torch.compile(lambda layer: layer(x), dynamic=False)  # one graph for all layers
    exact = F.linear(x.float(), layers[0].dequantize(torch.float32))
    error = ((product(layers[0]) - exact).abs().max() / exact.abs().max()).item()
    turns = seconds(lambda: [product(layer) for layer in layers], weight.device, rounds)
    times = [turn / len(layers) for turn in turns]
    return {"seconds": spread(times), "bytes": nbytes, "error": error}


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict[str, Any]:
    device = find_device(args.device)
    ceiling = read_bandwidth(device)
    log(f"memory is read at {ceiling / 1e9:.0f} GB/s; GB/s of each, and its share")
    figures: dict[str, Any] = {}
    total = dict.fromkeys(CONTESTANTS, 0.0)
    for (N, K), count in linear_shapes(args.config).items():
        weight = (torch.randn(N, K, device=device) / math.sqrt(K)).bfloat16()
        row = {name: contest(make, weight, args.rounds) for name, make in CONTESTANTS.items()}
        figures[f"{N}x{K}"] = row | {"count": count}
        rates = {name: r["bytes"] / r["seconds"]["median"] for name, r in row.items()}
        shown = ", ".join(f"{n} {r / 1e9:.0f} ({r / ceiling:.0%})" for n, r in rates.items())
        log(f"{count:4} of {N:6} x {K:5}: {shown}")
        for name, r in row.items():
            total[name] += count * r["seconds"]["median"]
            if r["error"] > TOLERANCE:
                raise ValueError(f"{name} at {N} x {K} is wrong by {r['error']:.1%} of the largest")
    steps = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in total.items())
    log(f"all linears of a step, ms: {steps}")
    return {
        "benchmark": "gpu_products",
        "config": args.config.stem,
        "shapes": figures,
        "step_seconds": total,
        "int4_over_tinygemm": total["tinygemm"] / total["int4"],
        "read_bytes_per_s": ceiling,
    } | provenance(device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    shape = ROOT / "benchmarks" / "configs" / "llama-3.1-8b.json"
    add("--config", type=Path, default=shape, help="(default: Llama 3.1 8B's)")
    add("--device", default="cuda", help="(default: cuda)")
    add("--rounds", type=int, default=10, help="turns of each (default: 10)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

"""How long GPTQ takes for a billion weights: some blocks of a shape, with random weights.

    python benchmarks/gpu_gptq.py                   # one block of Llama 3.1 8B's shape

Start at main. What is timed is what quantize.py --mode int4-gptq does with a block, by the code of
gptq.py: Hessians of the calibration texts, GPTQ, refinement, and the texts' way through the
finished block. Weights come from a generator and not from a file, and nothing is written. The ids
of the texts are random: their number and length set the time, not what they say.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench import provenance
from benchmarks.common import ROOT, exit_code, log
from benchmarks.gpu_common import seconds
from calibration.gptq import CalibratedBlock, embed, fill_module, inverse_factor, quantize_block
from host.devices import find_device
from layers.args import ModelArgs
from model import Transformer
from weights.hf import model_args
from weights.weight_files import read_json

VOCABULARY = 1024  # ids: embeddings are no part of GPTQ


class RandomWeights:
    """What gptq.py reads of a checkpoint."""

    def __init__(self, args: ModelArgs):
        self.args = args

    def read_into(self, name: str, out: Tensor) -> None:
        out.normal_(0, 0.02)
        if "norm" in name and name.endswith("weight"):
            out.fill_(1)


class Counted:
    """Told of each linear as it is done: its name, errors, and seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, error: float, rounding: float, took: float) -> None:
        self.seconds[name] = took
        log(f"{name}: {took:.1f} s; error {error:.2e}, of rounding {rounding:.2e}")


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict[str, Any]:
    device, generator = find_device(args.device), torch.manual_seed(0)
    shape = model_args(read_json(args.config)).with_layers(range(args.layers))
    shape = replace(shape, vocab_size=VOCABULARY)
    tokens = torch.randint(VOCABULARY, (args.samples, args.length), generator=generator)
    weights, counted, in_blocks = RandomWeights(shape), Counted(), 0.0
    with torch.device("meta"):
        model = Transformer(shape)
    fill_module(weights, model, "positions", torch.device("cpu"))
    dense = embed(weights, model, tokens)
    quantized = dense.clone()
    model.positions.to(device)
    inverse_factor(torch.eye(64, device=device))  # starts the library that does this on a GPU

    def one_block(n: int) -> None:
        nonlocal dense, quantized
        block = CalibratedBlock(model, n, dense, quantized)
        dict(quantize_block(block, f"layers.{n}.", args.groupsize, counted, True))
        dense, quantized = block.outputs()

    for n in range(args.layers):
        fill_module(weights, model, f"layers.{n}", device)
        in_blocks += seconds(lambda: one_block(n), device)  # noqa: B023
    billions = sum(model.get_submodule(name).weight.numel() for name in counted.seconds) / 1e9
    rate, linears = in_blocks / billions, sum(counted.seconds.values()) / billions
    log(f"GPTQ: {rate:.0f} s per billion weights, {linears:.0f} of them in the linears")
    return {
        "benchmark": "gpu_gptq",
        "config": args.config.stem,
        "layers": args.layers,
        "samples": args.samples,
        "length": args.length,
        "groupsize": args.groupsize,
        "weights": round(billions * 1e9),
        "seconds": in_blocks,
        "seconds_per_billion": rate,
        "linears_seconds_per_billion": linears,
        "seconds_of_linears": counted.seconds,
    } | provenance(device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    shape = ROOT / "benchmarks" / "configs" / "llama-3.1-8b.json"
    add("--config", type=Path, default=shape, help="(default: Llama 3.1 8B's)")
    add("--device", default="cuda", help="(default: cuda)")
    add("--layers", type=int, default=1, help="blocks (default: 1)")
    add("--samples", type=int, default=128, help="texts, as of quantize.py (default: 128)")
    add("--length", type=int, default=2048, help="tokens of each (default: 2048)")
    add("--groupsize", type=int, default=32, help="inputs to a scale (default: 32)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

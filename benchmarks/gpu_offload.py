"""Layers in host memory: how near decoding comes to bare copies of its bytes, in 16 and in 4 bits.

    python benchmarks/gpu_offload.py                # OPT-13B's shape in 8 GB of device memory

Start at measured. Every step brings all layers to the device, for few enough rows that copying
bounds it. The bare rate is that of pinned memory to the device, a layer at a time, measured before
each run. PyTorch is held to the memory that it is given: more would be an error. On a CPU, where
the script can be tried, the layers are on disk.
"""

import argparse
import gc
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import provenance
from benchmarks.common import ROOT, exit_code, log, show, spread
from benchmarks.gpu_common import Attempts
from benchmarks.offload import copy_rate, run
from host.devices import find_device
from load import random_model
from tiers.policy import Policy, Share


def measured(args: argparse.Namespace, name: str, policy: Policy) -> dict[str, Any]:
    """A step's seconds, its bytes per second, and the same over the bare rate: of some rounds."""
    options = {"device": args.device, "compile": args.compile}
    lm = random_model(args.config, policy=policy, **options)
    nbytes = len(lm.model.layers) * lm.model.layers.layout.nbytes
    run(lm, policy.rows, args.prompt, 2)  # warms up
    steps, bare = [], []
    for _ in range(args.rounds):
        bare.append(copy_rate(lm))
        steps.append(statistics.median(run(lm, policy.rows, args.prompt, args.new)[1:]))
        log(f"{name}: a step of {steps[-1]:.2f} s; bare copies at {bare[-1] / 1e9:.1f} GB/s")
    rates = [nbytes / step for step in steps]
    figures = {
        "bytes_per_step": nbytes,
        "step_s": spread(steps),
        "tokens_per_s": spread([policy.rows / step for step in steps]),
        "bytes_per_s": spread(rates),
        "copy_bytes_per_s": spread(bare),
        "of_copy_rate": spread([rate / most for rate, most in zip(rates, bare, strict=True)]),
    }
    log(f"{name}: {show(figures['of_copy_rate'])} of the bare rate of {max(bare) / 1e9:.1f} GB/s")
    return figures


def forget(device: torch.device) -> None:
    """A model refers to itself, and must be gone before another takes its memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    device, attempt, figures = find_device(args.device), Attempts(), {}
    args.device, host = str(device), 100 if device.type == "cuda" else 0
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory / total), device)
    share, grouping = Share(0, host), {"micro_batch": args.rows, "micro_batches": args.batches}
    policy = Policy(share, directory=args.directory, **grouping)
    for name, way in (("16 bits", policy), ("4 bits", replace(policy, compress_weight=True))):
        figures[name] = attempt(name, lambda: measured(args, name, way))  # noqa: B023
        forget(device)
    gain = None
    if all(figures.values()):
        gain = figures["16 bits"]["step_s"]["median"] / figures["4 bits"]["step_s"]["median"]
        log(f"4 bits make {gain:.2f} times the tokens/s of 16")
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    said = {"benchmark": "gpu_offload", "config": args.config.stem, "memory": args.memory}
    said |= {"rows": policy.rows, "prompt": args.prompt, "peak_bytes": peak, "speed_up": gain}
    return said | {"weights": figures, "failed": attempt.failed} | provenance(device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    shape = ROOT / "benchmarks" / "configs" / "opt-13b.json"
    add("--config", type=Path, default=shape, help="(default: OPT-13B's)")
    add("--device", default="cuda", help="(default: cuda)")
    add("--memory", type=float, default=8e9, help="bytes on the device (default: 8e9)")
    add("--rows", type=int, default=8, help="of a micro-batch (default: 8)")
    add("--batches", type=int, default=4, help="micro-batches (default: 4)")
    add("--prompt", type=int, default=32, help="tokens (default: 32)")
    add("--new", type=int, default=4, help="tokens of a run (default: 4)")
    add("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    add("--compile", action="store_true", help="compile the block")
    add("--directory", type=Path, default=Path("offload"), help="for scratch files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

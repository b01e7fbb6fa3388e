"""Write a checkpoint with int8 or int4 weights beside the one that it is made from.

    python quantize.py --checkpoint_path checkpoints/demo --mode int4 --groupsize 32

Start at run, then quantize. They print the sizes, then read, quantise and write one tensor after
another, so that the model may be larger than memory. The file appears only when it is complete.
quant/linear.py rounds a layer; calibration/ chooses integers by GPTQ. The file holds its own
description (the scheme), so that generate.py needs only its path.

Embeddings, norms and biases keep their dtype: a step reads one row of the embedding. The output
head is int8 by default (--head): a step reads all of it, and its errors change the likeliest token
directly. A head that is tied to the embedding is stored as a tensor of its own.
"""

import argparse
import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cli import command
from cli.early import find_inputs
from cli.options import parse_quantize_args as parse_args

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    ARGS = command.begin(parse_args)
    find_inputs("quantize.py", ARGS, ARGS.calibration_file)

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.texts import GptqOptions, calibrated_blocks
from checkpoint import Checkpoint
from cli.command import exit_code
from host.devices import find_device
from host.log import log, set_quiet
from host.memory import size_text
from host.threads import set_threads
from kernels.cpu.build import unsupported_reason
from load import meta_model
from model import Linear, Transformer
from options.settings import CalibrationOptions
from quant.linear import (
    QuantizedLinear,
    make_scheme,
    quantized_linear,
    round_to_nearest,
)
from weights.allocation import stored_tensors
from weights.saving import check_checkpoint_writable, log_replaced, save_checkpoint

Values = Iterator[tuple[str, Tensor]]  # name and tensor
MAX_MEASURED_WIDTH = 2048  # outputs and inputs of the product that is timed


def file_name(mode: str, groupsize: int) -> str:
    return f"model_{mode}.pth" if mode == "int8" else f"model_{mode}.g{groupsize}.pth"


def quantize(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, blocks: Iterable[Any] = ()
) -> None:
    """Write the quantised file, completely or not at all.

    blocks: (name, buffers) of linears that are not to be rounded to nearest. Raises ValueError for
    a weight that is not finite, naming it, and if the disk is too small.
    """
    model = planned(checkpoint, scheme)
    tensors = planned_tensors(model)
    values = with_bar(quantized_values(checkpoint, model, scheme, blocks), tensors)
    save_checkpoint(target, checkpoint.config, scheme, tensors, values)


def planned(checkpoint: Checkpoint, scheme: dict[str, Any] | None) -> Transformer:
    """Build the model of a file on the meta device, in the dtypes of the file."""
    model = meta_model(checkpoint.args, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(checkpoint.dtype)
    return model


def planned_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the meta device."""
    return {name: tensor.detach() for name, (tensor, _) in stored_tensors(model).items()}


def quantized_values(
    checkpoint: Checkpoint, model: Transformer, scheme: dict[str, Any], blocks: Iterable[Any]
) -> Values:
    """Yield the tensors of the file: linears of `blocks`, other linears, then dense tensors."""
    done = set()
    for name, buffers in blocks:
        done.add(name)
        yield from prefixed(name, buffers)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name in linears:
        if name not in done:
            weight = finite(checkpoint, source_name(checkpoint, f"{name}.weight"))
            yield from prefixed(name, round_to_nearest(weight, linears[name]))
    for name in stored_tensors(model):
        module = name.rpartition(".")[0]
        if module not in linears or name == f"{module}.bias":
            yield name, checkpoint.read(name)


def prefixed(module: str, buffers: dict[str, Tensor]) -> Values:
    """Put a module's name before those of its buffers."""
    return ((f"{module}.{leaf}", tensor) for leaf, tensor in buffers.items())


def with_bar(values: Values, tensors: dict[str, Tensor]) -> Values:
    """Yield the values with a bar. It starts at the first, which may take hours to calibrate."""
    values = itertools.chain([next(values)], values)
    total = sum(t.nbytes for t in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="write") as bar:
        for name, tensor in values:
            yield name, tensor
            bar.update(tensor.nbytes)


def source_name(checkpoint: Checkpoint, name: str) -> str:
    """Return the tensor of the checkpoint to read: the embedding for a tied output head."""
    return name if name in checkpoint.tensors else "tok_embeddings.weight"


def finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a weight in float32. Raises ValueError if it is not finite."""
    weight = checkpoint.read(name, torch.float32)
    if not weight.isfinite().all():
        raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: download it again")
    return weight


def announce(checkpoint: Checkpoint, scheme: dict[str, Any], target: Path) -> None:
    """Log the size of the output and the speed-up that it can give."""
    dense, model = planned(checkpoint, None), planned(checkpoint, scheme)
    total = sum(t.nbytes for t in planned_tensors(model).values())
    weights = sum(p.numel() for p in dense.parameters())
    speed_up = dense.bytes_per_step() / model.bytes_per_step()
    log(f"{checkpoint.path}: {weights:,} weights, {size_text(checkpoint.nbytes)}")
    log(f"{target}: {size_text(total)}, {8 * total / weights:.2f} bits per weight")
    gain = f"decoding, where reading weights bounds it, up to {speed_up:.1f} times as fast"
    log(slowdown(checkpoint, scheme) or gain)


def slowdown(checkpoint: Checkpoint, scheme: dict[str, Any]) -> str | None:
    """Return a warning if this machine multiplies by quantised weights more slowly."""
    reason = unsupported_reason(torch.bfloat16)
    if reason is None or find_device("auto").type != "cpu":
        return None  # kernels/ is faster than dense layers
    N, K = (
        min(n, MAX_MEASURED_WIDTH) for n in checkpoint.tensors["layers.0.attention.wo.weight"].shape
    )
    dense, quantised = product_seconds(N, K, scheme)
    if quantised <= dense:
        return None
    return (
        f"quantised weights save memory here, and no time ({reason}): one row times {N} x {K} "
        f"weights takes {quantised * 1e3:.3g} ms in {scheme['mode']} and {dense * 1e3:.3g} ms as "
        f"they are, {quantised / dense:.1f} times as long"
    )


@torch.inference_mode()
def product_seconds(N: int, K: int, scheme: dict[str, Any]) -> tuple[float, float]:
    """Time the product of one row with dense bfloat16 weights, (N, K), and with quantised ones."""
    dense = Linear(K, N, bias=False).bfloat16()
    dense.weight.normal_(std=0.02)
    quantised = quantized_linear(dense, scheme["linears"])
    for name, buffer in round_to_nearest(dense.weight, quantised).items():
        setattr(quantised, name, buffer)
    x = torch.randn(1, K).bfloat16()
    dense(x), quantised(x)  # warm up
    return best_seconds(dense, x), best_seconds(quantised, x)


def best_seconds(layer: torch.nn.Module, x: Tensor) -> float:
    """Return the least time of five calls, which other processes have disturbed least."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
    return min(times)


def run(args: argparse.Namespace) -> Path:
    """Write the file and return its path. Raises what quantize and calibrated_blocks raise."""
    set_threads(args.threads)
    scheme = make_scheme(args.mode, args.groupsize, args.head)
    checkpoint = Checkpoint(args.checkpoint_path)
    if checkpoint.scheme:
        raise ValueError(
            f"{checkpoint.path} is quantised already, as {checkpoint.scheme['mode']}: give the "
            "checkpoint that it was made from"
        )
    target = checkpoint.directory / file_name(args.mode, args.groupsize)
    checkpoint.check(meta_model(checkpoint.args, None))
    check_checkpoint_writable(target)
    announce(checkpoint, scheme, target)
    log_replaced(target)
    if args.mode == "int4-gptq":
        quantize_by_gptq(checkpoint, scheme, target, args)
    else:
        quantize(checkpoint, scheme, target)
    return target


def quantize_by_gptq(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, args: argparse.Namespace
) -> None:
    """Write the file with blocks from GPTQ; finished blocks survive an interruption."""
    for name in tqdm(checkpoint.tensors, desc="check", leave=False, disable=None):
        finite(checkpoint, name)  # before GPTQ, which may take hours
    tasks = tuple(args.calibration_tasks or ())
    lengths = args.calibration_seq_length, args.calibration_samples
    calibration = CalibrationOptions(args.calibration_file, tasks, *lengths)
    how = GptqOptions(args.groupsize, not args.no_act_order, args.train_steps, args.device)
    work = target.with_name(f"{target.name}.partial")
    quantize(checkpoint, scheme, target, calibrated_blocks(checkpoint, work, calibration, how))
    shutil.rmtree(work)


def main(args: argparse.Namespace) -> int:
    set_quiet(args.quiet)
    resumable = "; the same command goes on from here" if "gptq" in args.mode else ""
    stopped = f"stopped; no file was written{resumable}"
    return exit_code("quantize.py", lambda: print(run(args)), stopped)


if __name__ == "__main__":
    sys.exit(main(ARGS))

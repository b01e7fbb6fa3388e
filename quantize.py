"""Write a checkpoint with int8 or int4 weights beside the one that it is made from.

    python quantize.py --checkpoint_path checkpoints/demo --mode int4 --groupsize 32

Start at run, then quantize. Sizes come first, then one tensor after the other is read, quantised
and written, so that a model larger than memory can be quantised; the file appears only when it is
complete. What a layer becomes is in quantized.py, and what a text can do for it in calibrate.py.
How a file is quantised is recorded inside it (its scheme): generate.py needs nothing but its path.

Embeddings, norms and biases keep their dtype: a step looks up one row of the embedding. The output
head is read whole for every token, and the likeliest token hangs on it, so it is int8 unless
--head says otherwise; a head that shares the embedding's table is stored on its own.
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
from cli.options import parse_quantize_args as parse_args

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    ARGS = command.begin(parse_args)

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.texts import calibrated_blocks
from checkpoint import Checkpoint, check_writable, log_replaced, save_checkpoint, stored_tensors
from cli.command import exit_code
from host.devices import find_device
from host.log import log, set_quiet
from host.memory import size_text
from host.threads import set_threads
from kernels.cpu.build import unsupported_reason
from load import meta_model
from model import Linear, Transformer
from quant.linear import (
    QuantizedLinear,
    layer_scheme,
    make_scheme,
    quantized_linear,
    round_int4,
    round_int8,
)

Values = Iterator[tuple[str, Tensor]]  # a stored tensor's name, and the tensor
MEASURED = 2048  # outputs and inputs at most of the product that is measured


def file_name(mode: str, groupsize: int) -> str:
    return f"model_{mode}.pth" if mode == "int8" else f"model_{mode}.g{groupsize}.pth"


def quantize(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, blocks: Iterable[Any] = ()
) -> None:
    """Write the quantised file: all of it, or nothing.

    blocks: names of linears with the buffers that are to be taken instead of the nearest ones.
    Raises ValueError for weights that are not finite, naming the tensor, or too small a disk.
    """
    model = planned(checkpoint, scheme)
    tensors = planned_tensors(model)
    values = shown(quantized_values(checkpoint, model, scheme, blocks), tensors)
    save_checkpoint(target, checkpoint.config, scheme, tensors, values)


def planned(checkpoint: Checkpoint, scheme: dict[str, Any] | None) -> Transformer:
    """The model that a file holds, on the meta device, in the dtypes that it is stored in."""
    model = meta_model(checkpoint.args, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(checkpoint.dtype)
    return model


def planned_tensors(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, (tensor, _) in stored_tensors(model).items()}


def quantized_values(
    checkpoint: Checkpoint, model: Transformer, scheme: dict[str, Any], blocks: Iterable[Any]
) -> Values:
    done = set()
    for name, buffers in blocks:
        done.add(name)
        yield from named(name, buffers)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name in linears:
        if name not in done:
            weight = finite(checkpoint, source_name(checkpoint, f"{name}.weight"))
            yield from named(name, nearest(weight, layer_scheme(name, scheme)))
    for name in stored_tensors(model):
        module = name.rpartition(".")[0]
        if module not in linears or name == f"{module}.bias":
            yield name, checkpoint.read(name)


def nearest(weight: Tensor, said: dict[str, Any]) -> dict[str, Tensor]:
    return round_int8(weight) if said["bits"] == 8 else round_int4(weight, said["groupsize"])


def named(module: str, buffers: dict[str, Tensor]) -> Values:
    return ((f"{module}.{leaf}", tensor) for leaf, tensor in buffers.items())


def shown(values: Values, tensors: dict[str, Tensor]) -> Values:
    """The values, with a bar that begins at the first: it may have taken hours to calibrate."""
    values = itertools.chain([next(values)], values)
    total = sum(t.nbytes for t in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="write") as bar:
        for name, tensor in values:
            yield name, tensor
            bar.update(tensor.nbytes)


def source_name(checkpoint: Checkpoint, name: str) -> str:
    """A head that shares the embedding's table has no tensor of its own to be read."""
    return name if name in checkpoint.tensors else "tok_embeddings.weight"


def finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight in float32; ValueError where it is not finite."""
    weight = checkpoint.read(name, torch.float32)
    if not weight.isfinite().all():
        raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: download it again")
    return weight


def announce(checkpoint: Checkpoint, scheme: dict[str, Any], target: Path) -> None:
    """What will be written, and what it is good for."""
    dense, model = (planned(checkpoint, said) for said in (None, scheme))
    total = sum(t.nbytes for t in planned_tensors(model).values())
    weights = sum(p.numel() for p in dense.parameters())
    speed_up = dense.bytes_per_step() / model.bytes_per_step()
    log(f"{checkpoint.path}: {weights:,} weights, {size_text(checkpoint.nbytes)}")
    log(f"{target}: {size_text(total)}, {8 * total / weights:.2f} bits per weight")
    gain = f"decoding, where reading weights bounds it, up to {speed_up:.1f} times as fast"
    log(slowness(checkpoint, scheme) or gain)


def slowness(checkpoint: Checkpoint, scheme: dict[str, Any]) -> str | None:
    """In words, where quantised weights are multiplied more slowly here than dense ones."""
    reason = unsupported_reason(torch.bfloat16)
    if reason is None or find_device("auto").type != "cpu":
        return None  # the products of cpu_products.py and of the kernels are faster
    N, K = (min(n, MEASURED) for n in checkpoint.tensors["layers.0.attention.wo.weight"].shape)
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
    """The time of one row's product with (N, K) bfloat16 weights, and with those of a scheme."""
    dense = Linear(K, N, bias=False).bfloat16()
    dense.weight.normal_(std=0.02)
    quantised = quantized_linear(dense, scheme["linears"])
    for name, buffer in nearest(dense.weight, scheme["linears"]).items():
        setattr(quantised, name, buffer)
    x = torch.randn(1, K).bfloat16()
    dense(x), quantised(x)  # the first call prepares
    return shortest(dense, x), shortest(quantised, x)


def shortest(layer: torch.nn.Module, x: Tensor) -> float:
    """Of five calls, those of others on this machine left out as far as that goes."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
    return min(times)


def run(args: argparse.Namespace) -> Path:
    """The path of the file written. Raises what quantize and calibrated_blocks raise."""
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
    check_writable(target)
    announce(checkpoint, scheme, target)
    log_replaced(target)
    if args.mode != "int4-gptq":
        quantize(checkpoint, scheme, target)
    else:
        for name in tqdm(checkpoint.tensors, desc="check", leave=False, disable=None):
            finite(checkpoint, name)  # not after an hour
        work = target.with_name(f"{target.name}.partial")
        quantize(checkpoint, scheme, target, calibrated_blocks(checkpoint, work, args))
        shutil.rmtree(work)
    return target


def main(args: argparse.Namespace) -> int:
    set_quiet(args.quiet)
    more = "; the same command goes on from here" if "gptq" in args.mode else ""
    stopped = f"stopped; no file was written{more}"
    return exit_code("quantize.py", lambda: print(run(args)), stopped)


if __name__ == "__main__":
    sys.exit(main(ARGS))

"""Write a checkpoint with int8 or int4 weights into the folder of the dense checkpoint.

    python quantize.py --checkpoint_path checkpoints/demo --mode int4 --groupsize 32

Start at run, then quantize. They print the sizes, then read, quantise and write one tensor after
another, so that the model may be larger than memory. The file appears only when it is complete.
quant/linear.py rounds a layer; calibration/ chooses integers by GPTQ. The file holds its own
description (the scheme: the bits of the linears and of the output head, see
quant.linear.make_scheme), so that generate.py needs only its path. The buffers of a linear are the
tensors of its quantised layer: integers, scales, zero points.

Embeddings, norms and biases keep their dtype: a step reads one row of the embedding. The output
head is int8 by default (--head): a step reads all of it, and its rounding errors change the
likeliest token directly. A head that is tied to the embedding is stored as a tensor of its own.
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
from layers.basic import Linear
from load import meta_model
from model import Transformer
from options.settings import CalibrationOptions
from quant.linear import (
    QuantizedLinear,
    make_scheme,
    quantized_linear,
    round_to_nearest,
)
from weights.allocation import stored_tensors
from weights.saving import check_checkpoint_writable, log_replaced, save_checkpoint

Values = Iterator[tuple[str, Tensor]]  # the name and the tensor of each entry of the output file
MAX_MEASURED_WIDTH = 2048  # limit on the outputs and inputs of the product that slowdown times


def file_name(mode: str, groupsize: int) -> str:
    """Return the name of the output file; int8 has no group size. mode: one of linear.MODES."""
    return f"model_{mode}.pth" if mode == "int8" else f"model_{mode}.g{groupsize}.pth"


def quantize(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, blocks: Iterable[Any] = ()
) -> None:
    """Write the quantised file `target`, completely or not at all.

    checkpoint: the dense one. scheme: see make_scheme. blocks: (name, buffers) of linears that GPTQ
    quantises while they are asked for; other linears are rounded to nearest. Raises ValueError for
    a weight with NaN or infinity, which it names, and if the disk has too little space.
    """
    model = planned(checkpoint, scheme)
    tensors = planned_tensors(model)
    values = with_bar(quantized_values(checkpoint, model, blocks), tensors)
    save_checkpoint(target, checkpoint.config, scheme, tensors, values)


def planned(checkpoint: Checkpoint, scheme: dict[str, Any] | None) -> Transformer:
    """Return the model of a checkpoint on the meta device: names, shapes and dtypes, no memory.

    scheme: how the linears are quantised; None: they are dense.
    """
    model = meta_model(checkpoint.args, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(checkpoint.dtype)
    return model


def planned_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors that the file of a model holds, by name: on the meta device, as the model
    is."""
    return {name: tensor.detach() for name, (tensor, _) in stored_tensors(model).items()}


def quantized_values(checkpoint: Checkpoint, model: Transformer, blocks: Iterable[Any]) -> Values:
    """Yield all tensors of the output file with their names.

    Reads and converts one tensor at a time, when it is asked for. First come the linears in
    `blocks`, (name, buffers) from GPTQ; then other quantised linears, rounded to nearest; then
    dense tensors. model: from planned(checkpoint, scheme); only its names and kinds of layers are
    used. Raises ValueError for a weight with NaN or infinity.
    """
    from_blocks = set()
    for name, buffers in blocks:
        from_blocks.add(name)
        yield from prefixed(name, buffers)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name in linears:
        if name not in from_blocks:
            weight = finite(checkpoint, source_name(checkpoint, f"{name}.weight"))
            yield from prefixed(name, round_to_nearest(weight, linears[name]))
    for name in stored_tensors(model):
        module = name.rpartition(".")[0]
        # The bias of a quantised linear is dense.
        if module not in linears or name == f"{module}.bias":
            yield name, checkpoint.read(name)


def prefixed(module: str, buffers: dict[str, Tensor]) -> Values:
    """Yield a module's buffers with their names in the state dict: module.buffer."""
    return ((f"{module}.{leaf}", tensor) for leaf, tensor in buffers.items())


def with_bar(values: Values, tensors: dict[str, Tensor]) -> Values:
    """Yield the values with a progress bar over the bytes of all `tensors`.

    tensors: all that will be written, by name; they may be on the meta device. The bar appears when
    the first value is there: until then GPTQ may take hours, with bars of its own.
    """
    values = itertools.chain([next(values)], values)
    total = sum(t.nbytes for t in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="write") as bar:
        for name, tensor in values:
            yield name, tensor
            bar.update(tensor.nbytes)


def source_name(checkpoint: Checkpoint, name: str) -> str:
    """Return the name under which the checkpoint stores a weight. The weight of a tied output head
    is stored as the embedding's."""
    return name if name in checkpoint.tensors else "tok_embeddings.weight"


def finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a tensor in float32. Raises ValueError if it holds NaN or infinity, for which there is
    no scale. name: in the checkpoint."""
    weight = checkpoint.read(name, torch.float32)
    if not weight.isfinite().all():
        raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: download it again")
    return weight


def announce(checkpoint: Checkpoint, scheme: dict[str, Any], target: Path) -> None:
    """Log the sizes of the checkpoint and the output, and the speed-up of decoding.

    Called before the work begins. The speed-up is an upper bound: the bytes that a dense step
    reads, divided by those that a quantised step reads. If quantised products are slower than dense
    ones here, a line that says so replaces it (slowdown). target: the path of the output.
    """
    dense, model = planned(checkpoint, None), planned(checkpoint, scheme)
    total = sum(t.nbytes for t in planned_tensors(model).values())
    weights = sum(p.numel() for p in dense.parameters())
    speed_up = dense.bytes_per_step() / model.bytes_per_step()
    log(f"{checkpoint.path}: {weights:,} weights, {size_text(checkpoint.nbytes)}")
    log(f"{target}: {size_text(total)}, {8 * total / weights:.2f} bits per weight")
    gain = f"decoding, where reading weights bounds it, up to {speed_up:.1f} times as fast"
    log(slowdown(checkpoint, scheme) or gain)


def slowdown(checkpoint: Checkpoint, scheme: dict[str, Any]) -> str | None:
    """Return a warning if quantised products are slower than dense ones here, else None.

    They can be slower only on a CPU without a C++ compiler, which kernels/cpu needs. There this
    times a product of the size of wo (attention's output) of layer 0, with at most
    MAX_MEASURED_WIDTH outputs and inputs.
    """
    reason = unsupported_reason(torch.bfloat16)
    if reason is None or find_device("auto").type != "cpu":
        return None  # the kernels in kernels/ are faster than dense layers
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
    """Return the seconds of a one-row product with dense bfloat16 weights, and with quantised ones.

    The weights are random, of N outputs and K inputs. scheme: see make_scheme; only its entry
    "linears" is used.
    """
    dense = Linear(K, N, bias=False).bfloat16()
    dense.weight.normal_(std=0.02)
    quantised = quantized_linear(dense, scheme["linears"])
    for name, buffer in round_to_nearest(dense.weight, quantised).items():
        setattr(quantised, name, buffer)
    x = torch.randn(1, K).bfloat16()
    dense(x), quantised(x)  # warm up
    return best_seconds(dense, x), best_seconds(quantised, x)


def best_seconds(layer: torch.nn.Module, x: Tensor) -> float:
    """Return the shortest time of five calls of layer(x), in seconds: that call was disturbed least
    by other processes."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
    return min(times)


def run(args: argparse.Namespace) -> Path:
    """Check the input, write the quantised file and return its path.

    args: of cli.options.parse_quantize_args. Raises ValueError for a checkpoint that is quantised
    already, for malformed weights and for unsuitable calibration text, OSError for a folder that
    is not writable, and MemoryError.
    """
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
    """Write the quantised file `target` with linears from GPTQ, for --mode int4-gptq.

    Finished blocks are stored in the folder `target`.partial, from which the same command continues
    after an interruption. The folder is removed at the end. args: as in run. Raises the errors of
    calibrated_blocks, and ValueError for a weight with NaN or infinity.
    """
    for name in tqdm(checkpoint.tensors, desc="check", leave=False, disable=None):
        finite(checkpoint, name)  # report NaN now, not after hours of GPTQ
    tasks = tuple(args.calibration_tasks or ())
    lengths = args.calibration_seq_length, args.calibration_samples
    calibration = CalibrationOptions(args.calibration_file, tasks, *lengths)
    how = GptqOptions(args.groupsize, not args.no_act_order, args.train_steps, args.device)
    work = target.with_name(f"{target.name}.partial")
    quantize(checkpoint, scheme, target, calibrated_blocks(checkpoint, work, calibration, how))
    shutil.rmtree(work)


def main(args: argparse.Namespace) -> int:
    """Run the command, print the path of the file and return the exit code; see exit_code in
    cli/command.py. args: as in run. After Ctrl-C the line `stopped` says whether the same command
    would continue the work."""
    set_quiet(args.quiet)
    resumable = "; the same command goes on from here" if "gptq" in args.mode else ""
    stopped = f"stopped; no file was written{resumable}"
    return exit_code("quantize.py", lambda: print(run(args)), stopped)


if __name__ == "__main__":
    sys.exit(main(ARGS))

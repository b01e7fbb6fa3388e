"""GPTQ: int4 weights that minimise the error of a linear's outputs, not of its weights.

Start at quantize_blocks. One block (layer) of the model is in memory at a time. Calibration texts
run through it, which gives the Hessian of each linear's squared output error: H = Y'Y over its
inputs Y (Y' is Y's transpose). `gptq` rounds the columns of the linear's weight one by one; the
columns not yet rounded compensate the error. `refine` then improves the result by coordinate
descent. The next linear gets its inputs from the quantised linears before it. The texts also run
through the dense block, which gives the linear's inputs X there; (X - Y)'Y is called the drift.

Based on Frantar et al., "GPTQ" (arXiv 2210.17323): algorithm 1, the Cholesky form and damping of
section 3.3, and groups. A strip, there called a block, is up to 128 neighbouring columns, whose
errors the columns after the strip compensate at once. act_order with groups fixed beforehand is
from the authors' later code, the coordinate descent from QuantEase (2309.01885), and the dense
model's outputs as the target from GPTAQ (2504.02692).

The grid of a weight is its scales and zero points, float32 (N, P) each: a weight's value is
(q - zero) * scale with an integer q from 0 to 15. The output error of an output channel, whose
quantised weights have the errors e, is the squared error of its outputs, e H e'.

Shapes: N out_features, K in_features, S groupsize, P groups of inputs, B texts, T tokens, D dim.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint
from kernels import gpu
from layers.basic import Linear
from model import Transformer
from quant.linear import (
    choose_int4_grid,
    dequantize_int4,
    nearest_int4,
    pack_int4,
    round_int4,
    round_scales,
    scale_units,
    unpack_nibbles,
)
from weights.allocation import allocate

TEXTS_PER_BATCH = 8  # texts that run through a block at once: bounds the memory of activations
STRIP = 128  # columns of a strip; kernels/gpu/columns.py is made for at most so many
DAMPING = 0.01  # share of H's mean diagonal that is added to its diagonal
REFINE_PASSES = 3  # passes of coordinate descent over the scales and integers of a weight
DRIFT_SHARE = 0.5  # share of the drift that is compensated; 1.0 overfits the calibration texts
Buffers = dict[str, Tensor]  # the buffers of an Int4Linear, by name
# Arguments: name of the linear, its relative output error, the relative output error of rounding to
# nearest, seconds.
Report = Callable[[str, float, float, float], Any]


def gptq(weight: Tensor, hessian: Tensor, groupsize: int, act_order: bool = True) -> Buffers:
    """Quantise a weight, (N, K), to int4 so that the outputs change little. Returns the buffers.

    Rounds column by column; later columns compensate the errors of earlier ones. hessian: (K, K)
    float32, Y'Y over the inputs Y; not changed. act_order: round the columns in the order of
    descending diagonal of the Hessian, with the grid chosen beforehand; the result has the columns
    in their old order. False: round them in their own order, and choose each group's scales and
    zero points again when the group is reached. Raises ValueError for a Hessian that cannot be
    inverted.
    """
    W, H = weight.float().clone(), hessian.clone()
    diagonal = H.diagonal()  # a view: the next line changes H
    diagonal[diagonal == 0] = 1  # an input that was always zero: its weights do not matter
    columns = torch.arange(W.shape[1], device=W.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else columns
    group = (columns // groupsize)[order].tolist()  # of each column
    grid = choose_int4_grid(W, groupsize)  # scales and zero points, (N, P) each
    regrid = None if act_order else groupsize
    q = round_strips(W[:, order], inverse_factor(H[order][:, order]), group, grid, regrid)
    return pack_int4(q[:, order.argsort()], *grid, groupsize)


def round_strips(
    W: Tensor, U: Tensor, group: list[int], grid: tuple[Tensor, Tensor], regrid: int | None
) -> Tensor:
    """Return W, (N, K), rounded to integers 0 to 15, as floats, one strip of columns after another.

    After each strip the columns after it compensate its errors: W changes in place. U: (K, K), from
    inverse_factor. group: the group of each column, K numbers. grid: scales and zero points, (N, P)
    each. regrid: None, or the group size. With a group size, a group's scales and zero points are
    chosen again, in place, when its first column is reached, because its weights have compensated
    earlier errors. The new scales are multiples of the row's old unit (scale_units). This requires
    columns in the order of their groups.
    """
    (scales, zeros), K = grid, W.shape[1]
    units, q = scale_units(scales), torch.empty_like(W)
    width = min(STRIP, regrid or STRIP)  # with regrid, a strip is within one group
    for start in range(0, K, width):
        end, g = min(start + width, K), group[start]
        if regrid and start % regrid == 0:
            new_grid = choose_int4_grid(W[:, start : start + regrid], regrid, units)
            scales[:, g], zeros[:, g] = (t[:, 0] for t in new_grid)
        per_column = (t[:, group[start:end]] for t in (scales, zeros))  # (N, columns) each
        q[:, start:end], errors = column_function(W, "round_columns")(
            W[:, start:end], U[start:end, start:end], *per_column
        )
        W[:, end:] -= errors @ U[start:end, end:]
    return q


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Round the C columns of a strip one after another, and spread the error of each over those
    after it.

    weight, scales, zeros: (N, C), one scale and zero point for each weight; not changed. factor:
    (C, C), the strip's square on the diagonal of inverse_factor's U. Returns the integers, as
    floats, and the errors divided by the factor's diagonal, (N, C) each, which round_strips spreads
    over the columns after the strip.
    """
    weight, q, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for n in range(weight.shape[1]):
        q[:, n] = nearest_int4(weight[:, n], scales[:, n], zeros[:, n])
        rounded = (q[:, n] - zeros[:, n]) * scales[:, n]
        errors[:, n] = (weight[:, n] - rounded) / factor[n, n]
        weight[:, n:] -= torch.outer(errors[:, n], factor[n, n:])
    return q, errors


def refine_columns(
    slope: Tensor, hessian: Tensor, q: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the integers that minimise the output error, for one of the C columns of a strip after
    another.

    All other columns are fixed while a column changes (coordinate descent). slope: (N, C), half the
    gradient of the output error with respect to the weights. hessian: (C, C), the strip's square on
    the Hessian's diagonal. q, scales, zeros: (N, C), float32. Returns the new integers and the
    change of each weight's value, (N, C) each; refine_integers adds the effect of the changes to
    the slope of later columns. 1e-30 avoids a division by 0 for inputs that were always 0.
    """
    slope, q, steps = slope.clone(), q.clone(), torch.zeros_like(slope)
    for n in range(slope.shape[1]):
        scale, zero = scales[:, n], zeros[:, n]
        value = (q[:, n] - zero) * scale
        best = nearest_int4(value - slope[:, n] / hessian[n, n].clamp_min(1e-30), scale, zero)
        steps[:, n] = (best - q[:, n]) * scale
        q[:, n] = best
        slope[:, n:] += torch.outer(steps[:, n], hessian[n, n:])
    return q, steps


def column_function(weight: Tensor, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return this file's function of that name, or that of kernels/gpu/columns.py if the weight is
    on a GPU on which kernels run. name: "round_columns" or "refine_columns"."""
    if not gpu.supports(weight):
        return {"round_columns": round_columns, "refine_columns": refine_columns}[name]
    from kernels.gpu import columns  # imports Triton

    return getattr(columns, name)


def refine(buffers: Buffers, weight: Tensor, hessian: Tensor, groupsize: int) -> Buffers:
    """Reduce the output error of a quantised weight by REFINE_PASSES passes of coordinate descent.

    buffers: the quantised weight. weight: (N, K), the dense weight that it approximates. hessian:
    (K, K). A pass chooses the best scale of each group, then the best integer of each weight while
    all other weights are fixed. The zero points stay. Returns new buffers. The rounding of scales
    can increase the error: the caller compares with best_of.
    """
    W, K = weight.float(), weight.shape[1]
    scales, zeros = buffers["scales"].float(), unpack_nibbles(buffers["zeros"]).float()
    zeros, units = zeros[:, : scales.shape[1]], scale_units(scales)  # an odd P has one nibble more
    q = unpack_nibbles(buffers["weight"]).float()[:, :K]  # (N, K)
    group = torch.arange(K, device=W.device) // groupsize  # (K,)
    for _ in range(REFINE_PASSES):
        errors = refit_scales(W, hessian, q, (scales, zeros), units, groupsize)  # (N, K)
        refine_integers(errors @ hessian, hessian, q, (scales, zeros), group)
    return pack_int4(q, scales, zeros, groupsize)


def refit_scales(
    W: Tensor,
    H: Tensor,
    q: Tensor,
    grid: tuple[Tensor, Tensor],
    units: Tensor,
    groupsize: int,
) -> Tensor:
    """Change the scales in place to those with the least output error for the integers q, (N, K).

    One group after another, with the other groups' scales fixed. W: (N, K), the weights to
    approximate. H: (K, K), the Hessian. grid: scales and zero points, (N, P) each; only the scales
    change, to multiples of the units, (N, 1) (quant.linear.scale_units). Returns the errors of the
    quantised weights, (N, K).
    """
    (scales, zeros), K = grid, W.shape[1]
    group = torch.arange(K, device=W.device) // groupsize  # (K,)
    errors = (q - zeros[:, group]) * scales[:, group] - W  # (N, K)
    for g in range(scales.shape[1]):
        columns = slice(g * groupsize, min((g + 1) * groupsize, K))
        levels = q[:, columns] - zeros[:, g : g + 1]  # weights divided by their scale
        # The output error is quadratic in the scale: one Newton step reaches its minimum.
        curvature = ((levels @ H[columns, columns]) * levels).sum(1).clamp_min(1e-30)  # (N,)
        scale = scales[:, g] - ((errors @ H[:, columns]) * levels).sum(1) / curvature
        scale = torch.where(scale > 0, scale, scales[:, g])
        scales[:, g] = round_scales(scale.unsqueeze(1), units)[:, 0]
        errors[:, columns] = levels * scales[:, g : g + 1] - W[:, columns]
    return errors


def refine_integers(
    slope: Tensor, H: Tensor, q: Tensor, grid: tuple[Tensor, Tensor], group: Tensor
) -> None:
    """Change the integers q, (N, K), in place to reduce the output error, column by column.

    slope: (N, K), half the gradient of the output error, which is the errors of the weights times
    H; overwritten. H: (K, K), the Hessian. grid: scales and zero points, (N, P) each. group: (K,),
    the group of each column.
    """
    for start in range(0, q.shape[1], STRIP):
        strip = slice(start, min(start + STRIP, q.shape[1]))
        per_column = (t[:, group[strip]] for t in grid)  # (N, columns) each
        q[:, strip], steps = column_function(slope, "refine_columns")(
            slope[:, strip], H[strip, strip], q[:, strip].contiguous(), *per_column
        )
        slope[:, strip.stop :] += steps @ H[strip, strip.stop :]


def best_of(candidates: list[Buffers], weight: Tensor, hessian: Tensor) -> Buffers:
    """Return buffers in which each row comes from the candidate that has the row's least output
    error.

    Rows do not affect each other's error, so each may come from any candidate. candidates: the
    quantised versions (Buffers) of a weight, (N, K). hessian: (K, K).
    """
    errors = torch.stack([row_errors(c, weight, hessian) for c in candidates])  # (n, N)
    best, rows = errors.argmin(0), torch.arange(len(weight), device=weight.device)
    return {name: torch.stack([c[name] for c in candidates])[best, rows] for name in candidates[0]}


def inverse_factor(H: Tensor) -> Tensor:
    """Return the upper triangular U, (K, K), with U'U = (H + damping)^-1. H: the Hessian, (K, K).

    The damping is a number that is added to H's diagonal: DAMPING times its mean, and ten times
    more after each failure. Raises ValueError after six failures.
    """
    damping = DAMPING * H.diagonal().mean()
    for _ in range(6):
        # failed is above 0 if a matrix is not positive definite.
        L, failed = torch.linalg.cholesky_ex(H + damping * torch.eye(len(H), device=H.device))
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed:
                return U
        damping *= 10
    raise ValueError("the calibration gives a Hessian that cannot be inverted: use other text")


def row_errors(buffers: Buffers, weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the output error e H e' of each output channel, (N,); e: the errors of its weights.

    buffers: the quantised weight. weight: (N, K), the dense weight that it approximates. hessian:
    H, (K, K).
    """
    e = dequantize_int4(**buffers)[:, : weight.shape[1]] - weight.float()  # (N, K)
    return ((e @ hessian) * e).sum(1)


@torch.inference_mode()
def quantize_blocks(
    checkpoint: Checkpoint,
    tokens: Tensor,
    groupsize: int,
    work: Path,
    report: Report,
    act_order: bool = True,
    device: torch.device = torch.device("cpu"),
) -> Iterator[tuple[str, Buffers]]:
    """Quantise all linears of all blocks by GPTQ. Yields the name and buffers of each.

    calibration/texts.py calls it. Yields block by block, also for blocks that an earlier run has
    finished: each block's buffers are read back from its file. tokens: (B, T), ids of the
    calibration texts. work: an existing directory for finished blocks. An interrupted run continues
    from it; its arguments must be the same, which the caller checks. report: called after each
    linear that this run quantises. act_order: see gptq. device: where a block computes; the
    activations between blocks stay on the CPU. Raises ValueError for a Hessian that cannot be
    inverted.
    """
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    fill_module(checkpoint, model, "positions", torch.device("cpu"))
    state = work / "state.pt"  # the number of finished blocks, and the outputs of the last one
    # dense, quantized: the next block's inputs in the dense model and in the quantised one,
    # (B, T, D) each.
    if state.exists():
        done, dense, quantized = torch.load(state, weights_only=True)
    else:
        done, dense = 0, embed(checkpoint, model, tokens)
        quantized = dense.clone()
    model.positions.to(device)
    for n in range(len(model.layers)):
        file = work / f"block{n}.pt"
        if n >= done:
            fill_module(checkpoint, model, f"layers.{n}", device)
            block = CalibratedBlock(model, n, dense, quantized)
            buffers = dict(quantize_block(block, f"layers.{n}.", groupsize, report, act_order))
            dense, quantized = block.outputs()
            model.layers[n].to("meta")
            torch.save(buffers, file)
            torch.save((n + 1, dense, quantized), state.with_suffix(".next"))
            state.with_suffix(".next").replace(state)  # atomic
        yield from torch.load(file, weights_only=True).items()


def quantize_block(
    block: "CalibratedBlock", prefix: str, groupsize: int, report: Report, act_order: bool
) -> Iterator[tuple[str, Buffers]]:
    """Quantise the linears of a block in the order in which they run.

    Yields the name, with `prefix` before it, and the buffers (on the CPU) of each linear. Writes
    the dequantised weight into the block, so that the next linear's inputs come from quantised
    weights. Each row of a weight takes the best of rounding to nearest, GPTQ and the refined GPTQ.
    Reports the output errors of the result and of rounding, divided by the sum of the squared
    outputs. act_order: see gptq.
    """
    for name in block.linears():
        start = time.perf_counter()
        hessian, drift = block.statistics(name)
        linear = block.quantized.get_submodule(name)
        weight = linear.weight.clone()
        target = without_drift(weight, hessian, drift)
        rounded = round_int4(weight, groupsize)
        by_gptq = gptq(target, hessian, groupsize, act_order)
        refined = refine(by_gptq, target, hessian, groupsize)
        buffers = best_of([rounded, by_gptq, refined], target, hessian)
        linear.weight.copy_(dequantize_int4(**buffers)[:, : weight.shape[1]])
        size = ((target @ hessian) * target).sum().clamp_min(1e-30)
        errors = [row_errors(b, target, hessian).sum() / size for b in (buffers, rounded)]
        report(prefix + name, *(e.item() for e in errors), time.perf_counter() - start)
        yield prefix + name, {leaf: buffer.cpu() for leaf, buffer in buffers.items()}


def without_drift(weight: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """Return weights, (N, K), that compensate the drift of a linear's inputs: GPTQ's target.

    X: the inputs in the dense block. Y: the inputs in the quantised block, which differ because
    earlier linears are quantised. hessian: Y'Y, drift: (X - Y)'Y, (K, K) each. The outputs of W for
    X are met best from Y by the weights W X'Y (Y'Y)^-1 (least squares). They differ from W by
    W drift (Y'Y)^-1, of which this function adds the share DRIFT_SHARE to W. The inverse, U'U, is
    damped.
    """
    U = inverse_factor(hessian)
    return weight + DRIFT_SHARE * (weight @ drift) @ U.t() @ U


class CalibratedBlock:
    """A dense block and its copy that is being quantised, with the inputs of each, (B, T, D).

    model: its layer number `layer` must hold its dense weights; it becomes the copy that is
    quantised, and a deep copy of it the dense block. dense, quantized: on the CPU, the outputs of
    the dense and of the quantised block before it, or, for the first block, two copies of embed's
    result: they must not share memory, because `outputs` overwrites them.
    """

    def __init__(self, model: Transformer, layer: int, dense: Tensor, quantized: Tensor):
        self.model, self.layer = model, layer
        self.dense, self.dense_inputs = copy.deepcopy(model.layers[layer]), dense
        self.quantized, self.inputs = model.layers[layer], quantized

    def linears(self) -> list[str]:
        """Return the names of the block's linears in the order in which they run.

        Runs one text through the block to find the order: a hook before each linear records its
        name (see record).
        """
        names = [name for name, m in self.quantized.named_modules() if isinstance(m, Linear)]
        calls: list[tuple[str, Tensor]] = []
        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.enter_context(input_hook(self.quantized, name, partial(record, calls, name)))
            self.run(self.quantized, self.inputs[:1])
        return [name for name, _ in calls]

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """Return Y'Y and (X - Y)'Y, (K, K) float32 each, over a linear's inputs for all texts.

        X: its inputs in the dense block. Y: its inputs in the quantised block, which depend on the
        linears quantised so far. Each forward stops at the linear. X - Y is computed before the
        product: the difference of two products would lose it to rounding.
        """
        weight = self.quantized.get_submodule(name).weight
        hessian, drift = weight.new_zeros(2, weight.shape[1], weight.shape[1])
        calls: list[tuple[str, Tensor]] = []  # of one batch of texts: dense, then quantised
        with (
            tf32_matmul(weight.device),
            input_hook(self.dense, name, partial(record, calls, "dense", stop=True)),
            input_hook(self.quantized, name, partial(record, calls, "quantized", stop=True)),
        ):
            splits = (t.split(TEXTS_PER_BATCH) for t in (self.dense_inputs, self.inputs))
            for parts in zip(*splits, strict=True):
                calls.clear()
                for block, part in zip((self.dense, self.quantized), parts, strict=True):
                    with contextlib.suppress(StopForward):
                        self.run(block, part)
                X, Y = (inputs.flatten(0, -2) for _, inputs in calls)  # (texts * T, K) each
                hessian.addmm_(Y.t(), Y)
                drift.addmm_((X - Y).t(), Y)
        return hessian, drift

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return the outputs of the dense and the quantised block for all texts, (B, T, D) each.

        They are the inputs of the next block. They overwrite the inputs of this block, so call this
        after the last call of statistics.
        """
        both = (self.dense, self.dense_inputs), (self.quantized, self.inputs)
        with tf32_matmul(next(self.dense.parameters()).device):
            for block, inputs in both:
                for part in inputs.split(TEXTS_PER_BATCH):
                    part.copy_(self.run(block, part))
        return self.dense_inputs, self.inputs

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block over whole texts, (texts, T, D) -> (texts, T, D), in float32.

        The result is on the block's device.
        """
        x = x.to(next(block.parameters()).device, torch.float32)
        return self.model.run_layer(self.layer, block, x)


@contextlib.contextmanager
def tf32_matmul(device: torch.device) -> Iterator[None]:
    """Within the context, let a GPU multiply float32 in TensorFloat-32, with 11 significant bits.

    An H100 is eight times as fast with it, and sums over thousands of tokens need no more bits.
    device: of the block. On a CPU nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def input_hook(block: nn.Module, name: str, hook: Callable[..., None]) -> Iterator[None]:
    """Within the context, call hook(module, args) before each call of a module of the block.

    name: of the module within the block.
    """
    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class StopForward(Exception):
    """Ends a block's forward after a hook has recorded a linear's input: the rest is not needed."""


def record(
    calls: list[tuple[str, Tensor]],
    name: str,
    module: nn.Module,
    args: tuple[Tensor],
    stop: bool = False,
) -> None:
    """Append (name, input of the module) to `calls`: a hook for input_hook, when functools.partial
    has bound `calls`, `name` and `stop`.

    module, args: of the call that the hook precedes. stop: whether to raise StopForward, which ends
    the forward of the block; the caller catches it.
    """
    calls.append((name, args[0]))
    if stop:
        raise StopForward


def embed(checkpoint: Checkpoint, model: Transformer, tokens: Tensor) -> Tensor:
    """Return the inputs of the first block, (B, T, D) float32 on the CPU, for ids, (B, T).

    model: on the meta device, except `positions`, which is on the CPU. The embedding (and
    project_in, where the model has one) is in memory during this call only.
    """
    modules = "tok_embeddings", "project_in"
    for name in modules:
        fill_module(checkpoint, model, name, torch.device("cpu"))
    pos = torch.arange(tokens.shape[1]).expand_as(tokens)
    x, _ = model.positions(model.project_in(model.tok_embeddings(tokens)), pos)
    for name in modules:
        model.get_submodule(name).to("meta")
    return x


def fill_module(checkpoint: Checkpoint, model: nn.Module, name: str, device: torch.device) -> None:
    """Load the weights of one module of a model from the checkpoint, in float32, to the device.

    The module must be on the meta device. name: of the module, such as layers.3; its tensors have
    the same names in the checkpoint.
    """

    def read(leaf: str, out: Tensor) -> None:
        checkpoint.read_into(f"{name}.{leaf}", out)

    allocate(model.get_submodule(name), device, torch.float32, read)

"""GPTQ: int4 weights that minimise the error of a layer's outputs, not of its weights.

Start at quantize_blocks. One block of the model is in memory at a time. Calibration texts run
through it, which gives the Hessian of each linear's squared output error: H = Y'Y over its inputs
Y. `gptq` rounds the columns of the linear one by one; the columns not yet rounded compensate the
error. `refine` then improves the result by coordinate descent. The next linear gets its inputs
from the quantised linears before it. The texts also run through the dense block: X'Y, with the
dense inputs X, tells how far the inputs have drifted.

Based on Frantar et al., "GPTQ" (arXiv 2210.17323): algorithm 1 with blocks of columns, the Cholesky
form and damping of section 3.3, and groups. act_order with groups fixed beforehand is from the
authors' later code, the coordinate descent from QuantEase (2309.01885), and the dense model's
outputs as the target from GPTAQ (2504.02692).

Shapes: N out_features, K in_features, S groupsize, P groups, B texts, T tokens, D dim.
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
from model import KVCache, Linear, Transformer
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

TEXTS_PER_BATCH = 8  # through a block
COLUMN_BLOCK = 128  # columns whose errors are added to the rest of the matrix at once
DAMPING = 0.01  # of the mean diagonal of H, added to the diagonal
REFINE_PASSES = 3
DRIFT_SHARE = 0.5  # of the drift that weights compensate: all of it overfits the texts
Buffers = dict[str, Tensor]  # of an Int4Linear, by name
Report = Callable[
    [str, float, float, float], Any
]  # linear, error, error of rounding to nearest, seconds


def gptq(weight: Tensor, hessian: Tensor, groupsize: int, act_order: bool = True) -> Buffers:
    """Quantise a weight, (N, K), column by column, to nearly the same outputs as int4.

    hessian: (K, K) float32, Y'Y over the inputs Y. act_order: take the columns by descending
    diagonal of the Hessian. Raises ValueError for a Hessian that cannot be inverted.
    """
    W, H = weight.float().clone(), hessian.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1  # an input that was always zero: its weights do not matter
    columns = torch.arange(W.shape[1], device=W.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else columns
    group = (columns // groupsize)[order].tolist()
    grid = choose_int4_grid(W, groupsize)  # scales and zero points, (N, P) each
    regrid = None if act_order else groupsize
    q = round_blocks(W[:, order], inverse_factor(H[order][:, order]), group, grid, regrid)
    return pack_int4(q[:, order.argsort()], *grid, groupsize)


def round_blocks(
    W: Tensor, U: Tensor, group: list[int], grid: tuple[Tensor, Tensor], regrid: int | None
) -> Tensor:
    """Round the columns of W, (N, K), in their order; add each block's errors to the rest of W.

    U: of inverse_factor. group: of each column. grid: scales and zero points, (N, P) each. regrid:
    the group size, to choose a group's grid anew when its first column is reached, after the errors
    of earlier columns have changed it; for columns in the order of their groups.
    """
    (scales, zeros), K = grid, W.shape[1]
    units, q = scale_units(scales), torch.empty_like(W)
    width = min(COLUMN_BLOCK, regrid or COLUMN_BLOCK)
    for start in range(0, K, width):
        end, g = min(start + width, K), group[start]
        if regrid and start % regrid == 0:
            chosen = choose_int4_grid(W[:, start : start + regrid], regrid, units)
            scales[:, g], zeros[:, g] = (t[:, 0] for t in chosen)
        per_column = (t[:, group[start:end]] for t in (scales, zeros))  # (N, columns) each
        q[:, start:end], errors = fastest(W, "round_columns")(
            W[:, start:end], U[start:end, start:end], *per_column
        )
        W[:, end:] -= errors @ U[start:end, end:]
    return q


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Round one column after another and spread its error over the columns after it.

    weight, scales, zeros: (N, C). factor: (C, C), of inverse_factor. Returns the integers and the
    errors divided by the factor's diagonal, (N, C) each.
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
    """Choose the best integer for one column after another while all other weights are fixed.

    All are (N, C), hessian is (C, C). slope: half the gradient of the output error. Returns the new
    integers and the change of each weight.
    """
    slope, q, steps = slope.clone(), q.clone(), torch.zeros_like(slope)
    for n in range(slope.shape[1]):
        scale, zero = scales[:, n], zeros[:, n]
        now = (q[:, n] - zero) * scale
        best = nearest_int4(now - slope[:, n] / hessian[n, n].clamp_min(1e-30), scale, zero)
        steps[:, n] = (best - q[:, n]) * scale
        q[:, n] = best
        slope[:, n:] += torch.outer(steps[:, n], hessian[n, n:])
    return q, steps


def fastest(weight: Tensor, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return round_columns or refine_columns by name: on a GPU, the kernel of kernels/gpu."""
    if not gpu.supports(weight):
        return {"round_columns": round_columns, "refine_columns": refine_columns}[name]
    from kernels.gpu import columns  # imports Triton

    return getattr(columns, name)


def refine(buffers: Buffers, weight: Tensor, hessian: Tensor, groupsize: int) -> Buffers:
    """Reduce the output error by REFINE_PASSES passes of coordinate descent.

    A pass chooses the best scale of each group, then the best integer of each weight while all
    others are fixed. The error can grow only by the rounding of scales.
    """
    W, K = weight.float(), weight.shape[1]
    scales, zeros = buffers["scales"].float(), unpack_nibbles(buffers["zeros"]).float()
    zeros, units = zeros[:, : scales.shape[1]], scale_units(scales)
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
    """Change the scales, (N, P), of grid in place to the best ones for the integers q, (N, K).

    Returns the errors of the weights, (N, K).
    """
    (scales, zeros), K = grid, W.shape[1]
    group = torch.arange(K, device=W.device) // groupsize  # (K,)
    errors = (q - zeros[:, group]) * scales[:, group] - W  # (N, K)
    for g in range(scales.shape[1]):
        columns = slice(g * groupsize, min((g + 1) * groupsize, K))
        levels = q[:, columns] - zeros[:, g : g + 1]  # weights divided by their scale
        curvature = ((levels @ H[columns, columns]) * levels).sum(1).clamp_min(1e-30)  # (N,)
        scale = scales[:, g] - ((errors @ H[:, columns]) * levels).sum(1) / curvature
        scale = torch.where(scale > 0, scale, scales[:, g])
        scales[:, g] = round_scales(scale.unsqueeze(1), units)[:, 0]
        errors[:, columns] = levels * scales[:, g : g + 1] - W[:, columns]
    return errors


def refine_integers(
    slope: Tensor, H: Tensor, q: Tensor, grid: tuple[Tensor, Tensor], group: Tensor
) -> None:
    """Change the integers q, (N, K), in place, one column after another.

    slope: (N, K), half the gradient of the output error; changed, too. group: (K,), of each column.
    """
    for start in range(0, q.shape[1], COLUMN_BLOCK):
        block = slice(start, min(start + COLUMN_BLOCK, q.shape[1]))
        per_column = (t[:, group[block]] for t in grid)  # (N, columns) each
        q[:, block], steps = fastest(slope, "refine_columns")(
            slope[:, block], H[block, block], q[:, block].contiguous(), *per_column
        )
        slope[:, block.stop :] += steps @ H[block, block.stop :]


def best_of(candidates: list[Buffers], weight: Tensor, hessian: Tensor) -> Buffers:
    """Take each output channel from the candidate with the least output error there."""
    errors = torch.stack([row_errors(c, weight, hessian) for c in candidates])  # (n, N)
    best, rows = errors.argmin(0), torch.arange(len(weight), device=weight.device)
    return {name: torch.stack([c[name] for c in candidates])[best, rows] for name in candidates[0]}


def inverse_factor(H: Tensor) -> Tensor:
    """Return the upper triangular U with U'U = (H + damping)^-1; damps more if that fails."""
    damping = DAMPING * H.diagonal().mean()
    for _ in range(6):
        L, failed = torch.linalg.cholesky_ex(H + damping * torch.eye(len(H), device=H.device))
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed:
                return U
        damping *= 10
    raise ValueError("the calibration gives a Hessian that cannot be inverted: use other text")


def row_errors(buffers: Buffers, weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the squared output error per channel, (N,): e H e' for the errors e of its weights."""
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
    """Yield name and buffers of every linear of every block, in the model's order.

    tokens: (B, T) ids. work: a directory for finished blocks, which a later run with the same
    arguments does not compute again. report: called after each linear. Raises ValueError for a
    Hessian that cannot be inverted.
    """
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    fill_module(checkpoint, model, "positions", torch.device("cpu"))
    state = work / "state.pt"  # the number of finished blocks, and their outputs
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
            found = dict(quantize_block(block, f"layers.{n}.", groupsize, report, act_order))
            dense, quantized = block.outputs()
            model.layers[n].to("meta")
            torch.save(found, file)
            torch.save((n + 1, dense, quantized), state.with_suffix(".next"))
            state.with_suffix(".next").replace(state)  # atomic
        yield from torch.load(file, weights_only=True).items()


def quantize_block(
    block: "CalibratedBlock", prefix: str, groupsize: int, report: Report, act_order: bool
) -> Iterator[tuple[str, Buffers]]:
    """Quantise the linears of a block in the order in which they run.

    Yields each linear's name and buffers, and writes the dequantised weight into the block, so that
    the next linear gets its inputs from it.
    """
    for name in block.linears():
        start = time.perf_counter()
        hessian, drift = block.statistics(name)
        linear = block.quantized.get_submodule(name)
        weight = linear.weight.clone()
        target = without_drift(weight, hessian, drift)
        rounded = round_int4(weight, groupsize)
        chosen = gptq(target, hessian, groupsize, act_order)
        refined = refine(chosen, target, hessian, groupsize)
        buffers = best_of([rounded, chosen, refined], target, hessian)
        linear.weight.copy_(dequantize_int4(**buffers)[:, : weight.shape[1]])
        size = ((target @ hessian) * target).sum().clamp_min(1e-30)
        errors = [row_errors(b, target, hessian).sum() / size for b in (buffers, rounded)]
        report(prefix + name, *(e.item() for e in errors), time.perf_counter() - start)
        yield prefix + name, {leaf: buffer.cpu() for leaf, buffer in buffers.items()}


def without_drift(weight: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """Return weights, (N, K), that compute from inputs Y nearly what `weight` computes from X.

    hessian: Y'Y, drift: (X - Y)'Y, both (K, K). The least squares solution is W X'Y (Y'Y)^-1; only
    DRIFT_SHARE of the change to it is made.
    """
    U = inverse_factor(hessian)
    return weight + DRIFT_SHARE * (weight @ drift) @ U.t() @ U


class CalibratedBlock:
    """A dense block and its copy that is being quantised, with the inputs of each, (B, T, D)."""

    def __init__(self, model: Transformer, layer: int, dense: Tensor, quantized: Tensor):
        self.model = model
        self.dense, self.dense_inputs = copy.deepcopy(model.layers[layer]), dense
        self.quantized, self.inputs = model.layers[layer], quantized

    def linears(self) -> list[str]:
        """Return the names of the linears in the order in which they run."""
        names = [name for name, m in self.quantized.named_modules() if isinstance(m, Linear)]
        seen: list[tuple[str, Tensor]] = []
        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.enter_context(input_hook(self.quantized, name, partial(record, seen, name)))
            self.run(self.quantized, self.inputs[:1])
        return [name for name, _ in seen]

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """Return Y'Y and (X - Y)'Y, (K, K) float32 each, over a linear's inputs.

        X: in the dense block, Y: in the quantised one. Subtracts before the product, which would
        otherwise round the small difference away.
        """
        weight = self.quantized.get_submodule(name).weight
        hessian, drift = weight.new_zeros(2, weight.shape[1], weight.shape[1])
        x: list[tuple[str, Tensor]] = []
        with (
            tf32_matmul(weight.device),
            input_hook(self.dense, name, partial(record, x, "dense", last=True)),
            input_hook(self.quantized, name, partial(record, x, "quantized", last=True)),
        ):
            splits = (t.split(TEXTS_PER_BATCH) for t in (self.dense_inputs, self.inputs))
            for parts in zip(*splits, strict=True):
                x.clear()
                for block, part in zip((self.dense, self.quantized), parts, strict=True):
                    with contextlib.suppress(StopForward):
                        self.run(block, part)
                X, Y = (rows.flatten(0, -2) for _, rows in x)  # (texts * T, K)
                hessian.addmm_(Y.t(), Y)
                drift.addmm_((X - Y).t(), Y)
        return hessian, drift

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Run both blocks over all texts. Returns (B, T, D) each, in the memory of the inputs."""
        both = (self.dense, self.dense_inputs), (self.quantized, self.inputs)
        with tf32_matmul(next(self.dense.parameters()).device):
            for block, inputs in both:
                for part in inputs.split(TEXTS_PER_BATCH):
                    part.copy_(self.run(block, part))
        return self.dense_inputs, self.inputs

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block, (texts, T, D) -> (texts, T, D), in float32 on the block's device."""
        args, device = self.model.args, next(block.parameters()).device
        x = x.to(device, torch.float32)
        key_pos = torch.arange(x.shape[1], device=device)  # (T,)
        pos = key_pos.expand(x.shape[:2])  # (texts, T)
        cache = KVCache((*x.shape[:2], args.n_kv_heads, args.head_dim), x.dtype, device)
        _, rotation = self.model.positions(x, pos)
        return block(x, rotation, self.model.mask(pos, key_pos, x.dtype), pos, cache)


@contextlib.contextmanager
def tf32_matmul(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply float32 in TensorFloat-32, with 11 significant bits.

    An H100 is eight times as fast with it, and sums over thousands of tokens need no more bits.
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
    """Call hook with the inputs of a module of the block."""
    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class StopForward(Exception):
    """Ends a block's forward when the inputs of the last module of interest are recorded."""


def record(
    into: list[tuple[str, Tensor]],
    name: str,
    module: nn.Module,
    args: tuple[Tensor],
    last: bool = False,
) -> None:
    """Append a module's name and its input, as a hook; last: raise StopForward."""
    into.append((name, args[0]))
    if last:
        raise StopForward


def embed(checkpoint: Checkpoint, model: Transformer, tokens: Tensor) -> Tensor:
    """Return the inputs of the first block, (B, T, D)."""
    tables = "tok_embeddings", "project_in"
    for name in tables:
        fill_module(checkpoint, model, name, torch.device("cpu"))
    pos = torch.arange(tokens.shape[1]).expand_as(tokens)
    x, _ = model.positions(model.project_in(model.tok_embeddings(tokens)), pos)
    for name in tables:
        model.get_submodule(name).to("meta")
    return x


def fill_module(checkpoint: Checkpoint, model: nn.Module, name: str, device: torch.device) -> None:
    """Load one module of a model on the meta device from the checkpoint, in float32."""

    def read(leaf: str, out: Tensor) -> None:
        checkpoint.read_into(f"{name}.{leaf}", out)

    allocate(model.get_submodule(name), device, torch.float32, read)

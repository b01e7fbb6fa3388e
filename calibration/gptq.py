"""GPTQ: int4 weights chosen for what a layer computes, not for what it stores.

Start at quantize_blocks. One block of the model is in memory at a time. Calibration texts run
through it, the Hessian of each linear's squared output error is summed up (H = Y'Y over its
inputs Y), `gptq` rounds the linear's columns one by one and lets the columns that are left make up
for the error, `refine` goes over the result again, and the next linear sees the inputs that the
rounded ones before it give. The texts also run through the dense block, as what they make of it
there (X'Y over the inputs X that a linear has there) says how far the inputs have drifted.

Based on Frantar et al., "GPTQ" (arXiv 2210.17323): algorithm 1, with blocks of columns and the
Cholesky form and damping of section 3.3, and groups; taking the columns by descending diagonal of
H, in groups fixed beforehand, is from the authors' later code. Descending on single columns
afterwards is QuantEase's (2309.01885), aiming at the dense model's outputs GPTAQ's (2504.02692).

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

from checkpoint import Checkpoint, allocate
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

TEXTS = 8  # that run through a block together
COLUMNS = 128  # whose errors reach the rest of the matrix together
DAMPING = 0.01  # of the mean diagonal of H, added to it
SWEEPS = 3  # of refine
DRIFT = 0.5  # share of the drift that weights make up for: all of it would overfit the texts
Buffers = dict[str, Tensor]  # of an Int4Linear
Report = Callable[[str, float, float, float], Any]  # linear, its error, rounding's, seconds


def gptq(weight: Tensor, hessian: Tensor, groupsize: int, act_order: bool = True) -> Buffers:
    """The Int4Linear whose outputs are nearest to those of `weight`, column by column.

    weight: (N, K). hessian: (K, K) float32, Y'Y over the inputs Y. act_order: columns that matter
    most come first. Raises ValueError for a Hessian that cannot be inverted.
    """
    W, H = weight.float().clone(), hessian.clone()
    N, K = W.shape
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1  # an input that was always zero: nothing depends on it
    columns = torch.arange(K, device=W.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else columns
    group = (columns // groupsize)[order].tolist()
    scales, zeros = choose_int4_grid(W, groupsize)  # (N, P) each
    units = scale_units(scales)
    W, U = W[:, order], inverse_factor(H[order][:, order])
    q = torch.empty_like(W)
    # Without act_order a group's grid is laid over what the columns before it have made of it: then
    # columns go by groups.
    width = COLUMNS if act_order else min(COLUMNS, groupsize)
    for start in range(0, K, width):
        end, g = min(start + width, K), group[start]
        if not act_order and start % groupsize == 0:
            grid = choose_int4_grid(W[:, start : start + groupsize], groupsize, units)
            scales[:, g], zeros[:, g] = (t[:, 0] for t in grid)
        wide = (t[:, group[start:end]] for t in (scales, zeros))  # (N, columns) each
        q[:, start:end], errors = fastest(W, "round_columns")(
            W[:, start:end], U[start:end, start:end], *wide
        )
        W[:, end:] -= errors @ U[start:end, end:]
    return pack_int4(q[:, order.argsort()], scales, zeros, groupsize)


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Round one column after the other, each error spread over the columns behind it.

    weight, scales, zeros: (N, C). factor: (C, C), of inverse_factor. Returns indices and errors,
    (N, C) each; an error is divided by the factor's diagonal.
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
    """Choose the best index for one column after the other, all other weights as they are.

    All (N, C) but hessian, (C, C). slope: half the gradient of the output error. Returns the new
    indices, and by how much each weight has changed.
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
    """round_columns or refine_columns; on a GPU, the kernel that does the same."""
    if not gpu.supports(weight):
        return {"round_columns": round_columns, "refine_columns": refine_columns}[name]
    from kernels.gpu import columns  # imports Triton

    return getattr(columns, name)


def refine(buffers: Buffers, weight: Tensor, hessian: Tensor, groupsize: int) -> Buffers:
    """Better still: the best scale for each group, then the best index for each single weight
    with all others as they are, a few times over. But for scales being rounded the output error
    can only shrink."""
    W, H, K = weight.float(), hessian, weight.shape[1]
    scales, zeros = buffers["scales"].float(), unpack_nibbles(buffers["zeros"]).float()
    units = scale_units(scales)
    q = unpack_nibbles(buffers["weight"]).float()[:, :K]  # (N, K)
    group = torch.arange(K, device=W.device) // groupsize  # (K,)
    for _ in range(SWEEPS):
        errors = (q - zeros[:, group]) * scales[:, group] - W  # (N, K)
        for g in range(scales.shape[1]):
            of = slice(g * groupsize, min((g + 1) * groupsize, K))
            unit = q[:, of] - zeros[:, g : g + 1]  # the group's weights but for their scale
            curvature = ((unit @ H[of, of]) * unit).sum(1).clamp_min(1e-30)  # (N,)
            scale = scales[:, g] - ((errors @ H[:, of]) * unit).sum(1) / curvature
            scale = torch.where(scale > 0, scale, scales[:, g])
            scales[:, g] = round_scales(scale.unsqueeze(1), units)[:, 0]
            errors[:, of] = unit * scales[:, g : g + 1] - W[:, of]
        slope = errors @ H  # (N, K), half the gradient
        for start in range(0, K, COLUMNS):
            of = slice(start, min(start + COLUMNS, K))
            wide = (t[:, group[of]] for t in (scales, zeros))  # (N, columns) each
            q[:, of], steps = fastest(W, "refine_columns")(
                slope[:, of], H[of, of], q[:, of].contiguous(), *wide
            )
            slope[:, of.stop :] += steps @ H[of, of.stop :]
    return pack_int4(q, scales, zeros[:, : scales.shape[1]], groupsize)


def best_of(candidates: list[Buffers], weight: Tensor, hessian: Tensor) -> Buffers:
    """Each output channel from that candidate whose output error is the smallest."""
    errors = torch.stack([row_errors(c, weight, hessian) for c in candidates])  # (n, N)
    best, rows = errors.argmin(0), torch.arange(len(weight), device=weight.device)
    return {name: torch.stack([c[name] for c in candidates])[best, rows] for name in candidates[0]}


def inverse_factor(H: Tensor) -> Tensor:
    """The upper triangular U with U'U = (H + damping)^-1; more damping where it must be."""
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
    """Squared output error of each output channel, (N,): e H e' for the errors e of its weights."""
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
    """Name and buffers of every linear of every block, in the model's order.

    tokens: (B, T) ids. work: a directory for what is finished, which a later run with the same
    arguments takes up: blocks that it holds are not computed again.
    Raises ValueError for a Hessian that cannot be inverted.
    """
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    fill_module(checkpoint, model, "positions", torch.device("cpu"))
    state = work / "state.pt"  # how many blocks are finished, and what they make of the texts
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
            state.with_suffix(".next").replace(state)
        yield from torch.load(file, weights_only=True).items()


def quantize_block(
    block: "CalibratedBlock", prefix: str, groupsize: int, report: Report, act_order: bool
) -> Iterator[tuple[str, Buffers]]:
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
    """Weights, (N, K), that give on the inputs Y what `weight` gives on X, as far as they can.

    hessian: Y'Y, drift: (X - Y)'Y, both (K, K). The least squares solution is W X'Y (Y'Y)^-1.
    """
    U = inverse_factor(hessian)
    return weight + DRIFT * (weight @ drift) @ U.t() @ U


class CalibratedBlock:
    """A block, dense and being quantised, and what of the texts reaches each, (B, T, D)."""

    def __init__(self, model: Transformer, layer: int, dense: Tensor, quantized: Tensor):
        self.model = model
        self.dense, self.dense_inputs = copy.deepcopy(model.layers[layer]), dense
        self.quantized, self.inputs = model.layers[layer], quantized

    def linears(self) -> list[str]:
        """Linears in the order in which they run; no two are given the same input."""
        names = [name for name, m in self.quantized.named_modules() if isinstance(m, Linear)]
        seen: list[tuple[str, Tensor]] = []
        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.enter_context(watched(self.quantized, name, partial(saw, seen, name)))
            self.run(self.quantized, self.inputs[:1])
        return [name for name, _ in seen]

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """Y'Y and (X - Y)'Y, (K, K) float32 each, for a linear's inputs: X, dense; Y, quantised.

        The difference comes before the product, where rounding cannot hide it.
        """
        weight = self.quantized.get_submodule(name).weight
        hessian, drift = weight.new_zeros(2, weight.shape[1], weight.shape[1])
        x: list[tuple[str, Tensor]] = []
        with (
            tensor_cores(weight.device),
            watched(self.dense, name, partial(saw, x, "dense", last=True)),
            watched(self.quantized, name, partial(saw, x, "quantized", last=True)),
        ):
            for parts in zip(self.dense_inputs.split(TEXTS), self.inputs.split(TEXTS), strict=True):
                x.clear()
                for block, part in zip((self.dense, self.quantized), parts, strict=True):
                    with contextlib.suppress(Reached):
                        self.run(block, part)
                X, Y = (rows.flatten(0, -2) for _, rows in x)  # (texts * T, K)
                hessian.addmm_(Y.t(), Y)
                drift.addmm_((X - Y).t(), Y)
        return hessian, drift

    def outputs(self) -> tuple[Tensor, Tensor]:
        """What the two make of the texts, (B, T, D) each."""
        both = (self.dense, self.dense_inputs), (self.quantized, self.inputs)
        with tensor_cores(next(self.dense.parameters()).device):
            for block, inputs in both:
                for part in inputs.split(TEXTS):
                    part.copy_(self.run(block, part))
        return self.dense_inputs, self.inputs

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """(texts, T, D) -> the same, in float32 on the block's device."""
        args, device = self.model.args, next(block.parameters()).device
        x = x.to(device, torch.float32)
        slots = torch.arange(x.shape[1], device=device)
        pos = slots.expand(x.shape[:2])
        cache = KVCache((*x.shape[:2], args.n_kv_heads, args.head_dim), x.dtype, device)
        _, rotation = self.model.positions(x, pos)
        return block(x, rotation, self.model.mask(pos, slots, x.dtype), pos, cache)


@contextlib.contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Multiply float32 on a GPU in TensorFloat-32, of 11 significant bits: what calibration sums up
    over thousands of tokens needs no more, and an H100 does it eight times as fast."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def watched(block: nn.Module, name: str, hook: Callable[..., None]) -> Iterator[None]:
    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Reached(Exception):
    """The rest of the block need not run."""


def saw(
    into: list[tuple[str, Tensor]],
    name: str,
    module: nn.Module,
    args: tuple[Tensor],
    last: bool = False,
) -> None:
    into.append((name, args[0]))
    if last:
        raise Reached


def embed(checkpoint: Checkpoint, model: Transformer, tokens: Tensor) -> Tensor:
    """What reaches the first block, (B, T, D)."""
    tables = "tok_embeddings", "project_in"
    for name in tables:
        fill_module(checkpoint, model, name, torch.device("cpu"))
    pos = torch.arange(tokens.shape[1]).expand_as(tokens)
    x, _ = model.positions(model.project_in(model.tok_embeddings(tokens)), pos)
    for name in tables:
        model.get_submodule(name).to("meta")
    return x


def fill_module(checkpoint: Checkpoint, model: nn.Module, name: str, device: torch.device) -> None:
    """Give one module of a model on the meta device its weights, in float32."""

    def read(leaf: str, out: Tensor) -> None:
        checkpoint.read_into(f"{name}.{leaf}", out)

    allocate(model.get_submodule(name), device, torch.float32, read)

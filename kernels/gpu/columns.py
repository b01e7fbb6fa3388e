"""GPTQ's loops over columns, of 128 columns at a time, as one kernel each.

In PyTorch a column takes some twenty launches, and a model's hundreds of thousands of columns
minutes. Rows do not depend on one another: a program keeps its rows' columns in registers and goes
through them. The oracles are gptq.round_columns and gptq.refine_columns.

Shapes: N rows, C columns, up to 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # of a program


@triton.jit
def column_of(tile, here):
    """(ROWS, C) and which column, (1, C) -> (ROWS,)."""
    return tl.sum(tl.where(here, tile, 0.0), 1)


@triton.jit
def nearest_index(value):
    """The nearest of 0 to 15, ties to even: what is added makes the sum a multiple of 1."""
    value = tl.minimum(tl.maximum(value, -1.0), 16.0)
    value = (value + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(value, 0.0), 15.0)


@triton.jit
def round_kernel(
    weight,  # (N, C) float32
    factor,  # (C, C) float32, upper triangular: of the inverse Hessian, see gptq.inverse_factor
    scales,  # (N, C) float32, contiguous; above 0
    zeros,  # (N, C) float32, contiguous, as q and errors are
    q,  # the indices, 0 to 15
    errors,  # of each weight, divided by the factor's diagonal
    N,
    C,
    weight_stride,
    factor_stride,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    """Round column after column, and spread each one's error over the columns behind it."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.arange(0, BC)[None, :]
    there = (n < N) & (k < C)
    w = tl.load(weight + n.to(tl.int64) * weight_stride + k, there, 0)
    scale = tl.load(scales + n * C + k, there, 1)
    zero = tl.load(zeros + n * C + k, there, 0)
    indices = tl.zeros((ROWS, BC), tl.float32)
    lost = tl.zeros((ROWS, BC), tl.float32)
    for c in range(C):
        here = k == c
        value, s, z = column_of(w, here), column_of(scale, here), column_of(zero, here)
        index = nearest_index(tl.div_rn(value, s) + z)
        diagonal = tl.load(factor + c * factor_stride + c)
        error = tl.div_rn(value - (index - z) * s, diagonal)
        w -= error[:, None] * tl.load(factor + c * factor_stride + k, (k >= c) & (k < C), 0)
        indices = tl.where(here, index[:, None], indices)
        lost = tl.where(here, error[:, None], lost)
    tl.store(q + n * C + k, indices, there)
    tl.store(errors + n * C + k, lost, there)


@triton.jit
def refine_kernel(
    slope,  # (N, C) float32
    hessian,  # (C, C) float32
    q,  # (N, C) float32, contiguous, as all that follow
    scales,
    zeros,
    better,
    steps,
    N,
    C,
    slope_stride,
    hessian_stride,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.arange(0, BC)[None, :]
    there = (n < N) & (k < C)
    gradient = tl.load(slope + n.to(tl.int64) * slope_stride + k, there, 0)
    scale = tl.load(scales + n * C + k, there, 1)
    zero = tl.load(zeros + n * C + k, there, 0)
    indices = tl.load(q + n * C + k, there, 0)
    taken = tl.zeros((ROWS, BC), tl.float32)
    for c in range(C):
        here = k == c
        g, s, z = column_of(gradient, here), column_of(scale, here), column_of(zero, here)
        old = column_of(indices, here)
        curvature = tl.maximum(tl.load(hessian + c * hessian_stride + c), 1e-30)
        wanted = (old - z) * s - tl.div_rn(g, curvature)
        index = nearest_index(tl.div_rn(wanted, s) + z)
        step = (index - old) * s
        row = tl.load(hessian + c * hessian_stride + k, (k >= c) & (k < C), 0)
        gradient += step[:, None] * row
        indices = tl.where(here, index[:, None], indices)
        taken = tl.where(here, step[:, None], taken)
    tl.store(better + n * C + k, indices, there)
    tl.store(steps + n * C + k, taken, there)


def rowwise(sliced: Tensor, square: Tensor, *others: Tensor) -> list[Tensor]:
    """The same numbers, row by row: the first may be columns of something wider."""
    sliced = sliced if sliced.stride(1) == 1 else sliced.contiguous()
    return [sliced, *(t.contiguous() for t in (square, *others))]


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """See gptq.round_columns."""
    N, C = weight.shape
    # LAPACK's factors are stored column by column.
    weight, factor, scales, zeros = rowwise(weight, factor, scales, zeros)
    q, errors = torch.empty_like(scales), torch.empty_like(scales)
    round_kernel[(triton.cdiv(N, ROWS),)](
        weight,
        factor,
        scales,
        zeros,
        q,
        errors,
        N,
        C,
        weight.stride(0),
        factor.stride(0),
        ROWS=ROWS,
        BC=max(16, triton.next_power_of_2(C)),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q, errors


def refine_columns(
    slope: Tensor, hessian: Tensor, q: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """See gptq.refine_columns."""
    N, C = slope.shape
    slope, hessian, q, scales, zeros = rowwise(slope, hessian, q, scales, zeros)
    better, steps = torch.empty_like(q), torch.empty_like(q)
    refine_kernel[(triton.cdiv(N, ROWS),)](
        slope,
        hessian,
        q,
        scales,
        zeros,
        better,
        steps,
        N,
        C,
        slope.stride(0),
        hessian.stride(0),
        ROWS=ROWS,
        BC=max(16, triton.next_power_of_2(C)),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return better, steps

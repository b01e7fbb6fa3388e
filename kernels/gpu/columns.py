"""The two loops of GPTQ over up to 128 columns, each as one kernel.

Start at round_columns and refine_columns; calibration/gptq.py has the same functions in PyTorch,
which are the reference. In PyTorch a column takes some twenty launches, and the hundreds of
thousands of columns of a model take minutes. The rows of a weight (its output channels) do not
depend on each other: a program keeps all columns of its rows in registers and loops over the
columns. These tensors are (ROWS, BC), with ROWS rows and BC columns, a power of two that is at
least C; the mask k == c selects column c, as registers have no index.

A weight's value is (q - zero) * scale with an integer q from 0 to 15, here a float.

Shapes: N rows, C columns, up to 128: a strip of gptq.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 8


@triton.jit
def column_of(tile, here):
    """Return one column, (ROWS,), of a tile, (ROWS, BC). here: (1, BC), True at this column."""
    return tl.sum(tl.where(here, tile, 0.0), 1)


@triton.jit
def nearest_index(value):
    """Round to an integer 0 to 15, ties to even: adding 1.5 * 2**23 (12582912) to a float32 leaves
    no fraction bits. The first clamp, to -1 to 16, keeps the sum in the range where this is so."""
    value = tl.minimum(tl.maximum(value, -1.0), 16.0)
    value = (value + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(value, 0.0), 15.0)


@triton.jit
def round_kernel(
    weight,  # (N, C) float32
    factor,  # (C, C) float32, upper triangular: of the inverse Hessian, see gptq.inverse_factor
    scales,  # (N, C) float32, contiguous; above 0
    zeros,  # (N, C) float32, contiguous
    q,  # (N, C) float32, contiguous; output: the integers, 0 to 15
    errors,  # (N, C) float32, contiguous; output: of each weight, divided by the factor's diagonal
    N,
    C,
    weight_stride,  # from row to row, in numbers
    factor_stride,  # from row to row, in numbers
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    """Round one column after another and spread its error over the columns after it.

    w: the weights, which compensate the errors so far. indices, lost: become q and errors. div_rn
    divides as PyTorch does, rounded to nearest.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.arange(0, BC)[None, :]
    mask = (n < N) & (k < C)
    w = tl.load(weight + n.to(tl.int64) * weight_stride + k, mask, 0)
    scale = tl.load(scales + n * C + k, mask, 1)
    zero = tl.load(zeros + n * C + k, mask, 0)
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
    tl.store(q + n * C + k, indices, mask)
    tl.store(errors + n * C + k, lost, mask)


@triton.jit
def refine_kernel(
    slope,  # (N, C) float32: half the gradient of the output error
    hessian,  # (C, C) float32
    q,  # (N, C) float32, contiguous, as all that follow; the integers, 0 to 15
    scales,
    zeros,
    better,  # output: the new integers
    steps,  # output: the change of each weight's value
    N,
    C,
    slope_stride,  # from row to row, in numbers
    hessian_stride,  # from row to row, in numbers
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    """Choose the best integer of one column after another; see gptq.refine_columns.

    gradient: the slope after the changes so far. indices, taken: become better and steps.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.arange(0, BC)[None, :]
    mask = (n < N) & (k < C)
    gradient = tl.load(slope + n.to(tl.int64) * slope_stride + k, mask, 0)
    scale = tl.load(scales + n * C + k, mask, 1)
    zero = tl.load(zeros + n * C + k, mask, 0)
    indices = tl.load(q + n * C + k, mask, 0)
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
    tl.store(better + n * C + k, indices, mask)
    tl.store(steps + n * C + k, taken, mask)


def rowwise(sliced: Tensor, square: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the matrices with contiguous rows, as the kernels read them, in the given order.

    sliced: may stay a slice of columns of a wider matrix: the kernels take its stride. square, the
    matrix (C, C), and others are copied if they are not contiguous.
    """
    sliced = sliced if sliced.stride(1) == 1 else sliced.contiguous()
    return [sliced, *(t.contiguous() for t in (square, *others))]


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Round the columns as gptq.round_columns does, with the same arguments and results.

    weight: (N, C), may be a slice of a wider matrix. factor: (C, C), upper triangular. scales,
    zeros: (N, C). Returns the integers, as floats, and the errors divided by the factor's diagonal,
    (N, C) each. enable_fp_fusion=False: products and sums round as in PyTorch.
    """
    N, C = weight.shape
    # The Cholesky factor is stored column by column.
    weight, factor, scales, zeros = rowwise(weight, factor, scales, zeros)
    q, errors = torch.empty_like(scales), torch.empty_like(scales)
    round_kernel[(triton.cdiv(N, ROWS_PER_PROGRAM),)](
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
        ROWS=ROWS_PER_PROGRAM,
        BC=max(16, triton.next_power_of_2(C)),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q, errors


def refine_columns(
    slope: Tensor, hessian: Tensor, q: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Refine the columns as gptq.refine_columns does, with the same arguments and results.

    slope: (N, C), half the gradient of the output error; may be a slice of a wider matrix. hessian:
    (C, C). q, scales, zeros: (N, C). Returns the new integers, as floats, and the change of each
    weight's value, (N, C) each.
    """
    N, C = slope.shape
    slope, hessian, q, scales, zeros = rowwise(slope, hessian, q, scales, zeros)
    better, steps = torch.empty_like(q), torch.empty_like(q)
    refine_kernel[(triton.cdiv(N, ROWS_PER_PROGRAM),)](
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
        ROWS=ROWS_PER_PROGRAM,
        BC=max(16, triton.next_power_of_2(C)),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return better, steps

"""Parts that the kernels share: begin and wait, which put launches in order, the prologue of a row,
and the units of converted activations.

Start at inputs. A prologue is a norm or a gate that the first kernel of a product applies to its
rows; see prologue.py. PDL: whether the launch allows programmatic dependent launch, so that a
kernel starts before the previous one has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start. Every kernel of a decoding step calls it first; the next one calls
    wait before it reads this kernel's results."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the previous kernels have ended. Kernels call it before they read the previous
    ones' results, and before they write to memory that those may still read."""
    if PDL:
        gdc_wait()


@triton.jit
def inputs(row, factor, k, K, eps, NORM: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the numbers at the indices k of a row after its prologue, in float32.

    row: the address of K numbers, or of 2 K where GATED: then the result is silu(first half) *
    second half. k: of any shape; from K on the result is 0. NORM: the result is the RMS norm of the
    row with eps added to its mean square; factor: the norm's weight at k, which the caller loads
    before it waits. NORM and GATED exclude each other. Every program sums the squares of the whole
    row, BLOCK (a power of two) at a time: the row is in the L2 cache, and a separate kernel for the
    sum would take longer. Rounded where separate layers would round.
    """
    values = tl.load(row + k, k < K, 0).to(tl.float32)
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            all = start + tl.arange(0, BLOCK)
            numbers = tl.load(row + all, all < K, 0).to(tl.float32)
            squares += numbers * numbers
        values = values * tl.rsqrt(tl.sum(squares, 0) / K + eps) * factor
        values = values.to(row.dtype.element_ty).to(tl.float32)
    if GATED:
        up = tl.load(row + K + k, k < K, 0).to(tl.float32)
        values = (values / (1 + tl.exp(-values))).to(row.dtype.element_ty).to(tl.float32) * up
        values = values.to(row.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def units_of(values):
    """Return the unit, a power of two, of each row of values, (rows, inputs) float32.

    In these units a row's largest magnitude is from 2**14 to below 2**15, less if it is 0 or tiny.
    Also returns 1 / unit, and a number that is NaN if the row has an infinite or NaN input, else 0.
    (rows,) each. The bit arithmetic is explained in fixed_point.fixed_point.
    """
    exponent = tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(exponent, 30 << 23) - (14 << 23)
    inverse = ((254 << 23) - unit).to(tl.float32, bitcast=True)
    return unit.to(tl.float32, bitcast=True), inverse, tl.sum(values * 0, 1)


@triton.jit
def prologue_kernel(
    x,  # (M, K), or (M, 2 K) where GATED
    norm,  # (K,): the weight of an RMS norm; None without NORM
    out,  # (M, K)
    K,
    x_stride,  # from row to row, in numbers
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BK: tl.constexpr,  # inputs of a program
    BLOCK: tl.constexpr,  # see inputs
    PDL: tl.constexpr,
):
    """Compute the prologue of rows, for products that cuBLAS computes.

    The launch has (M, ceil(K / BK)) programs.
    """
    begin(PDL)
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    factor = tl.load(norm + k, k < K, 0).to(tl.float32) if NORM else 0.0
    wait(PDL)
    values = inputs(x + m * x_stride, factor, k, K, eps, NORM, GATED, BLOCK)
    tl.store(out + m * K + k, values.to(out.dtype.element_ty), k < K)

"""What kernels begin with: the order of launches, and the inputs that a prologue makes of a row.

Start at inputs. A prologue is a norm or a gate that the kernel before a product applies to its
rows; see prologue.py. PDL: whether the launch allows programmatic dependent
launch, so that a kernel starts before the previous one has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start. Every kernel calls it first; the next one calls wait before it
    reads this kernel's results."""
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
    """Return the inputs k of a product, of any shape, in float32: a row after its prologue.

    row: the address of K numbers, or of 2 K where GATED: then the inputs are silu(first half) *
    second half. NORM: they are the RMS norm of the row; factor: the norm's weight at k. Every
    program sums the squares of the whole row, BLOCK at a time: the row is in the L2 cache, and a
    separate kernel for the sum would take longer. Inputs from K on are 0.
    """
    values = tl.load(row + k, k < K, 0).to(tl.float32)
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            all = start + tl.arange(0, BLOCK)
            numbers = tl.load(row + all, all < K, 0).to(tl.float32)
            squares += numbers * numbers
        values = values * tl.rsqrt(tl.sum(squares, 0) / K + eps) * factor
        # Round as the separate norm or gate would, whose output has the dtype of the row.
        values = values.to(row.dtype.element_ty).to(tl.float32)
    if GATED:
        up = tl.load(row + K + k, k < K, 0).to(tl.float32)
        values = values / (1 + tl.exp(-values)) * up
        values = values.to(row.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def prologue_kernel(
    x,  # (M, K), or (M, 2 K) where GATED
    norm,  # (K,): the weight of an RMS norm
    out,  # (M, K)
    K,
    x_stride,
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BK: tl.constexpr,  # inputs of a program
    BLOCK: tl.constexpr,  # see inputs
    PDL: tl.constexpr,
):
    """Compute the prologue of rows. For products of many rows, which cuBLAS computes.

    The launch has (M, ceil(K / BK)) programs.
    """
    begin(PDL)
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    factor = tl.load(norm + k, k < K, 0).to(tl.float32) if NORM else 0.0
    wait(PDL)
    values = inputs(x + m * x_stride, factor, k, K, eps, NORM, GATED, BLOCK)
    tl.store(out + m * K + k, values.to(out.dtype.element_ty), k < K)

"""Conversion of a row of activations to 16-bit fixed point, for the one-row kernels.

Start at fixed_point_kernel. Its reference is fixed_point.fixed_point, which explains the format.
store_chunks is for kernels that convert their own results.

Shapes: K in_features, C chunks of the row, SIZE inputs of a chunk.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, inputs, units_of, wait


@triton.jit
def fixed_point_kernel(
    x,  # (K,), or (2 K,) where GATED
    norm,  # (K,): the weight of an RMS norm
    q,  # (PLANES, C, 8) int16
    units,  # (C,) float32
    sums,  # (C,) int32
    K,
    C,
    eps,
    SIZE: tl.constexpr,  # inputs of a chunk
    NIBBLES: tl.constexpr,  # inputs per byte of weights: 1 or 2
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BC: tl.constexpr,  # chunks that a program converts
    BLOCK: tl.constexpr,  # inputs that NORM squares at a time
    PDL: tl.constexpr,
):
    """Compute the prologue of a row (inputs.py), then convert the row to fixed point: q, units
    and sums of a FixedPoint.

    For each place in the result, k is the input that belongs there (fixed_point.Order).
    """
    begin(PDL)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    place = tl.arange(0, SIZE)[None, :]  # plane, word, p
    plane, word, p = place // 8, place % 8 // 2, place % 2
    k = c[:, None] * SIZE + word * (4 * NIBBLES) + plane % 2 * (2 * NIBBLES) + p * NIBBLES
    k += plane // 2  # the nibble
    factor = tl.load(norm + k, k < K, 0).to(tl.float32) if NORM else 0.0
    wait(PDL)
    values = inputs(x, factor, k, K, eps, NORM, GATED, BLOCK)  # (BC, SIZE)
    numbers, unit = to_fixed_point(values)
    tl.store(q + plane * (C * 8) + c[:, None] * 8 + place % 8, numbers.to(tl.int16), c[:, None] < C)
    tl.store(units + c, unit, c < C)
    tl.store(sums + c, tl.sum(numbers, 1), c < C)


@triton.jit
def to_fixed_point(values):
    """Convert chunks of numbers, (chunks, inputs) float32, to q, the same shape in int32, and the
    chunks' units, float32. A chunk with an infinite or NaN input gets the unit NaN."""
    unit, inverse, poison = units_of(values)
    scaled = values * inverse[:, None]
    # Round to nearest, ties to even: adding 1.5 * 2**23 leaves no fraction bits.
    rounded = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)
    rounded = tl.minimum(tl.maximum(rounded, -32768), 32767)
    return rounded, unit + poison


@triton.jit
def store_chunks(values, c, real, q, units, sums, C, SIZE: tl.constexpr):
    """Convert chunks of a row and store them in q, units and sums of a FixedPoint.

    values: (chunks, SIZE) float32, in the order of the row. c: (chunks,), their indices in the row;
    real: which of them to store. fixed_point.Order describes the places in q.
    """
    numbers, unit = to_fixed_point(values)
    tl.store(units + c, unit, real)
    tl.store(sums + c, tl.sum(numbers, 1), real)
    NIBBLES: tl.constexpr = SIZE // 16
    n = tl.arange(0, SIZE)
    plane = n % NIBBLES * 2 + n // (2 * NIBBLES) % 2
    place = n // (4 * NIBBLES) * 2 + n // NIBBLES % 2
    address = q + plane[None, :] * (C * 8) + c[:, None] * 8 + place[None, :]
    tl.store(address, numbers.to(tl.int16), real[:, None])

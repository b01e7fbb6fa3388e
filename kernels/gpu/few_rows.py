"""Products of 2 to some 64 rows, (M, K) x (N, K) -> (M, N): batches, and drafts being verified.

Start at int4_kernel. Weights are unpacked in registers and multiplied by tensor cores, in float16:
it holds 4-bit and 8-bit integers exactly, and int4's scales as they are stored. So that no
activation leaves float16's range, each row is first scaled by a power of two (scale_kernel).

A GPU has no instruction that turns bytes into float16 as fast as memory delivers them. But the
bits 0x6400 + b are the number 1024 + b: a byte permutation, a logical operation and a subtraction
do it for two bytes at once. A word of weights is eight (or four) neighbouring inputs, and becomes
one element of eight matrices, whose products with every eighth input are added: no number ever
changes its place in a register.

The K inputs of a product may be divided among SPLITS programs, each of which stores its part of
the sum; sum_kernel adds the parts in their order, so that results never vary.

The oracle of each kernel is the PyTorch formula in quantized.py. The trick with 0x6400 is from Kim
et al. (arXiv 2211.10017, section 3.2).
"""

import triton
import triton.language as tl

from kernels.gpu.one_row import begin, wait

# Two words of eight nibbles -> eight pairs of float16: (q - zero) * scale. $10: 1024 + zeros, $11:
# -64 - zeros, $12: scales, of both words. A high nibble lies 4 bits higher: 1024 + 16 q, which the
# multiplication by 1/16 (0x2C00) makes 64 + q.
UNPACK_INT4 = tl.constexpr(
    "{ .reg .b32 p0, p1, p2, p3, sixteenth;"
    "mov.b32 sixteenth, 0x2C002C00;"
    "prmt.b32 p0, $8, $9, 0x4400; prmt.b32 p1, $8, $9, 0x5511;"
    "prmt.b32 p2, $8, $9, 0x6622; prmt.b32 p3, $8, $9, 0x7733;"
    + "".join(
        f"lop3.b32 ${2 * byte}, p{byte}, 0x000F000F, 0x64006400, 0xEA;"
        f"lop3.b32 ${2 * byte + 1}, p{byte}, 0x00F000F0, 0x64006400, 0xEA;"
        f"sub.f16x2 ${2 * byte}, ${2 * byte}, $10;"
        f"fma.rn.f16x2 ${2 * byte + 1}, ${2 * byte + 1}, sixteenth, $11;"
        f"mul.f16x2 ${2 * byte}, ${2 * byte}, $12;"
        f"mul.f16x2 ${2 * byte + 1}, ${2 * byte + 1}, $12;"
        for byte in range(4)
    )
    + "}"
)
# Two words of four int8 -> four pairs of float16: 1024 + 128 + q, less 1152 (0x6480).
UNPACK_INT8 = tl.constexpr(
    "{ .reg .b32 a, b, offset;"
    "mov.b32 offset, 0x64806480;"
    "xor.b32 a, $4, 0x80808080; xor.b32 b, $5, 0x80808080;"
    "prmt.b32 $0, a, b, 0x4400; prmt.b32 $1, a, b, 0x5511;"
    "prmt.b32 $2, a, b, 0x6622; prmt.b32 $3, a, b, 0x7733;"
    + "".join(
        f"lop3.b32 ${byte}, ${byte}, 0x00FF00FF, 0x64006400, 0xEA;"
        f"sub.f16x2 ${byte}, ${byte}, offset;"
        for byte in range(4)
    )
    + "}"
)
INT4_REGISTERS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 5))
INT8_REGISTERS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 2))
EIGHT_HALVES = tl.constexpr((tl.float16,) * 8)
FOUR_HALVES = tl.constexpr((tl.float16,) * 4)


@triton.jit
def int4_weight(words, zeros, scales, nibble: tl.constexpr):
    """float16 weights of one nibble of each word; the formula that UNPACK_INT4 is an equal of."""
    return (((words >> (4 * nibble)) & 15).to(tl.float16) - zeros) * scales


@triton.jit
def unpack_int4(words, zeros, scales, PTX: tl.constexpr):
    """int32 words of eight nibbles -> eight float16 matrices of weights, in the inputs' order.

    zeros, scales: float16, of the words' shape.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            UNPACK_INT4,
            INT4_REGISTERS,
            [words, zeros + 1024, -64 - zeros, scales],
            EIGHT_HALVES,
            True,
            2,
        )
    else:
        return (
            int4_weight(words, zeros, scales, 0),
            int4_weight(words, zeros, scales, 1),
            int4_weight(words, zeros, scales, 2),
            int4_weight(words, zeros, scales, 3),
            int4_weight(words, zeros, scales, 4),
            int4_weight(words, zeros, scales, 5),
            int4_weight(words, zeros, scales, 6),
            int4_weight(words, zeros, scales, 7),
        )


@triton.jit
def unpack_int8(words, PTX: tl.constexpr):
    """int32 words of four int8 -> four float16 matrices of the same numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            UNPACK_INT8, INT8_REGISTERS, [words], FOUR_HALVES, True, 2
        )
    else:
        return (
            ((words << 24) >> 24).to(tl.float16),
            ((words << 16) >> 24).to(tl.float16),
            ((words << 8) >> 24).to(tl.float16),
            (words >> 24).to(tl.float16),
        )


@triton.jit
def scale_kernel(
    x,  # (M, K)
    out,  # (M, PARTS, Kp / PARTS) float16: input PARTS * i + p at (p, i); 0 beyond K
    units,  # (M,) float32: x = out * unit
    K,
    Kp,  # K rounded up to what the weights are stored for
    x_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Activations as float16 numbers below 2**15, each row with a unit that is a power of two."""
    begin(PDL)
    m = tl.program_id(0)
    wait(PDL)
    largest = tl.zeros((BLOCK,), tl.float32)
    finite = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        values = tl.load(x + m * x_stride + k, k < K, 0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        finite += values * 0  # NaN for infinite ones and NaN
    exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(exponent, 30 << 23) - (14 << 23)
    inverse = ((254 << 23) - unit).to(tl.float32, bitcast=True)
    tl.store(units + m, unit.to(tl.float32, bitcast=True) + tl.sum(finite, 0))
    for start in range(0, Kp, BLOCK):
        k = start + tl.arange(0, BLOCK)
        values = tl.load(x + m * x_stride + k, k < K, 0).to(tl.float32) * inverse
        place = out + m * Kp + k % PARTS * (Kp // PARTS) + k // PARTS
        tl.store(place, values.to(tl.float16), k < Kp)


@triton.jit
def finish_rows(total, scale, units, bias, out, m, n, M, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Store (BN, BM) outputs: in their last form, or as this program's part of the sum."""
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLITS == 1:
        total *= scale[:, None] * tl.load(units + m, m < M, 0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + n, n < N, 0).to(tl.float32)[:, None]
        tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), inside)
    else:
        part = out + tl.program_id(2) * M * N
        tl.store(part + m[None, :] * N + n[:, None], total, inside)


@triton.jit
def int4_kernel(
    x,  # (M, 8, W) float16: scale_kernel's, every eighth input together
    units,  # (M,) float32
    weight,  # (N, W) int32: eight nibbles each
    scales,  # (N, P) float16
    zeros,  # (N, ceil(P / 2)) uint8
    bias,
    out,  # (M, N), or (SPLITS, M, N) float32
    M,
    N,
    W,
    weight_stride,  # from row to row, in chunks of 4 words
    scale_stride,
    zero_stride,
    WORDS: tl.constexpr,  # of a group: groupsize / 8
    BN: tl.constexpr,
    BM: tl.constexpr,
    GROUPS: tl.constexpr,  # that are unpacked at a time
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    begin(PDL)
    BW: tl.constexpr = GROUPS * WORDS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    first = tl.program_id(2) * steps * BW
    row, real = weight + n[:, None] * (weight_stride * 4), n[:, None] < N
    step = tl.arange(0, BW)[None, :]
    words = tl.load(row + first + step, real & (first + step < W), 0)  # (BN, BW)
    total = tl.zeros((BN, BM), tl.float32)
    wait(PDL)
    for start in range(first, tl.minimum(W, first + steps * BW), BW):
        ahead = start + BW + step
        following = tl.load(row + ahead, real & (ahead < W), 0)
        group = start // WORDS + tl.arange(0, GROUPS)[None, :]  # (1, GROUPS)
        inside = real & (group * WORDS < W)
        zero = tl.load(zeros + n[:, None] * zero_stride + group // 2, inside, 0).to(tl.int32)
        zero = ((zero >> (group % 2 * 4)) & 15).to(tl.float16)
        scale = tl.load(scales + n[:, None] * scale_stride + group, inside, 0)
        zero = tl.broadcast_to(zero[:, :, None], (BN, GROUPS, WORDS)).reshape(BN, BW)
        scale = tl.broadcast_to(scale[:, :, None], (BN, GROUPS, WORDS)).reshape(BN, BW)
        weights = unpack_int4(words, zero, scale, PTX)
        k = start + tl.arange(0, BW)[:, None]
        there = (k < W) & (m[None, :] < M)  # (BW, BM)
        for part in tl.static_range(8):
            inputs = tl.load(x + (m[None, :] * 8 + part) * W + k, there, 0)
            total = tl.dot(weights[part], inputs, total)
        words = following
    ones = tl.full((BN,), 1, tl.float32)
    finish_rows(total, ones, units, bias, out, m, n, M, N, SPLITS, HAS_BIAS)


@triton.jit
def int8_kernel(
    x,  # (M, 4, W) float16: scale_kernel's, every fourth input together
    units,  # (M,) float32
    weight,  # (N, W) int32: four int8 each
    scales,  # (N,) float32
    bias,
    out,  # (M, N), or (SPLITS, M, N) float32
    M,
    N,
    W,
    weight_stride,  # from row to row, in words
    BN: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    first = tl.program_id(2) * steps * BW
    row, real = weight + n[:, None] * weight_stride, n[:, None] < N
    step = tl.arange(0, BW)[None, :]
    words = tl.load(row + first + step, real & (first + step < W), 0)  # (BN, BW)
    scale = tl.load(scales + n, n < N, 0)
    total = tl.zeros((BN, BM), tl.float32)
    wait(PDL)
    for start in range(first, tl.minimum(W, first + steps * BW), BW):
        ahead = start + BW + step
        following = tl.load(row + ahead, real & (ahead < W), 0)
        weights = unpack_int8(words, PTX)
        k = start + tl.arange(0, BW)[:, None]
        there = (k < W) & (m[None, :] < M)  # (BW, BM)
        for part in tl.static_range(4):
            inputs = tl.load(x + (m[None, :] * 4 + part) * W + k, there, 0)
            total = tl.dot(weights[part], inputs, total)
        words = following
    finish_rows(total, scale, units, bias, out, m, n, M, N, SPLITS, HAS_BIAS)


@triton.jit
def sum_kernel(
    parts,  # (SPLITS, M, N) float32
    scales,  # (N,) float32: int8's
    units,  # (M,) float32
    bias,
    out,  # (M, N)
    M,
    N,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sum of the parts in their order, with units, scales and bias."""
    begin(PDL)
    m, n = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * M + m) * N + n, n < N, 0)
    total *= tl.load(units + m)
    if HAS_SCALES:
        total *= tl.load(scales + n, n < N, 0)
    if HAS_BIAS:
        total += tl.load(bias + n, n < N, 0).to(tl.float32)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), n < N)

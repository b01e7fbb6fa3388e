"""Products of one row and a matrix, (K,) x (N, K) -> (N,): most of the time of a decoding step.

Start at int4_kernel. It reads the weights once, as the checkpoint stores them, and is bound by
memory bandwidth. Converting each 4-bit weight to a float would be bound by arithmetic (on an H100,
2.77 ms of a step of Llama 3.1 8B instead of 1.87 ms). Therefore activations are 16-bit integers
(fixed_point.py), and the instruction dp2a multiplies two of them by two bytes of weights: four
instructions for eight 4-bit weights, exact in 32 bits.

A program computes BN outputs and loops over K in steps of BC chunks of 16 bytes of weights. It
loads its first weights before the previous kernel has ended (programmatic dependent launch, compute
capability 9.0 on). This is safe because no kernel of a step writes weights, scales or zero points.
Each step loads the weights of the next one before it multiplies its own, so that both overlap.

The reference of each kernel is the PyTorch formula in quant/linear.py.

Words: a nibble is half a byte, an int4 weight. A chunk is the 32 (int4) or 16 (int8) inputs whose
weights take 16 bytes, or 8 inputs of a dense weight. A word is 32 bits. PDL: whether the launch
allows dependent launch. PTX: whether inline assembly is available; Triton's interpreter has none.
`real` masks outputs below N, `inside` also chunks below C; `following` are the weights of the next
step. HAS_BIAS: whether bias, (N,), is given.

Shapes: N out_features, K in_features, C chunks, P groups of inputs.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, wait


@triton.jit
def dot_pairs(pairs, bytes, total, HIGH: tl.constexpr, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """Return total plus the products of a pair of int16 and the two low (or HIGH) bytes of a word.

    pairs: int32, two activations each. bytes: int32, four bytes of weights each; HIGH selects the
    two high ones. pairs and bytes are broadcast. SIGNED: the bytes are int8, else uint8. total:
    int32 or 0. Without PTX it computes by shifts.
    """
    if PTX:
        if SIGNED:
            name: tl.constexpr = "dp2a.hi.s32.s32" if HIGH else "dp2a.lo.s32.s32"
        else:
            name: tl.constexpr = "dp2a.hi.s32.u32" if HIGH else "dp2a.lo.s32.u32"
        total = tl.inline_asm_elementwise(
            name + " $0, $1, $2, $3;", "=r,r,r,r", [pairs, bytes, total], tl.int32, True, 1
        )
    else:
        if HIGH:
            bytes = bytes >> 16
        first, second = bytes & 255, (bytes >> 8) & 255
        if SIGNED:  # 128 to 255 become -128 to -1
            first, second = (first ^ 128) - 128, (second ^ 128) - 128
        total += ((pairs << 16) >> 16) * first + (pairs >> 16) * second
    return total


@triton.jit
def finish(total, bias, more, out, n, N, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr):
    """Add the bias and `more`, numbers of the residual, to the outputs total, (BN,), and store them
    in the dtype of `out`. n: (BN,), their indices; outputs from N on are left out."""
    if HAS_BIAS:
        total += tl.load(bias + n, n < N, 0).to(tl.float32)
    y = total.to(out.dtype.element_ty)  # rounded, as it is where the sum is another kernel
    if ADDS:
        y = (more.to(tl.float32) + y).to(out.dtype.element_ty)
    tl.store(out + n, y, n < N)


@triton.jit
def int4_kernel(
    pairs,  # (4, C, 4) int32: pairs of int16, FixedPoint.q
    units,  # (C,) float32
    sums,  # (C,) int32
    weight,  # (N, 4 C) int32: eight nibbles each
    scales,  # (N, P) float16
    zeros,  # (N, ceil(P / 2)) uint8
    bias,
    residual,  # (N,): is added to the outputs
    out,  # (N,)
    N,
    C,
    weight_stride,  # from row to row, in chunks
    scale_stride,  # from row to row, in numbers
    zero_stride,  # from row to row, in bytes
    CHUNKS: tl.constexpr,  # chunks of a group: groupsize / 32
    BN: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply one row by int4 weights. A program computes BN outputs, BC chunks in a step.

    The products of q and the nibbles are summed as integers. number, the zero point, times the
    chunk's sum of q is subtracted, and the result is multiplied by the scale and the unit. The four
    planes of pairs belong to the low nibbles (even) of a word's low bytes and of its high bytes,
    then to the high nibbles (odd) of both.
    """
    begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row, word = n[:, None, None] * weight_stride, tl.arange(0, 4)[None, None, :]
    real = n[:, None, None] < N
    c = tl.arange(0, BC)[None, :, None]
    total = tl.zeros((BN, BC), tl.float32)
    words = tl.load(weight + (row + c) * 4 + word, real & (c < C), 0)  # (BN, BC, 4)
    chunk = tl.arange(0, BC)[None, :]
    inside, group = (n[:, None] < N) & (chunk < C), chunk // CHUNKS
    zero_row, scale_row = zeros + n[:, None] * zero_stride, scales + n[:, None] * scale_stride
    zero, scale = tl.load(zero_row + group // 2, inside, 0), tl.load(scale_row + group, inside, 0)
    wait(PDL)
    more = tl.load(residual + n, n < N, 0) if ADDS else 0.0  # early, as its latency is not hidden
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)[None, :, None]
        ahead = c + BC
        following = tl.load(weight + (row + ahead) * 4 + word, real & (ahead < C), 0)
        even, odd = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F  # (BN, BC, 4)
        pair, real_chunk = pairs + c * 4 + word, c < C
        dot = dot_pairs(tl.load(pair, real_chunk, 0), even, 0, False, False, PTX)
        dot = dot_pairs(tl.load(pair + 4 * C, real_chunk, 0), even, dot, True, False, PTX)
        dot = dot_pairs(tl.load(pair + 8 * C, real_chunk, 0), odd, dot, False, False, PTX)
        dot = dot_pairs(tl.load(pair + 12 * C, real_chunk, 0), odd, dot, True, False, PTX)
        number = (zero.to(tl.int32) >> (group % 2 * 4)) & 15  # (BN, BC)
        exact = tl.sum(dot, 2) - number * tl.load(sums + chunk, chunk < C, 0)
        unit = tl.load(units + chunk, chunk < C, 0)
        total += exact.to(tl.float32) * (scale.to(tl.float32) * unit)
        chunk += BC
        inside, group = (n[:, None] < N) & (chunk < C), chunk // CHUNKS
        words, zero = following, tl.load(zero_row + group // 2, inside, 0)
        scale = tl.load(scale_row + group, inside, 0)
    finish(tl.sum(total, 1), bias, more, out, n, N, HAS_BIAS, ADDS)


@triton.jit
def int8_kernel(
    pairs,  # (2, C, 4) int32: pairs of int16, FixedPoint.q
    units,  # (C,) float32
    weight,  # (N, 4 C) int32: four bytes each
    scales,  # (N,) float32
    bias,
    residual,  # (N,): is added to the outputs
    out,  # (N,)
    N,
    C,
    weight_stride,  # from row to row, in chunks
    BN: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply one row by int8 weights. A program computes BN outputs, BC chunks in a step.

    The two planes of pairs belong to the low two bytes of a word of weights and to the high two.
    """
    begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row, word = n[:, None, None] * weight_stride, tl.arange(0, 4)[None, None, :]
    real = n[:, None, None] < N
    c = tl.arange(0, BC)[None, :, None]
    total = tl.zeros((BN, BC), tl.float32)
    words = tl.load(weight + (row + c) * 4 + word, real & (c < C), 0)  # (BN, BC, 4)
    scale = tl.load(scales + n, n < N, 0)
    wait(PDL)
    more = tl.load(residual + n, n < N, 0) if ADDS else 0.0  # early, as its latency is not hidden
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)[None, :, None]
        ahead = c + BC
        following = tl.load(weight + (row + ahead) * 4 + word, real & (ahead < C), 0)
        pair, real_chunk = pairs + c * 4 + word, c < C
        dot = dot_pairs(tl.load(pair, real_chunk, 0), words, 0, False, True, PTX)  # (BN, BC, 4)
        dot = dot_pairs(tl.load(pair + 4 * C, real_chunk, 0), words, dot, True, True, PTX)
        chunk = start + tl.arange(0, BC)[None, :]
        total += tl.sum(dot, 2).to(tl.float32) * tl.load(units + chunk, chunk < C, 0)  # (BN, BC)
        words = following
    finish(tl.sum(total, 1) * scale, bias, more, out, n, N, HAS_BIAS, ADDS)


@triton.jit
def dense_kernel(
    x,  # (K,)
    weight,  # (N, K)
    bias,
    residual,  # (N,): is added to the outputs
    out,  # (N,)
    N,
    K,
    weight_stride,  # from row to row, in chunks of 8 numbers
    BN: tl.constexpr,
    BC: tl.constexpr,  # chunks of 8 inputs
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply one row by dense weights, with sums in float32.

    A program computes BN outputs and reads BC * 8 inputs in a step. Rows of weights must begin at
    multiples of 8 numbers, so that a thread loads 8 at once.
    """
    begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = weight + n[:, None] * (weight_stride * 8)
    real = n[:, None] < N  # (BN, 1)
    k = tl.arange(0, BC * 8)
    total = tl.zeros((BN, BC * 8), tl.float32)
    w = tl.load(row + k[None, :], real & (k < K)[None, :], 0)
    wait(PDL)
    more = tl.load(residual + n, n < N, 0) if ADDS else 0.0  # early, as its latency is not hidden
    for start in range(0, K, BC * 8):
        k = start + tl.arange(0, BC * 8)
        ahead = k + BC * 8
        following = tl.load(row + ahead[None, :], real & (ahead < K)[None, :], 0)
        total += w.to(tl.float32) * tl.load(x + k, k < K, 0).to(tl.float32)[None, :]
        w = following
    finish(tl.sum(total, 1), bias, more, out, n, N, HAS_BIAS, ADDS)

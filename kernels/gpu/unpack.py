"""Dequantise int4 or int8 weights in one pass, for prompts, whose many rows share the cost.

Start at int4_kernel. It reads the packed weights once and writes dense ones, by which cuBLAS
multiplies. Consecutive programs write consecutive pieces of a row. The results have the bits of the
PyTorch formula in quant/linear.py: (q - zero) * scale in float32, rounded once. A nibble is half a
byte, an integer 0 to 15; begin and wait order the kernel after the one before it (inputs.py).
Indices n of rows become int64, since a weight may have more than 2**31 numbers.

Shapes: N out_features, K in_features, KB bytes of a row of weights, P groups of inputs.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, wait


@triton.jit
def int4_kernel(
    weight,  # (N, KB) uint8: two nibbles each
    scales,  # (N, P) float16
    zeros,  # (N, ceil(P / 2)) uint8
    out,  # (N, K)
    N,
    K,
    weight_stride,  # from row to row, in chunks of 16 bytes
    scale_stride,  # from row to row, in numbers
    zero_stride,  # from row to row, in bytes
    HALF: tl.constexpr,  # bytes of a group: groupsize / 2
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Dequantise GROUPS groups of BN rows. BN, GROUPS and HALF: powers of two.

    PDL: whether the launch allows dependent launch. The launch has (ceil(P / GROUPS), ceil(N / BN))
    programs.
    """
    begin(PDL)
    wait(PDL)
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[:, None, None]
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    byte = group * HALF + tl.arange(0, HALF)[None, None, :]
    inside = (n < N) & (2 * byte < K)
    bytes = tl.load(weight + n.to(tl.int64) * (weight_stride * 16) + byte, inside, 0)
    mask = (n < N) & (2 * group * HALF < K)
    zero = tl.load(zeros + n * zero_stride + group // 2, mask, 0).to(tl.int32)
    zero = (zero >> (group % 2 * 4)) & 15
    scale = tl.load(scales + n * scale_stride + group, mask, 0).to(tl.float32)
    low = ((bytes & 15).to(tl.int32) - zero).to(tl.float32) * scale
    high = ((bytes >> 4).to(tl.int32) - zero).to(tl.float32) * scale
    values = tl.join(low, high).to(out.dtype.element_ty)  # (BN, GROUPS, HALF, 2)
    values = values.reshape(BN, GROUPS * HALF * 2)
    k = tl.program_id(0) * (GROUPS * HALF * 2) + tl.arange(0, GROUPS * HALF * 2)[None, :]
    rows = (tl.program_id(1) * BN + tl.arange(0, BN))[:, None]
    tl.store(out + rows.to(tl.int64) * K + k, values, (rows < N) & (k < K))


@triton.jit
def int8_kernel(
    weight,  # (N, K) int8
    scales,  # (N,) float32
    out,  # (N, K)
    N,
    K,
    weight_stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Dequantise BK inputs of BN rows. The launch has (ceil(K / BK), ceil(N / BN)) programs.

    weight_stride: from row to row, in numbers. PDL: whether the launch allows dependent launch.
    """
    begin(PDL)
    wait(PDL)
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[:, None]
    k = tl.program_id(0) * BK + tl.arange(0, BK)[None, :]
    inside = (n < N) & (k < K)
    q = tl.load(weight + n.to(tl.int64) * weight_stride + k, inside, 0).to(tl.float32)
    values = q * tl.load(scales + n, n < N, 0)
    tl.store(out + n.to(tl.int64) * K + k, values.to(out.dtype.element_ty), inside)

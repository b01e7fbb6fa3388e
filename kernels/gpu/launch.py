"""Launches of the kernels of products: functions that allocate outputs and launch kernels.

Start at int4_row. kernels/gpu/__init__.py chooses between the kernels; launch_attention.py launches
those of attention. Tensors may be on a CPU if Triton interprets its kernels (TRITON_INTERPRET=1),
as in the tests.

weight, scales and zeros are the buffers of an Int8Linear or Int4Linear (quant/linear.py): weight
(N, K) int8 and scales (N,) float32, or weight (N, P*S/2) uint8, scales (N, P) float16 and zeros
(N, ceil(P/2)) uint8. bias: (N,) or None. residual: added to the outputs, of their shape and dtype;
None: nothing. The int4 kernels need rows of weights that begin at a
multiple of 16 bytes, as the rows of an Int4Linear do. tile: sizes of the piece of the result that a
program (a block of threads) computes; None: the measured sizes of tiles.py. Tests and benchmarks
pass others.

Shapes: M rows of activations, N out_features, K in_features, S groupsize, P = ceil(K / S) groups.
"""

import functools

import torch
import triton
from torch import Tensor

from kernels.gpu import few_rows, inputs, one_row, to_fixed_point, unpack
from kernels.gpu.fixed_point import FixedPoint, Order
from kernels.gpu.prologue import Prologue
from kernels.gpu.scaled_rows import ScaledRows, Spans
from kernels.gpu.support import dependent_launch
from kernels.gpu.tiles import ONE_ROW, FewRows, OneRow, few_rows_tile, shape_class

INTERPRETED = bool(triton.knobs.runtime.interpret)
CHUNK_BYTES = 16  # of weights: a chunk of int8 or int4 inputs, see fixed_point.py
MAX_ROWS_PER_PROGRAM = 64  # of a few-rows product: more rows take another read of the weights
COUNTERS = 65536  # at least as many as the largest weight, an output head, has tiles


def options(x: Tensor, warps: int) -> dict[str, object]:
    """Return the launch options that all kernels of products and attention share.

    x: a tensor on the device. warps: of a program, 32 threads each. PDL tells the kernel, and
    launch_pdl the launch, that the kernel may start before the previous one has ended.
    """
    pdl = dependent_launch(x.device)
    given = {"PDL": pdl, "num_warps": warps, "enable_fp_fusion": True}
    return given | ({"launch_pdl": True} if pdl else {})


def norm_options(x: Tensor, K: int, norm: Tensor | None) -> dict[str, object]:
    """Return the launch options of a kernel that may compute a norm of K inputs, and BLOCK, see
    inputs.inputs.

    x: a tensor on the device. norm: the norm's weight; None: the kernel computes none, and needs
    one warp in place of four. Up to 8192 inputs are one block: each round of a loop over blocks
    would add the latency of a load.
    """
    return {"BLOCK": min(8192, triton.next_power_of_2(K))} | options(x, 1 if norm is None else 4)


def dense_row(x: Tensor, weight: Tensor, bias: Tensor | None, tile: OneRow | None = None) -> Tensor:
    """Multiply x, (1, K), by a dense weight, (N, K) -> (1, N) in x's dtype, plus the bias.

    K and weight.stride(0) must be multiples of 8. x must be contiguous.
    """
    N, K = weight.shape
    tile = tile or ONE_ROW["dense"][shape_class(N, K)]
    out = x.new_empty(1, N)
    one_row.dense_kernel[(triton.cdiv(N, tile.outputs),)](
        x,
        weight,
        bias,
        None,
        out,
        N,
        K,
        weight.stride(0) // 8,
        BN=tile.outputs,
        BC=tile.chunks,
        HAS_BIAS=bias is not None,
        ADDS=False,
        **options(x, tile.warps),
    )
    return out


def fixed_point(x: Tensor, order: Order, prologue: Prologue = Prologue()) -> FixedPoint:
    """Convert x, (K,) or, if gated, (2 K,), to 16-bit fixed point; see fixed_point.py.

    x: contiguous. order: INT8 or INT4, by the weights that follow. prologue: applied to x first.
    """
    norm, eps, gated = prologue
    K, size = len(x) // (2 if gated else 1), order.size
    C = triton.cdiv(K, size)  # chunks of the row
    fixed = empty_fixed_point(x, C, order)
    chunks = 512 // size  # of a program, which converts 512 inputs
    to_fixed_point.fixed_point_kernel[(triton.cdiv(C, chunks),)](
        x,
        norm,
        *fixed,
        K,
        C,
        eps,
        SIZE=size,
        NIBBLES=size // 16,
        NORM=norm is not None,
        GATED=gated,
        BC=chunks,
        **norm_options(x, K, norm),
    )
    return fixed


def empty_fixed_point(x: Tensor, C: int, order: Order) -> FixedPoint:
    """Allocate a FixedPoint of C chunks on the device of x."""
    return FixedPoint(
        x.new_empty(order.size // 8, C, 8, dtype=torch.int16),
        x.new_empty(C, dtype=torch.float32),
        x.new_empty(C, dtype=torch.int32),
    )


def int8_row(
    x: FixedPoint,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tile: OneRow | None = None,
) -> Tensor:
    """Multiply one row by weight, (N, K) int8 -> (1, N) in dtype, plus the bias and the residual.

    x: the row in the order INT8. K and weight.stride(0) must be multiples of 16.
    """
    N, K = weight.shape
    tile = tile or ONE_ROW["int8"][shape_class(N, K)]
    out = scales.new_empty(1, N, dtype=dtype)
    one_row.int8_kernel[(triton.cdiv(N, tile.outputs),)](
        x.q.view(torch.int32),
        x.units,
        weight.view(torch.int32),
        scales,
        bias,
        residual,
        out,
        N,
        K // CHUNK_BYTES,
        weight.stride(0) // CHUNK_BYTES,
        BN=tile.outputs,
        BC=tile.chunks,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        PTX=not INTERPRETED,
        **options(scales, tile.warps),
    )
    return out


def int4_row(
    x: FixedPoint,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tile: OneRow | None = None,
) -> Tensor:
    """Multiply one row by the weights of an Int4Linear -> (1, N) in dtype, plus the bias and the
    residual.

    x: the row in the order INT4.
    """
    N, columns = weight.shape
    tile = tile or ONE_ROW["int4"][shape_class(N, 2 * columns)]
    out = scales.new_empty(1, N, dtype=dtype)
    one_row.int4_kernel[(triton.cdiv(N, tile.outputs),)](
        x.q.view(torch.int32),
        x.units,
        x.sums,
        weight.view(torch.int32),
        scales,
        zeros,
        bias,
        residual,
        out,
        N,
        len(x.units),
        weight.stride(0) // CHUNK_BYTES,
        scales.stride(0),
        zeros.stride(0),
        CHUNKS=columns // CHUNK_BYTES // scales.shape[1],
        BN=tile.outputs,
        BC=tile.chunks,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        PTX=not INTERPRETED,
        **options(scales, tile.warps),
    )
    return out


def spans_of(
    M: int, weight: Tensor, scales: Tensor, zeros: Tensor | None, tile: FewRows | None = None
) -> Spans:
    """Return how the kernel for few rows takes M rows of the inputs of a linear. A step of its
    program reads tile.words words (of 4 bytes) of each row of weights, or one group if that is
    more; the inputs that it multiplies by them are a span. zeros: None for an Int8Linear."""
    N, columns = weight.shape
    if zeros is None:
        tile = tile or few_rows_tile("int8", M, N, columns)
        return Spans(columns, 4, 4 * tile.words)
    tile = tile or few_rows_tile("int4", M, N, 2 * columns)
    return Spans(2 * columns, 8, 8 * max(tile.words, group_words(weight, scales)))


def group_words(weight: Tensor, scales: Tensor) -> int:
    """Return the words (of 4 bytes) of a group of the weights of an Int4Linear."""
    return weight.shape[1] // scales.shape[1] // 4


def scaled_rows(x: Tensor, spans: Spans, prologue: Prologue = Prologue()) -> ScaledRows:
    """Apply a prologue to x, (M, K) or, if gated, (M, 2 K), and scale it for a few-rows product.
    x: contiguous. spans: from spans_of."""
    norm, eps, gated = prologue
    M, K = len(x), x.shape[1] // (2 if gated else 1)
    rows = empty_scaled_rows(x, M, spans)
    few_rows.scale_kernel[tuple(rows.units.shape)](
        x,
        norm,
        *rows,
        K,
        spans.width,
        x.stride(0),
        eps,
        PER_WORD=spans.per_word,
        SPAN=spans.size,
        NORM=norm is not None,
        GATED=gated,
        **norm_options(x, K, norm),
    )
    return rows


def empty_scaled_rows(x: Tensor, M: int, spans: Spans) -> ScaledRows:
    """Allocate ScaledRows of M rows on the device of x."""
    width, per_word, size = spans
    return ScaledRows(
        x.new_empty(M, per_word, width // per_word, dtype=torch.float16),
        x.new_empty(M, triton.cdiv(width, size), dtype=torch.float32),
    )


def rows_of_tile(M: int) -> int:
    """Return how many rows a program multiplies: 8, 16, 32 or 64. M: rows of the product."""
    return min(MAX_ROWS_PER_PROGRAM, max(8, triton.next_power_of_2(M)))


def int8_rows(
    x: ScaledRows,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tile: FewRows | None = None,
) -> Tensor:
    """Multiply M rows by weight, (N, K) int8 -> (M, N) in dtype, plus the bias and the residual,
    (M, N). x: with the spans_of the same tile.

    For up to MAX_FEW_ROWS rows: with more, dequantised weights and cuBLAS are faster. K and
    weight.stride(0) must be multiples of 4.
    """
    (N, K), M = weight.shape, len(x.units)
    tile = tile or few_rows_tile("int8", M, N, K)
    out = scales.new_empty(M, N, dtype=dtype)
    few_rows.int8_kernel[grid(M, N, tile)](
        *x,
        weight.view(torch.int32),
        scales,
        bias,
        residual,
        out,
        *split_sums(scales, M, N, tile),
        M,
        N,
        K // 4,
        weight.stride(0) // 4,
        BN=tile.outputs,
        BM=rows_of_tile(M),
        BW=tile.words,
        SPLITS=tile.splits,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        PTX=not INTERPRETED,
        num_stages=tile.stages,
        **options(scales, tile.warps),
    )
    return out


def int4_rows(
    x: ScaledRows,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tile: FewRows | None = None,
) -> Tensor:
    """Multiply M rows by the weights of an Int4Linear -> (M, N) in dtype, plus the bias and the
    residual, (M, N). x: with the spans_of the same tile.

    For up to MAX_FEW_ROWS rows: with more, dequantised weights and cuBLAS are faster.
    """
    (N, columns), M = weight.shape, len(x.units)
    tile = tile or few_rows_tile("int4", M, N, 2 * columns)
    words = group_words(weight, scales)
    out = scales.new_empty(M, N, dtype=dtype)
    few_rows.int4_kernel[grid(M, N, tile)](
        *x,
        weight.view(torch.int32),
        scales,
        zeros,
        bias,
        residual,
        out,
        *split_sums(scales, M, N, tile),
        M,
        N,
        columns // 4,
        scales.shape[1],
        zeros.shape[1],
        weight.stride(0) // CHUNK_BYTES,
        scales.stride(0),
        zeros.stride(0),
        WORDS=words,
        BN=tile.outputs,
        BM=rows_of_tile(M),
        GROUPS=max(1, tile.words // words),
        SPLITS=tile.splits,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        PTX=not INTERPRETED,
        num_stages=tile.stages,
        **options(scales, tile.warps),
    )
    return out


def grid(M: int, N: int, tile: FewRows) -> tuple[int, int, int]:
    """Return the numbers of programs of a few-rows product: tiles of its N outputs, tiles of its M
    rows, and splits of the inputs."""
    return triton.cdiv(N, tile.outputs), triton.cdiv(M, rows_of_tile(M)), tile.splits


def split_sums(like: Tensor, M: int, N: int, tile: FewRows) -> tuple[Tensor, Tensor]:
    """Return the arguments `parts` and `arrived` of few_rows.finish_rows: memory for the sums of
    programs that divide the inputs of a product, and counters, on the device of `like`. The memory
    is empty if they do not divide them."""
    size = tile.splits * M * N if tile.splits > 1 else 0
    return like.new_empty(size, dtype=torch.float32), arrivals(like.device)


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """Return counters of 0 for programs that share a tile; the last program resets its counter.

    A program counts itself when it has stored its part; the program that finds all others counted
    adds the parts. All launches on a device share the counters, so kernels that count must not run
    on two streams at a time.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def apply_prologue(x: Tensor, prologue: Prologue) -> Tensor:
    """Apply a prologue to rows, (M, K) or, if gated, (M, 2 K), contiguous -> (M, K)."""
    norm, eps, gated = prologue
    if norm is None and not gated:
        return x
    M, K = len(x), x.shape[1] // (2 if gated else 1)
    out, block = x.new_empty(M, K), min(4096, triton.next_power_of_2(K))
    inputs.prologue_kernel[(M, triton.cdiv(K, block))](
        x,
        norm,
        out,
        K,
        x.stride(0),
        eps,
        NORM=norm is not None,
        GATED=gated,
        BK=block,
        **(norm_options(x, K, norm) | {"num_warps": 4}),
    )
    return out


def dequantize_int8(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of an Int8Linear, (N, K) in dtype, from its buffers.

    For products of many rows, and for micro-batches that share dequantised weights.
    """
    N, K = weight.shape
    out = weight.new_empty(N, K, dtype=dtype)
    unpack.int8_kernel[(triton.cdiv(K, 4096), N)](  # a program: 4096 weights of a row
        weight, scales, out, N, K, weight.stride(0), BN=1, BK=4096, **options(weight, 4)
    )
    return out


def dequantize_int4(
    weight: Tensor, scales: Tensor, zeros: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the weights of an Int4Linear, (N, in_features) in dtype, from its buffers.

    For products of many rows, and for micro-batches that share dequantised weights. The padding of
    the last group is left out.
    """
    (N, columns), P = weight.shape, scales.shape[1]
    half = columns // P  # bytes of a group
    groups = 2048 // half  # of a program: 4096 weights of a row
    out = weight.new_empty(N, in_features, dtype=dtype)
    unpack.int4_kernel[(triton.cdiv(P, groups), N)](
        weight,
        scales,
        zeros,
        out,
        N,
        in_features,
        weight.stride(0) // CHUNK_BYTES,
        scales.stride(0),
        zeros.stride(0),
        HALF=half,
        BN=1,
        GROUPS=groups,
        **options(weight, 4),
    )
    return out

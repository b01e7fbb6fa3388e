"""Matrix products and attention on NVIDIA GPUs, in Triton.

Start at int4_linear. The number of rows of a product chooses its kernel:

    one row (decoding)              fixed_point.py, then one_row.py: bound by memory bandwidth
    2 to 64 rows (batches, drafts)  few_rows.py: tensor cores, weights dequantised in registers
    more (prompts)                  unpack.py dequantises the weights, then cuBLAS multiplies

attention.py attends over the KV cache, quantised or not, in a decoding step. columns.py has the
loops of GPTQ. tiles.py lists the tile sizes of each kernel. launch.py launches the kernels. This
file imports Triton only when a kernel is called.

The products and attention are registered as PyTorch operators, which torch.compile calls without
looking inside; a CUDA graph records the kernels that they launch. They do not use
torch.library.triton_op, for two reasons: it does not pass on programmatic dependent launch, and the
compiler would make a graph for each kernel that a number of rows can choose.

The reference of every kernel is plain PyTorch: quant/linear.py, calibration/gptq.py and
layers.kv_cache.sdpa_attention. This also runs where Triton or a GPU of compute capability 8.0 is
missing; unsupported_reason returns why.

Words of this folder: a program is one of the blocks of threads that run a kernel. A tile is the
piece of the result that a program computes, or its sizes. A part (few_rows.py, attention.py) is a
program's share of a sum. PDL, programmatic dependent launch, lets a kernel start before the
previous one has ended. A nibble is half a byte, an integer 0 to 15. weight, scales and zeros are
the buffers of an Int4Linear or Int8Linear.

Shapes: M rows of activations, N out_features, K in_features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.fixed_point import INT4, INT8
from kernels.gpu.support import unsupported_reason

MAX_FEW_ROWS = 64  # with more rows, dequantised weights and cuBLAS are faster


def usable(device_index: int) -> bool:
    """Return whether the kernels run on the CUDA device of this index.

    compiled.py marks the function as a constant for torch.compile, which then does not trace it. A
    decorator here would import the compiler, which takes a second, with every model.
    """
    return unsupported_reason(torch.device("cuda", device_index)) is None


def supports(x: Tensor) -> bool:
    """Return whether the functions below accept tensors like x: on a CUDA device where the kernels
    run, and without a gradient, which the kernels do not compute. Call it before them."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and not needs_gradient and usable(x.device.index)


class Prologue(NamedTuple):
    """A function of one row that one_row.fixed_point_kernel computes before it converts the row.

    norm: the weight, (K,), of an RMS norm with eps; None: no norm. gated: the row, (1, 2 K),
    becomes silu(first half) * second half, (1, K). Callers give a norm or a gate, or neither, the
    default.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    gated: bool = False


def int4_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    prologue: Prologue = Prologue(),
) -> Tensor:
    """Multiply x, (M, K), by the weights of an Int4Linear -> (M, N), plus the bias, in x's dtype.

    prologue: a norm or gate applied to x first, for M = 1 only; with more rows it is ignored. With
    a gate, x is (1, 2 K).
    """
    if len(x) == 1:
        return torch.ops.gpt_flex.int4_row(x, weight, scales, zeros, bias, *prologue)
    return torch.ops.gpt_flex.int4_rows(x, weight, scales, zeros, bias)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    prologue: Prologue = Prologue(),
) -> Tensor:
    """Multiply x, (M, K), by the weights of an Int8Linear -> (M, N), plus the bias, in x's dtype.

    prologue: a norm or gate applied to x first, for M = 1 and rows of weights aligned to 16 bytes
    only; else it is ignored. With a gate, x is (1, 2 K).
    """
    if len(x) == 1 and aligned(weight, INT8.size):
        return torch.ops.gpt_flex.int8_row(x, weight, scales, bias, *prologue)
    return torch.ops.gpt_flex.int8_rows(x, weight, scales, bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x, (M, K), by a dense weight, (N, K), of the same dtype -> (M, N), plus the bias.

    One row: a Triton kernel, if the rows of the weight are aligned to 8 numbers; else PyTorch.
    """
    if len(x) == 1 and aligned(weight, 8):
        return torch.ops.gpt_flex.dense_row(x, weight, bias)
    return F.linear(x, weight, bias)


def dequantize_int4(
    weight: Tensor, scales: Tensor, zeros: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the weights of an Int4Linear, (N, in_features) in dtype. Not for compiled code: it is
    no operator, and torch.compile would trace into Triton's launch."""
    from kernels.gpu import launch

    return launch.dequantize_int4(weight, scales, zeros, in_features, dtype)


def dequantize_int8(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of an Int8Linear, (N, K) in dtype. Not for compiled code: it is no
    operator, and torch.compile would trace into Triton's launch."""
    from kernels.gpu import launch

    return launch.dequantize_int8(weight, scales, dtype)


def aligned(weight: Tensor, count: int) -> bool:
    """Return whether each row of a matrix begins and ends at a multiple of `count` numbers, and its
    numbers are neighbours in memory: the kernels load `count` numbers at a time."""
    multiples = weight.shape[1] % count == 0 and weight.stride(0) % count == 0
    return multiples and weight.stride(1) == 1


def define(schema: str, on_gpu: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Register an operator, gpt_flex::NAME, for CUDA tensors; torch.compile does not trace into it.

    Callers call it as torch.ops.gpt_flex.NAME. schema: "NAME(arguments) -> result". on_gpu:
    computes the result. fake: takes the same arguments and returns an empty tensor of the result's
    shape and dtype, from which torch.compile learns them.
    """
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cuda")(on_gpu)
    torch.library.register_fake(name)(fake)


# The operators. launch.py imports Triton, which takes half a second: each function imports it.
def int4_row(x, weight, scales, zeros, bias, norm, eps, gated):
    """Apply the prologue (norm, eps, gated) to x, (1, K) or gated (1, 2 K), convert it to fixed
    point, and multiply by an Int4Linear's weights -> (1, N). The operator int4_row."""
    from kernels.gpu import launch

    fixed = launch.fixed_point(x.contiguous()[0], INT4, norm, eps, gated)
    return launch.int4_row(fixed, weight, scales, zeros, bias, x.dtype)


def int8_row(x, weight, scales, bias, norm, eps, gated):
    """Apply the prologue (norm, eps, gated) to x, (1, K) or gated (1, 2 K), convert it to fixed
    point, and multiply by an Int8Linear's weights -> (1, N). The operator int8_row. Requires rows
    of weights aligned to 16 bytes."""
    from kernels.gpu import launch

    fixed = launch.fixed_point(x.contiguous()[0], INT8, norm, eps, gated)
    return launch.int8_row(fixed, weight, scales, bias, x.dtype)


def dense_row(x, weight, bias):
    """Multiply x, (1, K), by a dense weight -> (1, N). The operator dense_row. Requires rows of the
    weight aligned to 8 numbers."""
    from kernels.gpu import launch

    return launch.dense_row(x.contiguous(), weight, bias)


def int4_rows(x, weight, scales, zeros, bias):
    """Multiply x, (M, K), by an Int4Linear's weights -> (M, N). The operator int4_rows. Above
    MAX_FEW_ROWS rows, it dequantises the weights for cuBLAS. The choice is made inside the
    operator, so that a compiled graph is right for any M."""
    from kernels.gpu import launch

    if len(x) <= MAX_FEW_ROWS:
        return launch.int4_rows(x.contiguous(), weight, scales, zeros, bias)
    return F.linear(x, launch.dequantize_int4(weight, scales, zeros, x.shape[1], x.dtype), bias)


def int8_rows(x, weight, scales, bias):
    """Multiply x, (M, K), by an Int8Linear's weights -> (M, N). The operator int8_rows. Above
    MAX_FEW_ROWS rows, or if rows of weights are not aligned to the kernel's words of 4 bytes, it
    dequantises the weights for cuBLAS."""
    from kernels.gpu import launch

    if len(x) <= MAX_FEW_ROWS and aligned(weight, 4):
        return launch.int8_rows(x.contiguous(), weight, scales, bias)
    return F.linear(x, launch.dequantize_int8(weight, scales, x.dtype), bias)


define(
    "int4_row(Tensor x, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias, Tensor? norm, "
    "float eps, bool gated) -> Tensor",
    int4_row,
    lambda x, weight, *rest: x.new_empty(1, weight.shape[0]),
)
define(
    "int8_row(Tensor x, Tensor weight, Tensor scales, Tensor? bias, Tensor? norm, float eps, "
    "bool gated) -> Tensor",
    int8_row,
    lambda x, weight, *rest: x.new_empty(1, weight.shape[0]),
)
define(
    "dense_row(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    dense_row,
    lambda x, weight, bias: x.new_empty(1, weight.shape[0]),
)
define(
    "int4_rows(Tensor x, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor",
    int4_rows,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
define(
    "int8_rows(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor",
    int8_rows,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)

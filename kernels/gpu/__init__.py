"""Matrix products and attention on NVIDIA GPUs, in Triton.

Start at quantized_linear. The number of rows of a product chooses its kernel:

    one row (decoding)              to_fixed_point.py, then one_row.py: bound by memory bandwidth
    2 to 64 rows (batches, drafts)  few_rows.py: tensor cores, weights dequantised in registers
    more (prompts)                  unpack.py dequantises the weights, then cuBLAS multiplies

In float32 up to 64 rows are multiplied one by one. int8 weights whose rows are not aligned: see
input_form. inputs.py computes a norm or gate (prologue.py) within the kernels of the product
after it. rotate.py rotates queries and keys, and stores keys and values. attention.py attends over
the KV cache, quantised or not, in a decoding step; new_tokens.py does in one kernel the work of
both, and the conversion before the product that follows. columns.py has the loops of GPTQ and
launches them; launch.py launches the kernels of products, launch_attention.py those of attention.
tiles.py lists the tile sizes of each kernel. This file imports Triton only when a kernel is called.

The products and (in fast_layers/gpu.py) attention are PyTorch operators, which torch.compile calls
without looking inside; a CUDA graph records the kernels that they launch. They do not use
torch.library.triton_op, for two reasons: it does not pass on programmatic dependent launch, and the
compiler would make a graph for each kernel that a number of rows can choose.

The reference of every kernel is plain PyTorch: quant/linear.py, calibration/gptq.py, prologue.py,
layers/positions.py and layers/kv_cache.py. This also runs where Triton or a GPU of compute
capability 8.0 is missing; unsupported_reason returns why.

Words of this folder: a program is one of the blocks of threads that run a kernel. A tile is the
piece of the result that a program computes, or its sizes. A part (few_rows.py, attention.py) is a
program's share of a sum. PDL, programmatic dependent launch, lets a kernel start before the
previous one has ended. A nibble is half a byte, an integer 0 to 15. weight, scales and zeros are
the buffers of an Int4Linear or Int8Linear.

Shapes: M rows of activations, N out_features, K in_features.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.fixed_point import INT4, INT8, FixedPoint, Order
from kernels.gpu.prologue import HeadNorms as HeadNorms
from kernels.gpu.prologue import Prologue
from kernels.gpu.scaled_rows import ScaledRows, Spans
from kernels.gpu.support import unsupported_reason

# Weight, scales, zeros and bias of an Int4Linear or, with zeros None, of an Int8Linear.
Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
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


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    prologue: Prologue = Prologue(),
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply x, (M, K), by the weights of an Int4Linear or, if zeros is None, of an Int8Linear ->
    (M, N), plus the bias and the residual, (M, N), in x's dtype. prologue: applied to x first; with
    a gate, x is (M, 2 K)."""
    more = bias, residual, *prologue
    if zeros is None:
        return torch.ops.gpt_flex.int8_linear(x, weight, scales, *more)
    return torch.ops.gpt_flex.int4_linear(x, weight, scales, zeros, *more)


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


def define(
    schema: str,
    on_gpu: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Register an operator, gpt_flex::NAME, for CUDA tensors; torch.compile does not trace into it.

    Callers call it as torch.ops.gpt_flex.NAME. schema: "NAME(arguments) -> result". on_gpu:
    computes the result. fake: takes the same arguments and returns an empty tensor of the result's
    shape and dtype, from which torch.compile learns them. tags: of torch.library.define.
    """
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=tags)
    torch.library.impl(name, "cuda")(on_gpu)
    torch.library.register_fake(name)(fake)


# The operators. launch.py imports Triton, which takes half a second: each function imports it. The
# number of rows chooses the kernel within the operator, so that a compiled graph is right for any.
def int4_product(x, weight, scales, zeros, bias, residual, *prologue):
    """The operator int4_linear, see quantized_linear. prologue: norm, eps, gated."""
    return multiply(x, (weight, scales, zeros, bias), residual, Prologue(*prologue))


def int8_product(x, weight, scales, bias, residual, *prologue):
    """The operator int8_linear, see quantized_linear. prologue: norm, eps, gated."""
    return multiply(x, (weight, scales, None, bias), residual, Prologue(*prologue))


def multiply(x: Tensor, stored: Stored, residual: Tensor | None, prologue: Prologue) -> Tensor:
    """Compute quantized_linear by the kernels for the number of rows and the dtype of x.

    stored: weight, scales, zeros and bias; the others are the parameters of quantized_linear.
    """
    from kernels.gpu import launch

    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    M, K = len(x), x.shape[1] // (2 if prologue.gated else 1)
    if 1 < M <= MAX_FEW_ROWS and not suits_few_rows(x.dtype):
        residuals = [None] * M if residual is None else residual.split(1)
        rows = zip(x.split(1), residuals, strict=True)
        return torch.cat([multiply(row, stored, more, prologue) for row, more in rows])
    form = input_form(M, stored, x.dtype)
    if isinstance(form, Order):
        return multiply_converted(
            launch.fixed_point(x[0], form, prologue), stored, residual, x.dtype
        )
    if isinstance(form, Spans):
        return multiply_converted(launch.scaled_rows(x, form, prologue), stored, residual, x.dtype)
    weight, scales, zeros, bias = stored
    x = launch.apply_prologue(x, prologue)
    if zeros is None:
        dense = launch.dequantize_int8(weight, scales, x.dtype)
    else:
        dense = launch.dequantize_int4(weight, scales, zeros, K, x.dtype)
    return added(F.linear(x, dense, bias), residual)


def suits_few_rows(dtype: torch.dtype) -> bool:
    """Return whether rows of this dtype may be multiplied by the kernel for few rows. Not float32,
    which is for comparing devices: the kernel would round inputs to float16, more coarsely than
    16-bit fixed point."""
    return dtype != torch.float32


def input_form(M: int, stored: Stored, dtype: torch.dtype) -> Order | Spans | None:
    """Return the form in which the kernels of a quantised linear take M rows of a dtype: an Order
    of fixed point for one row; Spans of scaled rows for 2 to MAX_FEW_ROWS, and for one row of which
    the int8 weights are aligned to 4 bytes only.

    None: neither kernel takes them, for example rows of int8 weights that are not aligned, or
    several rows of float32. `multiply` takes float32 rows one by one.
    """
    from kernels.gpu import launch

    weight, scales, zeros, _ = stored
    if M == 1 and (zeros is not None or aligned(weight, INT8.size)):
        return INT8 if zeros is None else INT4
    few = M <= MAX_FEW_ROWS and suits_few_rows(dtype)
    if few and (zeros is not None or aligned(weight, 4)):
        return launch.spans_of(M, weight, scales, zeros)
    return None


def multiply_converted(
    x: FixedPoint | ScaledRows, stored: Stored, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply M rows, in the linear's input_form, by its weights -> (M, N) in dtype, plus the bias
    and the residual, (M, N)."""
    from kernels.gpu import launch

    weight, scales, zeros, bias = stored
    one_row = isinstance(x, FixedPoint)
    if zeros is None:
        product = launch.int8_row if one_row else launch.int8_rows
        return product(x, weight, scales, bias, residual, dtype)
    product = launch.int4_row if one_row else launch.int4_rows
    return product(x, weight, scales, zeros, bias, residual, dtype)


def added(y: Tensor, residual: Tensor | None) -> Tensor:
    """Return y plus the residual, if there is one, in the memory of y."""
    return y if residual is None else y.add_(residual)


def dense_row(x, weight, bias):
    """Multiply x, (1, K), by a dense weight -> (1, N). The operator dense_row. Requires rows of the
    weight aligned to 8 numbers."""
    from kernels.gpu import launch

    return launch.dense_row(x.contiguous(), weight, bias)


define(
    "int4_linear(Tensor x, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias, "
    "Tensor? residual, Tensor? norm, float eps, bool gated) -> Tensor",
    int4_product,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
define(
    "int8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias, Tensor? residual, "
    "Tensor? norm, float eps, bool gated) -> Tensor",
    int8_product,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
define(
    "dense_row(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    dense_row,
    lambda x, weight, bias: x.new_empty(1, weight.shape[0]),
)

"""Products and attention on NVIDIA GPUs, in Triton.

Start at int4_linear: it shows how a product finds its kernel, by the number of rows.

    one row (decoding)              fixed_point.py, then one_row.py: bound by memory alone
    2 to 64 rows (batches, drafts)  few_rows.py: tensor cores, weights unpacked in registers
    more (prompts)                  unpack.py, then cuBLAS

attention.py reads the KV cache of a decoding step, quantised or not. tiles.py says how large the
programs of each kernel are; launch.py launches them.

The kernels stand behind PyTorch operators that torch.compile calls as they are, so that a CUDA
graph records them like any other. torch.library.triton_op, through which the compiler could see
into them, is not used: the kernels ask for programmatic dependent launches, which it does not pass
on, and the number of rows may choose between kernels when the graph runs, which it would have to
compile separately.

Every kernel has its oracle in plain PyTorch: quantized.py and model.KVCache. Where Triton or an
NVIDIA GPU of compute capability 8.0 is missing, that is what runs (unsupported_reason).
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.fixed_point import INT4, INT8

OLDEST = 8, 0  # compute capability: Ampere, the first whose tensor cores take bfloat16
FEW = 64  # rows; beyond them dense weights and cuBLAS are faster


@torch.compiler.assume_constant_result
def usable(device_index: int) -> bool:
    """Whether the kernels run on that CUDA device; a constant in compiled code."""
    return unsupported_reason(torch.device("cuda", device_index)) is None


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device; None where they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "they are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended: capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def supports(x: Tensor) -> bool:
    """Whether the functions below take activations like x. They have no gradients."""
    learning = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and not learning and usable(x.device.index)


class Prologue(NamedTuple):
    """What one row goes through before it is multiplied, in the kernel that makes it fixed point.

    norm: the weight, (K,), of RMSNorm(x), with eps. gated: the row, (1, 2 K), stands for
    silu(first half) * second half.
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
    """(M, K) x the buffers of an Int4Linear -> (M, N). prologue: of one row only."""
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
    """(M, K) x (N, K) int8 -> (M, N). prologue: of one row only, of weights that are aligned."""
    if len(x) == 1 and aligned(weight, INT8.size):
        return torch.ops.gpt_flex.int8_row(x, weight, scales, bias, *prologue)
    return torch.ops.gpt_flex.int8_rows(x, weight, scales, bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) x (N, K) of one dtype -> (M, N)."""
    if len(x) == 1 and aligned(weight, 8):
        return torch.ops.gpt_flex.dense_row(x, weight, bias)
    return F.linear(x, weight, bias)


def dequantize_int4(
    weight: Tensor, scales: Tensor, zeros: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The buffers of an Int4Linear -> (N, in_features). Not for compiled code."""
    from kernels.gpu import launch

    return launch.dequantize_int4(weight, scales, zeros, in_features, dtype)


def dequantize_int8(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) int8 -> the numbers that it stands for. Not for compiled code."""
    from kernels.gpu import launch

    return launch.dequantize_int8(weight, scales, dtype)


def aligned(weight: Tensor, count: int) -> bool:
    """Whether each row of a matrix begins and ends at a multiple of so many numbers."""
    whole = weight.shape[1] % count == 0 and weight.stride(0) % count == 0
    return whole and weight.stride(1) == 1


def define(schema: str, on_gpu, fake) -> None:
    """An operator of CUDA tensors, which compiled code calls as it is."""
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cuda")(on_gpu)
    torch.library.register_fake(name)(fake)


# launch.py imports Triton, which takes half a second: not before a GPU computes.
def int4_row(x, weight, scales, zeros, bias, norm, eps, gated):
    from kernels.gpu import launch

    fixed = launch.fixed_point(x.contiguous()[0], INT4, norm, eps, gated)
    return launch.int4_row(fixed, weight, scales, zeros, bias, x.dtype)


def int8_row(x, weight, scales, bias, norm, eps, gated):
    from kernels.gpu import launch

    fixed = launch.fixed_point(x.contiguous()[0], INT8, norm, eps, gated)
    return launch.int8_row(fixed, weight, scales, bias, x.dtype)


def dense_row(x, weight, bias):
    from kernels.gpu import launch

    return launch.dense_row(x.contiguous(), weight, bias)


def int4_rows(x, weight, scales, zeros, bias):
    from kernels.gpu import launch

    if len(x) <= FEW:
        return launch.int4_rows(x.contiguous(), weight, scales, zeros, bias)
    return F.linear(x, launch.dequantize_int4(weight, scales, zeros, x.shape[1], x.dtype), bias)


def int8_rows(x, weight, scales, bias):
    from kernels.gpu import launch

    if len(x) <= FEW and aligned(weight, 4):
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

"""Linear layers, embedding tables, norms and elementwise functions.

Start at Linear and make_norm. On a CPU, compiled code must return the same bits as eager code, but
some of the compiler's own code differs in the last bit. For these functions, compiled code calls
operators that define_operator made of PyTorch's functions.

Shapes: B rows of a batch, T new tokens per row, D dim, E head_dim, V vocab.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.args import DTYPES, ModelArgs


class Embedding(nn.Embedding):
    """An embedding table that is quick to make on the meta device."""

    def reset_parameters(self) -> None:
        # On the meta device this would fill nothing, and import the compiler, which takes 0.7 s.
        if not self.weight.is_meta:
            super().reset_parameters()


class ScaledEmbedding(Embedding):
    """An embedding table whose rows are multiplied by `scale`. rounded: whether the scale itself is
    first rounded to the table's dtype, as Gemma's is."""

    def __init__(self, rows: int, columns: int, scale: float, rounded: bool):
        super().__init__(rows, columns)
        self.scale = scale
        # Rounded to each dtype: that of the table is not known yet. On the CPU even if the model is
        # built on the meta device, where a tensor has no value.
        dtypes = DTYPES.values() if rounded else ()
        self.scales = {t: torch.tensor(scale, dtype=t, device="cpu").item() for t in dtypes}

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the scaled embeddings, (B, T, D), of ids, (B, T)."""
        return super().forward(tokens) * self.scales.get(self.weight.dtype, self.scale)


class Scale(nn.Module):
    """Multiplies by a number (Granite's residual factor)."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Divide(nn.Module):
    """Divides by a number (Granite's logits). Multiplying by the reciprocal may give another last
    bit."""

    def __init__(self, divisor: float):
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor


class SoftCap(nn.Module):
    """Limits logits to the range from -cap to cap; see soft_cap."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        compute = torch.ops.gpt_flex.soft_cap if calls_operator(logits) else soft_cap
        return compute(logits, self.cap)


class Linear(nn.Linear):
    """A dense layer, (..., in_features) -> (..., out_features)."""

    # For each tensor, the number of inputs whose weights one of its columns holds. tp.py divides
    # columns among ranks.
    inputs_per_column = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        # F.linear gets a matrix: for inputs of more dimensions and a bias, the compiler takes sizes
        # that vary for constants (torch 2.13).
        rows = x.flatten(0, -2)  # (N, in_features), N: product of the other dimensions
        y = F.linear(rows, self.weight, self.bias)  # (N, out_features)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out_features)


class RMSNorm(nn.RMSNorm):
    """RMS norm; compiled code returns the same bits as eager code. eps: added to the mean square.
    affine: whether it has a weight. fast: whether to call the operator of kernels/cpu;
    fast_layers/cpu.py sets it. offset: added to the weight, see OffsetRMSNorm."""

    fast, offset = False, 0.0

    def __init__(self, dim: int, eps: float, affine: bool):
        super().__init__(dim, eps, affine)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        if self.fast:
            return torch.ops.gpt_flex.fast_rms_norm(x, self.weight, self.eps, self.offset)
        if calls_operator(x):
            return torch.ops.gpt_flex.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """Layer norm; compiled code returns the same bits as eager code."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        if calls_operator(x):
            affine = self.weight, self.bias
            return torch.ops.gpt_flex.layer_norm(x, self.normalized_shape, *affine, self.eps)
        return super().forward(x)


class OffsetLayerNorm(LayerNorm):
    """The layer norm of Nemotron: the stored weight is the factor minus 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        compute = torch.ops.gpt_flex.layer_norm if calls_operator(x) else torch.layer_norm
        factor = 1 + self.weight
        return compute(x, self.normalized_shape, factor, self.bias, self.eps)


class OffsetRMSNorm(nn.Module):
    """The RMS norm of Gemma: the stored weight is the factor minus 1, and the norm is computed in
    float32. fast, offset: see RMSNorm."""

    fast, offset = False, 1.0

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape and dtype of x."""
        if self.fast:
            return torch.ops.gpt_flex.fast_rms_norm(x, self.weight, self.eps, self.offset)
        compute = torch.ops.gpt_flex.rms_norm if calls_operator(x) else torch.rms_norm
        factor = 1 + self.weight.float()
        return compute(x.float(), self.weight.shape, factor, self.eps).type_as(x)


class WholeRMSNorm(RMSNorm):
    """An RMS norm of queries or keys over the channels of all heads together (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x, (B, T, heads, E), in that shape."""
        y = super().forward(x.flatten(2))  # (B, T, heads * E)
        return y.view(x.shape)  # (B, T, heads, E)


class HeadLayerNorm(nn.Module):
    """A layer norm of queries or keys over the channels of a head; each head has weights of its own
    (StableLM 2). dim: channels of a head."""

    def __init__(self, heads: int, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads * dim))
        self.shape, self.eps = (heads, dim), eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x, (B, T, heads, E), over the channels of each head."""
        compute = torch.ops.gpt_flex.layer_norm if calls_operator(x) else torch.layer_norm
        # No weight here: layer_norm takes one for all heads only.
        y = compute(x.float(), self.shape[1:], None, None, self.eps)
        return (y * self.weight.float().view(self.shape)).type_as(x)  # (heads * E,) -> (heads, E)


def make_norm(args: ModelArgs, dim: int | None = None) -> nn.Module:
    """Returns a norm over `dim` channels, of the class that args.norm names. None: args.dim."""
    return NORMS[args.norm](args, dim or args.dim)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Returns cap * tanh(x / cap), computed in float32: almost x near 0, never beyond the cap."""
    return (cap * torch.tanh(x.float() / cap)).type_as(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns the GELU of x in its approximation by a hyperbolic tangent."""
    if calls_operator(x):
        return torch.ops.gpt_flex.gelu_tanh(x)
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """Returns the square of the ReLU of x."""
    return F.relu(x).square()


def calls_operator(x: Tensor) -> bool:
    """Returns whether to call the operators below for x: in compiled code on CPUs, unless x needs a
    gradient, which the operators do not compute."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not x.requires_grad


def define_operator(
    schema: str, on_cpu: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Define an operator gpt_flex::NAME. Compiled code calls it as it is; a call of the same
    PyTorch functions would be replaced by code that the compiler generates.

    schema: NAME and the signature, in PyTorch's notation. on_cpu: computes the result. fake:
    returns an uninitialised result of the same shape, strides and dtype; the compiler calls it in
    tracing, and reads the result by these strides.
    """
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cpu")(on_cpu)
    torch.library.register_fake(name)(fake)


# On a CPU, Inductor's own norms sum in another order, and its tanh differs in the last bit; in
# bfloat16, compiled text would differ from eager text.
define_operator(
    "rms_norm(Tensor x, int[] shape, Tensor? weight, float? eps) -> Tensor",
    torch.rms_norm,
    lambda x, *_: x.new_empty(x.shape),
)
define_operator(
    "layer_norm(Tensor x, int[] shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    torch.layer_norm,
    lambda x, *_: x.new_empty(x.shape),
)

define_operator(
    "soft_cap(Tensor x, float cap) -> Tensor", soft_cap, lambda x, cap: torch.empty_like(x)
)
define_operator(
    "gelu_tanh(Tensor x) -> Tensor",
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: torch.empty_like(x),
)

# ModelArgs.norm -> function of the args and a number of channels that makes a norm over these.
NORMS = {
    "rms": lambda args, dim: RMSNorm(dim, args.norm_eps, args.norm_affine),
    "offset_rms": lambda args, dim: OffsetRMSNorm(dim, args.norm_eps),
    "layer": lambda args, dim: LayerNorm(dim, args.norm_eps, args.norm_affine),
    "offset_layer": lambda args, dim: OffsetLayerNorm(dim, args.norm_eps),
}
# ModelArgs.qk_norm -> function of the args and a number of heads that makes a norm of queries or
# keys, (B, T, heads, E).
QK_NORMS = {
    "none": lambda args, heads: nn.Identity(),
    "head": lambda args, heads: make_norm(args, args.head_dim),
    "whole": lambda args, heads: WholeRMSNorm(heads * args.head_dim, args.norm_eps, affine=True),
    "each_head": lambda args, heads: HeadLayerNorm(heads, args.head_dim, args.norm_eps),
}

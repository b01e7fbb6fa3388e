"""Linear layers, embedding tables and norms: those of torch.nn, with compiled code in mind.

Start at Linear and make_norm. On a CPU, compiled code must return the same bits as eager code:
operators defined by `kernel` are called by compiled code as they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.args import ModelArgs


class Embedding(nn.Embedding):
    """An embedding table that is quick to make on the meta device."""

    def reset_parameters(self) -> None:
        # On the meta device this would fill nothing, and import the compiler, which takes 0.7 s.
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """A dense layer, (..., in_features) -> (..., out_features)."""

    # Inputs that a column of each tensor stands for, for tp.py, which divides columns among ranks.
    inputs_per_column = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        # A matrix, since for inputs of more dimensions and a bias the compiler takes dynamic sizes
        # for constants (torch 2.13).
        rows = x.flatten(0, -2)  # (N, in_features), N: product of the other dimensions
        y = F.linear(rows, self.weight, self.bias)  # (N, out_features)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out_features)


class RMSNorm(nn.RMSNorm):
    """RMS norm. eps: added to the mean square. affine: whether it has a weight. exact: compiled
    code returns the same bits as eager code."""

    def __init__(self, dim: int, eps: float, affine: bool, exact: bool = True):
        super().__init__(dim, eps, affine)
        self.exact = exact

    def allow_fusion(self) -> None:
        """Let the compiler fuse this norm with the code around it.

        A decoding step with quantised weights is 7 % faster; the last bits of its result may differ
        from those of eager code.
        """
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        if self.exact and takes_kernel(x):
            return torch.ops.gpt_flex.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """Layer norm; compiled code returns the same bits as eager code."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        if takes_kernel(x):
            affine = self.weight, self.bias
            return torch.ops.gpt_flex.layer_norm(x, self.normalized_shape, *affine, self.eps)
        return super().forward(x)


def make_norm(args: ModelArgs) -> nn.Module:
    return NORMS[args.norm](args.dim, args.norm_eps, args.norm_affine)


def takes_kernel(x: Tensor) -> bool:
    """Returns whether to call the operators below for x: in compiled code on CPUs. The operators
    have no gradient."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not x.requires_grad


def kernel(schema: str, on_cpu: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define an operator gpt_flex::NAME, which compiled code calls as it is; the compiler would
    replace the same PyTorch functions by generated code.

    schema: NAME and the signature, in PyTorch's notation. on_cpu: computes the result. fake:
    returns an uninitialised tensor of the result's shape, which the compiler asks for.
    """
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cpu")(on_cpu)
    torch.library.register_fake(name)(fake)


# On a CPU, Inductor's own norms sum in another order; in bfloat16, compiled text would differ from
# eager text.
kernel(
    "rms_norm(Tensor x, int[] shape, Tensor? weight, float? eps) -> Tensor",
    torch.rms_norm,
    lambda x, *_: torch.empty_like(x),
)
kernel(
    "layer_norm(Tensor x, int[] shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    torch.layer_norm,
    lambda x, *_: torch.empty_like(x),
)

NORMS = {"rms": RMSNorm, "layer": LayerNorm}

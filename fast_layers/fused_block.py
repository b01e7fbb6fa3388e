"""A layer of few operators: each linear also computes the norm or gate before it and the residual
sum after it.

Start at FusedBlock. fast_layers/cpu.py and gpu.py make subclasses of it for their devices; can_fuse
says which layers they can replace.

Shapes: B rows of the batch, T new tokens, D dim, F hidden_dim, H query heads, G key/value heads, E
head_dim, K in_features and N out_features of a linear.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from layers.basic import OffsetRMSNorm, RMSNorm
from layers.kv_cache import AttentionCache
from layers.positions import Rotation
from model import GatedFeedForward, SequentialBlock

Norm = RMSNorm | OffsetRMSNorm


class FusedBlock(SequentialBlock):
    """A SequentialBlock that computes norms, gates and residual sums together with its linears.

    block: the layer whose modules it takes; can_fuse(block, ...) must be true. Computes the same as
    the block.
    """

    def __init__(self, block: SequentialBlock):
        nn.Module.__init__(self)  # not SequentialBlock's, which would allocate weights
        for name, module in block.named_children():
            self.add_module(name, module)

    def product(
        self,
        linear: nn.Module,
        x: Tensor,
        norm: Norm | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        output_norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Compute a linear together with the norm or gate before it, and the norm and sum after it.

        Returns output_norm(linear(y)) + residual, (B, T, N). y, (B, T, K), is norm(x); with an
        activation, x is (B, T, 2 K), and y is activation(first half) * second half. Callers give a
        norm or an activation, not both, and at most one of the two norms. What is None is skipped.
        Subclasses implement it.
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: AttentionCache
    ) -> Tensor:
        """Return the layer's output for x, (B, T, D), in that shape; see SequentialBlock."""
        attention, feed_forward = self.attention, self.feed_forward
        qkv = self.product(attention.wqkv, x, norm=norm_or_none(self.attention_norm))
        y = self.attend(qkv, rotation, mask, pos, cache)  # (B, T, H * E)
        x = self.product(
            attention.wo, y, output_norm=norm_or_none(self.attention_output), residual=x
        )  # (B, T, D)
        hidden = self.product(feed_forward.w13, x, norm=norm_or_none(self.ffn_norm))  # (B, T, 2 F)
        return self.product(
            feed_forward.w2,
            hidden,
            activation=feed_forward.activation,
            output_norm=norm_or_none(self.ffn_output),
            residual=x,
        )

    def attend(
        self, qkv: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: AttentionCache
    ) -> Tensor:
        """Compute Attention.attend, (B, T, (H + 2 G) * E) -> (B, T, H * E). A subclass may override
        it with a faster version."""
        return self.attention.attend(qkv, rotation, mask, pos, cache)


class FusedOperations(NamedTuple):
    """What a device computes together with operations. linears: classes of linears. activations: of
    gates. norms: classes of norms. output_norms: whether a norm may follow a product."""

    linears: tuple[type[nn.Module], ...]
    activations: tuple[Callable[[Tensor], Tensor], ...]
    norms: tuple[type[nn.Module], ...]
    output_norms: bool


def can_fuse(block: nn.Module, operations: FusedOperations) -> bool:
    """Return whether a FusedBlock with these operations can replace a block.

    The block must be a plain SequentialBlock with a gated feed-forward. No factor (Scale) may be
    applied to its outputs. Its linears, norms and activation must be among the operations; a norm
    must have a weight, and nn.Identity stands for no norm. Tensor-parallel layers are not fused:
    RowParallel (tp.py) is not among the linears, and the residual must be added after the sum over
    ranks.
    """
    if type(block) is not SequentialBlock or type(block.feed_forward) is not GatedFeedForward:
        return False
    attention, feed_forward = block.attention, block.feed_forward
    linears = attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2
    outputs = block.attention_output, block.ffn_output
    norms = [m for m in (block.attention_norm, block.ffn_norm, *outputs) if not is_identity(m)]
    return (
        all(isinstance(linear, operations.linears) for linear in linears)
        and all(type(norm) in operations.norms and is_norm(norm) for norm in norms)
        and (operations.output_norms or all(map(is_identity, outputs)))
        and feed_forward.activation in operations.activations
    )


def is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMS norm with a weight, of one of the two classes of Norm."""
    return type(module) in (RMSNorm, OffsetRMSNorm) and module.weight is not None


def norm_or_none(module: nn.Module) -> Norm | None:
    """Return a norm, or None for nn.Identity."""
    return None if is_identity(module) else module


def eps_and_offset(norm: Norm | None) -> tuple[float, float]:
    """Return a norm's eps and the offset of its weight; zeros, which are not used, for None."""
    return (0.0, 0.0) if norm is None else (norm.eps, norm.offset)

"""A layer of few operators: norms, gates and residual sums are computed within its products.

Start at FusedBlock. fast_layers/cpu.py and gpu.py make subclasses of it for their devices, and
can_fuse tells them for which layers.

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
    """A SequentialBlock of products that also compute what stands before and after them.

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
        """Return output_norm(linear(y)) + residual, (B, T, N), with y, (B, T, K), made of x:
        norm(x), or with an activation, for x of (B, T, 2 K), activation(first half) * second half.
        What is None is left out. A subclass computes it for its device."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: AttentionCache
    ) -> Tensor:
        """Return the layer's output for x, (B, T, D), in that shape; see SequentialBlock."""
        attention, feed_forward, output = self.attention, self.feed_forward, norm_or_none
        qkv = self.product(attention.wqkv, x, norm=norm_or_none(self.attention_norm))
        y = self.attend(qkv, rotation, mask, pos, cache)  # (B, T, H * E)
        x = self.product(
            attention.wo, y, output_norm=output(self.attention_output), residual=x
        )  # (B, T, D)
        hidden = self.product(feed_forward.w13, x, norm=norm_or_none(self.ffn_norm))  # (B, T, 2 F)
        return self.product(
            feed_forward.w2,
            hidden,
            activation=feed_forward.activation,
            output_norm=output(self.ffn_output),
            residual=x,
        )

    def attend(
        self, qkv: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: AttentionCache
    ) -> Tensor:
        """Compute Attention.attend, (B, T, (H + 2 G) * E) -> (B, T, H * E). A subclass may have
        faster ways."""
        return self.attention.attend(qkv, rotation, mask, pos, cache)


class Products(NamedTuple):
    """What the products of a device compute: the types of linears, the activations of gates, and
    whether norms follow a product."""

    linears: tuple[type[nn.Module], ...]
    activations: tuple[Callable[[Tensor], Tensor], ...]
    norms: tuple[type[nn.Module], ...]
    output_norms: bool


def can_fuse(block: nn.Module, products: Products) -> bool:
    """Return whether a FusedBlock with these products can replace a block: a plain SequentialBlock
    with a gated feed-forward, whose norms have weights, and without factors of outputs. A block
    with RowParallel (tp.py), which is of another type, is not fused: the residual is to be added
    after the sum over ranks."""
    if type(block) is not SequentialBlock or type(block.feed_forward) is not GatedFeedForward:
        return False
    attention, feed_forward = block.attention, block.feed_forward
    linears = attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2
    outputs = block.attention_output, block.ffn_output
    norms = [m for m in (block.attention_norm, block.ffn_norm, *outputs) if not is_identity(m)]
    return (
        all(isinstance(linear, products.linears) for linear in linears)
        and all(type(norm) in products.norms and is_norm(norm) for norm in norms)
        and (products.output_norms or all(map(is_identity, outputs)))
        and feed_forward.activation in products.activations
    )


def is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMS norm with a weight, of one of the two classes of Norm."""
    return type(module) in (RMSNorm, OffsetRMSNorm) and module.weight is not None


def norm_or_none(module: nn.Module) -> Norm | None:
    """Return a norm, or None for nn.Identity."""
    return None if is_identity(module) else module


def settings(norm: Norm | None) -> tuple[float, float]:
    """Return eps, and what is added to the weight, of a norm; any numbers for None."""
    return (0.0, 0.0) if norm is None else (norm.eps, norm.offset)

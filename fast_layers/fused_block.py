"""Layers that compute norms, gates and residual sums together with their linears.

Start at can_fuse, which says which layers of a model a device can compute in this way. cpu.py and
gpu.py make subclasses of FusedBlock for their devices.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from layers.basic import OffsetRMSNorm, RMSNorm
from layers.positions import RotaryPositions
from model import Attention, GatedFeedForward, SequentialBlock

Norm = RMSNorm | OffsetRMSNorm


class FusedBlock(SequentialBlock):
    """A SequentialBlock with a faster forward, which subclasses implement. Computes the same.

    block: the layer whose modules it takes; can_fuse(block, ...) must be true.
    """

    def __init__(self, block: SequentialBlock):
        nn.Module.__init__(self)  # not SequentialBlock's, which would allocate weights
        for name, module in block.named_children():
            self.add_module(name, module)


class FusedOperations(NamedTuple):
    """The modules that a device's FusedBlock can compute. linears, norms: their classes.
    activations: those of gates. output_norms: whether a norm may follow a product."""

    linears: tuple[type[nn.Module], ...]
    activations: tuple[Callable[[Tensor], Tensor], ...]
    norms: tuple[type[nn.Module], ...]
    output_norms: bool


def can_fuse(block: nn.Module, operations: FusedOperations) -> bool:
    """Return whether a FusedBlock with these operations can replace a block.

    The block must be a plain SequentialBlock with rotary positions and a gated feed-forward. No
    factor (Scale) may be applied to its outputs. Its linears, norms and activation must be among
    the operations; a norm must have a weight, and nn.Identity stands for no norm. All norms of the
    classes RMSNorm and OffsetRMSNorm must have the same eps and offset. Tensor-parallel layers are
    not fused: RowParallel (tp.py) is not among the linears, and the residual must be added after
    the sum over ranks.
    """
    if type(block) is not SequentialBlock:
        return False
    attention, feed_forward = block.attention, block.feed_forward
    if type(attention) is not Attention or type(feed_forward) is not GatedFeedForward:
        return False
    linears = attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2
    outputs = block.attention_output, block.ffn_output
    norms = [m for m in (block.attention_norm, block.ffn_norm, *outputs) if not is_identity(m)]
    return (
        attention.rotate is RotaryPositions.rotate
        and all(isinstance(linear, operations.linears) for linear in linears)
        and all(type(norm) in operations.norms and is_norm(norm) for norm in norms)
        and len({(norm.eps, norm.offset) for norm in filter(is_norm, block.modules())}) <= 1
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

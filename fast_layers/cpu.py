"""Puts the operators of kernels/cpu into a model.

Start at use_fast_linears. It replaces each quantised linear by a TiledLinear, which holds the same
integers in the order in which the CPU reads them, and each dense linear by a FewRowsLinear.
attend_fast then makes KV caches use kernels/cpu/attention.cpp. A model keeps its own layers, which
are slower and are the reference in tests, if the CPU, the compiler or the dtype does not support
the operators.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.log import log
from host.memory import page_aligned
from kernels.cpu.build import build, layout, unsupported_reason
from model import KVCache, Linear, RMSNorm, Transformer
from quant.linear import Int4Linear, Int8Linear, QuantizedLinear

MIN_DENSE_BYTES = (
    2**24
)  # bytes of dense weights; with fewer nobody waits long enough to compile for them


class TiledLinear(nn.Module):
    """A quantised linear with packed weights (kernels/cpu/layout.h). It computes in bfloat16.

    A linear on the meta device gives its shape only; `take` packs weights later.
    """

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.strips = -(-self.out_features // layout().strip)
        self.register_buffer("packed", None)
        self.register_buffer("bias", None)
        widest = layout().int8 if isinstance(linear, Int8Linear) else layout().int4_half
        # A shorter format leaves the last pages untouched, which then take no memory.
        self._buffer = page_aligned(self.strips * strip_bytes(linear, widest), torch.device("cpu"))
        if not linear.weight.is_meta:
            self.take(linear)

    @torch.no_grad()
    def take(self, linear: QuantizedLinear) -> None:
        """Pack the weights of a linear of the same kind and shape, which may be freed afterwards.

        The calling thread packs alone, without Python's global lock.
        """
        zeros = getattr(linear, "zeros", None)
        format = torch.ops.gpt_flex.pack(linear.weight, linear.scales, zeros, self._buffer)
        size = strip_bytes(linear, format)
        self.packed = self._buffer[: self.strips * size].view(self.strips, size)
        if linear.bias is not None:
            self.bias = F.pad(linear.bias.bfloat16(), (0, -self.out_features % layout().strip))
        self._format = format, block_of(linear), self.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()  # (M, K)
        y = torch.ops.gpt_flex.quantized_linear(rows, self.packed, self.bias, *self._format)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class FewRowsLinear(nn.Module):
    """A dense linear that shares the weights of another. Up to 16 rows go to the operator linear,
    which with AMX takes no longer than for one row; more rows go to PyTorch."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.gpt_flex.linear(x.flatten(0, -2), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def block_of(linear: QuantizedLinear) -> int:
    """Return the inputs that share a scale of the weights or, for int8, of the activations."""
    return linear.groupsize if isinstance(linear, Int4Linear) else layout().int8_block


def strip_bytes(linear: QuantizedLinear, format: int) -> int:
    """Return the packed bytes of one strip of outputs."""
    row_bytes = linear.weight.shape[1] * linear.weight.itemsize
    return torch.ops.gpt_flex.strip_bytes(format, row_bytes, block_of(linear))


def use_fast_linears(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> None:
    """Replace the linears of a model on the CPU by faster ones, if this CPU supports them.

    dtype: of the activations. large: whether to replace dense linears; None: if they hold
    MIN_DENSE_BYTES. Linears on the meta device stay, as they have no weights to pack.
    """
    linears = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (Linear, QuantizedLinear)) and not m.weight.is_meta
    }
    quantised = {n: m for n, m in linears.items() if isinstance(m, QuantizedLinear)}
    dense = {n: m for n, m in linears.items() if m.weight.dtype == torch.bfloat16}
    if quantised and (reason := unsupported_reason(dtype) or build()):
        log(f"quantised layers run slowly here: {reason}")
    elif quantised:
        for name, linear in quantised.items():
            model.set_submodule(name, TiledLinear(linear))  # memory holds one layer twice
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.same_bits = False
    if large is None:
        large = sum(linear.weight.nbytes for linear in dense.values()) >= MIN_DENSE_BYTES
    if dense and large and not (unsupported_reason(dtype) or build()):
        for name, linear in dense.items():
            model.set_submodule(name, FewRowsLinear(linear))


def attend_fast(model: Transformer) -> None:
    """Make the KV caches of a model with fast linears use kernels/cpu/attention.cpp.

    PyTorch is as fast if query heads share keys and values. A decode step and a verify pass must
    use the same attention, so that a text with a draft model has the bits of one without.
    """
    alone = model.args.n_heads == model.args.n_kv_heads
    if alone and any(isinstance(m, (TiledLinear, FewRowsLinear)) for m in model.modules()):
        model.new_cache = partial(attending, model.new_cache)


def attending(new_cache: Callable[..., KVCache], *given: Any) -> KVCache:
    """Return a new cache that attends by kernels/cpu/attention.cpp."""
    cache = new_cache(*given)
    cache.attention = torch.ops.gpt_flex.attention
    return cache

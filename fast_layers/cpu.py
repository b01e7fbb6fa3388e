"""The products of kernels/cpu: built once, registered as operators, put into a model.

Start at use_fast_linears. It replaces quantised linears by TiledLinear, which hold the same integers in
the order that the CPU reads them in, and dense ones by FewRowsLinear; then attend_fast lets caches
attend by kernels/cpu/attention.cpp. Where the CPU, the compiler or the dtype does not support them,
a model keeps its layers, which are slower and are the reference in tests.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.log import log
from host.memory import page_aligned
from kernels.cpu.build import build, unsupported_reason
from model import KVCache, Linear, RMSNorm, Transformer
from quant.linear import Int4Linear, Int8Linear, QuantizedLinear

STRIP, SPAN, LINE = 16, 256, 64  # outputs, inputs, bytes; as in kernels/cpu/products.cpp
INT8, INT4, INT4_HALF = 80, 41, 42  # its Format
INT8_BLOCK = 128  # inputs that share a scale of the activations
MIN_DENSE_BYTES = (
    2**24
)  # bytes of dense weights; with fewer nobody waits long enough to compile for them


class TiledLinear(nn.Module):
    """A quantised linear in the order that kernels/cpu/products.cpp reads. It computes in bfloat16.

    One that is on the meta device gives its shape only: weights come by `take`.
    """

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.strips = -(-self.out_features // STRIP)
        self.register_buffer("packed", None)
        self.register_buffer("bias", None)
        widest = INT8 if isinstance(linear, Int8Linear) else INT4_HALF
        # What a shorter format leaves of it is never touched, and takes no memory.
        self._room = page_aligned(self.strips * strip_bytes(linear, widest), torch.device("cpu"))
        if not linear.weight.is_meta:
            self.take(linear)

    @torch.no_grad()
    def take(self, linear: QuantizedLinear) -> None:
        """Hold the weights of another linear of the same kind and shape, which may then go.

        The thread that calls packs them alone, without the interpreter's lock.
        """
        zeros = getattr(linear, "zeros", None)
        format = torch.ops.gpt_flex.pack(linear.weight, linear.scales, zeros, self._room)
        size = strip_bytes(linear, format)
        self.packed = self._room[: self.strips * size].view(self.strips, size)
        if linear.bias is not None:
            self.bias = F.pad(linear.bias.bfloat16(), (0, -self.out_features % STRIP))
        self._how = format, block_of(linear), self.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()  # (M, K)
        y = torch.ops.gpt_flex.quantized_linear(rows, self.packed, self.bias, *self._how)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class FewRowsLinear(nn.Module):
    """A dense linear, with the same weights. Up to 16 rows are read together with them, by AMX in
    the time of one; more are torch's."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.gpt_flex.linear(x.flatten(0, -2), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def block_of(linear: QuantizedLinear) -> int:
    """The inputs that share a scale: of the weights or, int8, of the activations alone."""
    return linear.groupsize if isinstance(linear, Int4Linear) else INT8_BLOCK


def strip_bytes(linear: QuantizedLinear, format: int) -> int:
    """Of 16 outputs: their scales, then spans, each with a header in front of its tiles."""
    bits, scale_bytes = divmod(format, 10)
    groups = SPAN // block_of(linear) if format != INT8 else 0  # of a span
    header = groups * (STRIP * scale_bytes + STRIP // 2)
    inputs = linear.weight.shape[1] * 8 // bits
    return LINE + -(-inputs // SPAN) * (-(-header // LINE) * LINE + STRIP * SPAN * bits // 8)


def use_fast_linears(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> None:
    """Give a model that is on the CPU faster products, if that is possible and worth it here.

    dtype: what the products may compute in. large: whether dense weights are worth it, None: by
    their bytes. Linears on the meta device have no weights to pack.
    """
    here = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (Linear, QuantizedLinear)) and not m.weight.is_meta
    }
    quantised = {n: m for n, m in here.items() if isinstance(m, QuantizedLinear)}
    dense = {n: m for n, m in here.items() if m.weight.dtype == torch.bfloat16}
    if quantised and (reason := unsupported_reason(dtype) or build()):
        log(f"quantised layers run slowly here: {reason}")
    elif quantised:
        for name, linear in quantised.items():
            model.set_submodule(name, TiledLinear(linear))  # one layer at a time is there twice
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.same_bits = False
    if large is None:
        large = sum(linear.weight.nbytes for linear in dense.values()) >= MIN_DENSE_BYTES
    if dense and large and not (unsupported_reason(dtype) or build()):
        for name, linear in dense.items():
            model.set_submodule(name, FewRowsLinear(linear))


def attend_fast(model: Transformer) -> None:
    """Let caches of a model that has such products attend by kernels/cpu/attention.cpp.

    Where query heads share keys and values torch's is as fast. A step and a sweep of several
    tokens have to go the same way, so that a draft's text is plain text to the bit.
    """
    alone = model.args.n_heads == model.args.n_kv_heads
    if alone and any(isinstance(m, (TiledLinear, FewRowsLinear)) for m in model.modules()):
        model.new_cache = partial(attending, model.new_cache)


def attending(new_cache: Callable[..., KVCache], *given: Any) -> KVCache:
    """A new cache, see KVCache, with such attention."""
    cache = new_cache(*given)
    cache.attention = torch.ops.gpt_flex.attention
    return cache

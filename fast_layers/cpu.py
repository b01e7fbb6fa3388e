"""Layers that run on the C++ kernels of kernels/cpu.

Start at use_fast_linears. It replaces quantised linears by PackedLinear, which hold the same
integers in the order in which the kernels read them, and dense linears by DenseLinear.
use_fast_attention lets the KV caches compute attention by kernels/cpu/attention.h. In
float32, or without a compiler, a model keeps its layers, which are slower and are the reference in
tests. Small dense linears stay, too.

layout() returns the constants of the packed order: layout().strip outputs (16) are packed together
as a strip; layout().int8, int4 and int4_half number the formats of packed weights. torch.ops.
gpt_flex.NAME are the operators that kernels/cpu/build.py compiles.

Shapes: M rows, N out_features, K in_features; for attention B rows, T new tokens, S visible
positions, H query heads, G key/value heads, E head_dim.
"""

import threading
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.log import log
from host.memory import HugePages, page_aligned
from kernels.cpu.build import (
    DTYPES,
    build,
    layout,
    multiplies_bfloat16,
    supported_sets,
    unsupported_reason,
)
from layers.basic import Linear, OffsetRMSNorm, RMSNorm, gelu_tanh
from layers.kv_cache import KVCache, grouped_attention
from model import Transformer
from quant.linear import Int4Linear, Int8Linear, QuantizedLinear

# Compiling the kernels does not pay for a model whose dense linears have fewer bytes.
MIN_DENSE_BYTES = 2**24
# Query heads of a key/value head for which a verify pass of 16 tokens has at most kMaxQueries
# queries (kernels/cpu/layer_operators.cpp).
MAX_SHARING = 8


class PackedLinear(nn.Module):
    """A quantised linear with its weights in the kernels' order, see kernels/cpu/layout.h.

    Takes bfloat16 and float16 rows, and float32 rows in a draft's copy of a float32 model; a bias
    has the dtype of the rows. Needs the operators: `build` must have succeeded. packed: (strips,
    bytes of a strip) uint8, None before load_from.
    """

    def __init__(self, linear: QuantizedLinear, memory: HugePages | None = None):
        """Pack a linear, or only allocate memory for its shape if it is on the meta device.

        In the latter case call load_from before forward. memory: where to allocate the packed
        bytes; None: in a buffer that fits the widest format of the linear's kind, so that load_from
        may be called again, as offload.py does for streamed layers. `pack` chooses the format by
        the scales.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.strips = -(-self.out_features // layout().strip)
        self.register_buffer("packed", None)
        self.register_buffer("bias", None)
        widest = layout().int8 if isinstance(linear, Int8Linear) else layout().int4_half
        # If the scales fit a narrower format, the end of the buffer is never written, and the OS
        # assigns no memory to it.
        nbytes = self.strips * strip_bytes(linear, widest)
        allocate = memory.take if memory else partial(page_aligned, device=torch.device("cpu"))
        self._buffer = allocate(nbytes)
        if not linear.weight.is_meta:
            self.load_from(linear)
        if memory:
            self._buffer = memory.shorten(self.packed.numel())
            self.packed = self._buffer.view_as(self.packed)

    @torch.no_grad()
    def load_from(self, linear: QuantizedLinear) -> None:
        """Pack the weights of `linear` into this layer, in place of its earlier weights.

        Sets `packed`, the bias (padded to whole strips) and _layout, the operator's last arguments.
        linear: of the same kind and shape as at construction; it may be freed afterwards. Uses only
        the calling thread and releases the interpreter's lock, so that other threads can compute.
        """
        zeros = getattr(linear, "zeros", None)
        format = torch.ops.gpt_flex.pack(linear.weight, linear.scales, zeros, self._buffer)
        size = strip_bytes(linear, format)
        self.packed = self._buffer[: self.strips * size].view(self.strips, size)
        if linear.bias is not None:
            self.bias = F.pad(linear.bias, (0, -self.out_features % layout().strip))
        self._layout = format, inputs_per_scale(linear), self.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        y = torch.ops.gpt_flex.quantized_linear(rows, self.packed, self.bias, *self._layout)
        return y.view(*x.shape[:-1], self.out_features)


class DenseLinear(nn.Module):
    """A dense bfloat16 or float16 linear on the operator gpt_flex::linear.

    Shares the weights of `linear`. On CPUs that multiply bfloat16 (AVX-512 BF16, AMX) the operator
    passes more than 16 bfloat16 rows to PyTorch; on others PyTorch takes several times as long as
    the operator for any number of rows.
    """

    def __init__(self, linear: Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.gpt_flex.linear(x.flatten(0, -2), self.weight, self.bias)  # (M, N)
        return y.view(*x.shape[:-1], self.out_features)


def inputs_per_scale(linear: QuantizedLinear) -> int:
    """Return how many inputs share a scale of the weights (int4) or of the activations (int8)."""
    return linear.groupsize if isinstance(linear, Int4Linear) else layout().int8_block


def strip_bytes(linear: QuantizedLinear, format: int) -> int:
    """Return the packed bytes of one strip, which holds all weights of layout().strip outputs.

    linear: gives the shape and the group size; it may be on the meta device. format: layout().int8,
    int4 or int4_half.
    """
    row_bytes = linear.weight.shape[1] * linear.weight.itemsize
    return torch.ops.gpt_flex.strip_bytes(format, row_bytes, inputs_per_scale(linear))


def use_fast_linears(
    model: nn.Module,
    dtype: torch.dtype,
    large: bool | None = None,
    memory: HugePages | None = None,
) -> bool:
    """Replace the linears of a model on the CPU by fast ones, in place.

    Quantised linears become PackedLinear, and dense ones DenseLinear, see replaceable. Those on the
    meta device stay, as they have no weights to pack. dtype: of the model's activations. memory:
    see PackedLinear. Returns whether the kernels serve the model, or will serve its linears that
    are on the meta device now. They then compute its RMS norms and activations, too. If not, logs
    why.
    """
    names = replaceable(model, dtype, large)
    if not names:
        return False
    if reason := unsupported_reason(dtype) or build():
        quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
        log(f"{'quantised' if quantized else 'dense'} layers run slowly here: {reason}")
        return False
    for name in names:  # names, not modules: only one layer is in memory twice
        linear = model.get_submodule(name)
        if not linear.weight.is_meta:
            packs = isinstance(linear, QuantizedLinear)
            fast = PackedLinear(linear, memory) if packs else DenseLinear(linear)
            model.set_submodule(name, fast)
    for module in model.modules():
        if isinstance(module, (RMSNorm, OffsetRMSNorm)):
            module.fast = True
        if getattr(module, "activation", None) is gelu_tanh:
            module.activation = fast_gelu_tanh
    return True


def fast_gelu_tanh(x: Tensor) -> Tensor:
    """Returns what gelu_tanh does, by kernels/cpu/functions.h."""
    return torch.ops.gpt_flex.fast_gelu_tanh(x)


def build_while_loading(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> None:
    """Start to compile the kernels in another thread, if use_fast_linears will need them.

    model: on the meta device, before its weights are loaded. dtype, large: as in use_fast_linears,
    which calls build and so waits for the thread. After the first time, the thread only loads the
    compiled library. If the kernels are needed, raises ValueError as supported_sets does.
    """
    if replaceable(model, dtype, large) and not unsupported_reason(dtype):
        supported_sets()  # raises ValueError here, not in the thread
        # No daemon: after an error the process waits for the compiler, so that the next one does
        # not start a second compiler in the same folder.
        threading.Thread(target=build).start()


def replaceable(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> list[str]:
    """Return the names of the linears that use_fast_linears should replace.

    These are all quantised linears: in float32 it logs why they stay. Dense linears are among them
    if dtype is bfloat16 or float16, the model is large, and the CPU has a better instruction set
    than "scalar", with which PyTorch's dense products are faster. model: may be on the meta device.
    large: whether compiling the kernels pays for the dense linears; None: what is_large returns.
    Raises ValueError as supported_sets does.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (Linear, QuantizedLinear))}
    pays = dtype in DTYPES and (is_large(model) if large is None else large)
    dense = pays and supported_sets()[0] != "scalar"
    return [n for n, linear in linears.items() if dense or isinstance(linear, QuantizedLinear)]


def is_large(model: nn.Module) -> bool:
    """Return whether the dense linears of a model have MIN_DENSE_BYTES or more in 16 bits."""
    dense = (m for m in model.modules() if isinstance(m, Linear))
    return sum(2 * linear.weight.numel() for linear in dense) >= MIN_DENSE_BYTES


def use_fast_attention(model: Transformer) -> None:
    """Let the KV caches compute attention by kernels/cpu/attention.h.

    Call it if use_fast_linears returned True (the kernels are then compiled), before caches are
    made. With one query head for each key/value head the kernel is faster. With 2 to MAX_SHARING it
    is faster only on CPUs that do not multiply bfloat16. With more, PyTorch's attention stays: a
    verify pass would have more queries than the kernel takes, and must give the same bits as single
    steps.
    """
    queries = model.args.n_heads // model.args.n_kv_heads
    if queries == 1 or (queries <= MAX_SHARING and not multiplies_bfloat16()):
        kernels = {"attention": kernel_attention, "window_attention": kernel_attention}
        model.cache_factory = replace(model.cache_factory, **kernels)


def kernel_attention(cache: KVCache, q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Compute attention over a cache by kernels/cpu/attention.h (type CacheAttention).

    q: (B, T, H, E). mask: of Transformer.mask; its last size S is the number of visible positions.
    pos: not used. Returns (B, T, H, E).
    """
    k, v = cache.visible(mask.shape[-1])  # (B, S, G, E)
    attention = partial(torch.ops.gpt_flex.attention, **cache.scores._asdict())
    return grouped_attention(attention, q, k, v, mask)

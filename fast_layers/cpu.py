"""Layers that run on the C++ kernels of kernels/cpu.

Start at use_fast_linears. It replaces quantised linears by PackedLinear, which hold the same
integers in the order in which the kernels read them, and dense linears by DenseLinear.
use_fast_attention lets the KV caches compute attention by kernels/cpu/attention.h, and fuse_blocks
replaces whole blocks of such linears by CPUBlock. In float32, or without a compiler, a model keeps
its layers, which are slower and are the reference in tests; only its quantised copy that drafts
(self-int8, self-int4) has fast layers in float32, too. The dense linears of a small model stay.

layout() returns the constants of the packed order: a strip is the weights of layout().strip outputs
(16), which are packed together; layout().int8, int4 and int4_half number the formats of packed
weights. torch.ops.gpt_flex.NAME are the operators that kernels/cpu/build.py compiles.

Shapes: M rows, N out_features, K in_features; for attention B rows, T new tokens, S visible
slots, H query heads, G key/value heads, E head_dim.
"""

import threading
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_layers.fused_block import (
    FusedBlock,
    FusedOperations,
    can_fuse,
    is_identity,
    is_norm,
)
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
from layers.kv_cache import AttentionCache, KVCache, grouped_attention
from layers.positions import Rotation
from model import SequentialBlock, Transformer
from quant.linear import Int4Linear, Int8Linear, QuantizedLinear

# Compiling the kernels does not pay for a model whose dense linears have fewer bytes.
MIN_DENSE_BYTES = 2**24
# The most query heads that may share a key/value head: a verify pass of 16 tokens then has at most
# kMaxQueries queries (128, kernels/cpu/layer_operators.cpp).
MAX_SHARING = 8
NO_PACKING = -1, 0, 0  # of a dense linear, in place of a PackedLinear's _layout: kDense of the C++


class PackedLinear(nn.Module):
    """A quantised linear with its weights in the kernels' order, see kernels/cpu/layout.h.

    Takes bfloat16 and float16 rows, and float32 rows in the quantised copy of a float32 model that
    drafts for it; a bias has the dtype of the rows. Needs the operators: `build` must have
    succeeded. packed: (strips, bytes of a strip) uint8, None before load_from.
    """

    def __init__(self, linear: QuantizedLinear, memory: HugePages | None = None):
        """Pack a linear, or only allocate memory for its shape if it is on the meta device.

        In the latter case call load_from before forward. memory: where to allocate the packed
        bytes, of exactly the size that they need; linear must then have weights. None: in a buffer
        that fits the widest format of the linear's kind (the operator `pack` chooses the format by
        the scales), so that load_from may be called again, as offload.py does for streamed layers.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.strips = -(-self.out_features // layout().strip)  # rounded up
        self.register_buffer("packed", None)
        self.register_buffer("bias", None)
        widest = layout().int8 if isinstance(linear, Int8Linear) else layout().int4_half
        # If the scales fit a narrower format, the end of the buffer is never written, and the
        # operating system assigns no memory to it.
        nbytes = self.strips * strip_bytes(linear, widest)
        allocate = memory.take if memory else partial(page_aligned, device=torch.device("cpu"))
        self._buffer = allocate(nbytes)
        if not linear.weight.is_meta:
            self.load_from(linear)
        if memory:  # give the end back to `memory`
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

    def operands(self) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Return weight, bias and packing, as the operator decoder_layer takes them."""
        return self.packed, self.bias, self._layout

    def forward(self, x: Tensor) -> Tensor:
        """Returns the linear's output, (..., N), for x, (..., K)."""
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

    def operands(self) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Return weight, bias and packing, as the operator decoder_layer takes them."""
        return self.weight, self.bias, NO_PACKING

    def forward(self, x: Tensor) -> Tensor:
        """Returns the linear's output, (..., N), for x, (..., K)."""
        y = torch.ops.gpt_flex.linear(x.flatten(0, -2), self.weight, self.bias)  # (M, N)
        return y.view(*x.shape[:-1], self.out_features)


class CPUBlock(FusedBlock):
    """A FusedBlock of one operator: run_layer, if the cache is a plain KVCache that attends by
    kernel_attention. Otherwise project_heads and finish_layer compute what precedes and follows the
    cache's own attention. kernels/cpu/__init__.py describes the operators.

    Both ways give the same bits as an operator for each linear, norm and activation, and compute no
    gradients. Eager steps of models of 1 billion int4 weights are 1.3 times as fast as by an
    operator for each linear, compiled ones 1.1 times. The operators read the tensors that `block`
    has now: replace no module or tensor of it afterwards. Numbers may change in place. Copy no
    CPUBlock: the buffer `layer` holds addresses, and the operators reject a copy of it.
    """

    def __init__(self, block: SequentialBlock):
        super().__init__(block)
        attention = self.attention
        q_heads, kv_heads, _ = (width // attention.head_dim for width in attention.widths)
        self.heads, self.width = (q_heads, kv_heads, attention.head_dim), sum(attention.widths)
        norms = attention.q_norm, attention.k_norm
        # Whether the operators can compute the norms of heads, and their rotation after them.
        self.rotates = all(map(is_identity, norms)) or all(map(is_norm, norms))
        # Not persistent: it refers to the weights, which a state_dict has anyway.
        self.register_buffer("layer", self._decoder_layer(), persistent=False)

    def _decoder_layer(self) -> Tensor:
        """Return what the operator decoder_layer makes of the block."""
        attention, feed_forward = self.attention, self.feed_forward
        linears = attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2
        weights, biases, packings = zip(*(linear.operands() for linear in linears), strict=True)
        norms = [self.attention_norm, self.attention_output, self.ffn_norm, self.ffn_output]
        norms += [attention.q_norm, attention.k_norm] if self.rotates else [nn.Identity()] * 2
        # The same for all norms, see can_fuse.
        eps, offset = next(((n.eps, n.offset) for n in norms if not is_identity(n)), (0.0, 0.0))
        return torch.ops.gpt_flex.decoder_layer(
            [weight.detach() for weight in weights],
            [None if bias is None else bias.detach() for bias in biases],
            sum(packings, ()),
            [None if is_identity(norm) else norm.weight.detach() for norm in norms],
            eps,
            offset,
            GATES[feed_forward.activation],
            self.heads,
        )

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: AttentionCache
    ) -> Tensor:
        """Return the layer's output for x, (B, T, D), in that shape; see SequentialBlock."""
        ops, layer = torch.ops.gpt_flex, self.layer
        if self.rotates and type(cache) is KVCache and cache.attention is kernel_attention:
            given = cache.k, cache.v, pos, mask, *cache.scores
            return ops.run_layer(layer, x, *rotation, *given)
        cos, sin = rotation if self.rotates else (None, None)
        heads = ops.project_heads(layer, x, cos, sin, self.width)  # (B, T, (H + 2 G) * E)
        y = self.attend(heads, None if self.rotates else rotation, mask, pos, cache)
        return ops.finish_layer(layer, x, y)  # y: (B, T, H * E)

    # The compiler compiles this once for all layers, see SequentialBlock. forward may not be such a
    # region: there the compiler rejects an operator that changes its arguments, as run_layer
    # changes k and v. It takes the indexed stores of a cache.
    @torch.compiler.nested_compile_region
    def attend(
        self,
        heads: Tensor,
        rotation: Rotation | None,
        mask: Tensor,
        pos: Tensor,
        cache: AttentionCache,
    ) -> Tensor:
        """Compute Attention.attend for any cache, (B, T, (H + 2 G) * E) -> (B, T, H * E). rotation:
        None: the heads are already normed and rotated."""
        if rotation is not None:
            return self.attention.attend(heads, rotation, mask, pos, cache)
        q_heads, kv_heads, head_dim = self.heads
        each = heads.unflatten(2, (-1, head_dim))  # (B, T, H + 2 G, E)
        q, k, v = each.split((q_heads, kv_heads, kv_heads), 2)
        return cache.attend(q, k, v, mask, pos).flatten(2)  # (B, T, H, E) -> (B, T, H * E)


def inputs_per_scale(linear: QuantizedLinear) -> int:
    """Return how many inputs share a scale: of the weights (int4), or of the activations (int8,
    whose weights have one scale for each output)."""
    return linear.groupsize if isinstance(linear, Int4Linear) else layout().int8_block


def strip_bytes(linear: QuantizedLinear, format: int) -> int:
    """Return the packed bytes of one strip, which holds all weights of layout().strip outputs.

    linear: only its shape and group size are read; it may be on the meta device. format:
    layout().int8, int4 or int4_half.
    """
    # Bytes of an output's weights in the checkpoint's order; int4 has two weights to a byte.
    row_bytes = linear.weight.shape[1] * linear.weight.itemsize
    return torch.ops.gpt_flex.strip_bytes(format, row_bytes, inputs_per_scale(linear))


def use_fast_linears(
    model: nn.Module,
    dtype: torch.dtype,
    large: bool | None = None,
    memory: HugePages | None = None,
) -> bool:
    """Replace the linears of a model on the CPU by fast ones, in place.

    Quantised linears become PackedLinear, and dense ones DenseLinear, see replaceable. Linears on
    the meta device (offload.py loads them later) stay, as they have no weights to pack. dtype: of
    the model's activations. large: see replaceable. memory: see PackedLinear. Returns whether the
    kernels serve the model, or will serve the linears that are on the meta device now. If so, the
    kernels compute its RMS norms, SiLUs and tanh GELUs, too. If the kernels cannot run here, logs
    why. Raises ValueError as supported_sets does.
    """
    names = replaceable(model, dtype, large)
    if not names:
        return False
    if reason := unsupported_reason(dtype) or build():
        quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
        log(f"{'quantised' if quantized else 'dense'} layers run slowly here: {reason}")
        return False
    # By name: a list of the modules would keep all replaced layers in memory until the end.
    for name in names:
        linear = model.get_submodule(name)
        if not linear.weight.is_meta:
            packs = isinstance(linear, QuantizedLinear)
            fast = PackedLinear(linear, memory) if packs else DenseLinear(linear)
            model.set_submodule(name, fast)
    for module in model.modules():
        if isinstance(module, (RMSNorm, OffsetRMSNorm)):
            module.fast = True
        if (activation := getattr(module, "activation", None)) in FAST_ACTIVATIONS:
            module.activation = FAST_ACTIVATIONS[activation]
    return True


def fast_gelu_tanh(x: Tensor) -> Tensor:
    """Returns the same as gelu_tanh, computed by kernels/cpu/functions.h."""
    return torch.ops.gpt_flex.fast_gelu_tanh(x)


def fast_silu(x: Tensor) -> Tensor:
    """Returns F.silu(x) up to rounding, computed by kernels/cpu/functions.h; 0 for x < -80."""
    return torch.ops.gpt_flex.fast_silu(x)


FAST_ACTIVATIONS = {gelu_tanh: fast_gelu_tanh, F.silu: fast_silu}
# For each activation function its name in decoder_layer.
GATES = {fast_silu: "silu", fast_gelu_tanh: "gelu_tanh"}
FUSED = FusedOperations(
    (PackedLinear, DenseLinear), tuple(GATES), (RMSNorm, OffsetRMSNorm), output_norms=True
)


def fuse_blocks(model: Transformer) -> None:
    """Replace the blocks of a model by CPUBlock, in place, where can_fuse allows it.

    Call it after use_fast_linears, if that returned True: can_fuse accepts only the linears and
    activations that it puts in. Streamed layers (offload.py) stay: they are not in a plain
    ModuleList.
    """
    if type(model.layers) is nn.ModuleList:
        for n, block in enumerate(model.layers):
            if can_fuse(block, FUSED):
                model.layers[n] = CPUBlock(block)


def build_while_loading(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> None:
    """Start to compile the kernels in another thread, if use_fast_linears will need them.

    model: on the meta device, before its weights are loaded. dtype, large: as in use_fast_linears,
    which calls build and so waits for the thread. If an earlier process has compiled the kernels,
    the thread only loads the library. Raises ValueError as supported_sets does.
    """
    if replaceable(model, dtype, large) and not unsupported_reason(dtype):
        supported_sets()  # raises ValueError here, not in the thread
        # No daemon: after an error the process waits for the compiler, so that the next one does
        # not start a second compiler in the same folder.
        threading.Thread(target=build).start()


def replaceable(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> list[str]:
    """Return the names of the linears that use_fast_linears should replace.

    These are all quantised linears, also in float32, in which use_fast_linears logs why they stay.
    Dense linears are among them if dtype is bfloat16 or float16, the model is large, and the CPU
    has a better instruction set than "scalar", with which PyTorch's dense products are faster.
    model: may be on the meta device. large: whether compiling the kernels pays for the dense
    linears; None: what is_large returns. Raises ValueError as supported_sets does.
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
    made. With one query head for each key/value head, the kernel is faster than PyTorch's. With 2
    to MAX_SHARING query heads, it is faster only on CPUs that do not multiply bfloat16. With more,
    PyTorch's attention stays: a verify pass would have more queries than the kernel takes, and must
    give the same bits as single steps.
    """
    queries = model.args.n_heads // model.args.n_kv_heads
    if queries == 1 or (queries <= MAX_SHARING and not multiplies_bfloat16()):
        kernels = {"attention": kernel_attention, "window_attention": kernel_attention}
        model.cache_factory = replace(model.cache_factory, **kernels)


def kernel_attention(cache: KVCache, q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Compute attention over a cache by kernels/cpu/attention.h (type CacheAttention).

    q: (B, T, H, E). mask: of Transformer.mask; its last size S is the number of visible slots.
    pos, a parameter of every CacheAttention, is not used. Returns (B, T, H, E).
    """
    k, v = cache.visible(mask.shape[-1])  # (B, S, G, E)
    attention = partial(torch.ops.gpt_flex.attention, **cache.scores._asdict())
    return grouped_attention(attention, q, k, v, mask)

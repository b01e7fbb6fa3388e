"""Layers that run on the Triton kernels of kernels/gpu.

Start at use_fast_layers. Quantised linears choose their kernels by themselves (quant/linear.py).
This file (1) replaces blocks of quantised linears by GPUBlock, (2) replaces dense linears by
OneRowLinear, faster for one row, and (3) sets the functions by which the KV caches of
model.cache_factory attend: kernel_attention, and masked_attention for layers with a sliding window.

Shapes: M rows of activations, N out_features, K in_features; of a layer D dim, F hidden_dim; for
attention B rows of the batch, T new tokens, S visible slots, H query heads, G key/value heads,
R = H // G, E head_dim.
"""

import functools
import math
import sys
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
    norm_or_none,
)
from kernels import gpu
from layers.basic import Linear, RMSNorm
from layers.kv_cache import (
    AttentionCache,
    CacheAttention,
    KVCache,
    attend_capped,
    grouped_attention,
)
from layers.positions import Rotation
from model import SequentialBlock, Transformer
from quant.kv_cache import QuantizedKVCache, dequantize
from quant.linear import QuantizedLinear

# Limits on the queries of a key/value head, R*T, and on their numbers, R*T*E. With more queries,
# PyTorch is faster; more numbers do not fit into the registers of a Triton program.
MAX_KERNEL_QUERIES, MAX_KERNEL_NUMBERS = 64, 64 * 128
FUSED = FusedOperations((QuantizedLinear,), (F.silu,), (RMSNorm,), output_norms=False)


class OneRowLinear(Linear):
    """A dense linear that multiplies one row by a Triton kernel, which reads the weights of Llama
    3.1 8B at 0.91 of an H100's memory rate; cuBLAS reads them at 0.81. linear: the linear that it
    replaces, whose weight and bias it takes."""

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)  # not Linear's, which would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        product = gpu.dense_linear if gpu.supports(rows) else F.linear
        return product(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


class GPUBlock(FusedBlock):
    """A FusedBlock on the kernels of quantised linears. For up to 64 rows, norm, gate and residual
    are part of a product's kernels, and attention to a plain KVCache converts its results for wo. A
    decoding step of Llama 3.1 8B in int4 has 8 kernels for each layer, and 16 without these. Where
    gpu.supports(x) is false, it computes as SequentialBlock does.
    """

    def __init__(self, block: SequentialBlock):
        super().__init__(block)
        norms = self.attention.q_norm, self.attention.k_norm
        # Whether the operator attend_and_project can compute the norms of heads.
        self.operable = all(map(is_identity, norms)) or all(
            type(norm) is RMSNorm and is_norm(norm) for norm in norms
        )

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: AttentionCache
    ) -> Tensor:
        """Return the layer's output for x, (B, T, D), in that shape; see SequentialBlock."""
        if not gpu.supports(x):
            return super().forward(x, rotation, mask, pos, cache)
        attention, feed_forward = self.attention, self.feed_forward
        qkv = product(attention.wqkv, x, norm_or_none(self.attention_norm))
        if self.operable and type(cache) is KVCache and is_kernel(cache.attention):
            x = self.attend_and_add(qkv, rotation, mask, pos, cache, residual=x)
        else:
            y = attention.attend(qkv, rotation, mask, pos, cache)  # (B, T, H * E)
            x = product(attention.wo, y, residual=x)  # (B, T, D)
        hidden = product(feed_forward.w13, x, norm_or_none(self.ffn_norm))  # (B, T, 2 F)
        return product(feed_forward.w2, hidden, gated=True, residual=x)  # (B, T, D)

    def attend_and_add(
        self,
        qkv: Tensor,
        rotation: Rotation,
        mask: Tensor,
        pos: Tensor,
        cache: KVCache,
        residual: Tensor,
    ) -> Tensor:
        """Compute Attention.attend of qkv, (B, T, (H + 2 G) * E), then wo, plus the residual ->
        (B, T, D). By one operator, attend_and_project, which can use one kernel where separate
        operators would need several."""
        attention, scores = self.attention, cache.scores
        heads = qkv.unflatten(2, (-1, attention.head_dim))  # (B, T, H + 2 G, E)
        norms = [norm_or_none(attention.q_norm), norm_or_none(attention.k_norm)]
        weights = [None if norm is None else norm.weight for norm in norms]
        eps = 0.0 if norms[0] is None else norms[0].eps
        causal = cache.attention is kernel_attention
        scale = scores.scale or 1 / math.sqrt(attention.head_dim)
        return torch.ops.gpt_flex.attend_and_project(
            heads, *rotation, pos, mask, cache.k, cache.v, weights, eps, causal, scale,
            scores.softcap, list(attention.wo.stored()), residual,
        )  # fmt: skip


def product(
    linear: QuantizedLinear,
    x: Tensor,
    norm: RMSNorm | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute a linear together with the norm or gate before it and the residual sum after it.

    Returns linear(y) + residual, (B, T, N). y, (B, T, K), is norm(x); if `gated`, x is (B, T, 2 K),
    and y is silu(first half) * second half. Callers give a norm or a gate, not both. What is None
    is skipped.
    """
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    prologue = gpu.Prologue(weight, eps, gated=gated)
    residual = None if residual is None else residual.flatten(0, 1)  # (M, N)
    y = linear.on_gpu(x.flatten(0, 1), prologue, residual)  # (M, N)
    return y.unflatten(0, x.shape[:2])  # (B, T, N)


def use_fast_layers(model: Transformer) -> None:
    """Replace the layers and the attention of a loaded model on a CUDA device, in place.

    If the kernels do not run on the device, the model stays as it is, and a line on stderr says
    why, once per process.
    """
    device = model.tok_embeddings.weight.device
    if reason := gpu.unsupported_reason(device):
        log_once(f"without the kernels for GPUs: {reason}")
    else:
        replace_layers(model)


@functools.cache
def log_once(line: str) -> None:
    """Print a line on stderr, also with --quiet; the cache makes later calls with the same line do
    nothing."""
    print(line, file=sys.stderr)


def replace_layers(model: Transformer) -> None:
    """Replace the layers and the attention of a model, in place, without a check of its device.

    Fuses blocks, then replaces dense linears. A model whose layers are streamed (StreamedLayers of
    offload.py, no plain ModuleList) keeps its blocks. Caches that the model makes later use
    kernel_attention, or masked_attention in layers with a sliding window.
    """
    if type(model.layers) is nn.ModuleList:
        for n, block in enumerate(model.layers):
            if can_fuse(block, FUSED):
                model.layers[n] = GPUBlock(block)
    linears = {n: m for n, m in model.named_modules() if type(m) is Linear}
    for name, linear in linears.items():
        model.set_submodule(name, OneRowLinear(linear))
    kernels = {"attention": kernel_attention, "window_attention": masked_attention}
    model.cache_factory = replace(model.cache_factory, **kernels)


def kernel_attention(cache: KVCache, q: Tensor, mask: Tensor, pos: Tensor | None) -> Tensor:
    """Attend with q, (B, T, H, E), to a cache -> (B, T, H, E), by attend_on_gpu: a CacheAttention.

    mask: (B, 1, R*T, S), from Transformer.mask. pos: (B, T), the slots of the queries' own tokens,
    for a cache that is no ring and a causal mask: each query sees the slots up to its own, and only
    S is taken from the mask. None: the mask is read, and may be any.
    """
    quantized = isinstance(cache, QuantizedKVCache)
    names = ("k_scales", "k_lows", "v_scales", "v_lows") if quantized else ()
    extra = [cache.get_buffer(name) for name in names]
    scale, softcap = cache.scores.scale or 1 / math.sqrt(q.shape[-1]), cache.scores.softcap
    return torch.ops.gpt_flex.attend(q, cache.k, cache.v, extra, mask, pos, scale, softcap)


def masked_attention(cache: KVCache, q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Attend as kernel_attention does, by the mask: a CacheAttention for layers with a sliding
    window, in which a query does not see all slots up to its own. pos is not used."""
    return kernel_attention(cache, q, mask, None)


def is_kernel(attention: CacheAttention) -> bool:
    """Return whether a cache's attention is one of the two functions above."""
    return attention is kernel_attention or attention is masked_attention


def attend_on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: list[Tensor],
    mask: Tensor,
    pos: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend with queries, (B, T, H, E), to a cache -> (B, T, H, E). The operator gpt_flex::attend.

    Few queries for each key/value head: by a Triton kernel, which reads the cache as it is stored.
    More: by PyTorch, on a dequantised cache. The choice is made inside the operator, so that one
    compiled graph is right for any number of tokens. k, v: (B, slots + 1, G, E), or the bytes of a
    quantised cache, (B, slots + 1, G, E*bits/8). extra: k_scales, k_lows, v_scales and v_lows of a
    quantised cache, else empty. mask: (B, 1, R*T, S), 0 or -inf, the same for all heads. pos: see
    kernel_attention. scale, softcap: see layers.kv_cache.Scores; scale must be given.
    """
    from kernels.gpu import launch_attention  # imports Triton

    S, (_, T, H, E), (G, width) = mask.shape[-1], q.shape, k.shape[2:]
    queries = T * H // G  # of a key/value head
    if queries <= MAX_KERNEL_QUERIES and queries * E <= MAX_KERNEL_NUMBERS:
        given = mask.contiguous(), None if pos is None else pos.contiguous()
        return launch_attention.attend(q.contiguous(), k, v, extra, *given, scale, softcap)
    k, v = k[:, :S], v[:, :S]  # (B, S, G, E), or (B, S, G, E*bits/8) bytes
    if extra:
        k_scales, k_lows, v_scales, v_lows = (t[:, :S] for t in extra)
        bits = 8 * width // E
        k = dequantize(k, k_scales, k_lows, bits, q.dtype)
        v = dequantize(v, v_scales, v_lows, bits, q.dtype)
    if softcap is None:
        attention = partial(F.scaled_dot_product_attention, scale=scale)
    else:
        attention = partial(attend_capped, scale=scale, softcap=softcap)
    return grouped_attention(attention, q, k, v, mask).contiguous()


gpu.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] extra, Tensor mask, Tensor? pos, float scale, "
    "float? softcap) -> Tensor",
    attend_on_gpu,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
    # It takes any strides. Without the tag, the compiler computes the mask into another buffer for
    # each layer.
    tags=(torch.Tag.flexible_layout,),
)


def attend_and_project(qkv, cos, sin, pos, mask, k, v, *rest):
    """Compute Attention.attend and wo: the operator of that name. It changes k and v.

    qkv: (B, T, H + 2 G, E). cos, sin: the rotation, (B, T, 1, P). pos, mask: see AttentionInputs.
    k, v: (B, slots + 1, G, E), the buffers of a KVCache. rest: the weights of the RMS norms of
    query and key heads, or None, and their eps; causal, whether a query sees all slots up to its
    own (else the mask is read); scale and softcap, see layers.kv_cache.Scores; weight, scales,
    zeros and bias of wo, see gpu.Stored; the residual, (B, T, D). Returns (B, T, D).

    Few causal queries: by one kernel, which also converts its results for the product if it can.
    Others: by rotate_and_store, attend_on_gpu and quantized_linear, one after another.
    """
    from kernels.gpu import launch_attention  # imports Triton

    weights, eps, causal, scale, softcap, stored, residual = rest
    (B, T), S, G = qkv.shape[:2], mask.shape[-1], k.shape[2]
    given = qkv.contiguous(), (cos.contiguous(), sin.contiguous()), gpu.HeadNorms(*weights, eps)
    pos, residual = pos.contiguous(), residual.flatten(0, 1).contiguous()  # (B * T, D)
    if causal and launch_attention.fits_one_tile(qkv, G):
        form = gpu.input_form(B * T, stored, qkv.dtype)
        form = form if form and launch_attention.can_convert(form, qkv, G) else None
        y = launch_attention.attend_new_tokens(*given, pos, (k, v), S, (scale, softcap), form)
        if form:
            return gpu.multiply_converted(y, stored, residual, qkv.dtype).view(B, T, -1)
    else:
        q = launch_attention.rotate_and_store(*given, pos, k, v)
        y = attend_on_gpu(q, k, v, [], mask, pos if causal else None, scale, softcap)
    y = y.view(B * T, -1)  # (B * T, H * E)
    return gpu.quantized_linear(y, *stored, residual=residual).view(B, T, -1)


gpu.define(
    "attend_and_project(Tensor qkv, Tensor cos, Tensor sin, Tensor pos, Tensor mask, Tensor(a!) k, "
    "Tensor(b!) v, Tensor?[] norms, float eps, bool causal, float scale, float? softcap, "
    "Tensor?[] stored, Tensor residual) -> Tensor",
    attend_and_project,
    lambda *given: given[-1].new_empty(given[-1].shape),
    tags=(torch.Tag.flexible_layout,),  # as with attend
)

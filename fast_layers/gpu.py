"""Layers that run on the Triton kernels of kernels/gpu.

Start at use_fast_layers. Quantised linears choose their kernels by themselves (quant/linear.py).
This file (1) replaces dense linears by OneRowLinear, faster for one row, (2) fuses a norm or a gate
into the quantised linear after it, and (3) sets the functions by which the KV caches of
model.cache_factory attend: kernel_attention, and masked_attention for layers with a sliding window.
A gpu.Prologue is a norm or gate that a kernel applies to its input first. Fusing saves the launch
of a kernel; for more than one row, norm and gate run separately.

Shapes: M rows of activations, N out_features, K in_features; for attention B rows of the batch, T
new tokens, S visible slots, H query heads, G key/value heads, R = H // G, E head_dim.
"""

import functools
import math
import sys
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import gpu
from layers.basic import Linear, RMSNorm
from layers.kv_cache import KVCache, attend_capped, grouped_attention
from model import GatedFeedForward, SequentialBlock, Transformer
from quant.kv_cache import QuantizedKVCache, dequantize
from quant.linear import QuantizedLinear

# Limits on the queries of a key/value head, R*T, and on their numbers, R*T*E. With more queries,
# PyTorch is faster; more numbers do not fit into the registers of a Triton program.
MAX_KERNEL_QUERIES, MAX_KERNEL_NUMBERS = 64, 64 * 128


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


class NormedLinear(nn.Module):
    """A quantised linear and the RMS norm before it. For one row, the kernel that converts
    activations to fixed point also computes the norm. linear: its takes_prologue must be true."""

    def __init__(self, norm: RMSNorm, linear: QuantizedLinear):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        """Return linear(norm(x)), (..., K) -> (..., N)."""
        rows = x.flatten(0, -2)  # (M, K)
        if len(rows) > 1 or not gpu.supports(rows):
            return self.linear(self.norm(x))
        prologue = gpu.Prologue(norm=self.norm.weight, eps=self.norm.eps)
        return self.linear.on_gpu(rows, prologue).view(*x.shape[:-1], -1)  # (..., N)


class OneRowFeedForward(GatedFeedForward):
    """A GatedFeedForward that, for one row, computes silu(gate) * up within the kernel of w2.

    w13's outputs are gate and up, (M, 2 * hidden_dim). replaced: the layer whose linears it takes:
    its activation is SiLU, and its w2 takes a prologue.
    """

    def __init__(self, replaced: GatedFeedForward):
        nn.Module.__init__(self)  # not GatedFeedForward's, which would allocate linears
        self.w13, self.w2 = replaced.w13, replaced.w2
        self.activation = replaced.activation

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feed-forward layer, (..., D) -> (..., D); D is the model's width."""
        rows = x.flatten(0, -2)  # (M, D)
        if len(rows) > 1 or not gpu.supports(rows):
            return super().forward(x)
        return self.w2.on_gpu(self.w13(rows), gpu.Prologue(gated=True)).view_as(x)


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

    Fuses norms and gates, then replaces all dense linears. Fuses only in a plain ModuleList: a
    model whose layers are streamed (StreamedLayers of offload.py) stays unfused. Caches that the
    model makes later use kernel_attention, or masked_attention in layers with a sliding window.
    """
    for layer in model.layers if type(model.layers) is nn.ModuleList else ():
        fuse_prologues(layer)
    linears = {n: m for n, m in model.named_modules() if type(m) is Linear}
    for name, linear in linears.items():
        model.set_submodule(name, OneRowLinear(linear))
    kernels = {"attention": kernel_attention, "window_attention": masked_attention}
    model.cache_factory = replace(model.cache_factory, **kernels)


def fuse_prologues(layer: nn.Module) -> None:
    """Fuse the norm before wqkv with wqkv, and the gate before w2 with w2, in place.

    layer: a block of the model. Only quantised linears whose kernel takes a prologue are fused, and
    only an RMS norm with weights and a SiLU gate; the norm only in a SequentialBlock, where wqkv
    alone reads it. nn.Identity takes the place of a fused norm.
    """
    attention, feed_forward = layer.attention, layer.feed_forward
    normed = isinstance(layer.attention_norm, RMSNorm) and layer.attention_norm.elementwise_affine
    if type(layer) is SequentialBlock and normed and takes_prologue(attention.wqkv):
        attention.wqkv = NormedLinear(layer.attention_norm, attention.wqkv)
        layer.attention_norm = nn.Identity()
    gated = type(feed_forward) is GatedFeedForward and feed_forward.activation is F.silu
    if gated and takes_prologue(feed_forward.w2):
        layer.feed_forward = OneRowFeedForward(feed_forward)


def takes_prologue(linear: nn.Module) -> bool:
    """Return whether a linear is quantised and its kernel for one row takes a gpu.Prologue."""
    return isinstance(linear, QuantizedLinear) and linear.takes_prologue()


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
    from kernels.gpu import launch  # imports Triton

    S, (_, T, H, E), (G, width) = mask.shape[-1], q.shape, k.shape[2:]
    queries = T * H // G  # of a key/value head
    if queries <= MAX_KERNEL_QUERIES and queries * E <= MAX_KERNEL_NUMBERS:
        given = mask.contiguous(), None if pos is None else pos.contiguous()
        return launch.attend(q.contiguous(), k, v, extra, *given, scale, softcap)
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
)

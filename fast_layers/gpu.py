"""What is faster on a GPU than PyTorch's own: put into a model, as cpu_products.py does for CPUs.

Start at use_fast_linears. Quantised linears find their kernels by themselves (quantized.py). Here dense
ones get a faster product of one row, quantised ones take over the norm or the gate before them, and
caches get attention that reads them as they are stored. The kernels are in kernels/gpu.
"""

import functools
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import gpu
from model import (
    GatedFeedForward,
    KVCache,
    Linear,
    PreNormBlock,
    RMSNorm,
    Transformer,
    grouped_attention,
)
from quant.kv_cache import QuantizedKVCache, dequantize
from quant.linear import QuantizedLinear

ROWS = 64  # new tokens times the query heads of a key/value head; for more, PyTorch's is faster


class OneRowLinear(Linear):
    """A dense linear, with the same weights. One row is multiplied by a kernel of ours: cuBLAS
    reads the weights of Llama 3.1 8B at 0.81 of an H100's memory rate, ours at 0.91."""

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        product = gpu.dense_linear if gpu.supports(rows) else F.linear
        return product(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


class NormedLinear(nn.Module):
    """A quantised linear and the RMS norm before it. Of one row the kernel that makes activations
    fixed point computes the norm, too."""

    def __init__(self, norm: RMSNorm, linear: QuantizedLinear):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        if len(rows) > 1 or not gpu.supports(rows):
            return self.linear(self.norm(x))
        prologue = gpu.Prologue(norm=self.norm.weight, eps=self.norm.eps)
        return self.linear.on_gpu(rows, prologue).view(*x.shape[:-1], -1)  # (..., N)


class OneRowFeedForward(GatedFeedForward):
    """The same; for one row, silu(gate) * up takes no kernel of its own."""

    def __init__(self, whole: GatedFeedForward):
        nn.Module.__init__(self)
        self.w13, self.w2, self.activation = whole.w13, whole.w2, whole.activation

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, D)
        if len(rows) > 1 or not gpu.supports(rows):
            return super().forward(x)
        return self.w2.on_gpu(self.w13(rows), gpu.Prologue(gated=True)).view_as(x)


def use_fast_linears(model: Transformer) -> None:
    """Give a model on a CUDA device these products and this attention, if they run there."""
    device = model.tok_embeddings.weight.device
    if reason := gpu.unsupported_reason(device):
        log_once(f"without the kernels for GPUs: {reason}")
    else:
        replace_layers(model)


@functools.cache
def log_once(line: str) -> None:
    print(line, file=sys.stderr)


def replace_layers(model: Transformer) -> None:
    """Put all of it into a model, whatever its device."""
    for layer in model.layers if type(model.layers) is nn.ModuleList else ():
        fuse(layer)
    linears = {n: m for n, m in model.named_modules() if type(m) is Linear}
    for name, linear in linears.items():
        model.set_submodule(name, OneRowLinear(linear))
    model.cache_factory = replace(model.cache_factory, attention=kernel_attention)


def fuse(layer: nn.Module) -> None:
    """Let quantised linears of a layer do what comes before them, where they can."""
    attention, feed_forward = layer.attention, layer.feed_forward
    normed = isinstance(layer.attention_norm, RMSNorm) and layer.attention_norm.elementwise_affine
    if type(layer) is PreNormBlock and normed and takes_prologue(attention.wqkv):
        attention.wqkv = NormedLinear(layer.attention_norm, attention.wqkv)
        layer.attention_norm = nn.Identity()
    gated = type(feed_forward) is GatedFeedForward and feed_forward.activation is F.silu
    if gated and takes_prologue(feed_forward.w2):
        layer.feed_forward = OneRowFeedForward(feed_forward)


def takes_prologue(linear: nn.Module) -> bool:
    return isinstance(linear, QuantizedLinear) and linear.takes_prologue()


def kernel_attention(cache: KVCache, q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Attend by the Triton kernels, which read the cache as it is stored: a model.CacheAttention.

    For few queries the mask is not read: a query sees the positions up to its own.
    """
    quantized = isinstance(cache, QuantizedKVCache)
    names = ("k_scales", "k_lows", "v_scales", "v_lows") if quantized else ()
    extra = [cache.get_buffer(name) for name in names]
    bits = cache.bits if quantized else 16
    return torch.ops.gpt_flex.attend(q, cache.k, cache.v, extra, mask, pos, bits)


def attend_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, extra: list[Tensor], mask: Tensor, pos: Tensor, bits: int
) -> Tensor:
    """By the kernel for few queries, else by PyTorch's attention. The number of new tokens is
    looked at here, where the operator runs, so that one compiled graph serves all of them."""
    from kernels.gpu import launch  # imports Triton

    S, (T, H), G = mask.shape[-1], q.shape[1:3], k.shape[2]
    if T * H // G <= ROWS:
        return launch.attend(q.contiguous(), k, v, extra, pos.contiguous(), S, bits)
    k, v = k[:, :S], v[:, :S]  # (B, S, G, E), or bytes
    if extra:
        k_scales, k_lows, v_scales, v_lows = (t[:, :S] for t in extra)
        k = dequantize(k, k_scales, k_lows, bits, q.dtype)
        v = dequantize(v, v_scales, v_lows, bits, q.dtype)
    return grouped_attention(F.scaled_dot_product_attention, q, k, v, mask).contiguous()


gpu.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor[] extra, Tensor mask, Tensor pos, int bits) "
    "-> Tensor",
    attend_on_gpu,
    lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)

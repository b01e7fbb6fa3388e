"""A KV cache of int8 or int4 numbers, for long texts and large batches.

Start at QuantizedKVCache, a KVCache (layers/kv_cache.py). It rounds the keys and values of each
token when it stores them and does not round them again; attention dequantises them. GROUP
neighbouring channels of a head share a scale and a lowest value ("low"): x = low + scale * q, with
q from 0 to 255 (8 bits) or 15 (4 bits).

FlexGen (arXiv 2303.06865, section 4) groups the same way. KIVI (2402.02750) rounds keys channel by
channel over windows of tokens; benchmarks/LOG.md has the accuracy that this would gain here.

Shapes: B rows, T new tokens, G key/value heads, E head_dim, S channels of a group. A slot holds the
keys and values of one token of a row; layers/kv_cache.py says which.
"""

from typing import Any

import torch
from torch import Tensor

from layers.kv_cache import KVCache
from quant.linear import pack_nibbles, unpack_nibbles

GROUP = 32  # channels; a head whose width is not a multiple of it is one group


class QuantizedKVCache(KVCache):
    """A KVCache that rounds keys and values to 8 or 4 bits when it stores them.

    k, v: (B, slots + 1, G, E*bits/8) uint8; scales and lows: (B, slots + 1, G, E/S) float16.
    shape: (B, slots + 1, G, E). dtype: of the keys and values that `visible` returns. bits: 8 or 4;
    4 needs an even E. options: the parameters attention, scores and length of KVCache.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        bits: int = 8,
        **options: Any,
    ):
        *heads, channels = shape  # (B, slots + 1, G), E
        super().__init__((*heads, channels * bits // 8), torch.uint8, device, **options)
        self.dtype, self.bits = dtype, bits
        groups = channels // GROUP if channels % GROUP == 0 else 1
        for name in ("k_scales", "k_lows", "v_scales", "v_lows"):
            zeros = torch.zeros(*heads, groups, dtype=torch.float16, device=device)
            self.register_buffer(name, zeros)

    def stored(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Return (bytes, scales, lows) of the keys, and of the values: the buffers, not copies."""
        return (self.k, self.k_scales, self.k_lows), (self.v, self.v_scales, self.v_lows)

    def store(self, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Quantise keys and values, (B, T, G, E), and store them in slots pos, (B, T).

        Replaces what these slots held before.
        """
        rows = torch.arange(pos.shape[0], device=pos.device).unsqueeze(1)  # (B, 1)
        for tensors, new in zip(self.stored(), (k, v), strict=True):
            for tensor, value in zip(tensors, self.quantize(new), strict=True):
                tensor[rows, pos] = value

    def visible(self, count: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first `count` slots, (B, count, G, E) each, dequantised.

        They are copies, unlike those of KVCache.visible: writing to them does not change the cache.
        """
        k, v = (
            dequantize(*(t[:, :count] for t in tensors), self.bits, self.dtype)
            for tensors in self.stored()
        )
        return k, v  # (B, count, G, E)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round keys or values, (B, T, G, E), to integers: x = low + scale * q for each group.

        Returns q as bytes, (B, T, G, E*bits/8), and scales and lows, (B, T, G, E/S) float16. A
        group whose lowest value is beyond float16's range becomes NaN.
        """
        groups = x.float().unflatten(-1, (self.k_scales.shape[-1], -1))  # (B, T, G, E/S, S)
        low, high = groups.aminmax(dim=-1)
        low, levels = low.half(), 2**self.bits - 1
        # From the low as it is stored, so that low + scale * levels reaches the highest value.
        scale = ((high - low.float()) / levels).half()
        # Equal values have the scale 0; dividing them by 1 gives q = 0, dividing by 0 gives NaN.
        divisor = torch.where(scale > 0, scale, 1.0).float().unsqueeze(-1)
        q = ((groups - low.float().unsqueeze(-1)) / divisor).round().clamp(0, levels)
        q = q.flatten(-2).to(torch.uint8)  # (B, T, G, E)
        return (pack_nibbles(q) if self.bits == 4 else q), scale, low


def dequantize(q: Tensor, scale: Tensor, low: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return low + scale * q, (..., E) in dtype, computed in float32.

    q, scale, low: from QuantizedKVCache.quantize: bytes, (..., E*bits/8), and (..., E/S) each.
    bits: 8 or 4.
    """
    q = unpack_nibbles(q) if bits == 4 else q
    q = q.unflatten(-1, (scale.shape[-1], -1))  # (..., E/S, S)
    x = q * scale.float().unsqueeze(-1) + low.float().unsqueeze(-1)
    return x.flatten(-2).to(dtype)

"""The KV cache of a layer, and attention over it.

Start at KVCache; grouped_attention computes attention for query heads that share a key/value head
(arXiv 2305.13245). The token at position p of a row is stored at position p of the cache.

Shapes: B rows of a batch, T new tokens per row, S visible positions, H query heads, G key/value
heads, R = H // G query heads per key/value head, E head_dim.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.torch_private import copy_with_buffers, own_buffers


def grouped_attention(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """Attend with queries, (B, T, H, E), to keys and values, (B, S, G, E) each -> (B, T, H, E).

    attention: called with q, k, v and the mask, as F.scaled_dot_product_attention is. mask: see
    Transformer.mask; it already has R*T queries.
    """
    T = q.shape[1]
    # The R query heads that share a key/value head become rows of one query, so that keys
    # and values are read once and not expanded.
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, R*T, E)
    y = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)  # (B, G, R*T, E)
    return y.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, H, E)


def sdpa_attention(cache: "KVCache", q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Attend with PyTorch's kernel: the default CacheAttention, which runs on every device.

    The mask's last dimension tells how many positions are visible; pos is not used.
    """
    k, v = cache.visible(mask.shape[-1])  # (B, S, G, E)
    return grouped_attention(F.scaled_dot_product_attention, q, k, v, mask)


class KVCache(nn.Module):
    """Keys and values of one layer: (B, positions, G, E) each. The last position is not used.

    It is a module so that the compiler takes k and v for buffers with fixed addresses: a CUDA graph
    writes to them in place, and new caches of the same shape need no new compilation.
    """

    row_granularity = 1  # see Cache

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        attention: "CacheAttention" = sdpa_attention,
    ):
        super().__init__()
        self.attention = attention
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device))

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    @property
    def length(self) -> int:
        """Usable positions of each row; the last allocated one is not: see make_caches."""
        return self.k.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.k.device

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v at pos, then attend with q to the visible positions; see AttentionCache."""
        self.store(pos, k, v)
        return self.attention(self, q, mask, pos)

    @contextlib.contextmanager
    def opened(self, rows: slice, pos: Tensor) -> Iterator["KVCache"]:
        """Yield the part of some rows while they compute and write to pos, (B, T).

        Here nothing needs to be moved: caches on several tiers fetch and save the part.
        """
        yield self.part(rows)

    def keep(self, filled: int) -> None:
        """Declare the positions from `filled` on unused. A cache on several tiers then does not
        move them; this one has nothing to do."""

    def update(self, pos: Tensor, k: Tensor, v: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, T, G, E), at pos, (B, T); return keys and values of the first
        `visible` positions, (B, visible, G, E) each. Attention on the host calls it."""
        self.store(pos, k, v)
        return self.visible(visible)

    def store(self, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v, (B, T, G, E), at pos, (B, T)."""
        rows = torch.arange(pos.shape[0], device=pos.device).unsqueeze(1)  # (B, 1)
        self.k[rows, pos] = k
        self.v[rows, pos] = v

    def visible(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the first `count` positions, (B, count, G, E) each."""
        return self.k[:, :count], self.v[:, :count]

    def part(self, rows: slice) -> "KVCache":
        """Returns a cache of some rows that shares this cache's memory."""
        buffers = {name: buffer[rows] for name, buffer in own_buffers(self).items()}
        return copy_with_buffers(self, buffers)

    def first(self, count: int) -> "KVCache":
        """Returns a view of the first `count` rows."""
        return self.part(slice(0, count))

    def compacted(self, rows: Sequence[int], filled: int) -> "KVCache":
        """Move the first `filled` positions of the given rows to the front; return a view of these
        rows. The decoding loop calls it when enough of the other rows have ended; from then on only
        the view may be used. rows: ascending.
        """
        front = self.first(len(rows))
        front.take(self, torch.tensor(rows, device=self.device), filled)
        return front

    def take(self, source: "KVCache", rows: Tensor, filled: int) -> None:
        """Copy the first `filled` positions of the given rows, (B,), of another cache to the rows
        of this one, in order."""
        for mine, theirs in zip(self.buffers(), source.buffers(), strict=True):
            mine[:, :filled] = theirs[rows, :filled]


class Cache(Protocol):
    """The cache of a layer as the decoding loop uses it: a KVCache, or one of several micro-batches
    (groups of rows) on several tiers: device, host memory and disk (tiers/kv_cache.py)."""

    rows: int
    length: int  # usable positions of each row
    device: torch.device
    row_granularity: int  # rows of a micro-batch: they take as long as one row of it

    def opened(
        self, rows: slice, pos: Tensor
    ) -> "contextlib.AbstractContextManager[AttentionCache]":
        """Yield the cache of some rows while they compute and write to pos, (B, T)."""

    def first(self, count: int) -> "Cache":
        """Return a view of the first `count` rows."""

    def compacted(self, rows: Sequence[int], filled: int) -> "Cache":
        """Move the first `filled` positions of the given rows, in ascending order, to the front;
        return a view of these rows."""

    def keep(self, filled: int) -> None:
        """Declare the positions from `filled` on unused, so that the cache need not move them."""


class AttentionCache(Protocol):
    """The cache of a layer as a block uses it: on the block's device, or on the host."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v, (B, T, G, E), at pos, (B, T); return the attention, (B, T, H, E), of q,
        (B, T, H, E), to the positions that the mask covers. mask: see Transformer.mask."""


# Returns the attention, (B, T, H, E), of queries to a cache. Called with the cache, queries of that
# shape, the mask of Transformer.mask, and pos, (B, T), the queries' positions.
CacheAttention = Callable[[KVCache, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CacheFactory:
    """Makes the KV cache of each layer; a Transformer holds one.

    make: KVCache, or another constructor with the same arguments (quant/kv_cache.py).
    attention: how the caches attend; fast_layers replaces it by a kernel for the model's device.
    """

    make: Callable[..., KVCache] = KVCache
    attention: CacheAttention = sdpa_attention

    def __call__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Return an empty cache of shape (B, positions, G, E)."""
        return self.make(shape, dtype, device, attention=self.attention)

    def portable(self) -> "CacheFactory":
        """Return a factory of caches that attend on any device, not on the model's alone: for
        attention on the host."""
        return replace(self, attention=sdpa_attention)


def visible_length(filled: int, most: int) -> int:
    """Round `filled` up to 64, 96, 128, 192, 256, 384, ..., but at most to `most`.

    filled: positions in use, 1 or more. most: positions of the cache, or the model's context.
    Attention reads as many positions as the result says. Beyond 64, less than a third of them is
    not filled. Each doubling of the length has two sizes, hence two CUDA graphs.
    """
    power = max(64, 1 << (filled - 1).bit_length())
    return min(power * 3 // 4 if filled <= power * 3 // 4 and power > 64 else power, most)

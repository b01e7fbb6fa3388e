"""The KV cache of a layer, and attention over it.

Start at KVCache; grouped_attention computes attention for query heads that share a key/value head
(arXiv 2305.13245). A cache has slots. The token at position p of a row is stored in slot p. The
cache of a layer with a sliding window has fewer slots than positions: there the token is stored in
slot p % slots and replaces one that no query sees any more (a ring, as in Mistral's reference
code); see slots_and_keys.

Shapes: B rows of a batch, T new tokens per row, S visible slots, H query heads, G key/value heads,
R = H // G query heads per key/value head, E head_dim.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.torch_private import copy_with_buffers, own_buffers
from layers.basic import calls_operator, define_operator, soft_cap

# Slots of a ring beyond its window. So many tokens of a row may be written in one step, rejected
# draft tokens included, or be dropped from the end of a chat, before a key is lost that a query
# still sees. More would save no time: a step of this size keeps a GPU busy.
WINDOW_SLACK = 512


class Scores(NamedTuple):
    """How attention computes the scores of queries and keys, which softmax turns into weights."""

    scale: float | None = None  # multiplies the products; None: 1 / sqrt(E)
    softcap: float | None = None  # limits the scaled products; see soft_cap

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns the scores, (..., Q, S), of queries, (..., Q, E), and keys, (..., S, E)."""
        scores = (q @ k.transpose(-2, -1)) * (self.scale or 1 / math.sqrt(q.shape[-1]))
        return scores if self.softcap is None else soft_cap(scores, self.softcap)


def grouped_attention(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """Attend with queries, (B, T, H, E), to keys and values, (B, S, G, E) each -> (B, T, H, E).

    attention: called as F.scaled_dot_product_attention is, with q, (B, G, R*T, E), k and v, (B, G,
    S, E) each, and the mask; returns the shape of q. mask: (B, 1, R*T, S), see Transformer.mask.
    """
    T = q.shape[1]
    # The queries of the R heads that share a key/value head become R*T queries of one head, so
    # that keys and values are read once and not expanded.
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, R*T, E)
    y = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)  # (B, G, R*T, E)
    return y.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, H, E)


def sdpa_attention(cache: "KVCache", q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Attend with PyTorch's kernel: the default CacheAttention, which runs on every device.

    The mask's last dimension tells how many slots are visible; pos, a parameter of every
    CacheAttention, is not used. The cache's scores must have no softcap.
    """
    k, v = cache.visible(mask.shape[-1])  # (B, S, G, E)
    attention = partial(F.scaled_dot_product_attention, scale=cache.scores.scale)
    return grouped_attention(attention, q, k, v, mask)


def capped_attention(cache: "KVCache", q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Attend as sdpa_attention does, with scores that are limited by a softcap (Gemma 2), which
    PyTorch's kernel does not offer."""
    k, v = cache.visible(mask.shape[-1])  # (B, S, G, E)
    compute = torch.ops.gpt_flex.capped if calls_operator(q) else attend_capped
    scale = cache.scores.scale or 1 / math.sqrt(q.shape[-1])
    attention = partial(compute, scale=scale, softcap=cache.scores.softcap)
    return grouped_attention(attention, q, k, v, mask)


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attend with queries, (B, G, Q, E), to keys and values, (B, G, S, E) each -> (B, G, Q, E).

    mask: (B, 1, Q, S), added after the softcap, which would make -inf finite. Softmax is computed
    in float32.
    """
    scores = Scores(scale, softcap)(q, k) + mask  # (B, G, Q, S)
    return scores.softmax(-1, dtype=torch.float32).type_as(v) @ v


define_operator(
    "capped(Tensor q, Tensor k, Tensor v, Tensor mask, *, float scale, float softcap) -> Tensor",
    attend_capped,
    lambda q, *rest, **scores: q.new_empty(q.shape),
)


class KVCache(nn.Module):
    """Keys and values of one layer: (B, slots + 1, G, E) each. No token of a text is in the last
    slot: a ring stores padding there, see also Transformer.make_caches.

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
        scores: Scores = Scores(),
        length: int | None = None,
    ):
        """Allocate an empty cache.

        shape: (B, slots + 1, G, E). attention: the function by which it attends; scores: how
        attention computes its scores. length: positions of a text, None: as many as slots. Sets the
        attribute `ring`: the number of slots, if it is below the number of positions, else None.
        Without a ring the token at position p is in slot p.
        """
        super().__init__()
        self.attention, self.scores = attention, scores
        slots = shape[1] - 1
        self.length = slots if length is None else length
        self.ring = slots if slots < self.length else None
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device))

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    @property
    def device(self) -> torch.device:
        return self.k.device

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v in the slots pos, then attend with q to the visible slots; see
        AttentionCache."""
        self.store(pos, k, v)
        return self.attention(self, q, mask, pos)

    @contextlib.contextmanager
    def opened(self, rows: slice, pos: Tensor) -> Iterator["KVCache"]:
        """Yield the cache of some rows, which compute within the with statement. pos: (B, T), the
        slots in which each row of the batch writes, not only these rows. Here nothing is to be
        done; a cache on several tiers (tiers/kv_cache.py) fetches the keys and values before and
        saves those in the slots afterwards.
        """
        yield self.part(rows)

    def keep(self, filled: int) -> None:
        """Declare the positions from `filled` on unused. A cache on several tiers then does not
        move them; this one has nothing to do."""

    def update(self, pos: Tensor, k: Tensor, v: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, T, G, E), in slots pos, (B, T); return keys and values of the first
        `visible` slots, (B, visible, G, E) each. Attention on the host (tiers/) calls it."""
        self.store(pos, k, v)
        return self.visible(visible)

    def store(self, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v, (B, T, G, E), in slots pos, (B, T)."""
        rows = torch.arange(pos.shape[0], device=pos.device).unsqueeze(1)  # (B, 1)
        self.k[rows, pos] = k
        self.v[rows, pos] = v

    def visible(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the first `count` slots, (B, count, G, E) each."""
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
        rows. The decoding loop calls it when enough of the other rows have ended. From then on only
        the view may be used, until the cache is filled again from position 0. rows: ascending
        indices.
        """
        front = self.first(len(rows))
        front.take(self, torch.tensor(rows, device=self.device), filled)
        return front

    def take(self, source: "KVCache", rows: Tensor, filled: int) -> None:
        """Copy the first `filled` positions of the given rows, (B,), of `source` to the B rows of
        this cache, in order. Of a ring with fewer slots than `filled`, all slots are copied."""
        for mine, theirs in zip(self.buffers(), source.buffers(), strict=True):
            mine[:, :filled] = theirs[rows, :filled]


class Cache(Protocol):
    """The cache of a layer as the decoding loop uses it: a KVCache, or a TieredCache, which keeps
    micro-batches (groups of rows) on device, host memory and disk (tiers/kv_cache.py)."""

    rows: int
    length: int  # usable positions of each row
    ring: int | None  # slots of each row if they are fewer than length, else None; see KVCache
    device: torch.device
    # Rows of a micro-batch, which is moved as a whole: one live row of it costs as much as all.
    # Without micro-batches 1.
    row_granularity: int

    def opened(
        self, rows: slice, pos: Tensor
    ) -> "contextlib.AbstractContextManager[AttentionCache]":
        """Yield the cache of some rows, which compute within the with statement. pos: (B, T), the
        slots in which each row of the batch writes."""

    def first(self, count: int) -> "Cache":
        """Return a view of the first `count` rows."""

    def compacted(self, rows: Sequence[int], filled: int) -> "Cache":
        """Move the first `filled` positions of the given rows, in ascending order, to the front;
        return a view of these rows."""

    def keep(self, filled: int) -> None:
        """Declare the positions from `filled` on unused, so that the cache need not move them."""


class AttentionCache(Protocol):
    """The cache of a layer as a block uses it: on the block's device, or on the host.

    Transformer.forward also reads `ring`, int or None, see KVCache.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v, (B, T, G, E), in slots pos, (B, T); return the attention, (B, T, H, E), of
        q, (B, T, H, E), to the slots that the mask covers. mask: see Transformer.mask."""


# Returns the attention, (B, T, H, E), of queries to a cache. Called with the cache, queries of that
# shape, the mask of Transformer.mask, and pos, (B, T), the slots of the queries' own tokens.
CacheAttention = Callable[[KVCache, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CacheFactory:
    """Makes the KV cache of each layer; a Transformer holds one.

    make: KVCache, or another constructor with the same arguments (quant/kv_cache.py).
    scores: how attention computes its scores. attention: the function by which caches attend; None:
    sdpa_attention or capped_attention; fast_layers sets it to a kernel for the model's device.
    window_attention: the same for layers with a sliding window. windows: whether the caches of
    layers with a sliding window are rings, with fewer slots than positions; False for callers that
    read whole texts in one step.
    """

    make: Callable[..., KVCache] = KVCache
    scores: Scores = Scores()
    attention: CacheAttention | None = None
    window_attention: CacheAttention | None = None
    windows: bool = True

    def __call__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
    ) -> KVCache:
        """Return an empty cache for (B, positions + 1, G, E) keys and values. window: the sliding
        window of the layer, None: it has none."""
        rows, positions, *head = shape[0], shape[1] - 1, *shape[2:]
        slots = self.slots(positions, window)
        in_pytorch = sdpa_attention if self.scores.softcap is None else capped_attention
        # A window that covers all positions hides none: the mask is causal, and the kernel for
        # causal masks is faster.
        windowed = window is not None and window < positions
        attention = self.window_attention if windowed else self.attention
        return self.make(
            (rows, slots + 1, *head),
            dtype,
            device,
            attention=attention or in_pytorch,
            scores=self.scores,
            length=positions,
        )

    def slots(self, length: int, window: int | None) -> int:
        """Returns the slots of a cache for `length` positions. window: as in __call__."""
        ring = window is not None and self.windows
        return min(length, window + WINDOW_SLACK) if ring else length

    def portable(self) -> "CacheFactory":
        """Return the same factory without kernels for one device: its caches attend by PyTorch, on
        any device. For attention on the host."""
        return replace(self, attention=None, window_attention=None)


def slots_and_keys(
    pos: Tensor, key_pos: Tensor, ring: int | None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the slot in which each new token is stored, (B, T), and the position of the token
    that each visible slot holds after the step, (S,) or (B, S); negative: the slot is empty.

    pos: (B, T), positions of the new tokens. key_pos: arange(n), n: the positions that attention
    would read if the cache were no ring. ring: see KVCache. lengths: (B, 1), tokens of each row's
    whole prompt; None: there is no padding. A new token at a position >= lengths is padding and
    goes, in a ring, to the extra last slot. Raises ValueError for more than WINDOW_SLACK + 1 new
    tokens of a row in a ring: a later one would replace a key that an earlier one still sees.
    """
    if ring is None or len(key_pos) <= ring:  # no position has wrapped: slots are positions
        return pos, key_pos
    # While compiling, the compiler would take this check as a bound on the number of tokens, and
    # compile again beyond it.
    if not torch.compiler.is_compiling() and pos.shape[1] > WINDOW_SLACK + 1:
        raise ValueError(
            f"a step has {pos.shape[1]} tokens of a row, and the caches of layers with a sliding "
            f"window take {WINDOW_SLACK + 1} at a time"
        )
    # newest: the last position of each row after the step.
    newest, slot = pos.amax(1, keepdim=True), pos % ring  # (B, 1), (B, T)
    if lengths is not None:
        newest = torch.minimum(newest, lengths - 1)
        slot = slot.masked_fill(pos >= lengths, ring)
    # Slot s holds the greatest position p <= newest with p % ring == s; p < 0: it is empty.
    return slot, newest - (newest - key_pos[:ring]) % ring  # (B, T), (B, S)


def hidden_keys(pos: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Returns which keys each query does not see: (B, T, S) bool.

    pos: (B, T), positions of the queries. keys: (S,) or (B, S), positions of the keys, negative for
    an empty slot. A query sees the keys at and before its position, and of these, in a layer with a
    sliding window, the last `window`.
    """
    keys = keys.unsqueeze(-2) if keys.dim() > 1 else keys  # (B, 1, S) or (S,)
    pos = pos.unsqueeze(-1)  # (B, T, 1)
    hidden = keys > pos  # (B, T, S)
    if window is not None:
        # A prompt's padding has positions beyond all keys of its row. Its window ends at the newest
        # key, because the softmax of a query that sees no key is NaN.
        oldest = torch.minimum(pos, keys.amax(-1, keepdim=True)) - window  # (B, T, 1)
        hidden = hidden | (keys <= oldest) | (keys < 0)
    return hidden


def visible_length(filled: int, most: int) -> int:
    """Round `filled` up to 64, 96, 128, 192, 256, 384, ..., but at most to `most`.

    filled: positions in use, 1 or more. most: positions of the cache, or the model's context.
    Attention reads as many positions as the result says. Above 64, more than two thirds of them are
    filled. Each doubling of the length has two sizes, hence two CUDA graphs.
    """
    power = max(64, 1 << (filled - 1).bit_length())
    return min(power * 3 // 4 if filled <= power * 3 // 4 and power > 64 else power, most)

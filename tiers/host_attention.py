"""Attention on the host over a cache that is in host memory, for a model on a GPU.

Start at HostAttention: queries, new keys and new values are copied to the host, and the attention's
output is copied back. These are fewer bytes than the cache, which would otherwise be copied to the
device. A cache here is that of one layer for one micro-batch (a group of rows that pass through the
layer together); kv_cache.py makes a HostAttention of it.
Based on FlexGen (arXiv 2303.06865, sections 4.2 and 5).

Shapes: B rows, T new tokens, H query heads, G key/value heads, R = H/G, S slots, E head_dim.
"""

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from layers.kv_cache import KVCache
from tiers.prefetch import record_event, to_device


class HostAttention:
    """A cache in host memory whose attention the host computes for a block on the device.

    The block uses it as a KVCache (AttentionCache in layers/kv_cache.py). _cache: the KVCache that
    holds the tensors, in host memory. The calling thread waits for the host; meanwhile the device
    can compute other micro-batches, which other threads launch (offload.compute_in_threads).
    """

    # One micro-batch at a time attends, and its attention uses all cores of the host.
    attention_lock = threading.Lock()

    def __init__(self, cache: KVCache):
        self._cache = cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v, (B, T, G, E), in slots pos, (B, T); return the attention of queries q,
        (B, T, H, E), to the cache, in that shape. All tensors are on the device.

        mask: (B, 1, R*T, S), see Transformer.mask. Called by the block's attention, as
        KVCache.attend is.
        """
        if torch.compiler.is_compiling():  # torch.compile supports neither events nor locks
            host = self._cache.device
            return self._cache.attend(*(t.to(host) for t in (q, k, v, mask, pos))).to(q.device)
        host_tensors = self._to_host(q, k, v, mask, pos)
        with self.attention_lock:
            y = self._cache.attend(*host_tensors)
        return to_device(y, q.device)

    def _to_host(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors from the device to host memory; return the copies. Waits for these copies,
        and not for work that other threads queue on the same CUDA stream later."""
        copies = [t.to(self._cache.device, non_blocking=True) for t in tensors]
        if copied := record_event(tensors[0].device):
            copied.synchronize()
        return copies

    def part(self, rows: slice) -> "HostAttention":
        """Return a view of some rows: a HostAttention over the same memory."""
        return HostAttention(self._cache.part(rows))

    def take(self, source: "KVCache | HostAttention", rows: Tensor, filled: int) -> None:
        """Copy the first `filled` slots of some rows of another cache to the rows of this one, in
        order, as KVCache.take does. rows: (B,), numbers of rows in `source`."""
        self._cache.take(source, rows, filled)

    def buffers(self) -> Iterator[Tensor]:
        """Return the tensors of the cache, which `take` copies."""
        return self._cache.buffers()


class SparseHostAttention(HostAttention):
    """Attention that reads all keys, but values only of the tokens with the highest attention
    weights.

    It is an approximation, for rows with one new token; the attention of prompts is exact (FlexGen,
    section 5). share: the share of the visible tokens whose values are read, in (0, 1).
    """

    def __init__(self, cache: KVCache, share: float):
        super().__init__(cache)
        self._share = share

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Attend as HostAttention.attend does; if each row has one new token, read only values of
        the tokens with the highest weights."""
        if q.shape[1] > 1:
            return super().attend(q, k, v, mask, pos)
        host_tensors = self._to_host(q, k, v, mask, pos)
        with self.attention_lock:
            y = self._attend_sparsely(*host_tensors)
        return to_device(y, q.device)

    def _attend_sparsely(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor
    ) -> Tensor:
        """Store k and v, (B, 1, G, E), in slots pos, (B, 1); return the approximate attention of q,
        (B, 1, H, E), in that shape. All tensors are on the host.

        For each row and key/value head, only values of the tokens with the highest weights, summed
        over the head's R queries, are read. Weights are not scaled up for the tokens that are left
        out. mask: (B, 1, R, S), see Transformer.mask. `count`, the number of tokens whose values
        are read, is the same for all rows: the share of the longest row's visible tokens.
        """
        k, v = self._cache.update(pos, k, v, mask.shape[-1])  # (B, S, G, E)
        q = q.squeeze(1).unflatten(1, (k.shape[2], -1))  # (B, G, R, E)
        weights = (self._cache.scores(q, k.transpose(1, 2)) + mask).softmax(-1)  # (B, G, R, S)
        visible = int((mask > -math.inf).sum(-1).max())
        count = math.ceil(self._share * visible)
        top = weights.sum(2, keepdim=True).topk(count).indices  # (B, G, 1, count), for all R
        top_weights = weights.gather(-1, top.expand(-1, -1, q.shape[2], -1))  # (B, G, R, count)
        index = top.squeeze(2).unsqueeze(-1).expand(-1, -1, -1, v.shape[-1])  # (B, G, count, E)
        y = top_weights @ v.transpose(1, 2).gather(2, index)  # (B, G, R, E)
        return y.flatten(1, 2).unsqueeze(1)  # (B, 1, H, E)

    def part(self, rows: slice) -> "SparseHostAttention":
        return SparseHostAttention(self._cache.part(rows), self._share)

"""Attention on the host over a cache that is in host memory, for a model on a GPU.

Start at HostAttention: queries, new keys and new values are copied to the host, and the attention's
output is copied back, which is less than the cache that would otherwise be copied to the device.
Based on FlexGen (arXiv 2303.06865, sections 4.2 and 5).

Shapes: B rows, T new tokens, H query heads, G key/value heads, R = H/G, S positions, E head_dim.
"""

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from model import KVCache
from tiers.prefetch import record_event, to_device


class HostAttention:
    """A cache in host memory that a block on the device attends to.

    The calling thread waits for the host. Meanwhile the device computes what other threads give it
    (offload.compute_in_threads).
    """

    turn = threading.Lock()  # one micro-batch at a time attends, with all cores of the host

    def __init__(self, cache: KVCache):
        self._cache = cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v, (B, T, G, E), and return what q, (B, T, H, E), attends to, like q."""
        if torch.compiler.is_compiling():  # the compiler supports neither events nor locks
            host = self._cache.device
            return self._cache.attend(*(t.to(host) for t in (q, k, v, mask, pos))).to(q.device)
        received = self._received(q, k, v, mask, pos)
        with self.turn:
            y = self._cache.attend(*received)
        return to_device(y, q.device)

    def _received(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors to the host. Wait for the copies, not for later work."""
        copies = [t.to(self._cache.device, non_blocking=True) for t in tensors]
        if copied := record_event(tensors[0].device):
            copied.synchronize()
        return copies

    def part(self, rows: slice) -> "HostAttention":
        """Return the same memory, restricted to some rows."""
        return HostAttention(self._cache.part(rows))

    def take(self, source: "KVCache | HostAttention", rows: Tensor, filled: int) -> None:
        self._cache.take(source, rows, filled)

    def buffers(self) -> Iterator[Tensor]:
        return self._cache.buffers()


class SparseHostAttention(HostAttention):
    """Attention that reads only a share of the values: of the tokens with the highest weights.

    An approximation, for rows with one new token; prompts are exact (FlexGen, section 5).
    """

    def __init__(self, cache: KVCache, share: float):
        super().__init__(cache)
        self._share = share

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        if q.shape[1] > 1:
            return super().attend(q, k, v, mask, pos)
        received = self._received(q, k, v, mask, pos)
        with self.turn:
            y = self._attend_sparsely(*received)
        return to_device(y, q.device)

    def _attend_sparsely(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor
    ) -> Tensor:
        """Return (B, 1, H, E), on the host."""
        k, v = self._cache.update(pos, k, v, mask.shape[-1])  # (B, S, G, E)
        q = q.squeeze(1).unflatten(1, (k.shape[2], -1))  # (B, G, R, E)
        scores = q @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1]) + mask  # (B, G, R, S)
        weights = scores.softmax(-1)
        count = math.ceil(self._share * (int(pos.max()) + 1))
        top = weights.sum(2, keepdim=True).topk(count).indices  # (B, G, 1, count), for all R
        kept = weights.gather(-1, top.expand(-1, -1, q.shape[2], -1))  # (B, G, R, count)
        index = top.squeeze(2).unsqueeze(-1).expand(-1, -1, -1, v.shape[-1])  # (B, G, count, E)
        y = kept @ v.transpose(1, 2).gather(2, index)  # (B, G, R, E)
        return y.flatten(1, 2).unsqueeze(1)  # (B, 1, H, E)

    def part(self, rows: slice) -> "SparseHostAttention":
        return SparseHostAttention(self._cache.part(rows), self._share)

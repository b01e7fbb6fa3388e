"""KV caches on more than one tier: what attention reads comes, and what a step adds goes back.

Start at TieredCaches, which takes the place of a list of KVCaches. It is cut into cells, those of
one layer for one micro-batch, each on its tier. A cell that is not on the device is brought into a
slot of a ring while earlier ones are computed, used there as any KVCache, and what is new in it is
stored behind. With attention on the host, cells in its memory stay where they are, and queries
travel instead: that is what FlexGen does (arXiv 2303.06865, section 4.2).

Shapes: B rows, g rows of a micro-batch, T new tokens, S slots of a row.
"""

import contextlib
import copy
import gc
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from host.memory import BLOCK_BYTES, page_aligned, round_up_to_block
from host.torch_private import own_buffers
from model import KVCache, Transformer
from tiers.direct_io import ScratchFile
from tiers.policy import CACHE_BUFFERS, Policy
from tiers.prefetch import (
    CPU,
    META,
    BounceBuffer,
    Buffer,
    HostMemory,
    Layout,
    Parts,
    Ring,
    Store,
    TransferWorker,
    WaitTime,
    record_event,
    to_device,
)


@dataclass(eq=False)
class Cell:
    """Keys and values of one layer for one micro-batch: a cache here, or bytes elsewhere."""

    cache: KVCache | None = None
    store: Store | None = None
    base: int = 0  # where in the store they begin
    filled: int = 0  # slots that hold something, of every row
    stored: Future | None = None  # new slots on their way


class TieredCaches(Sequence["TieredCache"]):
    """The caches of all layers. A cell's memory goes slot by slot, each with all its rows: so what
    is filled is one range of bytes, and what a step adds, to rows of like length, a short one."""

    def __init__(
        self,
        model: Transformer,
        policy: Policy,
        rows: int,
        length: int,
        waited: WaitTime | None = None,
    ):
        args, weight = model.args, model.tok_embeddings.weight
        self.policy, self.device, self.rows, self.length = policy, weight.device, rows, length
        shape = (policy.micro_batch, length + 1, args.n_kv_heads, args.head_dim)
        self._factory, self._args = model.cache_factory, (shape, weight.dtype, META)
        empty = self._factory(*self._args)
        by_slot = {n: t.transpose(0, 1) for n, t in own_buffers(empty).items()}
        self.layout = Layout(by_slot)
        self._slot_bytes = {name: tensor[0].nbytes for name, tensor in by_slot.items()}
        K = -(-rows // policy.micro_batch)
        self.tiers = policy.cache.tiers(args.n_layers * K)
        cells = self._cells()
        self._caches = [TieredCache(self, cells[j * K : j * K + K]) for j in range(args.n_layers)]
        moving = [cell for cell in cells if cell.cache is None]
        self._slots = [self._slot() for _ in moving[:CACHE_BUFFERS]]
        self._in, self._out = (
            TransferWorker(self.device, "cache in"),
            TransferWorker(self.device, "cache out"),
        )
        self._waited = waited or WaitTime()
        self._ring, self._in_ring = Ring((), (), self._fetch, self._waited), 0
        self._pos, self._spans = None, []

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, j: int) -> "TieredCache":
        return self._caches[j]

    @contextlib.contextmanager
    def holding(self, cell: Cell, k: int, pos: Tensor) -> Iterator[KVCache]:
        """The cell as a cache. pos: (B, T), the slots that are written to meanwhile."""
        if cell.cache is not None:
            yield cell.cache
            return
        with self._ring_over(-(-len(pos) // self.policy.micro_batch)).acquire(cell) as slot:
            try:
                yield slot.contents
            finally:  # after an error, too, the device may still compute with it
                slot.last_use = record_event(self.device)
            first, cell.filled = self._span(k, pos)
            self._store(cell, slot, first)
            if not self.policy.overlap:
                cell.stored.result()

    def compact(self, cells: Sequence[Cell], rows: Sequence[int], filled: int) -> None:
        """Move those rows of a layer, which ascend, to the front: of each, `filled` slots.

        Old cells are read in order, and new ones made of them one at a time. As a row is never
        moved back, what its new place held has been read.
        """
        g = self.policy.micro_batch
        self._ring_over(0)  # what it has fetched ahead is of the old order
        same = sum(i == row for i, row in enumerate(rows)) // g * g  # in cells that stay
        for k, moves in groupby(enumerate(rows[same:], same), lambda move: move[1] // g):
            with self._read(cells[k]) as old:
                for m, some in groupby(moves, lambda move: move[0] // g):
                    to, of = zip(*some, strict=True)
                    new = cells[m].cache or self._slots[-1].contents
                    places = slice(to[0] % g, to[-1] % g + 1)
                    new.part(places).take(old, torch.tensor(of) % g, filled)
                    if places.stop == g or to[-1] == len(rows) - 1:
                        self._write(cells[m], filled)

    @contextlib.contextmanager
    def _read(self, cell: Cell) -> Iterator[KVCache]:
        """A cell as a cache: in the first slot, if it moves."""
        if cell.cache is not None:
            yield cell.cache
            return
        slot = self._slots[0]
        self._fetch(cell, slot).result()
        yield slot.contents
        slot.last_use = record_event(self.device)

    def _write(self, cell: Cell, filled: int) -> None:
        """Let a cell that moves be what was made of it in the last slot, which is the first where
        no other cell moves."""
        cell.filled = filled
        if cell.cache is None:
            slot = self._slots[-1]
            slot.last_use = record_event(self.device)
            self._store(cell, slot, 0)
            cell.stored.result()

    def _ring_over(self, K: int) -> Ring[Cell]:
        """The ring, over the cells of the first K micro-batches."""
        if self._in_ring != K:
            for courier in (self._in, self._out):
                courier.submit(lambda: None).result()  # one thread: all it was sent before is there
            moving = [c for cache in self for c in cache.cells[:K] if c.cache is None]
            slots = self._slots[: len(moving)]
            self._ring = Ring(moving, slots, self._fetch, self._waited, self.policy.overlap)
            self._in_ring = K
        return self._ring

    def _span(self, k: int, pos: Tensor) -> tuple[int, int]:
        """The slots that micro-batch k writes to: the first one, and the end."""
        if pos is not self._pos:  # once for all layers: the host waits for the numbers
            ends = torch.stack((pos.amin(1), pos.amax(1) + 1), dim=1).tolist()  # of each row
            g = self.policy.micro_batch
            groups = (ends[start : start + g] for start in range(0, len(ends), g))
            self._spans = [(min(a for a, _ in of), max(b for _, b in of)) for of in groups]
            self._pos = pos
        return self._spans[k]

    def _fetch(self, cell: Cell, slot: Buffer) -> Future:
        def bring() -> None:
            for stored in (slot.stored, cell.stored):  # the slot's last contents; this cell's
                if stored:
                    stored.result()
            cell.store.read(self._pieces(cell, slot.parts, 0, cell.filled))

        return self._in.submit(bring, slot.last_use)

    def _store(self, cell: Cell, slot: Buffer, first: int) -> None:
        pieces = self._pieces(cell, slot.parts, first, cell.filled)
        cell.stored = slot.stored = self._out.submit(
            lambda: cell.store.write(pieces), slot.last_use
        )

    def _pieces(self, cell: Cell, parts: Parts, first: int, end: int) -> list[tuple[int, Tensor]]:
        """The bytes of some slots, of each tensor, in whole blocks: what parts hold beside them
        is either what the store holds there too, or nothing yet."""
        pieces = []
        for name, at in self.layout.offsets.items():
            start = first * self._slot_bytes[name] // BLOCK_BYTES * BLOCK_BYTES
            stop = round_up_to_block(end * self._slot_bytes[name])
            pieces.append((cell.base + at + start, parts[name][start:stop]))
        return pieces

    def _cells(self) -> list[Cell]:
        nbytes, pin = self.layout.nbytes, self.policy.pins(self.device)
        count = self.tiers.count("disk")
        if count:
            scratch = ScratchFile(self.policy.directory, count * nbytes)
            file = (
                scratch
                if self._host_reads()
                else BounceBuffer(scratch, [page_aligned(nbytes, CPU, pin)])
            )
        cells, on_disk = [], 0
        for tier in self.tiers:
            if tier == "device":
                cells.append(Cell(self._resident(self.device)))
            elif tier == "disk":
                cells.append(Cell(store=file, base=on_disk * nbytes))
                on_disk += 1
            elif self.policy.cpu_attention:
                cells.append(Cell(self._resident(CPU)))
            else:
                cells.append(Cell(store=HostMemory(page_aligned(nbytes, CPU, pin))))
        return cells

    def _host_reads(self) -> bool:
        """Whether cells that move are used in host memory, where files can be read to."""
        return self.device.type == "cpu" or self.policy.cpu_attention

    def _resident(self, device: torch.device) -> KVCache:
        return self._cache(self.layout.allocate(device), device)

    def _slot(self) -> Buffer:
        device = CPU if self._host_reads() else self.device
        parts = self.layout.allocate(device)
        return Buffer(parts, self._cache(parts, device), record_event(self.device))

    def _cache(self, parts: Parts, device: torch.device) -> KVCache:
        """A cache in that memory."""
        here = device.type == self.device.type
        cache = (self._factory if here else self._factory.portable())(*self._args)
        for name, tensor in self.layout.of(parts).items():  # (S, g, ...) each
            setattr(cache, name, tensor.transpose(0, 1))
        if self.policy.attention_share < 1 and self.policy.cpu_attention and device == CPU:
            return SparseHostAttention(cache, self.policy.attention_share)
        return cache if device == self.device else HostAttention(cache)


class TieredCache:
    """One layer's cells, used as a KVCache is: `opened`, a micro-batch at a time."""

    def __init__(self, caches: TieredCaches, cells: Sequence[Cell]):
        self._caches, self.cells, self.row_granularity = caches, cells, caches.policy.micro_batch
        self.rows, self.length, self.device = caches.rows, caches.length, caches.device

    @contextlib.contextmanager
    def opened(self, rows: slice, pos: Tensor) -> Iterator[KVCache]:
        """The part of some rows, those of a micro-batch; pos: (B, T), where all rows write."""
        k = rows.start // self.row_granularity
        with self._caches.holding(self.cells[k], k, pos) as cache:
            yield cache.part(slice(0, rows.stop - rows.start))

    def first(self, count: int) -> "TieredCache":
        """The same memory, of so many rows."""
        first = copy.copy(self)
        first.rows = count
        return first

    def compacted(self, rows: Sequence[int], filled: int) -> "TieredCache":
        """The same memory, of those rows, which ascend and are moved to its front."""
        self._caches.compact(self.cells, rows, filled)
        return self.first(len(rows))

    def keep(self, filled: int) -> None:
        """Slots from `filled` on need not be brought any more."""
        for cell in self.cells:
            cell.filled = min(cell.filled, filled)


class HostAttention:
    """A cache to which queries, new keys and new values are sent, and from which what they see
    comes back. Who calls waits; the device goes on with what others give it (offload.zigzag)."""

    turn = threading.Lock()  # of those who attend on the host: one has all its cores

    def __init__(self, cache: KVCache):
        self._cache = cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # neither events nor threads are for the compiler
            there = self._cache.device
            return self._cache.attend(*(t.to(there) for t in (q, k, v, mask, pos))).to(q.device)
        given = self._received(q, k, v, mask, pos)
        with self.turn:
            y = self._cache.attend(*given)
        return to_device(y, q.device)

    def _received(self, *tensors: Tensor) -> list[Tensor]:
        """The same there, once they have come: what the device does afterwards may take longer."""
        copies = [t.to(self._cache.device, non_blocking=True) for t in tensors]
        if copied := record_event(tensors[0].device):
            copied.synchronize()
        return copies

    def part(self, rows: slice) -> "HostAttention":
        return HostAttention(self._cache.part(rows))

    def take(self, source: KVCache, rows: Tensor, filled: int) -> None:
        self._cache.take(source, rows, filled)

    def buffers(self) -> Iterator[Tensor]:
        return self._cache.buffers()


class SparseHostAttention(HostAttention):
    """The same, where of all values a share is read: those of the tokens with the highest weights.
    It is an approximation, for one new token of a row (FlexGen, section 5)."""

    def __init__(self, cache: KVCache, share: float):
        super().__init__(cache)
        self._share = share

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        if q.shape[1] > 1:
            return super().attend(q, k, v, mask, pos)
        device = q.device
        q, k, v, mask, pos = self._received(q, k, v, mask, pos)
        with self.turn:
            return to_device(self._attend_sparsely(q, k, v, mask, pos), device)

    def _attend_sparsely(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor
    ) -> Tensor:
        """(B, 1, H, E), all on the host."""
        k, v = self._cache.update(pos, k, v, mask.shape[-1])  # (B, S, G, E)
        q = q.squeeze(1).unflatten(1, (k.shape[2], -1))  # (B, G, R, E)
        scores = q @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1]) + mask  # (B, G, R, S)
        weights = scores.softmax(-1)
        count = math.ceil(self._share * (int(pos.max()) + 1))
        top = weights.sum(2, keepdim=True).topk(count).indices  # (B, G, 1, count), for all R
        kept = weights.gather(-1, top.expand(-1, -1, q.shape[2], -1))  # (B, G, R, count)
        at = top.squeeze(2).unsqueeze(-1).expand(-1, -1, -1, v.shape[-1])  # (B, G, count, E)
        y = kept @ v.transpose(1, 2).gather(2, at)  # (B, G, R, E)
        return y.flatten(1, 2).unsqueeze(1)  # (B, 1, H, E)

    def part(self, rows: slice) -> "SparseHostAttention":
        return SparseHostAttention(self._cache.part(rows), self._share)


def tiered_caches(
    model: Transformer, policy: Policy, rows: int, length: int, waited: WaitTime | None = None
) -> Sequence[KVCache]:
    """`length` slots for each row, on the tiers that the policy says. waited: where to count what
    those who compute wait for cells."""
    if policy.cache.device == 100:
        return model.make_caches(rows, length)
    gc.collect()  # earlier caches refer to themselves, and would keep memory and disk for a while
    return TieredCaches(model, policy, rows, length, waited)

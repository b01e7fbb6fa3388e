"""KV caches whose parts lie on the device, in host memory or on disk.

Start at TieredCaches, which takes the place of a list with one KVCache for each layer. It is cut
into cells, one for each layer and micro-batch, each on one tier. A cell that is not on the device
is fetched into a buffer of a ring while earlier cells are computed with, and is used there as a
KVCache; then its new positions are written back. With attention on the host, the cells in host
memory stay there (host_attention.py).

Based on FlexGen (arXiv 2303.06865, section 4.2).

Shapes: B rows, g rows of a micro-batch, T new tokens, S positions of a row.
"""

import contextlib
import copy
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from host.memory import BLOCK_BYTES, page_aligned, round_up_to_block
from host.torch_private import copy_with_buffers
from model import KVCache, Transformer
from tiers.direct_io import ScratchFile
from tiers.host_attention import HostAttention, SparseHostAttention
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
)


def tiered_caches(
    model: Transformer, policy: Policy, rows: int, length: int, wait_time: WaitTime | None = None
) -> Sequence[KVCache]:
    """Make the caches of all layers, of `length` positions for each row, as the policy places them.

    wait_time: counts the seconds that computation waits for cells.
    """
    if policy.cache.device == 100:
        return model.make_caches(rows, length)
    gc.collect()  # earlier caches are in reference cycles, and would still hold memory and disk
    return TieredCaches(model, policy, rows, length, wait_time)


@dataclass(eq=False)
class Cell:
    """Keys and values of one layer for one micro-batch: a resident cache, or bytes in a store."""

    cache: "KVCache | HostAttention | None" = None
    store: Store | None = None
    offset: int = 0  # in the store, bytes
    filled: int = 0  # positions that have contents, in every row
    stored: Future | None = None  # the pending write of new positions


class CellAllocator:
    """Allocates cells on their tiers, and the buffers into which cells are fetched.

    The memory of a cell is ordered by position, then by row: so the filled positions are one range
    of bytes, and the new positions of a step, in rows of similar length, a short one.
    """

    def __init__(self, model: Transformer, policy: Policy, length: int):
        args, weight = model.args, model.tok_embeddings.weight
        self.policy, self.device = policy, weight.device
        shape = (policy.micro_batch, length + 1, args.n_kv_heads, args.head_dim)
        factory, given = model.cache_factory, (shape, weight.dtype, META)
        self._template, self._host_template = factory(*given), factory.portable()(*given)
        by_position = {n: t.transpose(0, 1) for n, t in self._template.named_buffers()}  # (S, g, .)
        self.layout = Layout(by_position)
        self._position_bytes = {name: tensor[0].nbytes for name, tensor in by_position.items()}

    def cells(self, tiers: Sequence[str]) -> list[Cell]:
        """Allocate one cell on each of these tiers. Raises ValueError if the disk is too full."""
        nbytes, on_disk = self.layout.nbytes, tiers.count("disk")
        file = self._scratch_store(on_disk * nbytes) if on_disk else None
        offsets = iter(range(0, on_disk * nbytes, nbytes))
        make = {
            "device": lambda: Cell(self._resident(self.device)),
            "host": self._host_cell,
            "disk": lambda: Cell(store=file, offset=next(offsets)),
        }
        return [make[tier]() for tier in tiers]

    def _host_cell(self) -> Cell:
        if self.policy.cpu_attention:
            return Cell(self._resident(CPU))
        pin = self.policy.pins(self.device)
        return Cell(store=HostMemory(page_aligned(self.layout.nbytes, CPU, pin)))

    def _scratch_store(self, nbytes: int) -> Store:
        scratch = ScratchFile(self.policy.directory, nbytes)
        if self._buffers_on_host():
            return scratch
        pin = self.policy.pins(self.device)
        return BounceBuffer(scratch, [page_aligned(self.layout.nbytes, CPU, pin)])

    def buffer(self) -> Buffer:
        """Allocate a buffer of the ring, with a cache in its memory."""
        device = CPU if self._buffers_on_host() else self.device
        parts = self.layout.allocate(device)
        return Buffer(parts, self._cache(parts, device), record_event(self.device))

    def _buffers_on_host(self) -> bool:
        """Whether fetched cells are used in host memory, which files can be read into."""
        return self.device.type == "cpu" or self.policy.cpu_attention

    def _resident(self, device: torch.device) -> "KVCache | HostAttention":
        return self._cache(self.layout.allocate(device), device)

    def _cache(self, parts: Parts, device: torch.device) -> "KVCache | HostAttention":
        """Build a cache on the memory of these parts."""
        tensors = {n: t.transpose(0, 1) for n, t in self.layout.view(parts).items()}  # (g, S, ...)
        template = self._template if device == self.device else self._host_template
        cache = copy_with_buffers(template, tensors)
        if self.policy.attention_share < 1 and self.policy.cpu_attention and device == CPU:
            return SparseHostAttention(cache, self.policy.attention_share)
        return cache if device == self.device else HostAttention(cache)

    def pieces(self, cell: Cell, parts: Parts, first: int, end: int) -> list[tuple[int, Tensor]]:
        """Return the offset in the store, and the bytes, of positions first to end of each tensor.

        They are rounded to whole blocks. The bytes around them in `parts` equal the bytes of the
        store, or belong to positions that have no contents yet.
        """
        pieces = []
        for name, offset in self.layout.offsets.items():
            start = first * self._position_bytes[name] // BLOCK_BYTES * BLOCK_BYTES
            stop = round_up_to_block(end * self._position_bytes[name])
            pieces.append((cell.offset + offset + start, parts[name][start:stop]))
        return pieces


class TieredCaches(Sequence["TieredCache"]):
    """The caches of all layers, with the ring and the threads that move their cells."""

    def __init__(
        self,
        model: Transformer,
        policy: Policy,
        rows: int,
        length: int,
        wait_time: WaitTime | None = None,
    ):
        self._allocator = CellAllocator(model, policy, length)
        self.policy, self.device = policy, self._allocator.device
        self.rows, self.length, self.layout = rows, length, self._allocator.layout
        K = -(-rows // policy.micro_batch)
        self.tiers = policy.cache.tiers(model.args.n_layers * K)
        cells = self._allocator.cells(self.tiers)
        self._caches = [TieredCache(self, cells[n : n + K]) for n in range(0, len(cells), K)]
        moving = [cell for cell in cells if cell.cache is None]
        self._buffers = [self._allocator.buffer() for _ in moving[:CACHE_BUFFERS]]
        self._reader = TransferWorker(self.device, "cache in")
        self._writer = TransferWorker(self.device, "cache out")
        self._wait_time = wait_time or WaitTime()
        self._ring, self._in_ring = Ring((), (), self._fetch, self._wait_time), 0
        self._pos, self._spans = None, []

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, j: int) -> "TieredCache":
        return self._caches[j]

    @contextlib.contextmanager
    def acquire(self, cell: Cell, k: int, pos: Tensor) -> Iterator["KVCache | HostAttention"]:
        """Yield the cell of micro-batch k as a cache; on exit, write its new positions back.

        pos: (B, T), the positions that all rows write to.
        """
        if cell.cache is not None:
            yield cell.cache
            return
        with self._ring_over(-(-len(pos) // self.policy.micro_batch)).acquire(cell) as buffer:
            try:
                yield buffer.contents
            finally:  # even after an error the device may still compute with it
                buffer.last_use = record_event(self.device)
            first, cell.filled = self._written(k, pos)
            self._store(cell, buffer, first)
            if not self.policy.overlap:
                cell.stored.result()

    def compact(self, cells: Sequence[Cell], rows: Sequence[int], filled: int) -> None:
        """Move these rows of a layer, in ascending order, to the front; `filled` positions of each.

        The old cells are read in order, and new ones are built from them one at a time. No row
        moves to a higher place, so a cell has been read before it is overwritten.
        """
        g = self.policy.micro_batch
        self._ring_over(0)  # drops prefetched cells, which have the old order
        unmoved = sum(i == row for i, row in enumerate(rows)) // g * g  # rows of unchanged cells
        for k, moves in groupby(enumerate(rows[unmoved:], unmoved), lambda move: move[1] // g):
            with self._read(cells[k]) as source:
                for m, group in groupby(moves, lambda move: move[0] // g):
                    new, old = zip(*group, strict=True)
                    self._take_rows(cells[m], new, source, old, filled)
                    if (new[-1] + 1) % g == 0 or new[-1] == len(rows) - 1:
                        self._write(cells[m], filled)

    def _take_rows(
        self,
        cell: Cell,
        new: Sequence[int],
        source: "KVCache | HostAttention",
        old: Sequence[int],
        filled: int,
    ) -> None:
        """Copy rows `old` of one cell to the consecutive rows `new` of another."""
        g = self.policy.micro_batch
        target = cell.cache or self._buffers[-1].contents
        part = target.part(slice(new[0] % g, new[-1] % g + 1))
        part.take(source, torch.tensor(old) % g, filled)

    @contextlib.contextmanager
    def _read(self, cell: Cell) -> Iterator["KVCache | HostAttention"]:
        """Yield a cell as a cache; one that moves is read into the first buffer."""
        if cell.cache is not None:
            yield cell.cache
            return
        buffer = self._buffers[0]
        self._fetch(cell, buffer).result()
        yield buffer.contents
        buffer.last_use = record_event(self.device)

    def _write(self, cell: Cell, filled: int) -> None:
        """Write the last buffer to a cell that moves. If only one cell moves, the last buffer is
        also the first."""
        cell.filled = filled
        if cell.cache is None:
            buffer = self._buffers[-1]
            buffer.last_use = record_event(self.device)
            self._store(cell, buffer, 0)
            cell.stored.result()

    def _ring_over(self, K: int) -> Ring[Cell]:
        """Return the ring over the cells of the first K micro-batches."""
        if self._in_ring != K:
            for worker in (self._reader, self._writer):
                worker.submit(lambda: None).result()  # one thread: all earlier transfers have ended
            moving = [c for cache in self for c in cache.cells[:K] if c.cache is None]
            buffers = self._buffers[: len(moving)]
            self._ring = Ring(moving, buffers, self._fetch, self._wait_time, self.policy.overlap)
            self._in_ring = K
        return self._ring

    def _written(self, k: int, pos: Tensor) -> tuple[int, int]:
        """Return the first position that micro-batch k writes to, and the end of the last."""
        if pos is not self._pos:  # once for all layers, because tolist waits for the device
            bounds = torch.stack((pos.amin(1), pos.amax(1) + 1), dim=1).tolist()  # of each row
            g = self.policy.micro_batch
            groups = (bounds[start : start + g] for start in range(0, len(bounds), g))
            self._spans = [(min(a for a, _ in rows), max(b for _, b in rows)) for rows in groups]
            self._pos = pos
        return self._spans[k]

    def _fetch(self, cell: Cell, buffer: Buffer) -> Future:
        def read() -> None:
            for pending in (buffer.stored, cell.stored):  # writes from this buffer; to this cell
                if pending:
                    pending.result()
            cell.store.read(self._allocator.pieces(cell, buffer.parts, 0, cell.filled))

        return self._reader.submit(read, buffer.last_use)

    def _store(self, cell: Cell, buffer: Buffer, first: int) -> None:
        pieces = self._allocator.pieces(cell, buffer.parts, first, cell.filled)
        written = self._writer.submit(lambda: cell.store.write(pieces), buffer.last_use)
        cell.stored = buffer.stored = written


class TieredCache:
    """The cells of one layer, used one micro-batch at a time by `opened`."""

    def __init__(self, caches: TieredCaches, cells: Sequence[Cell]):
        self._caches, self.cells, self.row_granularity = caches, cells, caches.policy.micro_batch
        self.rows, self.length, self.device = caches.rows, caches.length, caches.device

    @contextlib.contextmanager
    def opened(self, rows: slice, pos: Tensor) -> Iterator["KVCache | HostAttention"]:
        """Yield the cache of the rows of one micro-batch. pos: (B, T), where all rows write."""
        k = rows.start // self.row_granularity
        with self._caches.acquire(self.cells[k], k, pos) as cache:
            yield cache.part(slice(0, rows.stop - rows.start))

    def first(self, count: int) -> "TieredCache":
        """Return the same memory, restricted to the first `count` rows."""
        first = copy.copy(self)
        first.rows = count
        return first

    def compacted(self, rows: Sequence[int], filled: int) -> "TieredCache":
        """Move these rows, in ascending order, to the front and return them as a cache."""
        self._caches.compact(self.cells, rows, filled)
        return self.first(len(rows))

    def keep(self, filled: int) -> None:
        """Discard the positions from `filled` on, so that they are not fetched any more."""
        for cell in self.cells:
            cell.filled = min(cell.filled, filled)

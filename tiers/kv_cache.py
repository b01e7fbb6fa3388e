"""KV caches whose parts lie on the device, in host memory or on disk.

Start at TieredCaches, which takes the place of a list with one KVCache for each layer. The caches
are cut into cells, one for each layer and micro-batch (rows that pass through a layer together),
each on one tier: device, host memory or disk. A resident cell is used where it is. Any other cell
moves: its bytes are in a store (host memory or a file). They are read into a prefetch buffer while
the device computes with earlier cells, and are used there as a KVCache; then the new slots are
written back to the store. A Prefetcher uses the buffers in turn (prefetch.py). With attention on
the host (host_attention.py), cells in host memory are resident, and cells on disk are read into
host memory. Cells of layers with a sliding window are smaller: they are rings (KVCache.ring), with
fewer slots than positions.

Based on FlexGen (arXiv 2303.06865, section 4.2).

Shapes: B rows, K micro-batches, g rows of a micro-batch, T new tokens, S slots of a row.
"""

import contextlib
import copy
import gc
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from host.memory import BLOCK_BYTES, page_aligned, round_up_to_block
from host.torch_private import copy_with_buffers
from layers.kv_cache import Cache, KVCache
from model import Transformer
from tiers.direct_io import ScratchFile
from tiers.host_attention import HostAttention, SparseHostAttention
from tiers.policy import CACHE_BUFFERS, Policy
from tiers.prefetch import (
    CPU,
    META,
    BouncedFile,
    Buffer,
    HostMemory,
    Layout,
    Parts,
    Prefetcher,
    Store,
    TransferWorker,
    WaitTime,
    record_event,
)


def tiered_caches(
    model: Transformer, policy: Policy, rows: int, length: int, wait_time: WaitTime | None = None
) -> Sequence[Cache]:
    """Return empty caches of all layers, of `length` positions for each of `rows` rows, on the
    policy's tiers. If the device holds all of them, they are ordinary KVCaches. Called for each
    block of texts, by load.py's place_caches.

    wait_time: the seconds that computation waits for cells are added to it. Raises ValueError if
    the disk is too full.
    """
    if policy.cache.device == 100:
        return model.make_caches(rows, length)
    gc.collect()  # frees memory and disk of earlier caches, which are in reference cycles
    return TieredCaches(model, policy, rows, length, wait_time)


class CellKind:
    """What the cells (see Cell) of all layers with the same sliding window, or with none, have in
    common: their layout in memory, and how caches are built on it.

    Each tensor of a cell (keys, values and, if quantised, scales) is ordered by slot, then by row.
    So its filled slots are one range of bytes; the new slots of a step are a short range if the
    rows have similar lengths. layout: of these tensors, (slots, rows, ...). ring: see KVCache.
    slots: the usable slots of a row, in a ring fewer than positions; one more is allocated
    (Transformer.make_caches).
    """

    def __init__(self, model: Transformer, policy: Policy, length: int, window: int | None):
        """Find the layout of a cell of `length` positions; allocates nothing. window: the sliding
        window of the layers, None: they have none.

        _template: a KVCache without memory, copied for caches on the model's device;
        _host_template: for caches whose attention the host computes. _slot_bytes: the bytes of one
        slot of all rows, by tensor.
        """
        args, weight, factory = model.args, model.tok_embeddings.weight, model.cache_factory
        self.policy, self.device = policy, weight.device
        shape = (policy.micro_batch, length + 1, args.n_kv_heads, args.head_dim)
        given = shape, weight.dtype, META, window
        self._template, self._host_template = factory(*given), factory.portable()(*given)
        self.ring, self.slots = self._template.ring, factory.slots(length, window)
        by_slot = {n: t.transpose(0, 1) for n, t in self._template.named_buffers()}  # (S, g, ...)
        self.layout = Layout(by_slot)
        self._slot_bytes = {name: tensor[0].nbytes for name, tensor in by_slot.items()}

    def cache(self, parts: Parts, device: torch.device) -> "KVCache | HostAttention":
        """Return a cache of one micro-batch whose tensors share the memory of `parts`, which may be
        longer than the layout.

        device: where the parts are. If this is the host and the model is on a GPU, the cache is a
        HostAttention, which a block on the GPU can use. With policy.cpu_attention and an
        attention_share below 1, a cache on the host is a SparseHostAttention, also for a model on a
        CPU.
        """
        tensors = {n: t.transpose(0, 1) for n, t in self.layout.view(parts).items()}  # (g, S, ...)
        template = self._template if device == self.device else self._host_template
        cache = copy_with_buffers(template, tensors)
        if self.policy.attention_share < 1 and self.policy.cpu_attention and device == CPU:
            return SparseHostAttention(cache, self.policy.attention_share)
        return cache if device == self.device else HostAttention(cache)

    def resident(self, device: torch.device) -> "KVCache | HostAttention":
        """Allocate a cache that stays in this device's memory."""
        return self.cache(self.layout.allocate(device), device)

    def pieces(self, parts: Parts, first: int, end: int) -> list[tuple[int, Tensor]]:
        """Return the pairs that Store.read and Store.write take for slots first to end - 1 of a
        cell: for each tensor, the offset from the cell's first byte, and the piece of `parts`.

        A piece is extended to multiples of BLOCK_BYTES, which O_DIRECT needs. So a write also
        covers neighbouring slots: their bytes in `parts` must equal the bytes in the store, except
        for slots that have no contents yet. parts: of a prefetch buffer.
        """
        pieces = []
        for name, offset in self.layout.offsets.items():
            start = first * self._slot_bytes[name] // BLOCK_BYTES * BLOCK_BYTES
            stop = round_up_to_block(end * self._slot_bytes[name])
            pieces.append((offset + start, parts[name][start:stop]))
        return pieces


@dataclass(eq=False)
class Cell:
    """Keys and values of one layer for one micro-batch: a resident cache, or bytes in a store."""

    kind: CellKind
    cache: "KVCache | HostAttention | None" = None  # None: the bytes are in the store
    store: Store | None = None
    offset: int = 0  # the cell's first byte in the store
    filled: int = 0  # the number of first slots that have contents, the same for all rows
    stored: Future | None = None  # the pending write of new slots to the store

    def pieces(self, buffer: Buffer, first: int, end: int) -> list[tuple[int, Tensor]]:
        """Return the pairs for slots first to end - 1: an offset in the store, and a piece of the
        buffer's memory. See CellKind.pieces."""
        pieces = self.kind.pieces(buffer.parts, first, end)
        return [(self.offset + offset, piece) for offset, piece in pieces]


class CellAllocator:
    """Allocates cells on their tiers, and the buffers into which cells are fetched.

    kinds: the kind of each layer's cells. layout: the layout of the largest cell.
    """

    def __init__(self, model: Transformer, policy: Policy, length: int):
        """Find the kinds of cells; allocates nothing yet. length: usable positions of a row."""
        self.policy, self.device = policy, model.tok_embeddings.weight.device
        windows = [layer.window for layer in model.args.layer_types]
        by_window = {w: CellKind(model, policy, length, w) for w in set(windows)}
        self.kinds = [by_window[window] for window in windows]
        self.layout = max((kind.layout for kind in self.kinds), key=lambda layout: layout.nbytes)

    def cells(self, kinds: Sequence[CellKind], tiers: Sequence[str]) -> list[Cell]:
        """Allocate cells: cell n has kinds[n] and is on the tier tiers[n]; cells on disk share one
        scratch file. Raises ValueError if the disk is too full."""
        pairs = list(zip(kinds, tiers, strict=True))
        # The offset of each cell in the file, and the length of the file.
        sizes = (kind.layout.nbytes for kind, tier in pairs if tier == "disk")
        *offsets, nbytes = itertools.accumulate(sizes, initial=0)
        file, offsets = self._scratch_store(nbytes) if nbytes else None, iter(offsets)
        make = {
            "device": lambda kind: Cell(kind, kind.resident(self.device)),
            "host": self._host_cell,
            "disk": lambda kind: Cell(kind, store=file, offset=next(offsets)),
        }
        return [make[tier](kind) for kind, tier in pairs]

    def _host_cell(self, kind: CellKind) -> Cell:
        """Allocate a cell in host memory: resident if the host computes the attention, else bytes
        that are copied to the device before each use."""
        if self.policy.cpu_attention:
            return Cell(kind, kind.resident(CPU))
        pin = self.policy.pins(self.device)
        return Cell(kind, store=HostMemory(page_aligned(kind.layout.nbytes, CPU, pin)))

    def _scratch_store(self, nbytes: int) -> Store:
        """Return a store of `nbytes` bytes in a scratch file. A GPU cannot read a file directly:
        for a GPU the bytes pass through one bounce buffer, as large as the largest cell. Raises
        ValueError if the disk is too full."""
        scratch = ScratchFile(self.policy.directory, nbytes)
        if self._fetches_to_host():
            return scratch
        pin = self.policy.pins(self.device)
        return BouncedFile(scratch, [page_aligned(self.layout.nbytes, CPU, pin)])

    def buffer(self) -> Buffer:
        """Allocate a prefetch buffer: memory of the largest cell, and for each kind of cell a cache
        whose tensors share this memory. It is on the device, or on the host if the host computes
        the attention."""
        device = CPU if self._fetches_to_host() else self.device
        parts = self.layout.allocate(device)
        caches = {kind: kind.cache(parts, device) for kind in set(self.kinds)}
        return Buffer(parts, caches, record_event(self.device))

    def _fetches_to_host(self) -> bool:
        """Return whether the prefetch buffers are in host memory, so that files are read directly
        into them: if the model is on a CPU, or the host computes the attention."""
        return self.device.type == "cpu" or self.policy.cpu_attention


class TieredCaches(Sequence["TieredCache"]):
    """The caches of all layers, with the prefetcher and the threads that move their cells.

    The prefetcher's order is the order of use: for each layer, its cells that are not resident, one
    for each micro-batch in use. The same order repeats at each step.
    rows: how many rows a block of rows has. length: the usable positions of a row. wait_time:
    the seconds that computation waits for cells are added to it.
    """

    def __init__(
        self,
        model: Transformer,
        policy: Policy,
        rows: int,
        length: int,
        wait_time: WaitTime | None = None,
    ):
        """Allocate all cells, on the policy's tiers, and the prefetch buffers. K: micro-batches.

        Raises ValueError if the disk is too full. The prefetcher has no cells until the first cell
        that is not resident is acquired.
        """
        allocator = CellAllocator(model, policy, length)
        self.policy, self.device = policy, allocator.device
        self.rows, self.length = rows, length
        K = -(-rows // policy.micro_batch)
        kinds = [kind for kind in allocator.kinds for _ in range(K)]
        tiers = policy.cache.tiers_by_size([kind.slots for kind in kinds])
        cells = allocator.cells(kinds, tiers)
        self._caches = [TieredCache(self, cells[n : n + K]) for n in range(0, len(cells), K)]
        moving = [cell for cell in cells if cell.cache is None]
        self._prefetch_buffers = [allocator.buffer() for _ in moving[:CACHE_BUFFERS]]
        self._reader = TransferWorker(self.device, "cache in")
        self._writer = TransferWorker(self.device, "cache out")
        self._wait_time = wait_time or WaitTime()
        self._prefetcher = Prefetcher((), (), self._fetch, self._wait_time)
        self._prefetched_micro_batches = 0
        # For each kind of cell: the latest `pos` of `_written_span`, and the spans for it, one for
        # each micro-batch.
        self._spans: dict[CellKind, tuple[Tensor, list[tuple[int, int]]]] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, j: int) -> "TieredCache":
        return self._caches[j]

    @contextlib.contextmanager
    def acquire(self, cell: Cell, k: int, pos: Tensor) -> Iterator["KVCache | HostAttention"]:
        """Yield the cell of micro-batch k as a cache; on exit, start to write its new slots to the
        store. The write has ended on exit only if the policy does not overlap.

        cell: cells[k] of the layer that is computed now. Cells must be acquired in the prefetcher's
        order to be prefetched. pos: (B, T), the slots in which each row of the batch writes.
        """
        if cell.cache is not None:
            yield cell.cache
            return
        K = -(-len(pos) // self.policy.micro_batch)  # micro-batches in use
        with self._prefetcher_for(K).acquire(cell) as buffer:
            try:
                yield buffer.contents[cell.kind]
            finally:  # even after an error the device may still use the buffer
                buffer.last_use = record_event(self.device)
            first, end = self._written_span(cell.kind, k, pos)
            cell.filled = max(cell.filled, end)
            self._store(cell, buffer, first, end)
            if not self.policy.overlap:
                cell.stored.result()

    def compact(self, cells: Sequence[Cell], rows: Sequence[int], filled: int) -> None:
        """Move rows of one layer to the front, because the other rows have ended.

        cells: the layer's cells. rows: the old numbers of the rows, ascending; row rows[i] becomes
        row i. filled: the number of first slots that are copied for each row.
        The old cells are read in order, and the new cells are built from them one at a time. No row
        gets a higher number, so a cell is read before it is overwritten. Cells that are not
        resident are read into the first buffer and built in the last one.
        k: the number of the old cell, m: of the new one.
        """
        g = self.policy.micro_batch
        self._prefetcher_for(0)  # drops prefetched cells, whose rows have the old numbers
        # Rows that keep their numbers come first; those in whole cells need no copy.
        unmoved = sum(i == row for i, row in enumerate(rows)) // g * g
        for k, moves in groupby(enumerate(rows[unmoved:], unmoved), lambda move: move[1] // g):
            with self._read(cells[k]) as source:
                for m, group in groupby(moves, lambda move: move[0] // g):
                    new, old = zip(*group, strict=True)
                    self._take_rows(cells[m], new, source, old, filled)
                    # Write the new cell once its last row is there.
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
        """Copy the first `filled` slots of rows `old` of the source to rows `new` of a cell, or to
        the last buffer if the cell is not resident; `_write` then stores that buffer. For
        `compact`.

        source: the cache of the old cell. old, new: row numbers in the batch. All rows `old` are in
        the old cell; all rows `new` are in `cell` and are consecutive.
        """
        g = self.policy.micro_batch
        target = cell.cache or self._prefetch_buffers[-1].contents[cell.kind]
        target_rows = target.part(slice(new[0] % g, new[-1] % g + 1))
        target_rows.take(source, torch.tensor(old) % g, filled)

    @contextlib.contextmanager
    def _read(self, cell: Cell) -> Iterator["KVCache | HostAttention"]:
        """Yield a cell as a cache, for `compact`. If it is not resident, it is read into the first
        buffer; the prefetcher must not use it (`_prefetcher_for(0)`)."""
        if cell.cache is not None:
            yield cell.cache
            return
        buffer = self._prefetch_buffers[0]
        self._fetch(cell, buffer).result()
        yield buffer.contents[cell.kind]
        buffer.last_use = record_event(self.device)

    def _write(self, cell: Cell, filled: int) -> None:
        """Declare `filled` slots of a cell filled, for `compact`. If the cell is not resident,
        write the last buffer, which holds its new rows, to its store and wait for the write."""
        cell.filled = filled
        if cell.cache is None:
            buffer = self._prefetch_buffers[-1]
            buffer.last_use = record_event(self.device)
            self._store(cell, buffer, 0, filled)
            cell.stored.result()

    def _prefetcher_for(self, K: int) -> Prefetcher[Cell]:
        """Return the prefetcher of the cells of the first K micro-batches of all layers.

        A new one is made if K has changed, because fewer rows are in use, and after `compact`. It
        drops the cells that the old one has prefetched, after all transfers have ended. K = 0 makes
        one without cells: nothing is prefetched, and the buffers are free for other uses.
        """
        if self._prefetched_micro_batches != K:
            # A worker has one thread, so all earlier transfers end before this result.
            for worker in (self._reader, self._writer):
                worker.submit(lambda: None).result()
            moving = [c for cache in self for c in cache.cells[:K] if c.cache is None]
            self._prefetcher = Prefetcher(
                moving,
                self._prefetch_buffers[: len(moving)],
                self._fetch,
                self._wait_time,
                self.policy.overlap,
            )
            self._prefetched_micro_batches = K
        return self._prefetcher

    def _written_span(self, kind: CellKind, k: int, pos: Tensor) -> tuple[int, int]:
        """Return the first slot that micro-batch k writes, and one past the last. Where the slots
        of a ring begin again at 0, the span covers all slots.

        pos: (B, T), the slots that each row writes. tolist waits for the device, so the result is
        computed once for all layers of a kind, which are called with the same tensor object.
        """
        if kind not in self._spans or self._spans[kind][0] is not pos:
            row_spans = torch.stack((pos.amin(1), pos.amax(1) + 1), dim=1).tolist()  # (B, 2)
            g = self.policy.micro_batch
            groups = (row_spans[start : start + g] for start in range(0, len(row_spans), g))
            spans = [(min(a for a, _ in rows), max(b for _, b in rows)) for rows in groups]
            self._spans[kind] = pos, spans
        return self._spans[kind][1][k]

    def _fetch(self, cell: Cell, buffer: Buffer) -> Future:
        """Start to read a cell's filled slots into a buffer; return a future of the read.

        The cell must not be resident. The read begins when the device has finished with the buffer,
        and pending writes have ended: the last write from the buffer, which the read would
        overwrite, and the last write to the cell, which the read needs.
        """

        def read() -> None:
            for pending in (buffer.stored, cell.stored):
                if pending:
                    pending.result()
            cell.store.read(cell.pieces(buffer, 0, cell.filled))

        return self._reader.submit(read, buffer.last_use)

    def _store(self, cell: Cell, buffer: Buffer, first: int, end: int) -> None:
        """Start to write slots first to end - 1 of a cell from a buffer to the cell's store. The
        write begins when the device has finished with the buffer; `cell.stored` and `buffer.stored`
        are its future."""
        pieces = cell.pieces(buffer, first, end)
        written = self._writer.submit(lambda: cell.store.write(pieces), buffer.last_use)
        cell.stored = buffer.stored = written


class TieredCache:
    """The cache of one layer: cells, one for each micro-batch. It implements layers.kv_cache.Cache.

    row_granularity: rows of a micro-batch. rows: those in use, which `first` reduces in a view.
    """

    def __init__(self, caches: TieredCaches, cells: Sequence[Cell]):
        self._caches, self.cells, self.row_granularity = caches, cells, caches.policy.micro_batch
        self.rows, self.length, self.device = caches.rows, caches.length, caches.device
        self.ring = cells[0].kind.ring

    @contextlib.contextmanager
    def opened(self, rows: slice, pos: Tensor) -> Iterator["KVCache | HostAttention"]:
        """Yield the cache of one micro-batch for a block to use; on exit, start to write its new
        slots back.

        rows: the rows of the micro-batch, whose first is a multiple of policy.micro_batch. pos:
        (B, T), the slots in which each row of the batch writes.
        """
        k = rows.start // self.row_granularity
        with self._caches.acquire(self.cells[k], k, pos) as cache:
            yield cache.part(slice(0, rows.stop - rows.start))

    def first(self, count: int) -> "TieredCache":
        """Return a view of the first `count` rows: a cache with the same cells."""
        view = copy.copy(self)
        view.rows = count
        return view

    def compacted(self, rows: Sequence[int], filled: int) -> "TieredCache":
        """Move rows, whose numbers must ascend, to the front; return a view of them. Only their
        first `filled` positions are copied. The contents of other rows are lost. Called by
        decoding.py when enough texts have ended that computing only the others is faster."""
        self._caches.compact(self.cells, rows, min(filled, self.cells[0].kind.slots))
        return self.first(len(rows))

    def keep(self, filled: int) -> None:
        """Discard the positions from `filled` on, so that later reads of the cells are shorter.
        Called before a prompt is read, with the number of its leading tokens that the cache has.
        Also right for a ring: slot s holds a position of at least s, or padding."""
        for cell in self.cells:
            cell.filled = min(cell.filled, filled)

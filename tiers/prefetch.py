"""Prefetch: buffers on a device, the stores that fill them, and the threads that copy.

Start at Prefetcher: items (layers, or cells of the KV cache) are used in an order that repeats.
While the device computes with one item, the next ones are fetched into the other buffers. A Store
holds the bytes: host memory, or a file (direct_io.py), which a GPU reads through pinned host
memory. A TransferWorker has the threads that copy the bytes, on a GPU in a CUDA stream of their
own. No call synchronizes the whole device, and no memory is allocated after a Prefetcher is made.

A cell is the KV cache of one layer for one group of rows. A piece is a tensor of bytes that is
filled from a store or written to it, and comes in a pair with its offset in the store (Pieces).
Memory that is pinned is never moved by the system, so that a GPU can copy from it by itself.

FlexGen (arXiv 2303.06865, section 4.1) overlaps transfers and computation in the same way, but
waits for all transfers after every step. Here a wait concerns one buffer (Buffer.last_use).
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from host.memory import page_aligned, round_up_to_block
from tiers.direct_io import Pieces

CPU, META = torch.device("cpu"), torch.device("meta")
MAX_COPY_BYTES = 2**25  # of one copy to a GPU, which takes about 0.5 ms by PCIe
Item = TypeVar("Item", bound=Hashable)
Parts = dict[str, Tensor]  # for each tensor, by its name: its bytes, in whole blocks
Event = torch.cuda.Event | None  # marks the end of work on a CUDA stream; None on a CPU


class Layout:
    """The offsets of tensors that lie one after the other in memory or in a file.

    Each offset is a multiple of BLOCK_BYTES, as O_DIRECT needs. tensors: shapes and dtypes only, on
    the meta device. nbytes: the length of the whole, a multiple of BLOCK_BYTES. A layer's weights
    have a Layout (offload.block_layout), and so have cells (kv_cache.py).
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        """tensors: by name, in the order of their offsets; only shapes and dtypes are used."""
        self.tensors = {
            n: torch.empty(t.shape, dtype=t.dtype, device=META) for n, t in tensors.items()
        }
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, tensor in self.tensors.items():
            self.offsets[name] = self.nbytes
            self.nbytes += round_up_to_block(tensor.nbytes)

    def allocate(self, device: torch.device) -> Parts:
        """Return zeroed memory for each tensor. Each is allocated separately, because torch.compile
        treats views of one base as aliases."""
        sizes = {name: round_up_to_block(tensor.nbytes) for name, tensor in self.tensors.items()}
        return {name: page_aligned(size, device) for name, size in sizes.items()}

    def split(self, memory: Tensor) -> Parts:
        """Cut memory, `nbytes` bytes as uint8, into the bytes of each tensor; the parts are
        views."""
        ends = (
            at + round_up_to_block(self.tensors[name].nbytes) for name, at in self.offsets.items()
        )
        return {n: memory[at:end] for (n, at), end in zip(self.offsets.items(), ends, strict=True)}

    def view(self, parts: Parts) -> dict[str, Tensor]:
        """Return the tensors, in their shapes and dtypes, as views of the parts' memory. Parts may
        be longer than the tensors."""
        pairs = self.tensors.items()
        return {n: parts[n][: t.nbytes].view(t.dtype).view(t.shape) for n, t in pairs}


class Store(Protocol):
    """Bytes that are read and written in pieces. pieces: pairs of an offset in the store and a
    uint8 tensor, the piece, which is filled from the store or written to it. A file may need
    offsets and lengths at multiples of BLOCK_BYTES."""

    def read(self, pieces: Pieces) -> None: ...

    def write(self, pieces: Pieces) -> None: ...


class HostMemory:
    """A store in memory, usually of the host: a uint8 tensor. To or from a GPU, copies may still
    run on the current CUDA stream when a call returns."""

    def __init__(self, memory: Tensor):
        self.memory = memory

    def read(self, pieces: Pieces) -> None:
        """Fill each piece from the offset with which it is paired. To a GPU, a copy has at most
        MAX_COPY_BYTES, so that other threads' copies need not wait for a whole layer. On a CPU the
        bytes have arrived when the call returns."""
        for offset, piece in pieces:
            source = self.memory[offset : offset + len(piece)]
            size = MAX_COPY_BYTES if piece.is_cuda else max(1, len(piece))  # split takes no 0
            for target_cut, source_cut in zip(piece.split(size), source.split(size), strict=True):
                target_cut.copy_(source_cut, non_blocking=True)

    def write(self, pieces: Pieces) -> None:
        for offset, piece in pieces:
            self.memory[offset : offset + len(piece)].copy_(piece, non_blocking=True)


class BouncedFile:
    """A store in a file, for pieces in a GPU's memory. No file can be read into that memory
    directly, so the bytes pass through bounce buffers: host memory."""

    def __init__(self, file: Store, buffers: Sequence[Tensor]):
        """buffers: the bounce buffers, each as long as all pieces of the longest call of `read` or
        `write`. A call waits for a free one, so as many calls run at once as there are buffers."""
        self.file, self._bounce_buffers = file, SimpleQueue()
        for buffer in buffers:
            self._bounce_buffers.put(buffer)

    def read(self, pieces: Pieces) -> None:
        """Fill each piece from the file; return when the bytes are on the GPU."""
        with self._with_host_memory(pieces) as triples:
            self.file.read([(offset, host) for offset, _, host in triples])
            for _, piece, host in triples:
                piece.copy_(host, non_blocking=True)

    def write(self, pieces: Pieces) -> None:
        """Write each piece to the file; return when the bytes are written."""
        with self._with_host_memory(pieces) as triples:
            for _, piece, host in triples:
                host.copy_(piece)
            self.file.write([(offset, host) for offset, _, host in triples])

    @contextlib.contextmanager
    def _with_host_memory(self, pieces: Pieces) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Yield a triple for each piece: its offset in the file, the piece, and host memory of the
        same length, cut from one buffer. The pieces together must fit into it.

        On exit, wait for the copies of the current CUDA stream, then free the buffer for other
        calls. pieces: read once, so that an iterator is enough.
        """
        buffer, triples, at = self._bounce_buffers.get(), [], 0
        for offset, piece in pieces:
            triples.append((offset, piece, buffer[at : at + len(piece)]))
            at += len(piece)
        try:
            yield triples
            if torch.cuda.is_available():  # tests use this class on a CPU
                torch.cuda.current_stream().synchronize()
        finally:
            self._bounce_buffers.put(buffer)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor on a device, or the tensor if it is there. To a GPU, the copy is
    queued on the current CUDA stream, and the call does not wait for it.

    A pinned tensor must not change until the copy ends. Any other tensor is first copied to pinned
    memory, because a copy from memory that is not pinned would wait for the stream.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def record_event(device: torch.device) -> Event:
    """Return an event that marks the end of the work now queued on the device's current stream;
    None on a CPU, where a call returns when its work has ended."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class TransferWorker:
    """One or more threads that share one CUDA stream, on which they copy bytes while the model
    computes on another stream. On a CPU, threads only."""

    def __init__(self, device: torch.device, name: str, threads: int = 1):
        self._threads = ThreadPoolExecutor(threads, name)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, transfer: Callable[[], Any], after: Event = None) -> Future:
        """Call `transfer` in a thread of this worker; return a future that is done when the bytes
        have arrived.

        after: the worker's stream waits for this event before the first copy, because earlier work
        on the GPU still uses the memory. Only copies wait: a transfer that first reads a file reads
        it at once. None: no wait. The future has no value; it raises the transfer's error.
        """
        return self._threads.submit(self._run, transfer, after)

    def _run(self, transfer: Callable[[], Any], after: Event) -> None:
        """Run a transfer in a thread of this worker, and wait until its copies have ended. after:
        see submit."""
        stream = torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()
        with torch.inference_mode(), stream:
            if after:
                self._stream.wait_event(after)
            transfer()
            if self._stream:
                self._stream.synchronize()


class ComputeWorkers:
    """Threads that launch computations on a device, so that several micro-batches are computed at
    the same time (offload.py). On a GPU each uses the current stream of the thread that submits
    it."""

    def __init__(self, device: torch.device, name: str, threads: int):
        self._device, self._threads = device, ThreadPoolExecutor(threads, name)

    def submit(self, launch: Callable[[], Any]) -> Future:
        """Call `launch` in a thread; return a future of its result. The future is done when
        `launch` has returned: a GPU may still compute."""
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        return self._threads.submit(self._run, launch, stream)

    def _run(self, launch: Callable[[], Any], stream: "torch.cuda.Stream | None") -> Any:
        """Call `launch` in this thread with `stream` as the current CUDA stream. None: on a CPU."""
        in_stream = torch.cuda.stream(stream) if stream else contextlib.nullcontext()
        with torch.inference_mode(), in_stream:
            return launch()


@dataclass
class Buffer:
    """A prefetch buffer. contents: the object built on its memory, such as a block or a cache."""

    parts: Parts
    contents: Any
    last_use: Event = None  # marks the end of the last computation that uses the buffer
    stored: Future | None = None  # the pending write of its contents to their store


@dataclass
class WaitTime:
    """The seconds that the computing thread has waited for items that had not arrived."""

    seconds: float = 0.0


class Prefetcher(Generic[Item]):
    """Fills buffers with items before they are needed.

    The items are used in an order that repeats. Each buffer holds one item: a layer, a cell of the
    KV cache, or a chunk of the neuron file (neurons/source.py).
    """

    def __init__(
        self,
        order: Sequence[Item],
        buffers: Sequence[Buffer],
        fetch: Callable[[Item, Buffer], Future],
        wait_time: WaitTime,
        prefetch: bool = True,
    ):
        """order: the items in the order of use, each once. buffers: at most as many as items.
        fetch: starts to read an item into a buffer; returns a future of the read. The read must
        wait until the device has finished with the buffer (its last_use).
        wait_time: the seconds that `acquire` waits are added to it. prefetch: False: fetch an item
        only when it is acquired."""
        self._order, self._fetch = order, fetch
        self._index = {item: n for n, item in enumerate(order)}
        # _free: buffers without an item. _fetched: (item, buffer, future of the read), in the order
        # of use; the read may still run. _next: the index of the next item to fetch.
        self._free, self._fetched = deque(buffers), deque()
        self._next, self._prefetch = 0, prefetch
        self._wait_time = wait_time

    @contextlib.contextmanager
    def acquire(self, item: Item) -> Iterator[Buffer]:
        """Yield the buffer that holds this item, when its fetch has ended. On exit, start to fetch
        the next item in order that no buffer holds, unless prefetch is False.

        If the item is not the next one in order, for example after an error, drop the fetched items
        and fetch this one. Before the exit, the caller must set buffer.last_use. Raises the error
        of the fetch. One thread at a time may use a Prefetcher, but several items may be acquired
        at once if there are as many buffers.
        """
        if not self._fetched or self._fetched[0][0] != item:
            self._restart_at(item)
        _, buffer, arrival = self._fetched.popleft()
        try:
            start = time.perf_counter()
            arrival.result()
            self._wait_time.seconds += time.perf_counter() - start
            yield buffer
        finally:
            self._free.append(buffer)
            self._fetch_next(1 if self._prefetch else 0)

    def _restart_at(self, item: Item) -> None:
        """Drop the fetched items; start to fetch `item` and the items after it into all free
        buffers, or only `item` if prefetch is False. Called by `acquire` if `item` is not the next
        fetched item: at the first use, after an interrupted order, and always without prefetch."""
        for _, buffer, arrival in self._fetched:
            arrival.exception()  # waits, because the buffer is being written to
            self._free.append(buffer)
        self._fetched.clear()
        self._next = self._index[item]
        self._fetch_next(len(self._free) if self._prefetch else 1)

    def _fetch_next(self, count: int) -> None:
        """Start to fetch the next `count` items in order; at least `count` buffers must be free."""
        for _ in range(count):
            item, buffer = self._order[self._next], self._free.popleft()
            self._fetched.append((item, buffer, self._fetch(item, buffer)))
            self._next = (self._next + 1) % len(self._order)

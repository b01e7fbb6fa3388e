"""Prefetch: a ring of buffers on a device, the stores that fill it, and the threads that copy.

Start at Ring: items are used in an order that repeats, and while one is computed with, the next
ones are fetched into the other buffers. A Store holds the bytes: host memory, or a file
(direct_io.py), which a GPU reads through pinned memory. A TransferWorker is the thread that copies
them, with a CUDA stream of its own on a GPU. No call synchronizes the whole device, and nothing is
allocated after a ring is made.

FlexGen (arXiv 2303.06865, section 4.1) overlaps transfers and computation in the same way, with a
barrier after every step. Here each buffer has an event of its own.
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
COPY_PIECE_BYTES = 2**25  # half a millisecond on the link to a GPU
Item = TypeVar("Item", bound=Hashable)
Parts = dict[str, Tensor]  # the bytes of each tensor by its name
Event = torch.cuda.Event | None  # recorded after work was given to a GPU; None: on a CPU


class Layout:
    """Offsets of tensors in memory or in a file, which are multiples of BLOCK_BYTES."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """tensors: examples of the shapes and dtypes, on any device."""
        self.tensors = {
            n: torch.empty(t.shape, dtype=t.dtype, device=META) for n, t in tensors.items()
        }
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, tensor in self.tensors.items():
            self.offsets[name] = self.nbytes
            self.nbytes += round_up_to_block(tensor.nbytes)

    def allocate(self, device: torch.device) -> Parts:
        """Allocate each tensor separately: a compiler must not see one base for all of them."""
        sizes = {name: round_up_to_block(tensor.nbytes) for name, tensor in self.tensors.items()}
        return {name: page_aligned(size, device) for name, size in sizes.items()}

    def split(self, slab: Tensor) -> Parts:
        """Cut one piece of `nbytes` bytes into parts."""
        ends = (
            at + round_up_to_block(self.tensors[name].nbytes) for name, at in self.offsets.items()
        )
        return {n: slab[at:end] for (n, at), end in zip(self.offsets.items(), ends, strict=True)}

    def view(self, parts: Parts) -> dict[str, Tensor]:
        """Return the tensors that share the memory of these parts."""
        pairs = self.tensors.items()
        return {n: parts[n][: t.nbytes].view(t.dtype).view(t.shape) for n, t in pairs}


class Store(Protocol):
    """Bytes on another tier. A file may require that pieces are whole blocks."""

    def read(self, pieces: Pieces) -> None: ...

    def write(self, pieces: Pieces) -> None: ...


class HostMemory:
    """A store in host memory. On a CUDA stream, copies may still run when a call returns.

    A copy to a GPU is cut into pieces, so that copies of other threads do not wait for a layer.
    """

    def __init__(self, slab: Tensor):
        self.slab = slab

    def read(self, pieces: Pieces) -> None:
        for offset, piece in pieces:
            source = self.slab[offset : offset + len(piece)]
            size = COPY_PIECE_BYTES if piece.is_cuda else max(1, len(piece))
            for to, part in zip(piece.split(size), source.split(size), strict=True):
                to.copy_(part, non_blocking=True)

    def write(self, pieces: Pieces) -> None:
        for offset, piece in pieces:
            self.slab[offset : offset + len(piece)].copy_(piece, non_blocking=True)


class BounceBuffer:
    """A file used by a device that files cannot be read into: bytes pass through host memory."""

    def __init__(self, file: Store, buffers: Sequence[Tensor]):
        """buffers: host memory, each as long as the longest transfer; one per concurrent call."""
        self.file, self._buffers = file, SimpleQueue()
        for buffer in buffers:
            self._buffers.put(buffer)

    def read(self, pieces: Pieces) -> None:
        with self._bounced(pieces) as bounced:
            self.file.read([(offset, host) for offset, _, host in bounced])
            for _, piece, host in bounced:
                piece.copy_(host, non_blocking=True)

    def write(self, pieces: Pieces) -> None:
        with self._bounced(pieces) as bounced:
            for _, piece, host in bounced:
                host.copy_(piece)
            self.file.write([(offset, host) for offset, _, host in bounced])

    @contextlib.contextmanager
    def _bounced(self, pieces: Pieces) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Yield (offset, piece, host memory) for each piece. The host memory can be reused when
        the copies have ended, so this waits for them."""
        buffer, bounced, at = self._buffers.get(), [], 0
        for offset, piece in pieces:
            bounced.append((offset, piece, buffer[at : at + len(piece)]))
            at += len(piece)
        try:
            yield bounced
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        finally:
            self._buffers.put(buffer)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device in the order of its current stream, without waiting for the copy.

    A pinned tensor must not change until the copy ends. Other tensors are pinned by a copy first.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def record_event(device: torch.device) -> Event:
    """Record an event in the device's current stream; None on a CPU, whose work is done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class TransferWorker:
    """One thread, or several, with a CUDA stream that transfers bytes while the model computes."""

    def __init__(self, device: torch.device, name: str, threads: int = 1):
        self._thread = ThreadPoolExecutor(threads, name)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, transfer: Callable[[], Any], after: Event = None) -> Future:
        """Return a future that is done when the bytes have arrived. after: wait for this event
        first, because earlier work still uses the memory."""
        return self._thread.submit(self._run, transfer, after)

    def _run(self, transfer: Callable[[], Any], after: Event) -> None:
        stream = torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()
        with torch.inference_mode(), stream:
            if after:
                self._stream.wait_event(after)
            transfer()
            if self._stream:
                self._stream.synchronize()


class ComputeWorkers:
    """Threads that launch work on a device, each in the stream of the thread that submits it."""

    def __init__(self, device: torch.device, name: str, threads: int):
        self._device, self._threads = device, ThreadPoolExecutor(threads, name)

    def submit(self, launch: Callable[[], Any]) -> Future:
        """Return a future that is done when all work is launched. The device may still compute."""
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        return self._threads.submit(self._run, launch, stream)

    def _run(self, launch: Callable[[], Any], stream: "torch.cuda.Stream | None") -> Any:
        in_stream = torch.cuda.stream(stream) if stream else contextlib.nullcontext()
        with torch.inference_mode(), in_stream:
            return launch()


@dataclass
class Buffer:
    """A buffer of a ring. contents: the object built on its memory, such as a block or a cache."""

    parts: Parts
    contents: Any
    last_use: Event = None  # recorded after the last computation with it
    stored: Future | None = None  # the pending write of its contents to their store


@dataclass
class WaitTime:
    """Seconds that the computing thread waited for items that had not arrived."""

    seconds: float = 0.0


class Ring(Generic[Item]):
    """Buffers that are filled, ahead of time, with the items of an order that repeats."""

    def __init__(
        self,
        order: Sequence[Item],
        buffers: Sequence[Buffer],
        fetch: Callable[[Item, Buffer], Future],
        wait_time: WaitTime,
        prefetch: bool = True,
    ):
        """prefetch: False fetches an item only when it is acquired."""
        self._order, self._fetch = order, fetch
        self._index = {item: n for n, item in enumerate(order)}
        self._free, self._fetched = deque(buffers), deque()
        self._next, self._prefetch = 0, prefetch
        self._wait_time = wait_time

    @contextlib.contextmanager
    def acquire(self, item: Item) -> Iterator[Buffer]:
        """Wait for the buffer with this item; on exit, fetch the next item into it."""
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
            self._fetch_next(self._prefetch)

    def _restart_at(self, item: Item) -> None:
        """Drop what was prefetched, at the start or after an interruption, and begin at an item."""
        for _, buffer, arrival in self._fetched:
            arrival.exception()  # waits, because the buffer is being written to
            self._free.append(buffer)
        self._fetched.clear()
        self._next = self._index[item]
        self._fetch_next(len(self._free) if self._prefetch else 1)

    def _fetch_next(self, count: int) -> None:
        for _ in range(count):
            item, buffer = self._order[self._next], self._free.popleft()
            self._fetched.append((item, buffer, self._fetch(item, buffer)))
            self._next = (self._next + 1) % len(self._order)

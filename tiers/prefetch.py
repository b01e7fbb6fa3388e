"""Memory that is filled ahead: slots on a device, what fills them, and the threads that do.

Start at Ring: it hands out slots in an order that repeats itself, and has the next ones filled
meanwhile. A Store is where the bytes come from: host memory, or a file (disk.py), for a GPU by way
of pinned memory. A TransferWorker is the thread that brings them, on a GPU with a stream of its own. No
call waits for the whole device, and nothing is allocated once a ring is made.

FlexGen (arXiv 2303.06865, section 4.1) overlaps in the same way, with a barrier after every step;
here a slot waits for itself alone.
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
COPY_PIECE_BYTES = 2**25  # bytes that go to a GPU at once: half a millisecond
Item = TypeVar("Item", bound=Hashable)
Parts = dict[str, Tensor]  # bytes by the names of tensors
Event = torch.cuda.Event | None  # the end of what a GPU was given to do; None: it is over


class Layout:
    """Where tensors lie in memory or in a file: each begins a block of the disk's."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """tensors: of these shapes and dtypes, on any device."""
        self.tensors = {
            n: torch.empty(t.shape, dtype=t.dtype, device=META) for n, t in tensors.items()
        }
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, tensor in self.tensors.items():
            self.offsets[name] = self.nbytes
            self.nbytes += round_up_to_block(tensor.nbytes)

    def allocate(self, device: torch.device) -> Parts:
        """Memory for all of them, of each by itself: a compiler must not take two for one."""
        sizes = {name: round_up_to_block(tensor.nbytes) for name, tensor in self.tensors.items()}
        return {name: page_aligned(size, device) for name, size in sizes.items()}

    def cut(self, slab: Tensor) -> Parts:
        """The parts of one piece of memory."""
        ends = (
            at + round_up_to_block(self.tensors[name].nbytes) for name, at in self.offsets.items()
        )
        return {n: slab[at:end] for (n, at), end in zip(self.offsets.items(), ends, strict=True)}

    def of(self, parts: Parts) -> dict[str, Tensor]:
        """The tensors that parts hold."""
        pairs = self.tensors.items()
        return {n: parts[n][: t.nbytes].view(t.dtype).view(t.shape) for n, t in pairs}


class Store(Protocol):
    """Bytes that are elsewhere. A file may be asked for whole blocks only."""

    def read(self, pieces: Pieces) -> None: ...

    def write(self, pieces: Pieces) -> None: ...


class HostMemory:
    """Bytes in the host's memory. On a GPU's stream, copies may be under way on return; they are in
    pieces, so that what others send meanwhile need not wait for a whole layer."""

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
    """A file for a device that no file can be read into: bytes pass through one of its stages."""

    def __init__(self, file: Store, stages: Sequence[Tensor]):
        self.file, self._stages = file, SimpleQueue()
        for stage in stages:
            self._stages.put(stage)

    def read(self, pieces: Pieces) -> None:
        with self._staged(pieces) as places:
            self.file.read([(offset, stage) for offset, _, stage in places])
            for _, piece, stage in places:
                piece.copy_(stage, non_blocking=True)

    def write(self, pieces: Pieces) -> None:
        with self._staged(pieces) as places:
            for _, piece, stage in places:
                stage.copy_(piece)
            self.file.write([(offset, stage) for offset, _, stage in places])

    @contextlib.contextmanager
    def _staged(self, pieces: Pieces) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Each piece with its place in a stage, which is free for others when copies are done."""
        stage, places, at = self._stages.get(), [], 0
        for offset, piece in pieces:
            places.append((offset, piece, stage[at : at + len(piece)]))
            at += len(piece)
        try:
            yield places
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        finally:
            self._stages.put(stage)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On that device, in its stream's order, and without waiting for it. What is pinned must stay
    as it is until then; of what is not, a copy is sent."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def record_event(device: torch.device) -> Event:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class TransferWorker:
    """A thread, or several, that moves bytes while others compute."""

    def __init__(self, device: torch.device, name: str, threads: int = 1):
        self._thread = ThreadPoolExecutor(threads, name)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, work: Callable[[], Any], after: Event = None) -> Future:
        """The bytes are there when its result is. after: what still uses the memory."""
        return self._thread.submit(self._run, work, after)

    def _run(self, work: Callable[[], Any], after: Event) -> None:
        stream = torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()
        with torch.inference_mode(), stream:
            if after:
                self._stream.wait_event(after)
            work()
            if self._stream:
                self._stream.synchronize()


class Workers:
    """Threads that give a device work, each for itself, in the stream of who sends it to them."""

    def __init__(self, device: torch.device, name: str, threads: int):
        self._device, self._threads = device, ThreadPoolExecutor(threads, name)

    def submit(self, work: Callable[[], Any]) -> Future:
        """Its result is there when the device has been given all of the work, which it may not yet
        have done."""
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        return self._threads.submit(self._run, work, stream)

    def _run(self, work: Callable[[], Any], stream: "torch.cuda.Stream | None") -> Any:
        within = torch.cuda.stream(stream) if stream else contextlib.nullcontext()
        with torch.inference_mode(), within:
            return work()


@dataclass
class Buffer:
    """Memory on the device, and what is made of it: a block, or a cache."""

    parts: Parts
    holds: Any
    last_use: Event = None  # what was last computed with it
    stored: Future | None = None  # its contents on their way back to where they belong


@dataclass
class WaitTime:
    """What those who compute have waited for items that were not there yet."""

    seconds: float = 0.0


class Ring(Generic[Item]):
    """Slots that are filled, ahead of time, with the items of an order that repeats itself."""

    def __init__(
        self,
        order: Sequence[Item],
        slots: Sequence[Buffer],
        fetch: Callable[[Item, Buffer], Future],
        waited: "WaitTime",
        ahead: bool = True,
    ):
        self._order, self._fetch = order, fetch
        self._places = {item: n for n, item in enumerate(order)}
        self._free, self._waiting = deque(slots), deque()
        self._next, self._ahead = 0, ahead
        self._waited = waited

    @contextlib.contextmanager
    def acquire(self, item: Item) -> Iterator[Buffer]:
        """The slot that holds an item; it is free again afterwards."""
        if not self._waiting or self._waiting[0][0] != item:
            self._begin_at(item)
        _, slot, fetched = self._waiting.popleft()
        try:
            start = time.perf_counter()
            fetched.result()
            self._waited.seconds += time.perf_counter() - start
            yield slot
        finally:
            self._free.append(slot)
            self._fetch_next(self._ahead)

    def _begin_at(self, item: Item) -> None:
        """What was fetched ahead is not what is wanted: at the start, or after an interruption."""
        for _, slot, fetched in self._waiting:
            fetched.exception()  # waits: the slot is being written to
            self._free.append(slot)
        self._waiting.clear()
        self._next = self._places[item]
        self._fetch_next(len(self._free) if self._ahead else 1)

    def _fetch_next(self, count: int) -> None:
        for _ in range(count):
            item, slot = self._order[self._next], self._free.popleft()
            self._waiting.append((item, slot, self._fetch(item, slot)))
            self._next = (self._next + 1) % len(self._order)

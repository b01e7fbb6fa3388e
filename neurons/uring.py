"""Many reads of a file by one call: Linux's io_uring or, where it is not to be had, threads.

Start at open_reader. A thread that waits for one read costs a switch for each request, and in Python
threads queue for the interpreter, too: on two cores 120 records of 8 KiB take 3.5 ms by threads and
1.8 ms by io_uring. There, requests are rows of an array that is shared with the kernel, filled by a
few array operations and handed over together.

Based on io_uring(7) and the kernel's include/uapi/linux/io_uring.h.
"""

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Protocol

import numpy as np

SETUP, ENTER = 425, 426  # numbers of the calls, on every architecture
READV, GET_EVENTS = 1, 1
RING, ENTRIES = 0, 0x10000000  # offsets by which the shared memory is mapped
MOST_THREADS = 32
MASK = 2**32 - 1  # counters are 32 bits, and go round
AWAKE = 2e-3  # seconds that answers are looked for before a thread sleeps until they come
LIBC = ctypes.CDLL(None, use_errno=True)

LIBC.preadv.restype = ctypes.c_ssize_t
LIBC.preadv.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

# A piece of memory; and a request: the offset in the file, and where so many pieces are listed.
PIECE = np.dtype([("address", "u8"), ("nbytes", "u8")])
REQUEST = np.dtype([("offset", "u8"), ("pieces", "u8"), ("count", "u4")])
ENTRY = np.dtype(
    {
        "names": ["opcode", "fd", "offset", "pieces", "count", "number"],
        "formats": ["u1", "i4", "u8", "u8", "u4", "u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 64,
    }
)
COMPLETION = np.dtype([("number", "u8"), ("result", "i4"), ("flags", "u4")])


Work = Callable[[], None]


def nothing() -> None:
    """To be done while reads are under way."""


class Reads(Protocol):
    """depth: requests that are under way at a time."""

    depth: int

    def read(self, file: int, requests: np.ndarray, meanwhile: Work = nothing) -> np.ndarray:
        """What each of the requests, (n,) of REQUEST, has read: bytes, or an error's number below
        0. When this returns, or raises, none is under way. meanwhile: is done beside the first."""


def open_reader(depth: int) -> Reads:
    try:
        return Uring(depth)
    except OSError:
        return Threads(depth)


def read_pieces(file: int, request: np.void) -> int:
    """One request by itself: the bytes read, or an error's number below 0."""
    given = (int(request[name]) for name in ("pieces", "count", "offset"))
    done = LIBC.preadv(file, *given)
    return done if done >= 0 else -ctypes.get_errno()


class Threads:
    """Each waits for one read after the other."""

    def __init__(self, depth: int):
        self.depth = depth
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        """All its threads begin now: one that Ctrl-C caught beginning would be lost sight of."""
        count = min(self.depth, MOST_THREADS)
        pool, barrier = ThreadPoolExecutor(count, "reads"), Barrier(count)
        list(pool.map(lambda _: barrier.wait(), range(count)))
        return pool

    def read(self, file: int, requests: np.ndarray, meanwhile: Work = nothing) -> np.ndarray:
        results = np.zeros(len(requests), dtype=np.int64)

        def share(start: int) -> None:
            for n in range(start, len(requests), MOST_THREADS):
                results[n] = read_pieces(file, requests[n])

        try:
            shares = self._pool.map(share, range(min(len(requests), MOST_THREADS)))
            meanwhile()
            list(shares)
        except BaseException:  # what is under way writes to memory
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._new_pool()
            raise
        return results


class SubmissionOffsets(ctypes.Structure):
    """Where the parts of the queue of submissions lie in shared memory."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("head", "tail", "mask", "entries", "flags")),
        *((name, ctypes.c_uint32) for name in ("dropped", "array", "reserved")),
        ("address", ctypes.c_uint64),
    ]


class CompletionOffsets(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("head", "tail", "mask", "count", "overflow")),
        *((name, ctypes.c_uint32) for name in ("entries", "flags", "reserved")),
        ("address", ctypes.c_uint64),
    ]


class Parameters(ctypes.Structure):
    _fields_ = [
        ("submissions", ctypes.c_uint32),
        ("completions", ctypes.c_uint32),
        ("ignored", ctypes.c_uint32 * 8),
        ("submitted", SubmissionOffsets),
        ("completed", CompletionOffsets),
    ]


class Uring:
    """A queue that is shared with the kernel. For one thread."""

    def __init__(self, depth: int):
        """Raises OSError where the kernel has no io_uring, or refuses it."""
        said = Parameters()
        self._queue = LIBC.syscall(SETUP, depth, ctypes.byref(said))
        if self._queue < 0:
            raise OSError(ctypes.get_errno(), "io_uring is not to be had")
        self.depth = said.submissions
        ins, outs = said.submitted, said.completed
        nbytes = max(
            ins.array + 4 * said.submissions,
            outs.entries + COMPLETION.itemsize * said.completions,
        )
        shared = mmap.mmap(self._queue, nbytes, offset=RING)
        entries = mmap.mmap(self._queue, ENTRY.itemsize * said.submissions, offset=ENTRIES)

        def number(offset: int, count: int = 1) -> np.ndarray:
            return np.frombuffer(shared, np.uint32, count, offset)

        self._order = number(ins.array, said.submissions)  # in which entries are to be taken
        self._in_head, self._tail = number(ins.head), number(ins.tail)
        self._in_mask = int(number(ins.mask)[0])
        self._head, self._out_mask = number(outs.head), int(number(outs.mask)[0])
        self._out_tail = number(outs.tail)
        queue = np.frombuffer(entries, ENTRY, said.submissions)
        self._numbers = np.arange(said.submissions, dtype=np.uint32)
        queue["opcode"], queue["number"] = READV, self._numbers
        self._fields = {name: queue[name] for name in ("fd", *REQUEST.names)}
        self._completions = np.frombuffer(shared, COMPLETION, said.completions, outs.entries)

    def __del__(self, close: Callable[[int], None] = os.close):  # os may be gone before
        if getattr(self, "_queue", -1) >= 0:
            close(self._queue)

    def read(self, file: int, requests: np.ndarray, meanwhile: Work = nothing) -> np.ndarray:
        results = np.zeros(len(requests), dtype=np.int64)
        self._fields["fd"][:] = file
        for start in range(0, len(requests), self.depth):
            part = slice(start, start + self.depth)
            self._together(requests[part], results[part], nothing if start else meanwhile)
        return results

    def _together(self, requests: np.ndarray, results: np.ndarray, meanwhile: Work) -> None:
        count, tail = len(requests), int(self._tail[0])
        for name in REQUEST.names:
            self._fields[name][:count] = requests[name]
        self._order[(tail + self._numbers[:count]) & self._in_mask] = self._numbers[:count]
        head = int(self._head[0])

        def handed_over() -> int:
            return (int(self._in_head[0]) - tail) & MASK

        def complete() -> int:
            return (int(self._head[0]) - head) & MASK

        def answered() -> int:
            return (int(self._out_tail[0]) - head) & MASK

        # Counted by what the kernel and we have written down, which Ctrl-C cannot come between.
        try:
            self._tail[0] = (tail + count) & MASK
            self._enter(count, 0)
            meanwhile()
            # To wake up costs a thread 50 us, and 100 more until its processor is as it was.
            bedtime = time.perf_counter() + AWAKE
            while answered() < count and time.perf_counter() < bedtime:
                pass
            self._collect(results)
            while complete() < count:
                self._enter(count - handed_over(), count - complete())
                self._collect(results)
        finally:
            while complete() < handed_over():  # these write to memory
                self._enter(0, 1)
                self._collect(results)
            self._tail[0] = (tail + handed_over()) & MASK

    def _enter(self, submit: int, wait: int) -> None:
        """Hand over so many, and wait for so many, or for a signal."""
        done = LIBC.syscall(ENTER, self._queue, submit, wait, GET_EVENTS, None, 0)
        if done < 0 and (number := ctypes.get_errno()) not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, os.strerror(number))

    def _collect(self, results: np.ndarray) -> None:
        """Take note of what is complete."""
        head = int(self._head[0])
        count = (int(self._out_tail[0]) - head) & MASK
        found = self._completions[(head + np.arange(count)) & self._out_mask]
        results[found["number"].astype(np.int64)] = found["result"]
        self._head[0] = (head + count) & MASK

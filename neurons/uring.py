"""Batches of file reads: by Linux's io_uring or, where the kernel refuses it, by threads.

Start at open_reader. A request is a read of contiguous bytes of a file into several ranges of
memory; a batch is the requests of one call of BatchReader.read. A thread that waits for one request
costs a context switch, and Python threads also queue for the interpreter's lock: on two cores 120
requests of 8 KiB take 3.5 ms by threads and 1.8 ms by io_uring. With io_uring, requests are rows of
arrays that are shared with the kernel (Linux); a few array operations fill them and one system call
submits a portion of the batch, up to `depth` requests.

An io_uring has two queues in shared memory. The program writes submission entries (SQEs) and moves
the tail of the submission queue (SQ); the kernel moves its head. The kernel writes completion
entries (CQEs) and moves the tail of the completion queue (CQ); the program moves its head. Heads
and tails count entries since the start, modulo 2**32; the mask gives an entry's index.

Based on io_uring(7) and the kernel's include/uapi/linux/io_uring.h; names follow that header.
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

SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 425, 426  # the same on every architecture
IORING_OP_READV, IORING_ENTER_GETEVENTS = 1, 1
IORING_OFF_SQ_RING, IORING_OFF_SQES = 0, 0x10000000  # mmap offsets
SINGLE_MMAP = 1  # IORING_FEAT_SINGLE_MMAP: one mapping has both queues
MAX_THREADS = 32  # of a ThreadReader
UINT32_MASK = 2**32 - 1  # heads and tails have 32 bits and wrap around
SPIN_SECONDS = 2e-3  # polling time before the thread sleeps until requests complete
LIBC = ctypes.CDLL(None, use_errno=True)

LIBC.preadv.restype = ctypes.c_ssize_t
LIBC.preadv.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

IOVEC = np.dtype([("address", "u8"), ("nbytes", "u8")])  # struct iovec: a range of memory
# A read of contiguous bytes of a file into several ranges of memory. offset: the first byte.
# iovecs: the address of an array of `count` iovecs.
REQUEST = np.dtype([("offset", "u8"), ("iovecs", "u8"), ("count", "u4")])
SQE = np.dtype(  # submission queue entry
    {
        "names": ["opcode", "fd", "offset", "iovecs", "count", "user_data"],
        "formats": ["u1", "i4", "u8", "u8", "u4", "u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 64,
    }
)
CQE = np.dtype([("user_data", "u8"), ("result", "i4"), ("flags", "u4")])  # completion queue entry


Callback = Callable[[], None]


def no_op() -> None:
    """Do nothing: the default of `overlap`, which a reader calls while the disk reads."""


class BatchReader(Protocol):
    """Reads batches of requests. depth: the most requests that the disk has at a time."""

    depth: int

    def read(self, file: int, requests: np.ndarray, overlap: Callback = no_op) -> np.ndarray:
        """Read a batch of requests, (n,) of REQUEST, from a file descriptor, and wait until all
        have ended.

        overlap: called once, while the disk reads the first requests. Returns (n,): the bytes read
        by each request, fewer than requested if it ended early, or a negative errno. Also after an
        exception in `overlap` or Ctrl-C, no request still writes to memory.
        """


def open_reader(depth: int) -> BatchReader:
    """Return an io_uring reader, or a reader with threads where io_uring is refused, as in many
    containers. depth: requests that the disk has at a time, at least 1."""
    try:
        return UringReader(depth)
    except OSError:
        return ThreadReader(depth)


def read_request(file: int, request: np.void) -> int:
    """Read one request, a row of REQUEST, in this thread. file: a file descriptor. The caller keeps
    the iovecs and their memory: the request has only their addresses.

    Returns the bytes read, which may be fewer than requested, or a negative errno.
    """
    arguments = (int(request[name]) for name in ("iovecs", "count", "offset"))
    nbytes = LIBC.preadv(file, *arguments)
    return nbytes if nbytes >= 0 else -ctypes.get_errno()


class ThreadReader:
    """A BatchReader with a pool of threads, each of which reads one request after the other."""

    def __init__(self, depth: int):
        self.depth = depth
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        """Return a pool of `depth` threads, at most MAX_THREADS.

        All threads start now: Ctrl-C during a later start would leave a thread that the pool does
        not know and cannot wait for.
        """
        count = min(self.depth, MAX_THREADS)
        pool, barrier = ThreadPoolExecutor(count, "reads"), Barrier(count)
        # Each task waits until all tasks run, so that no thread runs two of them.
        list(pool.map(lambda _: barrier.wait(), range(count)))
        return pool

    def read(self, file: int, requests: np.ndarray, overlap: Callback = no_op) -> np.ndarray:
        """Read a batch of requests, (n,) of REQUEST, from a file descriptor, and wait until all
        have ended.

        overlap: called once while the threads read. Returns (n,): the bytes read by each request,
        or a negative errno. After an exception in `overlap` or Ctrl-C, requests that have begun are
        completed, the others are dropped, and the pool is replaced. The requests are shared out to
        at most MAX_THREADS tasks; with a smaller depth, fewer tasks run at a time.
        """
        results = np.zeros(len(requests), dtype=np.int64)

        def read_every_nth(start: int) -> None:
            """Read the requests `start`, `start` + MAX_THREADS, ..., and write their results."""
            for n in range(start, len(requests), MAX_THREADS):
                results[n] = read_request(file, requests[n])

        try:
            pending = self._pool.map(read_every_nth, range(min(len(requests), MAX_THREADS)))
            overlap()
            list(pending)  # wait for all tasks
        except BaseException:  # wait for running reads: they write to memory
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._new_pool()
            raise
        return results


class SubmissionOffsets(ctypes.Structure):
    """struct io_sqring_offsets: where the submission queue's fields are in shared memory."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("head", "tail", "mask", "entries", "flags")),
        *((name, ctypes.c_uint32) for name in ("dropped", "array", "reserved")),
        ("address", ctypes.c_uint64),
    ]


class CompletionOffsets(ctypes.Structure):
    """struct io_cqring_offsets: where the completion queue's fields are in shared memory. cqes: its
    first entry."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("head", "tail", "mask", "count", "overflow")),
        *((name, ctypes.c_uint32) for name in ("cqes", "flags", "reserved")),
        ("address", ctypes.c_uint64),
    ]


class UringParameters(ctypes.Structure):
    """struct io_uring_params, which the kernel fills in. features: bits, such as SINGLE_MMAP.
    ignored, reserved: fields that the program leaves 0."""

    _fields_ = [
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("ignored", ctypes.c_uint32 * 3),
        ("features", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 4),
        ("sq_offsets", SubmissionOffsets),
        ("cq_offsets", CompletionOffsets),
    ]


class UringReader:
    """A BatchReader with an io_uring instance. Only one thread at a time may use it."""

    def __init__(self, depth: int):
        """Create the io_uring and map its queues. Raises OSError where the kernel refuses it.

        depth: requests that the disk has at a time; the kernel rounds it up to a power of two, the
        attribute depth.
        """
        parameters = UringParameters()
        self._ring = LIBC.syscall(SYS_IO_URING_SETUP, depth, ctypes.byref(parameters))
        if self._ring < 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses io_uring")
        if not parameters.features & SINGLE_MMAP:
            raise OSError("the kernel maps the queues of io_uring apart, before Linux 5.4")
        self.depth = parameters.sq_entries
        self._map_queues(parameters)
        self._map_requests()

    def _map_queues(self, parameters: UringParameters) -> None:
        """Map both queues as arrays that are shared with the kernel.

        parameters: as the kernel filled them in, with the offsets of each field. For each queue:
        head and tail, (1,) uint32, which count entries since the start and wrap around; a mask,
        which gives an entry's index from its count; and the entries. The entries of the submission
        queue, _sq_array, are indices of SQEs, which lie apart (_map_requests).
        """
        submission, completion = parameters.sq_offsets, parameters.cq_offsets
        nbytes = max(
            submission.array + 4 * parameters.sq_entries,
            completion.cqes + CQE.itemsize * parameters.cq_entries,
        )
        shared = mmap.mmap(self._ring, nbytes, offset=IORING_OFF_SQ_RING)

        def uint32(offset: int, count: int = 1) -> np.ndarray:
            """Return `count` uint32 numbers at a byte offset of the queues' memory, as a view."""
            return np.frombuffer(shared, np.uint32, count, offset)

        self._sq_head, self._sq_tail = uint32(submission.head), uint32(submission.tail)
        self._sq_mask = int(uint32(submission.mask)[0])
        self._sq_array = uint32(submission.array, parameters.sq_entries)
        self._cq_head, self._cq_tail = uint32(completion.head), uint32(completion.tail)
        self._cq_mask = int(uint32(completion.mask)[0])
        self._cqes = np.frombuffer(shared, CQE, parameters.cq_entries, completion.cqes)

    def _map_requests(self) -> None:
        """Map the submission queue entries (SQEs), one for each request of a portion.

        The fields that never change are written here: the operation, and user_data, the request's
        index in its portion, which the kernel copies to the completion. _fields: the other fields,
        each as an array of `depth` values.
        """
        shared = mmap.mmap(self._ring, SQE.itemsize * self.depth, offset=IORING_OFF_SQES)
        sqes = np.frombuffer(shared, SQE, self.depth)
        self._sqe_indices = np.arange(self.depth, dtype=np.uint32)
        sqes["opcode"], sqes["user_data"] = IORING_OP_READV, self._sqe_indices
        self._fields = {name: sqes[name] for name in ("fd", *REQUEST.names)}

    def __del__(self, close: Callable[[int], None] = os.close):
        """Close the io_uring. close: a parameter only because its default outlives the module `os`,
        which may be gone when the interpreter exits."""
        if getattr(self, "_ring", -1) >= 0:  # absent or -1 if __init__ has failed
            close(self._ring)

    def read(self, file: int, requests: np.ndarray, overlap: Callback = no_op) -> np.ndarray:
        """Read a batch of requests, (n,) of REQUEST, from a file descriptor, and wait until all
        have ended.

        The kernel gets portions of `depth` requests, one after the other. overlap: called once
        while the first portion is read; not called without requests. Returns (n,): the bytes read
        by each request, or a negative errno. After an exception, see _read_portion.
        """
        results = np.zeros(len(requests), dtype=np.int64)
        self._fields["fd"][:] = file
        for start in range(0, len(requests), self.depth):
            part = slice(start, start + self.depth)
            self._read_portion(requests[part], results[part], no_op if start else overlap)
        return results

    def _read_portion(self, requests: np.ndarray, results: np.ndarray, overlap: Callback) -> None:
        """Read at most `depth` requests, and write their results, (n,), in place. No other request
        may be pending.

        overlap: called once while the kernel reads. Progress is computed from the shared heads and
        tails alone, so that it is right after Ctrl-C at any point. On an exception, wait for the
        requests that the kernel has taken, because it writes to their memory, and withdraw others.
        """
        # The submission queue's tail and the completion queue's head before the portion.
        count, tail, head = len(requests), int(self._sq_tail[0]), int(self._cq_head[0])
        self._fill_entries(requests, tail)

        def submitted() -> int:
            """Return how many requests of the portion the kernel has taken."""
            return (int(self._sq_head[0]) - tail) & UINT32_MASK

        def collected() -> int:
            """Return how many results of the portion `_collect` has written."""
            return (int(self._cq_head[0]) - head) & UINT32_MASK

        try:
            self._sq_tail[0] = (tail + count) & UINT32_MASK
            self._enter(count, 0)  # submit all, wait for none
            overlap()
            self._poll(count, head)
            self._collect(results)
            while collected() < count:
                self._enter(count - submitted(), count - collected())
                self._collect(results)
        finally:
            while collected() < submitted():
                self._enter(0, 1)
                self._collect(results)
            # Withdraw requests that the kernel has not taken.
            self._sq_tail[0] = (tail + submitted()) & UINT32_MASK

    def _fill_entries(self, requests: np.ndarray, tail: int) -> None:
        """Write a portion of requests into SQEs 0, 1, ... and the SQEs' indices into the queue.

        tail: the submission queue's tail before the portion. The kernel sees the entries only after
        the caller has moved the tail. No earlier request may be pending: its SQE is overwritten.
        """
        count = len(requests)
        for name in REQUEST.names:
            self._fields[name][:count] = requests[name]
        indices = self._sqe_indices[:count]
        self._sq_array[(tail + indices) & self._sq_mask] = indices

    def _poll(self, count: int, head: int) -> None:
        """Spin until `count` requests have completed since `head`, for SPIN_SECONDS at most.

        A system call that waits would put the thread to sleep: waking it takes 50 us, and its
        processor is slow for another 100 us. head: the completion queue's head before the portion.
        """
        end = time.perf_counter() + SPIN_SECONDS
        while ((int(self._cq_tail[0]) - head) & UINT32_MASK) < count and time.perf_counter() < end:
            pass

    def _enter(self, submit: int, wait: int) -> None:
        """Submit `submit` requests of the submission queue, then sleep until `wait` requests have
        completed or a signal arrives. With wait 0 it returns at once.

        After a signal (EINTR), or if the kernel lacks resources (EAGAIN), it returns early: the
        caller must count submissions and completions, and call again. Raises OSError for any other
        error.
        """
        arguments = self._ring, submit, wait, IORING_ENTER_GETEVENTS, None, 0
        code = LIBC.syscall(SYS_IO_URING_ENTER, *arguments)
        if code < 0 and (number := ctypes.get_errno()) not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, os.strerror(number))

    def _collect(self, results: np.ndarray) -> None:
        """Write the results of the requests that have completed, and free their completion entries.

        results: (n,), of the portion, indexed by user_data, the request's index in the portion.
        """
        head = int(self._cq_head[0])
        count = (int(self._cq_tail[0]) - head) & UINT32_MASK
        completed = self._cqes[(head + np.arange(count)) & self._cq_mask]
        results[completed["user_data"].astype(np.int64)] = completed["result"]
        self._cq_head[0] = (head + count) & UINT32_MASK

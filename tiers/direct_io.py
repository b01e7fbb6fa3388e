"""Files that are read and written with O_DIRECT, in several requests at a time.

Start at DirectFile. Layers are read in an order that repeats. The system's page cache would keep
the layers that were read last, but those that were read longest ago are needed next. O_DIRECT
bypasses the page cache, so memory is not filled with file contents, and the disk works at its full
rate. With O_DIRECT, offsets, lengths and addresses must be multiples of BLOCK_BYTES. On a file
system without O_DIRECT the same calls go through the page cache.

A piece is a tensor of bytes that is filled from a file or written to it, and comes in a pair with
its offset in the file (Pieces). A cell is the KV cache of one layer for one group of rows
(kv_cache.py). A scratch file is made for one run and has no name.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

LARGE_REQUEST_BYTES = 4 * 2**20  # larger requests are no faster
SMALL_REQUEST_BYTES = 2**20  # if the disk also has cells, so that reads of cells wait less long
REQUESTS_IN_FLIGHT = 8
# The error numbers of open() on a file system without O_DIRECT. A read that the disk refuses, for
# example one of less than the disk's block size, fails with the same numbers.
ERRNOS_WITHOUT_O_DIRECT = errno.EINVAL, errno.ENOTSUP

Pieces = Iterable[tuple[int, Tensor]]  # (offset in the file, bytes in memory)
# These threads wait for the disk and use almost no CPU time. The KV cache has its own threads,
# because one layer is many requests, and a read of the cache must not queue behind them.
layer_threads = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, "layers")
cache_threads = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, "cells")


class DirectFile:
    """An open file. direct: whether O_DIRECT is used; request_bytes: the largest size of one
    request; threads: the executor whose threads make the requests. The last two have the values for
    the KV cache and activations at first; offload.py changes them for a file of layers."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY):
        """Open the file with O_DIRECT, or without it if the file system lacks it. flags: as for
        os.open. Raises OSError."""
        self.path, self.request_bytes, self.threads = path, SMALL_REQUEST_BYTES, cache_threads
        try:  # 0o600: the mode of the file, if the flags let open() make one
            self._file = os.open(path, flags | os.O_DIRECT, 0o600)
            self.direct = True
        except OSError as error:
            if error.errno not in ERRNOS_WITHOUT_O_DIRECT:
                raise
            self._file, self.direct = os.open(path, flags, 0o600), False
        self._size = os.fstat(self._file).st_size

    def __del__(self):
        if hasattr(self, "_file"):  # not if os.open failed
            os.close(self._file)

    def fileno(self) -> int:
        return self._file

    def read(self, pieces: Pieces) -> None:
        """Fill each piece, a uint8 tensor in host memory, from its offset in the file. Where a
        piece extends past the end of the file, its bytes do not change.

        If O_DIRECT is used, offsets, lengths and addresses must be multiples of BLOCK_BYTES. Raises
        OSError, and ValueError if the file became shorter after it was opened.
        """
        self._transfer(os.preadv, pieces)

    def write(self, pieces: Pieces) -> None:
        """Write each piece to its offset in the file; bytes past the file's size are not written.
        Pieces are aligned as for `read`. Raises OSError."""
        self._transfer(os.pwritev, pieces)

    def _transfer(self, call: Callable[..., int], pieces: Pieces) -> None:
        """Read or write pieces, in several requests at a time; return when all have ended.

        call: os.preadv or os.pwritev. Raises the error of the first request, in the order of the
        pieces, that failed.
        """
        requests = [request for pair in pieces for request in self._requests(*pair)]
        futures = [self.threads.submit(self._complete, call, *request) for request in requests]
        # Wait for all before an error is raised: the caller may reuse the memory of the others.
        wait(futures)
        for future in futures:
            future.result()

    def _requests(self, offset: int, piece: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Yield the requests for a piece, a contiguous uint8 tensor on the host: the offset in the
        file, and at most `request_bytes` bytes of the piece's memory."""
        memory = memoryview(piece.numpy())
        for start in range(0, len(memory), self.request_bytes):
            yield offset + start, memory[start : start + self.request_bytes]

    def _complete(self, call: Callable[..., int], offset: int, memory: memoryview) -> None:
        """Make one request: repeat the system call, which may transfer fewer bytes than it is asked
        to, until all bytes up to the end of the file are transferred.

        call: os.preadv or os.pwritev. Raises OSError, and ValueError if the file has become shorter
        than it was when it was opened.
        """
        done, needed = 0, min(len(memory), self._size - offset)
        while done < needed:
            transferred = call(self._file, [memory[done:]], offset + done)
            if transferred == 0:
                raise ValueError(f"{self.path} ends at byte {offset + done}: it was cut short")
            done += transferred


class ScratchFile(DirectFile):
    """A file without a name: the system deletes it when the process ends, even if it is killed."""

    def __init__(self, directory: Path, nbytes: int):
        """Make a file of `nbytes` bytes on the disk of a directory, which need not exist and is not
        made. The space is reserved now, so that no later write finds the disk full.

        Raises ValueError if the disk is too full, OSError if the file cannot be made, and
        NotADirectoryError if `directory` is a file.
        """
        parent = nearest_directory(directory)
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise ValueError(
                f"{directory} has {free / 1e9:.1f} GB free and {nbytes / 1e9:.1f} GB are needed "
                "there: choose another --offload_dir, or smaller batches"
            )
        try:
            super().__init__(parent, os.O_RDWR | os.O_TMPFILE)  # O_TMPFILE: a file without a name
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            raise OSError(
                f"{parent} takes no file of {nbytes / 1e9:.1f} GB ({error.strerror}): choose "
                "another --offload_dir"
            ) from error
        self._size = nbytes  # it was 0 when DirectFile opened the file


def nearest_directory(directory: Path) -> Path:
    """Return the directory if it exists, else its nearest parent that exists. A directory made
    later would be on the same disk, and a file without a name can be made in the parent as well.

    Raises NotADirectoryError if the path that exists is a file.
    """
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file: --offload_dir needs a directory")
    return nearest

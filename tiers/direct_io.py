"""Files read and written past the page cache, by several requests at a time.

Start at DirectFile. The page cache would keep the layers that were read last, where those needed
next are the ones read longest ago; with O_DIRECT memory holds what it is told to, and the disk
works at its own rate. Offsets, lengths and memory are then multiples of BLOCK_BYTES. Where a file system
refuses O_DIRECT the same calls go through the page cache.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

LARGE_REQUEST_BYTES = 4 * 2**20  # bytes of a request: larger ones are no faster
SMALL_REQUEST_BYTES = 2**20  # the same where others wait behind it
REQUESTS_IN_FLIGHT = 8  # requests at a time
ERRNOS_WITHOUT_O_DIRECT = errno.EINVAL, errno.ENOTSUP  # what a file system without O_DIRECT says

Pieces = Iterable[tuple[int, Tensor]]  # offsets in a file, and the bytes there
# Threads that wait for the disk, and take next to no CPU. Layers are many requests, behind which
# a cell of the cache must not queue.
layers, cells = (ThreadPoolExecutor(REQUESTS_IN_FLIGHT, name) for name in ("layers", "cells"))


class DirectFile:
    """An open file. direct: it is read past the page cache; request: bytes that go at once;
    threads: who waits for them."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY):
        self.path, self.request, self.threads = path, SMALL_REQUEST_BYTES, cells
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o600)
            self.direct = True
        except OSError as error:
            if error.errno not in ERRNOS_WITHOUT_O_DIRECT:
                raise
            self._file, self.direct = os.open(path, flags, 0o600), False
        self._size = os.fstat(self._file).st_size

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def fileno(self) -> int:
        return self._file

    def read(self, pieces: Pieces) -> None:
        """Fill the bytes from the file; what lies beyond its end stays as it is.

        Raises OSError, and ValueError where the file has been cut short since it was opened.
        """
        self._move(os.preadv, pieces)

    def write(self, pieces: Pieces) -> None:
        """The way back, within the file's size. Raises OSError."""
        self._move(os.pwritev, pieces)

    def _move(self, call: Callable[..., int], pieces: Pieces) -> None:
        def move(offset: int, memory: memoryview) -> None:
            done, wanted = 0, min(len(memory), self._size - offset)
            while done < wanted:
                moved = call(self._file, [memory[done:]], offset + done)
                if moved == 0:
                    raise ValueError(f"{self.path} ends at byte {offset + done}: it was cut short")
                done += moved

        cut = [request for offset, piece in pieces for request in self._requests(offset, piece)]
        moving = [self.threads.submit(move, *request) for request in cut]
        wait(moving)  # all: what fails must not leave others writing to memory that is used again
        for future in moving:
            future.result()

    def _requests(self, offset: int, piece: Tensor) -> Iterator[tuple[int, memoryview]]:
        memory = memoryview(piece.numpy())
        for start in range(0, len(memory), self.request):
            yield offset + start, memory[start : start + self.request]


class ScratchFile(DirectFile):
    """Bytes that end with the process, however it ends: the file has no name."""

    def __init__(self, directory: Path, nbytes: int):
        """Raises ValueError where the disk has no space, and OSError where it cannot be written."""
        place = nearest_directory(directory)
        free = shutil.disk_usage(place).free
        if nbytes > free:
            raise ValueError(
                f"{directory} has {free / 1e9:.1f} GB free and {nbytes / 1e9:.1f} GB are needed "
                "there: choose another --offload_dir, or smaller batches"
            )
        try:
            super().__init__(place, os.O_RDWR | os.O_TMPFILE)
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            raise OSError(
                f"{place} takes no file of {nbytes / 1e9:.1f} GB ({error.strerror}): choose "
                "another --offload_dir"
            ) from error
        self._size = nbytes


def nearest_directory(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists, which is on the same disk.

    A file without a name needs no directory of its own. Raises NotADirectoryError for a file.
    """
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file: --offload_dir needs a directory")
    return place

"""Memory of this machine: the free bytes, the sizes of caches, and page-aligned buffers.

A cgroup is a set of processes whose memory Linux limits, as in a container; cgroups are nested.

Start at available_memory and page_aligned.
"""

import mmap
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def check_memory(needed: int, device: str | torch.device, what: str, remedy: str) -> None:
    """Raises MemoryError if fewer than `needed` bytes of the device's memory are free.

    what: the subject of the message, such as "the model"; remedy: its last clause, what to do.
    """
    available = available_memory(torch.device(device))
    if needed > available:
        raise MemoryError(
            f"{what} needs {size_text(needed)} of memory on {device}, where "
            f"{size_text(available)} is free: {remedy}"
        )


def available_memory(device: torch.device) -> int:
    """Returns the free bytes of a device.

    CPU: the least of the system's free bytes and the free bytes of each cgroup of this process.
    Where the system does not report free bytes (mps, macOS): all bytes of the machine's memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    # 2**63: min needs a second number where no cgroup has a limit.
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *cgroup_headroom(), 2**63)


def cgroup_headroom() -> Iterator[int]:
    """Yield the free bytes of each cgroup (version 2) of this process that has a memory limit.

    The page cache counts as free, because the kernel drops it when memory is needed.
    """
    # The line of version 2 is "0::" and the path of the process's cgroup below /sys/fs/cgroup.
    own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
    leaf = Path("/sys/fs/cgroup", own)
    for group in (leaf, *leaf.parents):  # the limits of outer groups count, too
        limit = group / "memory.max"
        if limit.is_file() and (maximum := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            yield int(maximum) - int((group / "memory.current").read_text()) + cached


def size_text(nbytes: float) -> str:
    """Returns bytes as text with a unit: 1234567 -> "1.23 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


BLOCK_BYTES = 4096  # O_DIRECT needs offsets, lengths and memory at multiples of it
HUGE_PAGE_BYTES = 2 * 2**20
CACHE_LINE_BYTES = 64


def page_aligned(nbytes: int, device: torch.device, pinned: bool = False) -> Tensor:
    """Returns a buffer of zero bytes (uint8) that begins at a multiple of BLOCK_BYTES.

    nbytes: may be 0. pinned: page-locked, for copies to a GPU. On a CPU the buffer lies in huge
    pages if it is at least one of them long and the system has them. Then a direct read has fewer
    segments, and a decoding step, which reads every weight once, misses the TLB less often.
    """
    if device.type != "cpu" or pinned:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory, start = huge_pages(nbytes)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=nbytes)


def huge_pages(nbytes: int) -> tuple[mmap.mmap, int]:
    """Returns a memory map, and the offset in it at which `nbytes` usable zero bytes begin.

    They lie in huge pages, except for a rest shorter than one, if the system has them. nbytes: at
    least 1.
    """
    # A huge page begins at a multiple of its size: map one more, and begin at the first multiple.
    start, flags = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    huge = nbytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES * huge, flags)
    if huge:
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return memory, start


class HugePages:
    """Cuts buffers on the CPU, one after another, out of large chunks of huge pages.

    page_aligned maps each buffer separately. Then its last bytes, or all of it below 2 MiB, lie in
    small pages: a matrix of 1 MB takes 1.2 times as long to read (measured on a Zen 3). A buffer
    begins at a multiple of a cache line. The memory of a chunk is freed with the last of its
    buffers.
    """

    CHUNK_BYTES = 2**26

    def __init__(self):
        # The chunk; in it, the byte at which the usable memory ends, and the bytes at which the
        # latest and the next buffer begin.
        self.memory, self.end, self.latest, self.next = None, 0, 0, 0

    def take(self, nbytes: int) -> Tensor:
        """Returns a buffer of `nbytes` uninitialised bytes, uint8. nbytes: at least 1."""
        if nbytes > self.end - self.next:
            size = max(nbytes, self.CHUNK_BYTES)
            self.memory, self.next = huge_pages(size)
            self.end = self.next + size
        self.latest = self.next
        return self.shorten(nbytes)

    def shorten(self, nbytes: int) -> Tensor:
        """Returns the latest buffer, cut to its first `nbytes` bytes, at least 1. The bytes behind
        them are free for the next buffer. For callers that take more than they turn out to need."""
        self.next = self.latest + -(-nbytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        # No slice of a tensor of the chunk: torch.compile refuses weights that share a storage.
        return torch.frombuffer(self.memory, dtype=torch.uint8, offset=self.latest, count=nbytes)


def round_up_to_block(nbytes: int) -> int:
    """Returns nbytes, rounded up to a multiple of BLOCK_BYTES."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


CPU_CACHES = "cpu[0-9]*/cache/index[0-9]*"  # in /sys/devices/system/cpu
CPU_CACHE_BYTES = 2**25  # assumed where the system does not report its caches


def cache_bytes(device: torch.device, system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Returns the bytes of a device's last-level cache; on a CPU, of all sockets together.

    system: the folder of the CPUs in /sys; tests pass another one.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    # By level and the CPUs that share a cache: each of these CPUs lists the cache again.
    sizes: dict[tuple[int, str], int] = {}
    for index in system.glob(CPU_CACHES):
        try:
            level, cpus, size = (
                (index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
            sizes[int(level), cpus] = int(size.removesuffix("K")) * 1024  # "32768K"
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or CPU_CACHE_BYTES


def machine_name(device: torch.device) -> str:
    """Returns the GPU's name, or for other devices the CPU's name and torch's number of threads.

    It is part of the key of saved measurements, which differ with the number of threads.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())}, {torch.get_num_threads()} threads"


def process_memory(device: torch.device) -> int:
    """Returns the bytes of the machine's memory that this process uses already.

    plan.py adds them to the free bytes, and counts them as always in use if the device is the CPU.
    Returns 0 for a GPU, whose memory is not the machine's. Without /proc, returns the most bytes
    that the process has used so far.
    """
    if device.type != "cpu":
        return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:  # no /proc
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

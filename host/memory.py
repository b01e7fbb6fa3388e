"""Memory of this machine: the free bytes, the sizes of caches, and page-aligned buffers.

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
    """Raises MemoryError if fewer than `needed` bytes are free.

    what: the subject of the message; remedy: its last clause.
    """
    available = available_memory(torch.device(device))
    if needed > available:
        raise MemoryError(
            f"{what} needs {size_text(needed)} of memory on {device}, where "
            f"{size_text(available)} is free: {remedy}"
        )


def available_memory(device: torch.device) -> int:
    """Returns the free bytes of a device; all bytes where the system does not report free ones."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *cgroup_headroom(), 2**63)


def cgroup_headroom() -> Iterator[int]:
    """Yields the free bytes of each cgroup of this process; the page cache counts as free."""
    own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
    leaf = Path("/sys/fs/cgroup", own)
    for group in (leaf, *leaf.parents):
        limit = group / "memory.max"
        if limit.is_file() and (maximum := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            yield int(maximum) - int((group / "memory.current").read_text()) + cached


def size_text(nbytes: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


BLOCK_BYTES = 4096  # O_DIRECT needs offsets, lengths and memory at multiples of it
HUGE_PAGE_BYTES = 2 * 2**20


def page_aligned(nbytes: int, device: torch.device, pinned: bool = False) -> Tensor:
    """Returns a buffer of zero bytes that begins at a multiple of BLOCK_BYTES.

    pinned: page-locked, for copies to a GPU. On a CPU the buffer lies in huge pages if it fills
    one and the system has them: a direct read then has fewer segments, and a decoding step, which
    reads every weight once, misses the TLB less often.
    """
    if device.type != "cpu" or pinned:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    start, flags = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    huge = nbytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES * huge, flags)
    if huge:
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=nbytes)


def round_up_to_block(nbytes: int) -> int:
    """Returns the next multiple of BLOCK_BYTES."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


CPU_CACHES = "cpu[0-9]*/cache/index[0-9]*"  # in /sys/devices/system/cpu
CPU_CACHE_BYTES = 2**25  # assumed where the system does not report its caches


def cache_bytes(device: torch.device, system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Returns the bytes of the last-level caches, on a CPU those of all sockets together."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes: dict[tuple[int, str], int] = {}  # by level and the CPUs that share the cache
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
    """Returns the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())}, {torch.get_num_threads()} threads"


def process_memory(device: torch.device) -> int:
    """Returns the bytes that this process uses of the device's memory; 0 for a GPU."""
    if device.type != "cpu":
        return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:  # no /proc: the peak instead
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

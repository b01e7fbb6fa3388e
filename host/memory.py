"""Memory of this machine: how much is free, how much a cache holds, and page-aligned buffers."""

import mmap
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def check_memory(needed: int, device: str | torch.device, what: str, remedy: str) -> None:
    """Raises MemoryError saying how many bytes are needed and how many there are."""
    available = available_memory(torch.device(device))
    if needed > available:
        raise MemoryError(
            f"{what} needs {size_text(needed)} of memory on {device}, where "
            f"{size_text(available)} is free: {remedy}"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now; all there are where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *cgroup_headroom(), 2**63)


def cgroup_headroom() -> Iterator[int]:
    """What each limit that this process lives under leaves; page cache counts as free."""
    own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
    leaf = Path("/sys/fs/cgroup", own)
    for group in (leaf, *leaf.parents):
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            yield int(most) - int((group / "memory.current").read_text()) + cached


def size_text(nbytes: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


BLOCK_BYTES = 4096  # bytes; what O_DIRECT asks for
HUGE = 2 * 2**20  # bytes of a huge page


def page_aligned(nbytes: int, device: torch.device, pinned: bool = False) -> Tensor:
    """That many bytes of zeros, beginning at a multiple of BLOCK_BYTES. pinned: for copies to a GPU.

    On a CPU in huge pages, as far as it fills any and the system has them: the disk then has fewer
    places to write to, and a step, which reads every weight once, waits less for page tables.
    """
    if device.type != "cpu" or pinned:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    start, flags = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    huge = nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    memory = mmap.mmap(-1, nbytes + HUGE * huge, flags)
    if huge:
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE * HUGE)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=nbytes)


def round_up_to_block(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


CPU_CACHES = "cpu[0-9]*/cache/index[0-9]*"  # in /sys/devices/system/cpu
CPU_CACHE_BYTES = 2**25  # where the system does not tell


def cache_bytes(device: torch.device, system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the caches of the last level, of a CPU those of all its sockets."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes: dict[tuple[int, str], int] = {}  # by level, and the CPUs that share it
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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())}, {torch.get_num_threads()} threads"


def process_memory(device: torch.device) -> int:
    """What this process takes already, where that is the device's memory."""
    if device.type != "cpu":
        return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:  # no /proc: the most that it has taken
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

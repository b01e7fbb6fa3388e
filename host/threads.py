"""This machine's processors: how many threads a process may use.

Start at set_threads.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


def set_threads(count: int | None) -> None:
    """Let torch use so many threads; None: as many as are free, or what OMP_NUM_THREADS says."""
    if count is None and "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(count or min(torch.get_num_threads(), free_threads()))


def free_threads() -> int:
    """The cores that this process may run on, at most what its containers' quotas allow.

    Threads beyond a quota are stopped in turn, and the others wait for them at every product.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores or 1, *quotas()]))


def quotas() -> Iterator[int]:
    """Cores that this process's cgroup and each of its ancestors allow (cpu.max, version 2)."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
        leaf = CGROUPS / own
        for group in (leaf, *leaf.parents):
            limit = group / "cpu.max"
            if limit.is_file() and (words := limit.read_text().split())[0] != "max":
                yield math.ceil(int(words[0]) / int(words[1]))
    except OSError:  # not Linux, or not readable: no quota is known
        return

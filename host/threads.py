"""Limits torch's threads to the cores that this process may use.

Start at set_threads.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


def set_threads(count: int | None) -> None:
    """Set torch's number of threads.

    count: --threads. None: torch's own number, but at most free_threads() and the number of
    physical cores: two threads on one core share its units, which one thread of the kernels keeps
    busy. With None and OMP_NUM_THREADS set, which torch has read already, the number stays. Call
    this function before the first computation, and before machine_name, which reads the number.
    """
    if count is None and "OMP_NUM_THREADS" in os.environ:
        return
    if count is None:
        free = free_threads()
        cores = torch.cpu.get_capabilities().get("num_physical_cores") or free
        count = min(torch.get_num_threads(), free, cores)
    torch.set_num_threads(count)


def free_threads() -> int:
    """Returns the number of cores that this process may run on, limited by containers' CPU quotas.

    With more threads than the quota, the kernel pauses some threads, and at the end of each matrix
    product all others wait for the paused ones.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores or 1, *quotas()]))


def quotas() -> Iterator[int]:
    """Yield the number of cores that each cgroup of this process allows, rounded up.

    A cgroup is a set of processes that Linux limits together, such as a container. Only cgroups
    (version 2) with a limit in cpu.max are counted.
    """
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
        leaf = CGROUPS / own
        for group in (leaf, *leaf.parents):
            limit = group / "cpu.max"
            if limit.is_file() and (words := limit.read_text().split())[0] != "max":
                # The microseconds of computing that are allowed in a period, and the period.
                yield math.ceil(int(words[0]) / int(words[1]))
    except OSError:  # not Linux, or not readable
        return

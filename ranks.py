"""The processes (ranks) that run one model together: they start under torchrun.

Start at join_process_group. Every rank runs the same program on the same input and computes the
same results. Rank 0 decides what can differ between processes (a clock, free memory, what the user
types) and broadcasts it, see broadcast_from_rank0. Only rank 0 prints and writes files; another
rank prints only the error that ends it. tp.py and pp.py divide a model among the ranks.

A collective is a call that all ranks must make at the same point: if one rank does not make it, the
others wait. torchrun sets the environment variables RANK, WORLD_SIZE, LOCAL_RANK and
LOCAL_WORLD_SIZE (the number of ranks on this machine). Without torchrun they are missing, and this
process is alone.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from host.torch_private import add_in_store, one_shot_all_reduce

T = TypeVar("T")
# Rank 0 may wait days for a user's input. If a rank ends, its connections close, and the others
# fail at once; torchrun notices, too.
COLLECTIVE_TIMEOUT = timedelta(weeks=1)
# Within this time torchrun ends the ranks that wait for a rank that has failed.
ERROR_REPORT_SECONDS = 4.0


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of ranks."""

    rank: int
    world_size: int

    def shard_range(self, whole: int) -> range:
        """Return this rank's part of range(whole): ceil(whole / world_size) numbers; the last ranks
        may have fewer or none. whole: a count of heads, neurons or ids, divided in tp.py."""
        size = -(-whole // self.world_size)
        return range(min(self.rank * size, whole), min((self.rank + 1) * size, whole))


def local_device(device: torch.device) -> torch.device:
    """Return this process's GPU, by torchrun's LOCAL_RANK. Returns `device` unchanged if it is not
    a GPU, or without torchrun. device: the user's choice, the same on all ranks."""
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local)) if local and device.type == "cuda" else device


def join_process_group(device: torch.device) -> Ranks | None:
    """Connect to the other processes that torchrun started. Returns None for a single process.

    All ranks must call it, once, before any collective. device: this process's own, see
    local_device; GPUs communicate by NCCL, CPUs by Gloo. On ranks other than 0, redirects Python's
    stdout and stderr to /dev/null until the process ends, except that log_failure and
    restore_stderr undo it for stderr.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if ranks.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- until the process ends
    return ranks


@functools.cache
def has_one_shot_all_reduce(device: torch.device) -> bool:
    """Return whether all GPUs can run the one-shot all-reduce, which reads the other GPUs' memory.
    For a small tensor NCCL takes two to four times as long. compiled.py lets compiled code use it.

    All ranks must call this function at the same point, because they try it together. A second call
    for the device returns the result of the first. False for a CPU, and for a single process.
    """
    if not dist.is_initialized() or device.type != "cuda":
        return False
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    works = on_one_machine and one_shot_all_reduce_works(device)
    on_all = torch.tensor([works], dtype=torch.int32, device=device)
    dist.all_reduce(on_all, dist.ReduceOp.MIN)
    return bool(on_all)


def one_shot_all_reduce_works(device: torch.device) -> bool:
    """Try one one-shot all-reduce and return whether its result is right; False if the GPUs cannot
    read each other's memory. All ranks must call it together."""
    group = dist.group.WORLD.group_name
    try:
        y = one_shot_all_reduce(torch.ones(1024, device=device), group)
        return bool((y == dist.get_world_size()).all())
    except RuntimeError:
        return False


def leave_process_group() -> None:
    """Wait for all ranks, then disconnect. Does nothing in a single process.

    Commands call it at the end of a run without an error: after an error the other ranks may never
    call it.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_rank0() -> bool:
    """Return whether this process is rank 0, which prints and writes files, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def broadcast_from_rank0(compute: Callable[[], T]) -> T:
    """Call `compute` on rank 0 only, and return its result on all ranks.

    All ranks must call this function. The result must be picklable. A single process calls
    `compute`. If `compute` raises, the other ranks wait until rank 0's process ends, and then fail.
    """
    if not dist.is_initialized():
        return compute()
    result = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def all_gather_object(own: T) -> list[T]:
    """Return the objects of all ranks, in the order of the ranks. own: this rank's object.

    All ranks must call this function. The objects must be picklable. A single process gets [own].
    """
    if not dist.is_initialized():
        return [own]
    objects: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(objects, own)
    return objects


def wait_if_peer_failed(error: Exception) -> bool:
    """Return whether the error means that the connection to another rank is lost.

    cli/command.py calls it with the error that ends this process, and then reports only that
    another rank has ended. If the connection is lost, first wait ERROR_REPORT_SECONDS: the rank
    that failed reports its error before this one, and torchrun usually ends this process during the
    wait. Gloo raises RuntimeErrors whose text has "gloo", NCCL dist.DistErrors.
    """
    lost = dist.is_initialized() and isinstance(error, RuntimeError)
    lost = lost and ("gloo" in str(error) or isinstance(error, dist.DistError))
    if lost:
        time.sleep(ERROR_REPORT_SECONDS)
    return lost


def log_failure(line: str) -> None:
    """Print the line of the error that ends this process on stderr, on any rank.

    If several ranks fail with the same line, only the first of them prints it: each rank adds 1 to
    the count of its line in the store that the ranks share. Undoes the redirection of stderr.
    """
    rank = int(os.environ.get("RANK", "0"))
    restore_stderr()
    if dist.is_initialized() and add_in_store(line, 1) > 1:  # another rank was first
        return
    print(f"rank {rank}: {line}" if rank else line, file=sys.stderr, flush=True)


def restore_stderr() -> None:
    """Undo join_process_group's redirection of stderr on ranks other than 0."""
    if not is_rank0():
        sys.stderr = sys.__stderr__

"""The processes that run one model together, started by torchrun: how they meet, agree and end.

Start at join. Every rank runs the same program on the same input, and what they compute is the same
on all; only what a clock, free memory or a person decides is asked of rank 0, by `broadcast_from_rank0`. Rank 0
alone is heard and writes files, but for what ends another rank. What each of them holds of the
model is said in tp.py and pp.py.
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

T = TypeVar("T")
# However long a person thinks. A rank that ends is noticed by its connections, and by torchrun.
COLLECTIVE_TIMEOUT = timedelta(weeks=1)
ERROR_REPORT_SECONDS = 4.0  # seconds: by then torchrun has ended the ranks that have lost another


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int
    world_size: int

    def shard_range(self, whole: int) -> range:
        """This rank's of so many things, as evenly as they go; the last ranks may have fewer."""
        most = -(-whole // self.world_size)
        return range(min(self.rank * most, whole), min((self.rank + 1) * most, whole))


def local_device(device: torch.device) -> torch.device:
    """The one of this machine's GPUs that this process is to use."""
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local)) if local and device.type == "cuda" else device


def join_process_group(device: torch.device) -> Ranks | None:
    """Meet the other processes that torchrun has started; None: there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if ranks.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- for good
    return ranks


@functools.cache
def has_one_shot_all_reduce(device: torch.device) -> bool:
    """Whether GPUs add what is small by one kernel that reads the others' memory, as the compiler
    then lets them do: tried once, on all ranks. NCCL takes two to four times as long."""
    if not dist.is_initialized() or device.type != "cuda":
        return False
    from torch.distributed import _symmetric_memory as symmetric_memory  # not every build has it

    group, fine = dist.group.WORLD.group_name, False
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        try:
            symmetric_memory.enable_symm_mem_for_group(group)
            x = symmetric_memory.empty(1024, dtype=torch.float32, device=device).fill_(1)
            symmetric_memory.rendezvous(x, group)
            y = torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group)
            fine = bool((y == dist.get_world_size()).all())
        except RuntimeError:
            pass  # no such links: NCCL
    said = torch.tensor([fine], dtype=torch.int32, device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said)


def leave_process_group() -> None:
    """Once all have done their work."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_rank0() -> bool:
    """Whether this process writes files: rank 0 does."""
    return int(os.environ.get("RANK", "0")) == 0


def broadcast_from_rank0(say: Callable[[], T]) -> T:
    """What rank 0 says, on all ranks, of which no other is asked."""
    if not dist.is_initialized():
        return say()
    said = [say() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]


def all_gather_object(own: T) -> list[T]:
    """What every rank has, in the order of the ranks."""
    if not dist.is_initialized():
        return [own]
    found: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def wait_if_peer_failed(error: Exception) -> bool:
    """Whether an error says no more than that another rank has ended. Then wait, for that one to
    be heard first: torchrun ends this process meanwhile, if it has ended by itself."""
    lost = dist.is_initialized() and isinstance(error, RuntimeError)
    lost = lost and ("gloo" in str(error) or isinstance(error, dist.DistError))
    if lost:
        time.sleep(ERROR_REPORT_SECONDS)
    return lost


def log_failure(line: str) -> None:
    """Say on stderr what ends this process; where all end for the same reason, one of them does."""
    rank = int(os.environ.get("RANK", "0"))
    restore_stderr()
    if dist.is_initialized() and dist.distributed_c10d._get_default_store().add(line, 1) > 1:
        return
    print(f"rank {rank}: {line}" if rank else line, file=sys.stderr, flush=True)


def restore_stderr() -> None:
    """From now on this process is heard, whatever its rank."""
    if not is_rank0():
        sys.stderr = sys.__stderr__

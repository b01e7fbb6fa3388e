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

from host.torch_private import add_in_store, one_shot_all_reduce

T = TypeVar("T")
# However long a person thinks. A rank that ends is noticed by its connections, and by torchrun.
COLLECTIVE_TIMEOUT = timedelta(weeks=1)
ERROR_REPORT_SECONDS = 4.0  # seconds: by then torchrun has ended the ranks that have lost another


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int
    count: int

    def part(self, whole: int) -> range:
        """This rank's of so many things, as evenly as they go; the last ranks may have fewer."""
        most = -(-whole // self.count)
        return range(min(self.rank * most, whole), min((self.rank + 1) * most, whole))


def own_device(device: torch.device) -> torch.device:
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
def one_shot_sums(device: torch.device) -> bool:
    """Whether GPUs add what is small by one kernel that reads the others' memory, as the compiler
    then lets them do: tried once, on all ranks. NCCL takes two to four times as long."""
    if not dist.is_initialized() or device.type != "cuda":
        return False
    group, fine = dist.group.WORLD.group_name, False
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        try:
            y = one_shot_all_reduce(torch.ones(1024, device=device), group)
            fine = bool((y == dist.get_world_size()).all())
        except RuntimeError:
            pass  # no such links: NCCL
    said = torch.tensor([fine], dtype=torch.int32, device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said)


def leave() -> None:
    """Once all have done their work."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def writes() -> bool:
    """Whether this process writes files: rank 0 does."""
    return int(os.environ.get("RANK", "0")) == 0


def broadcast_from_rank0(say: Callable[[], T]) -> T:
    """What rank 0 says, on all ranks, of which no other is asked."""
    if not dist.is_initialized():
        return say()
    said = [say() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]


def gathered(own: T) -> list[T]:
    """What every rank has, in the order of the ranks."""
    if not dist.is_initialized():
        return [own]
    found: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def lost_another(error: Exception) -> bool:
    """Whether an error says no more than that another rank has ended. Then wait, for that one to
    be heard first: torchrun ends this process meanwhile, if it has ended by itself."""
    lost = dist.is_initialized() and isinstance(error, RuntimeError)
    lost = lost and ("gloo" in str(error) or isinstance(error, dist.DistError))
    if lost:
        time.sleep(ERROR_REPORT_SECONDS)
    return lost


def speak(line: str) -> None:
    """Say on stderr what ends this process; where all end for the same reason, one of them does."""
    rank = int(os.environ.get("RANK", "0"))
    heard()
    if dist.is_initialized() and add_in_store(line, 1) > 1:
        return
    print(f"rank {rank}: {line}" if rank else line, file=sys.stderr, flush=True)


def heard() -> None:
    """From now on this process is heard, whatever its rank."""
    if not writes():
        sys.stderr = sys.__stderr__

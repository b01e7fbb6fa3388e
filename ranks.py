"""The processes that run one model together, started by torchrun: how they meet and agree.

Start at join. Every rank runs the same program on the same input, and what they compute is the same
on all; only what a clock, free memory or a person decides is asked of rank 0, by `agreed`. Rank 0
alone is heard and writes files.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


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


def join(device: torch.device) -> Ranks | None:
    """Meet the other processes that torchrun has started; None: there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if ranks.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return ranks


def agreed(say: Callable[[], T]) -> T:
    """What rank 0 says, on all ranks, of which no other is asked."""
    if not dist.is_initialized():
        return say()
    said = [say() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]

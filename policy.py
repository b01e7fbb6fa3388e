"""Where a model's weights, KV cache and activations live, and how its rows are grouped.

Start at Policy. What it says is exactly what offload.py runs.

Terms are FlexGen's (arXiv 2303.06865): a block of rows is cut into micro-batches that pass through
a layer one after the other, so that the layer's weights are brought once for all of them. Of
weights, cache and activations a share is on the device, a share in host memory, the rest on disk.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Share:
    """Per cent on the device and in host memory; the rest is on disk."""

    device: float = 100.0
    host: float = 0.0

    def __post_init__(self):
        if min(self.device, self.host, self.disk) < 0:
            raise ValueError(
                f"{self.device:g} and {self.host:g} per cent: neither may be negative, nor their "
                "sum more than 100"
            )

    @property
    def disk(self) -> float:
        return 100.0 - self.device - self.host

    def tiers(self, count: int) -> tuple[str, ...]:
        """The tier of each of `count` things, mixed as evenly as can be: at any point each tier
        has what it should have of those before, give or take one."""
        shares = dict(zip(TIERS, (self.device, self.host, self.disk), strict=True))
        had = dict.fromkeys(TIERS, 0)
        chosen = []
        for n in range(1, count + 1):
            lacking = {tier: share * n / 100 - had[tier] for tier, share in shares.items()}
            tier = max(lacking, key=lacking.get)
            had[tier] += 1
            chosen.append(tier)
        return tuple(chosen)


@dataclass(frozen=True)
class Policy:
    """How a model that is larger than a device's memory is run.

    micro_batch: rows that a layer takes at once; micro_batches: how many of them share a layer's
    weights. cpu_attention: attention over a cache in host memory, or on disk, is computed there.
    pin: host memory that a GPU copies from without a detour. overlap: bring what is needed next
    while computing. directory: where scratch files go, which have no names.
    """

    weights: Share = Share()
    cache: Share = Share()
    activations: Share = Share()
    micro_batch: int = 4
    micro_batches: int = 1
    cpu_attention: bool = False
    pin: bool = True
    overlap: bool = True
    directory: Path = Path("offload")

    def pins(self, device: torch.device) -> bool:
        return self.pin and device.type == "cuda"

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.micro_batch * self.micro_batches

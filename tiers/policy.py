"""Where a model's weights, KV cache and activations live, and how its rows are grouped.

Start at Policy: what it says is exactly what offload.py and tiered_cache.py run. Which one is best
for a machine is found in planner.py.

Terms are FlexGen's (arXiv 2303.06865, section 3): a block of rows is cut into micro-batches that
pass through a layer one after the other, so that its weights are brought once for all of them. A
share of weights, of the cache and of the activations is on the device, a share in host memory, the
rest on disk. Where the device is the CPU, device and host are one memory.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

TIERS = ("device", "host", "disk")
WEIGHT_BUFFERS, CACHE_BUFFERS = 2, 3  # of the rings of offload.py and tiered_cache.py


@dataclass(frozen=True)
class Share:
    """Per cent on the device and in host memory; the rest is on disk."""

    device: float = 100.0
    host: float = 0.0

    def __post_init__(self):
        if min(self.device, self.host) < 0 or self.device + self.host > 100 + 1e-9:
            raise ValueError(
                f"{self.device:g} % on the device and {self.host:g} % in host memory: neither may "
                "be negative, nor their sum more than 100"
            )

    @property
    def disk(self) -> float:
        return max(0.0, 100.0 - self.device - self.host)

    def tiers(self, count: int) -> tuple[str, ...]:
        """The tier of each of `count` things, mixed as evenly as can be: at any point each tier
        has what it should have of those before, give or take one."""
        shares = dict(zip(TIERS, (self.device, self.host, self.disk), strict=True))
        had, chosen = dict.fromkeys(TIERS, 0), []
        for n in range(1, count + 1):
            lacking = {tier: share * n / 100 - had[tier] for tier, share in shares.items()}
            tier = max(lacking, key=lacking.get)
            had[tier] += 1
            chosen.append(tier)
        return tuple(chosen)

    def counts(self, count: int) -> tuple[int, int, int]:
        tiers = self.tiers(count)
        return tuple(tiers.count(tier) for tier in TIERS)


@dataclass(frozen=True)
class Policy:
    """How a model that is larger than its device's memory is run.

    micro_batch: rows that a layer takes at once; micro_batches: how many of them share a layer's
    weights. chunk: prompt tokens that a layer takes at once; sweep: those that share its weights.
    compress_weight: dense weights are rounded to 4 bits, in groups of 64. cpu_attention:
    attention over a cache that is not on the device is computed on the host; attention_share: of
    how many tokens it reads the values there, 1: exact. pin: host memory that
    a GPU copies from without a detour. overlap: what is needed next is brought while computing.
    directory: where scratch files go, which have no names.
    """

    weights: Share = Share()
    cache: Share = Share()
    activations: Share = Share()
    micro_batch: int = 4
    micro_batches: int = 1
    chunk: int = 512
    prefill_chunk_tokens: int = 4096
    compress_weight: bool = False
    cpu_attention: bool = False
    attention_share: float = 1.0
    pin: bool = True
    overlap: bool = True
    directory: Path = Path("offload")

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.micro_batch * self.micro_batches

    @property
    def plain(self) -> bool:
        """Whether it is what a model does without one."""
        shares = self.weights, self.cache, self.activations
        grouped = self.micro_batches > 1 or self.compress_weight
        return not grouped and all(share.device == 100 for share in shares)

    def pins(self, device: torch.device) -> bool:
        return self.pin and device.type == "cuda"

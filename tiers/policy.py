"""The policy: where weights, KV cache and activations live, and how rows are grouped.

Start at Policy. offload.py and kv_cache.py run exactly what a policy states; planner.py searches
for the best policy for a machine.

The terms are FlexGen's (arXiv 2303.06865, section 3). A row is one text. A block of rows is cut
into micro-batches, which pass through a layer one after the other, so that its weights are loaded
once for all of them.
One share of the weights is on the device, another in host memory, and the rest on disk; the KV
cache and the activations are divided in the same way. If the device is the CPU, device and host are
the same memory. A cell is the KV cache of one layer for one micro-batch. A pass runs all layers
once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TIERS = ("device", "host", "disk")
# The numbers of prefetch buffers for layers (offload.py), and for cells (kv_cache.py).
WEIGHT_BUFFERS, CACHE_BUFFERS = 2, 3


@dataclass(frozen=True)
class Share:
    """Percentages of the weights, the cache or the activations on the device and in host memory;
    the rest is on disk. Raises ValueError if one is negative or their sum exceeds 100."""

    device: float = 100.0
    host: float = 0.0

    def __post_init__(self):
        # 1e-9: the rounding error of shares that were computed.
        if min(self.device, self.host) < 0 or self.device + self.host > 100 + 1e-9:
            raise ValueError(
                f"{self.device:g} % on the device and {self.host:g} % in host memory: neither may "
                "be negative, nor their sum more than 100"
            )

    @property
    def disk(self) -> float:
        return max(0.0, 100.0 - self.device - self.host)

    def tiers(self, count: int) -> tuple[str, ...]:
        """Return the tier of each of `count` items, such as layers. The tiers are interleaved, so
        that transfers are spread evenly over a pass: among the first n items, the number on each
        tier differs from the tier's share of n by at most one. Each item gets the tier that lacks
        most of its share so far."""
        shares = dict(zip(TIERS, (self.device, self.host, self.disk), strict=True))
        assigned, result = dict.fromkeys(TIERS, 0), []
        for n in range(1, count + 1):
            missing = {tier: share * n / 100 - assigned[tier] for tier, share in shares.items()}
            tier = max(missing, key=missing.get)
            assigned[tier] += 1
            result.append(tier)
        return tuple(result)

    def tiers_by_size(self, sizes: Sequence[int]) -> tuple[str, ...]:
        """Return the tier of each item, such as cells of the KV cache, given their sizes: items of
        each size are divided as `tiers` does. So the bytes on a tier exceed its share of all bytes
        by less than one item of each size."""
        of_size = {size: iter(self.tiers(count)) for size, count in Counter(sizes).items()}
        return tuple(next(of_size[size]) for size in sizes)

    def counts(self, count: int) -> tuple[int, int, int]:
        """Return how many of `count` items are on each of TIERS."""
        tiers = self.tiers(count)
        return tuple(tiers.count(tier) for tier in TIERS)


@dataclass(frozen=True)
class Policy:
    """How to run a model that is larger than the device's memory.

    weights, cache, activations: the share of each that is on each tier. micro_batch: rows of a
    micro-batch; micro_batches: how many micro-batches use a layer's weights before the next layer
    is loaded. prefill_chunk_tokens: prompt tokens of all rows that use a layer's weights before the
    next layer is loaded; tokens_at_once: how many of a micro-batch's tokens a layer computes in one
    call, but at least those of one row (rows_per_call).
    compress_weight: round dense weights to 4 bits, in groups of 64. cpu_attention: compute on the
    host the attention over a cache that is not on the device; attention_share: the share of tokens
    whose values this attention reads, 1 for exact attention. pin: allocate host memory that a GPU
    can copy from directly. overlap: transfer while computing. directory: for scratch files.
    """

    weights: Share = Share()
    cache: Share = Share()
    activations: Share = Share()
    micro_batch: int = 4
    micro_batches: int = 1
    tokens_at_once: int = 512
    prefill_chunk_tokens: int = 4096
    compress_weight: bool = False
    cpu_attention: bool = False
    attention_share: float = 1.0
    pin: bool = True
    overlap: bool = True
    directory: Path = Path("offload")

    @property
    def rows(self) -> int:
        """The number of rows that run together: of a block of rows."""
        return self.micro_batch * self.micro_batches

    def rows_per_call(self, tokens: int) -> int:
        """Return how many rows of `tokens` new tokens each a layer computes in one call: at most a
        micro-batch, and at most tokens_at_once tokens together; one row even if it has more."""
        return max(1, min(self.micro_batch, self.tokens_at_once // tokens))

    @property
    def plain(self) -> bool:
        """Whether the model can run without offloading: all is on the device, a block of rows is
        one micro-batch, and weights are not compressed. load.py then makes no StreamedLayers."""
        shares = self.weights, self.cache, self.activations
        grouped = self.micro_batches > 1 or self.compress_weight
        return not grouped and all(share.device == 100 for share in shares)

    def pins(self, device: torch.device) -> bool:
        """Return whether to pin host memory whose bytes are copied to this device."""
        return self.pin and device.type == "cuda"

"""What several devices would do with a model: a model of tensor parallelism and of pipelines.

Start at `table`. A step reads a share of the weights on each device, and waits for two all-reduces
of each layer, which are so small that they take a link's latency. A pipeline's stage reads as much,
and its micro_batches hide what they wait for; a single text goes from stage to stage. These are figures
of links and of one device put together, and no measurement; what they say of gpt-fast's A100s is
within 15 % of what was published (tests/test_links.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

COUNTS = 1, 2, 4, 8, 16, 32, 64  # devices


@dataclass(frozen=True)
class Link:
    """latency, doubling: seconds of an all-reduce of few bytes, and what twice as many devices add;
    rate: bytes per second that a device sends."""

    latency: float
    doubling: float
    rate: float


# NVLink of A100s by NCCL in CUDA graphs: fitted to gpt-fast's 7B on 2 and 8 devices, and nothing
# else. One-shot: symmetric memory on H100s, as vLLM's pull request 24111 has measured it.
LINKS = {
    "nvlink": Link(11e-6, 5e-6, 250e9),
    "nvlink-one-shot": Link(4e-6, 3e-6, 400e9),
    "pcie": Link(20e-6, 10e-6, 25e9),
    "ethernet-100": Link(40e-6, 30e-6, 12e9),
    "ethernet-10": Link(80e-6, 60e-6, 1.2e9),
}


@dataclass(frozen=True)
class Step:
    """What a step of decoding does, of all devices together.

    shared: bytes of weights, of which each device reads its share; whole: that every device reads;
    hidden: bytes of a token between layers; rows: tokens of a step.
    """

    layers: int
    shared: float
    whole: float
    hidden: int
    rows: int = 1


def all_reduce_seconds(link: Link, nbytes: float, count: int) -> float:
    """Latency, and each device sends and receives nearly twice what is added."""
    if count == 1:
        return 0.0
    return (
        link.latency + link.doubling * math.log2(count) + 2 * nbytes * (1 - 1 / count) / link.rate
    )


def tensor_parallel_seconds(step: Step, rate: float, link: Link, count: int) -> float:
    """Of a step. rate: bytes of weights per second that one device reads in a step."""
    reading = (step.shared / count + step.whole) / rate
    adding = all_reduce_seconds(link, step.hidden * step.rows, count)
    return reading + 2 * step.layers * adding


def pipeline_seconds(step: Step, rate: float, link: Link, count: int) -> tuple[float, float]:
    """Of a step of one micro_batch of rows from end to end, and between the steps of two micro_batches where
    all stages are busy; a stage has whole layers."""
    slowest = -(-step.layers // count) / step.layers * step.shared / rate + step.whole / rate
    passing = (link.latency + step.hidden * step.rows / link.rate) * (count > 1)
    return step.shared / rate + step.whole / rate + count * passing, max(slowest, passing)


def table(step: Step, rate: float, link: Link) -> Iterator[tuple[int, float, float | None]]:
    """Devices, and tokens per second in tensor parallelism and in a pipeline, None: it has more
    stages than the model layers."""
    for count in COUNTS:
        sharded = step.rows / tensor_parallel_seconds(step, rate, link, count)
        staged = step.rows / pipeline_seconds(step, rate, link, count)[1]
        yield count, sharded, staged if count <= step.layers else None

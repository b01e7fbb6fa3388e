"""Predicted tokens per second of a model on several devices: tensor parallelism and pipelines.

Start at `table`. In tensor parallelism every device reads its share of each layer's weights, and
waits for two all-reduces in each layer, which are so small that their time is the link's latency.
In a pipeline every device is a stage: it has its share of the layers, and micro-batches are in
different stages at the same time, which hides the time of the transfers. A single text passes
through the stages one after the other. The figures combine published times of links with the read
rate of one device; they are not measured. generate.py --plan --link prints them (plan.on_devices).
They agree with gpt-fast's published rates on A100s to within 15 % (tests/test_links.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

DEVICE_COUNTS = 1, 2, 4, 8, 16, 32, 64


@dataclass(frozen=True)
class Link:
    """A link between devices.

    An all-reduce of few bytes takes latency + doubling * log2(number of devices) seconds, and a
    transfer of few bytes from one device to another takes latency seconds. rate: bytes per second
    that one device sends.
    """

    latency: float
    doubling: float
    rate: float


# nvlink: A100s with NCCL in CUDA graphs, fitted to gpt-fast's 7B on 2 and 8 devices only.
# nvlink-one-shot: symmetric memory on H100s, as measured in vLLM's pull request 24111.
LINKS = {
    "nvlink": Link(11e-6, 5e-6, 250e9),
    "nvlink-one-shot": Link(4e-6, 3e-6, 400e9),
    "pcie": Link(20e-6, 10e-6, 25e9),
    "ethernet-100": Link(40e-6, 30e-6, 12e9),
    "ethernet-10": Link(80e-6, 60e-6, 1.2e9),
}


@dataclass(frozen=True)
class Step:
    """A decoding step of a model: its number of layers and its bytes, for all devices together.

    shared: bytes of weights that the devices divide among them. whole: bytes of weights that every
    device reads. hidden: bytes of one token's activations between two layers. rows: tokens that one
    step computes, one of each text. In a pipeline: the tokens of one micro-batch, a group of texts
    that is in one stage at a time.
    """

    layers: int
    shared: float
    whole: float
    hidden: int
    rows: int = 1


def all_reduce_seconds(link: Link, nbytes: float, count: int) -> float:
    """Return the seconds of an all-reduce of `nbytes` bytes over `count` devices (each gets the sum
    of all): the latency, plus the transfer, in which each device sends nearly 2 * nbytes. 0 for one
    device."""
    if count == 1:
        return 0.0
    transfer = 2 * nbytes * (1 - 1 / count) / link.rate
    return link.latency + link.doubling * math.log2(count) + transfer


def tensor_parallel_seconds(step: Step, rate: float, link: Link, count: int) -> float:
    """Return the seconds of a decoding step with tensor parallelism over `count` devices: reading
    the weights, plus two all-reduces in each layer.

    rate: bytes of weights per second that one device reads.
    """
    reading = (step.shared / count + step.whole) / rate
    all_reduce = all_reduce_seconds(link, step.hidden * step.rows, count)
    return reading + 2 * step.layers * all_reduce


def pipeline_seconds(step: Step, rate: float, link: Link, count: int) -> tuple[float, float]:
    """Return two times of a pipeline with `count` stages: the seconds in which one micro-batch
    passes through all stages, and, if all stages are busy, the seconds between the ends of two
    micro-batches.

    The second is the time of the slowest stage or, if longer, of a transfer. The slowest stage has
    the number of layers per stage, rounded up, and reads step.whole. Each stage makes one transfer,
    the last one to the first for the next token. No time is counted for computation beside the
    reading of weights. step.rows: tokens of one micro-batch. rate: bytes of weights per second that
    one device reads.
    """
    slowest = -(-step.layers // count) / step.layers * step.shared / rate + step.whole / rate
    transfer = (link.latency + step.hidden * step.rows / link.rate) * (count > 1)
    return step.shared / rate + step.whole / rate + count * transfer, max(slowest, transfer)


def table(step: Step, rate: float, link: Link) -> Iterator[tuple[int, float, float | None]]:
    """Yield, for each of DEVICE_COUNTS, that number, the tokens per second with tensor parallelism,
    and the tokens per second with a pipeline whose stages are all busy, each with another
    micro-batch of step.rows texts; None for a pipeline with more stages than the model has layers.
    With one device both rates are those of the device.

    rate: bytes of weights per second that one device reads.
    """
    for count in DEVICE_COUNTS:
        parallel = step.rows / tensor_parallel_seconds(step, rate, link, count)
        pipelined = step.rows / pipeline_seconds(step, rate, link, count)[1]
        yield count, parallel, pipelined if count <= step.layers else None

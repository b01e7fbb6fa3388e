"""How many neurons to keep in memory, and how to read the others: a model of what a token costs.

Start at choose. A pack knows of each layer how many neurons the last k tokens use together, and how
many of the next token's are not among them (predictor.py); the disk is asked how long it takes to
bring so many records in so many requests, so many at a time. What a token costs follows for every
window k, number at a time and gap that is read across, and the least costly is taken, of those
whose neurons fit into memory.

Based on "LLM in a flash" (arXiv 2312.11514, sections 3.1 and 4): latency = input and output +
memory management + compute.

Shapes: L layers, K windows.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from host.measurements import keep, known
from host.memory import machine_name, page_aligned, size_text
from neurons.pack import Pack
from neurons.products import Products, has_kernel
from neurons.records import NeuronFile
from tiers.prefetch import CPU
from tiers.probe import typical

DEPTHS = 16, 32, 64, 128  # reads under way at a time
CALLS = (4, 1), (32, 1), (128, 1), (512, 1), (4, 4), (64, 4)  # requests of a call, records of each
STREAMED = 2**27  # bytes
BETWEEN = 2**24  # bytes of a product between two calls
REPEATS = 15
COMPUTED = 2**26  # bytes: more than a processor's caches hold
ACTIVE = 17  # neurons, of which one is active in what is measured; the last is none
STREAMING = 5e-3  # seconds of a whole layer beside its bytes: ten chunks go from thread to thread
MANAGING = 60e-6  # seconds of a layer: what is there, and what gives way


@dataclass(frozen=True)
class MachineCosts:
    """What bringing and computing records takes here, in seconds.

    reads: by depth, of a call, of each of its requests, of each of its bytes. streamed: of a byte
    of one layer after the other. computed: of a record that is in memory; by_slots: all that are
    there are computed, else those that are predicted.
    """

    reads: dict[int, tuple[float, float, float]]
    streamed: float
    computed: float
    by_slots: bool

    def reading(self, depth: int, requests: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        call, request, byte = self.reads[depth]
        return np.where(requests > 0, call + request * requests + byte * nbytes, 0)


@dataclass(frozen=True)
class CachePlan:
    """What stays in memory and how the rest is read; and what a token is expected to cost."""

    window: float  # tokens whose neurons stay
    slots: tuple[int, ...]  # of each layer
    depth: int
    gap: int
    call: float  # seconds of a call, of each of its requests, and of each record of these
    request: float
    record: float
    whole: float  # seconds of a layer, read from one end to the other
    reading: float  # seconds of a token
    computing: float
    meanwhile: float  # of that, beside reading
    nbytes: float  # that are read for a token
    requests: float

    def seconds(self, calls: int, requests: int, records: int) -> float:
        """What the disk's rates say that so much takes."""
        return calls * self.call + requests * self.request + records * self.record

    def prefers_whole_layer(self, missing: np.ndarray, slots: int) -> bool:
        """Whether a layer is read faster than so many of its neurons are, ascending ids, by calls
        that each fill its slots."""
        calls = -(-len(missing) // slots)
        if self.seconds(calls, len(missing), len(missing)) <= self.whole:  # wherever they are
            return False
        requests = 1 + np.count_nonzero(missing[1:] - missing[:-1] > self.gap + 1)
        return self.seconds(calls, max(calls, requests), len(missing)) > self.whole

    def lines(self, neurons: int) -> list[str]:
        share = 100 * sum(self.slots) / (neurons * len(self.slots))
        return [
            f"flash: {share:.1f} % of the neurons in memory, as many as {self.window:.1f} tokens "
            f"use; {self.depth} reads at a time, gaps of up to {self.gap}",
            f"  expected    {size_text(self.nbytes)} in {self.requests:.0f} requests for a token: "
            f"{1000 * self.reading:.1f} ms of reading, {1000 * self.computing:.1f} ms of "
            f"feed-forward products, {1000 * self.meanwhile:.1f} of them meanwhile",
        ]


class NeuronUsage:
    """A pack's figures of all layers, for windows of any length.

    Beyond the longest that is known, usage goes on to all neurons, at twice that length.
    """

    def __init__(self, pack: Pack, neurons: int):
        layers, self.gaps = pack.layers, pack.manifest["gaps"]
        known = min(len(layer["usage"]) for layer in layers)
        windows = pack.manifest["windows"][:known]
        none = [0.0] * len(self.gaps)
        self._windows = [*windows, 2 * windows[-1]]
        self._usage = np.array([[*layer["usage"][:known], neurons] for layer in layers])  # (L, K)
        self._reads = [
            np.array([[*layer[name][:known], none] for layer in layers])  # (L, K, gaps)
            for name in ("records", "requests")
        ]
        self.predicted = np.array([layer["predicted"] for layer in layers]) * neurons  # (L,)

    def slots(self, window: float) -> np.ndarray:
        """(L,): neurons that so many tokens use; of less than one token a part of what it uses."""
        used = self._between(self._usage, max(window, 1)) * min(window, 1)
        return np.ceil(used).astype(int).clip(1)

    def reads(self, window: float, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """(L,) each: records that a token brings, and its requests."""
        at = self.gaps.index(gap)
        return tuple(self._between(table[..., at], max(window, 1)) for table in self._reads)

    def longest(self, fits: Callable[[float], bool]) -> float:
        """The longest window that fits; below 1 it is a part of what one token uses."""
        low, high = 0.0, float(self._windows[-1])
        if fits(high):
            return high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _between(self, table: np.ndarray, window: float) -> np.ndarray:
        """(L, K) -> (L,)."""
        return np.array([np.interp(window, self._windows, row) for row in table])


def choose(
    pack: Pack, neurons: int, memory: int, rest: int, disk: MachineCosts, window: float | None
) -> CachePlan:
    """What costs a token least. memory: bytes of weights, of which `rest` are no neurons. window:
    where it is given.

    Raises ValueError where not even one neuron of each layer fits, or those of the window do not.
    """
    usage, stride = NeuronUsage(pack, neurons), pack.format.stride

    def nbytes(k: float) -> int:
        return rest + int(usage.slots(k).sum()) * stride

    if (least := nbytes(window or 0)) > memory:
        what = f"the neurons of {window:g} tokens" if window else "a neuron of each layer"
        raise ValueError(
            f"--dram_budget is {size_text(memory)}, and {size_text(least)} are needed, for {what} "
            f"and {size_text(rest)} that are no neurons: say --dram_budget {1 + least // 10**6}MB"
        )
    longest = usage.longest(lambda k: nbytes(k) <= memory)
    windows = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k < longest] + [longest]
    windows = [window] if window else windows
    found = [
        cost(pack, usage, neurons, disk, *way)
        for way in itertools.product(windows, disk.reads, usage.gaps)
    ]
    return min(found, key=lambda way: way.reading + way.computing - way.meanwhile)


def cost(
    pack: Pack,
    usage: NeuronUsage,
    neurons: int,
    disk: MachineCosts,
    window: float,
    depth: int,
    gap: int,
) -> CachePlan:
    stride = pack.format.stride
    records, requests = usage.reads(window, gap)  # (L,) each
    slots = usage.slots(window)
    computed = slots if disk.by_slots else usage.predicted
    call, request, byte = disk.reads[depth]
    reading = disk.reading(depth, requests, records * stride)  # (L,) seconds
    here = ((computed - records) * disk.computed).clip(0)  # (L,) seconds, while others come
    return CachePlan(
        window=window,
        slots=tuple(slots.tolist()),
        depth=depth,
        gap=gap,
        call=call,
        request=request,
        record=byte * stride,
        whole=neurons * (disk.streamed * stride + disk.computed) + STREAMING,
        reading=float(reading.sum()),
        computing=float((computed * disk.computed + MANAGING).sum()),
        meanwhile=float(np.minimum(reading, here).sum()),
        nbytes=float(records.sum() * stride),
        requests=float(requests.sum()),
    )


def measured(
    pack: Pack, depths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> MachineCosts:
    """What is known of this machine's disk and products, or is measured now, within seconds."""
    format, place = pack.format, pack.neurons.stat()
    kernel = has_kernel(format, device, dtype)
    key = machine_name(device), place.st_dev, place.st_size, format, tuple(depths), dtype, kernel
    bias = torch.full((ACTIVE, len(format.matrices) - 1), -1, device=device, dtype=dtype)
    bias[0] = 1
    products = Products(format, bias, None, kernel)
    found = known("flash", key)
    if found is None:
        found = {
            "reads": {n: read_seconds(pack, n) for n in depths},
            "streamed": stream_seconds(pack),
            "computed": product_seconds(products, device),
        }
        keep("flash", key, found)
    reads = {int(n): tuple(seconds) for n, seconds in found["reads"].items()}
    return MachineCosts(reads, found["streamed"], found["computed"], products.by_slots)


def read_seconds(pack: Pack, depth: int) -> list[float]:
    """Of a call, a request and a byte: fitted to calls of several sizes, at random places.

    As in a model a product comes before each, and they go to many places: neither the system's code
    nor the memory is in the processor's caches then, which takes half a millisecond more.
    """
    stride = pack.format.stride
    file = NeuronFile(pack.neurons, stride, depth)
    total = pack.neurons.stat().st_size // stride
    draw, rows, seconds = random.Random(0), [], []
    memory = page_aligned(COMPUTED // stride * stride, CPU).fill_(1)
    slots = range(COMPUTED // stride)
    matrix = torch.ones(BETWEEN // 4096, 2048, dtype=torch.bfloat16)
    for requests, records in CALLS:
        if 2 * requests * records > total:
            continue
        took = []
        for _ in range(REPEATS):
            starts = sorted(draw.sample(range(total // records), requests))
            ids = (np.array(starts)[:, None] * records + np.arange(records)).ravel()
            places = memory.data_ptr() + np.array(draw.sample(slots, len(ids))) * stride
            F.linear(matrix[:1], matrix)
            start = time.perf_counter()
            file.bring(0, ids, places, 0)
            took.append(time.perf_counter() - start)
        rows.append((1, requests, requests * records * stride))
        seconds.append(statistics.median(took))
    if not rows:
        return [0.0, 1e-4, 0.0]  # so small a file that nothing depends on it
    weights = np.array(rows) / np.array(seconds)[:, None]  # for relative errors
    found, *_ = np.linalg.lstsq(weights, np.ones(len(rows)), rcond=None)
    return found.clip(0).tolist()


def stream_seconds(pack: Pack) -> float:
    file = NeuronFile(pack.neurons, pack.format.stride, 1)
    nbytes = min(STREAMED, pack.neurons.stat().st_size // 4096 * 4096)
    memory = page_aligned(nbytes, CPU)
    return typical(lambda: file.read([(0, memory)]), CPU, 3) / nbytes


def product_seconds(products: Products, device: torch.device) -> float:
    """Of a record: products with the rows of it that are needed, unpacked before."""
    format, (ids, _) = products.format, products.bias.shape
    count = COMPUTED // format.stride
    # Untouched, all pages of memory would be one.
    records = page_aligned(count * format.stride, device).fill_(1).view(count, -1)
    x = torch.zeros(1, format.dim, device=device, dtype=products.bias.dtype)
    neurons = np.arange(count) % (ids - 1)
    return typical(lambda: products.sums(x, records, neurons), device, 5) / count

"""How many neurons of each layer stay in memory, and how the others are read.

Start at choose_plan. A pack's manifest has two figures for a window of k tokens: how many different
neurons these tokens use, and how many records the next token reads if so many neurons are in memory
(calibration/predictor.py). With the machine's costs (costs.py) this gives the seconds of a token
for each window, depth and gap. choose_plan takes the fastest plan that fits into memory.

    pack     the directory with the records of a model's neurons, and their predictors
    record   the weights of one neuron on disk
    entry    memory for one record; each layer has a cache of them
    window   the number of last tokens whose neurons stay in memory
    depth    requests that are pending at a time
    gap      unneeded records between two needed ones that one request still reads

Based on "LLM in a flash" (arXiv 2312.11514, sections 3.1 and 4): latency = I/O + memory management
+ compute.

Shapes: L layers, K windows.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from host.memory import size_text
from neurons.costs import MachineCosts
from neurons.pack import Pack

DEPTHS = 16, 32, 64, 128
WINDOW_TOKENS = 1, 2, 3, 4, 6, 8, 12, 16  # windows to consider, and the longest that fits
# Seconds to read a layer whole that do not depend on its bytes: chunks pass between threads.
LAYER_STREAM_SECONDS = 5e-3
LAYER_MANAGE_SECONDS = 60e-6  # to look up and evict cache entries for a token in a layer
BISECTIONS = 30  # steps of the search for the longest window: it is then exact enough


@dataclass(frozen=True)
class CachePlan:
    """How many entries each layer's cache has, how records are read, and the expected costs."""

    window: float  # tokens whose neurons stay in memory
    entries: tuple[int, ...]  # cache entries of each layer
    depth: int  # requests that are pending at a time
    gap: int  # unneeded records between two needed ones that one request still reads
    call_seconds: float  # expected per call that reads records
    request_seconds: float  # expected per request
    record_seconds: float  # expected to read one record
    whole_layer_seconds: float  # expected to read and compute all records of a layer
    read_seconds: float  # expected per token, in all layers, like the fields below
    compute_seconds: float
    overlapped_seconds: float  # the part of compute_seconds that passes while the disk reads
    nbytes: float  # bytes read per token
    requests: float  # requests per token

    def seconds(self, calls: int, requests: int, records: int) -> float:
        """Return the expected seconds to read so many records with so many requests and calls. A
        request reads contiguous records; a call submits a batch of requests."""
        reading = requests * self.request_seconds + records * self.record_seconds
        return calls * self.call_seconds + reading

    def prefers_whole_layer(self, missing: np.ndarray, entries: int) -> bool:
        """Whether reading a whole layer is faster than reading the missing neurons one by one.

        missing: (n,) ids that are not in memory, ascending. entries: cache entries of the layer;
        one call reads at most so many records. Asked for each layer in each step (feed_forward.py).
        The bytes of records in gaps are not counted.
        """
        calls = -(-len(missing) // entries)
        # At most one request per record: the usual case is decided without counting gaps.
        if self.seconds(calls, len(missing), len(missing)) <= self.whole_layer_seconds:
            return False
        requests = 1 + np.count_nonzero(missing[1:] - missing[:-1] > self.gap + 1)
        seconds = self.seconds(calls, max(calls, requests), len(missing))
        return seconds > self.whole_layer_seconds

    def lines(self, neurons: int) -> list[str]:
        """Return lines for the user about the plan: its memory and its expected costs. neurons:
        their number in a layer."""
        share = 100 * sum(self.entries) / (neurons * len(self.entries))
        return [
            f"flash: {share:.1f} % of the neurons in memory, as many as {self.window:.1f} tokens "
            f"use; {self.depth} reads at a time, gaps of up to {self.gap}",
            f"  expected    {size_text(self.nbytes)} in {self.requests:.0f} requests for a token: "
            f"{1000 * self.read_seconds:.1f} ms of reading, {1000 * self.compute_seconds:.1f} ms "
            f"of feed-forward products, {1000 * self.overlapped_seconds:.1f} of them while reading",
        ]


class NeuronUsage:
    """The figures of all layers in a pack's manifest, interpolated to windows of any length.

    Beyond the longest window of the manifest, usage grows to all neurons at twice its length, where
    a token reads nothing.
    """

    def __init__(self, pack: Pack, neurons: int):
        """Read the figures as tables for interpolation. neurons: their number in a layer.

        For each of K windows, in _windows: _usage (L, K), different neurons in use; _reads, records
        and requests per token, (L, K, gaps) each. Windows without figures in one of the layers are
        left out; the last one, twice the longest of the others, has all neurons. predicted: (L,),
        the mean number of neurons that the predictor names for a token.
        """
        layers, self.gaps = pack.layers, pack.manifest["gaps"]
        count = min(len(layer["usage"]) for layer in layers)
        windows = pack.manifest["windows"][:count]
        no_reads = [0.0] * len(self.gaps)
        self._windows = [*windows, 2 * windows[-1]]
        self._usage = np.array([[*layer["usage"][:count], neurons] for layer in layers])  # (L, K)
        self._reads = [
            np.array([[*layer[name][:count], no_reads] for layer in layers])  # (L, K, gaps)
            for name in ("records", "requests")
        ]
        self.predicted = np.array([layer["predicted"] for layer in layers]) * neurons  # (L,)

    def entries(self, window: float) -> np.ndarray:
        """Return (L,): the cache entries that hold all neurons of a window of so many tokens.

        A window below 1 gets that share of one token's neurons. At least one entry each.
        """
        used = self._interpolate(self._usage, max(window, 1)) * min(window, 1)
        return np.ceil(used).astype(int).clip(1)

    def reads(self, window: float, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected records that a token reads and its requests, (L,) each.

        The cache has the entries of `window` tokens. gap: one of `gaps`.
        """
        column = self.gaps.index(gap)
        return tuple(self._interpolate(table[..., column], max(window, 1)) for table in self._reads)

    def longest_window(self, fits: Callable[[float], bool]) -> float:
        """Return the longest window, in tokens, for which `fits` is true, by bisection.

        fits: tells whether the neurons of a window of so many tokens fit into memory. If a window
        fits, all shorter ones must fit. 0 if none does. At most the window that has all neurons.
        """
        low, high = 0.0, float(self._windows[-1])
        if fits(high):
            return high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _interpolate(self, table: np.ndarray, window: float) -> np.ndarray:
        """Interpolate a table linearly between its windows: (L, K) -> (L,)."""
        return np.array([np.interp(window, self._windows, row) for row in table])


def choose_plan(
    pack: Pack, neurons: int, memory: int, fixed: int, costs: MachineCosts, window: float | None
) -> CachePlan:
    """Return the plan with the fewest expected seconds for a token.

    Compares the windows of WINDOW_TOKENS that fit, and the longest that fits, with every depth of
    `costs` and every gap of the pack. Called once, when a model is loaded (attach_neurons).
    neurons: their number in a layer. memory: bytes for all weights; `fixed` of them are needed for
    weights other than cache entries, and for buffers. window: tokens whose neurons stay in memory,
    or None to choose it. Raises ValueError if the window's neurons, or one neuron of each layer, do
    not fit.
    """
    usage, stride = NeuronUsage(pack, neurons), pack.format.stride

    def nbytes(k: float) -> int:
        """Return the bytes of all weights with the neurons of `k` tokens; 0: one of each layer."""
        return fixed + int(usage.entries(k).sum()) * stride

    check_budget(nbytes(window or 0), memory, fixed, window)
    longest = usage.longest_window(lambda k: nbytes(k) <= memory)
    windows = [k for k in WINDOW_TOKENS if k < longest] + [longest]
    windows = [window] if window else windows
    plans = [
        expected_plan(usage, neurons, stride, costs, *choice)
        for choice in itertools.product(windows, costs.reads, usage.gaps)
    ]
    return min(
        plans, key=lambda plan: plan.read_seconds + plan.compute_seconds - plan.overlapped_seconds
    )


def check_budget(needed: int, memory: int, fixed: int, window: float | None) -> None:
    """Raise ValueError if `needed` bytes are more than `memory`, the bytes of --dram_budget.

    needed: `fixed` bytes of other weights and buffers, and the neurons of `window` tokens, or one
    neuron of each layer if window is None. The message names a budget that is enough.
    """
    if needed <= memory:
        return
    neurons = f"the neurons of {window:g} tokens" if window else "one neuron of each layer"
    raise ValueError(
        f"--dram_budget gives {size_text(memory)}, but {neurons} and {size_text(fixed)} of other "
        f"weights take {size_text(needed)}: use --dram_budget {1 + needed // 10**6}MB"
    )


def expected_plan(
    usage: NeuronUsage,
    neurons: int,
    stride: int,
    costs: MachineCosts,
    window: float,
    depth: int,
    gap: int,
) -> CachePlan:
    """Return the plan of one window, depth and gap, with its expected costs.

    neurons: their number in a layer. stride: bytes of a record on disk. window: tokens whose
    neurons stay in memory. depth: a key of costs.reads. gap: one of usage.gaps. A layer computes
    the neurons that are already in memory while it reads the others: in_memory is the most of the
    computation that this can hide.
    """
    records, requests = usage.reads(window, gap)  # (L,) each
    entries = usage.entries(window)
    computed = entries if costs.computes_all_entries else usage.predicted
    call, request, byte = costs.reads[depth]
    reading = costs.read_seconds(depth, requests, records * stride)  # (L,)
    in_memory = ((computed - records) * costs.record).clip(0)  # (L,): seconds to compute these
    whole_layer = neurons * (costs.stream_byte * stride + costs.record) + LAYER_STREAM_SECONDS
    return CachePlan(
        window=window,
        entries=tuple(entries.tolist()),
        depth=depth,
        gap=gap,
        call_seconds=call,
        request_seconds=request,
        record_seconds=byte * stride,
        whole_layer_seconds=whole_layer,
        read_seconds=float(reading.sum()),
        compute_seconds=float((computed * costs.record + LAYER_MANAGE_SECONDS).sum()),
        overlapped_seconds=float(np.minimum(reading, in_memory).sum()),
        nbytes=float(records.sum() * stride),
        requests=float(requests.sum()),
    )

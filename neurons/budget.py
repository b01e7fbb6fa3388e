"""How many neurons of each layer stay in memory, and how the others are read.

Start at choose_plan. A pack's manifest has figures for windows of several lengths: how many
different neurons the tokens of a window use, and how many records the next token reads, with how
many requests, if so many neurons are in memory (calibration/predictor.py). With the machine's costs
(costs.py) this gives the seconds of a token for each window, depth and gap. choose_plan takes the
fastest plan that fits into memory.

    pack     the directory with the records of a model's neurons, and their predictors
    record   the weights of one neuron on disk
    entry    memory for one record; each layer has a cache of entries
    window   the number of last tokens whose neurons stay in memory
    request  a read of contiguous records; a call submits a batch of requests
    depth    the number of requests that the disk has at a time
    gap      unneeded records between two needed ones that one request still reads

Based on "LLM in a flash" (arXiv 2312.11514, sections 3.1 and 4): latency = I/O + memory management
+ compute.

Shapes: L layers, K windows of a table of figures.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from host.memory import size_text
from neurons.costs import MachineCosts
from neurons.pack import Pack

DEPTHS = 16, 32, 64, 128  # to consider
WINDOW_TOKENS = 1, 2, 3, 4, 6, 8, 12, 16  # to consider, besides the longest window that fits
# Seconds to read a layer whole that do not depend on its bytes: chunks pass between threads.
LAYER_STREAM_SECONDS = 5e-3
LAYER_MANAGE_SECONDS = 60e-6  # to look up and evict cache entries for a token in a layer
BISECTIONS = 30  # steps of the search for the longest window: exact to a millionth of a token


@dataclass(frozen=True)
class CachePlan:
    """How many entries each layer's cache has, how records are read, and the expected costs."""

    window: float  # tokens whose neurons stay in memory; below 1, a share of one token's neurons
    entries: tuple[int, ...]  # cache entries of each layer
    depth: int  # requests that the disk has at a time
    gap: int  # the most unneeded records between two needed ones that one request still reads
    call_seconds: float  # expected per call that reads records
    request_seconds: float  # expected per request
    record_seconds: float  # expected to read one record
    whole_layer_seconds: float  # expected to read and compute all records of a layer
    # Expected per token, in all layers:
    read_seconds: float
    compute_seconds: float
    overlapped_seconds: float  # the part of compute_seconds that passes while the disk reads
    nbytes: float  # bytes read
    requests: float

    def seconds(self, calls: int, requests: int, records: int) -> float:
        """Return the expected seconds to read so many records with so many requests and calls."""
        reading = requests * self.request_seconds + records * self.record_seconds
        return calls * self.call_seconds + reading

    def prefers_whole_layer(self, missing: np.ndarray, entries: int) -> bool:
        """Return whether reading a whole layer is faster than reading the missing neurons alone.

        missing: (n,) ids that are not in memory, ascending. entries: cache entries of the layer;
        one call reads at most so many records. Called for each layer in each step
        (feed_forward.py). The bytes of records in gaps are not counted.
        """
        calls = -(-len(missing) // entries)
        # There are at most as many requests as records. Where even so many are fast enough, the
        # usual case, they need not be counted.
        if self.seconds(calls, len(missing), len(missing)) <= self.whole_layer_seconds:
            return False
        requests = 1 + np.count_nonzero(missing[1:] - missing[:-1] > self.gap + 1)
        seconds = self.seconds(calls, max(calls, requests), len(missing))
        return seconds > self.whole_layer_seconds

    def lines(self, neurons: int) -> list[str]:
        """Return lines for the user about the plan: neurons in memory and expected costs. neurons:
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

    A window twice as long as the longest one of the manifest is taken to use all neurons, so that
    a token reads nothing.
    """

    def __init__(self, pack: Pack, neurons: int):
        """Read the figures as tables for interpolation. neurons: their number in a layer.

        For each of K windows, in _windows: _usage, (L, K), different neurons in use; _reads,
        records and requests per token, (L, K, gaps) each. Windows without figures in one of the
        layers are left out. Sets the attribute gaps, those of the manifest, and predicted, (L,),
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

        A window below 1 gets that share of one token's neurons. Each layer gets at least one entry.
        """
        used = self._interpolate(self._usage, max(window, 1)) * min(window, 1)
        return np.ceil(used).astype(int).clip(1)

    def reads(self, window: float, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected records that a token reads and its requests, (L,) each.

        The cache has the entries of `window` tokens. gap: one of `gaps`. A window below 1 counts as
        1: there are no figures for less.
        """
        column = self.gaps.index(gap)
        return tuple(self._interpolate(table[..., column], max(window, 1)) for table in self._reads)

    def longest_window(self, fits: Callable[[float], bool]) -> float:
        """Return the longest window, in tokens, for which `fits` is true, by bisection; 0 if there
        is none. It is at most the window that has all neurons.

        fits: tells whether the neurons of a window of so many tokens fit into memory. If a window
        fits, all shorter ones must fit.
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
    weights other than cache entries, and for buffers. window: tokens whose neurons stay in memory;
    None: choose it. Raises ValueError if the neurons of the given window, or with None one neuron
    of each layer, do not fit.
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
    neurons stay in memory. depth: a key of costs.reads. gap: one of usage.gaps.
    """
    records, requests = usage.reads(window, gap)  # (L,) each
    entries = usage.entries(window)  # (L,)
    computed = entries if costs.computes_all_entries else usage.predicted  # (L,) neurons
    call, request, byte = costs.reads[depth]
    reading = costs.read_seconds(depth, requests, records * stride)  # (L,)
    # Seconds to compute the neurons that are in memory before the read: these alone can overlap it.
    in_memory = ((computed - records) * costs.compute_record).clip(0)  # (L,)
    per_neuron = costs.stream_byte * stride + costs.compute_record
    whole_layer = neurons * per_neuron + LAYER_STREAM_SECONDS
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
        compute_seconds=float((computed * costs.compute_record + LAYER_MANAGE_SECONDS).sum()),
        overlapped_seconds=float(np.minimum(reading, in_memory).sum()),
        nbytes=float(records.sum() * stride),
        requests=float(requests.sum()),
    )

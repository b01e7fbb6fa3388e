"""Finds the policy that generates the most tokens per second on a machine, and predicts its rate.

Start at Planner. `predict` returns the bytes of memory that a policy needs, and the seconds for
which each resource of the machine is busy: the disk, the copies to the device and to the host, the
device's computation, and attention on the host. `choose` searches for the best policy: for each
grouping of rows into micro-batches, a linear program finds the shares of weights and cache on each
tier; these are rounded to whole layers and cells, and predicted again.

Based on FlexGen's cost model and search (arXiv 2303.06865, section 4.3). Here the times are
measured (probe.py), and several kinds of transfer may share a resource.

Symbols: g rows of a micro-batch, K micro-batches, B = g * K rows of a block (texts that are
generated together). A cell is the KV cache of one layer for one micro-batch. Cells of layers with a
sliding window are smaller, and cells are counted in cells of mean size. A split is the number of
layers, and of cells, on each of TIERS: device, host, disk. A step generates one token of each row.
A pass runs all layers once, for a step or for a chunk of the prompts. A share is a percentage on
each tier (policy.Share). Layers and cells that are not on the device pass through prefetch buffers
there (prefetch.py).
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from host.memory import size_text
from layers.kv_cache import WINDOW_SLACK, CacheFactory, visible_length
from tiers.direct_io import REQUESTS_IN_FLIGHT, SMALL_REQUEST_BYTES
from tiers.policy import CACHE_BUFFERS, TIERS, WEIGHT_BUFFERS, Policy, Share
from tiers.probe import Machine

HANDOVER_SECONDS = 1e-3  # delay of computation for each fetched cell, by the change of threads
MAX_POSITIONS = 2**20  # longest KV cache of a row
# The values of Policy.prefill_chunk_tokens and Policy.micro_batches that the search tries.
PREFILL_CHUNK_TOKENS = 1024, 4096, 16384
MICRO_BATCH_COUNTS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts in the dtypes used for computation."""

    layers: int  # the number of layers
    layer: int  # one layer's weights, in host memory or on disk
    layer_on_device: int  # one layer's weights, if they stay on the device
    layer_in_buffer: int  # one layer's weights in a prefetch buffer
    always_on_device: int  # embeddings, head, and the process itself
    head: int  # the part of the embeddings and the head that every step reads
    cache_position: int  # one position of one row in one layer's KV cache
    activations_between_layers: int  # one token's activations
    activations_in_layer: int  # the largest size of one token's activations in a layer
    logits: int  # one row's logits, and the memory to sample from them
    windows: tuple[int | None, ...]  # the sliding window of each layer, None: it has none

    def slots(self, positions: float) -> list[float]:
        """Return the number of slots that each layer's KV cache has for so many positions of a row;
        a layer with a window has fewer."""
        slots = {window: CacheFactory().slots(positions, window) for window in set(self.windows)}
        return [slots[window] for window in self.windows]


@dataclass(frozen=True)
class Workload:
    """The number of texts, the tokens of each prompt, and the new tokens of each text."""

    texts: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Split:
    """The number of layers, and of cells of the cache, on each of TIERS. Cells are counted by their
    bytes, in cells of mean size."""

    weights: tuple[float, float, float]
    cache: tuple[float, float, float]


@dataclass(frozen=True)
class Prediction:
    """A policy's bytes by tier, and its seconds by resource: for the prompts of a block of rows,
    and for a step.

    The dicts of seconds are empty if the machine was not measured.
    """

    policy: Policy
    workload: Workload
    split: Split  # the policy's shares in whole layers and cells
    memory: dict[str, float]  # bytes by tier
    prefill: dict[str, float]  # seconds by resource, for all prompts of a block of rows
    step: dict[str, float]  # seconds by resource, for one new token of each row

    @property
    def device_is_cpu(self) -> bool:
        return "host" not in self.memory

    @property
    def latency(self) -> float:
        """Seconds to generate a block of rows: the busiest resource counts in each phase. The
        prompts give the first new token, and each step one more. Needs a measured machine."""
        return max(self.prefill.values()) + max(self.step.values()) * (self.workload.new - 1)

    @property
    def rate(self) -> float:
        """The new tokens of all texts, divided by the seconds of all blocks of rows: tokens per
        second. A last block with fewer rows counts as a whole block."""
        blocks = math.ceil(self.workload.texts / self.policy.rows)
        return self.workload.texts * self.workload.new / (blocks * self.latency)

    @property
    def binding(self) -> str:
        """The resource that limits a step."""
        return max(self.step, key=self.step.get)


@dataclass(frozen=True)
class Planner:
    """Predicts and chooses policies for a model on a machine.

    Parameters of the methods: work: the texts to generate. split: layers, and cells of the cache,
    on each of TIERS; it may differ from the shares of the policy, and may have fractions.
    """

    sizes: Sizes
    machine: Machine | None  # None: not measured, and only memory is predicted
    device_is_cpu: bool  # if true, host memory is the device's memory

    def predict(self, policy: Policy, work: Workload) -> Prediction:
        """Predict a policy's bytes by tier and, if the machine was measured, its seconds by
        resource. The resources work at the same time, so the busiest one determines the time of a
        phase."""
        split = Split(policy.weights.counts(self.sizes.layers), self.cell_counts(policy, work))
        memory = self.memory(policy, split, work)
        times = self.times(policy, split, work) if self.machine else ({}, {})
        return Prediction(policy, work, split, memory, *times)

    def cell_counts(self, policy: Policy, work: Workload) -> tuple[float, ...]:
        """Return how many cells the policy puts on each of TIERS, counted in cells of mean size:
        their bytes over the mean bytes of a cell. Layers with a window have smaller cells."""
        K = policy.micro_batches
        slots = [n for n in self.sizes.slots(row_positions(work)) for _ in range(K)]
        on_tier = dict.fromkeys(TIERS, 0)
        for tier, n in zip(policy.cache.tiers_by_size(slots), slots, strict=True):
            on_tier[tier] += n + 1  # 1: the extra slot, see cell_sizes
        total = sum(on_tier.values())
        return tuple(on_tier[tier] * len(slots) / total for tier in TIERS)

    def times(
        self, policy: Policy, split: Split, work: Workload
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return two dicts of the seconds by resource: for all prompts of a block of rows, which
        are read in chunks, and for one step. On average a token attends to half of the prompt in
        the first, and to the prompt and half of the new tokens in the second. Both have the same
        resources in the same order. Needs a measured machine."""
        chunk = self.chunk_tokens(policy, work)
        chunks = math.ceil(work.prompt / chunk)
        prefill = self.busy(policy, split, chunk, work.prompt / 2)
        step = self.busy(policy, split, 1, work.prompt + work.new / 2)
        return {name: chunks * seconds for name, seconds in prefill.items()}, step

    def chunk_tokens(self, policy: Policy, work: Workload) -> int:
        """Return the prompt tokens of each row that one pass reads: what `prefill` in decoding.py
        chooses."""
        chunk = max(1, min(work.prompt, policy.prefill_chunk_tokens // policy.rows))
        positions = row_positions(work)
        # A cache with fewer slots than positions takes WINDOW_SLACK tokens of a row at a time.
        fewer_slots = min(self.sizes.slots(positions)) < positions
        return min(chunk, WINDOW_SLACK) if fewer_slots else chunk

    def busy(self, policy: Policy, split: Split, tokens: int, positions: float) -> dict[str, float]:
        """Return the seconds for which each resource is busy, in one pass through all layers.

        tokens: new tokens of each row. positions: the mean number of positions before each of them;
        layers with a window read at most as many as their cells have slots. Returns seconds by
        resource; which resources there are depends only on device_is_cpu.
        "disk" is the time in which the disk transfers. "cells" is the time of the thread that reads
        one cell after the other: waiting for the disk, and reading. The seconds are linear in the
        split, on which `best_split` relies, with one exception: the first layer on disk delays all
        cells there.
        """
        sizes, machine, g = self.sizes, self.machine, policy.micro_batch
        positions = statistics.fmean(sizes.slots(positions))
        _, host_layers, disk_layers = split.weights
        _, host_cells, disk_cells = split.cache
        cell_read = g * positions * sizes.cache_position  # bytes that are read of a cell
        cell_written = g * tokens * sizes.cache_position
        # The seconds for which a read of a cell waits for requests of layers that the disk has.
        queue = REQUESTS_IN_FLIGHT * SMALL_REQUEST_BYTES / machine.stream * (disk_layers > 0)
        copied_cells = host_cells * (not policy.cpu_attention)
        cells_on_host = (host_cells + disk_cells) * policy.cpu_attention
        seconds = {
            "disk": disk_layers * sizes.layer / machine.stream
            + disk_cells * (machine.read(cell_read) + machine.write(cell_written)),
            "cells": disk_cells * (machine.read(cell_read) + queue),
            "to device": host_layers * machine.to_device(sizes.layer)
            + copied_cells * machine.to_device(cell_read),
            "to host": copied_cells * machine.to_host(cell_written),
            "compute": self.compute_seconds(policy, split, tokens, positions),
            "host attention": cells_on_host * g * tokens * positions * machine.host_per_position,
        }
        if self.device_is_cpu:  # the computing threads make the copies, too
            copies = "to device", "to host", "host attention"
            seconds["compute"] += sum(seconds.pop(name) for name in copies)
            return seconds
        # With one micro-batch the device has nothing to compute while the host attends.
        if policy.micro_batches == 1 or not policy.overlap:
            seconds["compute"] += seconds["host attention"]
        # Layers and cells on disk pass through host memory.
        copied_disk_cells = disk_cells * (not policy.cpu_attention)
        seconds["to device"] += disk_layers * machine.to_device(sizes.layer)
        seconds["to device"] += copied_disk_cells * machine.to_device(cell_read)
        return seconds

    def compute_seconds(self, policy: Policy, split: Split, tokens: int, positions: float) -> float:
        """Return the seconds for which the device computes, in one pass through all layers: matrix
        products, the head, delays by fetched cells, and attention that the host does not compute.

        tokens: new tokens of each row. positions: the mean number to which each of them attends. On
        a CPU, `busy` adds copies and attention on the host, because the same threads do them.
        """
        sizes, machine, g, K = self.sizes, self.machine, policy.micro_batch, policy.micro_batches
        device_cells, host_cells, disk_cells = split.cache
        calls = math.ceil(g / policy.rows_per_call(tokens))  # of a layer, for a micro-batch
        products = sizes.layers * K * calls * machine.products(g * tokens / calls)
        # A call of machine.products is the seconds of one layer; the head's are to them as its
        # bytes to the layer's.
        head = machine.products(g * K) * sizes.head / sizes.layer
        fetched_cells = host_cells * (not policy.cpu_attention) + disk_cells
        cells_on_device = device_cells + (host_cells + disk_cells) * (not policy.cpu_attention)
        # Attention of one token to one position: measured in decoding, and in a prompt.
        per_pair = machine.per_position if tokens == 1 else machine.per_pair
        attention = cells_on_device * g * tokens * positions * per_pair
        return products + head + fetched_cells * HANDOVER_SECONDS + attention

    def memory(self, policy: Policy, split: Split, work: Workload) -> dict[str, float]:
        """Return the largest number of bytes in use on each tier. On a CPU there is no tier "host".

        The bytes are linear in the split, on which `best_split` relies, with one exception: the
        prefetch buffers of layers, or of cells, are not needed if all of them are on the device.
        All activations are counted on the device, as if the policy offloaded none.
        """
        sizes, K = self.sizes, policy.micro_batches
        cells = self.cell_sizes(policy, work)
        cell = statistics.fmean(cells)
        needed = sizes.layers > split.weights[0], sizes.layers * K > split.cache[0]
        buffers = sum(itertools.compress(self.buffer_bytes(policy, work), needed))
        totals = {
            tier: layer_count * sizes.layer + cell_count * cell
            for tier, layer_count, cell_count in zip(TIERS, split.weights, split.cache, strict=True)
        }
        totals["device"] += split.weights[0] * (sizes.layer_on_device - sizes.layer)
        totals["device"] += sizes.always_on_device + buffers + self.activation_bytes(policy, work)
        if self.device_is_cpu:
            totals["device"] += totals.pop("host")
        else:  # host memory through which layers and a cell are read from disk
            totals["host"] += WEIGHT_BUFFERS * sizes.layer + max(cells)
        return totals

    def activation_bytes(self, policy: Policy, work: Workload) -> int:
        """Return the largest number of bytes of activations and logits: those between two layers,
        for all rows; those in a layer, for the tokens that are computed at once; and the logits.
        chunk: tokens of a row in a pass; at_once: those of all rows that a layer computes at once,
        which are all of one row at least."""
        sizes, rows, chunk = self.sizes, policy.rows, self.chunk_tokens(policy, work)
        at_once = max(min(policy.tokens_at_once, rows * chunk), chunk, policy.micro_batch)
        between, inside = sizes.activations_between_layers, sizes.activations_in_layer
        return rows * chunk * between + at_once * inside + rows * sizes.logits

    def cell_sizes(self, policy: Policy, work: Workload) -> list[int]:
        """Return the bytes of a cell of each layer, long enough for a prompt and its new tokens.
        They include the extra slot that a cache allocates (Transformer.make_caches)."""
        slot = policy.micro_batch * self.sizes.cache_position
        return [(n + 1) * slot for n in self.sizes.slots(row_positions(work))]

    def buffer_bytes(self, policy: Policy, work: Workload) -> tuple[int, int]:
        """Return the bytes of all prefetch buffers for layers, and of those for cells."""
        layers = WEIGHT_BUFFERS * self.sizes.layer_in_buffer
        return layers, CACHE_BUFFERS * max(self.cell_sizes(policy, work))

    def uneven_bytes(self, policy: Policy, work: Workload) -> int:
        """Return an upper bound of the bytes by which the cells on a tier exceed its share of all
        cells' bytes: 0 if all have one size, else the bytes of one cell of each size, since
        Share.tiers_by_size rounds the share of each size to whole cells."""
        different = set(self.cell_sizes(policy, work))
        return sum(different) if len(different) > 1 else 0

    def choose(
        self, work: Workload, budgets: dict[str, float], start: Policy, max_rows: int
    ) -> Prediction:
        """Return the prediction of the policy that generates the most tokens per second and fits
        into the budgets. Needs a measured machine.

        budgets: bytes that may be used on each tier. start: the policy from which the result has
        the fields that are not searched, such as `directory`. max_rows: the most rows that a block
        of rows needs; it may have more, by less than one micro-batch.
        Raises ValueError, which states the missing bytes, if no policy fits. The numbers are for
        the first grouping with all weights and cells on disk.
        """
        candidates = list(self.groupings(start, max_rows))
        fitting = [p for policy in candidates for p in self.predictions(policy, work, budgets)]
        if not fitting:
            smallest = replace(candidates[0], weights=Share(0, 0), cache=Share(0, 0))
            raise ValueError(self.shortage(self.predict(smallest, work), budgets))
        return max(fitting, key=lambda prediction: prediction.rate)

    def groupings(self, start: Policy, max_rows: int) -> Iterator[Policy]:
        """Yield the policies among which `choose` searches: every combination of a micro-batch
        size, a number of micro-batches, a size of prefill chunks and, on a GPU, attention on the
        host or not.

        A block of rows exceeds max_rows by less than one micro-batch. Other fields are those of
        `start`; the shares of the tiers are found by `best_split`.
        """
        # The powers of two below max_rows, and max_rows itself.
        micro_batch_sizes = sorted(
            {min(1 << n, max_rows) for n in range(max_rows.bit_length() + 1)}
        )
        cpu_attention = {False, not self.device_is_cpu}
        for g, K in itertools.product(micro_batch_sizes, MICRO_BATCH_COUNTS):
            if g * (K - 1) < max_rows:
                grouped = replace(start, micro_batch=g, micro_batches=K)
                for chunk, on_host in itertools.product(PREFILL_CHUNK_TOKENS, cpu_attention):
                    yield replace(grouped, prefill_chunk_tokens=chunk, cpu_attention=on_host)

    def predictions(
        self, policy: Policy, work: Workload, budgets: dict[str, float]
    ) -> Iterator[Prediction]:
        """Yield predictions of policies that fit into the budgets and group rows as `policy` does.

        Their shares: everything on the device, everything on disk, and the whole numbers of layers
        and cells near the optimal split. This split is computed three times: both weights and cache
        may leave the device; only the cache may; only the weights may.
        budgets: bytes that may be used on each tier. Yields nothing if no policy fits.
        """
        layers, cells = self.sizes.layers, self.sizes.layers * policy.micro_batches
        all_on_device, all_on_disk = Share(), Share(0, 0)
        shares = [(all_on_device, all_on_device), (all_on_disk, all_on_disk)]  # weights, cache
        for resident in ((False, False), (True, False), (False, True)):
            if split := self.best_split(policy, work, budgets, resident):
                weights = self.shares_near(split.weights, layers)
                shares += itertools.product(weights, self.shares_near(split.cache, cells))
        for weights, cache in shares:
            prediction = self.predict(replace(policy, weights=weights, cache=cache), work)
            if all(nbytes <= budgets[tier] for tier, nbytes in prediction.memory.items()):
                yield prediction

    def best_split(
        self, policy: Policy, work: Workload, budgets: dict[str, float], resident: tuple[bool, bool]
    ) -> Split | None:
        """Return the fastest split that fits into the budgets, with fractions of layers and cells;
        None if no split fits. The policy's own shares are not used.

        budgets: bytes by tier, in the order of TIERS. resident: whether all weights, and whether
        all cells, stay on the device and so need no prefetch buffers. The variables of the linear
        program are the layers on each tier, the cells on each tier, the seconds of the prompts of a
        block of rows, and the seconds of a step; it minimises the seconds of the block.
        """
        from scipy.optimize import linprog  # importing it takes 0.3 s

        # The seconds and bytes of an empty split, then what each layer or cell on a tier adds.
        base = self._requirements(policy, work, [0.0] * 6)
        slopes = [self._requirements(policy, work, unit) - base for unit in np.eye(6)]
        resources = (len(base) - len(budgets)) // 2
        limits = np.array([0.0] * 2 * resources + list(budgets.values()))
        # `base` has the bytes of both kinds of buffers. A kind that is not needed leaves its memory
        # to layers and cells. Index 2 * resources is the limit of the device's bytes; the limits of
        # other tiers follow.
        limits[2 * resources] += np.dot(resident, self.buffer_bytes(policy, work))
        # The split counts cells of mean size; cells of several sizes may take more.
        limits[2 * resources :] -= self.uneven_bytes(policy, work)
        # No resource may take longer than the phase in which it is used. Column 0: the variable for
        # the seconds of the prompts; column 1: the variable for the seconds of a step.
        phases = np.zeros((len(base), 2))
        phases[:resources, 0] = phases[resources : 2 * resources, 1] = -1
        solved = linprog(
            [0] * 6 + [1, work.new - 1],  # seconds of a block; the prompts give the first token
            A_ub=np.column_stack([*slopes, phases]),
            b_ub=limits - base,
            # All layers, and all cells, are on some tier.
            A_eq=[[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]],
            b_eq=(self.sizes.layers, self.sizes.layers * policy.micro_batches),
            bounds=self._bounds(resident),
        )
        return Split(tuple(solved.x[:3]), tuple(solved.x[3:6])) if solved.success else None

    def _requirements(self, policy: Policy, work: Workload, units: Sequence[float]) -> np.ndarray:
        """Return the coefficients of a split for `best_split`, as one vector: the seconds of the
        prompts for each resource, the seconds of a step for each resource, and the bytes on each
        tier. units: the split, as the layers on each of TIERS, then the cells on each. It need not
        cover all layers: `best_split` gives no layer or cell, or a single one.
        """
        split = Split(tuple(units[:3]), tuple(units[3:]))
        prompts, step = self.times(policy, split, work)
        memory = self.memory(policy, split, work)
        return np.array([*prompts.values(), *step.values(), *memory.values()])

    def _bounds(self, resident: tuple[bool, bool]) -> list[tuple[int, int | None]]:
        """Return the lower and upper bound of each variable of `best_split`; None: no upper bound.

        Layers or cells that must stay on the device are 0 on the other tiers. On a CPU, host memory
        is the device's memory, so nothing is on the tier "host".
        resident: whether all weights, and whether all cells, stay on the device.
        """
        counts = []
        for all_on_device in resident:
            on_host = (0, 0) if all_on_device or self.device_is_cpu else (0, None)
            counts += [(0, None), on_host, (0, 0) if all_on_device else (0, None)]
        return [*counts, (0, None), (0, None)]

    @staticmethod
    def shortage(prediction: Prediction, budgets: dict[str, float]) -> str | None:
        """Return a message that names each tier on which the policy needs more bytes than the
        budget allows, or None if it fits. budgets: bytes that may be used on each tier. `choose`
        raises the message if no policy fits, and plan.py if the policy of --percent does not."""
        names = {
            "device": "memory" if prediction.device_is_cpu else "device memory",
            "host": "host memory",
        }
        short = [
            f"{size_text(needed)} of {names.get(tier, tier)} and may take "
            f"{size_text(budgets[tier])}"
            for tier, needed in prediction.memory.items()
            if needed > budgets[tier]
        ]
        remedy = "allow more, or give fewer or shorter texts"
        return f"does not fit: it needs {'; and '.join(short)}: {remedy}" if short else None

    def shares_near(self, counts: tuple[float, ...], total: int) -> list[Share]:
        """Return the shares that are near a result of the linear program but are whole items.

        counts: layers, or cells, on each of TIERS, with fractions. total: their sum. The numbers on
        the device and in host memory are rounded down, and also tried with one more; other items
        are on disk. On a CPU the number in host memory is 0.
        """
        device, host = int(counts[0] + 1e-6), int(counts[1] + 1e-6)  # 1e-6: the solver's error
        hosts = (host,) if self.device_is_cpu else (host, host + 1)
        whole = itertools.product((device, device + 1), hosts)
        return [Share(100 * d / total, 100 * h / total) for d, h in whole if d + h <= total]


def row_positions(work: Workload) -> int:
    """Return the positions of a row's KV cache, long enough for a prompt and its new tokens. The
    number is rounded up as in attention (visible_length)."""
    return visible_length(work.prompt + work.new, MAX_POSITIONS)

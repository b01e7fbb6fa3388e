"""Finds the policy that generates the most tokens per second on a machine, and predicts its rate.

Start at Planner. `predict` returns the memory that a policy takes, and how long each resource of
the machine is busy with it. `choose` searches for the best policy: for each grouping of rows, a
linear program finds the shares, which are rounded to whole layers and cells and predicted again.

Based on FlexGen's cost model and search (arXiv 2303.06865, section 4.3). Here the times are
measured (probe.py), and several kinds of work may share a resource.

Symbols: g rows of a micro-batch, K micro-batches, B = g * K rows of a block. A cell is the KV cache
of one layer for one micro-batch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from host.memory import size_text
from model import visible_length
from tiers.direct_io import REQUESTS_IN_FLIGHT, SMALL_REQUEST_BYTES
from tiers.policy import CACHE_BUFFERS, TIERS, WEIGHT_BUFFERS, Policy, Share
from tiers.probe import Machine

HANDOVER_SECONDS = 1e-3  # that computation loses for each fetched cell, between threads
MAX_POSITIONS = 2**20
# Values that are tried, of Policy.prefill_chunk_tokens and of Policy.micro_batches.
PREFILL_CHUNK_TOKENS = 1024, 4096, 16384
MICRO_BATCH_COUNTS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, as they are run."""

    layers: int  # the number of layers
    layer: int  # one layer's weights, as they are read
    kept: int  # one layer's weights, as they stay on the device
    ring: int  # one layer's weights in a buffer of the ring
    fixed: int  # what always stays on the device: embeddings, head, and the process itself
    head: int  # what every step reads of those
    position: int  # one position of a row in one layer's cache
    hidden: int  # a token's activations between two layers
    within: int  # a token's activations within a layer, at most
    logits: int  # a row's logits, with the memory to sample from them


@dataclass(frozen=True)
class Workload:
    """The number of texts, the tokens of each prompt, and the new tokens of each text."""

    texts: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Split:
    """The number of layers, and of cells of the cache, on each of TIERS."""

    weights: tuple[float, float, float]
    cache: tuple[float, float, float]


@dataclass(frozen=True)
class Prediction:
    """A policy's bytes by tier, and its seconds by resource: for a block's prompts, and for a step.

    The seconds are empty if the machine was not measured.
    """

    policy: Policy
    workload: Workload
    split: Split  # the policy's shares in whole layers and cells
    memory: dict[str, float]
    prefill: dict[str, float]
    step: dict[str, float]

    @property
    def device_is_cpu(self) -> bool:
        return "host" not in self.memory

    @property
    def latency(self) -> float:
        """Seconds for a block of rows."""
        return max(self.prefill.values()) + max(self.step.values()) * (self.workload.new - 1)

    @property
    def rate(self) -> float:
        """New tokens per second, over all blocks of the workload."""
        blocks = math.ceil(self.workload.texts / self.policy.rows)
        return self.workload.texts * self.workload.new / (blocks * self.latency)

    @property
    def binding(self) -> str:
        """The resource that limits a step."""
        return max(self.step, key=self.step.get)


@dataclass(frozen=True)
class Planner:
    """Predicts and chooses policies for a model on a machine."""

    sizes: Sizes
    machine: Machine | None  # None: not measured, so that only memory is predicted
    device_is_cpu: bool  # then host memory is the device's memory

    def predict(self, policy: Policy, work: Workload) -> Prediction:
        """Predict memory and times. The resources work at the same time, so the busiest one
        determines how long a phase takes."""
        layers = self.sizes.layers
        split = Split(
            policy.weights.counts(layers), policy.cache.counts(layers * policy.micro_batches)
        )
        memory = self.memory(policy, split, work)
        times = self.times(policy, split, work) if self.machine else ({}, {})
        return Prediction(policy, work, split, memory, *times)

    def times(
        self, policy: Policy, split: Split, work: Workload
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the seconds by resource, for all prompts of a block and for one step."""
        chunk = max(1, min(work.prompt, policy.prefill_chunk_tokens // policy.rows))  # of a row
        chunks = math.ceil(work.prompt / chunk)
        prefill = self.busy(policy, split, chunk, work.prompt / 2)
        step = self.busy(policy, split, 1, work.prompt + work.new / 2)
        return {name: chunks * seconds for name, seconds in prefill.items()}, step

    def busy(self, policy: Policy, split: Split, tokens: int, positions: float) -> dict[str, float]:
        """Return the seconds by resource of one pass of `tokens` tokens of each row through all
        layers, each of which attends to `positions` positions.

        They are linear in the split, except that any layer on disk delays the cells there;
        `best_split` relies on that. "cells" is the time in which cells wait for the disk.
        """
        sizes, machine, g = self.sizes, self.machine, policy.micro_batch
        _, host_layers, disk_layers = split.weights
        _, host_cells, disk_cells = split.cache
        filled, new = g * positions * sizes.position, g * tokens * sizes.position  # bytes of a cell
        # The disk has this many requests for weights before one for a cell.
        queue = REQUESTS_IN_FLIGHT * SMALL_REQUEST_BYTES / machine.stream * (disk_layers > 0)
        fetched = host_cells * (not policy.cpu_attention)
        on_host = (host_cells + disk_cells) * policy.cpu_attention
        seconds = {
            "disk": disk_layers * sizes.layer / machine.stream
            + disk_cells * (machine.read(filled) + machine.write(new)),
            "cells": disk_cells * (machine.read(filled) + queue),
            "to device": host_layers * machine.to_device(sizes.layer)
            + fetched * machine.to_device(filled),
            "to host": fetched * machine.to_host(new),
            "compute": self.compute_seconds(policy, split, tokens, positions),
            "host attention": on_host * g * tokens * positions * machine.host_per_position,
        }
        if self.device_is_cpu:  # the computing threads also copy
            copies = "to device", "to host", "host attention"
            seconds["compute"] += sum(seconds.pop(name) for name in copies)
            return seconds
        if policy.micro_batches == 1 or not policy.overlap:  # the device waits for the host
            seconds["compute"] += seconds["host attention"]
        bounced = disk_cells * (not policy.cpu_attention)
        seconds["to device"] += disk_layers * machine.to_device(sizes.layer)
        seconds["to device"] += bounced * machine.to_device(filled)
        return seconds

    def compute_seconds(self, policy: Policy, split: Split, tokens: int, positions: float) -> float:
        """Return the device's seconds: products, the head, handovers and its part of attention."""
        sizes, machine, g, K = self.sizes, self.machine, policy.micro_batch, policy.micro_batches
        device_cells, host_cells, disk_cells = split.cache
        calls = math.ceil(g * tokens / policy.tokens_at_once)  # for a micro-batch
        products = sizes.layers * K * calls * machine.products(g * tokens / calls)
        head = machine.products(g * K) * sizes.head / sizes.layer
        moved = host_cells * (not policy.cpu_attention) + disk_cells
        attended = device_cells + (host_cells + disk_cells) * (not policy.cpu_attention)
        per_pair = machine.per_position if tokens == 1 else machine.per_pair
        attention = attended * g * tokens * positions * per_pair
        return products + head + moved * HANDOVER_SECONDS + attention

    def memory(self, policy: Policy, split: Split, work: Workload) -> dict[str, float]:
        """Return the most bytes by tier, linear in the split as long as anything moves."""
        sizes, K = self.sizes, policy.micro_batches
        cell = self.cell_bytes(policy, work)
        moving = sizes.layers > split.weights[0], sizes.layers * K > split.cache[0]
        rings = sum(itertools.compress(self.ring_bytes(policy, work), moving))
        totals = {
            tier: layers * sizes.layer + cells * cell
            for tier, layers, cells in zip(TIERS, split.weights, split.cache, strict=True)
        }
        totals["device"] += split.weights[0] * (sizes.kept - sizes.layer)
        totals["device"] += sizes.fixed + rings + self.activation_bytes(policy, work)
        if self.device_is_cpu:
            totals["device"] += totals.pop("host")
        else:  # reads from disk pass through host memory
            totals["host"] += sizes.layer + cell
        return totals

    def activation_bytes(self, policy: Policy, work: Workload) -> int:
        """Return the most bytes of activations and logits."""
        sizes, rows = self.sizes, policy.rows
        chunk = max(min(policy.prefill_chunk_tokens, rows * work.prompt), rows)
        at_once = max(min(policy.tokens_at_once, chunk), policy.micro_batch)
        return chunk * sizes.hidden + at_once * sizes.within + rows * sizes.logits

    def cell_bytes(self, policy: Policy, work: Workload) -> int:
        positions = visible_length(work.prompt + work.new, MAX_POSITIONS) + 1
        return policy.micro_batch * positions * self.sizes.position

    def ring_bytes(self, policy: Policy, work: Workload) -> tuple[int, int]:
        """Return the bytes of the ring of layers, and of the ring of cells."""
        return WEIGHT_BUFFERS * self.sizes.ring, CACHE_BUFFERS * self.cell_bytes(policy, work)

    def choose(
        self, work: Workload, budgets: dict[str, float], start: Policy, max_rows: int
    ) -> Prediction:
        """Return the policy that generates the most tokens per second within the budgets.

        budgets: bytes by tier. start: gives the fields that are not searched. max_rows: of a block.
        Raises ValueError, with the bytes that are lacking, if even the smallest does not fit.
        """
        candidates = list(self.groupings(start, max_rows))
        plans = [plan for policy in candidates for plan in self.plans(policy, work, budgets)]
        if not plans:
            least = replace(candidates[0], weights=Share(0, 0), cache=Share(0, 0))
            raise ValueError(self.shortage(self.predict(least, work), budgets))
        return max(plans, key=lambda plan: plan.rate)

    def groupings(self, start: Policy, max_rows: int) -> Iterator[Policy]:
        """Yield policies with every grouping of at most max_rows rows, or slightly more."""
        sizes = sorted({min(1 << n, max_rows) for n in range(max_rows.bit_length() + 1)})
        attention = {False, not self.device_is_cpu}
        for g, K in itertools.product(sizes, MICRO_BATCH_COUNTS):
            if g * (K - 1) < max_rows:
                grouped = replace(start, micro_batch=g, micro_batches=K)
                for chunk, on_host in itertools.product(PREFILL_CHUNK_TOKENS, attention):
                    yield replace(grouped, prefill_chunk_tokens=chunk, cpu_attention=on_host)

    def plans(
        self, policy: Policy, work: Workload, budgets: dict[str, float]
    ) -> Iterator[Prediction]:
        """Yield the splits of a grouping that fit: everything on the device, and near the optima
        where weights, or the cache, or both of them move."""
        layers, cells = self.sizes.layers, self.sizes.layers * policy.micro_batches
        shares = [(Share(), Share())]
        for resident in ((False, False), (True, False), (False, True)):
            if split := self.best_split(policy, work, budgets, resident):
                weights = self.shares_near(split.weights, layers)
                shares += itertools.product(weights, self.shares_near(split.cache, cells))
        for weights, cache in shares:
            plan = self.predict(replace(policy, weights=weights, cache=cache), work)
            if all(plan.memory[tier] <= budgets[tier] for tier in plan.memory):
                yield plan

    def best_split(
        self, policy: Policy, work: Workload, budgets: dict[str, float], resident: tuple[bool, bool]
    ) -> Split | None:
        """Return the fastest split within the budgets, in fractions of layers and cells, or None.

        resident: whether all weights, and whether all of the cache, stay on the device and need no
        ring. The variables of the linear program are the layers on each tier, the cells on each
        tier, the seconds of a block's prompts, and those of a step.
        """
        from scipy.optimize import linprog  # importing it takes 0.3 s

        base = self._requirements(policy, work, [0.0] * 6)
        slopes = [self._requirements(policy, work, unit) - base for unit in np.eye(6)]
        resources = (len(base) - len(budgets)) // 2
        limits = np.array([0.0] * 2 * resources + list(budgets.values()))
        limits[2 * resources] += np.dot(resident, self.ring_bytes(policy, work))
        # No resource may take longer than the phase in which it is used.
        phases = np.zeros((len(base), 2))
        phases[:resources, 0] = phases[resources : 2 * resources, 1] = -1
        solved = linprog(
            [0] * 6 + [1, work.new - 1],
            A_ub=np.column_stack([*slopes, phases]),
            b_ub=limits - base,
            A_eq=[[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]],
            b_eq=(self.sizes.layers, self.sizes.layers * policy.micro_batches),
            bounds=self._bounds(resident),
        )
        return Split(tuple(solved.x[:3]), tuple(solved.x[3:6])) if solved.success else None

    def _requirements(self, policy: Policy, work: Workload, units: Sequence[float]) -> np.ndarray:
        """Return the seconds of prompts, then of a step, by resource, and the bytes by tier.

        units: layers, then cells, on each of TIERS.
        """
        split = Split(tuple(units[:3]), tuple(units[3:]))
        prompts, step = self.times(policy, split, work)
        memory = self.memory(policy, split, work)
        return np.array([*prompts.values(), *step.values(), *memory.values()])

    def _bounds(self, resident: tuple[bool, bool]) -> list[tuple[int, int | None]]:
        """Return the bounds of the linear program's variables: none is on a tier of no use."""
        by_kind = []
        for stays in resident:
            on_host = (0, 0) if stays or self.device_is_cpu else (0, None)
            by_kind += [(0, None), on_host, (0, 0) if stays else (0, None)]
        return [*by_kind, (0, None), (0, None)]

    @staticmethod
    def shortage(plan: Prediction, budgets: dict[str, float]) -> str | None:
        """Return a message that says why a plan does not fit, or None if it fits."""
        names = {
            "device": "memory" if plan.device_is_cpu else "device memory",
            "host": "host memory",
        }
        short = [
            f"{size_text(needed)} of {names.get(tier, tier)} and may take "
            f"{size_text(budgets[tier])}"
            for tier, needed in plan.memory.items()
            if needed > budgets[tier]
        ]
        remedy = "allow more, or give fewer or shorter texts"
        return f"does not fit: it needs {'; and '.join(short)}: {remedy}" if short else None

    def shares_near(self, counts: tuple[float, ...], total: int) -> list[Share]:
        """Return shares of whole items: rounded down, and with one more on the device or host."""
        device, host = int(counts[0] + 1e-6), int(counts[1] + 1e-6)
        hosts = (host,) if self.device_is_cpu else (host, host + 1)
        whole = itertools.product((device, device + 1), hosts)
        return [Share(100 * d / total, 100 * h / total) for d, h in whole if d + h <= total]

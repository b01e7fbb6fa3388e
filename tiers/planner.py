"""The policy that makes the most tokens per second on a machine, and how many that will be.

Start at Planner. `predict` says what memory a policy takes and how long each resource of a machine
is busy with it; `choose` looks for the best: for each grouping of rows a linear program finds the
shares, which are rounded to whole layers and cells and evaluated again.

Based on FlexGen's cost model and search (arXiv 2303.06865, section 4.3), with times that were
measured (probe.py) in the place of its constants, and resources that several things share.

Symbols: g rows of a micro-batch, K micro-batches, B = g * K.
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

HANDED_OVER = 1e-3  # seconds that a cell costs those who compute, from thread to thread
LONGEST = 2**20  # slots
SWEEPS = 1024, 4096, 16384  # prompt tokens, the same
COUNTS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32  # of micro-batches, that are tried


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, as they are run."""

    layers: int  # their number
    layer: int  # one layer's weights, as they are read
    kept: int  # the same as they stay on the device
    ring: int  # the same in a slot of the ring
    fixed: int  # all else that stays on the device: embeddings, head, and the process itself
    head: int  # of those, what every step reads
    position: int  # one slot of a row in one layer's cache
    hidden: int  # what a token takes between layers
    within: int  # the most that a token takes within a layer
    logits: int  # of a row, with what drawing from them takes


@dataclass(frozen=True)
class Workload:
    """Texts to be made: how many, of how many tokens each prompt is, and how many are added."""

    texts: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Split:
    """How many layers, and how many cells of the cache, are on each of TIERS."""

    weights: tuple[float, float, float]
    cache: tuple[float, float, float]


@dataclass(frozen=True)
class Prediction:
    """Bytes by tier; seconds by resource, of a block's prompts and of a step."""

    policy: Policy
    workload: Workload
    split: Split  # the policy's shares, as they are realised
    memory: dict[str, float]
    prefill: dict[str, float]
    step: dict[str, float]

    @property
    def device_is_cpu(self) -> bool:
        """The device is the CPU, so that the host's memory is its own."""
        return "host" not in self.memory

    @property
    def latency(self) -> float:
        """Seconds for a block of rows."""
        return max(self.prefill.values()) + max(self.step.values()) * (self.workload.new - 1)

    @property
    def rate(self) -> float:
        """New tokens per second, over all blocks that the texts take."""
        blocks = math.ceil(self.workload.texts / self.policy.rows)
        return self.workload.texts * self.workload.new / (blocks * self.latency)

    @property
    def binding(self) -> str:
        """The resource that a step waits for."""
        return max(self.step, key=self.step.get)


@dataclass(frozen=True)
class Planner:
    """A model on a machine."""

    sizes: Sizes
    machine: Machine | None  # None: times are not known
    device_is_cpu: bool  # the device is the CPU: host memory is its own

    def predict(self, policy: Policy, work: Workload) -> Prediction:
        """Resources work at the same time: the busiest one says how long it takes."""
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
        """Seconds by resource, of all prompts of a block and of one step."""
        tokens = max(
            1, min(work.prompt, policy.prefill_chunk_tokens // policy.rows)
        )  # of a row in a sweep
        sweep = self.busy(policy, split, tokens, work.prompt / 2)
        sweeps = math.ceil(work.prompt / tokens)
        step = self.busy(policy, split, 1, work.prompt + work.new / 2)
        return {name: sweeps * seconds for name, seconds in sweep.items()}, step

    def busy(self, policy: Policy, split: Split, tokens: int, slots: float) -> dict[str, float]:
        """Seconds by resource of a sweep of so many tokens of each row, which see so many slots.

        It is linear in the split, but for whether weights are read at all: `best_split` relies on
        it. What cells wait for on their way is no other resource's time.
        """
        sizes, machine, g, K = self.sizes, self.machine, policy.micro_batch, policy.micro_batches
        _, host, disk = split.weights
        here, cells_host, cells_disk = split.cache
        filled, new = g * slots * sizes.position, g * tokens * sizes.position  # bytes of a cell
        seen = g * tokens * slots
        stays = policy.cpu_attention  # in the host's memory, where queries come to
        per_pair = machine.per_position if tokens == 1 else machine.per_pair
        pieces = math.ceil(g * tokens / policy.chunk)
        # A cell is asked for while the disk has many requests for weights before it.
        queue = REQUESTS_IN_FLIGHT * SMALL_REQUEST_BYTES / machine.stream * (disk > 0)
        products = sizes.layers * K * pieces * machine.products(g * tokens / pieces)
        away = (cells_host + cells_disk) * stays
        fetched = cells_host * (not stays)
        seconds = {
            "disk": disk * sizes.layer / machine.stream
            + cells_disk * (machine.read(filled) + machine.write(new)),
            "cells": cells_disk * (machine.read(filled) + queue),
            "to device": host * machine.to_device(sizes.layer)
            + fetched * machine.to_device(filled),
            "to host": fetched * machine.to_host(new),
            "compute": products
            + machine.products(g * K) * sizes.head / sizes.layer
            + (fetched + cells_disk) * HANDED_OVER
            + (here + cells_host + cells_disk - away) * seen * per_pair,
            "host attention": away * seen * machine.host_per_position,
        }
        if self.device_is_cpu:  # who computes also copies
            copies = "to device", "to host", "host attention"
            seconds["compute"] += sum(seconds.pop(name) for name in copies)
        else:
            if K == 1 or not policy.overlap:  # the device has nothing else to do meanwhile
                seconds["compute"] += seconds["host attention"]
            seconds["to device"] += disk * machine.to_device(sizes.layer)
            seconds["to device"] += cells_disk * (not stays) * machine.to_device(filled)
        return seconds

    def memory(self, policy: Policy, split: Split, work: Workload) -> dict[str, float]:
        """Bytes by tier, at most: linear in the split, as long as anything moves."""
        sizes, g, K = self.sizes, policy.micro_batch, policy.micro_batches
        cell = self.cell(policy, work)
        moving = sizes.layers > split.weights[0], sizes.layers * K > split.cache[0]
        rings = sum(itertools.compress(self.rings(policy, work), moving))
        sweep = max(min(policy.prefill_chunk_tokens, g * K * work.prompt), g * K)
        chunk = max(min(policy.chunk, sweep), g)
        computed = sweep * sizes.hidden + chunk * sizes.within + g * K * sizes.logits
        totals = {
            tier: layers * sizes.layer + cells * cell
            for tier, layers, cells in zip(TIERS, split.weights, split.cache, strict=True)
        }
        totals["device"] += split.weights[0] * (sizes.kept - sizes.layer)
        totals["device"] += sizes.fixed + rings + computed
        if self.device_is_cpu:
            totals["device"] += totals.pop("host")
        else:  # what is read from disk passes through it
            totals["host"] += sizes.layer + cell
        return totals

    def cell(self, policy: Policy, work: Workload) -> int:
        """Bytes of a cell of the cache."""
        slots = visible_length(work.prompt + work.new, LONGEST) + 1
        return policy.micro_batch * slots * self.sizes.position

    def rings(self, policy: Policy, work: Workload) -> tuple[int, int]:
        """Bytes of the ring of layers, and of that of cells."""
        return WEIGHT_BUFFERS * self.sizes.ring, CACHE_BUFFERS * self.cell(policy, work)

    def choose(
        self, work: Workload, budgets: dict[str, float], start: Policy, most: int
    ) -> Prediction:
        """The policy within budgets, bytes by tier, that makes the most tokens per second.

        start: what is settled, pinning and the like. most: rows of a block. Raises ValueError
        saying what is lacking where even the smallest does not fit.
        """
        candidates = list(self.groupings(start, most))
        plans = [plan for policy in candidates for plan in self.plans(policy, work, budgets)]
        if not plans:
            least = replace(candidates[0], weights=Share(0, 0), cache=Share(0, 0))
            raise ValueError(self.shortage(self.predict(least, work), budgets))
        return max(plans, key=lambda plan: plan.rate)

    def groupings(self, start: Policy, most: int) -> Iterator[Policy]:
        for g in sorted({min(1 << n, most) for n in range(most.bit_length() + 1)}):
            for K in (k for k in COUNTS if g * (k - 1) < most):
                grouped = replace(start, micro_batch=g, micro_batches=K)
                for sweep in SWEEPS:
                    for attend in {False, not self.device_is_cpu}:
                        yield replace(grouped, prefill_chunk_tokens=sweep, cpu_attention=attend)

    def plans(
        self, policy: Policy, work: Workload, budgets: dict[str, float]
    ) -> Iterator[Prediction]:
        """Splits for a grouping that fit: all on the device, and what linear programs say where
        weights, or the cache, or both of them move."""
        layers, cells = self.sizes.layers, self.sizes.layers * policy.micro_batches
        shares = [(Share(), Share())]
        for still in ((False, False), (True, False), (False, True)):
            if split := self.best_split(policy, work, budgets, still):
                weights = self.shares_near(split.weights, layers)
                shares += itertools.product(weights, self.shares_near(split.cache, cells))
        for weight, cache in shares:
            plan = self.predict(replace(policy, weights=weight, cache=cache), work)
            if all(plan.memory[tier] <= budgets[tier] for tier in plan.memory):
                yield plan

    def best_split(
        self, policy: Policy, work: Workload, budgets: dict[str, float], still: tuple[bool, bool]
    ) -> Split | None:
        """A linear program: of layers and cells on each tier, and the seconds of a block's prompts
        and of a step, which no resource may exceed. None: nothing fits.

        still: whether all weights, or all of the cache, stay on the device and need no ring.
        """
        from scipy.optimize import linprog  # takes a third of a second: not before it is needed

        def needed(units: Sequence[float]) -> np.ndarray:
            """Seconds of the prompts and of a step by resource, and bytes by tier, of a split."""
            split = Split(tuple(units[:3]), tuple(units[3:]))
            prompts, step = self.times(policy, split, work)
            memory = self.memory(policy, split, work)
            return np.array([*prompts.values(), *step.values(), *memory.values()])

        base = needed([0.0] * 6)
        slopes = [needed(unit) - base for unit in np.eye(6)]  # all of it is linear
        resources = (len(base) - len(budgets)) // 2
        within = np.array([0.0] * 2 * resources + list(budgets.values()))
        within[2 * resources] += np.dot(still, self.rings(policy, work))
        longest = np.zeros((len(base), 2))  # which of the two times holds for a resource
        longest[:resources, 0] = longest[resources : 2 * resources, 1] = -1
        counts = self.sizes.layers, self.sizes.layers * policy.micro_batches
        bounds = [(0, None)] * 8
        for kind in (0, 1):
            for tier in (1, 2):
                # The host's memory is the device's, if that is the CPU.
                if still[kind] or (tier == 1 and self.device_is_cpu):
                    bounds[3 * kind + tier] = 0, 0
        solved = linprog(
            [0] * 6 + [1, work.new - 1],
            A_ub=np.column_stack([*slopes, longest]),
            b_ub=within - base,
            A_eq=[[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]],
            b_eq=counts,
            bounds=bounds,
        )
        return Split(tuple(solved.x[:3]), tuple(solved.x[3:6])) if solved.success else None

    @staticmethod
    def shortage(plan: Prediction, budgets: dict[str, float]) -> str | None:
        """Why a plan does not fit; None where it does."""
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
        """In whole numbers: rounded down, and with one more on the device or in host memory."""
        device, host = int(counts[0] + 1e-6), int(counts[1] + 1e-6)
        hosts = (host,) if self.device_is_cpu else (host, host + 1)
        whole = itertools.product((device, device + 1), hosts)
        return [Share(100 * d / total, 100 * h / total) for d, h in whole if d + h <= total]

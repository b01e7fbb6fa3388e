"""A model's layers on more than one tier, brought to the device when they are needed.

Start at StreamedLayers: the loop of Transformer.forward goes over it and gets, one after the other,
layers that are on the device, while the next one is on its way into another slot of a ring. That
loop is the schedule. `zigzag` takes all rows through a layer in micro-batches, so that its weights
come once for all of them. What the KV cache does meanwhile is in tiered_cache.py.

Based on FlexGen's block schedule (arXiv 2303.06865, section 3.2).

Shapes: B rows, g rows of a micro-batch, T new tokens of a row, D dim.
"""

import contextlib
import copy
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import allocate_tensor, final_dtype, set_tensor, stored_tensors
from fast_layers.cpu import MIN_DENSE_BYTES, PackedLinear, use_fast_linears
from host.memory import page_aligned, round_up_to_block
from model import KVCache, Linear, Rotation
from quant.linear import QuantizedLinear
from tiers import direct_io as disk
from tiers.direct_io import DirectFile, ScratchFile
from tiers.policy import WEIGHT_BUFFERS, Policy
from tiers.prefetch import (
    CPU,
    META,
    BounceBuffer,
    Buffer,
    HostMemory,
    Layout,
    Ring,
    Store,
    TransferWorker,
    WaitTime,
    Workers,
    record_event,
)

# Micro-batches of which the host attends to some while the device computes others: one here, one
# there and one on its way; no more than the ring has slots for their cells.
MICRO_BATCHES_IN_FLIGHT = 3
Fill = Callable[[str, Tensor], Any]  # gives a tensor of that name its value
Stored = Callable[[str, torch.dtype], tuple[Path, int] | None]  # where a file has it as it is
Source = tuple[Store, dict[str, int]]  # where each tensor of a layer is


class Streamed(NamedTuple):
    """A block in a slot, and those of its linears that a CPU wants packed, with what is read."""

    block: nn.Module
    tiled: list[tuple[PackedLinear, QuantizedLinear]]


class StreamedLayers(nn.ModuleList):
    """In place of Transformer.layers, while these are on the meta device.

    `home` says where each tensor is to be; when all have come there, `start` makes the ring.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        policy: Policy,
        dtype: torch.dtype,
        device: torch.device,
        make_run: Callable[[], Callable[..., Tensor]] = lambda: eager,
    ):
        super().__init__(layers)
        self._make_run = make_run
        self._files: dict[Path, Store] = {}
        self.wait_times = {"layers": WaitTime(), "cache": WaitTime()}
        self.policy, self.device, self._dtype = policy, device, dtype
        self.tiers = policy.weights.tiers(len(layers))
        self._moving = [j for j, tier in enumerate(self.tiers) if tier != "device"]
        self._meta = (copy.deepcopy(layers[0]),)  # in a tuple: no part of the model
        stored = {name: tensor for name, (tensor, _) in stored_tensors(layers[0]).items()}
        self.layout = Layout(
            {
                n: torch.empty(t.shape, dtype=final_dtype(t, dtype), device=META)
                for n, t in stored.items()
            }
        )
        self._slabs = {
            j: page_aligned(self.layout.nbytes, CPU, policy.pins(device))
            for j in self._moving
            if self.tiers[j] == "host"
        }
        self.locations: dict[int, Source] = {
            j: (HostMemory(slab), self.layout.offsets) for j, slab in self._slabs.items()
        }

    @functools.cached_property
    def run(self) -> Callable[..., Tensor]:
        """Calls a block with its inputs: eager, or a compiled function."""
        return self._make_run()

    def destination(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Memory for a tensor of the model; None: it stays on disk."""
        place = name.split(".", 2)
        j = int(place[1]) if place[0] == "layers" else None
        if j in self._slabs:
            return self.layout.of(self.layout.cut(self._slabs[j]))[place[2]]
        on_disk = j is not None and self.tiers[j] == "disk"
        return None if on_disk else allocate_tensor(shape, dtype, self.device)

    def start(self, fill: Fill, stored: Stored) -> None:
        """Make the ring. Layers that no file has as they are go to a scratch file, by `fill`."""
        on_disk = [j for j in self._moving if j not in self.locations]
        found = {j: source for j in on_disk if (source := self._in_file(j, stored))}
        self.locations |= found
        self._write_scratch([j for j in on_disk if j not in found], fill)
        self.buffers = [self._slot() for _ in self._moving[:WEIGHT_BUFFERS]]
        # Two layers at a time: when the requests for one run out, those for the next are there.
        self._transfer_worker = TransferWorker(self.device, "weights", WEIGHT_BUFFERS)
        self._packer = TransferWorker(self.device, "pack")
        self._workers = Workers(self.device, "micro-batches", MICRO_BATCHES_IN_FLIGHT)
        self._ring = self._new_ring()

    def set_policy(self, policy: Policy) -> None:
        """Another one with the same weights on the same tiers."""
        self.policy = policy
        self._ring = self._new_ring()

    def _new_ring(self) -> Ring[int]:
        ahead = self.policy.overlap
        return Ring(self._moving, self.buffers, self._fetch, self.wait_times["layers"], ahead)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        """The layers, each on the device until the next is asked for."""
        for j, layer in enumerate(super().__iter__()):
            if self.tiers[j] == "device":
                yield partial(self._through, j, layer)
            else:
                with self._ring.acquire(j) as slot:
                    try:
                        yield partial(self._through, j, slot.contents.block)
                    finally:  # after an error, too, the device may still compute with it
                        slot.last_use = record_event(self.device)

    def _through(self, j: int, block: nn.Module, x: Tensor, *given: Any) -> Tensor:
        """Layer j for x, (B, T, D), which between layers is where the policy says."""
        if j == 0 and self.policy.activations.device < 100:
            x = OffloadedActivations(x, self.policy)
        workers = self._workers if self._host_has_a_part() else None
        B, T, _ = x.shape
        again = min(self.policy.micro_batch, self.policy.chunk // T) < B
        unpacks = again and self.device.type == "cuda" and self.run is eager
        with unpacked(block, self._dtype) if unpacks else contextlib.nullcontext():
            zigzag(partial(self.run, block), self.policy, x, *given, workers)
        return x.whole() if isinstance(x, OffloadedActivations) and j == len(self) - 1 else x

    def _host_has_a_part(self) -> bool:
        """Whether it attends, so that the device has other micro-batches to go on with meanwhile.
        (Compiled blocks take turns with it.)"""
        policy = self.policy
        attends = policy.cpu_attention and policy.cache.device < 100 and self.device.type != "cpu"
        return attends and policy.overlap and self.run is eager

    def _in_file(self, j: int, stored: Stored) -> Source | None:
        tensors = self.layout.tensors.items()
        places = {n: stored(f"layers.{j}.{n}", t.dtype) or (None, 0) for n, t in tensors}
        paths = {path for path, _ in places.values()}
        if None in paths or len(paths) > 1:
            return None
        path = paths.pop()
        if path not in self._files:
            self._files[path] = self._reader(DirectFile(path))
        return self._files[path], {n: at for n, (_, at) in places.items()}

    def _write_scratch(self, layers: Sequence[int], fill: Fill) -> None:
        if not layers:
            return
        nbytes, parts = self.layout.nbytes, self.layout.allocate(CPU)
        scratch = ScratchFile(self.policy.directory, len(layers) * nbytes)
        reader = self._reader(scratch)
        for n, j in enumerate(layers):
            for name, tensor in self.layout.of(parts).items():
                fill(f"layers.{j}.{name}", tensor)
            places = {name: n * nbytes + at for name, at in self.layout.offsets.items()}
            scratch.write([(places[name], part) for name, part in parts.items()])
            self.locations[j] = reader, places

    def _reader(self, file: DirectFile) -> Store:
        file.threads = disk.layers
        if not self.policy.cache.disk:  # nobody who is in a hurry
            file.request = disk.LARGE_REQUEST_BYTES
        if self.device.type == "cpu":
            return file
        pin, count = self.policy.pins(self.device), len(self._moving[:WEIGHT_BUFFERS])
        return BounceBuffer(
            file, [page_aligned(self.layout.nbytes, CPU, pin) for _ in range(count)]
        )

    def _slot(self) -> Buffer:
        parts, block = self.layout.allocate(self.device), copy.deepcopy(self._meta[0])
        for name, tensor in self.layout.of(parts).items():
            set_tensor(block, name, tensor)
        stored = dict(block.named_modules())
        if self.device.type == "cpu":
            use_fast_linears(
                block, self._dtype, large=len(self) * self.layout.nbytes >= MIN_DENSE_BYTES
            )
        tiled = [
            (module, stored[name])
            for name, module in block.named_modules()
            if isinstance(module, PackedLinear)
        ]
        return Buffer(parts, Streamed(block, tiled), record_event(self.device))

    def _fetch(self, j: int, slot: Buffer) -> Future:
        store, places = self.locations[j]
        pieces = [(places[name], part) for name, part in slot.parts.items()]
        read = self._transfer_worker.submit(lambda: store.read(pieces), slot.last_use)

        def pack() -> None:
            read.result()
            for module, stored in slot.contents.tiled:
                module.load_from(stored)

        # Another thread packs, so that the disk does not wait for that.
        return self._packer.submit(pack) if slot.contents.tiled else read


def eager(block: nn.Module, *given: Any) -> Tensor:
    return block(*given)


@contextlib.contextmanager
def unpacked(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Quantised linears are dense for a while: they are unpacked once for all micro-batches."""
    packed = {n: m for n, m in block.named_modules() if isinstance(m, QuantizedLinear)}
    try:
        for name, linear in packed.items():
            with META:
                dense = Linear(linear.in_features, linear.out_features, bias=False)
            dense.weight = nn.Parameter(linear.dequantize_by_kernel(dtype), requires_grad=False)
            dense.bias = linear.bias
            block.set_submodule(name, dense)
        yield
    finally:
        for name, linear in packed.items():
            block.set_submodule(name, linear)


def zigzag(
    block: Callable[..., Tensor],
    policy: Policy,
    x: Tensor,
    rotation: Rotation,
    mask: Tensor,
    pos: Tensor,
    cache: KVCache,
    workers: Workers | None = None,
) -> None:
    """A layer, called as a block is, for all rows of x, (B, T, D), which it overwrites: one
    micro-batch after the other, and of that as many rows at once as have a chunk of tokens.

    workers: who computes micro-batches at the same time; None: no two are."""
    (B, T, _), g = x.shape, policy.micro_batch
    step = max(1, min(g, policy.chunk // T))

    def compute(cell: KVCache, first: int, end: int) -> None:
        for start in range(first, end, step):
            rows = slice(start, min(start + step, end))
            turned = rotation and tuple(t[rows] for t in rotation)
            within = cell.part(slice(start - first, rows.stop - first))
            x[rows] = block(x[rows], turned, mask[rows], pos[rows], within)

    spans = [(first, min(first + g, B)) for first in range(0, B, g)]
    if workers and len(spans) > 1:
        return compute_together(workers, compute, spans, cache, pos)
    for first, end in spans:
        with cache.opened(slice(first, end), pos) as cell:
            compute(cell, first, end)


def compute_together(
    workers: Workers,
    compute: Callable[[KVCache, int, int], None],
    spans: Sequence[tuple[int, int]],
    cache: KVCache,
    pos: Tensor,
) -> None:
    """Micro-batches, MICRO_BATCHES_IN_FLIGHT of them at a time. Their cells are opened and closed here, in order.
    Nothing is under way when this returns, or raises."""
    under_way: deque[tuple[contextlib.ExitStack, Future]] = deque()

    def finish() -> None:
        opened, computed = under_way.popleft()
        with opened:
            computed.result()

    try:
        for span in spans:
            if len(under_way) == MICRO_BATCHES_IN_FLIGHT:
                finish()
            opened = contextlib.ExitStack()
            cell = opened.enter_context(cache.opened(slice(*span), pos))
            under_way.append((opened, workers.submit(partial(compute, cell, *span))))
        while under_way:
            finish()
    finally:
        while under_way:  # one has failed
            with contextlib.suppress(Exception):
                finish()


class OffloadedActivations:
    """Activations, (B, T, D), that are put away between two layers, each micro-batch on its tier.

    Rows are read and replaced as a tensor's are. Each begins a block of the disk's.
    """

    def __init__(self, x: Tensor, policy: Policy):
        self.shape, self._like, self._g = x.shape, x[:0], policy.micro_batch
        self._row = round_up_to_block(x[0].nbytes)
        nbytes, pin = self._g * self._row, policy.pins(x.device)
        make: dict[str, Callable[[], Store]] = {
            "device": lambda: HostMemory(page_aligned(nbytes, x.device)),
            "host": lambda: HostMemory(page_aligned(nbytes, CPU, pin)),
            "disk": lambda: ScratchFile(policy.directory, nbytes),
        }
        tiers = policy.activations.tiers(-(-len(x) // self._g))
        self._homes = [make[tier]() for tier in tiers]
        stage = page_aligned(nbytes, CPU, pin)
        # What stays on a GPU does not pass through the host.
        here = page_aligned(nbytes, x.device) if x.device.type != "cpu" else stage
        self._stages = [here if tier == "device" else stage for tier in tiers]
        self._turn = threading.Lock()  # of those who use a stage
        for start in range(0, len(x), self._g):
            self[start : start + self._g] = x[start : start + self._g]

    def __getitem__(self, rows: slice) -> Tensor:
        with self._turn:
            pieces, stage = self._pieces(rows)
            self._homes[rows.start // self._g].read(pieces)
            return stage.to(self._like.device, copy=True)

    def __setitem__(self, rows: slice, x: Tensor) -> None:
        with self._turn:
            pieces, stage = self._pieces(rows)
            stage.copy_(x)
            self._homes[rows.start // self._g].write(pieces)

    def whole(self) -> Tensor:
        B = self.shape[0]
        return torch.cat([self[n : min(n + self._g, B)] for n in range(0, B, self._g)])

    def _pieces(self, rows: slice) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Where rows are in their store and in the memory on the way there, and that as x."""
        count, first = min(rows.stop, self.shape[0]) - rows.start, rows.start % self._g
        stage = self._stages[rows.start // self._g][: count * self._row]
        values = stage.view(self._like.dtype).view(count, -1)  # (rows, T * D and a rest)
        width = self.shape[1] * self.shape[2]
        return [(first * self._row, stage)], values[:, :width].unflatten(1, self.shape[1:])

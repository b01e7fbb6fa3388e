"""Offloading: a model's layers lie on several tiers and are brought to the device when needed.

Start at StreamedLayers. Transformer.forward iterates over it and gets one layer after the other, on
the device, while the next layer is read into another buffer of a ring: that loop is the schedule.
`zigzag` computes all rows of a layer, one micro-batch after the other, so that the weights are
loaded once for all of them. The KV cache moves in the same way: see tiers/kv_cache.py.

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

from fast_layers.cpu import MIN_DENSE_BYTES, PackedLinear, use_fast_linears
from host.memory import page_aligned, round_up_to_block
from model import KVCache, Linear, Rotation
from quant.linear import QuantizedLinear
from tiers.direct_io import LARGE_REQUEST_BYTES, DirectFile, ScratchFile, layer_threads
from tiers.policy import WEIGHT_BUFFERS, Policy
from tiers.prefetch import (
    CPU,
    META,
    BounceBuffer,
    Buffer,
    ComputeWorkers,
    HostMemory,
    Layout,
    Ring,
    Store,
    TransferWorker,
    WaitTime,
    record_event,
)
from weights.allocation import allocate_tensor, final_dtype, set_tensor, stored_tensors

# With attention on the host, the device computes other micro-batches meanwhile: one is computed by
# the device, one by the host, and one is between them. The ring must have as many cache buffers.
MICRO_BATCHES_IN_FLIGHT = 3
Fill = Callable[[str, Tensor], Any]  # writes the checkpoint's values to the tensor of that name
# Returns the file and offset of a tensor that is stored in the dtype in which it is run, else None.
Stored = Callable[[str, torch.dtype], tuple[Path, int] | None]
Location = tuple[Store, dict[str, int]]  # of a layer: its store, and each tensor's offset there


class StreamedBlock(NamedTuple):
    """A block in a buffer. packed: its linears whose weights a CPU repacks, each with the linear
    whose tensors are read."""

    block: nn.Module
    packed: list[tuple[PackedLinear, QuantizedLinear]]


class StreamedLayers(nn.ModuleList):
    """Replaces Transformer.layers while they are on the meta device.

    `destination` allocates each tensor on its tier. When all are filled, `start` makes the ring.
    make_run: makes the function that computes a block; it is called when that is first needed,
    because the compiler looks at the finished model.
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
        self._meta_block = (copy.deepcopy(layers[0]),)  # in a tuple, so that it is no submodule
        self.layout = block_layout(layers[0], dtype)
        self._slabs = {
            j: page_aligned(self.layout.nbytes, CPU, policy.pins(device))
            for j in self._moving
            if self.tiers[j] == "host"
        }
        self.locations: dict[int, Location] = {
            j: (HostMemory(slab), self.layout.offsets) for j, slab in self._slabs.items()
        }

    @functools.cached_property
    def run(self) -> Callable[..., Tensor]:
        """The function that computes a block from its inputs: `eager`, or a compiled one."""
        return self._make_run()

    def destination(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Allocate memory for a tensor of the model; None if it stays on disk."""
        place = name.split(".", 2)
        j = int(place[1]) if place[0] == "layers" else None
        if j in self._slabs:
            return self.layout.view(self.layout.split(self._slabs[j]))[place[2]]
        on_disk = j is not None and self.tiers[j] == "disk"
        return None if on_disk else allocate_tensor(shape, dtype, self.device)

    def start(self, fill: Fill, stored: Stored) -> None:
        """Make the ring. Layers on disk are read from the checkpoint if one of its files stores
        them as they are run; `fill` writes the others to a scratch file first."""
        on_disk = [j for j in self._moving if j not in self.locations]
        in_place = {j: at for j in on_disk if (at := self._checkpoint_location(j, stored))}
        self.locations |= in_place
        self._write_scratch([j for j in on_disk if j not in in_place], fill)
        self.buffers = [self._buffer() for _ in self._moving[:WEIGHT_BUFFERS]]
        # Two layers at a time, so that the disk has requests of the next when one layer ends.
        self._reader = TransferWorker(self.device, "weights", WEIGHT_BUFFERS)
        self._packer = TransferWorker(self.device, "pack")
        self._workers = ComputeWorkers(self.device, "micro-batches", MICRO_BATCHES_IN_FLIGHT)
        self._ring = self._new_ring()

    def set_policy(self, policy: Policy) -> None:
        """Change to a policy that has the weights on the same tiers."""
        self.policy = policy
        self._ring = self._new_ring()

    def _new_ring(self) -> Ring[int]:
        overlap = self.policy.overlap
        return Ring(self._moving, self.buffers, self._fetch, self.wait_times["layers"], overlap)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        """Yield the layers. Each is on the device until the next one is requested."""
        for j, layer in enumerate(super().__iter__()):
            if self.tiers[j] == "device":
                yield partial(self._forward, j, layer)
            else:
                with self._ring.acquire(j) as buffer:
                    try:
                        yield partial(self._forward, j, buffer.contents.block)
                    finally:  # even after an error the device may still compute with it
                        buffer.last_use = record_event(self.device)

    def _forward(self, j: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        """Compute layer j for x, (B, T, D), which the policy may offload between layers."""
        if j == 0 and self.policy.activations.device < 100:
            x = OffloadedActivations(x, self.policy)
        workers = self._workers if self._host_attends_beside_device() else None
        B, T, _ = x.shape
        several_calls = min(self.policy.micro_batch, self.policy.tokens_at_once // T) < B
        unpack = several_calls and self.device.type == "cuda" and self.run is eager
        weights = unpacked(block, self._dtype) if unpack else contextlib.nullcontext()
        with weights:
            zigzag(partial(self.run, block), self.policy, x, *inputs, workers)
        return x.whole() if isinstance(x, OffloadedActivations) and j == len(self) - 1 else x

    def _host_attends_beside_device(self) -> bool:
        """Whether the device computes other micro-batches while the host attends. Compiled blocks
        do not: they run on one thread."""
        policy = self.policy
        attends = policy.cpu_attention and policy.cache.device < 100 and self.device.type != "cpu"
        return attends and policy.overlap and self.run is eager

    def _checkpoint_location(self, j: int, stored: Stored) -> Location | None:
        """Return where one file stores the whole layer as it is run, or None."""
        tensors = self.layout.tensors.items()
        places = {n: stored(f"layers.{j}.{n}", t.dtype) or (None, 0) for n, t in tensors}
        paths = {path for path, _ in places.values()}
        if None in paths or len(paths) > 1:
            return None
        path = paths.pop()
        if path not in self._files:
            self._files[path] = self._file_store(DirectFile(path))
        return self._files[path], {name: offset for name, (_, offset) in places.items()}

    def _write_scratch(self, layers: Sequence[int], fill: Fill) -> None:
        if not layers:
            return
        nbytes, parts = self.layout.nbytes, self.layout.allocate(CPU)
        scratch = ScratchFile(self.policy.directory, len(layers) * nbytes)
        store = self._file_store(scratch)
        for n, j in enumerate(layers):
            for name, tensor in self.layout.view(parts).items():
                fill(f"layers.{j}.{name}", tensor)
            offsets = {name: n * nbytes + at for name, at in self.layout.offsets.items()}
            scratch.write([(offsets[name], part) for name, part in parts.items()])
            self.locations[j] = store, offsets

    def _file_store(self, file: DirectFile) -> Store:
        file.threads = layer_threads
        if not self.policy.cache.disk:  # no cell of the cache waits behind these requests
            file.request_bytes = LARGE_REQUEST_BYTES
        if self.device.type == "cpu":
            return file
        nbytes, pin = self.layout.nbytes, self.policy.pins(self.device)
        hosts = [page_aligned(nbytes, CPU, pin) for _ in self._moving[:WEIGHT_BUFFERS]]
        return BounceBuffer(file, hosts)

    def _buffer(self) -> Buffer:
        """Allocate a buffer of the ring, with a block in its memory."""
        parts, block = self.layout.allocate(self.device), copy.deepcopy(self._meta_block[0])
        for name, tensor in self.layout.view(parts).items():
            set_tensor(block, name, tensor)
        stored = dict(block.named_modules())
        if self.device.type == "cpu":
            use_fast_linears(
                block, self._dtype, large=len(self) * self.layout.nbytes >= MIN_DENSE_BYTES
            )
        packed = [
            (module, stored[name])
            for name, module in block.named_modules()
            if isinstance(module, PackedLinear)
        ]
        return Buffer(parts, StreamedBlock(block, packed), record_event(self.device))

    def _fetch(self, j: int, buffer: Buffer) -> Future:
        store, offsets = self.locations[j]
        pieces = [(offsets[name], part) for name, part in buffer.parts.items()]
        read = self._reader.submit(lambda: store.read(pieces), buffer.last_use)

        def pack() -> None:
            read.result()
            for module, stored in buffer.contents.packed:
                module.load_from(stored)

        # Another thread packs, so that the next read need not wait for it.
        return self._packer.submit(pack) if buffer.contents.packed else read


def block_layout(block: nn.Module, dtype: torch.dtype) -> Layout:
    """Return the layout of a block's tensors in the dtypes in which they are run."""
    stored = {name: tensor for name, (tensor, _) in stored_tensors(block).items()}
    return Layout(
        {
            name: torch.empty(tensor.shape, dtype=final_dtype(tensor, dtype), device=META)
            for name, tensor in stored.items()
        }
    )


def eager(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


@contextlib.contextmanager
def unpacked(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace quantised linears by dense ones, so that they are unpacked once for all
    micro-batches; put them back on exit."""
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
    workers: ComputeWorkers | None = None,
) -> None:
    """Compute a block for all rows of x, (B, T, D), in place: one micro-batch after the other, each
    in groups of rows that together have at most policy.tokens_at_once tokens.

    workers: threads that compute several micro-batches at the same time; None: one at a time.
    """
    (B, T, _), g = x.shape, policy.micro_batch
    step = max(1, min(g, policy.tokens_at_once // T))

    def compute(cell: KVCache, first: int, end: int) -> None:
        for start in range(first, end, step):
            rows = slice(start, min(start + step, end))
            row_rotation = rotation and tuple(t[rows] for t in rotation)
            part = cell.part(slice(start - first, rows.stop - first))
            x[rows] = block(x[rows], row_rotation, mask[rows], pos[rows], part)

    micro_batches = [(first, min(first + g, B)) for first in range(0, B, g)]
    if workers and len(micro_batches) > 1:
        return compute_in_threads(workers, compute, micro_batches, cache, pos)
    for first, end in micro_batches:
        with cache.opened(slice(first, end), pos) as cell:
            compute(cell, first, end)


def compute_in_threads(
    workers: ComputeWorkers,
    compute: Callable[[KVCache, int, int], None],
    micro_batches: Sequence[tuple[int, int]],
    cache: KVCache,
    pos: Tensor,
) -> None:
    """Compute micro-batches, MICRO_BATCHES_IN_FLIGHT at a time. The calling thread opens and closes
    their cells, in order. None is in flight when this returns or raises."""
    in_flight: deque[tuple[contextlib.ExitStack, Future]] = deque()

    def finish() -> None:
        opened, computed = in_flight.popleft()
        with opened:
            computed.result()

    try:
        for span in micro_batches:
            if len(in_flight) == MICRO_BATCHES_IN_FLIGHT:
                finish()
            opened = contextlib.ExitStack()
            cell = opened.enter_context(cache.opened(slice(*span), pos))
            in_flight.append((opened, workers.submit(partial(compute, cell, *span))))
        while in_flight:
            finish()
    finally:
        while in_flight:  # one has failed
            with contextlib.suppress(Exception):
                finish()


class OffloadedActivations:
    """Activations, (B, T, D), that are stored between two layers, each micro-batch on its tier.

    Slices of rows are read and assigned as with a tensor. A row begins at a multiple of
    BLOCK_BYTES.
    """

    def __init__(self, x: Tensor, policy: Policy):
        self.shape, self._like, self._g = x.shape, x[:0], policy.micro_batch
        self._row_bytes = round_up_to_block(x[0].nbytes)
        nbytes, pin = self._g * self._row_bytes, policy.pins(x.device)
        make: dict[str, Callable[[], Store]] = {
            "device": lambda: HostMemory(page_aligned(nbytes, x.device)),
            "host": lambda: HostMemory(page_aligned(nbytes, CPU, pin)),
            "disk": lambda: ScratchFile(policy.directory, nbytes),
        }
        tiers = policy.activations.tiers(-(-len(x) // self._g))
        self._stores = [make[tier]() for tier in tiers]
        host = page_aligned(nbytes, CPU, pin)
        # What stays on a GPU does not pass through host memory.
        device = page_aligned(nbytes, x.device) if x.device.type != "cpu" else host
        self._buffers = [device if tier == "device" else host for tier in tiers]
        self._lock = threading.Lock()  # one thread at a time uses a buffer
        for start in range(0, len(x), self._g):
            self[start : start + self._g] = x[start : start + self._g]

    def __getitem__(self, rows: slice) -> Tensor:
        with self._lock:
            pieces, values = self._pieces(rows)
            self._stores[rows.start // self._g].read(pieces)
            return values.to(self._like.device, copy=True)

    def __setitem__(self, rows: slice, x: Tensor) -> None:
        with self._lock:
            pieces, values = self._pieces(rows)
            values.copy_(x)
            self._stores[rows.start // self._g].write(pieces)

    def whole(self) -> Tensor:
        """Return all rows, (B, T, D), on the device."""
        B = self.shape[0]
        return torch.cat([self[n : min(n + self._g, B)] for n in range(0, B, self._g)])

    def _pieces(self, rows: slice) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Return the offset of rows in their store and their bytes in the buffer, and these bytes
        as a tensor, (rows, T, D)."""
        count, first = min(rows.stop, self.shape[0]) - rows.start, rows.start % self._g
        memory = self._buffers[rows.start // self._g][: count * self._row_bytes]
        values = memory.view(self._like.dtype).view(count, -1)  # (rows, T * D and padding)
        width = self.shape[1] * self.shape[2]
        return [(first * self._row_bytes, memory)], values[:, :width].unflatten(1, self.shape[1:])

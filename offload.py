"""Offloading: a model's layers lie on several tiers and are brought to the device when needed.

Start at StreamedLayers. Transformer.forward iterates over it and gets one layer after the other, on
the device, while the next layer is read into another buffer: a Prefetcher uses two buffers in turn
(tiers/prefetch.py). `zigzag` computes a layer for all rows of the batch, one micro-batch after the
other, so that the weights are loaded once for all of them. The KV cache is cut into cells, one for
each layer and micro-batch, which move in the same way: see tiers/kv_cache.py. A tier is the device,
host memory or disk. A Policy (tiers/policy.py) states which tier holds what. A store holds bytes on
another tier: host memory or a file.

Based on FlexGen's block schedule (arXiv 2303.06865, section 3.2).

Shapes: B rows (texts of a batch), g rows of a micro-batch, T new tokens of a row, D dim.
"""

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fast_layers.cpu import PackedLinear, use_fast_linears
from host.memory import page_aligned, round_up_to_block
from layers.basic import Linear
from layers.kv_cache import Cache, KVCache
from layers.positions import Rotation
from quant.linear import QuantizedLinear
from tiers.direct_io import LARGE_REQUEST_BYTES, DirectFile, ScratchFile, layer_threads
from tiers.host_attention import HostAttention
from tiers.policy import WEIGHT_BUFFERS, Policy
from tiers.prefetch import (
    CPU,
    META,
    BouncedFile,
    Buffer,
    ComputeWorkers,
    HostMemory,
    Layout,
    Prefetcher,
    Store,
    TransferWorker,
    WaitTime,
    record_event,
)
from weights.allocation import Fill, allocate_tensor, final_dtype, set_tensor, stored_tensors

# While the host computes the attention of one micro-batch, the device computes another, and a third
# waits between the two. The KV cache must have as many prefetch buffers.
CONCURRENT_MICRO_BATCHES = 3
# Called with the name of a tensor and the dtype used for computation. Returns the file and the
# tensor's offset in it if DirectFile can read the tensor there in that dtype, else None.
Stored = Callable[[str, torch.dtype], tuple[Path, int] | None]
Location = tuple[Store, dict[str, int]]  # the store of a layer, and each tensor's offset in it


class StreamedBlock(NamedTuple):
    """A block (the module of one layer) whose tensors are in a prefetch buffer.

    packed: for each linear that a CPU computes with repacked weights, that linear and the
    QuantizedLinear that receives the bytes from the store.
    """

    block: nn.Module
    packed: list[tuple[PackedLinear, QuantizedLinear]]


class StreamedLayers(nn.ModuleList):
    """Takes the place of Transformer.layers, which it is made from before loading.

    The loader asks `destination` for the memory of each tensor, fills it, and then calls `start`,
    which makes the prefetcher. Iteration yields, for each layer, the function that computes it.
    tiers: the tier of each layer. _moving: the numbers of the layers that are not on the device.
    locations: for each of these, its store and the offsets of its tensors there. wait_times: the
    seconds that computation waits for layers and for cells of the KV cache.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        policy: Policy,
        dtype: torch.dtype,
        device: torch.device,
        large: bool,
    ):
        """Allocate the memory of layers on the tier "host"; `start` allocates the buffers on the
        device. layers: blocks of the same shapes, on the meta device. dtype: of floating-point
        parameters in computation. large: what fast_layers.cpu.is_large returns for the model."""
        super().__init__(layers)
        # Computes a block, given the block and its inputs.
        self.run: Callable[..., Tensor] = eager
        self._files: dict[Path, Store] = {}
        self.wait_times = {"layers": WaitTime(), "cache": WaitTime()}
        self.policy, self.device, self._dtype, self._large = policy, device, dtype, large
        self.tiers = policy.weights.tiers(len(layers))
        self._moving = [j for j, tier in enumerate(self.tiers) if tier != "device"]
        # A copy, because the loader may fill layers[0]; in a tuple, so that it is no submodule.
        self._meta_block = (copy.deepcopy(layers[0]),)
        self.layout = block_layout(layers[0], dtype)
        # One page-aligned buffer for each layer in host memory.
        self._host_layers = {
            j: page_aligned(self.layout.nbytes, CPU, policy.pins(device))
            for j in self._moving
            if self.tiers[j] == "host"
        }
        self.locations: dict[int, Location] = {
            j: (HostMemory(memory), self.layout.offsets) for j, memory in self._host_layers.items()
        }

    def use(self, run: Callable[..., Tensor]) -> None:
        """Compute blocks by `run`, a compiled function, which is called as `eager` is. load.py
        calls this after the weights are loaded, if the model is to be compiled."""
        self.run = run

    def destination(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Return the memory into which the loader writes a tensor of the model.

        It is new memory on the device, or a view of the layer's host memory; None if the layer
        stays on disk. name: as in the state dict, such as layers.3.attention.wo.weight. Tensors
        that belong to no layer, such as the embedding, are on the device.
        """
        words = name.split(".", 2)  # of a layer: "layers", its number, the name in the layer
        j = int(words[1]) if words[0] == "layers" else None
        if j in self._host_layers:
            return self.layout.view(self.layout.split(self._host_layers[j]))[words[2]]
        on_disk = j is not None and self.tiers[j] == "disk"
        return None if on_disk else allocate_tensor(shape, dtype, self.device)

    def start(self, fill: Fill, stored: Stored) -> None:
        """Make the prefetcher. The loader calls this once, after it has filled all tensors in
        memory.

        A layer on disk is read from the checkpoint if DirectFile can read all its tensors in one
        file, in the dtypes used for computation. Other layers on disk are first written to a
        scratch file, which has no name and ends with the process.
        fill(name, tensor): writes the checkpoint's values to a tensor. stored: see Stored. Raises
        ValueError or OSError if the scratch file cannot be written.
        """
        on_disk = [j for j in self._moving if j not in self.locations]
        in_checkpoint = {j: at for j in on_disk if (at := self._checkpoint_location(j, stored))}
        self.locations |= in_checkpoint
        self._write_scratch([j for j in on_disk if j not in in_checkpoint], fill)
        # A Prefetcher takes at most as many buffers as layers.
        self.buffers = [self._buffer() for _ in self._moving[:WEIGHT_BUFFERS]]
        # Two layers are read at a time, so that the disk is never without requests between layers.
        self._reader = TransferWorker(self.device, "weights", WEIGHT_BUFFERS)
        self._repacker = TransferWorker(self.device, "repack")
        self._workers = ComputeWorkers(self.device, "micro-batches", CONCURRENT_MICRO_BATCHES)
        self._prefetcher = self._new_prefetcher()

    def set_policy(self, policy: Policy) -> None:
        """Change the policy between two runs, for example its micro-batches (benchmarks/offload.py
        compares policies in this way). The share of the weights on each tier must be the same,
        because no layer is moved."""
        self.policy = policy
        self._prefetcher = self._new_prefetcher()

    def _new_prefetcher(self) -> Prefetcher[int]:
        wait_time, overlap = self.wait_times["layers"], self.policy.overlap
        return Prefetcher(self._moving, self.buffers, self._fetch, wait_time, overlap)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        """Yield for each layer, in order, the function that computes it: `_forward` with its index
        and block. A layer that is not on the device stays in a prefetch buffer, which is used again
        once the next layer is requested."""
        for j, layer in enumerate(super().__iter__()):
            if self.tiers[j] == "device":
                yield partial(self._forward, j, layer)
            else:
                with self._prefetcher.acquire(j) as buffer:
                    try:
                        yield partial(self._forward, j, buffer.contents.block)
                    finally:  # even after an error the device may still use the buffer
                        buffer.last_use = record_event(self.device)

    def _forward(self, j: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        """Compute layer j for x, (B, T, D), in place, and return it.

        If the policy offloads activations, layer 0 puts x into OffloadedActivations, the last layer
        returns a tensor again, and the layers between get and return OffloadedActivations.
        block: the layer's module, whose tensors are on the device. inputs: rotation, mask, pos and
        cache; see zigzag.
        """
        if j == 0 and self.policy.activations.device < 100:
            x = OffloadedActivations(x, self.policy)
        workers = self._workers if self._computes_in_threads() else None
        B, T, _ = x.shape
        several_calls = self.policy.rows_per_call(T) < B  # of the block, by zigzag
        # Several calls use the same weights: dequantise them once. Compiled code is specialised to
        # the quantised linears, and the CPU's kernels need no dequantised weights.
        unpack = several_calls and self.device.type == "cuda" and self.run is eager
        weights = unpacked(block, self._dtype) if unpack else contextlib.nullcontext()
        with weights:
            zigzag(partial(self.run, block), self.policy, x, *inputs, workers)
        return x.whole() if isinstance(x, OffloadedActivations) and j == len(self) - 1 else x

    def _computes_in_threads(self) -> bool:
        """Return whether threads compute several micro-batches at the same time: the device
        computes one while the host computes the attention of another. Never for compiled blocks,
        which must run on one thread."""
        policy = self.policy
        host_attends = policy.cpu_attention and policy.cache.device < 100
        return host_attends and self.device.type != "cpu" and policy.overlap and self.run is eager

    def _checkpoint_location(self, j: int, stored: Stored) -> Location | None:
        """Return the file of the checkpoint that can be read in place of a scratch file, and the
        offsets of layer j's tensors in it.

        None: `stored` returns None for a tensor in the dtype that `layout` has, or the layer's
        tensors are in several files.
        """
        tensors = self.layout.tensors.items()
        # Each tensor's file and offset; (None, 0) where `stored` returns None.
        found = {n: stored(f"layers.{j}.{n}", t.dtype) or (None, 0) for n, t in tensors}
        paths = {path for path, _ in found.values()}
        if None in paths or len(paths) > 1:
            return None
        path = paths.pop()
        if path not in self._files:
            self._files[path] = self._file_store(DirectFile(path))
        return self._files[path], {name: offset for name, (_, offset) in found.items()}

    def _write_scratch(self, layers: Sequence[int], fill: Fill) -> None:
        """Write layers one after the other to a new scratch file, and set their `locations`.

        fill: as in `start`. Raises ValueError if the disk is too full, and OSError if the file
        cannot be made. Only one layer is in host memory at a time: all are filled in the same
        `parts`.
        """
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
        """Return the store from which layers in this file are read: the checkpoint's file or the
        scratch file. A GPU cannot read a file directly: for a GPU the bytes pass through bounce
        buffers, each as large as a layer, one for each prefetch buffer, so that as many layers are
        read at a time."""
        file.threads = layer_threads  # not the KV cache's, whose reads must not queue here
        # Large requests would delay reads of the KV cache from the same disk.
        if not self.policy.cache.disk:
            file.request_bytes = LARGE_REQUEST_BYTES
        if self.device.type == "cpu":
            return file
        nbytes, pin = self.layout.nbytes, self.policy.pins(self.device)
        host_buffers = [page_aligned(nbytes, CPU, pin) for _ in self._moving[:WEIGHT_BUFFERS]]
        return BouncedFile(file, host_buffers)

    def _buffer(self) -> Buffer:
        """Allocate a prefetch buffer: memory for one layer on the device, and a block whose tensors
        share this memory.

        On a CPU the block's linears are replaced by faster ones. Those for quantised weights
        (PackedLinear) hold a repacked copy, which `_fetch` makes again after each read. Whether
        linears for dense weights are replaced depends on the whole model (`large`), as for layers
        in memory.
        """
        parts, block = self.layout.allocate(self.device), copy.deepcopy(self._meta_block[0])
        for name, tensor in self.layout.view(parts).items():
            set_tensor(block, name, tensor)
        original = dict(block.named_modules())
        if self.device.type == "cpu":
            use_fast_linears(block, self._dtype, self._large)
        packed = [
            (module, original[name])
            for name, module in block.named_modules()
            if isinstance(module, PackedLinear)
        ]
        return Buffer(parts, StreamedBlock(block, packed), record_event(self.device))

    def _fetch(self, j: int, buffer: Buffer) -> Future:
        """Start to read layer j into a prefetch buffer; called by the prefetcher. Return a future
        that is done when the layer can be computed. The copy into a GPU's buffer waits until the
        GPU has finished with the buffer (buffer.last_use)."""
        store, offsets = self.locations[j]
        pieces = [(offsets[name], part) for name, part in buffer.parts.items()]
        read = self._reader.submit(lambda: store.read(pieces), buffer.last_use)

        def repack() -> None:
            read.result()
            for module, original in buffer.contents.packed:
                module.load_from(original)

        # Another thread repacks, so that the next read does not wait for it.
        return self._repacker.submit(repack) if buffer.contents.packed else read


def block_layout(block: nn.Module, dtype: torch.dtype) -> Layout:
    """Return the layout of a block's tensors in the dtypes used for computation: `dtype` for
    floating-point parameters, and their own for others. All layers of a model have this layout."""
    stored = {name: tensor for name, (tensor, _) in stored_tensors(block).items()}
    return Layout(
        {
            name: torch.empty(tensor.shape, dtype=final_dtype(tensor, dtype), device=META)
            for name, tensor in stored.items()
        }
    )


def eager(block: nn.Module, *inputs: Any) -> Tensor:
    """Compute a block without compiling it: the default of StreamedLayers.run."""
    return block(*inputs)


@contextlib.contextmanager
def unpacked(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace a block's quantised linears by dense ones of this dtype; put them back on exit. Used
    on a GPU where several calls need the same weights, which are then dequantised once. Needs
    device memory for the dense weights of a whole block."""
    quantized = {n: m for n, m in block.named_modules() if isinstance(m, QuantizedLinear)}
    try:
        for name, linear in quantized.items():
            with META:
                dense = Linear(linear.in_features, linear.out_features, bias=False)
            dense.weight = nn.Parameter(linear.dequantize_by_kernel(dtype), requires_grad=False)
            dense.bias = linear.bias
            block.set_submodule(name, dense)
        yield
    finally:
        for name, linear in quantized.items():
            block.set_submodule(name, linear)


def zigzag(
    block: Callable[..., Tensor],
    policy: Policy,
    x: Tensor,
    rotation: Rotation,
    mask: Tensor,
    pos: Tensor,
    cache: Cache,
    workers: ComputeWorkers | None = None,
) -> None:
    """Compute a block for all rows of x, (B, T, D), in place, one micro-batch after the other.

    Called once for each layer and pass. A call of the block gets policy.rows_per_call rows.
    block: called with x, rotation, mask, pos and cache of some rows; returns the new x of these.
    x: a tensor, or OffloadedActivations. rotation: two tensors, or None without rotary positions.
    mask: see Transformer.mask. pos: (B, T), the slots in which the rows write. rotation, mask and
    pos have B rows. cache: of this layer, for all rows.
    workers: threads that compute several micro-batches at the same time; None: one at a time.
    """
    (B, T, _), g = x.shape, policy.micro_batch
    rows_per_call = policy.rows_per_call(T)

    def compute(cell: KVCache | HostAttention, first: int, end: int) -> None:
        """Compute rows first to end - 1, a micro-batch, whose part of the cache is `cell`."""
        for start in range(first, end, rows_per_call):
            rows = slice(start, min(start + rows_per_call, end))
            row_rotation = rotation and tuple(t[rows] for t in rotation)  # None stays None
            cell_rows = cell.part(slice(start - first, rows.stop - first))
            x[rows] = block(x[rows], row_rotation, mask[rows], pos[rows], cell_rows)

    micro_batches = [(first, min(first + g, B)) for first in range(0, B, g)]
    if workers and len(micro_batches) > 1:
        return compute_in_threads(workers, compute, micro_batches, cache, pos)
    for first, end in micro_batches:
        with cache.opened(slice(first, end), pos) as cell:
            compute(cell, first, end)


def compute_in_threads(
    workers: ComputeWorkers,
    compute: Callable[[KVCache | HostAttention, int, int], None],
    micro_batches: Sequence[tuple[int, int]],
    cache: Cache,
    pos: Tensor,
) -> None:
    """Compute micro-batches in threads, at most CONCURRENT_MICRO_BATCHES at a time, so that the
    device computes one while the host computes the attention of another.

    compute: called with a micro-batch's cell of the KV cache, its first row, and one past its last.
    micro_batches: first row and one past the last of each. cache: of one layer, for all rows.
    pos: (B, T), the slots in which each row writes. The calling thread opens and closes the cells,
    because one thread at a time may use their Prefetcher, and opens them in the order in which they
    are prefetched. When this function returns or raises, no micro-batch is running.
    """
    running: deque[tuple[contextlib.ExitStack, Future]] = deque()

    def finish_oldest() -> None:
        """Wait for the oldest running micro-batch, then close its cell."""
        cell_context, computed = running.popleft()
        with cell_context:  # closes the cell on exit
            computed.result()

    try:
        for span in micro_batches:
            if len(running) == CONCURRENT_MICRO_BATCHES:
                finish_oldest()
            cell_context = contextlib.ExitStack()
            cell = cell_context.enter_context(cache.opened(slice(*span), pos))
            running.append((cell_context, workers.submit(partial(compute, cell, *span))))
        while running:
            finish_oldest()
    finally:
        while running:  # an exception was raised: wait for the others
            with contextlib.suppress(Exception):
                finish_oldest()


class OffloadedActivations:
    """Activations, (B, T, D), that are stored between two layers, each micro-batch on its tier.

    Slices of rows are read and assigned as with a tensor. A slice must lie within one micro-batch.
    A row begins at a multiple of BLOCK_BYTES, because files are read with O_DIRECT.
    _g: rows of a micro-batch. _like: an empty tensor with the dtype and device of x. For each
    micro-batch: _stores, its store; _row_memory, the buffer (uint8, as long as a micro-batch)
    through which its rows are read and written; micro-batches share one or two buffers.
    """

    def __init__(self, x: Tensor, policy: Policy):
        """Allocate a store for each micro-batch of x, (B, T, D), on the tier that the policy gives
        it, and store x. Called anew for each pass through the layers. Raises ValueError if the disk
        is too full, and OSError if no scratch file can be made."""
        self.shape, self._like, self._g = x.shape, x[:0], policy.micro_batch
        self._row_bytes = round_up_to_block(x[0].nbytes)
        nbytes, pin = self._g * self._row_bytes, policy.pins(x.device)
        make: dict[str, Callable[[], Store]] = {
            "device": lambda: HostMemory(page_aligned(nbytes, x.device)),
            "host": lambda: HostMemory(page_aligned(nbytes, CPU, pin)),
            "disk": lambda: ScratchFile(policy.directory, nbytes),
        }
        tiers = policy.activations.tiers(-(-len(x) // self._g))  # one for each micro-batch
        self._stores = [make[tier]() for tier in tiers]
        host = page_aligned(nbytes, CPU, pin)
        # Activations that stay on a GPU are not copied through host memory.
        device = page_aligned(nbytes, x.device) if x.device.type != "cpu" else host
        self._row_memory = [device if tier == "device" else host for tier in tiers]
        self._lock = threading.Lock()  # one thread at a time uses the buffers
        for start in range(0, len(x), self._g):
            self[start : start + self._g] = x[start : start + self._g]

    def __getitem__(self, rows: slice) -> Tensor:
        """Return a copy, (rows, T, D), on the device. The rows must belong to one micro-batch."""
        with self._lock:
            pieces, values = self._pieces(rows)
            self._stores[rows.start // self._g].read(pieces)
            # Always a copy: the next read overwrites the buffer.
            return values.to(self._like.device, copy=True)

    def __setitem__(self, rows: slice, x: Tensor) -> None:
        """Store x, (rows, T, D). The rows must belong to one micro-batch."""
        with self._lock:
            pieces, values = self._pieces(rows)
            values.copy_(x)
            self._stores[rows.start // self._g].write(pieces)

    def whole(self) -> Tensor:
        """Return all rows, (B, T, D), on the device."""
        B = self.shape[0]
        return torch.cat([self[n : min(n + self._g, B)] for n in range(0, B, self._g)])

    def _pieces(self, rows: slice) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Return what Store.read and Store.write take for these rows, and the rows' values.

        First: one pair of the offset in the micro-batch's store and a piece of the buffer.
        Second: a view, (rows, T, D), of this piece. The rows must belong to one micro-batch.
        The caller must hold the lock until it has used the buffer. rows.stop may exceed B.
        """
        count, first = min(rows.stop, self.shape[0]) - rows.start, rows.start % self._g
        memory = self._row_memory[rows.start // self._g][: count * self._row_bytes]
        values = memory.view(self._like.dtype).view(count, -1)  # (rows, T * D and padding)
        width = self.shape[1] * self.shape[2]
        return [(first * self._row_bytes, memory)], values[:, :width].unflatten(1, self.shape[1:])

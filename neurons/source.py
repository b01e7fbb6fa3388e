"""The neurons of all layers on disk: single records into cache entries, or whole layers in chunks.

Start at NeuronSource.fetch and NeuronSource.stream_layer. An entry is memory for one record, which
holds the weights of one neuron. On a CPU, records are read straight into their entries. No file can
be read into a GPU's memory, so records pass through pinned host memory (page-locked, so that the
GPU copies from it by itself). A request reads neighbouring records; a gap is the unneeded records
between two needed ones that one request still reads; the depth is the number of requests that the
disk has at a time. A layer that needs most of its neurons is read whole, in chunks of records in
file order.

Shapes: C entries of a layer's cache, n records.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from host.memory import page_aligned, round_up_to_block, size_text
from neurons.budget import CachePlan
from neurons.products import scatter_records
from neurons.records import NeuronFile
from neurons.uring import Callback, no_op
from tiers.prefetch import (
    CPU,
    BouncedFile,
    Buffer,
    Event,
    Prefetcher,
    TransferWorker,
    WaitTime,
    record_event,
    to_device,
)

CHUNK_BYTES = 8 * 2**20  # a layer that is read whole is read in chunks of this size
CHUNK_BUFFERS = 2  # one chunk is computed with while the next is read


@dataclass
class FlashStats:
    """Counts and host seconds, summed over all tokens and the layers of a model. The layers add to
    them (feed_forward.py).

    A layer counts once for each pass of the model. Where torch counts active neurons, their number
    is a tensor: on a GPU the host need not wait for it.
    """

    sparse_layers: int = 0  # layers computed from cache entries
    whole_layers: int = 0  # layers read whole during decoding: too many neurons were missing
    predicted: int = 0  # predicted neurons, in sparse_layers
    missed: int = 0  # predicted neurons that were not in memory, in sparse_layers
    reads: int = 0  # calls that read records
    active: int | Tensor = 0  # neurons with an activation other than zero, in sparse_layers
    prompt_active: int | Tensor = 0  # active neurons of the last tokens, in all layers read whole
    prompt_predicted: int | Tensor = 0  # how many of prompt_active were predicted
    read_seconds: float = 0.0  # from a call's first request to its last completion
    manage_seconds: float = 0.0  # looking up and emptying entries of the neuron cache
    compute_seconds: float = 0.0  # feed-forward products of sparse_layers, without predictors
    overlapped_seconds: float = 0.0  # the part of compute_seconds that lies within read_seconds

    def timed(self, field: str) -> "StatsTimer":
        """Return a context that adds its seconds to the field of this name."""
        return StatsTimer(self, field)


class StatsTimer:
    """A context that adds its seconds to a field of FlashStats.

    contextlib.contextmanager takes four times as long, and one token uses about 40 timers.
    """

    def __init__(self, stats: FlashStats, field: str):
        self.stats, self.field = stats, field

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        setattr(self.stats, self.field, getattr(self.stats, self.field) + seconds)


class NeuronSource:
    """The neuron file of a model and the buffers through which its records pass.

    All layers share it. layer_bytes: bytes from one layer to the next in the file. chunks: for each
    chunk of a layer, the id of its first neuron, and one past its last.
    """

    def __init__(
        self,
        file: NeuronFile,
        layers: int,
        neurons: int,
        device: torch.device,
        plan: CachePlan,
    ):
        """file: opened with the depth of the plan. layers: their number in the model. neurons:
        their number in a layer. device: of the model's weights. plan: see CachePlan."""
        self.file, self.device, self.plan, self.stats = file, device, plan, FlashStats()
        self.layers, self.neurons = layers, neurons
        self.layer_bytes = round_up_to_block(neurons * file.stride)
        chunk = chunk_records(neurons, file.stride)
        self.chunks = [(n, min(n + chunk, neurons)) for n in range(0, neurons, chunk)]
        self._pinned: Tensor | None = None  # host memory for single records; None on a CPU
        self._pinned_copied: Event = None  # when the GPU has copied the contents of _pinned
        self._chunk_store = (
            file if device.type == "cpu" else self._pinned_store(chunk * file.stride)
        )
        self._worker = TransferWorker(device, "stream", CHUNK_BUFFERS)
        self._prefetcher = self._chunk_prefetcher(chunk * file.stride)

    def _pinned_store(self, nbytes: int) -> BouncedFile:
        """Return a reader of chunks that fills a GPU's memory by way of pinned host memory.

        Allocates a host buffer of nbytes for each of the CHUNK_BUFFERS chunks that are read at a
        time, and `_pinned` of the same size for single records. nbytes: of a whole chunk.
        """
        pinned = self.device.type == "cuda"
        buffers = [page_aligned(nbytes, CPU, pinned) for _ in range(CHUNK_BUFFERS + 1)]
        self._pinned = buffers.pop()
        return BouncedFile(self.file, buffers)

    def _chunk_prefetcher(self, nbytes: int) -> Prefetcher:
        """Return a Prefetcher of the chunks of all layers, in file order, for stream_layer.

        Its items are (layer, first neuron, one past the last). nbytes: of the longest chunk, the
        size of each buffer on the device. At the end of a layer the first chunks of the next layer
        are prefetched.
        """
        order = [(layer, *chunk) for layer in range(self.layers) for chunk in self.chunks]
        parts = [{"records": page_aligned(nbytes, self.device)} for _ in range(CHUNK_BUFFERS)]
        buffers = [Buffer(part, None, record_event(self.device)) for part in parts]
        return Prefetcher(order, buffers, self._fetch_chunk, WaitTime())

    def _fetch_chunk(self, item: tuple[int, int, int], buffer: Buffer) -> Future:
        """Start to read a chunk into a prefetch buffer. Returns a future that is done when the
        chunk is there.

        item: (layer, first neuron, one past the last). Called by the prefetcher. The CUDA stream of
        the worker first waits until the buffer's last use has ended.
        """
        layer, start, end = item
        stride = self.file.stride
        memory = buffer.parts["records"][: (end - start) * stride]
        offset = layer * self.layer_bytes + start * stride
        return self._worker.submit(
            lambda: self._chunk_store.read([(offset, memory)]), buffer.last_use
        )

    def stream_layer(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each chunk of a layer: the id of its first neuron, and its records, (n, stride)
        bytes.

        For a layer that is read whole. A chunk's memory may be overwritten once the caller asks for
        the next chunk; on a GPU, when the work that was queued before has ended.
        """
        stride = self.file.stride
        for start, end in self.chunks:
            with self._prefetcher.acquire((layer, start, end)) as buffer:
                try:
                    memory = buffer.parts["records"][: (end - start) * stride]
                    yield start, memory.view(-1, stride)
                finally:
                    buffer.last_use = record_event(self.device)

    def fetch(
        self,
        layer: int,
        ids: np.ndarray,
        entries: np.ndarray,
        cache: Tensor,
        overlap: Callback = no_op,
    ) -> None:
        """Read single neurons of a layer into entries of its cache; wait until they are read.

        ids: (n,) ascending; entries: (n,), the entry for each id; cache: (C, stride) bytes.
        overlap: called once. On a CPU it is called while the disk reads. On a GPU it is called
        before the reads: it only starts kernels, which run while the host reads. The caller has
        emptied the entries (NeuronCache.admit), so that no kernel takes a half-read record for a
        neuron.
        """
        stride, gap, layer_offset = self.file.stride, self.plan.gap, layer * self.layer_bytes
        if self._pinned is None:
            addresses = cache.data_ptr() + entries * stride
            return self.file.read_records(layer_offset, ids, addresses, gap, overlap)
        overlap()
        count = len(self._pinned) // stride
        for n in range(0, len(ids), count):
            part = slice(n, n + count)
            self._fetch_through_pinned(layer_offset, ids[part], entries[part], cache)

    def _fetch_through_pinned(
        self, layer_offset: int, ids: np.ndarray, entries: np.ndarray, cache: Tensor
    ) -> None:
        """Read neurons of one layer into pinned memory; let the GPU copy them to their entries. The
        copies are queued on the current stream, so that later kernels find the records.

        layer_offset: byte offset of the layer in the file. ids: ascending, no more than `_pinned`
        has room for. entries: the entry for each id. cache: (C, stride) bytes on the GPU.
        """
        stride = self.file.stride
        addresses = self._pinned.data_ptr() + np.arange(len(ids)) * stride
        if self._pinned_copied:  # the last call's copy still reads _pinned
            self._pinned_copied.synchronize()
        self.file.read_records(layer_offset, ids, addresses, self.plan.gap)
        records = self._pinned[: len(ids) * stride].view(len(ids), stride)
        scatter_records(cache, to_device(torch.from_numpy(entries), self.device), records)
        self._pinned_copied = record_event(self.device)

    def reset_stats(self) -> None:
        """Set all counts to zero. Called after warm-up runs, which must not count."""
        vars(self.stats).update(vars(FlashStats()))
        self.file.nbytes = self.file.requests = 0

    def lines(self) -> Iterator[str]:
        """Yield lines for the user with the measured means for a token. flash_report puts the
        plan's lines before them.

        The tokens that a batch adds in one step count as one here. Layers of long prompts are not
        counted. At least one sparse or whole layer must have been counted.
        """
        stats, file = self.stats, self.file
        # A step runs each layer once.
        tokens = (stats.sparse_layers + stats.whole_layers) / self.layers
        nbytes = file.nbytes + stats.whole_layers * self.layer_bytes
        yield (
            f"  measured    {size_text(nbytes / tokens)} in {file.requests / tokens:.0f} requests "
            f"and {stats.whole_layers / tokens:.1f} whole layers for a token: "
            f"{1000 * stats.read_seconds / tokens:.1f} ms of reading, "
            f"{1000 * stats.compute_seconds / tokens:.1f} ms of feed-forward products, "
            f"{1000 * stats.overlapped_seconds / tokens:.1f} of them while reading, "
            f"{1000 * stats.manage_seconds / tokens:.1f} ms of managing the cache"
        )
        if stats.sparse_layers:
            yield self._prediction_line()
        if not file.direct:
            yield "  the page cache was used: this disk refuses O_DIRECT"
        if stats.prompt_active:
            recall = int(stats.prompt_predicted) / int(stats.prompt_active)
            yield f"  recall      {recall:.1%} of the active neurons of layers read whole"

    def _prediction_line(self) -> str:
        """Return the line for the user about predicted neurons: their share of a layer, how many of
        them were in memory, and how many were predicted for one active neuron.

        The means are over the sparse layers, at least one of which must have been counted.
        """
        # At least 1, here and below: no division by zero without any predicted or active neuron.
        stats, predicted = self.stats, max(self.stats.predicted, 1)
        share, hits = predicted / stats.sparse_layers / self.neurons, 1 - stats.missed / predicted
        return (
            f"  neurons     {share:.1%} of a layer predicted, {hits:.1%} of them in memory; "
            f"{predicted / max(int(stats.active), 1):.2f} predicted for one active"
        )


def chunk_records(neurons: int, stride: int) -> int:
    """Return how many records a chunk has: CHUNK_BYTES, at most a sixteenth of the layer, so that
    reading and computing overlap in small layers, too; at least one."""
    return max(1, min(neurons // 16, CHUNK_BYTES // stride))

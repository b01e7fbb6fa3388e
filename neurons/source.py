"""The neurons of all layers on disk: single records into cache entries, or whole layers in chunks.

Start at NeuronSource.fetch and NeuronSource.stream_layer. A CPU reads records straight into their
entries. No file can be read into a GPU's memory, so records pass through pinned host memory.

Shapes: C entries, n records.
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
    BounceBuffer,
    Buffer,
    Event,
    Ring,
    TransferWorker,
    WaitTime,
    record_event,
    to_device,
)

CHUNK_BYTES = 8 * 2**20  # of a whole layer's records
CHUNK_BUFFERS = 2  # chunks that are computed or being read


@dataclass
class FlashStats:
    """Counts and host seconds of a model's sparse layers.

    On a GPU, counts of active neurons are tensors, so that the host need not wait for them.
    """

    sparse_layers: int = 0  # layers computed from predicted neurons
    whole_layers: int = 0  # layers of decoding read whole, because too many neurons were missing
    predicted: int = 0  # neurons of sparse layers
    missed: int = 0  # predicted neurons that were not in memory
    reads: int = 0  # calls that read records
    active: int | Tensor = 0  # computed neurons whose activation was not zero
    prompt_active: int | Tensor = 0  # the same at the end of prompts, among all neurons
    prompt_predicted: int | Tensor = 0  # of those, predicted ones
    read_seconds: float = 0.0  # from a call's first request to its last completion
    manage_seconds: float = 0.0  # of the neuron cache
    compute_seconds: float = 0.0  # of feed-forward layers without their predictors
    overlapped_seconds: float = 0.0  # of compute_seconds, those within read_seconds

    def timed(self, field: str) -> "StatsTimer":
        return StatsTimer(self, field)


class StatsTimer:
    """A context that adds its seconds to a field of FlashStats.

    contextlib.contextmanager takes four times as long, and a token enters forty of these.
    """

    def __init__(self, stats: FlashStats, field: str):
        self.stats, self.field = stats, field

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        setattr(self.stats, self.field, getattr(self.stats, self.field) + seconds)


class NeuronSource:
    """The neuron file of a model and the buffers through which its records pass."""

    def __init__(
        self,
        file: NeuronFile,
        layers: int,
        neurons: int,
        device: torch.device,
        plan: CachePlan,
    ):
        """neurons: of a layer."""
        self.file, self.device, self.plan, self.stats = file, device, plan, FlashStats()
        self.layers, self.neurons = layers, neurons
        self.layer_bytes = round_up_to_block(neurons * file.stride)
        chunk = chunk_records(neurons, file.stride)
        self.chunks = [(n, min(n + chunk, neurons)) for n in range(0, neurons, chunk)]
        self._bounce: Tensor | None = None  # pinned memory for single records
        self._bounce_copied: Event = None  # when the GPU has copied what is in it
        self._stream = file if device.type == "cpu" else self._bounce_buffer(chunk * file.stride)
        self._worker = TransferWorker(device, "stream", CHUNK_BUFFERS)
        self._ring = self._chunk_ring(chunk * file.stride)

    def _bounce_buffer(self, nbytes: int) -> BounceBuffer:
        """Allocate pinned memory: for each chunk in flight, and for single records."""
        pinned = self.device.type == "cuda"
        buffers = [page_aligned(nbytes, CPU, pinned) for _ in range(CHUNK_BUFFERS + 1)]
        self._bounce = buffers.pop()
        return BounceBuffer(self.file, buffers)

    def _chunk_ring(self, nbytes: int) -> Ring:
        """Prefetch the chunks of all layers, in file order, into buffers on the device."""
        order = [(layer, *chunk) for layer in range(self.layers) for chunk in self.chunks]
        parts = [{"": page_aligned(nbytes, self.device)} for _ in range(CHUNK_BUFFERS)]
        buffers = [Buffer(part, None, record_event(self.device)) for part in parts]
        return Ring(order, buffers, self._fetch_chunk, WaitTime())

    def _fetch_chunk(self, item: tuple[int, int, int], buffer: Buffer) -> Future:
        layer, start, end = item
        stride = self.file.stride
        memory = buffer.parts[""][: (end - start) * stride]
        offset = layer * self.layer_bytes + start * stride
        return self._worker.submit(lambda: self._stream.read([(offset, memory)]), buffer.last_use)

    def stream_layer(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """Yield all records of a layer by chunks: the first neuron, and records (n, stride)."""
        stride = self.file.stride
        for start, end in self.chunks:
            with self._ring.acquire((layer, start, end)) as buffer:
                try:
                    yield start, buffer.parts[""][: (end - start) * stride].view(-1, stride)
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
        """Read neurons of ascending ids into entries of a cache, (C, stride) bytes.

        overlap: called once while reads are in flight.
        """
        stride, gap, first = self.file.stride, self.plan.gap, layer * self.layer_bytes
        if self._bounce is None:
            addresses = cache.data_ptr() + entries * stride
            return self.file.read_records(first, ids, addresses, gap, overlap)
        overlap()  # starts kernels, which run while the host reads
        count = len(self._bounce) // stride
        for n in range(0, len(ids), count):
            self._fetch_by_bounce(first, ids[n : n + count], entries[n : n + count], cache)

    def _fetch_by_bounce(
        self, first: int, ids: np.ndarray, entries: np.ndarray, cache: Tensor
    ) -> None:
        """Read neurons into pinned memory and have the GPU copy them to their entries."""
        stride = self.file.stride
        addresses = self._bounce.data_ptr() + np.arange(len(ids)) * stride
        if self._bounce_copied:
            self._bounce_copied.synchronize()
        self.file.read_records(first, ids, addresses, self.plan.gap)
        records = self._bounce[: len(ids) * stride].view(len(ids), stride)
        scatter_records(cache, to_device(torch.from_numpy(entries), self.device), records)
        self._bounce_copied = record_event(self.device)

    def reset_stats(self) -> None:
        """Set all counts to zero: warm-up runs of compiled code are no tokens."""
        vars(self.stats).update(vars(FlashStats()))
        self.file.nbytes = self.file.requests = 0

    def lines(self) -> Iterator[str]:
        """Describe the mean token for the user."""
        stats, file = self.stats, self.file
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
        stats, predicted = self.stats, max(self.stats.predicted, 1)
        share, hits = predicted / stats.sparse_layers / self.neurons, 1 - stats.missed / predicted
        return (
            f"  neurons     {share:.1%} of a layer predicted, {hits:.1%} of them in memory; "
            f"{predicted / max(int(stats.active), 1):.2f} predicted for one active"
        )


def chunk_records(neurons: int, stride: int) -> int:
    """Return the records of a chunk: CHUNK_BYTES, or a sixteenth of a small layer."""
    return max(1, min(neurons // 16, CHUNK_BYTES // stride))

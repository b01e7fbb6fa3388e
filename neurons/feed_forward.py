"""Feed-forward layers whose neurons stay on disk until they are needed.

Start at SparseFeedForward.forward. Behind a ReLU most neurons of a token give nothing. A small
predictor says which may give something, those that are not in memory are read, and the product,
begun while they come, is of all neurons that are there: one that is there without having been
predicted is computed too, so that only those can be missed that are on disk. Many tokens at once,
as in a prompt, go through all neurons instead, which stream by in the file's order, and leave
behind what the last tokens used.

Based on "LLM in a flash" (arXiv 2312.11514, section 3): predictor, window, bundles.

Shapes: B rows, T tokens of a row, N = B*T, D dim, F neurons, r rank, C slots, n records.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import stored_tensors
from host.memory import page_aligned, size_text, whole_blocks
from model import Linear, ModelArgs, Transformer
from neurons.budget import DEPTHS, Residence, choose, measured
from neurons.pack import Pack
from neurons.products import Products, has_kernel, put, taken
from neurons.records import Format, NeuronCache, NeuronFile
from neurons.uring import Work, nothing
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

MANY = 64  # tokens; more of them at once are a prompt
RECENT = 16  # tokens of each row whose neurons a prompt leaves behind
Fill = Callable[[str, Tensor], Any]  # gives a tensor of that name its value
CHUNK = 8 * 2**20  # bytes of records that stream by at a time
AHEAD = 2  # chunks

# Compiled code calls a layer by this: what it reads depends on what it is given. The number says
# which one, and is a tensor, so that one compiled block serves all of them.
NUMBERED: weakref.WeakValueDictionary[int, "SparseFeedForward"] = weakref.WeakValueDictionary()
torch.library.define(
    "gpt_flex::sparse_feed_forward", "(Tensor x, Tensor likely, Tensor number) -> Tensor"
)


@torch.library.register_fake("gpt_flex::sparse_feed_forward")
def sums_like(x: Tensor, likely: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.impl("gpt_flex::sparse_feed_forward", "CompositeExplicitAutograd")
def called(x: Tensor, likely: Tensor, number: Tensor) -> Tensor:
    return NUMBERED[int(number)].run(x, likely)


@dataclass(frozen=True)
class Flash:
    """That a model's neurons are left on disk, and how.

    memory: of all its weights; up to 1 a share of them, else bytes. window: tokens whose neurons
    stay in memory, None: as many as pay; depth: reads under way at a time, None: as many as pay.
    directory: of the pack, None: beside the checkpoint.
    """

    memory: float = 0.5
    window: float | None = None
    depth: int | None = None
    directory: Path | None = None


@dataclass
class Tally:
    """What a model's sparse layers have done. Seconds are the host's. A GPU counts neurons by
    itself, in tensors, so that the host need not wait for it."""

    calls: int = 0  # of layers, by way of predictions
    whole: int = 0  # of layers, by all neurons, as too many were missing
    predicted: int = 0  # neurons
    missed: int = 0  # of these: not in memory
    fetches: int = 0  # calls that brought some
    active: int | Tensor = 0  # neurons that gave something
    seen_active: int | Tensor = 0  # at the end of prompts, where all neurons are looked at
    seen_predicted: int | Tensor = 0  # of those
    reading: float = 0.0  # seconds from the first request to the last answer
    managing: float = 0.0
    computing: float = 0.0  # of feed-forward layers, predictions apart
    meanwhile: float = 0.0  # of that, beside reading

    def timed(self, what: str) -> "Timed":
        return Timed(self, what)


class Timed:
    """Adds the seconds in which it is entered to one of a tally's. (A generator with contextlib's
    decorator takes four times as long, and a token enters forty of them.)"""

    def __init__(self, tally: Tally, what: str):
        self.tally, self.what = tally, what

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        setattr(self.tally, self.what, getattr(self.tally, self.what) + seconds)


class Predictor(nn.Module):
    """(N, D) -> (N, F): which neurons may be active; two factors, the threshold in the bias."""

    def __init__(self, dim: int, rank: int, neurons: int):
        super().__init__()
        self.down = Linear(dim, rank, bias=False)
        self.up = Linear(rank, neurons, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) > 0


class Source:
    """The neurons of all layers, on disk."""

    def __init__(
        self,
        file: NeuronFile,
        layers: int,
        neurons: int,
        device: torch.device,
        residence: Residence,
    ):
        self.file, self.device, self.residence, self.tally = file, device, residence, Tally()
        self.neurons, stride = neurons, file.stride
        self.region = whole_blocks(neurons * stride)  # bytes of a layer
        pinned = device.type == "cuda"
        chunk = chunk_size(neurons, stride)
        self.chunks = [(n, min(n + chunk, neurons)) for n in range(0, neurons, chunk)]
        self._order = [(j, *chunk) for j in range(layers) for chunk in self.chunks]
        size = chunk * stride
        parts = [{"": page_aligned(size, device)} for _ in range(AHEAD)]
        slots = [Buffer(part, None, record_event(device)) for part in parts]
        staged = AHEAD + 1 if device.type != "cpu" else 0  # files are not read into a GPU's memory
        stages = [page_aligned(size, CPU, pinned) for _ in range(staged)]
        self._stage = stages.pop() if stages else None
        self._staged: Event = None  # when what is on the stage has been copied
        self._stream = BounceBuffer(file, stages) if stages else file
        self._transfer_worker = TransferWorker(device, "stream", AHEAD)
        self._ring = Ring(self._order, slots, self._fetch, WaitTime())

    def _fetch(self, item: tuple[int, int, int], slot: Buffer) -> Future:
        j, start, end = item
        stride = self.file.stride
        piece = slot.parts[""][: (end - start) * stride]
        at = j * self.region + start * stride
        return self._transfer_worker.submit(lambda: self._stream.read([(at, piece)]), slot.last_use)

    def lines(self) -> Iterator[str]:
        """What a token took, in the mean."""
        tally, file, layers = self.tally, self.file, len(self._order) // len(self.chunks)
        tokens, whole = (tally.calls + tally.whole) / layers, tally.whole * self.region
        yield (
            f"  came        {size_text((file.nbytes + whole) / tokens)} in "
            f"{file.requests / tokens:.0f} requests and {tally.whole / tokens:.1f} whole layers "
            f"for a token: {1000 * tally.reading / tokens:.1f} ms of reading, "
            f"{1000 * tally.computing / tokens:.1f} ms of feed-forward products, "
            f"{1000 * tally.meanwhile / tokens:.1f} of them meanwhile, "
            f"{1000 * tally.managing / tokens:.1f} ms of managing memory"
        )
        if tally.calls:
            predicted = max(tally.predicted, 1)
            share, hits = predicted / tally.calls / self.neurons, 1 - tally.missed / predicted
            yield (
                f"  neurons     {share:.1%} of a layer predicted, {hits:.1%} of them in memory; "
                f"{predicted / max(int(tally.active), 1):.2f} predicted for one active"
            )
        if not file.direct:
            yield "  through the page cache: this disk refuses to be read past it"
        if tally.seen_active:
            found = int(tally.seen_predicted) / int(tally.seen_active)
            yield f"  recall      {found:.1%} of the neurons that were active in layers read whole"

    def count_anew(self) -> None:
        """What came so far, as shapes were met, is no token's."""
        vars(self.tally).update(vars(Tally()))
        self.file.nbytes = self.file.requests = 0

    def streamed(self, j: int) -> Iterator[tuple[int, Tensor]]:
        """All neurons of a layer: the first of each chunk, and its records, (n, stride)."""
        for start, end in self.chunks:
            with self._ring.acquire((j, start, end)) as slot:
                stride = self.file.stride
                try:
                    yield start, slot.parts[""][: (end - start) * stride].view(-1, stride)
                finally:
                    slot.last_use = record_event(self.device)

    def fetch(
        self, j: int, ids: np.ndarray, slots: np.ndarray, slab: Tensor, meanwhile: Work = nothing
    ) -> None:
        """Bring neurons, ascending, of layer j into slots of (C, stride) bytes."""
        stride, gap, first = self.file.stride, self.residence.gap, j * self.region
        if self._stage is None:
            return self.file.bring(first, ids, slab.data_ptr() + slots * stride, gap, meanwhile)
        meanwhile()  # which a GPU has yet to do when this returns
        room = len(self._stage) // stride
        places = self._stage.data_ptr() + np.arange(room) * stride
        for n in range(0, len(ids), room):
            part = ids[n : n + room]
            if self._staged:
                self._staged.synchronize()
            self.file.bring(first, part, places[: len(part)], gap)
            staged = self._stage[: len(part) * stride].view(len(part), stride)
            put(slab, to_device(torch.from_numpy(slots[n : n + room]), self.device), staged)
            self._staged = record_event(self.device)


def chunk_size(neurons: int, stride: int) -> int:
    """Neurons that stream by at a time: in a small model, too, a small part of a layer."""
    return max(1, min(neurons // 16, CHUNK // stride))


class SparseFeedForward(nn.Module):
    """In place of a PlainFeedForward or GatedFeedForward whose activation is ReLU.

    Its parameters are what stays in memory: the predictor, and of each neuron, in the file's order,
    what is no weight. `start` gives it its neurons.
    """

    def __init__(self, args: ModelArgs, format: Format, rank: int):
        super().__init__()
        neurons, inner = args.hidden_dim, len(format.matrices) - 1
        self.format = format
        self.predictor: Callable[[Tensor], Tensor] = Predictor(args.dim, rank, neurons)
        # One more neuron stands for empty slots: it is never active.
        self.inner_bias = nn.Parameter(torch.empty(neurons + 1, inner))
        self.outer_bias = nn.Parameter(torch.empty(args.dim))
        scaled = format.kind == "int8"
        inner_scales = torch.empty(neurons + 1, inner, dtype=torch.float32) if scaled else None
        outer_scales = torch.empty(args.dim, dtype=torch.float32) if scaled else None
        self.register_buffer("inner_scales", inner_scales)
        self.register_buffer("outer_scales", outer_scales)

    def start(self, layer: int, source: Source, slots: int) -> None:
        self.layer, self.source, self.tally = layer, source, source.tally
        NUMBERED[id(self)] = self
        self.register_buffer("number", torch.tensor(id(self), device=CPU), persistent=False)
        neurons = len(self.inner_bias) - 1
        self.cache = NeuronCache(neurons, slots, self.format.stride, source.device)
        kernel = has_kernel(self.format, source.device, self.inner_bias.dtype)
        self.products = Products(self.format, self.inner_bias, self.inner_scales, kernel)

    def forward(self, x: Tensor) -> Tensor:
        last = max(RECENT, MANY // len(x))  # tokens of each row: all, or what a prompt leaves
        likely = self.predictor(x[:, -last:].flatten(0, 1))  # (n, F)
        if torch.compiler.is_compiling():
            y = torch.ops.gpt_flex.sparse_feed_forward(x, likely, self.number)
        else:
            y = self.run(x, likely)
        if self.outer_scales is not None:
            y = y * self.outer_scales
        return (y + self.outer_bias).to(x.dtype)

    def run(self, x: Tensor, likely: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) float32, before the outputs' scales and biases. likely: (n, F),
        which neurons may be active."""
        rows = x.flatten(0, 1)  # (N, D)
        if len(rows) > MANY:
            return self._whole(x, likely)
        wanted = np.flatnonzero(likely.any(0).cpu().numpy())
        if self.source.residence.prefers_whole(self.cache.missing(wanted), len(self.cache)):
            self.tally.whole += 1
            return self._whole(x, likely)
        return self._sparse(rows, wanted).view_as(x)

    def _sparse(self, rows: Tensor, wanted: np.ndarray) -> Tensor:
        """(N, D) -> (N, D) float32, by the neurons that are wanted and those that are there."""
        tally, cache = self.tally, self.cache
        tally.calls += 1
        tally.predicted += len(wanted)
        y = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        # What has to be unpacked first is no more than what is wanted.
        here = None if self.products.by_slots else cache.slots(wanted)
        new, rest = self._bring(wanted, lambda: self._add(y, rows, here))
        self._add(y, rows, new)
        while len(rest):  # more than there are slots for
            new, rest = self._bring(rest, nothing)
            self._add(y, rows, new)
        return y

    def _bring(self, wanted: np.ndarray, meanwhile: Work) -> tuple[np.ndarray, np.ndarray]:
        """Read what is wanted and not there, and do something beside; returns the slots of what
        came, and what there was no slot for."""
        tally = self.tally
        with tally.timed("managing"):
            ids, slots, rest = self.cache.admit(wanted)
        if not len(ids):
            meanwhile()
            return slots, rest
        tally.missed += len(ids)
        tally.fetches += 1
        before = tally.computing
        with tally.timed("reading"):
            self.source.fetch(self.layer, ids, slots, self.cache.slab, meanwhile)
        tally.meanwhile += tally.computing - before
        with tally.timed("managing"):
            self.cache.hold(ids, slots)
        return slots, rest

    def _add(self, y: Tensor, rows: Tensor, some: np.ndarray | None) -> None:
        """Add to y, (N, D) float32, what neurons in slots, some or all, give to the rows."""
        if some is not None and not len(some):
            return
        with self.tally.timed("computing"):
            sums, active = self.products.sums(rows, self.cache.slab, self.cache.neurons, some)
            y += sums
        self.tally.active = self.tally.active + active

    def _index(self, ids: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(ids), self.source.device)

    def _whole(self, x: Tensor, likely: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) float32, by all neurons; those of the last tokens stay."""
        tally, cache, rows = self.tally, self.cache, x.flatten(0, 1)
        likely = likely.unflatten(0, (len(x), -1))[:, -RECENT:].flatten(0, 1)  # (n, F)
        times = likely.sum(0).cpu().numpy()  # (F,)
        wanted = np.flatnonzero(times)
        ids, slots, _ = cache.admit(wanted, times[wanted])
        y = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
        for start, records in self.source.streamed(self.layer):
            end = start + len(records)
            h = self.products.hidden(rows, records, torch.arange(start, end, device=x.device))
            y += h @ self.format.rows(records, "down", h.dtype)
            active = h.unflatten(0, x.shape[:2])[:, -RECENT:].flatten(0, 1) != 0
            tally.seen_active = tally.seen_active + active.sum()
            tally.seen_predicted = tally.seen_predicted + (active & likely[:, start:end]).sum()
            here = (ids >= start) & (ids < end)
            if here.any():
                kept = taken(records, self._index(ids[here] - start))
                put(cache.slab, self._index(slots[here]), kept)
        cache.hold(ids, slots)
        return y.view_as(x)


def leave_on_disk(model: Transformer, pack: Pack) -> None:
    """Exchange the feed-forward layers of a model on the meta device."""
    for layer, said in zip(model.layers, pack.layers, strict=True):
        layer.feed_forward = SparseFeedForward(model.args, pack.format, said["rank"])


def fill_resident(pack: Pack, fill: Fill) -> Fill:
    """What gives a model with such layers its tensors."""
    resident = pack.resident()

    def filling(name: str, tensor: Tensor) -> None:
        if name in resident:
            tensor.detach().copy_(resident[name])
        else:
            fill(name, tensor)

    return filling


def start_neurons(model: Transformer, pack: Pack, flash: Flash) -> None:
    """Open the pack, and give each layer as many slots as cost least within the memory.

    Raises ValueError where it is too little.
    """
    layers = [layer.feed_forward for layer in model.layers]
    weight, neurons, format = model.tok_embeddings.weight, model.args.hidden_dim, pack.format
    rest = sum(tensor.nbytes for tensor, _ in stored_tensors(model).values())
    predictors = sum(p.nbytes for layer in layers for p in layer.predictor.parameters())
    whole = rest - predictors + len(layers) * neurons * format.used
    depths = [flash.depth] if flash.depth else DEPTHS
    disk = measured(pack, depths, weight.device, weight.dtype)
    chunk = chunk_size(neurons, format.stride)
    memory = flash.memory * whole if flash.memory <= 1 else flash.memory
    fixed = rest + AHEAD * chunk * format.stride
    residence = choose(pack, neurons, int(memory), fixed, disk, flash.window)
    file = NeuronFile(pack.neurons, format.stride, residence.depth)
    source = Source(file, len(layers), neurons, weight.device, residence)
    for n, (layer, slots) in enumerate(zip(layers, residence.slots, strict=True)):
        layer.start(n, source, slots)


def source_of(model: Transformer) -> Source | None:
    """Where a model's neurons come from, if they do not stay in memory."""
    first = model.layers[0]
    return getattr(getattr(first, "feed_forward", None), "source", None)


def report(model: Transformer) -> Iterator[str]:
    """What came, beside what was expected of a token."""
    source = source_of(model)
    if source is None or not source.tally.calls + source.tally.whole:
        return
    yield from source.residence.lines(source.neurons)
    yield from source.lines()

"""Feed-forward layers whose neurons stay on disk until a token needs them.

Start at SparseFeedForward.forward. Behind a ReLU most neurons output zero for a token. A small
predictor names the neurons that may be active, and those not in memory are read. The product covers
every entry in memory, predicted or not, so an active neuron is missed only if it is on disk and not
predicted; entries in memory are computed while the others are read. For many tokens at once, as in
a prompt, a layer reads all its neurons in file order and keeps those that the last tokens used.

Based on "LLM in a flash" (arXiv 2312.11514, section 3): predictor, window, bundles of rows and
columns.

Shapes: B rows, T tokens of a row, N = B*T, D dim, F neurons, r rank, C entries, n records.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import stored_tensors
from model import Linear, ModelArgs, Transformer
from neurons.budget import DEPTHS, choose_plan
from neurons.costs import machine_costs
from neurons.pack import Pack
from neurons.products import Products, gather_records, has_kernel, scatter_records
from neurons.records import NeuronCache, NeuronFile, RecordFormat
from neurons.source import CHUNK_BUFFERS, NeuronSource, chunk_records
from neurons.uring import Callback, no_op
from options.settings import FlashOptions
from tiers.prefetch import CPU, to_device

MAX_SPARSE_TOKENS = 64  # more tokens at once read whole layers
KEPT_TOKENS = 16  # of each row of a prompt: their neurons stay in memory
Fill = Callable[[str, Tensor], Any]  # writes the value of the tensor of that name

# The host reads neurons within a layer, so compiled code calls it through an operator. The operator
# gets the layer's number as a tensor: one compiled block then serves all layers.
LAYERS: weakref.WeakValueDictionary[int, "SparseFeedForward"] = weakref.WeakValueDictionary()
torch.library.define(
    "gpt_flex::sparse_feed_forward", "(Tensor x, Tensor predicted, Tensor number) -> Tensor"
)


@torch.library.register_fake("gpt_flex::sparse_feed_forward")
def fake_sparse_feed_forward(x: Tensor, predicted: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.impl("gpt_flex::sparse_feed_forward", "CompositeExplicitAutograd")
def sparse_feed_forward(x: Tensor, predicted: Tensor, number: Tensor) -> Tensor:
    return LAYERS[int(number)].neuron_sums(x, predicted)


class Predictor(nn.Module):
    """(N, D) -> (N, F) bool: neurons that may be active. Two low-rank matrices; the threshold is
    part of the bias."""

    def __init__(self, dim: int, rank: int, neurons: int):
        super().__init__()
        self.down = Linear(dim, rank, bias=False)
        self.up = Linear(rank, neurons, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) > 0


class SparseFeedForward(nn.Module):
    """Replaces a PlainFeedForward or GatedFeedForward whose activation is ReLU.

    Its parameters are what stays in memory: the predictor, and the neurons' biases and int8 scales,
    in the file's order. Call `attach` before `forward`.
    """

    def __init__(self, args: ModelArgs, format: RecordFormat, rank: int):
        super().__init__()
        neurons, inner = args.hidden_dim, len(format.matrices) - 1
        self.format = format
        self.predictor: Callable[[Tensor], Tensor] = Predictor(args.dim, rank, neurons)
        # The additional neuron is that of an empty entry: its bias makes it inactive.
        self.inner_bias = nn.Parameter(torch.empty(neurons + 1, inner))
        self.outer_bias = nn.Parameter(torch.empty(args.dim))
        scaled = format.kind == "int8"
        inner_scales = torch.empty(neurons + 1, inner, dtype=torch.float32) if scaled else None
        outer_scales = torch.empty(args.dim, dtype=torch.float32) if scaled else None
        self.register_buffer("inner_scales", inner_scales)
        self.register_buffer("outer_scales", outer_scales)

    def attach(self, layer: int, source: NeuronSource, entries: int) -> None:
        """Give the layer its neurons on disk and a cache of so many entries."""
        self.layer, self.source, self.stats = layer, source, source.stats
        LAYERS[id(self)] = self
        self.register_buffer("number", torch.tensor(id(self), device=CPU), persistent=False)
        neurons = len(self.inner_bias) - 1
        self.cache = NeuronCache(neurons, entries, self.format.stride, source.device)
        kernel = has_kernel(self.format, source.device, self.inner_bias.dtype)
        self.products = Products(self.format, self.inner_bias, self.inner_scales, kernel)

    def forward(self, x: Tensor) -> Tensor:
        last = max(KEPT_TOKENS, MAX_SPARSE_TOKENS // len(x))  # a prompt predicts for its end only
        predicted = self.predictor(x[:, -last:].flatten(0, 1))  # (n, F)
        if torch.compiler.is_compiling():
            y = torch.ops.gpt_flex.sparse_feed_forward(x, predicted, self.number)
        else:
            y = self.neuron_sums(x, predicted)
        if self.outer_scales is not None:
            y = y * self.outer_scales
        return (y + self.outer_bias).to(x.dtype)

    def neuron_sums(self, x: Tensor, predicted: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) float32, without the outputs' scales and biases.

        predicted: (n, F) bool, of the last tokens of each row.
        """
        tokens = x.flatten(0, 1)  # (N, D)
        if len(tokens) > MAX_SPARSE_TOKENS:
            return self._whole_layer(x, predicted)
        ids = np.flatnonzero(predicted.any(0).cpu().numpy())
        if self.source.plan.prefers_whole_layer(self.cache.missing(ids), len(self.cache)):
            self.stats.whole_layers += 1
            return self._whole_layer(x, predicted)
        return self._sparse(tokens, ids).view_as(x)

    def _sparse(self, x: Tensor, ids: np.ndarray) -> Tensor:
        """(N, D) -> (N, D) float32, summed over predicted ids and the other entries in memory."""
        self.stats.sparse_layers += 1
        self.stats.predicted += len(ids)
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        # Where computing an entry means unpacking it, only predicted entries are computed.
        all_entries = self.products.computes_all_entries
        present = None if all_entries else self.cache.entries(ids)
        new, rest = self._fetch(ids, lambda: self._add(y, x, present))
        self._add(y, x, new)
        while len(rest):  # the layer has fewer entries than ids
            new, rest = self._fetch(rest, no_op)
            self._add(y, x, new)
        return y

    def _fetch(self, ids: np.ndarray, overlap: Callback) -> tuple[np.ndarray, np.ndarray]:
        """Read ids that are not in memory and call `overlap` meanwhile.

        Returns the filled entries, and the ids for which no entry was left.
        """
        stats = self.stats
        with stats.timed("manage_seconds"):
            new, entries, rest = self.cache.admit(ids)
        if not len(new):
            overlap()
            return entries, rest
        stats.missed += len(new)
        stats.reads += 1
        before = stats.compute_seconds
        with stats.timed("read_seconds"):
            self.source.fetch(self.layer, new, entries, self.cache.records, overlap)
        stats.overlapped_seconds += stats.compute_seconds - before
        with stats.timed("manage_seconds"):
            self.cache.commit(new, entries)
        return entries, rest

    def _add(self, y: Tensor, x: Tensor, entries: np.ndarray | None) -> None:
        """Add the neurons' outputs for x to y, (N, D) float32. entries: None for all."""
        if entries is not None and not len(entries):
            return
        with self.stats.timed("compute_seconds"):
            sums, active = self.products.sums(x, self.cache.records, self.cache.ids, entries)
            y += sums
        self.stats.active = self.stats.active + active

    def _whole_layer(self, x: Tensor, predicted: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) float32, by all neurons; caches those of the last tokens."""
        predicted = predicted.unflatten(0, (len(x), -1))  # (B, t, F)
        predicted = predicted[:, -KEPT_TOKENS:].flatten(0, 1)  # (n, F)
        uses = predicted.sum(0).cpu().numpy()  # (F,)
        used = np.flatnonzero(uses)
        ids, entries, _ = self.cache.admit(used, uses[used])
        tokens = x.flatten(0, 1)  # (N, D)
        y = torch.zeros(tokens.shape, dtype=torch.float32, device=x.device)
        for start, records in self.source.stream_layer(self.layer):
            end = start + len(records)
            h = self.products.hidden(tokens, records, torch.arange(start, end, device=x.device))
            y += h @ self.format.rows(records, "down", h.dtype)
            active = h.unflatten(0, x.shape[:2])[:, -KEPT_TOKENS:].flatten(0, 1) != 0  # (n, chunk)
            self._count_prompt(active, predicted[:, start:end])
            self._keep(ids, entries, start, records)
        self.cache.commit(ids, entries)
        return y.view_as(x)

    def _count_prompt(self, active: Tensor, predicted: Tensor) -> None:
        """Count active neurons and those that were predicted; both are (n, neurons) bool."""
        self.stats.prompt_active = self.stats.prompt_active + active.sum()
        self.stats.prompt_predicted = self.stats.prompt_predicted + (active & predicted).sum()

    def _keep(self, ids: np.ndarray, entries: np.ndarray, start: int, records: Tensor) -> None:
        """Copy those of the ids that a chunk has to their entries. start: its first neuron."""
        here = (ids >= start) & (ids < start + len(records))
        if here.any():
            kept = gather_records(records, self._on_device(ids[here] - start))
            scatter_records(self.cache.records, self._on_device(entries[here]), kept)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(indices), self.source.device)


def swap_feed_forwards(model: Transformer, pack: Pack) -> None:
    """Replace the feed-forward layers of a model on the meta device by sparse ones."""
    for layer, figures in zip(model.layers, pack.layers, strict=True):
        layer.feed_forward = SparseFeedForward(model.args, pack.format, figures["rank"])


def fill_from_pack(pack: Pack, fill: Fill) -> Fill:
    """Wrap a fill function: tensors that the pack holds are copied from it."""
    resident = pack.resident()

    def fill_tensor(name: str, tensor: Tensor) -> None:
        if name in resident:
            tensor.detach().copy_(resident[name])
        else:
            fill(name, tensor)

    return fill_tensor


def attach_neurons(model: Transformer, pack: Pack, options: FlashOptions) -> None:
    """Choose a cache plan and attach the pack's neurons to each layer.

    Raises ValueError if the memory is too little.
    """
    layers = [layer.feed_forward for layer in model.layers]
    weight, neurons, format = model.tok_embeddings.weight, model.args.hidden_dim, pack.format
    depths = [options.depth] if options.depth else DEPTHS
    costs = machine_costs(pack, depths, weight.device, weight.dtype)
    memory, fixed = memory_bytes(model, format, options.memory)
    plan = choose_plan(pack, neurons, memory, fixed, costs, options.window)
    file = NeuronFile(pack.neurons_path, format.stride, plan.depth)
    source = NeuronSource(file, len(layers), neurons, weight.device, plan)
    for n, (layer, entries) in enumerate(zip(layers, plan.entries, strict=True)):
        layer.attach(n, source, entries)


def memory_bytes(model: Transformer, format: RecordFormat, memory: float) -> tuple[int, int]:
    """Return the bytes for weights, and those of them that cannot be cache entries.

    memory: see FlashOptions; a share is that of the dense model, which has no predictors.
    """
    neurons = model.args.hidden_dim
    resident = sum(tensor.nbytes for tensor, _ in stored_tensors(model).values())
    predictors = sum(
        parameter.nbytes
        for layer in model.layers
        for parameter in layer.feed_forward.predictor.parameters()
    )
    dense = resident - predictors + len(model.layers) * neurons * format.used
    buffers = CHUNK_BUFFERS * chunk_records(neurons, format.stride) * format.stride
    return int(memory * dense if memory <= 1 else memory), resident + buffers


def neuron_source(model: Transformer) -> NeuronSource | None:
    """Return a model's neurons on disk, or None if it has none there."""
    first = model.layers[0]
    return getattr(getattr(first, "feed_forward", None), "source", None)


def flash_report(model: Transformer) -> Iterator[str]:
    """Yield the expected and the measured figures of a token, if any was decoded."""
    source = neuron_source(model)
    if source is None or not source.stats.sparse_layers + source.stats.whole_layers:
        return
    yield from source.plan.lines(source.neurons)
    yield from source.lines()

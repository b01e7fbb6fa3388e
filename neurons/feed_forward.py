"""Feed-forward layers whose neurons stay on disk until a token needs them.

Start at SparseFeedForward.forward. Behind a ReLU most neurons output zero for a token. A small
predictor names the neurons that may be active, and those of them that are not in memory are read. A
neuron's weights on disk are a record; memory for a record is an entry of the layer's cache. The
product covers all neurons in memory, predicted or not, unless they would have to be unpacked
(products.py); so an active neuron is missed only if it is on disk and not predicted. Neurons in
memory are computed while the others are read. For many tokens at once, as in a prompt, a layer is
read whole: all its neurons in file order, in chunks; and the neurons that the last tokens use go
into the cache. A neuron's id is its place in the file's order of the layer. The records, predictors
and figures of a model are in a pack, the directory that flash.py writes (pack.py).

Based on "LLM in a flash" (arXiv 2312.11514, section 3): predictor, window, bundles of rows and
columns.

Shapes: B rows, T tokens of a row, N = B*T tokens, D dim, F neurons of a layer, C entries of its
cache, n records; of predicted, n tokens.
"""

import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from layers.args import ModelArgs
from layers.basic import Linear
from model import Transformer
from neurons.budget import DEPTHS, choose_plan
from neurons.costs import machine_costs
from neurons.pack import Pack
from neurons.products import Products, gather_records, has_kernel, scatter_records
from neurons.records import NeuronCache, NeuronFile, RecordFormat
from neurons.source import CHUNK_BUFFERS, NeuronSource, chunk_records
from neurons.uring import Callback, no_op
from options.settings import FlashOptions
from tiers.prefetch import CPU, to_device
from weights.allocation import Fill, stored_tensors

MAX_SPARSE_TOKENS = 64  # for more tokens in one call, a layer is read whole
CACHED_TOKENS = 16  # last tokens of each row whose neurons go into the cache of a layer read whole

# The host reads neurons within a layer, so compiled code calls the layer through an operator. The
# operator gets the layer's number, its key here, as a tensor: one compiled block serves all layers.
LAYERS: weakref.WeakValueDictionary[int, "SparseFeedForward"] = weakref.WeakValueDictionary()
torch.library.define(
    "gpt_flex::sparse_feed_forward", "(Tensor x, Tensor predicted, Tensor number) -> Tensor"
)


@torch.library.register_fake("gpt_flex::sparse_feed_forward")
def fake_sparse_feed_forward(x: Tensor, predicted: Tensor, number: Tensor) -> Tensor:
    """Return an empty tensor of the output's shape and dtype, for torch.compile. The arguments are
    those of sparse_feed_forward."""
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.impl("gpt_flex::sparse_feed_forward", "CompositeExplicitAutograd")
def sparse_feed_forward(x: Tensor, predicted: Tensor, number: Tensor) -> Tensor:
    """Call neuron_sums of a layer from compiled code. x, predicted: the arguments of neuron_sums.
    number: the layer's key in LAYERS, a tensor (). Raises KeyError if the layer's model is
    deleted."""
    return LAYERS[int(number)].neuron_sums(x, predicted)


class Predictor(nn.Module):
    """Predicts the neurons that may be active: (N, D) -> (N, F) bool. Two low-rank matrices give
    each neuron a score; the bias contains the threshold, so that scores above 0 are predictions."""

    def __init__(self, dim: int, rank: int, neurons: int):
        super().__init__()
        self.down = Linear(dim, rank, bias=False)
        self.up = Linear(rank, neurons, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) > 0


class SparseFeedForward(nn.Module):
    """Replaces a PlainFeedForward or GatedFeedForward whose activation is ReLU.

    Its parameters stay in memory: the predictor, and the neurons' biases and int8 scales, in the
    order of the neurons in the file. `attach` must be called before `forward`.
    """

    def __init__(self, args: ModelArgs, format: RecordFormat, rank: int):
        """Create the parameters, uninitialised. rank: of the predictor's matrices.

        inner: biases and scales of up, or of gate and up; outer: those of the layer's outputs. The
        inner ones have one row more than there are neurons: neuron F stands for an empty entry, and
        its first bias, -inf, makes it inactive.
        """
        super().__init__()
        neurons, inner = args.hidden_dim, len(format.matrices) - 1
        self.format = format
        self.predictor: Callable[[Tensor], Tensor] = Predictor(args.dim, rank, neurons)
        self.inner_bias = nn.Parameter(torch.empty(neurons + 1, inner))
        self.outer_bias = nn.Parameter(torch.empty(args.dim))
        scaled = format.kind == "int8"
        inner_scales = torch.empty(neurons + 1, inner, dtype=torch.float32) if scaled else None
        outer_scales = torch.empty(args.dim, dtype=torch.float32) if scaled else None
        self.register_buffer("inner_scales", inner_scales)
        self.register_buffer("outer_scales", outer_scales)

    def attach(self, layer: int, source: NeuronSource, entries: int) -> None:
        """Connect the layer to its neurons on disk, and allocate a cache of so many entries.

        Called by attach_neurons, once the parameters are loaded. layer: its index in the model.
        source: the neuron file, which all layers share. Sets `number`, this layer's key in LAYERS,
        as a tensor for compiled code.
        """
        self.layer, self.source, self.stats = layer, source, source.stats
        LAYERS[id(self)] = self
        self.register_buffer("number", torch.tensor(id(self), device=CPU), persistent=False)
        neurons = len(self.inner_bias) - 1
        self.cache = NeuronCache(neurons, entries, self.format.stride, source.device)
        kernel = has_kernel(self.format, source.device, self.inner_bias.dtype)
        self.products = Products(self.format, self.inner_bias, self.inner_scales, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs: (B, T, D) -> (B, T, D).

        Neurons are predicted for all tokens if N <= MAX_SPARSE_TOKENS. For more tokens the layer is
        read whole, and neurons are predicted only for the last tokens of each row, at least
        CACHED_TOKENS, whose neurons go into the cache.
        """
        # If N <= MAX_SPARSE_TOKENS, T is at most MAX_SPARSE_TOKENS // B: these are all tokens.
        last = max(CACHED_TOKENS, MAX_SPARSE_TOKENS // len(x))
        predicted = self.predictor(x[:, -last:].flatten(0, 1))  # (n, F)
        if torch.compiler.is_compiling():
            y = torch.ops.gpt_flex.sparse_feed_forward(x, predicted, self.number)
        else:
            y = self.neuron_sums(x, predicted)
        if self.outer_scales is not None:
            y = y * self.outer_scales
        return (y + self.outer_bias).to(x.dtype)

    def neuron_sums(self, x: Tensor, predicted: Tensor) -> Tensor:
        """Sum the neurons' outputs: (B, T, D) -> (B, T, D) float32, without outer scales and bias.

        predicted: (n, F) bool, neurons that may be active, for the last tokens of each row; for all
        tokens if N <= MAX_SPARSE_TOKENS. The layer is read whole if N is larger, or if this is
        expected to be faster than reading the missing neurons.
        """
        tokens = x.flatten(0, 1)  # (N, D)
        if len(tokens) > MAX_SPARSE_TOKENS:
            return self._whole_layer(x, predicted)
        ids = np.flatnonzero(predicted.any(0).cpu().numpy())
        if self.source.plan.prefers_whole_layer(self.cache.missing(ids), len(self.cache)):
            self.stats.whole_layers += 1
            return self._whole_layer(x, predicted)
        return self._sparse_layer(tokens, ids).view_as(x)

    def _sparse_layer(self, x: Tensor, ids: np.ndarray) -> Tensor:
        """Sum the outputs of predicted neurons and of other neurons in memory, (N, D) float32.

        x: (N, D). ids: predicted neurons, ascending. Neurons in memory are computed while the
        others are read. If there are more ids than cache entries, they are read and computed in
        turns. Neurons that are not predicted are left out where they would have to be unpacked.
        """
        self.stats.sparse_layers += 1
        self.stats.predicted += len(ids)
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        # The entries to compute during the first read; None: all.
        all_entries = self.products.computes_all_entries
        in_memory = None if all_entries else self.cache.entries(ids)
        filled, waiting = self._fetch(ids, lambda: self._add_sums(y, x, in_memory))
        self._add_sums(y, x, filled)
        while len(waiting):
            filled, waiting = self._fetch(waiting, no_op)
            self._add_sums(y, x, filled)
        return y

    def _fetch(self, ids: np.ndarray, overlap: Callback) -> tuple[np.ndarray, np.ndarray]:
        """Read those of the neurons `ids`, ascending, that are not in memory, into cache entries.

        overlap: called once, while the disk reads if any neuron is missing; entries that are being
        filled are then empty and add nothing to the layer's sums. Returns the entries that were
        filled, and the ids that need a further call because no entry was left for them. Counts
        neurons and seconds in the stats.
        """
        stats = self.stats
        with stats.timed("manage_seconds"):
            new, entries, waiting = self.cache.admit(ids)
        if not len(new):
            overlap()
            return entries, waiting
        stats.missed += len(new)
        stats.reads += 1
        computed_before = stats.compute_seconds
        with stats.timed("read_seconds"):
            self.source.fetch(self.layer, new, entries, self.cache.records, overlap)
        stats.overlapped_seconds += stats.compute_seconds - computed_before
        with stats.timed("manage_seconds"):
            self.cache.commit(new, entries)
        return entries, waiting

    def _add_sums(self, y: Tensor, x: Tensor, entries: np.ndarray | None) -> None:
        """Add the outputs of the neurons in these cache entries to y, (N, D) float32, in place.

        x: (N, D). entries: None for all. Counts active neurons and seconds in the stats.
        """
        if entries is not None and not len(entries):
            return
        with self.stats.timed("compute_seconds"):
            sums, active = self.products.sums(x, self.cache.records, self.cache.ids, entries)
            y += sums
        self.stats.active = self.stats.active + active

    def _whole_layer(self, x: Tensor, predicted: Tensor) -> Tensor:
        """Sum the outputs of all neurons, in chunks: (B, T, D) -> (B, T, D) float32.

        predicted: (n, F) bool, neurons that may be active, for the last t tokens of each row. The
        predicted neurons of the last CACHED_TOKENS tokens go into the cache, as many as fit, for
        the tokens that follow; the neurons with the lowest ids first, which the calibration texts
        used most.
        """
        predicted = predicted.unflatten(0, (len(x), -1))  # (B, t, F)
        predicted = predicted[:, -CACHED_TOKENS:].flatten(0, 1)  # (n, F)
        uses = predicted.sum(0).cpu().numpy()  # (F,): how many of these tokens use each neuron
        used = np.flatnonzero(uses)
        ids, entries, _ = self.cache.admit(used, uses[used])
        tokens = x.flatten(0, 1)  # (N, D)
        y = torch.zeros(tokens.shape, dtype=torch.float32, device=x.device)
        for start, records in self.source.stream_layer(self.layer):
            end = start + len(records)
            h = self.products.hidden(tokens, records, torch.arange(start, end, device=x.device))
            y += h @ self.format.rows(records, "down", h.dtype)
            last = h.unflatten(0, x.shape[:2])[:, -CACHED_TOKENS:]  # (B, t, chunk)
            self._count_prompt(last.flatten(0, 1) != 0, predicted[:, start:end])
            self._copy_to_cache(ids, entries, start, records)
        self.cache.commit(ids, entries)
        return y.view_as(x)

    def _count_prompt(self, active: Tensor, predicted: Tensor) -> None:
        """Count active neurons, and how many of them were predicted, for the reported recall: the
        share of active neurons that were predicted. active, predicted: bool, (n, neurons of a
        chunk) each, for the last tokens of a layer read whole."""
        self.stats.prompt_active = self.stats.prompt_active + active.sum()
        self.stats.prompt_predicted = self.stats.prompt_predicted + (active & predicted).sum()

    def _copy_to_cache(
        self, ids: np.ndarray, entries: np.ndarray, start: int, records: Tensor
    ) -> None:
        """Copy the records of the neurons `ids` that a chunk contains to their cache entries.

        entries: the entry for each id. start: the chunk's first neuron. records: of the chunk,
        (n, stride) bytes. The caller commits the ids after the last chunk.
        """
        in_chunk = (ids >= start) & (ids < start + len(records))
        if in_chunk.any():
            copies = gather_records(records, self._on_device(ids[in_chunk] - start))
            scatter_records(self.cache.records, self._on_device(entries[in_chunk]), copies)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(indices), self.source.device)


def swap_feed_forwards(model: Transformer, pack: Pack) -> None:
    """Replace the feed-forward layers of a model by sparse ones, before its weights are allocated.

    The parameters of the new layers are uninitialised; fill_from_pack fills them. Each predictor
    has the rank that the pack's manifest gives for its layer: figures["rank"].
    """
    for layer, figures in zip(model.layers, pack.layers, strict=True):
        layer.feed_forward = SparseFeedForward(model.args, pack.format, figures["rank"])


def fill_from_pack(pack: Pack, fill: Fill) -> Fill:
    """Return a function that fills the tensors of a model when it is loaded: predictors, biases and
    scales, which the pack has under their names in the model, are copied from the pack; all others
    are filled by `fill`, which reads the checkpoint. Used after swap_feed_forwards.
    """
    resident = pack.resident()

    def fill_tensor(name: str, tensor: Tensor) -> None:
        if name in resident:
            tensor.detach().copy_(resident[name])
        else:
            fill(name, tensor)

    return fill_tensor


def attach_neurons(model: Transformer, pack: Pack, options: FlashOptions) -> None:
    """Choose a cache plan and connect each layer to its neurons on disk.

    The last of the three steps of loading: the model has sparse layers (swap_feed_forwards) with
    loaded parameters (fill_from_pack). Measures the machine if no earlier run has. Raises
    ValueError if options.memory is too little.
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
    """Return the bytes of memory for all weights, and how many of them are not for cache entries.

    memory: bytes, or, up to 1, a share of the bytes of all weights, predictors not counted. The
    second number covers the loaded weights and the buffers for reading whole layers.
    """
    neurons = model.args.hidden_dim
    resident = sum(tensor.nbytes for tensor, _ in stored_tensors(model).values())
    predictors = sum(
        parameter.nbytes
        for layer in model.layers
        for parameter in layer.feed_forward.predictor.parameters()
    )
    # As if all neurons were in memory; format.used: bytes of a record without padding.
    whole = resident - predictors + len(model.layers) * neurons * format.used
    buffers = CHUNK_BUFFERS * chunk_records(neurons, format.stride) * format.stride
    return int(memory * whole if memory <= 1 else memory), resident + buffers


def neuron_source(model: Transformer) -> NeuronSource | None:
    """Return the source from which a model's layers read neurons, which all of them share; None if
    the model has no neurons on disk."""
    first = model.layers[0]
    return getattr(getattr(first, "feed_forward", None), "source", None)


def flash_report(model: Transformer) -> Iterator[str]:
    """Yield lines for the user after a run: the expected and the measured costs of a token.

    Yields nothing for a model without neurons on disk, or before its first token.
    """
    source = neuron_source(model)
    if source is None or not source.stats.sparse_layers + source.stats.whole_layers:
        return
    yield from source.plan.lines(source.neurons)
    yield from source.lines()

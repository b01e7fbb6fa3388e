"""Loads a model from a path: ready to run, eager or compiled, on its device.

Start at load_model, which puts together all features of a model, in this order: the checkpoint's
args -> Transformer on the meta device -> every tensor read once, into its final memory -> prefill
and decode as two views of the model, compiled or not -> its draft.

Terms: the args are the shape of a model; the scheme says how its linears are quantised. A view is a
function that computes Transformer.forward, eager or compiled. A policy says which parts of an
offloaded model are on the device, in host memory and on disk; its layers are streamed, that is
moved to the device when they are needed (offload.py). Ranks are processes that share a model; each
has a shard: a share of every layer (tp.py) or some whole layers (pp.py). A pack is the directory of
feed-forward neurons that --flash reads (neurons/pack.py). A draft proposes tokens that the model
verifies (speculate.py); a self-draft is the model's own copy in fewer bits. Fast layers compute
with kernels for the model's device (fast_layers/). A fill function takes the name of a tensor and
the allocated tensor, and writes the values into it. A Stored function takes the name and the dtype
of a tensor, and returns the file and offset where it lies in that dtype, or None.

The module of a feature is imported only if the feature is used: without them a model loads in half
the time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from decoding import LoadedModel
from host.files import DEMO
from layers.args import DTYPES, ModelArgs
from layers.kv_cache import Cache, KVCache, visible_length
from model import Transformer
from options.settings import (
    DRAFTS,
    MAX_DRAFT_TOKENS,
    SELF_DRAFTS,
    FlashOptions,
    LoadOptions,
)
from quant.linear import QuantizedLinear, make_scheme, meta_model, round_to_nearest
from weights.allocation import allocate, final_dtype, stored_tensors

if TYPE_CHECKING:
    from checkpoint import Checkpoint
    from offload import Stored, StreamedLayers
    from text.tokenizer import Tokenizer
    from tiers.policy import Policy
    from weights.allocation import Fill


Scheme = dict[str, Any] | None  # how linears are quantised, see make_scheme; None: they are dense
CACHE_BITS = {"int8": 8, "int4": 4}  # per number of a quantised KV cache


def load_model(
    path: str | Path = DEMO, options: LoadOptions = LoadOptions(), **changes: Any
) -> LoadedModel:
    """Load a model from a checkpoint: `model.pth`, quantised or not, or a Hugging Face directory.

    changes: fields of LoadOptions by name: load_model(path, device="cpu", compile=True). With
    compile=True the first calls of the model compile it; see compile_now.
    Raises FileNotFoundError, ValueError and MemoryError, with messages of one line, most of them
    before the weights are allocated. Later ones: damaged scales, too little memory for the model's
    own copy as draft or for --flash, too little disk for offloaded layers.
    """
    from checkpoint import Checkpoint
    from text.tokenizer import load_tokenizer

    options = checked(replace(options, **changes))
    checkpoint = Checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.directory)
    options = with_draft_model(options)
    return assemble(
        CheckpointWeights(checkpoint, options.flash, options.device), tokenizer, options
    )


def random_model(
    config_file: str | Path,
    options: LoadOptions = LoadOptions(),
    *,
    scheme: Scheme = None,
    **changes: Any,
) -> LoadedModel:
    """Make a model of the shape in a config.json, with random weights: for benchmarks.

    scheme: how its linears are quantised, see make_scheme in quant/linear.py; None: they are
    dense. changes: fields of LoadOptions by name.
    """
    from text.tokenizer import id_tokenizer
    from weights.weight_files import read_json

    options = checked(replace(options, **changes))
    options = with_draft_model(options)
    weights = RandomWeights(read_json(Path(config_file)), scheme)
    tokenizer = id_tokenizer(weights.args.vocab_size)
    return assemble(weights, tokenizer, options)


def checked(options: LoadOptions) -> LoadOptions:
    """Returns the options, with a torch.device and a torch.dtype (None: as stored) in place of
    names, and without a policy that offloads nothing (Policy.plain). Raises ValueError for options
    that break MODEL_RULES (options/rules.py), for a speculate_k out of range, and for a device,
    dtype or kv_dtype that does not exist."""
    from host.devices import find_device
    from options.rules import MODEL_RULES, broken_rule

    plain = options.policy is not None and options.policy.plain
    options = replace(options, policy=None) if plain else options
    if message := broken_rule(options.chosen(), MODEL_RULES):
        raise ValueError(message)
    if options.speculate_k is not None and not 1 <= options.speculate_k <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"speculate_k is {options.speculate_k}: give 1 to {MAX_DRAFT_TOKENS} draft tokens, or "
            "None for as many as pay"
        )
    find_cache(options.kv_dtype)  # raises ValueError
    return replace(
        options, device=find_device(str(options.device)), dtype=find_dtype(options.dtype)
    )


def with_draft_model(options: LoadOptions) -> LoadOptions:
    """Returns the options; if options.draft is a path, the draft model is loaded in its place.

    The draft model gets the same device, dtypes and compilation as the model, and is neither
    offloaded nor divided among ranks. options: as `checked` returns them.
    """
    draft = options.draft
    if draft is None or isinstance(draft, LoadedModel) or draft in DRAFTS:
        return options
    shared = "device", "dtype", "kv_dtype", "compile", "compile_prefill"
    given = {name: getattr(options, name) for name in shared}
    given["device"] = str(options.device)  # LoadOptions has a name; `checked` made it a device
    return replace(options, draft=load_model(draft, **given))


def assemble(
    weights: CheckpointWeights | RandomWeights, tokenizer: Tokenizer, options: LoadOptions
) -> LoadedModel:
    """Build the model that the options describe, fill it with weights, and make it ready to run.

    options: as `checked` and with_draft_model return them. tokenizer: that of the weights. Layers
    must be replaced before their tensors are allocated, and views made when the model has its
    weights.
    """
    from fast_layers.install import prepare_fast_layers

    if options.draft is not None:
        from speculate import check_draft

        check_draft(options.draft, weights.args.vocab_size, tokenizer, weights.scheme)
    policy, device = options.policy, options.device
    with importing_compiler(options.compile):
        weights.check()
        scheme = compressed_scheme(policy and policy.compress_weight, weights.scheme)
        strategy = parallel_strategy(options)
        model = strategy.build_skeleton(weights.args, scheme)
        model.cache_factory = replace(model.cache_factory, make=find_cache(options.kv_dtype))
        weights.prepare(model)
        dtype = options.dtype or weights.dtype
        prepare_fast_layers(model, device, dtype, counts_as_large(options))
        layers = stream_layers(model, options, dtype)
        fill = weights.filler(model, scheme, strategy)
        # Weights that are rounded while they are read lie in no file in their final form.
        stored = weights.stored(strategy) if scheme == weights.scheme else no_location
        fill_model(model, strategy, fill, layers, stored, device, dtype)
        weights.start(model)
        return strategy.wrap(make_ready(model, tokenizer, options))


class CheckpointWeights:
    """The weights of a checkpoint, for `assemble`, which calls the methods in the order given here.

    flash: how the feed-forward neurons are read from disk; None: they are in memory. device: on
    which the model will run. The attributes args, scheme and dtype are those of the stored model.
    Raises ValueError or FileNotFoundError if `flash` names no pack of this checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, flash: FlashOptions | None, device: torch.device):
        self.args, self.scheme, self.dtype = checkpoint.args, checkpoint.scheme, checkpoint.dtype
        self.checkpoint, self.flash, self.pack = checkpoint, flash, None
        self.device = device
        if flash:
            from neurons.pack import flash_directory, open_pack

            self.pack = open_pack(flash.directory or flash_directory(checkpoint), checkpoint)

    def check(self) -> None:
        """Raises ValueError for a checkpoint whose tensors do not fit its config."""
        self.checkpoint.check(meta_model(self.args, self.scheme))

    def prepare(self, model: Transformer) -> None:
        """With --flash, replace the feed-forwards of a model on the meta device: their neurons stay
        on disk."""
        if self.pack:
            from neurons.feed_forward import swap_feed_forwards

            swap_feed_forwards(model, self.pack)

    def filler(self, model: Transformer, scheme: Scheme, strategy: ParallelStrategy) -> Fill:
        """Returns the fill function of the model, which reads a tensor or computes it from stored
        ones.

        model: on the meta device. scheme: of the model in memory; if the checkpoint is dense and
        this scheme is not None, weights are rounded while they are read. With --flash, tensors that
        the pack has are copied from it. The strategy reduces each tensor to this rank's shard.
        """
        fill = self.checkpoint.fill_function(self.device)
        if scheme != self.scheme:
            fill = rounded_filler(model, self.checkpoint, fill)
        if self.pack:
            from neurons.feed_forward import fill_from_pack

            fill = fill_from_pack(self.pack, fill)
        return strategy.fill_function(self.checkpoint, model, self.device, fill)

    def stored(self, strategy: ParallelStrategy) -> Stored:
        """Returns the Stored function of the model: see ParallelStrategy.location_function."""
        return strategy.location_function(self.checkpoint)

    def start(self, model: Transformer) -> None:
        """With --flash, connect the feed-forwards to their neurons on disk. Call it when the model
        has its weights."""
        if self.pack:
            from neurons.feed_forward import attach_neurons

            attach_neurons(model, self.pack, self.flash)


class RandomWeights:
    """Random weights for the shape of a config.json, with the methods of CheckpointWeights.

    config: the content of the file, whose dtype the weights have. scheme: how they are quantised.
    """

    def __init__(self, config: dict[str, Any], scheme: Scheme):
        from weights.hf import model_args

        self.args, self.scheme, self.dtype = model_args(config), scheme, config_dtype(config)

    def check(self) -> None: ...

    def prepare(self, model: Transformer) -> None: ...

    def filler(self, model: Transformer, scheme: Scheme, strategy: ParallelStrategy) -> Fill:
        return random_filler()

    def stored(self, strategy: ParallelStrategy) -> Stored:
        return no_location

    def start(self, model: Transformer) -> None: ...


def fill_model(
    model: Transformer,
    strategy: ParallelStrategy,
    fill: Fill,
    layers: StreamedLayers | None,
    stored: Stored,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Allocate and fill the tensors of a model on the meta device, with a progress bar.

    layers: the streamed layers; None: nothing is offloaded. fill, stored: a fill function and a
    Stored function, see the file's docstring. dtype: of floating-point parameters. strategy.finish
    needs filled tensors. layers.destination gives the memory of tensors, or none for layers on
    disk; layers.start finds these in the checkpoint, or writes them to a scratch file.
    """
    own = stored_tensors(model).values()
    nbytes = sum(t.numel() * final_dtype(t, dtype).itemsize for t, _ in own)
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="load", delay=1) as bar:
        fill = counted(fill, bar.update)
        allocate(model, device, dtype, fill, layers and layers.destination)
        strategy.finish(model, dtype, device)
        if layers:
            layers.start(fill, stored)


class ParallelStrategy(Protocol):
    """Divides a model among processes. `assemble` calls the methods in the order given here, except
    shard_args, which build_skeleton and plan.py call.

    SingleProcess, tp.TensorParallel and pp.PipelineParallel implement it. A shard is the
    Transformer of one process.
    """

    def shard_args(self, args: ModelArgs, scheme: Scheme) -> ModelArgs:
        """Return the args of this process's shard. args, scheme: of the whole model. Raises
        ValueError if the model cannot be divided among so many processes."""

    def build_skeleton(self, args: ModelArgs, scheme: Scheme) -> Transformer:
        """Build this process's shard on the meta device. args, scheme: of the whole model."""

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        """Return the fill function of the shard, which takes names in the shard.

        model: the shard. device: of its tensors. fill: the fill function of the whole model, which
        takes names in the checkpoint.
        """

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        """Return the Stored function of the shard, which takes names in the shard. It returns None
        for a tensor that no file stores byte for byte."""

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        """Called after the weights are filled: cut a tied head to this rank's rows of the embedding
        (tp.py), or set the dtype and device of what replaces the embedding (pp.py)."""

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        """Return the LoadedModel with the views, caches and sampler that the processes need."""


class SingleProcess:
    """The ParallelStrategy without ranks: this process has the whole model."""

    def shard_args(self, args: ModelArgs, scheme: Scheme) -> ModelArgs:
        return args

    def build_skeleton(self, args: ModelArgs, scheme: Scheme) -> Transformer:
        return meta_model(args, scheme)

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        return fill

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        return checkpoint.location

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None: ...

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        return lm


def parallel_strategy(options: LoadOptions) -> ParallelStrategy:
    """Returns the strategy for options.ranks: without ranks, a single process; with --pipeline,
    each rank has some of the layers; otherwise each rank has a share of every layer. plan.py calls
    it, too, for the shard's shape."""
    if options.ranks is None:
        return SingleProcess()
    if options.pipeline:
        from pp import PipelineParallel, default_micro_batches

        count = options.micro_batches or default_micro_batches(options.ranks)
        return PipelineParallel(options.ranks, count)
    from tp import TensorParallel

    return TensorParallel(options.ranks)


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """Returns the dtype of the weights in a config.json: bfloat16 if there is none, or for "auto".

    config: the content of the file; the key is "dtype", or in older files "torch_dtype". Raises
    ValueError for a dtype that models do not run in.
    """
    from weights.config import Config

    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    name = config.get(key, "auto")
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    known = {"auto": torch.bfloat16, "half": torch.float16, "float": torch.float32} | DTYPES
    # choice checks that the value is one of the known names; a null counts as "auto".
    return known[Config({key: name}).choice(key, known, null="auto")]


def random_filler() -> Callable[[str, Tensor], None]:
    """Returns a fill function that writes the same 2**20 random numbers, of standard deviation
    0.02, again and again into each tensor. Integers, such as quantised weights, get them times
    1000; tensors whose names end in .scales get a constant."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02

    @functools.cache
    def noise_like(dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the noise in this dtype on this device: copies of it are as fast as memory."""
        factor = 1 if dtype.is_floating_point else 1000  # 0.02 would be cut off to 0
        return (noise * factor).to(dtype).to(device)

    def fill(name: str, tensor: Tensor) -> None:
        """Fill a tensor with the beginning of the noise, again and again."""
        tensor = tensor.detach()
        if name.endswith(".scales"):
            tensor.fill_(3 / 1024)  # dequantised int4 weights have the size of the noise
            return
        numbers = noise_like(tensor.dtype, tensor.device)
        for piece in tensor.view(-1).split(len(numbers)):
            piece.copy_(numbers[: len(piece)])

    return fill


def make_ready(model: Transformer, tokenizer: Tokenizer, options: LoadOptions) -> LoadedModel:
    """Install the fast layers, the two views and the draft of a model that has its weights.

    Fast layers may pack the weights in another order, from which no copy can be quantised: so the
    copy for a self-draft is made first.
    """
    from fast_layers.install import use_fast_layers

    copy = None
    if options.draft in SELF_DRAFTS:
        from speculate import self_copy

        copy = self_copy(model, options.draft)
    use_fast_layers(model, model.tok_embeddings.weight.dtype, counts_as_large(options))
    if options.policy:
        lm = offloaded(model, tokenizer, options)
    else:
        lm = make_views(model, tokenizer, options.compile, options.compile_prefill)
    return lm if options.draft is None else with_draft(lm, copy, options)


def counts_as_large(options: LoadOptions) -> bool | None:
    """Returns the argument `large` of use_fast_layers: True with --flash, so that dense linears get
    fast layers whatever their size; None: their size decides."""
    return True if options.flash else None


def offloaded(model: Transformer, tokenizer: Tokenizer, options: LoadOptions) -> LoadedModel:
    """Returns the LoadedModel of a model with streamed layers. options: with a policy, which also
    gives the size of prefill chunks. Both views are the model itself; with --compile its blocks are
    compiled."""
    if options.compile:
        from compiled import compiled_block

        model.layers.use(compiled_block(model, options.device))
    caches = partial(place_caches, options.policy)
    prefill = options.policy.prefill_chunk_tokens
    return LoadedModel(
        model, model, model, tokenizer, new_caches=caches, prefill_chunk_tokens=prefill
    )


def with_draft(lm: LoadedModel, copy: Transformer | None, options: LoadOptions) -> LoadedModel:
    """Returns the model with its draft. copy: the quantised copy that is the draft; None: the draft
    is options.draft, which is "ngram" or a LoadedModel.

    The controller chooses the number of draft tokens of each cycle; it needs to know whether
    decoding replays CUDA graphs.
    """
    from compiled import has_graphs
    from draft_length import DraftLengthController
    from fast_layers.install import use_fast_layers
    from speculate import ModelDraft, NgramDraft, SelfDraft, match_vocab_size

    graphs = lm.decode is not lm.model and has_graphs(lm.decode)
    # Only a draft model with its own caches must read the tokens of plain steps.
    reads_after_plain = isinstance(options.draft, LoadedModel)
    controller = DraftLengthController(options.speculate_k, graphs, reads_after_plain)
    if copy:
        # bfloat16, whatever the model's dtype: so a copy of a float32 model packs its weights, too;
        # the packed products take float32 rows.
        use_fast_layers(copy, torch.bfloat16)
        views = make_views(copy, lm.tokenizer, options.compile, options.compile_prefill)
        return replace(lm, draft=SelfDraft(controller, views))
    if options.draft == "ngram":
        return replace(lm, draft=NgramDraft(controller))
    draft = match_vocab_size(options.draft, lm.model.args.vocab_size)
    return replace(lm, draft=ModelDraft(controller, draft))


def stream_layers(
    model: Transformer, options: LoadOptions, dtype: torch.dtype
) -> StreamedLayers | None:
    """Replace the layers of a model on the meta device by StreamedLayers, if there is a policy.

    Returns them, or None without a policy. They get their weights in fill_model. dtype: of the
    model's floating-point parameters.
    """
    if options.policy is None:
        return None
    from fast_layers.cpu import is_large
    from offload import StreamedLayers

    large = is_large(model)
    model.layers = StreamedLayers(model.layers, options.policy, dtype, options.device, large)
    return model.layers


def compressed_scheme(compress: bool, scheme: Scheme) -> dict[str, Any] | None:
    """Returns the scheme of the weights in memory: the stored one or, if the weights are dense and
    are to be compressed, 4 bits in groups of 64, as in FlexGen. compress: --compress_weight; a
    false value: do not compress. scheme: the stored one."""
    return make_scheme("int4", 64, head="dense") if compress and not scheme else scheme


def rounded_filler(model: Transformer, checkpoint: Checkpoint, fill: Fill) -> Fill:
    """Returns a fill function for --compress_weight: it rounds a dense checkpoint's weights for the
    tensors of quantised linears, and passes other tensors on to `fill`. model: has the linears,
    under the names of the checkpoint."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    rounded: dict[str, dict[str, Tensor]] = {}  # the linear rounded last -> its tensors

    def rounding(name: str, tensor: Tensor) -> None:
        """Fill a tensor of the model; the first one of a linear reads and rounds its weight."""
        # A quantised linear has several tensors (integers, scales, ...) for one stored weight.
        module, _, leaf = name.rpartition(".")
        if module not in linears or leaf == "bias":
            return fill(name, tensor)
        if module not in rounded:
            rounded.clear()  # one linear is kept: its tensors are filled one after the other
            rounded[module] = round_to_nearest(checkpoint.read(f"{module}.weight"), linears[module])
        tensor.copy_(rounded[module][leaf])

    return rounding


def counted(fill: Fill, progress: Callable[[int], Any]) -> Fill:
    """Returns a function like `fill` that calls progress with the bytes of each tensor."""

    def filling(name: str, tensor: Tensor) -> None:
        fill(name, tensor)
        progress(tensor.nbytes)

    return filling


def no_location(name: str, dtype: torch.dtype) -> None:
    """The Stored function of a model of whose tensors no file has the final bytes. Returns None."""


def place_caches(policy: Policy, lm: LoadedModel, batch: int, length: int) -> Sequence[Cache]:
    """Make the caches of an offloaded model, on the tiers (device, host, disk) of the policy.

    With `policy` given it is LoadedModel.new_caches: called for `batch` rows of `length` positions.
    The seconds that computation waits for caches are added to StreamedLayers.wait_times.
    """
    from tiers.kv_cache import tiered_caches

    waited = lm.model.layers.wait_times["cache"]
    return tiered_caches(lm.model, policy, batch, length, waited)


def importing_compiler(wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Returns a context manager that imports the compiler in a thread while its body reads the
    weights; if not wanted, one that does nothing."""
    if not wanted:
        return contextlib.nullcontext()
    from compiled import compiler_imported

    return compiler_imported(True)


def make_views(
    model: Transformer, tokenizer: Tokenizer, compile: bool, compile_prefill: bool
) -> LoadedModel:
    """Returns a model with prefill and decode as two views, each compiled or not.

    model: has its weights and final layers, on its device. compile: whether to compile decode;
    compile_prefill: whether to compile prefill, too; without `compile` it is ignored.
    """
    if not compile:
        return LoadedModel(model, model, model, tokenizer)
    from compiled import ReusedCaches, compiled_view, has_graphs
    from neurons.feed_forward import neuron_source

    device = model.tok_embeddings.weight.device
    on_device_only = neuron_source(model) is None  # False: the host reads neurons within a step
    # False: no CUDA graphs for prefill, because each length would record one.
    prefill = compiled_view(model, device, False) if compile_prefill else model
    decode = compiled_view(model, device, on_device_only)
    lm = LoadedModel(model, prefill, decode, tokenizer, any_rows=False)
    return replace(lm, new_caches=ReusedCaches(lm.new_caches)) if has_graphs(decode) else lm


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype with a name such as float32 or torch.float32. Returns a dtype, or None (as
    stored), unchanged. Raises ValueError, which lists the known names, for another name."""
    if not isinstance(dtype, str):
        return dtype
    if dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype.removeprefix("torch.")]


def find_cache(kv_dtype: str | None) -> Callable[..., KVCache]:
    """Returns the constructor of KV caches (CacheFactory.make) for --kv_dtype: int8, int4, or None
    for the model's dtype. Raises ValueError, which lists the known names, for another name."""
    if kv_dtype is None:
        return KVCache
    if kv_dtype not in CACHE_BITS:
        raise ValueError(f"kv_dtype {kv_dtype} is not one of None, {', '.join(CACHE_BITS)}")
    from quant.kv_cache import QuantizedKVCache

    return partial(QuantizedKVCache, bits=CACHE_BITS[kv_dtype])


def count_weights(args: ModelArgs) -> int:
    """Returns the number of weights of a dense model, by its shape alone."""
    return sum(parameter.numel() for parameter in meta_model(args, None).parameters())


@torch.inference_mode()
def compile_now(lm: LoadedModel, caches: Sequence[Cache]) -> None:
    """Compile the views of a model and of its draft for the shapes of steps with these caches, by
    calling the views. Without this the first steps would compile.

    The calls write to the first positions of the caches; later steps overwrite them. Views that are
    not compiled are not called.
    """
    compile_views(lm, caches, 2 if lm.draft else 1)
    if lm.draft and (inputs := lm.draft.warm_up_inputs(caches)):
        compile_views(*inputs)
    from neurons.feed_forward import neuron_source

    # any_rows is False for a compiled model: the calls above read neurons from disk, which must not
    # count in the report of the run.
    if (source := neuron_source(lm.model)) and not lm.any_rows:
        source.reset_stats()


def compile_views(lm: LoadedModel, caches: Sequence[Cache], widest: int) -> None:
    """Call each compiled view with the shapes of its steps: decoding of one token and of `widest`
    tokens of a row, and prefill; each also for texts that are longer than a ring.

    widest: the most tokens of a row in a decoding step: 1, or with a draft 2, which stands for any
    number above 1, as one graph serves all of them.
    """
    key_pos = torch.arange(caches[0].length, device=lm.device)
    # Lengths of texts: a short one, and one that is longer than each ring.
    filled = {2, *(cache.ring + 1 for cache in caches if cache.ring)}
    lengths = sorted({visible_length(n, len(key_pos)) for n in filled})
    steps = (lm.decode, 1), (lm.decode, widest), (lm.prefill, 2)
    for (view, width), length in itertools.product(steps, lengths):
        if view is not lm.model:
            tokens = torch.zeros(caches[0].rows, width, dtype=torch.long, device=lm.device)
            # The texts are as long as the step is wide: of an empty one all keys would be hidden in
            # a ring, and NaN would go into the caches.
            at = (tokens[:, 0], tokens[:, :1] + width) if view is lm.prefill else ()
            view(tokens, key_pos[:width].expand_as(tokens), key_pos[:length], caches, *at)

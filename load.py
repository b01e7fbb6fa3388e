"""From a path to a model that is ready to run, eager or compiled, on its device.

Start at load_model, the one place where a model's features meet, in this order: the checkpoint's
args -> Transformer on the meta device -> every tensor read once, straight to where it stays ->
prefill and decode as two views of the model, compiled or not -> what guesses tokens for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import DTYPES, Checkpoint, allocate, final_dtype, read_json, stored_tensors
from compiled import ReusedCaches, compiled_block, compiled_view, compiler_imported, has_graphs
from decoding import LoadedModel
from draft_length import DraftLengthController
from fast_layers.install import use_fast_layers
from host.devices import find_device
from host.files import DEMO
from host.memory import check_memory
from model import CacheFactory, KVCache, ModelArgs, Transformer, visible_length
from neurons.feed_forward import Flash, fill_resident, leave_on_disk, source_of, start_neurons
from neurons.pack import flash_directory, open_pack
from offload import Fill, Stored, StreamedLayers
from pp import PipelineParallel, default_micro_batches
from quant.kv_cache import QuantizedKVCache
from quant.linear import (
    QuantizedLinear,
    make_scheme,
    meta_model,
    quantized_bytes,
    quantized_copy,
    round_to_nearest,
)
from ranks import Ranks
from speculate import ModelDraft, NgramDraft, SelfDraft, same_vocabulary
from text.tokenizer import Tokenizer, difference, id_tokenizer, load_tokenizer
from tiers.kv_cache import tiered_caches
from tiers.policy import Policy
from tp import TensorParallel
from weights.hf import Config, model_args

CACHES: dict[str | None, Callable[..., KVCache]] = {
    None: KVCache,
    "int8": partial(QuantizedKVCache, bits=8),
    "int4": partial(QuantizedKVCache, bits=4),
}
SELF_BITS = {"self-int8": 8, "self-int4": 4}
DRAFTS = "ngram", *SELF_BITS  # or else a model
# Rows of padding by which a draft's vocabulary may differ from its model's, as in llama.cpp.
MOST_PADDING = 128


def load_model(
    path: str | Path = DEMO,
    *,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    kv_dtype: str | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
    draft: str | Path | LoadedModel | None = None,
    speculate_k: int | None = None,
    policy: Policy | None = None,
    flash: Flash | None = None,
    ranks: Ranks | None = None,
    pipeline: bool = False,
    micro_batches: int | None = None,
) -> LoadedModel:
    """A model from a checkpoint: `model.pth`, quantised or not, or a Hugging Face directory.

    dtype: "float32" or torch.float32, say; None: as stored. kv_dtype: "int8" or "int4", None: that
    of the model. device "auto": cuda, else mps, else cpu. compiled views take their time at their
    first call. draft: what guesses tokens (speculate.py), one of DRAFTS or a model, loaded or its
    path; speculate_k: how many, None: as many as pay. policy: where the model lives and how it runs
    where that is not on the device alone (offload.py); flash: how its feed-forward neurons are left
    on disk (sparse.py).
    ranks: the processes that hold it together, each a share of every layer (tp.py) or, in a
    pipeline (pp.py), some layers; micro_batches: of rows that are under way there, None: as many as pay.
    Raises FileNotFoundError, ValueError and MemoryError, in one line each, before anything large is
    allocated.
    """
    target, cache_factory, dtype = find_device(device), find_cache(kv_dtype), find_dtype(dtype)
    policy = None if policy and policy.plain else policy
    checkpoint = Checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.directory)
    views = {"compile": compile, "compile_prefill": compile_prefill}
    if isinstance(draft, Path) or (isinstance(draft, str) and draft not in DRAFTS):
        draft = load_model(draft, device=device, dtype=dtype, kv_dtype=kv_dtype, **views)
    check_draft(draft, checkpoint.args.vocab_size, tokenizer, checkpoint.scheme)
    check_pairs(policy, draft, flash)
    check_ranks(ranks, pipeline, views, draft, flash, policy)
    pack = flash and open_pack(flash.directory or flash_directory(checkpoint), checkpoint)
    with compiler_imported(compile):
        checkpoint.check(meta_model(checkpoint.args, checkpoint.scheme))
        scheme = compressed_scheme(policy and policy.compress_weight, checkpoint.scheme)
        division = divided(ranks, pipeline, micro_batches)
        model = division.meta_model(checkpoint.args, scheme)
        model.cache_factory = cache_factory
        if pack:
            leave_on_disk(model, pack)
        dtype = dtype or checkpoint.dtype
        layers = stream_layers(model, policy, dtype, target)
        fill = checkpoint.filler(target)
        if scheme != checkpoint.scheme:
            fill = rounded_filler(model, checkpoint, fill)
        if pack:
            fill = fill_resident(pack, fill)
        fill = division.filler(checkpoint, model, target, fill)
        stored = division.stored(checkpoint) if scheme == checkpoint.scheme else nowhere
        fill_model(model, division, fill, layers, stored, target, dtype)
        if pack:
            start_neurons(model, pack, flash)
        return division.ready(make_ready(model, tokenizer, views, draft, speculate_k, policy))


def fill_model(
    model: Transformer,
    division: "SingleProcess | TensorParallel | PipelineParallel",
    fill: Fill,
    layers: StreamedLayers | None,
    stored: Stored,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a model on the meta device its tensors, with a bar."""
    own = stored_tensors(model).values()
    nbytes = sum(t.numel() * final_dtype(t, dtype).itemsize for t, _ in own)
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="load", delay=1) as bar:
        fill = counted(fill, bar.update)
        allocate(model, device, dtype, fill, layers and layers.home)
        division.finish(model, dtype, device)
        if layers:
            layers.start(fill, stored)


class SingleProcess:
    """What one process alone holds of a model; tp.TensorParallel and pp.PipelineParallel are what a rank does.

    share: the args of what it holds. A model is made by the others in turn: `meta_model`, on the meta
    device; `filler`, what gives its tensors their values, where `fill` does so by the names that
    the checkpoint has; `stored`, where a file has them as they are; `finish`, once it has them;
    `ready`, what runs it.
    """

    def share(self, args: ModelArgs, scheme: dict[str, Any] | None) -> ModelArgs:
        return args

    def meta_model(self, args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
        return meta_model(args, scheme)

    def filler(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        return fill

    def stored(self, checkpoint: Checkpoint) -> Stored:
        return checkpoint.direct

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None: ...

    def ready(self, lm: LoadedModel) -> LoadedModel:
        return lm


def divided(
    ranks: Ranks | None, pipeline: bool, micro_batches: int | None = None
) -> SingleProcess | TensorParallel | PipelineParallel:
    """How a model is divided among ranks."""
    if ranks is None:
        return SingleProcess()
    return (
        PipelineParallel(ranks, micro_batches or default_micro_batches(ranks))
        if pipeline
        else TensorParallel(ranks)
    )


def random_model(
    config_file: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    kv_dtype: str | None = None,
    scheme: dict[str, Any] | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
    draft: str | LoadedModel | None = None,
    speculate_k: int | None = None,
    policy: Policy | None = None,
    ranks: Ranks | None = None,
    pipeline: bool = False,
    micro_batches: int | None = None,
) -> LoadedModel:
    """A model of the shape that a config.json gives, with random weights: for benchmarks.

    scheme: how its linears are quantised, see quantized.make_scheme; None: they are dense.
    """
    target, cache_factory = find_device(device), find_cache(kv_dtype)
    policy = None if policy and policy.plain else policy
    config = read_json(Path(config_file))
    args, fill = model_args(config), random_filler(target)
    tokenizer = id_tokenizer(args.vocab_size)
    check_draft(draft, args.vocab_size, tokenizer, scheme)
    check_pairs(policy, draft, None)
    check_ranks(ranks, pipeline, {"compile": compile}, draft, None, policy)
    with compiler_imported(compile):
        division = divided(ranks, pipeline, micro_batches)
        scheme = compressed_scheme(policy and policy.compress_weight, scheme)
        model = division.meta_model(args, scheme)
        model.cache_factory = cache_factory
        dtype = dtype or config_dtype(config)
        layers = stream_layers(model, policy, dtype, target)
        fill_model(model, division, fill, layers, nowhere, target, dtype)
        views = {"compile": compile, "compile_prefill": compile_prefill}
        return division.ready(make_ready(model, tokenizer, views, draft, speculate_k, policy))


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """What weights would be stored in: bfloat16 where the config does not say it, or says auto.

    Raises ValueError for a dtype that models do not run in.
    """
    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    name = config.get(key, "auto")
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    known = {"auto": torch.bfloat16, "half": torch.float16, "float": torch.float32} | DTYPES
    return known[Config({key: name}).choice(key, known, null="auto")]


def random_filler(device: torch.device) -> Callable[[str, Tensor], None]:
    """What fills tensors with noise of the size that weights have."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(device) * 0.02

    def fill(name: str, tensor: Tensor) -> None:
        integers = not tensor.is_floating_point()
        for piece in tensor.detach().view(-1).split(len(noise)):
            if name.endswith(".scales"):
                piece.fill_(3 / 1024)  # int4 weights are of the size of the noise
            else:
                piece.copy_(noise[: len(piece)] * (1000 if integers else 1))

    return fill


def make_ready(
    model: Transformer,
    tokenizer: Tokenizer,
    views: dict[str, bool],
    draft: str | LoadedModel | None,
    speculate_k: int | None,
    policy: Policy | None,
) -> LoadedModel:
    """A model that has its weights: its fast products, its views, and what guesses for it."""
    # While there are weights to round:
    copy = self_copy(model, draft) if draft in SELF_BITS else None
    use_fast_layers(model, model.tok_embeddings.weight.dtype, bool(source_of(model)) or None)
    if policy:
        if views["compile"]:
            model.layers.run = compiled_block(model, model.tok_embeddings.weight.device)
        place = {"new_caches": partial(place_caches, policy), "sweep": policy.sweep}
        lm = LoadedModel(model, model, model, tokenizer, **place)
    else:
        lm = make_views(model, tokenizer, **views)
    if draft is None:
        return lm
    controller = DraftLengthController(
        speculate_k, has_graphs(lm.decode), isinstance(draft, LoadedModel)
    )
    if copy:
        use_fast_layers(copy, torch.bfloat16)
        return replace(lm, draft=SelfDraft(controller, make_views(copy, tokenizer, **views)))
    if draft == "ngram":
        return replace(lm, draft=NgramDraft(controller))
    return replace(lm, draft=ModelDraft(controller, same_vocabulary(draft, model.args.vocab_size)))


def stream_layers(
    model: Transformer, policy: Policy | None, dtype: torch.dtype, device: torch.device
) -> StreamedLayers | None:
    """Let the layers of a model on the meta device be where a policy says."""
    if policy is None:
        return None
    model.layers = StreamedLayers(model.layers, policy, dtype, device)
    return model.layers


def compressed_scheme(compress: bool, scheme: dict[str, Any] | None) -> dict[str, Any] | None:
    """How weights are quantised as they run: as stored or, if dense, to FlexGen's 4 bits."""
    return make_scheme("int4", 64, head="dense") if compress and not scheme else scheme


def rounded_filler(model: Transformer, checkpoint: Checkpoint, fill: Fill) -> Fill:
    """What rounds weights of a dense checkpoint for a model's quantised linears."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    latest: dict[str, dict[str, Tensor]] = {}

    def rounding(name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        if module not in linears or leaf == "bias":
            return fill(name, tensor)
        if module not in latest:
            latest.clear()  # the tensors of a linear follow one another
            latest[module] = round_to_nearest(checkpoint.read(f"{module}.weight"), linears[module])
        tensor.copy_(latest[module][leaf])

    return rounding


def counted(fill: Fill, progress: Callable[[int], Any]) -> Fill:
    """The same, and progress is told of the bytes."""

    def filling(name: str, tensor: Tensor) -> None:
        fill(name, tensor)
        progress(tensor.nbytes)

    return filling


def nowhere(name: str, dtype: torch.dtype) -> None:
    """No file has a tensor as it is run."""


def place_caches(policy: Policy, lm: LoadedModel, batch: int, length: int) -> Sequence[KVCache]:
    waited = lm.model.layers.waited["cache"]
    return tiered_caches(lm.model, policy, batch, length, waited)


def self_copy(model: Transformer, draft: str) -> Transformer:
    """The model in the fewer bits that the draft's name says."""
    scheme = make_scheme(draft.removeprefix("self-"))
    nbytes = quantized_bytes(meta_model(model.args, scheme))
    device = model.tok_embeddings.weight.device
    what = f"the model's copy for --draft {draft}"
    check_memory(nbytes, device, what, "use --draft ngram, which takes none")
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc=draft, delay=1) as bar:
        return quantized_copy(model, scheme, bar.update)


def check_draft(
    draft: str | LoadedModel | None,
    vocab_size: int,
    tokenizer: Tokenizer,
    scheme: dict[str, Any] | None,
) -> None:
    """ValueError for a draft that cannot guess for a model of that vocabulary and scheme."""
    if isinstance(draft, LoadedModel):
        theirs = draft.model.args.vocab_size
        if abs(theirs - vocab_size) > MOST_PADDING:
            why = f"the draft knows {theirs} ids and the model {vocab_size}"
        elif not (why := difference(draft.tokenizer, tokenizer)):
            return
        raise ValueError(f"{why}: the draft must be a model with the same tokenizer")
    bits = scheme["linears"].get("bits", 16) if scheme else 16
    if SELF_BITS.get(draft, 0) >= bits:
        raise ValueError(
            f"--draft {draft}: the model has {bits} bits per weight already; use --draft ngram or "
            "--draft_checkpoint_path"
        )


def check_pairs(
    policy: Policy | None, draft: str | LoadedModel | None, flash: Flash | None
) -> None:
    """ValueError for features that do not go together."""
    if flash and policy:
        raise ValueError("--flash leaves neurons on disk, offloading whole layers: choose one")
    if flash and draft in SELF_BITS:
        raise ValueError(
            f"--draft {draft} copies a model that is in memory, and with --flash its neurons are "
            "not: give --draft_checkpoint_path, or --draft ngram"
        )
    if policy and draft in SELF_BITS:
        raise ValueError(
            f"--draft {draft} copies a model that is in memory, and this one is offloaded: give "
            "--draft_checkpoint_path, or --draft ngram"
        )


def check_ranks(
    ranks: Ranks | None,
    pipeline: bool,
    views: dict[str, bool],
    draft: str | LoadedModel | None,
    flash: Flash | None,
    policy: Policy | None,
) -> None:
    """ValueError for features that ranks do not have."""
    if pipeline and not ranks:
        raise ValueError("--pipeline needs ranks: torchrun --nproc_per_node=2 generate.py ...")
    if ranks and flash:
        raise ValueError("--flash is for one process, without torchrun")
    if ranks and policy and policy.compress_weight:
        raise ValueError("--compress_weight is for one process: run quantize.py first")
    if ranks and pipeline and draft:
        raise ValueError("a pipeline's stages do not guess: omit the draft, or --pipeline")
    if ranks and pipeline and views["compile"]:
        raise ValueError("a pipeline's stages are not compiled: omit --compile, or --pipeline")


def make_views(
    model: Transformer, tokenizer: Tokenizer, compile: bool, compile_prefill: bool
) -> LoadedModel:
    """Prefill and decode as two views of one model, each compiled or not."""
    device = model.tok_embeddings.weight.device
    by_itself = source_of(model) is None  # else the host reads within a step
    prefill = compiled_view(model, device, False) if compile and compile_prefill else model
    decode = compiled_view(model, device, by_itself) if compile else model
    lm = LoadedModel(model, prefill, decode, tokenizer, any_rows=not compile)
    return replace(lm, new_caches=ReusedCaches(lm.new_caches)) if has_graphs(decode) else lm


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of weights by its name. ValueError listing the known ones."""
    if not isinstance(dtype, str):
        return dtype
    if dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype.removeprefix("torch.")]


def find_cache(kv_dtype: str | None) -> CacheFactory:
    """Return what makes the caches. ValueError listing the known kinds."""
    if kv_dtype not in CACHES:
        known = ", ".join(str(name) for name in CACHES)
        raise ValueError(f"kv_dtype {kv_dtype} is not one of {known}")
    return CacheFactory(CACHES[kv_dtype])


def count_weights(args: ModelArgs) -> int:
    """Of the dense model."""
    return sum(parameter.numel() for parameter in meta_model(args, None).parameters())


@torch.inference_mode()
def compile_now(lm: LoadedModel, caches: list[KVCache]) -> None:
    """Let each compiled view meet the shapes that it will serve; what it writes is overwritten."""
    meet_shapes(lm, caches, 2 if lm.draft else 1)
    if lm.draft and (drafting := lm.draft.views(caches)):
        meet_shapes(*drafting)
    if (source := source_of(lm.model)) and not lm.any_rows:
        source.count_anew()


def meet_shapes(lm: LoadedModel, caches: list[KVCache], widest: int) -> None:
    """widest: tokens of a row that decoding is given at once, where 2 stand for more."""
    slots = torch.arange(caches[0].length, device=lm.device)
    visible = slots[: visible_length(2, len(slots))]
    for view, width in ((lm.decode, 1), (lm.decode, widest), (lm.prefill, 2)):
        if view is not lm.model:
            tokens = torch.zeros(caches[0].rows, width, dtype=torch.long, device=lm.device)
            at = (tokens[:, 0], tokens[:, :1]) if view is lm.prefill else ()
            view(tokens, slots[:width].expand_as(tokens), visible, caches, *at)

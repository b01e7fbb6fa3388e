"""From a path to a model that is ready to run, eager or compiled, on its device.

Start at load_model, the one place where a model's features meet, in this order: the checkpoint's
args -> Transformer on the meta device -> every tensor read once, straight to where it stays ->
prefill and decode as two views of the model, compiled or not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import Checkpoint, allocate, check_memory, read_json
from compiled import compiled_view, compiler_imported
from cpu_products import use_tiles
from hf import model_args
from model import KVCache, ModelArgs, Transformer
from quantized import swap_linears
from quantized_cache import QuantizedKVCache
from tokenizer import Tokenizer, id_tokenizer, load_tokenizer

CACHES: dict[str | None, Callable[..., KVCache]] = {
    None: KVCache,
    "int8": partial(QuantizedKVCache, bits=8),
    "int4": partial(QuantizedKVCache, bits=4),
}
DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run: its two views, eager or compiled, and its tokenizer."""

    model: Transformer
    prefill: Callable[..., Tensor]  # many tokens per row; called as Transformer.forward is
    decode: Callable[..., Tensor]  # one token per row
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @torch.inference_mode()
    def make_caches(self, batch: int, length: int) -> list[KVCache]:
        """Caches for `batch` rows of up to `length` tokens; MemoryError before allocating."""
        length = visible_slots(length, self.model.args.context)
        needed = batch * length * self.model.kv_bytes_per_token()
        what = f"a KV cache of {batch} rows of {length} tokens"
        check_memory(needed, self.device, what, "lower --batch_size or --max_new_tokens")
        return self.model.make_caches(batch, length)


def visible_slots(filled: int, most: int) -> int:
    """`filled` rounded up to 64, 96, 128, 192, 256, 384, ... and at most `most`.

    Attention reads so many slots: at most half of them beyond what is filled, and there are
    only two sizes, hence two CUDA graphs, for each doubling of the length.
    """
    power = max(64, 1 << (filled - 1).bit_length())
    return min(power * 3 // 4 if filled <= power * 3 // 4 and power > 64 else power, most)


def load_model(
    path: str | Path = DEMO,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    kv_dtype: str | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
) -> LoadedModel:
    """A model from a checkpoint: `model.pth`, quantised or not, or a Hugging Face directory.

    dtype None: as stored. kv_dtype: "int8" or "int4", None: that of the model. device "auto":
    cuda, else mps, else cpu. compiled views take their time at their first call. Raises
    FileNotFoundError, ValueError and MemoryError, in one line each, before anything large is
    allocated.
    """
    target, new_cache = find_device(device), find_cache(kv_dtype)
    checkpoint = Checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.directory)
    with compiler_imported(compile):
        model = skeleton(checkpoint.args, checkpoint.scheme)
        with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc="load", delay=1) as bar:
            checkpoint.load_into(model, target, dtype, bar.update)
        use_fast_products(model)
    model.new_cache = new_cache
    return make_views(model, tokenizer, compile, compile_prefill)


def random_model(
    config_file: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    kv_dtype: str | None = None,
    scheme: dict[str, Any] | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
) -> LoadedModel:
    """A model of the shape that a config.json gives, with random weights: for benchmarks.

    scheme: how its linears are quantised, see quantized.make_scheme; None: they are dense.
    """
    target, new_cache = find_device(device), find_cache(kv_dtype)
    config = read_json(Path(config_file))
    stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(target) * 0.02

    def fill(name: str, tensor: Tensor) -> None:
        integers = not tensor.is_floating_point()
        for piece in tensor.detach().view(-1).split(len(noise)):
            if name.endswith(".scales"):
                piece.fill_(3 / 1024)  # int4 weights are of the size of the noise
            else:
                piece.copy_(noise[: len(piece)] * (1000 if integers else 1))

    with compiler_imported(compile):
        model = skeleton(model_args(config), scheme)
        allocate(model, target, dtype or getattr(torch, str(stored)), fill)
        use_fast_products(model)
    model.new_cache = new_cache
    return make_views(model, id_tokenizer(model.args.vocab_size), compile, compile_prefill)


def skeleton(args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
    """The model on the meta device, with the linears that its checkpoint stores."""
    with torch.device("meta"):
        model = Transformer(args)
        if scheme:
            swap_linears(model, scheme)
    return model


def use_fast_products(model: Transformer) -> None:
    """Exchange quantised linears for those that are packed for the model's device."""
    weight = model.tok_embeddings.weight
    if weight.device.type == "cpu":
        use_tiles(model, weight.dtype)


def make_views(
    model: Transformer, tokenizer: Tokenizer, compile: bool, compile_prefill: bool
) -> LoadedModel:
    """Prefill and decode as two views of one model, each compiled or not."""
    device = model.tok_embeddings.weight.device
    prefill = compiled_view(model, device) if compile and compile_prefill else model
    decode = compiled_view(model, device) if compile else model
    return LoadedModel(model, prefill, decode, tokenizer)


def find_device(name: str) -> torch.device:
    """A device of this machine. auto: cuda, else mps, else cpu. ValueError for what it lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, found in there.items() if found), "cpu")
    if not there.get(name.partition(":")[0], name == "cpu"):
        found = [kind for kind, found in there.items() if found]
        raise ValueError(f"there is no device {name} here; there is {', '.join([*found, 'cpu'])}")
    return torch.device(name)


def find_cache(kv_dtype: str | None) -> Callable[..., KVCache]:
    """What makes the caches. ValueError listing the known ones."""
    if kv_dtype not in CACHES:
        known = ", ".join(str(name) for name in CACHES)
        raise ValueError(f"kv_dtype {kv_dtype} is not one of {known}")
    return CACHES[kv_dtype]


def count_weights(args: ModelArgs) -> int:
    """Of the dense model."""
    return sum(parameter.numel() for parameter in skeleton(args, None).parameters())


@torch.inference_mode()
def compile_now(lm: LoadedModel, caches: list[KVCache]) -> None:
    """Let each compiled view meet the shapes that it will serve; what it writes is overwritten."""
    slots = torch.arange(caches[0].length, device=lm.device)
    visible = slots[: visible_slots(2, len(slots))]
    for view, width in ((lm.decode, 1), (lm.prefill, 2)):
        if view is not lm.model:
            tokens = torch.zeros(caches[0].rows, width, dtype=torch.long, device=lm.device)
            last = () if width == 1 else (tokens[:, 0],)
            view(tokens, slots[:width].expand_as(tokens), visible, caches, *last)

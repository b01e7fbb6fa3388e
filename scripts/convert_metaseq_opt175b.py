"""Convert Meta's OPT-175B, as metaseq saved it, to one `model.pth` with its `config.json`.

Start at convert, then MODULES. A model_part is the share of one rank of metaseq's tensor
parallelism: a slice of each large tensor, and the small tensors whole. Both forms of the release
are read:
- checkpoint_last-model_part-{0..7}-shard{0..123}.pt, as downloaded: the tensors of a layer are one
  flat vector, cut into as many equal pieces as the model_part has shards, the last ones padded.
  shard_metadata in each file says which tensors the vector holds.
- reshard-model_part-{0..7}.pt, as metaseq's reshard_fsdp writes them: the tensors themselves.
Before the long work only headers are read, and the small tensors, to be compared. Then each tensor
is assembled from its byte ranges and written; the memory needed is that of the two largest tensors.

Words: a Part (weights/formats.py) is a byte range of a file; the table is the embedding table. A
parameter `file` is a model_part's first file, for error messages.

Based on metaseq (projects/OPT/download_opt175b.md, metaseq/scripts/reshard_*.py) and on fairscale's
FullyShardedDataParallel, which pads and describes the flat vectors.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.arguments import positive
from cli.command import exit_code
from host.log import log
from host.memory import size_text
from layers.args import DTYPES
from layers.positions import LearnedPositions
from load import meta_model
from weights.allocation import stored_tensors
from weights.formats import Part, pickle_part, read_part
from weights.hf import model_args, split_name
from weights.saving import save_checkpoint
from weights.weight_files import PREPARED

FILE = re.compile(r"(?P<prefix>.+)-model_part-(?P<part>\d+)(-shard(?P<shard>\d+))?\.pt")
AGAIN = "download it again, and compare its md5sum with metaseq's opt175b_md5sum_shards.csv"
REPLICATED = None  # in the place of a dimension: every model_part holds the whole tensor
# Our module -> (metaseq's, the dimensions along which model_parts cut its weight and its bias).
MODULES = {
    "tok_embeddings": ("decoder.embed_tokens", 0, REPLICATED),
    "positions": ("decoder.embed_positions", REPLICATED, REPLICATED),
    "layers.N.attention.wqkv": ("decoder.layers.N.self_attn.qkv_proj", 0, 0),
    "layers.N.attention.wo": ("decoder.layers.N.self_attn.out_proj", 1, REPLICATED),
    "layers.N.feed_forward.w1": ("decoder.layers.N.fc1", 0, 0),
    "layers.N.feed_forward.w2": ("decoder.layers.N.fc2", 1, REPLICATED),
    "layers.N.attention_norm": ("decoder.layers.N.self_attn_layer_norm", REPLICATED, REPLICATED),
    "layers.N.ffn_norm": ("decoder.layers.N.final_layer_norm", REPLICATED, REPLICATED),
    "norm": ("decoder.layer_norm", REPLICATED, REPLICATED),
}
TABLE, HEAD = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
UNUSED = {HEAD, "decoder.version"}  # the head equals the table: check_same tests it

Slices = dict[str, "Slice"]  # of one model_part, by metaseq's names


@dataclass(frozen=True)
class Slice:
    """A model_part's slice of a tensor, or a whole tensor if it is REPLICATED: the byte ranges of
    its elements, in order."""

    shape: tuple[int, ...]
    ranges: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.ranges[0].dtype

    def rows(self, start: int, stop: int) -> "Slice":
        """Returns the rows from start to stop - 1. Nothing is read."""
        width = math.prod(self.shape[1:])
        ranges = cut(self.ranges, start * width, stop * width)
        return Slice((stop - start, *self.shape[1:]), ranges)

    def read(self) -> Tensor:
        """Returns the slice, read from its files, on the CPU."""
        flat = torch.empty(math.prod(self.shape), dtype=self.dtype)
        pieces = flat.split([part.numel for part in self.ranges])
        for part, piece in zip(self.ranges, pieces, strict=True):
            read_part(part, piece, stage=piece)  # nothing is staged: the dtype is the stored one
        return flat.view(self.shape)  # (N,) -> the tensor's shape


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor of our model: slices that are concatenated along the dimension `dim`."""

    slices: tuple[Slice, ...]
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.slices[0].dtype

    @property
    def widths(self) -> list[int]:
        """The sizes of the slices in the dimension `dim`."""
        return [piece.shape[self.dim] for piece in self.slices]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.slices[0].shape
        return *shape[: self.dim], sum(self.widths), *shape[self.dim + 1 :]

    def read(self) -> Tensor:
        """Returns the tensor, read slice by slice, on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for target, piece in zip(out.split(self.widths, self.dim), self.slices, strict=True):
            target.copy_(piece.read())
        return out


def convert(folder: Path, target: Path, heads: int | None, dtype: torch.dtype | None) -> Path:
    """Write target/model.pth and target/config.json; returns the path of the former.

    folder: of metaseq's files. heads: of attention; None: as the files say. dtype: of the result;
    None: as stored. Raises ValueError for files that are damaged, contradict one another or hold
    another model, and OSError.
    """
    files = find_files(folder)
    firsts = [shards[0] for shards in files]
    with tqdm(total=sum(map(len, files)), unit="file", desc="headers", delay=1) as bar:
        model_parts = [index_part(shards, bar) for shards in files]
    check_alike(model_parts, firsts)
    config = make_config(model_parts, firsts[0], heads)
    sources = find_sources(model_parts, firsts[0], config)
    tensors = {
        name: torch.empty(source.shape, dtype=dtype or source.dtype, device="meta")
        for name, source in sources.items()
    }
    config["dtype"] = str(tensors["tok_embeddings.weight"].dtype).removeprefix("torch.")
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    log(f"{folder}: {len(files)} model_parts of {len(files[0])} files, {len(tensors)} tensors")
    log(f"{target / PREPARED}: {size_text(nbytes)} to write")
    check_same(model_parts, firsts, sources)
    target.mkdir(parents=True, exist_ok=True)
    with tqdm(total=nbytes, unit="B", unit_scale=True) as bar:
        values = read_all(sources, tensors, bar)
        save_checkpoint(target / PREPARED, config, None, tensors, values)
    write_config(target / "config.json", config)
    log(
        "the release has no tokenizer: put vocab.json, merges.txt, tokenizer_config.json and "
        f"special_tokens_map.json of any facebook/opt-* model into {target}"
    )
    return target / PREPARED


def read_all(
    sources: dict[str, SlicedTensor], tensors: dict[str, Tensor], bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each tensor, for save_checkpoint. tensors: on the meta
    device, in the dtype that is written; the bar advances by their bytes."""
    for name, source in sources.items():
        yield name, source.read()
        bar.update(tensors[name].nbytes)


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a JSON file: completely or, if anything fails, not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, path)


def find_files(folder: Path) -> list[list[Path]]:
    """Returns the files of each model_part, in the order of their shards. Raises FileNotFoundError
    if some are missing, ValueError if there are two releases, or two files of one shard."""
    matches = [m for file in sorted(folder.glob("*.pt")) if (m := FILE.fullmatch(file.name))]
    if not matches:
        raise FileNotFoundError(
            f"{folder} holds no *-model_part-*.pt: give the folder with the files that Meta "
            "released, or that metaseq's reshard_fsdp wrote"
        )
    if len(prefixes := {m["prefix"] for m in matches}) > 1:
        raise ValueError(f"{folder} holds {' and '.join(sorted(prefixes))}: leave only one there")
    found: dict[tuple[int, int], Path] = {}  # (number of the model_part, of the shard) -> file
    for m in matches:
        key = int(m["part"]), int(m["shard"] or 0)
        if key in found:
            raise ValueError(f"{folder}: {found[key].name} and {m[0]} are one shard: leave one")
        found[key] = folder / m[0]
    n_parts, n_shards = (1 + max(numbers) for numbers in zip(*found, strict=True))
    grid = [[(part, shard) for shard in range(n_shards)] for part in range(n_parts)]
    if absent := [key for row in grid for key in row if key not in found]:
        listed = ", ".join(f"model_part-{part}-shard{shard}" for part, shard in absent[:5])
        raise FileNotFoundError(
            f"{folder} lacks {listed}{' and others' if len(absent) > 5 else ''}: metaseq's "
            "download_opt175b.sh -c goes on where a download stopped"
        )
    return [[found[key] for key in row] for row in grid]


def index_part(files: list[Path], bar: tqdm) -> Slices:
    """Read the headers of a model_part's files; returns its slices. bar: advances with each file.
    Raises OSError, and ValueError for files that metaseq did not write as the top of this file
    says."""
    headers = []
    for file in files:
        headers.append(read_header(file))
        bar.update()
    if "param_metadata" in (headers[0].get("shard_metadata") or {}):
        return index_flat(files, headers)
    model = headers[0]["model"]
    if len(files) > 1 or any("flat_param" in name for name in model):
        raise ValueError(
            f"{files[0]} holds flat vectors and no shard_metadata, which alone says what lies "
            "where: convert the files as they were downloaded, or reshard with --unflatten-weights"
        )
    parts = [stored(files[0], model, name) for name in model]
    return {part.name: Slice(part.shape, (part,)) for part in parts}


def index_flat(files: list[Path], headers: list[dict[str, Any]]) -> Slices:
    """Returns the slices of a model_part whose files each hold a piece of each flat vector.
    headers: of the files. Raises ValueError if files contradict one another, or are missing."""
    slices = {}
    layouts = [flat_vectors(header.get("shard_metadata") or {}) for header in headers]
    for vector, (shapes, _) in layouts[0].items():
        pieces: list[Part] = []
        for file, header, layout in zip(files, headers, layouts, strict=True):
            piece = stored(file, header["model"], vector)
            theirs, padding = layout.get(vector, ({}, 0))
            first = pieces[0] if pieces else piece
            if theirs != shapes or piece.dtype != first.dtype:
                raise ValueError(f"{file} and {files[0].name} disagree on {vector}: {AGAIN}")
            pieces += cut([piece], 0, piece.numel - padding)
        # Where each tensor begins in the vector, and the end of the last one.
        bounds = list(accumulate(map(math.prod, shapes.values()), initial=0))
        total = sum(piece.numel for piece in pieces)
        if total != bounds[-1]:
            raise ValueError(
                f"{files[0].parent}: the shards up to {files[-1].name} hold {total} numbers of "
                f"{vector} and should hold {bounds[-1]}: download the shards that are missing"
            )
        for (name, shape), (start, stop) in zip(shapes.items(), pairwise(bounds), strict=True):
            slices[name] = Slice(shape, cut(pieces, start, stop))
    return slices


def flat_vectors(metadata: dict[str, Any]) -> dict[str, tuple[dict[str, tuple[int, ...]], int]]:
    """Returns name of a flat vector -> (shapes of its tensors by name, in order; how many elements
    at the end of this file's piece are padding). metadata: shard_metadata of the file."""
    vectors = {}
    for module in metadata.get("param_metadata", ()):
        path = module["fsdp_path"] and module["fsdp_path"] + "."
        for name, param in module["params"].items():
            names = [path + tensor for tensor in param["names"]]
            shapes = dict(zip(names, map(tuple, param["shapes"]), strict=True))
            vectors[path + name] = shapes, param["padding"]
    return vectors


def cut(parts: Iterable[Part], start: int, stop: int) -> tuple[Part, ...]:
    """Returns the byte ranges of the elements start to stop - 1 of a vector that is stored in the
    byte ranges `parts`."""
    ranges, begin = [], 0  # begin: the number of the part's first element in the vector
    for part in parts:
        low, high = max(start, begin), min(stop, begin + part.numel)
        if low < high:
            offset = part.offset + (low - begin) * part.dtype.itemsize
            ranges.append(replace(part, offset=offset, shape=(high - low,)))
        begin += part.numel
    return tuple(ranges)


class Opaque:
    """Takes the place of every class in a pickle that torch does not allow, so that no code of the
    file is run. The files also hold training settings, whose classes need not be installed.
    """

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_header(file: Path) -> dict[str, Any]:
    """Load a file with its tensors on the meta device: {"model": tensors by name, ...}. Raises
    OSError, and ValueError for a file that is damaged or was not saved by metaseq."""
    try:
        unknown = set(get_unsafe_globals_in_checkpoint(file)) - {"argparse.Namespace"}
        with safe_globals([argparse.Namespace, *((Opaque, name) for name in unknown)]):
            header = torch.load(file, map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{file} cannot be read, it is truncated or corrupt: {AGAIN}") from error
    if not isinstance(header, dict) or not isinstance(header.get("model"), dict):
        raise ValueError(f"{file} has no 'model': it was not saved by metaseq")
    return header


def stored(file: Path, model: dict[str, Any], name: str) -> Part:
    """Returns the byte range of a tensor. model: the file's tensors by name. Raises ValueError if
    the tensor is missing or not contiguous in the file."""
    tensor = model.get(name)
    part = pickle_part(name, file, tensor) if isinstance(tensor, Tensor) else None
    if part is None or part.offset < 0:
        raise ValueError(f"{file} does not hold {name} as a contiguous tensor: {AGAIN}")
    return part


def check_alike(model_parts: list[Slices], files: list[Path]) -> None:
    """Raises ValueError if a tensor's slices differ in shape or dtype, or a model_part lacks one.
    files: the first file of each model_part."""
    for slices, file in zip(model_parts, files, strict=True):
        for name in sorted(model_parts[0].keys() | slices.keys()):
            first, other = describe(model_parts[0].get(name)), describe(slices.get(name))
            if first != other:
                raise ValueError(f"{name} is {other} in {file}, but {first} in {files[0]}: {AGAIN}")


def describe(piece: Slice | None) -> str:
    """Returns a slice's shape and dtype for an error message; None: the model_part has none."""
    return f"{list(piece.shape)} {piece.dtype}" if piece else "absent"


def make_config(model_parts: list[Slices], file: Path, heads: int | None) -> dict[str, Any]:
    """Returns a Hugging Face config, from the tensors' shapes and the settings in the file. heads:
    see convert. Raises FileNotFoundError if model_parts are missing, and ValueError if the number
    of heads is unknown or wrong."""
    stored_settings = settings(read_header(file))
    slices, n_parts = model_parts[0], len(model_parts)
    rows, dim = need(slices, TABLE, file).shape
    # out_proj is cut along its columns, so their number tells how many model_parts there should be.
    width = need(slices, "decoder.layers.0.self_attn.out_proj.weight", file).shape[1]
    if n_parts != dim // width:
        raise FileNotFoundError(
            f"{file.parent} holds {n_parts} of {dim // width} model_parts: download the others"
        )
    heads = heads or stored_settings.get("decoder_attention_heads")
    if not heads or dim % heads:
        raise ValueError(
            f"{file}: {dim} channels cannot be those of {heads or 'an unknown number of'} heads: "
            "give --heads, which is 96 for OPT-175B"
        )
    layers = [int(layer) for _, layer, _ in map(split_name, slices) if layer]
    positions = need(slices, "decoder.embed_positions.weight", file).shape[0]
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": rows * n_parts,  # with padding: 50272, as in the other OPTs
        "hidden_size": dim,
        "num_hidden_layers": stored_settings.get("decoder_layers") or 1 + max(layers),
        "num_attention_heads": heads,
        "ffn_dim": need(slices, "decoder.layers.0.fc1.weight", file).shape[0] * n_parts,
        "max_position_embeddings": positions - LearnedPositions.OFFSET,
        "activation_function": stored_settings.get("activation_fn") or "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def settings(header: dict[str, Any]) -> dict[str, Any]:
    """Returns the model's settings by name: those under "cfg", or under "args" as in fairseq's
    files; {} if there are none. header: as read_header returns it."""

    def fields(value: Any) -> dict[str, Any]:
        """Returns the fields of a dict or a Namespace; {} for any other value."""
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        return value if isinstance(value, dict) else {}

    return fields(fields(header.get("cfg")).get("model")) or fields(header.get("args"))


def need(slices: Slices, name: str, file: Path) -> Slice:
    """Returns the slice of this name. Raises ValueError if the model_part has none."""
    if name not in slices:
        raise ValueError(f"{file} lacks {name}, which an OPT has: {AGAIN}")
    return slices[name]


def find_sources(
    model_parts: list[Slices], file: Path, config: dict[str, Any]
) -> dict[str, SlicedTensor]:
    """Returns our tensor name -> SlicedTensor, for each tensor of the config's model. All
    model_parts have the same names (check_alike). Raises ValueError if a tensor is missing, of a
    wrong shape, or not part of the model."""
    sources, left = {}, set(model_parts[0]) - UNUSED
    for ours, (tensor, _) in stored_tensors(meta_model(model_args(config), None)).items():
        name, dim = place(ours)
        first = need(model_parts[0], name, file)
        sources[ours] = source = join([slices[name] for slices in model_parts], name, dim)
        if source.shape != tuple(tensor.shape):
            raise ValueError(
                f"{name} is {describe(first)} in {file}, {list(source.shape)} of all model_parts, "
                f"and should be {list(tensor.shape)}: {AGAIN}"
            )
        left.discard(name)
    if left:
        raise ValueError(f"{file} holds {min(left)}, which an OPT-175B has not: it cannot be run")
    return sources


def place(ours: str) -> tuple[str, int | None]:
    """Returns metaseq's name of our tensor, and the dimension along which model_parts cut it, or
    REPLICATED."""
    module, layer, kind = split_name(ours)
    theirs, weight_dim, bias_dim = MODULES[module]
    return f"{theirs.replace('N', layer)}.{kind}", bias_dim if kind == "bias" else weight_dim


def join(slices: list[Slice], name: str, dim: int | None) -> SlicedTensor:
    """Returns our tensor, made of a tensor's slices in all model_parts. name: metaseq's. dim: see
    place."""
    if dim is REPLICATED:
        return SlicedTensor((slices[0],), 0)
    if ".qkv_proj." in name:
        # In spite of its name a slice holds the rows of keys (0), of values (1), of queries (2).
        # Ours are all queries, all keys, all values, each in the order of the model_parts.
        rows = slices[0].shape[0] // 3
        slices = [s.rows(i * rows, (i + 1) * rows) for i in (2, 0, 1) for s in slices]
    return SlicedTensor(tuple(slices), dim)


def check_same(model_parts: list[Slices], files: list[Path], names: Iterable[str]) -> None:
    """Raises ValueError if model_parts differ in a replicated tensor, or if a model_part has an
    output head that is not the table. Reads these tensors; called before the long work.

    files: the first file of each model_part. names: ours, of all tensors.
    """
    whole = [name for name, dim in map(place, names) if dim is REPLICATED]
    for slices, file in zip(model_parts, files, strict=True):
        if HEAD in slices and not same(slices[HEAD], slices[TABLE]):
            raise ValueError(f"{file}: {HEAD} is not {TABLE}, which an OPT-175B uses: {AGAIN}")
        for name in whole:
            if not same(model_parts[0][name], slices[name]):
                raise ValueError(f"{name} is not the same in {files[0]} and {file}: {AGAIN}")


def same(a: Slice, b: Slice) -> bool:
    """Returns whether two slices have one shape and, up to float16's rounding, the same values.

    metaseq's own scripts only warn of a difference, and go on.
    """
    return a.shape == b.shape and torch.allclose(a.read(), b.read(), rtol=1e-3, atol=1e-5)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="metaseq's files")
    parser.add_argument("--output_dir", type=Path, help="default: checkpoint_dir")
    parser.add_argument("--heads", type=positive, help="default: as the files say; OPT-175B has 96")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    folder, dtype = args.checkpoint_dir, DTYPES.get(args.dtype)  # None without --dtype
    return exit_code(
        "convert_metaseq_opt175b.py",
        lambda: print(convert(folder, args.output_dir or folder, args.heads, dtype)),
        "stopped; nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main(parse_args()))

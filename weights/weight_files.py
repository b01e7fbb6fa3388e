"""Finds the files that hold the weights of a path, or raises an error that lists what is there.

Start at find_weights, then shards. Order of preference: this project's `model.pth`; the files that
transformers looks for, in its order, a single file before an index; then, as in vLLM and llama.cpp,
numbered shards without an index, or a single safetensors file of any name. Commands call this
before they import torch, so nothing here imports it.

Words: a shard is one of several files that hold a model's weights together; an index is a JSON file
whose weight_map tells which shard holds each tensor; a prepared model is a `model.pth`.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from host.files import read_object, short_text

PREPARED = "model.pth"
HUGGING_FACE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD = r"-\d{5}-of-(\d{5})"  # the end of a numbered shard's name; the group is their number
# A shard's name in an index: no path, and characters that every file system allows.
SHARD_NAME = re.compile(r"[\w .+-]{1,100}\.(safetensors|bin|pth|pt)")
NUMBERED = re.compile(rf"(.+){SHARD}(\.safetensors)|(pytorch_model){SHARD}(\.bin)")
# What the user can do, for error messages.
FILES = "download the *.safetensors files of its Hugging Face repository"
ORIGINAL = "download the Hugging Face repository of the unquantised model and use quantize.py"
AGAIN = "download it again"
# Files that cannot be read: pattern of the file name, what such a file is, what the user can do.
# The first match counts.
KINDS = (
    ("*.gguf", "a GGUF file of llama.cpp", ORIGINAL),
    ("consolidated*", "in its authors' own layout, without Hugging Face's names", FILES),
    ("*.onnx", "an ONNX model", FILES),
    ("tf_model.h5", "a TensorFlow model", FILES),
    ("flax_model*.msgpack", "a Flax model", FILES),
    ("*.npz", "an mlx or numpy archive", FILES),
    (
        "adapter_model.*",
        "a LoRA adapter, which is no whole model",
        "merge it into its base model (merge_and_unload of peft) and save that",
    ),
    ("tokenizer*", "part of a tokenizer, not of the weights", FILES),
    ("*.json", "no file of weights", "give the folder that it lies in"),
)
# Files that cannot be read, recognised by their first bytes: these bytes, what such a file is, what
# the user can do.
BEGINNINGS = (
    (b"GGUF", *KINDS[0][1:]),
    (
        b"version https://git-lfs",
        "a git-lfs pointer that stands for the file, and not the file itself",
        "run `git lfs pull` in its folder, or scripts/download.py",
    ),
    (b"<!doctype html", "a web page", f"{AGAIN}, from the file's own address"),
    (b"<html", "a web page", f"{AGAIN}, from the file's own address"),
    (b"\x89HDF", "a TensorFlow or Keras model", FILES),
)


def find_weights(path: str | Path, names: Iterable[str] = (PREPARED, *HUGGING_FACE)) -> Path:
    """Returns `path` if it is a file, else the path of a weight file in that directory.

    The file is the only one of its model, or the index of a model in shards, or the first shard
    where no index exists; `shards` lists all files of the model. names: standard file names, tried
    in order; a file with another name is used only if none of them exists (find_unnamed). Raises
    FileNotFoundError, which lists what the directory holds, and ValueError if it holds several
    models.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if path.is_dir() and (found := find_unnamed(path)):
        return found
    if path.is_dir() and (other := describe_unreadable(path)):
        raise FileNotFoundError(f"{path} holds no weights that can be read here: {other}")
    nearest = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    entries = sorted(p.name for p in nearest.iterdir() if p.name[0] != ".")[:12]
    prepared = sorted(str(p) for p in Path("checkpoints").rglob(PREPARED))[:12]
    raise FileNotFoundError(
        f"{path} {'holds no weights' if path.is_dir() else 'does not exist'}; "
        f"{nearest} holds: {', '.join(entries) or 'nothing'}; "
        f"prepared here: {', '.join(prepared) or 'none'}; ./scripts/prepare.sh REPO prepares one"
    )


def find_unnamed(folder: Path) -> Path | None:
    """Find weights in a folder that has no index and no file with a standard name.

    Returns the first of numbered shards (of *.bin files only pytorch_model-*), or the only
    safetensors file, or None. Raises ValueError if the folder holds several models.
    """
    for suffix in (".safetensors", ".bin"):
        # The first file of each model. Key: the groups of NUMBERED, which are equal for all shards
        # of one model, or the name of a file that is no shard.
        models: dict[Any, Path] = {}
        for file in sorted(folder.glob(f"*{suffix}")):
            shard = NUMBERED.fullmatch(file.name)
            hidden = file.name.startswith(".") or not file.is_file()  # macOS leaves ._model files
            may_be_weights = shard or suffix == ".safetensors"
            if may_be_weights and not hidden and not kind_by_name(file.name):
                models.setdefault(shard.groups() if shard else file.name, file)
        if len(models) > 1:
            listed = ", ".join(file.name for file in models.values())
            raise ValueError(f"{folder} holds several models ({listed}): give the path of one file")
        if models:
            return next(iter(models.values()))
    return None


def describe_unreadable(folder: Path) -> str | None:
    """Returns "FILE is KIND; REMEDY" for a file in the folder that cannot be read, or None.

    Called by find_weights, for the error message, if a folder has no weights that can be read. KIND
    and REMEDY come from KINDS.
    """
    names = sorted(file.name for file in folder.iterdir())
    for pattern, kind, remedy in KINDS[:-1]:  # without *.json: every model has a config.json
        if match := next((name for name in names if fnmatch(name, pattern)), None):
            return f"{match} is {kind}; {remedy}"
    return None


def kind_by_name(name: str) -> tuple[str, str] | None:
    """Returns (what the file is, what the user can do) for an error message, if KINDS has a pattern
    for this file name.

    None: the file may hold weights that can be read, or is an index of shards.
    """
    kinds = ((kind, remedy) for pattern, kind, remedy in KINDS if fnmatch(name, pattern))
    return None if name.endswith(".index.json") else next(kinds, None)


def check_readable(file: Path) -> None:
    """Raises ValueError if KINDS has a pattern for the file's name, or BEGINNINGS has its first
    bytes. The message says what the file is and what to do."""
    with file.open("rb") as f:  # a web page may begin with spaces, and in capitals
        beginning = f.read(64).lstrip().lower()
    kinds = (rest for magic, *rest in BEGINNINGS if beginning.startswith(magic.lower()))
    if match := next(kinds, None) or kind_by_name(file.name):
        kind, remedy = match
        raise ValueError(f"{file} is {kind}; {remedy}")


def shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """List all weight files of a checkpoint. path: its index, any numbered shard, or its only file.

    Returns the files, and the weight_map of the index (tensor name -> file name; {} without an
    index). Raises FileNotFoundError if a shard is missing, ValueError as check_readable does.
    """
    check_readable(path)
    owners: dict[str, str] = {}
    names = [path.name]
    if path.name.endswith(".index.json"):
        owners = weight_map(path)
        names = sorted(set(owners.values()))
    elif numbered := NUMBERED.fullmatch(path.name):
        # NUMBERED has two alternatives; the groups of the one that does not match are None.
        stem, total, suffix = filter(None, numbered.groups())
        names = [f"{stem}-{n:05}-of-{total}{suffix}" for n in range(1, int(total) + 1)]
    files = [path.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{path.parent} lacks {', '.join(missing[:5])}{more}, which {path.name} belongs with: "
            "run scripts/download.py again, it fetches what is missing"
        )
    for file in files:
        check_readable(file)
    return files, owners


def weight_map(index: Path) -> dict[str, str]:
    """Read the weight_map of an index: tensor name -> name of the file that holds the tensor.

    Raises ValueError if it is missing or empty, or if a file name contains a directory.
    """
    owners = read_json(index).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise ValueError(f"{index} has no weight_map: {AGAIN}")
    for tensor, file in owners.items():
        # A downloaded index must not make this program read files of other directories.
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise ValueError(
                f"{index}: weight_map puts {short_text(tensor)} into {short_text(file)}, which is "
                f"no name of a weight file beside it: {AGAIN}"
            )
    return owners


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that a checkpoint must have; returns its object.

    Raises FileNotFoundError, and ValueError for a file that holds no JSON object: its message says
    to download the file again.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it belongs beside the weights")
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from error

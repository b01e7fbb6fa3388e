"""Finds the files that hold the weights of a path, or says what is there instead.

Start at find_weights, then shards. The order is our `model.pth`, then that of transformers, which
prefers a single file to an index; then, as vLLM and llama.cpp do, numbered shards without an index,
and a single safetensors file of any name. Nothing here imports torch.
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
SHARD = r"-\d{5}-of-(\d{5})"
# A shard's name in an index: no path, and characters that every file system allows.
SHARD_NAME = re.compile(r"[\w .+-]{1,100}\.(safetensors|bin|pth|pt)")
NUMBERED = re.compile(rf"(.+){SHARD}(\.safetensors)|(pytorch_model){SHARD}(\.bin)")
FILES = "download the *.safetensors files of its Hugging Face repository"
ORIGINAL = "download the Hugging Face repository of the unquantised model and use quantize.py"
AGAIN = "download it again"
# Files that cannot be read: name pattern, what it is, what to do. The first match counts.
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
# The same by the first bytes of a file.
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
    """Returns the path if it is a file, else the weights in that directory.

    names: the file names to look for, in order, before other names (find_unnamed). Raises
    FileNotFoundError and ValueError, which say what is there instead.
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
    """Find weights without an index or a standard name.

    Returns the first of numbered shards, or the folder's only safetensors file. Raises ValueError
    if the folder holds several models.
    """
    for suffix in (".safetensors", ".bin"):
        groups: dict[Any, Path] = {}
        for file in sorted(folder.glob(f"*{suffix}")):
            numbered = NUMBERED.fullmatch(file.name)
            hidden = file.name.startswith(".") or not file.is_file()  # macOS leaves ._model files
            wanted = numbered or suffix == ".safetensors"
            if wanted and not hidden and not kind_by_name(file.name):
                groups.setdefault(numbered.groups() if numbered else file.name, file)
        if len(groups) > 1:
            listed = ", ".join(file.name for file in groups.values())
            raise ValueError(f"{folder} holds several models ({listed}): give the path of one file")
        if groups:
            return next(iter(groups.values()))
    return None


def describe_unreadable(folder: Path) -> str | None:
    """Returns a sentence about the first file in a folder whose kind cannot be read, or None."""
    names = sorted(file.name for file in folder.iterdir())
    for pattern, what, remedy in KINDS[:-1]:  # without *.json: every model has a config.json
        if found := next((name for name in names if fnmatch(name, pattern)), None):
            return f"{found} is {what}; {remedy}"
    return None


def kind_by_name(name: str) -> tuple[str, str] | None:
    """Returns what an unreadable file is and what to do, by its name; None: it may be weights."""
    kinds = ((what, remedy) for pattern, what, remedy in KINDS if fnmatch(name, pattern))
    return None if name.endswith(".index.json") else next(kinds, None)


def check_readable(file: Path) -> None:
    """Raises ValueError for a kind of file that cannot be read, by its first bytes or its name."""
    with file.open("rb") as opened:
        beginning = opened.read(64).lstrip().lower()
    kinds = (rest for magic, *rest in BEGINNINGS if beginning.startswith(magic.lower()))
    if found := next(kinds, None) or kind_by_name(file.name):
        what, remedy = found
        raise ValueError(f"{file} is {what}; {remedy}")


def shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """List the files of a checkpoint, given its index, a numbered shard or its only file.

    Returns the files, and the weight_map of the index (tensor name -> file name; {} without one).
    Raises FileNotFoundError where shards are missing.
    """
    check_readable(path)
    owners: dict[str, str] = {}
    names = [path.name]
    if path.name.endswith(".index.json"):
        owners = weight_map(path)
        names = sorted(set(owners.values()))
    elif numbered := NUMBERED.fullmatch(path.name):
        stem, total, suffix = filter(None, numbered.groups())
        names = [f"{stem}-{n:05}-of-{total}{suffix}" for n in range(1, int(total) + 1)]
    files = [path.parent / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise FileNotFoundError(
            f"{path.parent} lacks {', '.join(absent[:5])}{more}, which {path.name} belongs with: "
            "run scripts/download.py again, it fetches what is missing"
        )
    for file in files:
        check_readable(file)
    return files, owners


def weight_map(index: Path) -> dict[str, str]:
    """Read the weight_map of an index. Raises ValueError if a file name in it is a path."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map: {AGAIN}")
    for tensor, file in found.items():
        # An index is downloaded: it must not make this program read files elsewhere.
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise ValueError(
                f"{index}: weight_map puts {short_text(tensor)} into {short_text(file)}, which is "
                f"no name of a weight file beside it: {AGAIN}"
            )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file that is part of a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it belongs beside the weights")
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from error

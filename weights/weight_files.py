"""Which files hold the weights of a path; if there are none, an error says what lies there instead.

Start at find_weights, then shards. Our `model.pth` comes first, then transformers' order, in which
a whole file comes before an index. Two more are taken as vLLM and llama.cpp take them: numbered
files without an index, and one safetensors file under any name. Nothing here imports torch.
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
# A file in the folder of its index, by a name that every system takes.
SHARD_NAME = re.compile(r"[\w .+-]{1,100}\.(safetensors|bin|pth|pt)")
NUMBERED = re.compile(rf"(.+){SHARD}(\.safetensors)|(pytorch_model){SHARD}(\.bin)")
FILES = "download the *.safetensors files of its Hugging Face repository"
ORIGINAL = "download the Hugging Face repository of the unquantised model and use quantize.py"
AGAIN = "download it again"
# Names of what cannot be read here, what it is, and what to do; the first that matches counts.
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
# The same for how files begin, whatever they are called.
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
    """The file itself, the first of `names` in a directory, or the weights that lie there under
    another name. FileNotFoundError and ValueError say what is there instead."""
    path = Path(path)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if path.is_dir() and (found := other_names(path)):
        return found
    if path.is_dir() and (other := other_kind(path)):
        raise FileNotFoundError(f"{path} holds no weights that can be read here: {other}")
    nearest = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    entries = sorted(p.name for p in nearest.iterdir() if p.name[0] != ".")[:12]
    prepared = sorted(str(p) for p in Path("checkpoints").rglob(PREPARED))[:12]
    raise FileNotFoundError(
        f"{path} {'holds no weights' if path.is_dir() else 'does not exist'}; "
        f"{nearest} holds: {', '.join(entries) or 'nothing'}; "
        f"prepared here: {', '.join(prepared) or 'none'}; ./scripts/prepare.sh REPO prepares one"
    )


def other_names(folder: Path) -> Path | None:
    """Weights without an index or a standard name: the first file of a numbered set, or a folder's
    only safetensors file.

    Raises ValueError where several sets of weights lie there.
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


def other_kind(folder: Path) -> str | None:
    """What a folder holds that is known and cannot be read here, in words."""
    names = sorted(file.name for file in folder.iterdir())
    for pattern, what, remedy in KINDS[:-1]:  # a config.json alone says nothing
        if found := next((name for name in names if fnmatch(name, pattern)), None):
            return f"{found} is {what}; {remedy}"
    return None


def kind_by_name(name: str) -> tuple[str, str] | None:
    kinds = ((what, remedy) for pattern, what, remedy in KINDS if fnmatch(name, pattern))
    return None if name.endswith(".index.json") else next(kinds, None)


def refuse_other_kinds(file: Path) -> None:
    """ValueError for a file that is known to hold something else than weights we can read."""
    with file.open("rb") as opened:
        beginning = opened.read(64).lstrip().lower()
    kinds = (rest for magic, *rest in BEGINNINGS if beginning.startswith(magic.lower()))
    if found := next(kinds, None) or kind_by_name(file.name):
        what, remedy = found
        raise ValueError(f"{file} is {what}; {remedy}")


def shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the tensors, and what an index says about which file holds which.

    They are those that an index names, all of a numbered set, or else the file itself.
    """
    refuse_other_kinds(path)
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
        refuse_other_kinds(file)
    return files, owners


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index whose files all lie in its folder."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map: {AGAIN}")
    for tensor, file in found.items():
        # An index comes with a download: it must not name files elsewhere on this machine.
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise ValueError(
                f"{index}: weight_map puts {short_text(tensor)} into {short_text(file)}, which is no name of "
                f"a weight file beside it: {AGAIN}"
            )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that comes with the weights."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it belongs beside the weights")
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from error

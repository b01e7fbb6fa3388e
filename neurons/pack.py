"""A pack: the directory of neurons and predictors that --flash reads and flash.py writes.

Start at open_pack. A pack lies beside the checkpoint that it was made from. `neurons.bin` has one
record for each neuron (records.py), layer after layer, the most active neurons of a layer first;
`resident.pth` has the predictors and the biases and scales that stay in memory; `manifest.json`,
written last, has the record format, the figures of each layer and the hashes of both files.

Both files are read and compared with their hashes when the pack is first opened at its place, and
again when the size or date of one has changed since.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import Checkpoint, read_json
from host.files import write_whole
from model import ModelArgs
from neurons.records import RecordFormat

VERSION = 1
NEURONS_FILE, RESIDENT_FILE, MANIFEST_FILE = "neurons.bin", "resident.pth", "manifest.json"
HASHED_FILES = NEURONS_FILE, RESIDENT_FILE
HASH_CHUNK_BYTES = 2**24
FINGERPRINT_BYTES = 4096  # of each tensor


@dataclass(frozen=True)
class Pack:
    """An opened directory. Layers count from 0."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def neurons_path(self) -> Path:
        return self.directory / NEURONS_FILE

    @property
    def format(self) -> RecordFormat:
        fields = self.manifest["format"]
        dtype, matrices = getattr(torch, fields["dtype"]), tuple(fields["matrices"])
        return RecordFormat(**fields | {"dtype": dtype, "matrices": matrices})

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The figures of each layer (predictor.LearnedLayer.figures) and its predictor's rank."""
        return self.manifest["layers"]

    def resident(self) -> dict[str, Tensor]:
        """Return the tensors that stay in memory, by their names in the model."""
        return torch.load(self.directory / RESIDENT_FILE, mmap=True, weights_only=True)


def flash_directory(checkpoint: Checkpoint) -> Path:
    """Return the default directory of a checkpoint's pack."""
    name = checkpoint.path.name.partition(".safetensors")[0].removesuffix(".pth")
    return checkpoint.directory / f"{name}.flash"


def open_pack(directory: Path, checkpoint: Checkpoint) -> Pack:
    """Open the pack of a checkpoint.

    Raises FileNotFoundError if it is absent, ValueError if it was made from other weights or its
    files do not have their hashes.
    """
    remedy = f"run python flash.py --checkpoint_path {checkpoint.path} --calibration_file TEXT"
    check_relu(checkpoint.args)
    if not (directory / MANIFEST_FILE).is_file():
        raise FileNotFoundError(f"{directory} holds no neurons of this model: {remedy}")
    manifest = read_json(directory / MANIFEST_FILE)
    if (version := manifest.get("version")) != VERSION:
        raise ValueError(f"{directory} has format version {version}, not {VERSION}: {remedy}")
    if manifest["model"] != fingerprint(checkpoint):
        raise ValueError(
            f"{directory} was made from other weights than {checkpoint.path}: {remedy}"
        )
    verify_files(directory, manifest, remedy)
    return Pack(directory, manifest)


def check_relu(args: ModelArgs) -> None:
    """Raise ValueError for a model whose neurons are all active."""
    if args.activation != "relu":
        raise ValueError(
            f"--flash needs a ReLU model: this model's activation is {args.activation}, and all "
            "its neurons are active; --offload auto streams whole layers instead"
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash the model's shape and the first bytes of each feed-forward tensor."""
    digest = hashlib.blake2b(repr(checkpoint.args).encode(), digest_size=16)
    for name, record in sorted(checkpoint.records.items()):
        if ".feed_forward." not in name:
            continue
        for part in record.parts:
            digest.update(f"{name} {part.dtype} {part.shape}".encode())
            if part.held is None:
                with part.file.open("rb") as file:
                    file.seek(part.offset)
                    digest.update(file.read(min(FINGERPRINT_BYTES, part.nbytes)))
    return digest.hexdigest()


def verify_files(directory: Path, manifest: dict[str, Any], remedy: str) -> None:
    """Raise FileNotFoundError for an absent file, ValueError for a wrong hash.

    Files whose sizes and dates are those of the last verification are not read.
    """
    present = [name for name in HASHED_FILES if (directory / name).is_file()]
    if absent := set(HASHED_FILES).difference(present):
        raise FileNotFoundError(f"{directory} lacks {', '.join(sorted(absent))}: {remedy}")
    stamps = {name: size_and_date(directory / name) for name in present}
    if stamps == manifest.get("seen"):
        return
    total = sum(size for size, _ in stamps.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", delay=1) as bar:
        hashes = {name: hash_file(directory / name, bar.update) for name in present}
    if wrong := [name for name in present if hashes[name] != manifest["hashes"][name]]:
        raise ValueError(f"{directory / wrong[0]} is damaged: its hash is wrong: {remedy}")
    with suppress(OSError):  # a read-only directory is verified each time
        write_manifest(directory, manifest | {"seen": stamps})


def size_and_date(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def hash_file(file: Path, progress: Callable[[int], Any] = lambda nbytes: None) -> str:
    """Hash a file and drop it from the page cache. progress: called with bytes read."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        for chunk in iter(lambda: f.read(HASH_CHUNK_BYTES), b""):
            digest.update(chunk)
            progress(len(chunk))
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    write_whole(directory / MANIFEST_FILE, [json.dumps(manifest, indent=1)])

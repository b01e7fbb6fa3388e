"""A pack: the directory of neurons and predictors that --flash reads and flash.py writes.

Start at open_pack. A record holds the weights of one feed-forward neuron; a predictor names the
neurons that may be active for a token. By default a pack is next to the checkpoint that it was made
from. `neurons.bin` has one record for each neuron (records.py), layer after layer, a layer's most
active neurons first; `resident.pth` has the predictors and the biases and scales that stay in
memory; `manifest.json`, written last, has the record format, the figures of each layer and the
hashes of the two other files.

When a pack is opened, both files are read and compared with their hashes. The manifest then gets
their sizes and dates, and the next time unchanged files are not read.
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

from checkpoint import Checkpoint
from host.files import write_whole
from layers.args import ModelArgs
from neurons.records import RecordFormat
from weights.weight_files import read_json

VERSION = 1
NEURONS_FILE, RESIDENT_FILE, MANIFEST_FILE = "neurons.bin", "resident.pth", "manifest.json"
HASHED_FILES = NEURONS_FILE, RESIDENT_FILE
HASH_CHUNK_BYTES = 2**24  # bytes that are read at a time
VERIFIED_KEY = "seen"  # key of the manifest: sizes and dates of the files that were verified
FINGERPRINT_BYTES = 4096  # the bytes of each stored tensor that the fingerprint covers


@dataclass(frozen=True)
class Pack:
    """An opened pack. manifest: the contents of manifest.json."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def neurons_path(self) -> Path:
        return self.directory / NEURONS_FILE

    @property
    def format(self) -> RecordFormat:
        """How the weights of a neuron lie in a record."""
        fields = self.manifest["format"]
        dtype, matrices = getattr(torch, fields["dtype"]), tuple(fields["matrices"])
        return RecordFormat(**fields | {"dtype": dtype, "matrices": matrices})

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Figures of each layer: LearnedLayer.figures (calibration/predictor.py), and `rank`, the
        rank of its predictor."""
        return self.manifest["layers"]

    def resident(self) -> dict[str, Tensor]:
        """Return the pack's tensors that stay in memory, by their names in the model's state dict.

        They are mapped from the file, so they take memory only once they are copied.
        """
        return torch.load(self.directory / RESIDENT_FILE, mmap=True, weights_only=True)


def flash_directory(checkpoint: Checkpoint) -> Path:
    """Return the default directory of a checkpoint's pack: NAME.flash next to it."""
    name = checkpoint.path.name.partition(".safetensors")[0].removesuffix(".pth")
    return checkpoint.directory / f"{name}.flash"


def open_pack(directory: Path, checkpoint: Checkpoint) -> Pack:
    """Open the pack in a directory for use with this checkpoint, and verify its files.

    checkpoint: that of the model that will use the pack. Raises FileNotFoundError if the pack or
    one of its files is absent. Raises ValueError if the model has no ReLU, or the pack has another
    format version, was made from other weights, or is damaged. The messages, except the one for a
    model without ReLU, name the command that makes a pack.
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
    """Raise ValueError if the activation is not ReLU, which alone the kernels compute: behind most
    others all neurons are active. Called before a pack is made, and before one is opened."""
    if args.activation != "relu":
        raise ValueError(
            f"--flash needs a ReLU model: this model's activation is {args.activation}; "
            "--offload auto streams whole layers instead"
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of the model's args and its feed-forward weights, from which a pack is made.

    Of each stored part of a tensor (a fused tensor has several) it covers name, dtype, shape and
    the first FINGERPRINT_BYTES, so that it takes milliseconds. Of a part that was loaded into
    memory (part.tensor) it covers no bytes. The manifest has the fingerprint of the pack's
    checkpoint.
    """
    digest = hashlib.blake2b(repr(checkpoint.args).encode(), digest_size=16)
    for name, stored in sorted(checkpoint.tensors.items()):
        if ".feed_forward." not in name:
            continue
        for part in stored.parts:
            digest.update(f"{name} {part.dtype} {part.shape}".encode())
            if part.tensor is None:
                with part.file.open("rb") as file:
                    file.seek(part.offset)
                    digest.update(file.read(min(FINGERPRINT_BYTES, part.nbytes)))
    return digest.hexdigest()


def verify_files(directory: Path, manifest: dict[str, Any], remedy: str) -> None:
    """Raise FileNotFoundError if a file of the pack is absent, ValueError if its hash is wrong.

    manifest: that of the directory. remedy: the last clause of the message. Nothing is read if all
    sizes and dates are those of the last verification. Else both files are read, which takes long
    for a large pack, and their sizes and dates are written to manifest.json.
    """
    present = [name for name in HASHED_FILES if (directory / name).is_file()]
    if absent := set(HASHED_FILES).difference(present):
        raise FileNotFoundError(f"{directory} lacks {', '.join(sorted(absent))}: {remedy}")
    stamps = {name: size_and_date(directory / name) for name in present}
    if stamps == manifest.get(VERIFIED_KEY):
        return
    total = sum(size for size, _ in stamps.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", delay=1) as bar:
        hashes = {name: hash_file(directory / name, bar.update) for name in present}
    if wrong := [name for name in present if hashes[name] != manifest["hashes"][name]]:
        raise ValueError(f"{directory / wrong[0]} is damaged: its hash is wrong: {remedy}")
    with suppress(OSError):  # a read-only directory is verified each time
        write_manifest(directory, manifest | {VERIFIED_KEY: stamps})


def size_and_date(file: Path) -> list[int]:
    """Return the bytes of a file and its modification time in nanoseconds."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def hash_file(file: Path, progress: Callable[[int], Any] = lambda nbytes: None) -> str:
    """Return the hash of a file, and drop the file from the page cache, because it may fill all
    memory. progress: called with the number of bytes of each chunk that was read."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        for chunk in iter(lambda: f.read(HASH_CHUNK_BYTES), b""):
            digest.update(chunk)
            progress(len(chunk))
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json. The file is replaced as a whole, so no reader sees a part of it.
    flash.py calls this when the other files are complete; verify_files, to add sizes and dates."""
    write_whole(directory / MANIFEST_FILE, [json.dumps(manifest, indent=1)])

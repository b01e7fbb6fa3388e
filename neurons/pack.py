"""A model's feed-forward neurons on disk, with what is known of them: the files of --flash.

Start at open_pack. A pack is a directory beside the checkpoint that it was made from: `neurons.bin`
has a record for each neuron (neurons.py), layer after layer, and in each those neurons first that
are active most often; `resident.pth` has the predictors and what else stays in memory; and
`manifest.json`, written last, says what they are, and their hashes. flash.py writes it.

A pack is read whole and compared with its hashes when it is first opened where it lies, and again
whenever a file of it has another size or date than it had then.
"""

import hashlib
import json
import os
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
from neurons.records import Format

VERSION = 1
PIECE = 2**24  # bytes that are hashed at a time
SAMPLE = 4096  # bytes of each tensor, by which one checkpoint is told from another
FILES = "neurons.bin", "resident.pth"


@dataclass(frozen=True)
class Pack:
    """What the manifest of a directory says. Layers count from 0."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def neurons(self) -> Path:
        return self.directory / FILES[0]

    @property
    def format(self) -> Format:
        said = self.manifest["format"]
        dtype, matrices = getattr(torch, said["dtype"]), tuple(said["matrices"])
        return Format(**said | {"dtype": dtype, "matrices": matrices})

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What is known of each: predictor.Learned.figures, and the predictor's rank."""
        return self.manifest["layers"]

    def resident(self) -> dict[str, Tensor]:
        """By the names that they have in the model."""
        return torch.load(self.directory / FILES[1], mmap=True, weights_only=True)


def flash_directory(checkpoint: Checkpoint) -> Path:
    """Where the pack of a checkpoint is, unless another place is given."""
    name = checkpoint.path.name.partition(".safetensors")[0].removesuffix(".pth")
    return checkpoint.directory / f"{name}.flash"


def open_pack(directory: Path, checkpoint: Checkpoint) -> Pack:
    """Raises FileNotFoundError where there is none, and ValueError for one that belongs to other
    weights, or whose bytes are not those that were written."""
    remedy = (
        f"python flash.py --checkpoint_path {checkpoint.path} --calibration_file TEXT makes one"
    )
    check_sparse(checkpoint.args)
    if not (directory / "manifest.json").is_file():
        raise FileNotFoundError(f"{directory} holds no neurons of this model: {remedy}")
    manifest = read_json(directory / "manifest.json")
    if manifest.get("version") != VERSION:
        said = f"version {manifest.get('version')} of its format, and this is version {VERSION}"
        raise ValueError(f"{directory} is {said}: {remedy}")
    if manifest["model"] != fingerprint(checkpoint):
        raise ValueError(
            f"{directory} was made from other weights than {checkpoint.path}: {remedy}"
        )
    verify(directory, manifest, remedy)
    return Pack(directory, manifest)


def check_sparse(args: ModelArgs) -> None:
    """ValueError for a model whose neurons are all active."""
    if args.activation != "relu":
        raise ValueError(
            f"this model's activation is {args.activation}, behind which every neuron counts, so "
            "that none can be left on disk: --offload auto reads whole layers instead"
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of what a pack is made from: the shape, and a sample of each of its tensors."""
    digest = hashlib.blake2b(repr(checkpoint.args).encode(), digest_size=16)
    for name, record in sorted(checkpoint.records.items()):
        if ".feed_forward." in name:
            for part in record.parts:
                digest.update(f"{name} {part.dtype} {part.shape}".encode())
                if part.held is None:
                    with part.file.open("rb") as file:
                        file.seek(part.offset)
                        digest.update(file.read(min(SAMPLE, part.nbytes)))
    return digest.hexdigest()


def verify(directory: Path, manifest: dict[str, Any], remedy: str) -> None:
    """ValueError unless files are as the manifest says."""
    stamps = {name: stamp(directory / name) for name in FILES if (directory / name).is_file()}
    if absent := set(FILES) - stamps.keys():
        raise FileNotFoundError(f"{directory} lacks {', '.join(sorted(absent))}: {remedy}")
    if stamps == manifest.get("seen"):
        return
    sizes = {name: size for name, (size, _) in stamps.items()}
    total, found = sum(sizes.values()), {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", delay=1) as bar:
        for name in FILES:
            found[name] = hash_file(directory / name, bar.update)
    if wrong := [name for name in FILES if found[name] != manifest["hashes"][name]]:
        raise ValueError(f"{directory / wrong[0]} is damaged: its hash is wrong: {remedy}")
    with suppress(OSError):  # a directory that cannot be written to is verified each time
        write_manifest(directory, manifest | {"seen": stamps})


def stamp(file: Path) -> list[int]:
    said = file.stat()
    return [said.st_size, said.st_mtime_ns]


def hash_file(file: Path, progress: Any = lambda nbytes: None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        for piece in iter(lambda: f.read(PIECE), b""):
            digest.update(piece)
            progress(len(piece))
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    write_whole(directory / "manifest.json", [json.dumps(manifest, indent=1)])

"""Writes a `model.pth`: completely or, if anything fails, not at all.

Start at save_checkpoint. It writes a temporary file beside the target and renames it at the end.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from host.files import sync
from host.log import log
from host.memory import size_text
from weights.formats import write_aligned


def save_checkpoint(
    path: str | Path,
    config: dict[str, Any],
    scheme: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    values: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a `model.pth`.

    config: the keys of Hugging Face's config.json. scheme: the quantisation scheme. tensors: by
    our names. values: if given, only shapes and dtypes are taken from `tensors`, which may be on
    the meta device; each value is written as the iterable yields it, in any order, so that one is
    in memory at a time.
    Raises OSError, and ValueError where the disk is too small or values and tensors differ.
    """
    path = Path(path)
    check_checkpoint_writable(path)
    needed = sum(t.numel() * t.itemsize for t in tensors.values())
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise ValueError(f"{path} needs {size_text(needed)}, {size_text(free)} of disk is free")
    temporary = temporary_path(path)
    metadata = {"config": config, "scheme": scheme}
    try:
        write_aligned(temporary, metadata, tensors, tensors.items() if values is None else values)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def check_checkpoint_writable(path: Path) -> None:
    """Raises OSError if save_checkpoint cannot create its file. Call it before long work."""
    try:
        temporary_path(path).open("wb").close()
        temporary_path(path).unlink()
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}): it goes beside the model, so make that "
            "folder writable, or copy the model to one that is"
        ) from error


def log_replaced(path: Path) -> None:
    """Log the size and the date of the file that is about to be replaced, if it exists."""
    if path.exists():
        stat = path.stat()
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime))
        log(f"replaces {path} ({size_text(stat.st_size)}, {made})")

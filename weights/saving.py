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
    """Write a `model.pth`, which replaces an existing file only when it is complete.

    config: the keys of Hugging Face's config.json. scheme: the quantisation scheme; None for dense
    weights. tensors: by this project's names. values: None: `tensors` hold the values. Otherwise a
    pair of name and value for each of `tensors`, in any order: only one value is in memory at a
    time, and `tensors`, of which only shapes and dtypes are used, may be on the meta device.
    Raises OSError, and ValueError if the disk is too small, or if names or shapes of `values` are
    not those of `tensors`.
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
    finally:  # after an error; else the rename has moved the temporary file
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def check_checkpoint_writable(path: Path) -> None:
    """Raises OSError if a `model.pth` cannot be created at `path`. Call it before long work.

    It creates and removes the temporary file that save_checkpoint will write, and leaves a file at
    `path` as it is.
    """
    try:
        temporary_path(path).open("wb").close()
        temporary_path(path).unlink()
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}): it goes beside the model, so make that "
            "folder writable, or copy the model to one that is"
        ) from error


def log_replaced(path: Path) -> None:
    """Log the size and date of the file at `path`, if there is one. Call it before the file is
    replaced."""
    if path.exists():
        stat = path.stat()
        modified = time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime))
        log(f"replaces {path} ({size_text(stat.st_size)}, {modified})")

"""Saves measurements of this machine in the user's cache directory, for later runs.

Start at save_measurement. A measurement is a small JSON file; its name holds a hash of its key, all
that the value depends on. If the file cannot be written or read, the next run measures again.
kernels/cpu/build.py keeps what it compiles in the same directory.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from host.files import write_whole
from host.log import log


def cache_directory() -> Path | None:
    """Returns $XDG_CACHE_HOME/gpt-flex or ~/.cache/gpt-flex.

    None: the user has no home directory, as in a container where HOME is unset and the user has
    no entry in /etc/passwd. A relative path is ignored, as the XDG specification asks.
    """
    if (given := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return given / "gpt-flex"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "gpt-flex" if home.is_absolute() else None


def load_measurement(name: str, key: Any) -> Any:
    """Returns the value that was saved under this name and key, or None."""
    try:
        return json.loads(path_of(name, key).read_text())
    except (OSError, ValueError, AttributeError):  # AttributeError: there is no cache directory
        return None


def save_measurement(name: str, key: Any, value: Any) -> None:
    """Save a JSON value for later runs. If it cannot be written, log why."""
    file = path_of(name, key)
    reason = "there is no home directory; set XDG_CACHE_HOME"
    if file:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return write_whole(file, [json.dumps(value)])
        except OSError as error:
            reason = str(error)
    log(f"the measurement is not kept for later runs ({reason})")


def path_of(name: str, key: Any) -> Path | None:
    """Returns the file of a measurement; None: there is no cache directory."""
    folder = cache_directory()
    return folder and folder / f"{name}-{zlib.crc32(repr(key).encode()):08x}.json"

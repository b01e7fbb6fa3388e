"""Saves measurements of this machine in the user's cache directory, for later runs.

Start at save_measurement. A measurement is a small JSON file whose name contains a hash of its key.
The key holds everything that the value depends on, such as the device and the version of torch. If
the file cannot be written or read, the next run measures again. kernels/cpu/build.py keeps compiled
code in the same directory.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from host.files import write_whole
from host.log import log


def cache_directory() -> Path | None:
    """Returns $XDG_CACHE_HOME/gpt-flex, or ~/.cache/gpt-flex if the variable is unset or relative.

    None: the user has no home directory, as in a container where HOME is unset and the user has no
    entry in /etc/passwd. The XDG specification asks to ignore a relative path.
    """
    if (xdg_cache := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return xdg_cache / "gpt-flex"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "gpt-flex" if home.is_absolute() else None


def load_measurement(name: str, key: Any) -> Any:
    """Returns the value that save_measurement saved under this name and key; None if there is none,
    or the file cannot be read. A tuple comes back as a list, because JSON has no tuples."""
    try:
        return json.loads(path_of(name, key).read_text())
    except (OSError, ValueError, AttributeError):  # AttributeError: there is no cache directory
        return None


def save_measurement(name: str, key: Any, value: Any) -> None:
    """Save a JSON value for later runs. If it cannot be written, log the reason and go on.

    key: everything that the value depends on; load_measurement finds it only by an equal key.
    """
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
    # The hash of the key's text is the same in every process, unlike Python's hash().
    return folder and folder / f"{name}-{zlib.crc32(repr(key).encode()):08x}.json"

"""What was measured or compiled once for this machine, kept in the user's cache directory.

Start at save_measurement. A measurement is a small JSON file, named by what it depends on; one that cannot be
written is measured again by the next run, and a damaged one as well.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from host.files import write_whole
from host.log import log


def cache_directory() -> Path | None:
    """$XDG_CACHE_HOME/gpt-flex or ~/.cache/gpt-flex; None for a user without a home directory.

    It is looked up when it is needed: HOME may be unset, and a container's user may have no entry
    in /etc/passwd. The XDG specification ignores relative paths.
    """
    if (given := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return given / "gpt-flex"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "gpt-flex" if home.is_absolute() else None


def load_measurement(name: str, key: Any) -> Any:
    """What was kept under that name for an equal key; None if there is nothing usable."""
    try:
        return json.loads(path_of(name, key).read_text())
    except (OSError, ValueError, AttributeError):  # AttributeError: there is no cache directory
        return None


def save_measurement(name: str, key: Any, value: Any) -> None:
    """Keep a JSON value for later runs, or say why it is not kept."""
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
    folder = cache_directory()
    return folder and folder / f"{name}-{zlib.crc32(repr(key).encode()):08x}.json"

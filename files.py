"""Small text files: read with errors that name the file and the line, and written whole.

Start at read_text. Nothing here imports torch.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The model that is committed: what runs where none is named.
DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"
BOM = "\ufeff"  # some editors begin a file with this mark; it is no part of the text


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises ValueError naming the file, the line and the byte that is not UTF-8, and OSError.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            f"file (iconv -f LATIN1 -t UTF-8)"
        ) from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; ValueError, beginning with `where`, for what is no JSON."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises FileNotFoundError, and ValueError for a file that is no UTF-8, no JSON or no object.
    """
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} and not an object")
    return value


def write_whole(path: Path, pieces: Iterable[str]) -> None:
    """Write a text file: all of it or, whatever happens, nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(directory: Path) -> None:
    """A rename is durable once its directory is on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

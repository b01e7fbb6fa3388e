"""Small text files: read with errors that name the file and the line, and written whole.

Start at read_text. Nothing here imports torch.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The model that is committed: what runs where none is named.
DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
BOM = "\ufeff"  # some editors begin a file with this mark; it is no part of the text


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises ValueError naming the file, the line and the byte that is not UTF-8, and OSError.
    """
    return decode_utf8(path.read_bytes(), str(path))


def decode_utf8(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes; see read_text. where: the name of their source."""
    try:
        return content.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            f"file (iconv -f LATIN1 -t UTF-8)"
        ) from error


def without_surrogates(text: str) -> str:
    """A text that UTF-8 can hold: U+FFFD takes the place of half of a surrogate pair, which JSON
    may hold and which stands for a byte that is no UTF-8 in an argument of a command."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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


def short_json(value: Any) -> str:
    """A value as JSON writes it, on one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # it is from no JSON file
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def short_text(value: Any) -> str:
    """A name or a value of a file as a message shows it: printable, at most 80 characters."""
    text = value if isinstance(value, str) else short_json(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def json_text(value: Any, **options: Any) -> str:
    """JSON that UTF-8 can hold: half of a surrogate pair stays the escape that it is in JSON."""
    text = json.dumps(value, **{"ensure_ascii": False} | options)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_whole(path: Path, pieces: Iterable[str]) -> None:
    """Write a text file: all of it or, whatever happens, nothing. A device or a pipe is written as
    it is. Raises OSError naming the path.
    """
    try:
        write_in_place(path, pieces) if is_stream(path) else replace(path.resolve(), pieces)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raises OSError if write_whole could not write the path now."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file in it")
    if not is_stream(path):
        replaced = path.resolve()
        try:
            tempfile.TemporaryFile(dir=replaced.parent).close()
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error


def is_stream(path: Path) -> bool:
    """Whether the path is a device or a pipe, which can be neither replaced nor read again."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_in_place(path: Path, pieces: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def replace(path: Path, pieces: Iterable[str]) -> None:
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

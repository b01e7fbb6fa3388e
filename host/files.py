"""Reads text files, with errors that name the file and the line, and writes them atomically.

Start at read_text and write_whole. Nothing here imports torch.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The model in this repository: the default of --model.
DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
BOM = "\ufeff"  # byte order mark, which some editors write at the beginning of a file


def read_text(path: Path) -> str:
    """Read a UTF-8 file; returns its text without the byte order mark.

    Raises OSError, and ValueError with the file, the line and the byte that is not UTF-8.
    """
    return decode_utf8(path.read_bytes(), str(path))


def decode_utf8(content: bytes, where: str) -> str:
    """Decode UTF-8 and remove the byte order mark. Raises ValueError as read_text does.

    where: the name of the source, such as a file, for the error.
    """
    try:
        return content.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            f"file (iconv -f LATIN1 -t UTF-8)"
        ) from error


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD.

    JSON may contain them, and Python puts them into command-line arguments in place of bytes that
    are not UTF-8. A pair of surrogates becomes the character that it stands for.
    """
    # UTF-16 can encode surrogates, and its decoder takes a pair for one character.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON; returns the value. Raises ValueError, which begins with `where`, if the text is
    not valid JSON or nested too deeply.

    where: the subject of the error message, such as the file's path. NaN and Infinity, which
    Python's json accepts, are accepted.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; returns the object.

    Raises OSError, and ValueError if the file is not UTF-8, not JSON or not an object.
    """
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} and not an object")
    return value


def short_json(value: Any) -> str:
    """Returns a value as one line of JSON, cut at 60 characters, for error messages.

    A value that JSON cannot express is described by its type.
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # the value did not come from JSON
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def short_text(value: Any) -> str:
    """Returns a name or value that was read from a file as text for a message: printable, at most
    80 characters. Text with unprintable characters, such as escape codes, is escaped and quoted."""
    text = value if isinstance(value, str) else short_json(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def json_text(value: Any, **options: Any) -> str:
    """Returns a value as JSON that UTF-8 can encode: lone surrogates are escaped.

    options: those of json.dumps.
    """
    # backslashreplace writes a surrogate as \ud800, which is its escape in JSON, too.
    text = json.dumps(value, **{"ensure_ascii": False} | options)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_whole(path: Path, pieces: Iterable[str]) -> None:
    """Write pieces of text to a file, completely or, if anything fails, not at all.

    A device or a pipe is written directly, and keeps what was written before a failure. pieces: may
    be a generator, whose exceptions pass to the caller. Raises OSError with the path.
    """
    try:
        write_in_place(path, pieces) if is_stream(path) else replace(path.resolve(), pieces)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raises OSError if write_whole could not write the path. Call it before long work.

    Nothing is written to the path itself: to try, a file without a name is made in its directory.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file in it")
    if not is_stream(path):
        target = path.resolve()
        try:
            tempfile.TemporaryFile(dir=target.parent).close()
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error


def is_stream(path: Path) -> bool:
    """Returns whether the path is a device or a pipe, which a rename cannot replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_in_place(path: Path, pieces: Iterable[str]) -> None:
    """Write pieces of text to a path one after the other, without a temporary file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def replace(path: Path, pieces: Iterable[str]) -> None:
    """Write a temporary file in the same folder, then rename it to `path`.

    The rename is atomic: `path` has either its old content or all of the new one. path: no symbolic
    link, which the rename would replace: write_whole resolves it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # after an error; the rename has moved it otherwise


def sync(directory: Path) -> None:
    """Flush a directory to disk. Until then, a rename in it can be lost in a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

"""A file of weights as named byte ranges, in both formats that checkpoints come in.

Start at index_file: it reads a header only and says where each tensor lies, as a Part. read_part
brings the bytes to where they will stay, and write_aligned makes a torch.save file whose tensors
begin at multiples of 4096 bytes, so that mmap, O_DIRECT and reading a slice need no second copy.

safetensors: 8 bytes of header length, a JSON header, the data (github.com/huggingface/safetensors).
torch.save: a zip that stores a pickle and each tensor uncompressed; never unpickled beyond
weights_only.
"""

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config as serialization

from files import brief, parse_json

ALIGNMENT = 4096  # bytes; a page, and the block that O_DIRECT asks for
STAGING = 16 * 2**20  # bytes of the buffer that a tensor passes through to another dtype or device
LARGEST_CALL = 2**30  # bytes; Linux moves less than 2**31 in one call
DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
LARGEST_TENSOR = 2**48  # numbers, counting a dimension of zero as one
WRAPPERS = "state_dict", "model_state_dict", "model", "module"
Index = tuple[dict[str, Any], dict[str, "Part"]]  # metadata; tensors by name


@dataclass(frozen=True)
class Part:
    """A tensor as a file stores it: contiguous bytes, or held in memory where it has none."""

    name: str  # in the file
    file: Path
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    held: Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def is_block(self, dtype: torch.dtype) -> bool:
        """Whether it is of that dtype, and O_DIRECT can read it."""
        return self.dtype == dtype and self.offset % ALIGNMENT == 0


def index_file(file: Path) -> Index:
    """({"config": ..., "scheme": ...} of our own files, else {}; the tensors by name).

    Raises ValueError for a file that is truncated, corrupt, unsafe or of an unknown dtype.
    """
    return index_safetensors(file) if file.suffix == ".safetensors" else index_pickle(file)


def index_safetensors(file: Path) -> Index:
    size = file.stat().st_size
    with open(file, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if not 8 < start <= min(size, 8 + LARGEST_HEADER):
            raise ValueError(f"{file} is truncated or no safetensors file: download it again")
        text = f.read(start - 8)
    try:
        header = parse_json(text, "it")
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            check_entry(name, entry)
    except ValueError as error:
        raise unusable_header(file, error) from error
    parts = {name: safetensors_part(name, file, start, e) for name, e in header.items()}
    check_ranges(file, start, size, parts.values())
    return {}, parts


def unusable_header(file: Path, reason: object) -> ValueError:
    return ValueError(f"{file} has an unusable header ({reason}): download it again")


def check_entry(name: str, entry: Any) -> None:
    """ValueError for an entry of a header that does not describe a tensor."""
    described = isinstance(entry, dict)
    described = described and isinstance(entry.get("dtype"), str)
    described = described and all(sizes(entry.get(key)) for key in ("shape", "data_offsets"))
    if not described or len(entry["data_offsets"]) != 2:
        raise ValueError(f"{brief(name)} is {brief(entry)}")
    if math.prod(max(1, n) for n in entry["shape"]) > LARGEST_TENSOR:
        raise ValueError(f"{brief(name)} has the shape {brief(entry['shape'])}")


def sizes(value: Any) -> bool:
    """Whether it is a list of whole numbers, none below zero; true and false are none."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def safetensors_part(name: str, file: Path, start: int, entry: dict[str, Any]) -> Part:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{file}: the dtype {brief(entry['dtype'])} of {brief(name)} is not supported; "
            f"{', '.join(DTYPES)} "
            "are: download the model in one of them"
        )
    begin, end = entry["data_offsets"]
    part = Part(name, file, start + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != part.nbytes:
        fault = f"{brief(name)} is {brief(part.shape)} and lies in bytes {begin} to {end}"
        raise unusable_header(file, fault)
    return part


def check_ranges(file: Path, start: int, size: int, parts: Iterable[Part]) -> None:
    """ValueError where tensors do not fill the file, one after the other, as the format asks."""
    end = start
    for part in sorted(parts, key=lambda part: (part.offset, part.nbytes)):
        if part.offset != end:
            fault = f"{brief(part.name)} begins at byte {part.offset} and should begin at {end}"
            raise unusable_header(file, fault)
        end += part.nbytes
    if size != end:
        raise ValueError(f"{file} is {size} bytes long and should be {end}: download it again")


def index_pickle(file: Path) -> Index:
    """{"config", "scheme", "tensors"} as write_aligned makes it, or a bare state dict."""
    metadata, tensors = split_content(file, load_pickle(file, map_location="meta"))
    parts = {name: pickle_part(name, file, tensor) for name, tensor in tensors.items()}
    if not metadata and any(".wqkv." in name for name in parts):
        # gpt-fast's names are ours, but it rotates neighbouring channels where model.py rotates
        # halves: its file would load, and generate nonsense.
        raise ValueError(
            f"{file} is not of this project: make it from the Hugging Face files beside it, with "
            f"scripts/convert_hf_checkpoint.py --checkpoint_dir {file.parent}"
        )
    if any(part.offset < 0 for part in parts.values()):
        content = load_pickle(file, map_location="cpu", mmap=zipfile.is_zipfile(file))
        _, held = split_content(file, content)
        parts = {
            name: part if part.offset >= 0 else in_memory(part, held[name])
            for name, part in parts.items()
        }
    return metadata, parts


def in_memory(part: Part, tensor: Tensor) -> Part:
    """The part with its tensor, where the file has no bytes that are this tensor's in order."""
    if tensor.is_meta:
        raise ValueError(f"{part.file}: {brief(part.name)} was saved without its values (on meta)")
    return replace(part, held=tensor.detach())


def split_content(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about itself, {} unless it is ours, and its tensors."""
    metadata = {}
    if {"config", "scheme", "tensors"} <= content.keys():
        metadata = {key: value for key, value in content.items() if key != "tensors"}
        content = content["tensors"]
        if not isinstance(metadata["config"], dict) or not isinstance(content, dict):
            raise ValueError(f"{file}: 'config' and 'tensors' must be dicts: convert it again")
    else:  # a training checkpoint holds the weights under such a key
        wrapped = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if len(wrapped) > 1:
            raise ValueError(
                f"{file} holds weights under {' and '.join(wrapped)}: keep one of them"
            )
        content = content[wrapped[0]] if wrapped else content
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
    odd = [name for name in content if not isinstance(name, str)]
    odd += [name for name in content.keys() - tensors.keys() if metadata]
    if odd or not tensors:
        found = f"{brief(odd[0])}, which is no tensor with a name" if odd else "no tensors"
        raise ValueError(f"{file} holds {found}: a dict of tensors by name is needed")
    return metadata, tensors


def pickle_part(name: str, file: Path, tensor: Tensor) -> Part:
    """Offset -1: not contiguous, or in a file from before torch 1.6, which is no zip."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"{file}: {brief(name)} is no dense tensor: save its to_dense() or dequantize()"
        )
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    plain = start is not None and tensor.is_contiguous() and not tensor.is_neg()
    offset = start + tensor.storage_offset() * tensor.itemsize if plain else -1
    part = Part(name, file, offset, tensor.dtype, tuple(tensor.shape))
    if plain and offset + part.nbytes > min(file.stat().st_size, start + storage.nbytes()):
        raise ValueError(f"{file}: {name} ends beyond what is stored of it: download it again")
    return part


def load_pickle(file: Path, **options: Any) -> dict[str, Any]:
    try:
        content = torch.load(file, weights_only=True, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # an unpickler fed garbage raises whatever it stumbles over
        unsafe = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if unsafe:
            raise ValueError(
                f"{file} holds {unsafe[1]} where only tensors may be, which is refused because it "
                "could run code: use safetensors, or save a dict of nothing but tensors"
            ) from error
        if "meta tensor" in str(error) and options.get("map_location") == "meta":
            # torch 2.15 validates sparse tensors and fails on meta; pickle_part names them.
            return load_pickle(file, map_location="cpu", mmap=zipfile.is_zipfile(file))
        raise ValueError(
            f"{file} cannot be read: it is truncated or corrupt, or holds more than tensors, "
            "which is refused because it could run code; download it again, as safetensors "
            "where there is a choice"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dict of tensors")
    return content


def staging_buffer(device: torch.device) -> Tensor:
    """What read_part passes bytes through on their way to another dtype or to the device.

    One serves a whole load. A new one for each tensor would leave holes between the weights:
    the peak was 1.7 times their size in one load out of six.
    """
    return torch.empty(STAGING, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def read_part(part: Part, out: Tensor, stage: Tensor) -> None:
    """Fill `out`, flat and of the part's length, on any device and of any dtype.

    On the CPU and in the stored dtype the file is read into `out` itself.
    Raises ValueError where the file ends too early.
    """
    if part.held is not None:
        out.copy_(part.held.reshape(-1))
        return
    in_place = out.device.type == "cpu" and out.dtype == part.dtype
    stage = out if in_place else stage.view(part.dtype)
    with open(part.file, "rb", buffering=0) as f:
        for start in range(0, part.numel, max(1, len(stage))):
            piece = out[start : start + len(stage)]
            staged = stage[: len(piece)]
            moved = transfer(os.preadv, f, staged, part.offset + start * part.dtype.itemsize)
            if moved < staged.nbytes:
                raise ValueError(
                    f"{part.file} ends within {part.name}: download or convert it again"
                )
            if not in_place:
                piece.copy_(staged)


def rows_of(part: Part, rows: range) -> Part:
    """The same tensor, of which only some rows are looked at."""
    row_bytes = part.nbytes // part.shape[0]
    return replace(
        part,
        offset=part.offset + rows.start * row_bytes,
        shape=(len(rows), *part.shape[1:]),
        held=None if part.held is None else part.held[rows.start : rows.stop],
    )


def read_columns(part: Part, columns: range, out: Tensor, stage: Tensor) -> None:
    """Fill `out`, (rows, columns), with some columns of a matrix; see read_part. No more than that
    is read."""
    if part.held is not None:
        out.copy_(part.held[:, columns.start : columns.stop])
        return
    in_place = out.device.type == "cpu" and out.dtype == part.dtype
    staged = stage.view(part.dtype)
    count = len(out) if in_place else max(1, len(staged) // len(columns))
    size, at = part.dtype.itemsize, part.offset + columns.start * part.dtype.itemsize
    with open(part.file, "rb", buffering=0) as f:
        for start in range(0, len(out), count):
            piece = out[start : start + count]
            rows = piece if in_place else staged[: piece.numel()].view_as(piece)
            for n, row in enumerate(rows, start):
                if transfer(os.preadv, f, row, at + n * part.shape[1] * size) < row.nbytes:
                    raise ValueError(
                        f"{part.file} ends within {part.name}: download or convert it again"
                    )
            if not in_place:
                piece.copy_(rows)


def write_aligned(
    file: Path,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    values: Iterable[tuple[str, Tensor]],
) -> None:
    """A torch.save file of {**metadata, "tensors": tensors}, each tensor's bytes taken from values.

    Only shapes and dtypes are taken from `tensors`. One value is in memory at a time.
    Raises ValueError where the two do not match.
    """
    write_skeleton(file, metadata, tensors)
    _, parts = index_pickle(file)
    with open(file, "r+b", buffering=0) as f:
        for name, value in values:
            if name not in parts:
                raise ValueError(f"{name} was given twice, or is not among the tensors")
            part = parts.pop(name)
            if tuple(value.shape) != part.shape:
                raise ValueError(f"{name} has shape {list(value.shape)}, not {list(part.shape)}")
            value = value.detach().to("cpu", part.dtype).contiguous()
            transfer(os.pwritev, f, value, part.offset)
        if parts:
            raise ValueError(f"no value was given for {', '.join(parts)}")
        os.fsync(f.fileno())


def write_skeleton(file: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """All that torch.save writes but the tensors' bytes: a hole is left for each.

    The zip's checksums are those of nothing; torch's reader does not look at them.
    """
    with FakeTensorMode():
        holes = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu") for n, t in tensors.items()}
    aligned = serialization.patch("save.storage_alignment", ALIGNMENT)
    with aligned, torch.serialization.skip_data(materialize_fake_tensors=True):
        try:
            torch.save({**metadata, "tensors": holes}, file)
        except RuntimeError as error:  # what torch's zip writer makes of any failed call
            raise OSError(f"{file} cannot be written ({str(error).splitlines()[0]})") from error


def transfer(call: Callable[..., int], file: BinaryIO, tensor: Tensor, offset: int) -> int:
    """Read (os.preadv) or write (os.pwritev) the memory of a contiguous CPU tensor.

    Returns the bytes moved: fewer than the tensor's only where the file ends. Raises OSError naming
    the file, which the system's own does not.
    """
    view, done = memoryview(tensor.view(-1).view(torch.uint8).numpy()), 0
    while done < len(view):
        try:
            moved = call(file.fileno(), [view[done : done + LARGEST_CALL]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file.name)) from error
        if moved == 0:
            break
        done += moved
    return done

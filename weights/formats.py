"""The two file formats of checkpoints, safetensors and torch.save, as named byte ranges.

Start at index_file: it reads only the header and returns the offset, dtype and shape of each tensor
as a Part. read_part then reads a tensor's bytes into its final memory. write_aligned writes a
torch.save file whose tensors begin at multiples of 4096 bytes, as O_DIRECT needs.

safetensors: 8 bytes of header length, a JSON header, the data (github.com/huggingface/safetensors).
torch.save: a zip that holds a pickle and the uncompressed bytes of each tensor. Pickles are loaded
with weights_only, which cannot run code. Where this file says "pickle", it means a torch.save file.

Words: the header of a file is all that it holds but the bytes of the tensors; its metadata, which
only a `model.pth` has, is the config and the quantisation scheme; a storage is the memory, or the
range of a file, that one or more tensors are views of.
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
from torch.utils.serialization import config as serialization

from host.files import parse_json, short_text
from host.torch_private import fake_tensors, offset_in_file

ALIGNMENT_BYTES = 4096  # a page, and the block of O_DIRECT
STAGING_BYTES = 16 * 2**20  # buffer that bytes pass through on the way to another dtype or device
MAX_CALL_BYTES = 2**30  # Linux transfers less than 2**31 bytes in one call
DTYPES = {  # name in a safetensors header -> dtype
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
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_ELEMENTS = 2**48  # of a tensor, with zero dimensions counted as 1
# Keys under which training checkpoints hold the state dict.
WRAPPERS = "state_dict", "model_state_dict", "model", "module"
Index = tuple[dict[str, Any], dict[str, "Part"]]  # metadata; Part of each tensor by name


@dataclass(frozen=True)
class Part:
    """A tensor as a file stores it: contiguous bytes at an offset."""

    name: str  # in the file
    file: Path
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    # None: the values are in the file at `offset`. Otherwise this tensor holds them, because the
    # file does not store them contiguously, and `offset` means nothing.
    tensor: Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def is_aligned(self, dtype: torch.dtype) -> bool:
        """Returns whether the stored dtype is `dtype` and the offset fits reads with O_DIRECT."""
        return self.dtype == dtype and self.offset % ALIGNMENT_BYTES == 0


def index_file(file: Path) -> Index:
    """Read a file's header. Returns (metadata, parts): parts maps a tensor's name to its Part.

    metadata: {"config": ..., "scheme": ...} for a `model.pth` of this project, {} for other files.
    Raises ValueError for a file that is truncated, corrupt, unsafe or of an unknown dtype.
    """
    return index_safetensors(file) if file.suffix == ".safetensors" else index_pickle(file)


def index_safetensors(file: Path) -> Index:
    """Read the header of a safetensors file; see index_file. The metadata is {}.

    The header is checked as untrusted input: sizes, types and byte ranges. It begins after 8 bytes,
    which hold its length.
    """
    size = file.stat().st_size
    with open(file, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if not 8 < start <= min(size, 8 + MAX_HEADER_BYTES):
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
    """Returns the error for the caller to raise."""
    return ValueError(f"{file} has an unusable header ({reason}): download it again")


def check_entry(name: str, entry: Any) -> None:
    """Raises ValueError if an entry of a safetensors header does not describe a tensor.

    An entry is {"dtype": str, "shape": sizes, "data_offsets": [begin, end]}.
    """
    valid = isinstance(entry, dict)
    valid = valid and isinstance(entry.get("dtype"), str)
    valid = valid and all(are_sizes(entry.get(key)) for key in ("shape", "data_offsets"))
    if not valid or len(entry["data_offsets"]) != 2:
        raise ValueError(f"{short_text(name)} is {short_text(entry)}")
    if math.prod(max(1, n) for n in entry["shape"]) > MAX_ELEMENTS:
        raise ValueError(f"{short_text(name)} has the shape {short_text(entry['shape'])}")


def are_sizes(value: Any) -> bool:
    """Returns whether the value is a list of integers >= 0; bool is not accepted."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def safetensors_part(name: str, file: Path, start: int, entry: dict[str, Any]) -> Part:
    """Make the Part of an entry of a safetensors header, which check_entry has accepted.

    start: the offset of the data in the file. Raises ValueError for an unknown dtype, or if the
    byte range is not as long as dtype and shape need.
    """
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{file}: the dtype {short_text(entry['dtype'])} of {short_text(name)} is not "
            f"supported; {', '.join(DTYPES)} are: download the model in one of them"
        )
    begin, end = entry["data_offsets"]
    part = Part(name, file, start + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != part.nbytes:
        fault = f"{short_text(name)} is {short_text(part.shape)} and lies in bytes {begin} to {end}"
        raise unusable_header(file, fault)
    return part


def check_ranges(file: Path, start: int, size: int, parts: Iterable[Part]) -> None:
    """Raises ValueError unless the tensors fill the file without gaps or overlaps.

    start: the offset of the data, after the header. size: the bytes of the file.
    """
    end = start
    for part in sorted(parts, key=lambda part: (part.offset, part.nbytes)):
        if part.offset != end:
            fault = (
                f"{short_text(part.name)} begins at byte {part.offset} and should begin at {end}"
            )
            raise unusable_header(file, fault)
        end += part.nbytes
    if size != end:
        raise ValueError(f"{file} is {size} bytes long and should be {end}: download it again")


def index_pickle(file: Path) -> Index:
    """Read the header of a torch.save file; see index_file.

    The file holds a state dict, or write_aligned wrote it. Tensors whose bytes are not contiguous
    in the file are loaded here, into Part.tensor. Raises ValueError for a file of gpt-fast, too.
    """
    metadata, tensors = split_content(file, load_pickle(file, map_location="meta"))
    parts = {name: pickle_part(name, file, tensor) for name, tensor in tensors.items()}
    if not metadata and any(".wqkv." in name for name in parts):
        # A file of gpt-fast has our names, but its rotary positions pair neighbouring channels
        # and ours pair halves: it would load, and generate nonsense.
        raise ValueError(
            f"{file} is not of this project: make it from the Hugging Face files beside it, with "
            f"scripts/convert_hf_checkpoint.py --checkpoint_dir {file.parent}"
        )
    if any(part.offset < 0 for part in parts.values()):
        # mmap, which torch has for zip files only, reads just the tensors that are used.
        content = load_pickle(file, map_location="cpu", mmap=zipfile.is_zipfile(file))
        _, loaded = split_content(file, content)
        parts = {
            name: part if part.offset >= 0 else in_memory(part, loaded[name])
            for name, part in parts.items()
        }
    return metadata, parts


def in_memory(part: Part, tensor: Tensor) -> Part:
    """Returns a copy of a part whose offset is -1 (pickle_part), with its values in Part.tensor.

    tensor: the part's tensor, loaded. Raises ValueError if it was saved on the meta device.
    """
    if tensor.is_meta:
        raise ValueError(
            f"{part.file}: {short_text(part.name)} was saved without its values (on meta)"
        )
    return replace(part, tensor=tensor.detach())


def split_content(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the metadata of a loaded file, and its tensors by name.

    A file of this project (write_aligned) has them under "tensors", and metadata beside. In any
    other file the metadata is {}, and the state dict is the content itself or stands under one of
    WRAPPERS; its values that are no tensors are dropped. Raises ValueError for a name that is no
    text, a value in "tensors" that is no tensor, and a file without tensors.
    """
    metadata = {}
    if {"config", "scheme", "tensors"} <= content.keys():
        metadata = {key: value for key, value in content.items() if key != "tensors"}
        content = content["tensors"]
        if not isinstance(metadata["config"], dict) or not isinstance(content, dict):
            raise ValueError(f"{file}: 'config' and 'tensors' must be dicts: convert it again")
    else:
        wrapped = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if len(wrapped) > 1:
            raise ValueError(
                f"{file} holds weights under {' and '.join(wrapped)}: keep one of them"
            )
        content = content[wrapped[0]] if wrapped else content
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
    not_tensors = [name for name in content if not isinstance(name, str)]
    not_tensors += [name for name in content.keys() - tensors.keys() if metadata]
    if not_tensors or not tensors:
        found = (
            f"{short_text(not_tensors[0])}, which is no tensor with a name"
            if not_tensors
            else "no tensors"
        )
        raise ValueError(f"{file} holds {found}: a dict of tensors by name is needed")
    return metadata, tensors


def pickle_part(name: str, file: Path, tensor: Tensor) -> Part:
    """Make the Part of a tensor that was loaded onto the meta device with torch.load.

    Its offset is -1 if the tensor is not contiguous in the file, or if torch before 1.6 wrote the
    file, which then is no zip. Raises ValueError for a tensor that is sparse, quantised, or ends
    beyond the file's end.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"{file}: {short_text(name)} is no dense tensor: save its to_dense() or dequantize()"
        )
    storage = tensor.untyped_storage()
    start = offset_in_file(storage)
    # start None: no zip. is_neg: the file stores the negated values of the tensor.
    contiguous = start is not None and tensor.is_contiguous() and not tensor.is_neg()
    offset = start + tensor.storage_offset() * tensor.itemsize if contiguous else -1
    part = Part(name, file, offset, tensor.dtype, tuple(tensor.shape))
    if contiguous and offset + part.nbytes > min(file.stat().st_size, start + storage.nbytes()):
        raise ValueError(f"{file}: {name} ends beyond what is stored of it: download it again")
    return part


def load_pickle(file: Path, **options: Any) -> dict[str, Any]:
    """Load a dict with torch.load, without running code of the file. options: of torch.load.

    A file with sparse tensors may be loaded onto the CPU even if map_location is "meta". Raises
    OSError, MemoryError, and ValueError for a file that is damaged, unsafe or no dict.
    """
    try:
        content = torch.load(file, weights_only=True, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        unsafe = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if unsafe:
            raise ValueError(
                f"{file} holds {unsafe[1]} where only tensors may be, which is refused because it "
                "could run code: use safetensors, or save a dict of nothing but tensors"
            ) from error
        if "meta tensor" in str(error) and options.get("map_location") == "meta":
            # torch 2.15 checks the values of sparse tensors while it loads them, and fails on meta.
            # On the CPU it loads them, and pickle_part raises an error that names the tensor.
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
    """Returns a buffer that bytes pass through on their way to another dtype or to a GPU.

    device: where the tensors go; for a GPU the buffer is pinned. Use one buffer for a whole load:
    with a new one for each tensor, which fragments the heap between the weights, the peak of memory
    was 1.7 times the size of the weights in one load out of six.
    """
    pinned = device.type == "cuda"
    return torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def read_part(part: Part, out: Tensor, stage: Tensor) -> None:
    """Read a part into `out`, a contiguous vector of part.numel elements, on any device and of any
    dtype.

    If `out` is on the CPU and has the stored dtype, the file is read into it directly. Otherwise
    the bytes pass through `stage` (staging_buffer). Raises ValueError if the file is too short.
    """
    if part.tensor is not None:
        out.copy_(part.tensor.reshape(-1))
        return
    in_place = out.device.type == "cpu" and out.dtype == part.dtype
    stage = out if in_place else stage.view(part.dtype)
    with open(part.file, "rb", buffering=0) as f:
        for start in range(0, part.numel, max(1, len(stage))):  # a stage that is `out` may be empty
            piece = out[start : start + len(stage)]
            staged = stage[: len(piece)]
            moved = transfer(os.preadv, f, staged, part.offset + start * part.dtype.itemsize)
            check_complete(part, moved, staged)
            if not in_place:
                piece.copy_(staged)


def check_complete(part: Part, moved: int, target: Tensor) -> None:
    """Raises ValueError if fewer bytes were moved than `target` has: the file is too short.

    part: what was read into `target`, or a piece of it; for the message.
    """
    if moved < target.nbytes:
        raise ValueError(f"{part.file} ends within {part.name}: download or convert it again")


def rows_of(part: Part, rows: range) -> Part:
    """Returns a Part that holds only a range of the rows of `part`, which must have rows.

    rows: of step 1, within the part. Used by StoredTensor to read some rows of a tensor.
    """
    row_bytes = part.nbytes // part.shape[0]
    return replace(
        part,
        offset=part.offset + rows.start * row_bytes,
        shape=(len(rows), *part.shape[1:]),
        tensor=None if part.tensor is None else part.tensor[rows.start : rows.stop],
    )


def read_columns(part: Part, columns: range, out: Tensor, stage: Tensor) -> None:
    """Read a range of a matrix's columns into `out`, (rows, len(columns)), of any device and dtype.

    columns: of step 1, not empty. Each row is read by a call of its own, so no other bytes of the
    file are read. Rows of `out` are contiguous; `out` itself may be a slice. stage, errors: as in
    read_part.
    """
    if part.tensor is not None:
        out.copy_(part.tensor[:, columns.start : columns.stop])
        return
    in_place = out.device.type == "cpu" and out.dtype == part.dtype
    staged = stage.view(part.dtype)
    rows_per_copy = len(out) if in_place else max(1, len(staged) // len(columns))
    row_bytes = part.shape[1] * part.dtype.itemsize
    first = part.offset + columns.start * part.dtype.itemsize
    with open(part.file, "rb", buffering=0) as f:
        for start in range(0, len(out), rows_per_copy):
            piece = out[start : start + rows_per_copy]
            rows = piece if in_place else staged[: piece.numel()].view_as(piece)
            for n, row in enumerate(rows, start):
                check_complete(part, transfer(os.preadv, f, row, first + n * row_bytes), row)
            if not in_place:
                piece.copy_(rows)


def write_aligned(
    file: Path,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    values: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a torch.save file of {**metadata, "tensors": tensors}, whose tensors O_DIRECT can read.

    metadata: the config and the scheme. tensors: by name; only shapes and dtypes are used. values:
    a pair (name, tensor) for each of `tensors`, in any order; one value is in memory at a time, and
    is converted to the dtype in `tensors`. Raises ValueError if names or shapes differ, or a name
    comes twice.
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
    """Write a torch.save file as a sparse file, without the tensors' bytes.

    The file has the final size and all offsets; write_aligned then writes the bytes into it. The
    checksums of the zip are wrong afterwards, but torch.load does not check them.
    """
    with fake_tensors():
        # tensors without memory, for which torch.save leaves holes in the file
        holes = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu") for n, t in tensors.items()}
    aligned = serialization.patch("save.storage_alignment", ALIGNMENT_BYTES)
    with aligned, torch.serialization.skip_data(materialize_fake_tensors=True):
        try:
            torch.save({**metadata, "tensors": holes}, file)
        except RuntimeError as error:  # torch's zip writer raises it for every OSError
            raise OSError(f"{file} cannot be written ({str(error).splitlines()[0]})") from error


def transfer(call: Callable[..., int], file: BinaryIO, tensor: Tensor, offset: int) -> int:
    """Read a contiguous CPU tensor from a file, or write it to the file, at a byte offset.

    call: os.preadv or os.pwritev. Returns the number of bytes moved, fewer than the tensor's only
    if the file ends. Raises OSError with the file's name, which the system's error lacks.
    """
    # uint8, because numpy has no bfloat16.
    view, done = memoryview(tensor.view(-1).view(torch.uint8).numpy()), 0
    while done < len(view):
        try:
            moved = call(file.fileno(), [view[done : done + MAX_CALL_BYTES]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file.name)) from error
        if moved == 0:
            break
        done += moved
    return done

"""The tensors of a checkpoint's files, under this project's names.

Start at read_index, which merges the headers of all files; translate then renames Hugging Face's
tensors and groups those that this model stacks: q, k and v into wqkv, gate and up into w13.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weights import hf
from weights.formats import Part, index_file, read_columns, read_part, rows_of
from weights.weight_files import shards


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the model, stored as parts that are stacked along the first dimension.

    convert: makes this project's layout from a part of another; None: the layouts are the same.
    """

    parts: tuple[Part, ...]
    convert: Callable[[Tensor], Tensor] | None = None

    @property
    def pieces(self) -> list[Tensor]:
        """The converted parts, on the meta device: their shapes and dtypes."""
        stored = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in self.parts]
        pairs = zip(self.parts, stored, strict=True)
        return [self.converted(*pair) for pair in pairs] if self.convert else stored

    def converted(self, part: Part, stored: Tensor) -> Tensor:
        """Convert a part's tensor. Raises ValueError naming the file and the tensor."""
        try:
            return self.convert(stored)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{part.file}: {part.name} {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype if self.convert else self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first, *others = (tuple(piece.shape) for piece in self.pieces)
        return (first[0] + sum(o[0] for o in others), *first[1:]) if others else first

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def read_into(self, out: Tensor, stage: Tensor) -> None:
        """Read the whole tensor into `out`; see Checkpoint.read_into."""
        pieces = out.detach().view(-1).split([piece.numel() for piece in self.pieces])
        for part, piece in zip(self.parts, pieces, strict=True):
            if self.convert is None:
                read_part(part, piece, stage)
            else:
                piece.copy_(self._read_converted(part).flatten())

    def read_rows_into(self, rows: Iterable[range], out: Tensor, stage: Tensor) -> None:
        """Read ranges of rows into `out`, one after the other."""
        filled = 0
        for wanted in rows:
            first = 0  # row at which a part begins
            for part, piece in zip(self.parts, self.pieces, strict=True):
                start, stop = max(wanted.start, first), min(wanted.stop, first + len(piece))
                if start < stop:
                    within = range(start - first, stop - first)
                    self._read_rows(part, within, out[filled:][: len(within)], stage)
                    filled += len(within)
                first += len(piece)

    def _read_rows(self, part: Part, rows: range, out: Tensor, stage: Tensor) -> None:
        if self.convert is None:
            return read_part(rows_of(part, rows), out.view(-1), stage)
        out.copy_(self._read_converted(part)[rows.start : rows.stop])

    def read_columns_into(self, columns: range, out: Tensor, stage: Tensor) -> None:
        """Read a range of a matrix's columns into `out`."""
        first = 0  # row at which a part begins
        for part, piece in zip(self.parts, self.pieces, strict=True):
            rows = out[first : first + len(piece)]
            if self.convert is None:
                read_columns(part, columns, rows, stage)
            else:
                rows.copy_(self._read_converted(part)[:, columns.start : columns.stop])
            first += len(piece)

    def _read_converted(self, part: Part) -> Tensor:
        stored = torch.empty(part.shape, dtype=part.dtype)
        flat = stored.view(-1)  # nothing is staged: the dtype is the stored one
        read_part(part, flat, stage=flat)
        return self.converted(part, stored)

    def differences(self, name: str, tensor: Tensor) -> Iterator[str]:
        """Yields how the tensor differs from the model's of that name.

        A parameter may be stored in any floating-point dtype.
        """
        if self.shape != tuple(tensor.shape):
            yield f"{name} has shape {list(self.shape)} and should have {list(tensor.shape)}"
        weight = isinstance(tensor, nn.Parameter)
        for dtype in {piece.dtype for piece in self.pieces}:
            if not (dtype.is_floating_point if weight else dtype == tensor.dtype):
                wanted = "floating-point" if weight else str(tensor.dtype).removeprefix("torch.")
                yield f"{name} is {str(dtype).removeprefix('torch.')} and should be {wanted}"


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """Read the headers of all files of a checkpoint.

    Returns the metadata of our own file, {} for Hugging Face's, and the parts by their names in
    the files. Raises ValueError where two files hold a tensor of the same name.
    """
    files, owners = shards(path)
    metadata: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    for file in files:
        metadata, found = index_file(file)
        if metadata and len(files) > 1:
            raise ValueError(f"{file} is a whole model of this project, and no part of {path}")
        for name, part in found.items():
            other = parts.setdefault(name, part)
            if other is not part and owners.get(name) not in (file.name, other.file.name):
                raise ValueError(f"{name} lies in {other.file} and in {file}: remove one of them")
            if owners.get(name) == file.name:
                parts[name] = part
    if not parts:
        raise ValueError(f"{path} holds no tensors: download it again")
    return metadata, parts


def translate(parts: Iterable[Part], scheme: dict[str, Any] | None) -> dict[str, StoredTensor]:
    """Map Hugging Face's tensors to ours. scheme: of an int4 checkpoint in a foreign layout."""
    fields = {}
    if scheme:
        from weights.int4_layouts import foreign_fields  # only for a checkpoint in such a layout

        fields = foreign_fields(scheme["mode"], scheme["linears"]["groupsize"])
    tensors = {}
    for name, by_index in group_parts(parts).items():
        module, _, kind = name.rpartition(".")
        kind, convert = fields.get(kind, (kind, None))
        tensor = StoredTensor(tuple(part for _, part in sorted(by_index.items())), convert)
        check_stackable(name, tensor)
        tensors[f"{module}.{kind}"] = tensor
    return tensors


def group_parts(parts: Iterable[Part]) -> dict[str, dict[int, Part]]:
    """Group parts by our name and their index in it. Raises ValueError on duplicates."""
    found: dict[str, dict[int, Part]] = {}
    for part in parts:
        if place := hf.tensor_name(part.name):
            name, index = place
            if (other := found.setdefault(name, {}).setdefault(index, part)) is not part:
                raise ValueError(
                    f"{part.file}: {part.name} and {other.name} are one tensor's names"
                )
    return found


def check_stackable(name: str, tensor: StoredTensor) -> None:
    """Raises ValueError if the parts differ in more than their number of rows."""
    pieces = tensor.pieces
    if len(pieces) > 1 and not (pieces[0].dim() and len({p.shape[1:] for p in pieces}) == 1):
        shapes = ", ".join(f"{p.name} {list(p.shape)}" for p in tensor.parts)
        raise ValueError(f"{tensor.parts[0].file}: {name} cannot be put together from {shapes}")

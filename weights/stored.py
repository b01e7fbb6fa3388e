"""The tensors of a checkpoint's files, under this project's names.

Start at read_index, which merges the headers of all files; translate then renames Hugging Face's
tensors and groups those that this model stacks: q, k and v into wqkv, gate and up into w13.

Words: a Part (formats.py) is one tensor as a file stores it: a name, a file, an offset, a dtype and
a shape; its piece is the same tensor after conversion, some of the rows of our tensor; a packed
tensor is one of a GPTQ or AWQ layer, which int4_layouts.py converts; the index of a model in shards
is the JSON file whose weight_map tells which shard holds each tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from host.log import log_once
from weights import hf
from weights.formats import Part, index_file, read_columns, read_part, rows_of
from weights.weight_files import shards


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model: one or more parts in files, stacked along the first dimension.

    convert: a function from a part's stored tensor to this project's layout (int4_layouts.py); None
    if the layouts are the same. `stage` in the methods is a staging_buffer (formats.py): bytes pass
    through it if `out` is on another device or of another dtype than the file's.
    """

    parts: tuple[Part, ...]
    convert: Callable[[Tensor], Tensor] | None = None

    @property
    def pieces(self) -> list[Tensor]:
        """Returns the parts after conversion, as meta tensors: only their shapes and dtypes."""
        stored = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in self.parts]
        pairs = zip(self.parts, stored, strict=True)
        return [self.converted(*pair) for pair in pairs] if self.convert else stored

    def converted(self, part: Part, stored: Tensor) -> Tensor:
        """Returns `stored`, the tensor of this part, in this project's layout.

        `convert` must not be None. The message of a ValueError names the file and the tensor.
        """
        try:
            return self.convert(stored)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{part.file}: {part.name} {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype after conversion, of the first part; `differences` finds parts of another."""
        return self.pieces[0].dtype if self.convert else self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all pieces stacked."""
        first, *others = (tuple(piece.shape) for piece in self.pieces)
        return (first[0] + sum(o[0] for o in others), *first[1:]) if others else first

    @property
    def nbytes(self) -> int:
        """The bytes in the files, before conversion."""
        return sum(part.nbytes for part in self.parts)

    def read_into(self, out: Tensor, stage: Tensor) -> None:
        """Read the whole tensor into `out`: contiguous, of this shape, of any device and dtype."""
        pieces = out.detach().view(-1).split([piece.numel() for piece in self.pieces])
        for part, piece in zip(self.parts, pieces, strict=True):
            if self.convert is None:
                read_part(part, piece, stage)
            else:
                piece.copy_(self._read_converted(part).flatten())

    def read_rows_into(self, rows: Iterable[range], out: Tensor, stage: Tensor) -> None:
        """Read rows of the tensor into `out`, the ranges one after the other.

        rows: ranges of row numbers of the whole tensor; a range may span several parts. out:
        contiguous, with as many rows as all ranges together, or more, which stay as they are.
        Tensor parallelism calls this for the rows of a rank.
        """
        rows_read = 0
        for row_range in rows:
            part_start = 0  # number of the part's first row in the whole tensor
            for part, piece in zip(self.parts, self.pieces, strict=True):
                start = max(row_range.start, part_start)
                stop = min(row_range.stop, part_start + len(piece))
                if start < stop:
                    part_rows = range(start - part_start, stop - part_start)
                    self._read_rows(part, part_rows, out[rows_read:][: len(part_rows)], stage)
                    rows_read += len(part_rows)
                part_start += len(piece)

    def _read_rows(self, part: Part, rows: range, out: Tensor, stage: Tensor) -> None:
        """Read a range of one part's rows, counted within the part, into `out`.

        A part that needs conversion is read and converted completely.
        """
        if self.convert is None:
            return read_part(rows_of(part, rows), out.view(-1), stage)
        out.copy_(self._read_converted(part)[rows.start : rows.stop])

    def read_columns_into(self, columns: range, out: Tensor, stage: Tensor) -> None:
        """Read a range of a matrix's columns into `out`, (rows of the whole tensor, len(columns)).

        Columns are counted after conversion; a part that needs conversion is read and converted
        completely. Tensor parallelism calls this for a rank's columns.
        """
        part_start = 0  # number of the part's first row in the whole tensor
        for part, piece in zip(self.parts, self.pieces, strict=True):
            rows = out[part_start : part_start + len(piece)]
            if self.convert is None:
                read_columns(part, columns, rows, stage)
            else:
                rows.copy_(self._read_converted(part)[:, columns.start : columns.stop])
            part_start += len(piece)

    def _read_converted(self, part: Part) -> Tensor:
        """Read a whole part from its file; returns it converted, on the CPU."""
        stored = torch.empty(part.shape, dtype=part.dtype)
        values = stored.view(-1)  # read_part ignores stage here: `values` has the stored dtype
        read_part(part, values, stage=values)
        return self.converted(part, stored)

    def differences(self, name: str, tensor: Tensor) -> Iterator[str]:
        """Yield a sentence for each difference of shape or dtype between this tensor and `tensor`,
        the model's own. name: ours, of both. Checkpoint.check raises an error of these sentences.

        A parameter may be stored in any floating-point dtype; the dtypes of other tensors must be
        equal.
        """
        if self.shape != tuple(tensor.shape):
            stored = [part.name for part in self.parts if part.name != name]
            more = f" and {len(stored) - 3} more" if len(stored) > 3 else ""
            source = f" (the file has {', '.join(stored[:3])}{more} for it)" if stored else ""
            shapes = f"has shape {list(self.shape)} and should have {list(tensor.shape)}"
            yield f"{name} {shapes}{source}"
        floating = isinstance(tensor, nn.Parameter)  # quantised weights are buffers
        for dtype in {piece.dtype for piece in self.pieces}:
            if not (dtype.is_floating_point if floating else dtype == tensor.dtype):
                expected = (
                    "floating-point" if floating else str(tensor.dtype).removeprefix("torch.")
                )
                yield f"{name} is {str(dtype).removeprefix('torch.')} and should be {expected}"


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """Read the headers of all files of a checkpoint.

    path: the index, any numbered shard, or the only weight file of a checkpoint, and not its
    directory: find_weights chooses the file.
    Returns (metadata, parts). metadata: see formats.index_file; {} for Hugging Face's files. parts:
    name in the files -> Part. Raises ValueError if two files hold a tensor of the same name and the
    index does not tell which one counts, for a file of this project among shards, and for files
    without tensors.
    """
    files, owners = shards(path)  # owners: the index's weight_map, tensor name -> file name
    metadata: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    for file in files:
        metadata, file_parts = index_file(file)
        if metadata and len(files) > 1:
            raise ValueError(f"{file} is a whole model of this project, and no part of {path}")
        for name, part in file_parts.items():
            other = parts.setdefault(name, part)
            if other is not part and owners.get(name) not in (file.name, other.file.name):
                raise ValueError(f"{name} lies in {other.file} and in {file}: remove one of them")
            if owners.get(name) == file.name:
                parts[name] = part
    if not parts:
        raise ValueError(f"{path} holds no tensors: download it again")
    return metadata, parts


def translate(
    parts: Iterable[Part], scheme: dict[str, Any] | None, names: hf.Names
) -> dict[str, StoredTensor]:
    """Map the tensors of Hugging Face's files to this project's: name -> StoredTensor.

    names: the family's table, see Names in families/shared.py. scheme: the quantisation scheme of a
    GPTQ or AWQ checkpoint (foreign_scheme), whose packed tensors are converted; None: no tensor is
    packed. Raises ValueError if parts cannot be stacked.
    """
    # Kind of a packed tensor, such as "qweight" -> (our kind, such as "weight", and convert).
    fields = {}
    if scheme:
        from weights.int4_layouts import foreign_fields  # only for a checkpoint in such a layout

        fields = foreign_fields(scheme["mode"], scheme["linears"]["groupsize"])
    tensors = {}
    for name, numbered in group_parts(parts, names).items():
        module, _, kind = name.rpartition(".")
        kind, convert = fields.get(kind, (kind, None))
        tensor = StoredTensor(tuple(part for _, part in sorted(numbered.items())), convert)
        check_stackable(name, tensor)
        tensors[f"{module}.{kind}"] = tensor
    return tensors


def group_parts(parts: Iterable[Part], names: hf.Names) -> dict[str, dict[int, Part]]:
    """Returns our tensor name -> {number of the part in the stacked tensor -> Part}.

    parts: with Hugging Face's names. names: see translate. Tensors that are not weights of the
    language model are left out (hf.tensor_name). Raises ValueError if two parts have the same name
    and number here, as those of one tensor that was saved twice under different prefixes.
    """
    groups: dict[str, dict[int, Part]] = {}
    parts = list(parts)
    skipped = sum(part.nbytes for part in parts if hf.of_encoder(part.name))
    if skipped:
        log_once(
            f"{skipped / 2**20:.0f} MiB of vision tensors are skipped: the model reads text only"
        )
    for part in parts:
        if target := hf.tensor_name(part.name, names):
            name, number = target
            if (other := groups.setdefault(name, {}).setdefault(number, part)) is not part:
                raise ValueError(
                    f"{part.file}: {part.name} and {other.name} are one tensor's names"
                )
    return groups


def check_stackable(name: str, tensor: StoredTensor) -> None:
    """Raises ValueError if the parts of a tensor differ in more than their number of rows, or have
    no rows, so that they cannot be stacked. A single part is always valid. name: the tensor's, for
    the message."""
    pieces = tensor.pieces
    if len(pieces) > 1 and not (pieces[0].dim() and len({p.shape[1:] for p in pieces}) == 1):
        shapes = ", ".join(f"{p.name} {list(p.shape)}" for p in tensor.parts)
        raise ValueError(f"{tensor.parts[0].file}: {name} cannot be put together from {shapes}")

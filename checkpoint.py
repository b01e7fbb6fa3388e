"""A path to a model's config, quantisation scheme and tensors, each known by where it lies.

Start at Checkpoint. It reads only headers when made: our `model.pth`, Hugging Face's safetensors
or .bin, in one file or in shards, all become one table, our tensor name -> StoredTensor. load_into then
reads each tensor once, straight to where it will stay. save_checkpoint writes `model.pth`.
File formats are in formats.py, Hugging Face's names in hf.py.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from host.files import sync
from host.log import log
from host.memory import check_memory, page_aligned, size_text
from quant.linear import checked_scheme
from weights import hf
from weights.formats import (
    Part,
    index_file,
    read_columns,
    read_part,
    rows_of,
    staging_buffer,
    write_aligned,
)
from weights.weight_files import find_weights, read_json, shards

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What a tensor that is missing may mean.
HINTS = {"output.weight": ", unless lm_head is the embedding: tie_word_embeddings is true then"}
COMPARED_BYTES = 2**22  # bytes of two tables that are read and compared at a time
Home = Callable[[str, torch.Size, torch.dtype], Tensor | None]  # memory for a tensor; see allocate


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model: the parts that files store, stacked along the first dimension.

    translate: what makes ours of a part, None where it is stored as it is here.
    """

    parts: tuple[Part, ...]
    translate: Callable[[Tensor], Tensor] | None = None

    @property
    def pieces(self) -> list[Tensor]:
        """What is stacked, on the meta device."""
        stored = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in self.parts]
        pairs = zip(self.parts, stored, strict=True)
        return [self.made_of(*pair) for pair in pairs] if self.translate else stored

    def made_of(self, part: Part, stored: Tensor) -> Tensor:
        """Ours of a part as it is stored. ValueError naming file and tensor where it cannot be."""
        try:
            return self.translate(stored)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{part.file}: {part.name} {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype if self.translate else self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first, *others = (tuple(piece.shape) for piece in self.pieces)
        return (first[0] + sum(o[0] for o in others), *first[1:]) if others else first

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Checkpoint:
    """What a path holds: config, args, scheme (None: not quantised) and records by our names.

    path: a directory (its model.pth, else its Hugging Face weights), or one of those files.
    Raises FileNotFoundError saying what is there instead, and ValueError for a file that is
    truncated, corrupt, unsafe or of an unsupported kind.
    """

    def __init__(self, path: str | Path):
        self.path = find_weights(path)
        self.directory = self.path.parent  # where config.json and the tokenizer lie
        metadata, parts = read_parts(self.path)
        if metadata:
            self.config, self.scheme = metadata["config"], self.own_scheme(metadata["scheme"])
        else:
            self.config = read_json(self.directory / "config.json")
            self.scheme = self.foreign_scheme(parts)
        self.args = hf.model_args(self.config)
        if metadata:
            self.tensors = {name: StoredTensor((part,)) for name, part in parts.items()}
        else:
            self.tensors = translate(parts.values(), self.scheme)
            self.drop_idle()
            if self.args.tied and "output.weight" in self.tensors:
                self.settle_head()
        self.args = hf.with_stored_biases(self.args, self.tensors, self.path)

    def own_scheme(self, found: Any) -> dict[str, Any] | None:
        try:
            return checked_scheme(found)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; convert or quantise it again") from error

    def foreign_scheme(self, parts: Iterable[str]) -> dict[str, Any] | None:
        packed = any(name.endswith(".qweight") for name in parts)
        try:
            from weights.int4_layouts import foreign_scheme, quantization_config

            found = quantization_config(self.config, self.directory, packed)
            return found and foreign_scheme(found)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def settle_head(self) -> None:
        """Drop the output head if it equals the embedding, which may also be stored under the
        head's name alone. If they differ, use both, though the config ties them, as transformers 5
        does."""
        self.tensors.setdefault("tok_embeddings.weight", self.tensors["output.weight"])
        if self.equal("tok_embeddings.weight", "output.weight"):
            del self.tensors["output.weight"]
            return
        self.config = self.config | {"tie_word_embeddings": False}
        self.args = replace(self.args, tied=False)
        log_once(
            f"{self.path}: the output head differs from the embedding, and both are used, though "
            "tie_word_embeddings in config.json is true"
        )

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices hold the same numbers; reads up to the first difference."""
        a, b = self.tensors[one], self.tensors[other]
        if a is b or a.shape != b.shape or len(a.shape) != 2:
            return a is b
        dtype, stage = torch.promote_types(a.dtype, b.dtype), staging_buffer(torch.device("cpu"))
        rows, step = a.shape[0], max(1, COMPARED_BYTES // max(1, a.shape[1] * dtype.itemsize))
        pair = torch.empty(2, step, a.shape[1], dtype=dtype)
        for start in range(0, rows, step):
            some = range(start, min(start + step, rows))
            for name, out in zip((one, other), pair, strict=True):
                self.read_rows_into(name, [some], out, stage)
            if not torch.equal(*pair[:, : len(some)]):
                return False
        return True

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the weights, or of what is not quantised of them."""
        if self.scheme:
            return self.tensors["tok_embeddings.weight"].dtype
        sizes = Counter()
        for record in self.tensors.values():
            sizes[record.dtype] += record.nbytes * record.dtype.is_floating_point
        return max(sizes, key=sizes.get)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor on the CPU; dtype None: as stored."""
        record = self.tensors[name]
        out = torch.empty(record.shape, dtype=dtype or record.dtype, device="cpu")
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, stage: Tensor | None = None) -> None:
        """Fill `out`, contiguous and of the record's shape, on any device and of any dtype.

        On the CPU and in the stored dtype the file is read into `out` itself. Else the bytes
        pass through `stage`, a staging_buffer to be shared by the tensors of one thread.
        Raises ValueError where the file ends too early.
        """
        record = self.tensors[name]
        pieces = out.detach().view(-1).split([piece.numel() for piece in record.pieces])
        stage = staging_buffer(out.device) if stage is None else stage
        for part, piece in zip(record.parts, pieces, strict=True):
            if record.translate is None:
                read_part(part, piece, stage)
            else:
                stored = torch.empty(part.shape, dtype=part.dtype)
                read_part(part, stored.view(-1), stage)
                piece.copy_(record.made_of(part, stored).flatten())
        self.check_scales(name, out)

    def check_scales(self, name: str, values: Tensor) -> None:
        """ValueError for scales that would make their weights infinite or NaN."""
        if name.endswith(".scales") and not values.isfinite().all():
            file = self.tensors[name].parts[0].file
            raise ValueError(
                f"{file}: {name} holds NaN or infinity: download or quantise the model again"
            )

    def read_rows_into(self, name: str, rows: Iterable[range], out: Tensor, stage: Tensor) -> None:
        """Fill `out`, see read_into, with ranges of the tensor's rows, one after the other."""
        record, filled = self.tensors[name], 0
        for wanted in rows:
            first = 0  # row of a part
            for part, piece in zip(record.parts, record.pieces, strict=True):
                end = first + len(piece)
                start, stop = max(wanted.start, first), min(wanted.stop, end)
                if start < stop:
                    within = range(start - first, stop - first)
                    self._read_rows(record, part, within, out[filled:][: len(within)], stage)
                    filled += len(within)
                first = end
        self.check_scales(name, out)

    def _read_rows(
        self, record: StoredTensor, part: Part, rows: range, out: Tensor, stage: Tensor
    ) -> None:
        if record.translate is None:
            return read_part(rows_of(part, rows), out.view(-1), stage)
        out.copy_(self._translated(record, part)[rows.start : rows.stop])

    def _translated(self, record: StoredTensor, part: Part) -> Tensor:
        stored = torch.empty(part.shape, dtype=part.dtype)
        read_part(part, stored.view(-1), stored.view(-1).view(torch.uint8))
        return record.made_of(part, stored)

    def read_columns_into(self, name: str, columns: range, out: Tensor, stage: Tensor) -> None:
        """Fill `out`, see read_into, with some of a matrix's columns."""
        record, first = self.tensors[name], 0
        for part, piece in zip(record.parts, record.pieces, strict=True):
            rows = out[first : first + len(piece)]
            if record.translate is None:
                read_columns(part, columns, rows, stage)
            else:
                rows.copy_(self._translated(record, part)[:, columns.start : columns.stop])
            first += len(piece)
        self.check_scales(name, out)

    def load_into(
        self,
        model: nn.Module,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Give a model built on the meta device its weights; each is allocated once.

        dtype is that of floating-point parameters, None: as stored; buffers and integers keep
        the dtype that the model declares. progress is called with the bytes read of each tensor.
        Raises ValueError as `check` does, MemoryError before anything is allocated.
        """
        self.check(model)
        fill = self.fill_function(torch.device(device), progress)
        allocate(model, device, dtype or self.dtype, fill)

    def fill_function(
        self, device: torch.device, progress: Callable[[int], Any] | None = None
    ) -> Callable[[str, Tensor], None]:
        """What gives tensors on a device, or on the CPU, their values."""
        stage = staging_buffer(device)

        def fill(name: str, tensor: Tensor) -> None:
            self.read_into(name, tensor, stage)
            if progress:
                progress(self.tensors[name].nbytes)

        return fill

    def location(self, name: str, dtype: torch.dtype) -> tuple[Path, int] | None:
        """The file and the offset where a tensor of that dtype lies by itself, a block's beginning;
        None where there is no such place."""
        part, *others = self.tensors[name].parts
        ours = not others and self.tensors[name].translate is None and part.held is None
        return (part.file, part.offset) if ours and part.is_block(dtype) else None

    def drop_idle(self) -> None:
        """Forget what other tools write and says nothing: groups in order, biases of zero.

        Raises ValueError for groups that are not in order.
        """
        biased = {"attention": self.args.attention_bias, "feed_forward": self.args.mlp_bias}
        for name in [n for n in self.tensors if self.scheme and n.startswith("layers.")]:
            module, kind = name.split(".")[2], name.rpartition(".")[2]
            if kind == "g_idx":
                self.check_groups(name)
            if kind == "g_idx" or (
                kind == "bias" and not biased.get(module, True) and not self.read(name).any()
            ):
                del self.tensors[name]

    def check_groups(self, name: str) -> None:
        groupsize, order = self.scheme["linears"]["groupsize"], self.read(name)
        inputs = {part.shape for part in self.tensors[name].parts}
        K = max(max(shape, default=0) for shape in inputs)
        if inputs != {(K,)} or not (order.view(-1, K) == torch.arange(K) // groupsize).all():
            raise ValueError(
                f"{self.path}: {name} puts inputs into groups out of their order, which cannot be "
                "read: download the unquantised original and use quantize.py"
            )

    def check(self, model: nn.Module) -> None:
        """Raises ValueError naming the tensors that the model and the file disagree about."""
        have, want = self.tensors, {n: t for n, (t, _) in stored_tensors(model).items()}
        faults = [f"{name} is missing" + HINTS.get(name, "") for name in want.keys() - have.keys()]
        faults += [f"{name} is not part of the model" for name in have.keys() - want.keys()]
        for name in want.keys() & have.keys():
            faults += misfits(name, have[name], want[name])
        if faults:
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            listed = "; ".join(sorted(faults)[:5])
            raise ValueError(f"{self.path} does not fit its config: {listed}{more}")


def misfits(name: str, record: StoredTensor, tensor: Tensor) -> Iterator[str]:
    """How a stored tensor differs from the model's; floating-point weights may be of any dtype."""
    if record.shape != tuple(tensor.shape):
        yield f"{name} has shape {list(record.shape)} and should have {list(tensor.shape)}"
    weight = isinstance(tensor, nn.Parameter)
    for dtype in {piece.dtype for piece in record.pieces}:
        if not (dtype.is_floating_point if weight else dtype == tensor.dtype):
            wanted = "floating-point" if weight else str(tensor.dtype).removeprefix("torch.")
            yield f"{name} is {str(dtype).removeprefix('torch.')} and should be {wanted}"


@cache
def log_once(line: str) -> None:
    """On stderr, however often a file is opened."""
    log(line)


def allocate(
    model: nn.Module,
    device: str | torch.device,
    dtype: torch.dtype,
    fill: Callable[[str, Tensor], Any],
    home: Home | None = None,
) -> None:
    """Give a model built on the meta device its tensors; each is allocated once, and filled.

    dtype is that of floating-point parameters; all else keeps the dtype that the model declares.
    home: makes the memory for a tensor, of a name, shape and dtype, or None: it stays on the meta
    device, and is not filled. Without it all of them are on the device.
    Raises MemoryError before anything is allocated.
    """
    meta_model = stored_tensors(model)
    final = {name: final_dtype(tensor, dtype) for name, (tensor, _) in meta_model.items()}
    if home is None:
        needed = sum(t.numel() * final[n].itemsize for n, (t, _) in meta_model.items())
        remedy = "choose a smaller --dtype, a quantised checkpoint, or --offload auto"
        check_memory(needed, device, "the model", remedy)

    for name, (tensor, aliases) in meta_model.items():
        given = tensor.shape, final[name]
        value = home(name, *given) if home else allocate_tensor(*given, torch.device(device))
        if value is None:
            continue
        fill(name, value)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)  # one, where a table has two names
        for alias in aliases:
            set_tensor(model, alias, value)
    stored = model.state_dict(keep_vars=True)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name not in stored:  # a non-persistent buffer
            set_tensor(model, name, buffer.to(device))


def allocate_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor that is read again and again, see page_aligned."""
    return page_aligned(shape.numel() * dtype.itemsize, device).view(dtype).view(shape)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Let a tensor of a model be that one."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    if parameter and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """The metadata of our own file, {} for Hugging Face's, and the tensors of all files by name."""
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
    """Tensors under Hugging Face's names -> under ours, the parts of wqkv and w13 together."""
    found: dict[str, dict[int, Part]] = {}
    for part in parts:
        if place := hf.tensor_name(part.name):
            name, index = place
            if (other := found.setdefault(name, {}).setdefault(index, part)) is not part:
                raise ValueError(
                    f"{part.file}: {part.name} and {other.name} are one tensor's names"
                )
    linears = scheme and scheme["linears"]
    fields = {}
    if scheme:
        from weights.int4_layouts import foreign_fields

        fields = foreign_fields(scheme["mode"], linears["groupsize"])
    records = {}
    for name, by_index in found.items():
        module, _, kind = name.rpartition(".")
        kind, how = fields.get(kind, (kind, None))
        record = StoredTensor(tuple(part for _, part in sorted(by_index.items())), how)
        pieces = record.pieces
        if len(pieces) > 1 and not (pieces[0].dim() and len({p.shape[1:] for p in pieces}) == 1):
            shapes = ", ".join(f"{p.name} {list(p.shape)}" for p in record.parts)
            raise ValueError(f"{record.parts[0].file}: {name} cannot be put together from {shapes}")
        records[f"{module}.{kind}"] = record
    return records


def stored_tensors(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """What a checkpoint of the model stores: first name -> the tensor and all its names."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: (state[aliases[0]], aliases) for aliases in names.values()}


def final_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    floating = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return dtype if floating else tensor.dtype


def save_checkpoint(
    path: str | Path,
    config: dict[str, Any],
    scheme: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    values: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a `model.pth`: all of it or, whatever happens, nothing.

    config: Hugging Face's keys. scheme: how the tensors are quantised. tensors: by our names.
    With `values`, only shapes and dtypes are taken from `tensors` (meta tensors will do), and
    each value is written as the iterable yields it, in any order: one is in memory at a time.
    Raises ValueError where the disk is too small, or values and tensors do not match, and OSError.
    """
    path = Path(path)
    check_writable(path)
    needed = sum(t.numel() * t.itemsize for t in tensors.values())
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise ValueError(f"{path} needs {size_text(needed)}, {size_text(free)} of disk is free")
    temporary = unfinished(path)
    metadata = {"config": config, "scheme": scheme}
    try:
        write_aligned(temporary, metadata, tensors, tensors.items() if values is None else values)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def check_writable(path: Path) -> None:
    """OSError in words where save_checkpoint could not make the file; ask before long work."""
    try:
        unfinished(path).open("wb").close()
        unfinished(path).unlink()
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}): it goes beside the model, so make that "
            "folder writable, or copy the model to one that is"
        ) from error


def log_replaced(path: Path) -> None:
    """Say which file is about to be replaced, if there is one."""
    if path.exists():
        stat = path.stat()
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime))
        log(f"replaces {path} ({size_text(stat.st_size)}, {made})")

"""A path to a model's config, quantisation scheme and tensors, each known by where it lies.

Start at Checkpoint. It reads only headers when made: our `model.pth`, Hugging Face's safetensors
or .bin, in one file or in shards, all become one table, our tensor name -> Record. load_into then
reads each tensor once, straight to where it will stay. save_checkpoint writes `model.pth`.
File formats are in formats.py, Hugging Face's names in hf.py.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf
from disk import page_aligned
from files import sync
from foreign import foreign_fields, foreign_scheme
from formats import (
    Part,
    index_file,
    read_columns,
    read_part,
    rows_of,
    staging_buffer,
    write_aligned,
)

PREPARED = "model.pth"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HUGGING_FACE = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


Home = Callable[[str, torch.Size, torch.dtype], Tensor | None]  # memory for a tensor; see allocate


@dataclass(frozen=True)
class Record:
    """A tensor of the model: the parts that files store, stacked along the first dimension.

    translate: what makes ours of a part, None where it is stored as it is here.
    """

    parts: tuple[Part, ...]
    translate: Callable[[Tensor], Tensor] | None = None

    @property
    def pieces(self) -> list[Tensor]:
        """What is stacked, on the meta device."""
        stored = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in self.parts]
        return [self.translate(t) for t in stored] if self.translate else stored

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
        said: dict[str, Any] = {}
        parts: dict[str, Part] = {}
        for file in shards(self.path):
            more_said, more_parts = index_file(file)
            said |= more_said
            parts |= more_parts
        self.config = said["config"] if said else read_json(self.directory / "config.json")
        self.scheme = said["scheme"] if said else foreign_scheme(self.config)
        self.args = hf.model_args(self.config)
        if said:
            self.records = {name: Record((part,)) for name, part in parts.items()}
        else:
            self.records = translate(parts.values(), self.scheme)
            self.drop_idle()
            if self.args.tied and "output.weight" in self.records:
                # One table under two names; a file holds either or both.
                head = self.records.pop("output.weight")
                self.records.setdefault("tok_embeddings.weight", head)
        self.args = hf.with_stored_biases(self.args, self.records, self.path)

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the weights, or of what is not quantised of them."""
        if self.scheme:
            return self.records["tok_embeddings.weight"].dtype
        sizes = Counter()
        for record in self.records.values():
            sizes[record.dtype] += record.nbytes * record.dtype.is_floating_point
        return max(sizes, key=sizes.get)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor on the CPU; dtype None: as stored."""
        record = self.records[name]
        out = torch.empty(record.shape, dtype=dtype or record.dtype, device="cpu")
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, stage: Tensor | None = None) -> None:
        """Fill `out`, contiguous and of the record's shape, on any device and of any dtype.

        On the CPU and in the stored dtype the file is read into `out` itself. Else the bytes
        pass through `stage`, a staging_buffer to be shared by the tensors of one thread.
        Raises ValueError where the file ends too early.
        """
        record = self.records[name]
        pieces = out.detach().view(-1).split([piece.numel() for piece in record.pieces])
        stage = staging_buffer(out.device) if stage is None else stage
        for part, piece in zip(record.parts, pieces, strict=True):
            if record.translate is None:
                read_part(part, piece, stage)
            else:
                stored = torch.empty(part.shape, dtype=part.dtype)
                read_part(part, stored.view(-1), stage)
                piece.copy_(record.translate(stored).flatten())

    def read_rows_into(self, name: str, rows: Iterable[range], out: Tensor, stage: Tensor) -> None:
        """Fill `out`, see read_into, with ranges of the tensor's rows, one after the other."""
        record, filled = self.records[name], 0
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

    def _read_rows(
        self, record: Record, part: Part, rows: range, out: Tensor, stage: Tensor
    ) -> None:
        if record.translate is None:
            return read_part(rows_of(part, rows), out.view(-1), stage)
        out.copy_(self._translated(record, part)[rows.start : rows.stop])

    def _translated(self, record: Record, part: Part) -> Tensor:
        stored = torch.empty(part.shape, dtype=part.dtype)
        read_part(part, stored.view(-1), stored.view(-1).view(torch.uint8))
        return record.translate(stored)

    def read_columns_into(self, name: str, columns: range, out: Tensor, stage: Tensor) -> None:
        """Fill `out`, see read_into, with some of a matrix's columns."""
        record, first = self.records[name], 0
        for part, piece in zip(record.parts, record.pieces, strict=True):
            rows = out[first : first + len(piece)]
            if record.translate is None:
                read_columns(part, columns, rows, stage)
            else:
                rows.copy_(self._translated(record, part)[:, columns.start : columns.stop])
            first += len(piece)

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
        fill = self.filler(torch.device(device), progress)
        allocate(model, device, dtype or self.dtype, fill)

    def filler(
        self, device: torch.device, progress: Callable[[int], Any] | None = None
    ) -> Callable[[str, Tensor], None]:
        """What gives tensors on a device, or on the CPU, their values."""
        stage = staging_buffer(device)

        def fill(name: str, tensor: Tensor) -> None:
            self.read_into(name, tensor, stage)
            if progress:
                progress(self.records[name].nbytes)

        return fill

    def direct(self, name: str, dtype: torch.dtype) -> tuple[Path, int] | None:
        """The file and the offset where a tensor of that dtype lies by itself, a block's beginning;
        None where there is no such place."""
        part, *others = self.records[name].parts
        ours = not others and self.records[name].translate is None and part.held is None
        return (part.file, part.offset) if ours and part.is_block(dtype) else None

    def drop_idle(self) -> None:
        """Forget what other tools write and says nothing: groups in order, biases of zero.

        Raises ValueError for groups that are not in order.
        """
        biased = {"attention": self.args.attention_bias, "feed_forward": self.args.mlp_bias}
        for name in [n for n in self.records if self.scheme and n.startswith("layers.")]:
            module, kind = name.split(".")[2], name.rpartition(".")[2]
            if kind == "g_idx":
                self.check_groups(name)
            if kind == "g_idx" or (
                kind == "bias" and not biased.get(module, True) and not self.read(name).any()
            ):
                del self.records[name]

    def check_groups(self, name: str) -> None:
        K, S = self.records[name].parts[0].numel, self.scheme["linears"]["groupsize"]
        order = self.read(name).view(-1, K)  # of each part
        if not (order == torch.arange(K) // S).all():
            raise ValueError(
                f"{self.path}: {name} puts inputs into groups out of their order, which cannot be "
                "read: download the unquantised original and use quantize.py"
            )

    def check(self, model: nn.Module) -> None:
        """Raises ValueError naming the tensors that the model and the file disagree about."""
        have = {name: record.shape for name, record in self.records.items()}
        want = {name: tuple(t.shape) for name, (t, _) in stored_tensors(model).items()}
        faults = [f"{name} is missing" for name in want.keys() - have.keys()]
        faults += [f"{name} is not part of the model" for name in have.keys() - want.keys()]
        faults += [
            f"{name} has shape {list(have[name])} and should have {list(want[name])}"
            for name in want.keys() & have.keys()
            if want[name] != have[name]
        ]
        if faults:
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            listed = "; ".join(sorted(faults)[:5])
            raise ValueError(f"{self.path} does not fit its config: {listed}{more}")


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
    skeleton = stored_tensors(model)
    final = {name: final_dtype(tensor, dtype) for name, (tensor, _) in skeleton.items()}
    if home is None:
        needed = sum(t.numel() * final[n].itemsize for n, (t, _) in skeleton.items())
        remedy = "choose a smaller --dtype, a quantised checkpoint, or --offload auto"
        check_memory(needed, device, "the model", remedy)

    for name, (tensor, aliases) in skeleton.items():
        given = tensor.shape, final[name]
        value = home(name, *given) if home else room(*given, torch.device(device))
        if value is None:
            continue
        fill(name, value)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)  # one, where a table has two names
        for alias in aliases:
            give(model, alias, value)
    for module in model.modules():  # what no checkpoint stores
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = module._buffers[name].to(device)


def room(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor that is read again and again, see page_aligned."""
    return page_aligned(shape.numel() * dtype.itemsize, device).view(dtype).view(shape)


def give(model: nn.Module, name: str, value: Tensor) -> None:
    """Let a tensor of a model be that one."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def translate(parts: Iterable[Part], scheme: dict[str, Any] | None) -> dict[str, Record]:
    """Tensors under Hugging Face's names -> under ours, the parts of wqkv and w13 together."""
    found: dict[str, dict[int, Part]] = {}
    for part in parts:
        if place := hf.tensor_name(part.name):
            name, index = place
            found.setdefault(name, {})[index] = part
    fields = foreign_fields(scheme) if scheme else {}
    records = {}
    for name, by_index in found.items():
        module, _, kind = name.rpartition(".")
        kind, how = fields.get(kind, (kind, None))
        record = Record(tuple(part for _, part in sorted(by_index.items())), how)
        if len({piece.shape[1:] for piece in record.pieces}) > 1:
            shapes = ", ".join(f"{p.name} {list(p.shape)}" for p in record.parts)
            raise ValueError(f"{name} cannot be put together from {shapes}")
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
    Raises ValueError where the disk is too small, or values and tensors do not match.
    """
    path = Path(path)
    needed = sum(t.numel() * t.itemsize for t in tensors.values())
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise ValueError(f"{path} needs {size_text(needed)}, {size_text(free)} of disk is free")
    temporary = path.with_name(path.name + ".tmp")
    said = {"config": config, "scheme": scheme}
    try:
        write_aligned(temporary, said, tensors, tensors.items() if values is None else values)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def find_weights(path: str | Path, names: Iterable[str] = (PREPARED, *HUGGING_FACE)) -> Path:
    """The file itself, or the first of `names` in a directory; FileNotFoundError helps on."""
    path = Path(path)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    nearest = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    entries = sorted(p.name for p in nearest.iterdir() if p.name[0] != ".")[:12]
    prepared = sorted(str(p) for p in Path("checkpoints").rglob(PREPARED))[:12]
    raise FileNotFoundError(
        f"{path} {'holds no weights' if path.is_dir() else 'does not exist'}; "
        f"{nearest} holds: {', '.join(entries) or 'nothing'}; "
        f"prepared here: {', '.join(prepared) or 'none'}; ./scripts/prepare.sh REPO prepares one"
    )


def shards(path: Path) -> list[Path]:
    """The files that hold the tensors: those an index names, else the file itself."""
    if not path.name.endswith(".index.json"):
        return [path]
    index = read_json(path)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{path} has no weight_map: download it again")
    files = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path.parent} lacks {', '.join(absent)}, named in {path.name}: "
            "run scripts/download.py again, it fetches what is missing"
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it belongs beside the weights")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object: download it again")
    return value


def check_memory(needed: int, device: str | torch.device, what: str, remedy: str) -> None:
    """Raises MemoryError saying how many bytes are needed and how many there are."""
    available = available_memory(torch.device(device))
    if needed > available:
        raise MemoryError(
            f"{what} needs {size_text(needed)} of memory on {device}, where "
            f"{size_text(available)} is free: {remedy}"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now; all there are where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *cgroup_headroom(), 2**63)


def cgroup_headroom() -> Iterator[int]:
    """What each limit that this process lives under leaves; page cache counts as free."""
    own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
    leaf = Path("/sys/fs/cgroup", own)
    for group in (leaf, *leaf.parents):
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            yield int(most) - int((group / "memory.current").read_text()) + cached


def size_text(nbytes: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"

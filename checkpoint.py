"""A checkpoint: a model's config, its quantisation scheme, and its tensors by their place on disk.

A scheme says how the linears are quantised, see make_scheme in quant/linear.py; None: they are not.
A StoredTensor is a tensor of our model as it lies on disk: one or more Parts, each a tensor of a
file (q, k and v, for example), which are stacked by rows, and converted if they have another
layout. Our name of a tensor is its name in the Transformer's state dict.

Start at Checkpoint. Its constructor reads headers: our `model.pth` and Hugging Face's safetensors
or .bin, in one file or in shards, all become one table, our tensor name -> StoredTensor
(weights/stored.py). Of Hugging Face's files it also reads tensors that may be redundant: g_idx and
biases of a GPTQ or AWQ checkpoint, and a head that is tied to the embedding but stored, too.
read_into then reads a tensor into its final memory; load_into and fill_function do so for each
tensor of a model.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from host.log import log_once
from quant.linear import checked_scheme
from weights import hf
from weights.allocation import allocate, stored_tensors
from weights.formats import staging_buffer
from weights.stored import StoredTensor, read_index, translate
from weights.weight_files import find_weights, read_json

# Words that follow "NAME is missing" in an error.
HINTS = {"output.weight": ", unless lm_head is the embedding: tie_word_embeddings is true then"}
COMPARED_BYTES = 2**22  # read at a time of each of two matrices that are compared
MAX_LISTED = 5  # faults in an error message


class Checkpoint:
    """A checkpoint whose headers are read. config: the content of config.json. args: the shape of
    the model. scheme: see above. tensors: our name -> StoredTensor.

    path: a directory (its model.pth, else its Hugging Face weights), or one of those files.
    Raises FileNotFoundError, which lists the files that exist instead, and ValueError for a file
    that is truncated, corrupt, unsafe or of an unsupported kind.
    """

    def __init__(self, path: str | Path):
        self.path = find_weights(path)
        self.directory = self.path.parent  # of config.json and the tokenizer
        metadata, parts = read_index(self.path)
        if metadata:  # a model.pth; {} for Hugging Face's files
            self.config = metadata["config"]
            self.scheme = self.model_pth_scheme(metadata["scheme"])
        else:
            self.config = read_json(self.directory / "config.json")
            self.scheme = self.hugging_face_scheme(parts)
        self.args = hf.model_args(self.config)
        if metadata:
            self.tensors = {name: StoredTensor((part,)) for name, part in parts.items()}
        else:
            self.tensors = translate(parts.values(), self.scheme, hf.names_of(self.config))
            self.drop_redundant()
            if self.args.tied and "output.weight" in self.tensors:
                self.resolve_tied_head()
        self.args = hf.with_stored_biases(self.args, self.tensors, self.path)

    def model_pth_scheme(self, recorded: Any) -> dict[str, Any] | None:
        """Returns the scheme of a model.pth, None if it is not quantised. recorded: the file's
        value of "scheme". Raises ValueError if this version cannot read that scheme."""
        try:
            return checked_scheme(recorded)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; convert or quantise it again") from error

    def hugging_face_scheme(self, names: Iterable[str]) -> dict[str, Any] | None:
        """Returns the scheme of a Hugging Face checkpoint, None if it is not quantised. names: of
        its tensors. Raises ValueError for a quantisation that cannot be read."""
        packed = any(name.endswith(".qweight") for name in names)
        try:
            from weights.int4_layouts import foreign_scheme, quantization_config

            settings = quantization_config(self.config, self.directory, packed)
            return settings and foreign_scheme(settings)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def resolve_tied_head(self) -> None:
        """Drop an output head that equals the embedding; use both where they differ.

        Called if the config ties them and the file has a head. transformers 5 uses both, too.
        """
        # A file may store the shared table under the head's name alone.
        self.tensors.setdefault("tok_embeddings.weight", self.tensors["output.weight"])
        if self.equal("tok_embeddings.weight", "output.weight"):
            del self.tensors["output.weight"]
            return
        self.config = hf.multimodal.untied(self.config)
        self.args = replace(self.args, tied=False)
        log_once(
            f"{self.path}: the output head differs from the embedding, and both are used, though "
            "tie_word_embeddings in config.json is true"
        )

    def equal(self, one: str, other: str) -> bool:
        """Returns whether two matrices, given by name, have the same values. Reads both, a few rows
        at a time, up to the first difference. Different tensors that are no matrices count as
        unequal."""
        a, b = self.tensors[one], self.tensors[other]
        if a is b:  # one tensor of the file, under both names
            return True
        if a.shape != b.shape or len(a.shape) != 2:
            return False
        rows, columns = a.shape
        # Both are read in a dtype that holds the values of either exactly.
        dtype, stage = torch.promote_types(a.dtype, b.dtype), staging_buffer(torch.device("cpu"))
        step = max(1, COMPARED_BYTES // max(1, columns * dtype.itemsize))  # columns may be 0
        pair = torch.empty(2, step, columns, dtype=dtype)  # `step` rows of each matrix
        for start in range(0, rows, step):
            some = range(start, min(start + step, rows))
            for name, out in zip((one, other), pair, strict=True):
                self.read_rows_into(name, [some], out, stage)
            if not torch.equal(*pair[:, : len(some)]):
                return False
        return True

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most bytes; if quantised, the dtype of the embedding, as the
        scales have a dtype of their own."""
        if self.scheme:
            return self.tensors["tok_embeddings.weight"].dtype
        sizes = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes * tensor.dtype.is_floating_point
        return max(sizes, key=sizes.get)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor of the files, by our name, on the CPU. dtype: of the result; None: the
        stored one. Errors: see read_into."""
        stored = self.tensors[name]
        out = torch.empty(stored.shape, dtype=dtype or stored.dtype, device="cpu")
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, stage: Tensor | None = None) -> None:
        """Read a tensor into `out`, which is contiguous, on any device and of any dtype.

        On the CPU and in the stored dtype the file is read into `out` itself. Otherwise the bytes
        pass through `stage`, a staging_buffer that the calls of one thread share; None: a new one.
        Raises ValueError if the file is too short, and as check_scales does.
        """
        stage = staging_buffer(out.device) if stage is None else stage
        self.tensors[name].read_into(out, stage)
        self.check_scales(name, out)

    def read_rows_into(self, name: str, rows: Iterable[range], out: Tensor, stage: Tensor) -> None:
        """Read ranges of a tensor's rows into `out`, one after the other: a rank's shard, for
        example. out: with at least as many rows. stage, errors: see read_into."""
        self.tensors[name].read_rows_into(rows, out, stage)
        self.check_scales(name, out)

    def read_columns_into(self, name: str, columns: range, out: Tensor, stage: Tensor) -> None:
        """Read a range of a matrix's columns into `out`, (rows, columns); see read_into."""
        self.tensors[name].read_columns_into(columns, out, stage)
        self.check_scales(name, out)

    def check_scales(self, name: str, values: Tensor) -> None:
        """Raises ValueError for scales that would make their weights infinite or NaN."""
        if name.endswith(".scales") and not values.isfinite().all():
            file = self.tensors[name].parts[0].file
            raise ValueError(
                f"{file}: {name} holds NaN or infinity: download or quantise the model again"
            )

    def load_into(
        self,
        model: nn.Module,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Allocate the tensors of a model that was built on the meta device, and read them.

        For a whole model in one memory: load.py, which also offloads and divides models, calls
        fill_function itself. dtype: of floating-point parameters, None: the stored one; buffers and
        integers keep the dtype that the model declares. progress: called with the bytes read of
        each tensor. Raises ValueError as `check` does, and MemoryError before anything is
        allocated.
        """
        self.check(model)
        fill = self.fill_function(torch.device(device), progress)
        allocate(model, device, dtype or self.dtype, fill)

    def fill_function(
        self, device: torch.device, progress: Callable[[int], Any] | None = None
    ) -> Callable[[str, Tensor], None]:
        """Returns a function fill(name, tensor), which reads the values of a tensor, by our name,
        into the memory of `tensor`.

        device: of these tensors; some may be on the CPU, such as offloaded layers. progress: called
        after each tensor with its bytes on disk. Call fill in one thread only: its calls share a
        staging buffer.
        """
        stage = staging_buffer(device)

        def fill(name: str, tensor: Tensor) -> None:
            self.read_into(name, tensor, stage)
            if progress:
                progress(self.tensors[name].nbytes)

        return fill

    def location(self, name: str, dtype: torch.dtype) -> tuple[Path, int] | None:
        """Returns the file and the offset in bytes at which O_DIRECT can read a tensor as a given
        dtype; None if it cannot.

        Offloading reads such tensors from the checkpoint itself. O_DIRECT, which bypasses the page
        cache, needs offsets at multiples of a block. It cannot read a tensor that is stored in
        several parts, not contiguously, in another layout or dtype, or not at such an offset.
        """
        part, *others = self.tensors[name].parts
        as_is = not others and self.tensors[name].convert is None and part.tensor is None
        return (part.file, part.offset) if as_is and part.is_aligned(dtype) else None

    def drop_redundant(self) -> None:
        """Drop tensors of a GPTQ or AWQ checkpoint that change nothing.

        These are g_idx, the group of each input, if the groups are in order, and biases of zeros in
        a linear that has no bias by the config. Raises ValueError for groups that are not in order.
        """
        if not self.scheme:
            return
        unbiased = [module for flag, module in hf.BIASES.items() if not getattr(self.args, flag)]
        for name in [n for n in self.tensors if n.startswith("layers.")]:
            module, _, kind = name.split(".", 2)[2].rpartition(".")  # after layers.N
            if kind == "g_idx":
                self.check_groups(name)
            undeclared = kind == "bias" and module.startswith(tuple(unbiased))
            if kind == "g_idx" or (undeclared and not self.read(name).any()):
                del self.tensors[name]

    def check_groups(self, name: str) -> None:
        """Raises ValueError unless input i belongs to group i // groupsize. name: of a g_idx. Each
        of its parts (q, k and v, for example) must have the K groups of the same K inputs."""
        groupsize, order = self.scheme["linears"]["groupsize"], self.read(name)
        shapes = {part.shape for part in self.tensors[name].parts}
        K = max(max(shape, default=0) for shape in shapes)  # 0: a part without dimensions
        if shapes != {(K,)} or not (order.view(-1, K) == torch.arange(K) // groupsize).all():
            raise ValueError(
                f"{self.path}: {name} puts inputs into groups out of their order, which cannot be "
                "read: download the unquantised original and use quantize.py"
            )

    def check(self, model: nn.Module) -> None:
        """Raises ValueError, which lists the tensors whose name, shape or dtype differs between the
        files and the model. model: on the meta device; called before anything is allocated."""
        have, want = self.tensors, {n: t for n, (t, _) in stored_tensors(model).items()}
        faults = [f"{name} is missing" + HINTS.get(name, "") for name in want.keys() - have.keys()]
        faults += [f"{name} is not part of the model" for name in have.keys() - want.keys()]
        for name in want.keys() & have.keys():
            faults += have[name].differences(name, want[name])
        if faults:
            more = f"; and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
            listed = "; ".join(sorted(faults)[:MAX_LISTED])
            raise ValueError(f"{self.path} does not fit its config: {listed}{more}")

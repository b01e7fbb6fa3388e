"""Tensor parallelism: each rank has a shard of every layer; two all-reduces per layer join them.

Start at TensorParallel. A rank has some heads of each attention, some neurons of each feed-forward
layer, and the output head's rows for a part of the vocabulary. Its shard is a Transformer with
smaller numbers in its args. RowParallel adds up the ranks' outputs of wo and w2; ColumnParallel
joins the ranks' logits. So every rank has all logits, bit for bit the same, and draws the same
token.

Based on Megatron-LM (arXiv 1909.08053, section 3). torch.distributed under torchrun communicates:
NCCL between GPUs, Gloo between CPUs.

A scheme (quant/linear.py) says how a model's linears are quantised; None: a dense model. A column
of a linear's tensor belongs to one input of the linear, or to several inputs whose integers share a
byte or a scale. wqkv holds the rows of wq, wk and wv, and w13 those of w1 and w3. A tied head is
one that shares the embedding's table.

Shapes: B rows, T tokens, V vocab.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import Checkpoint
from decoding import LoadedModel
from layers.args import ModelArgs
from layers.basic import Linear, WholeRMSNorm
from model import Transformer
from offload import Stored
from quant.linear import pack_nibbles, swap_linears, unpack_nibbles
from ranks import Ranks
from weights.allocation import Fill
from weights.formats import staging_buffer

# Named all_gather_tensor before torch 2.12.
ALL_GATHER = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
MAX_SUGGESTED_RANKS = 64  # an error message suggests numbers of ranks up to this one


@dataclass(frozen=True)
class ShardSlice:
    """The part of a linear's or a norm's tensors that a rank has.

    rows: ranges of outputs, which are concatenated; None: all outputs. columns: a range of inputs;
    None: all inputs.
    """

    rows: tuple[range, ...] | None = None
    columns: range | None = None


def shard_args(args: ModelArgs, scheme: dict[str, Any] | None, ranks: Ranks) -> ModelArgs:
    """Return the args of a rank's shard. args, scheme: of the whole model.

    The result is the same on all ranks, and has the whole vocabulary. Raises ValueError, which
    suggests other numbers of ranks, if the model cannot be divided.
    """
    count = ranks.world_size
    if reason := indivisible_reason(args, scheme, count):
        numbers = range(1, MAX_SUGGESTED_RANKS + 1)
        others = [str(n) for n in numbers if not indivisible_reason(args, scheme, n)]
        raise ValueError(
            f"{count} ranks cannot share this model: {reason}; {', '.join(others)} can"
        )
    return replace(
        args,
        n_heads=args.n_heads // count,
        n_kv_heads=max(1, args.n_kv_heads // count),  # 1: several ranks have the same one
        hidden_dim=args.hidden_dim // count,
    )


def indivisible_reason(args: ModelArgs, scheme: dict[str, Any] | None, count: int) -> str | None:
    """Return why `count` ranks cannot share a model; None if they can.

    All ranks need the same number of heads and of neurons. In a model quantised in groups of inputs
    (int4), a rank needs whole groups: its neurons are the inputs of w2, and its heads' channels are
    the inputs of wo. Key/value heads are divided; or, if there are more ranks, each key/value head
    is on the same number of ranks.
    """
    heads, kv_heads = args.n_heads, args.n_kv_heads
    group = (scheme or {}).get("linears", {}).get("groupsize", 1)
    if heads % count:
        return f"it has {heads} heads"
    if kv_heads % count and count % kv_heads:
        return f"it has {kv_heads} key/value heads"
    if args.hidden_dim % (count * group):
        return f"it has {args.hidden_dim} neurons a layer" + f", in groups of {group}" * (group > 1)
    channels = heads // count * args.head_dim
    if channels % group:
        return (
            f"{heads // count} heads of {args.head_dim} channels do not divide in groups of {group}"
        )
    return None


def shard_slices(args: ModelArgs, ranks: Ranks) -> Iterator[tuple[str, ShardSlice]]:
    """Yield pairs of a module's name, without "layers.3.", and this rank's slice of its tensors.
    Modules of other names are not divided. Some names do not occur in every model.

    args: of the whole model, which shard_args has accepted. If there are more ranks than key/value
    heads, several ranks have the same key/value head.
    """
    E, H, G, F_ = args.head_dim, args.n_heads, args.n_kv_heads, args.hidden_dim
    heads, neurons = ranks.shard_range(H), ranks.shard_range(F_)
    first_kv = ranks.rank * G // ranks.world_size
    kv_heads = range(first_kv, first_kv + max(1, G // ranks.world_size))
    # wqkv's rows are those of wq, wk and wv; start: the first row of each.
    q, k, v = (
        range(start + part.start * E, start + part.stop * E)
        for start, part in ((0, heads), (H * E, kv_heads), ((H + G) * E, kv_heads))
    )
    w3_rows = range(F_ + neurons.start, F_ + neurons.stop)
    yield "attention.wqkv", ShardSlice(rows=(q, k, v))
    if args.qk_norm in ("whole", "each_head"):  # other norms have the same weights for all heads
        yield "attention.q_norm", ShardSlice(rows=(q,))
        yield "attention.k_norm", ShardSlice(rows=(range(k.start - H * E, k.stop - H * E),))
    yield "attention.wo", ShardSlice(columns=q)
    yield "feed_forward.w1", ShardSlice(rows=(neurons,))
    yield "feed_forward.w13", ShardSlice(rows=(neurons, w3_rows))
    yield "feed_forward.w2", ShardSlice(columns=neurons)
    yield "output", ShardSlice(rows=(ranks.shard_range(args.vocab_size),))


class RowParallel(nn.Module):
    """A linear of which each rank has a part of the inputs. Returns the sum of the ranks' outputs,
    plus the bias, on all ranks.

    linear: this rank's part, dense or quantised. Its bias moves to this module, because it must be
    added once, not by each rank.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.bias, linear.bias = linear.bias, None
        self.shard = linear

    def forward(self, x: Tensor) -> Tensor:
        y = all_reduce(self.shard(x))
        return y if self.bias is None else y + self.bias


class ColumnParallel(nn.Module):
    """A linear of which each rank has a part of the outputs. Returns all outputs on all ranks.

    linear: this rank's part. outputs: the number of all outputs. count: the number of ranks. The
    last ranks may have fewer outputs than the others; all_gather needs equal shapes, so their
    outputs are padded.
    """

    def __init__(self, linear: nn.Module, outputs: int, count: int):
        super().__init__()
        self.shard, self.outputs = linear, outputs
        self.padding = -(-outputs // count) - linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.shard(x), (0, self.padding))  # (..., ceil(outputs / count))
        return all_gather(y)[..., : self.outputs]


class ShardedRMSNorm(nn.Module):
    """A WholeRMSNorm of queries or keys, of which each rank has some heads.

    norm: this rank's part of the norm. count: the number of ranks. The mean over all heads is the
    mean of the ranks' means, because all ranks have the same number of heads, and each key/value
    head is on the same number of ranks.
    """

    def __init__(self, norm: WholeRMSNorm, count: int):
        super().__init__()
        self.weight, self.eps, self.count = norm.weight, norm.eps, count

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x, (B, T, heads, E), over the heads of all ranks."""
        wide = x.float()
        mean = all_reduce(wide.square().mean((2, 3), keepdim=True)) / self.count  # (B, T, 1, 1)
        y = wide * torch.rsqrt(mean + self.eps)
        return (y * self.weight.float().view(x.shape[2:])).type_as(x)  # weight: (heads, E)


def all_reduce(x: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, on all ranks."""
    return collectives.all_reduce(x, "sum", dist.group.WORLD)


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the ranks' tensors along the last dimension, on all ranks."""
    return ALL_GATHER(x, x.dim() - 1, dist.group.WORLD)


@dataclass(frozen=True)
class TensorParallel:
    """Divides every layer by heads and neurons, and the head by the vocabulary.

    It implements load.ParallelStrategy.
    """

    ranks: Ranks

    def shard_args(self, args: ModelArgs, scheme: dict[str, Any] | None) -> ModelArgs:
        return shard_args(args, scheme, self.ranks)

    def build_skeleton(self, args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
        """Build this rank's shard on the meta device, before the weights are read. args, scheme: of
        the whole model. Raises ValueError if the model cannot be divided.

        wo and w2 become RowParallel, the head ColumnParallel. A dense head that is tied to the
        embedding has the whole table until `finish`.
        """
        ranks = self.ranks
        with torch.device("meta"):
            model = Transformer(self.shard_args(args, scheme))
            vocab_rows = len(ranks.shard_range(args.vocab_size))
            model.output = Linear(args.embed_dim, vocab_rows, bias=False)
            if scheme:
                swap_linears(model, scheme)
        if args.tied and isinstance(model.output, Linear):
            model.output.weight = model.tok_embeddings.weight
        for layer in model.layers:
            if args.qk_norm == "whole":
                layer.attention.q_norm = ShardedRMSNorm(layer.attention.q_norm, ranks.world_size)
                layer.attention.k_norm = ShardedRMSNorm(layer.attention.k_norm, ranks.world_size)
            layer.attention.wo = RowParallel(layer.attention.wo)
            layer.feed_forward.w2 = RowParallel(layer.feed_forward.w2)
        model.output = ColumnParallel(model.output, args.vocab_size, ranks.world_size)
        return model

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        """Return a function of a name and a tensor of this rank's shard, which fills the tensor.

        It reads only this rank's slice of the file. model: this rank's shard. device: of the
        tensors. fill: fills an undivided tensor by its name in the checkpoint.
        """
        slices = dict(shard_slices(checkpoint.args, self.ranks))
        staging = staging_buffer(device)  # through which bytes pass on their way to the tensors

        def fill_shard(name: str, tensor: Tensor) -> None:
            """Fill a tensor with this rank's rows, columns, or all of the stored tensor.

            name: in the shard. tensor: of the shard, already allocated.
            """
            stored = checkpoint_name(name)
            part = slices.get(re.sub(r"^layers\.\d+\.", "", stored.rpartition(".")[0]))
            # The name decides, not the shape: a slice may have the whole tensor's shape. Example:
            # the zero points of two groups are one byte, and so is the one zero point that each of
            # two ranks has.
            if part and part.rows:
                checkpoint.read_rows_into(stored, part.rows, tensor, staging)
            elif part and (column_inputs := inputs_per_column(model, name)):
                inputs = part.columns
                read_input_columns(checkpoint, stored, inputs, column_inputs, tensor, staging)
            else:
                fill(stored, tensor)

        return fill_shard

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        """Return a function that returns None for every tensor: offload must not read a tensor's
        bytes from the checkpoint, because a shard is not contiguous in the file."""
        return lambda name, dtype: None

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        """After loading: let a dense head that is tied to the embedding use only this rank's rows
        of the table, as a view of the same memory. dtype, device: not used."""
        head, table = model.output.shard, model.tok_embeddings.weight
        if getattr(head, "weight", None) is table:
            rows = self.ranks.shard_range(len(table))
            head.weight = nn.Parameter(table[rows.start : rows.stop], requires_grad=False)

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        return lm


def read_input_columns(
    checkpoint: Checkpoint,
    name: str,
    inputs: range,
    column_inputs: int,
    tensor: Tensor,
    staging: Tensor,
) -> None:
    """Fill `tensor` with the stored columns that belong to a range of its linear's inputs.

    name: in the checkpoint. inputs: this rank's; of int4 they are whole groups. column_inputs: the
    number of inputs that share a column. staging: a buffer that the bytes pass through, see
    staging_buffer. A column of zero points holds those of two groups, so that this rank's may begin
    or end within a column: they are packed again, the first one in the low four bits of a byte.
    """
    columns = range(inputs.start // column_inputs, -(-inputs.stop // column_inputs))
    if inputs.start % column_inputs == inputs.stop % column_inputs == 0:
        return checkpoint.read_columns_into(name, columns, tensor, staging)
    # Zero points, two to a byte: this rank's inputs begin or end in the middle of a byte.
    covering = torch.empty(len(tensor), len(columns), dtype=tensor.dtype)
    checkpoint.read_columns_into(name, columns, covering, staging)
    # The first zero point in the first byte, and their number: each has column_inputs / 2 inputs.
    first, count = (2 * n // column_inputs for n in (inputs.start % column_inputs, len(inputs)))
    tensor.copy_(pack_nibbles(unpack_nibbles(covering)[:, first : first + count]))


def inputs_per_column(model: Transformer, name: str) -> int | None:
    """Return how many inputs of a linear share a column of the tensor `name`, such as 2 for int4
    weights; None for a tensor whose columns are not inputs: a bias, or one scale per output.

    model: the shard. name: of a tensor in the shard, such as layers.3.feed_forward.w2.shard.scales.
    Dense linears have the attribute inputs_per_column, too (model.py).
    """
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), "inputs_per_column", {}).get(leaf)


def checkpoint_name(name: str) -> str:
    """Convert a tensor's name in a rank's shard to its name in the checkpoint: RowParallel and
    ColumnParallel have added ".shard"."""
    return name.replace(".shard.", ".")

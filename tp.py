"""Tensor parallelism: each rank has a shard of every layer; two all-reduces per layer join them.

Start at TensorParallel. A rank has some heads of each attention, some neurons of each feed-forward
layer, and the head's rows of some of the vocabulary. Its shard is a Transformer with smaller
numbers in its args. RowParallel adds up the ranks' outputs of wo and w2; ColumnParallel joins the
ranks' logits. So every rank has all logits, bit for bit the same, and draws the same token.

Based on Megatron-LM (arXiv 1909.08053, section 3). torch.distributed under torchrun communicates:
NCCL between GPUs, Gloo between CPUs.

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
from model import Linear, ModelArgs, Transformer
from offload import Fill, Stored
from quant.linear import pack_nibbles, swap_linears, unpack_nibbles
from ranks import Ranks
from weights.formats import staging_buffer

# Named all_gather_tensor before torch 2.12.
ALL_GATHER = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
MAX_SUGGESTED_RANKS = 64  # an error message suggests numbers of ranks up to this one


@dataclass(frozen=True)
class ShardSlice:
    """The part of a stored tensor that a rank keeps. None: all.

    rows: ranges that are concatenated. columns: a range of the linear's inputs.
    """

    rows: tuple[range, ...] | None = None
    columns: range | None = None


def shard_args(args: ModelArgs, scheme: dict[str, Any] | None, ranks: Ranks) -> ModelArgs:
    """Return the args of a rank's shard.

    Raises ValueError, which suggests other numbers of ranks, if the model does not divide.
    """
    n = ranks.world_size
    if reason := indivisible_reason(args, scheme, n):
        numbers = range(1, MAX_SUGGESTED_RANKS + 1)
        others = [str(n) for n in numbers if not indivisible_reason(args, scheme, n)]
        raise ValueError(f"{n} ranks cannot share this model: {reason}; {', '.join(others)} can")
    return replace(
        args,
        n_heads=args.n_heads // n,
        n_kv_heads=max(1, args.n_kv_heads // n),
        hidden_dim=args.hidden_dim // n,
    )


def indivisible_reason(args: ModelArgs, scheme: dict[str, Any] | None, count: int) -> str | None:
    """Return why `count` ranks cannot share a model; None if they can."""
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
    """Yield the linears that are divided, by the ends of their names, and this rank's slices.

    args: of the whole model. Ranks that outnumber the key/value heads share heads.
    """
    E, H, G, F_ = args.head_dim, args.n_heads, args.n_kv_heads, args.hidden_dim
    heads, neurons = ranks.shard_range(H), ranks.shard_range(F_)
    first = ranks.rank * G // ranks.world_size
    kv = range(first, first + max(1, G // ranks.world_size))
    q, k, v = (
        range(start + part.start * E, start + part.stop * E)
        for start, part in ((0, heads), (H * E, kv), ((H + G) * E, kv))
    )
    w3_rows = range(F_ + neurons.start, F_ + neurons.stop)
    yield "attention.wqkv", ShardSlice(rows=(q, k, v))
    yield "attention.wo", ShardSlice(columns=q)
    yield "feed_forward.w1", ShardSlice(rows=(neurons,))
    yield "feed_forward.w13", ShardSlice(rows=(neurons, w3_rows))
    yield "feed_forward.w2", ShardSlice(columns=neurons)
    yield "output", ShardSlice(rows=(ranks.shard_range(args.vocab_size),))


class RowParallel(nn.Module):
    """A linear of which each rank has some inputs. It adds up the ranks' outputs, then the bias."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.bias, linear.bias = linear.bias, None
        self.shard = linear

    def forward(self, x: Tensor) -> Tensor:
        y = all_reduce(self.shard(x))
        return y if self.bias is None else y + self.bias


class ColumnParallel(nn.Module):
    """A linear of which each rank has some outputs. It concatenates the ranks' outputs.

    The last ranks may have fewer outputs than the others; all_gather needs equal shapes, so theirs
    are padded.
    """

    def __init__(self, linear: nn.Module, outputs: int, count: int):
        super().__init__()
        self.shard, self.outputs = linear, outputs
        self.padding = -(-outputs // count) - linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.shard(x), (0, self.padding))  # (..., ceil(outputs / count))
        return all_gather(y)[..., : self.outputs]


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
        ranks = self.ranks
        with torch.device("meta"):
            model = Transformer(self.shard_args(args, scheme))
            words = len(ranks.shard_range(args.vocab_size))
            model.output = Linear(args.embed_dim, words, bias=False)
            if scheme:
                swap_linears(model, scheme)
        if args.tied and isinstance(model.output, Linear):
            model.output.weight = model.tok_embeddings.weight  # the whole table, until `finish`
        for layer in model.layers:
            layer.attention.wo = RowParallel(layer.attention.wo)
            layer.feed_forward.w2 = RowParallel(layer.feed_forward.w2)
        model.output = ColumnParallel(model.output, args.vocab_size, ranks.world_size)
        return model

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        """Return a function that fills one tensor and reads only this rank's slice of the file."""
        slices = dict(shard_slices(checkpoint.args, self.ranks))
        stage = staging_buffer(device)

        def fill_shard(name: str, tensor: Tensor) -> None:
            stored = checkpoint_name(name)
            part = slices.get(re.sub(r"^layers\.\d+\.", "", stored.rpartition(".")[0]))
            # The name decides, not the shape: a slice may have the whole tensor's shape. Example:
            # the zero points of two groups, one byte, on each of two ranks.
            if part and part.rows:
                checkpoint.read_rows_into(stored, part.rows, tensor, stage)
            elif part and (per := inputs_per_column(model, name)):
                read_input_columns(checkpoint, stored, part.columns, per, tensor, stage)
            else:
                fill(stored, tensor)

        return fill_shard

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        return lambda name, dtype: None  # a shard is not contiguous in the file

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        """Reduce a tied head to this rank's rows of the embedding's table, in the same memory."""
        head, table = model.output.shard, model.tok_embeddings.weight
        if getattr(head, "weight", None) is table:
            part = self.ranks.shard_range(len(table))
            head.weight = nn.Parameter(table[part.start : part.stop], requires_grad=False)

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        return lm


def read_input_columns(
    checkpoint: Checkpoint, name: str, inputs: range, per: int, tensor: Tensor, stage: Tensor
) -> None:
    """Fill a tensor with stored columns of some inputs of its linear. per: inputs per column."""
    columns = range(inputs.start // per, -(-inputs.stop // per))
    if inputs.start % per == inputs.stop % per == 0:
        return checkpoint.read_columns_into(name, columns, tensor, stage)
    # Zero points, two to a byte: this rank's inputs begin or end in the middle of a byte.
    covering = torch.empty(len(tensor), len(columns), dtype=tensor.dtype)
    checkpoint.read_columns_into(name, columns, covering, stage)
    first, count = (2 * n // per for n in (inputs.start % per, len(inputs)))
    tensor.copy_(pack_nibbles(unpack_nibbles(covering)[:, first : first + count]))


def inputs_per_column(model: Transformer, name: str) -> int | None:
    """Return how many of a linear's inputs share a column of one of its tensors; None for a tensor
    without columns of inputs: a bias, or scales of outputs."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), "inputs_per_column", {}).get(leaf)


def checkpoint_name(name: str) -> str:
    """Convert the name of a rank's tensor to the checkpoint's."""
    return name.replace(".shard.", ".")

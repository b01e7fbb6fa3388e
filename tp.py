"""Tensor parallelism: each rank has a share of every layer, and two all-reduces make them one.

Start at TensorParallel. A rank holds some heads of each attention, some neurons of each
feed-forward layer, and the head's rows for some of the vocabulary: a Transformer like any other,
with smaller numbers in its args. What makes the ranks one model are RowParallel, which adds what
they have of wo's and w2's outputs, and ColumnParallel, which puts the logits together. Every rank then
knows all logits, bit for bit the same, and draws the same token.

Based on Megatron-LM (arXiv 1909.08053, section 3). The engine is torch.distributed under torchrun:
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

# Its name until torch 2.12, and from then on.
ALL_GATHER = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
MAX_SUGGESTED_RANKS = 64  # ranks that are looked at when others are proposed


@dataclass(frozen=True)
class ShardSlice:
    """What a rank keeps of a stored tensor. rows: ranges that are put together, None: all;
    columns: a range in inputs of the linear, None: all."""

    rows: tuple[range, ...] | None = None
    columns: range | None = None


def shard_args(args: ModelArgs, scheme: dict[str, Any] | None, ranks: Ranks) -> ModelArgs:
    """The args of the model that a rank holds.

    Raises ValueError naming the numbers of ranks that would do, where this one does not.
    """
    if reason := indivisible_reason(args, scheme, ranks.world_size):
        others = [
            n for n in range(1, MAX_SUGGESTED_RANKS + 1) if not indivisible_reason(args, scheme, n)
        ]
        raise ValueError(
            f"{ranks.world_size} ranks cannot share this model: {reason}; "
            f"{', '.join(map(str, others))} can"
        )
    n = ranks.world_size
    return replace(
        args,
        n_heads=args.n_heads // n,
        n_kv_heads=max(1, args.n_kv_heads // n),
        hidden_dim=args.hidden_dim // n,
    )


def indivisible_reason(args: ModelArgs, scheme: dict[str, Any] | None, count: int) -> str | None:
    """Why so many ranks cannot share a model."""
    heads, kv_heads = args.n_heads, args.n_kv_heads
    group = (scheme or {}).get("linears", {}).get("groupsize", 1)
    if heads % count:
        return f"it has {heads} heads"
    if kv_heads % count and count % kv_heads:
        return f"it has {kv_heads} key/value heads"
    if args.hidden_dim % (count * group):
        return f"it has {args.hidden_dim} neurons a layer" + f", in groups of {group}" * (group > 1)
    if heads // count * args.head_dim % group:
        return f"{heads // count} heads of {args.head_dim} channels are no groups of {group}"
    return None


def shard_slices(args: ModelArgs, ranks: Ranks) -> Iterator[tuple[str, ShardSlice]]:
    """The linears of which a rank has a part: how their names end, and which part. args: of the
    whole model."""
    E, H, G, F_ = args.head_dim, args.n_heads, args.n_kv_heads, args.hidden_dim
    heads, neurons = ranks.shard_range(H), ranks.shard_range(F_)
    first = (
        ranks.rank * G // ranks.world_size
    )  # where ranks outnumber key/value heads, some share one
    kv = range(first, first + max(1, G // ranks.world_size))
    q, k, v = (
        range(start + part.start * E, start + part.stop * E)
        for start, part in ((0, heads), (H * E, kv), ((H + G) * E, kv))
    )
    yield "attention.wqkv", ShardSlice(rows=(q, k, v))
    yield "attention.wo", ShardSlice(columns=q)
    yield "feed_forward.w1", ShardSlice(rows=(neurons,))
    yield (
        "feed_forward.w13",
        ShardSlice(rows=(neurons, range(neurons.start + F_, neurons.stop + F_))),
    )
    yield "feed_forward.w2", ShardSlice(columns=neurons)
    yield "output", ShardSlice(rows=(ranks.shard_range(args.vocab_size),))


class RowParallel(nn.Module):
    """A linear of which each rank has some inputs: outputs are added, then, once, the bias."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.bias, linear.bias = linear.bias, None
        self.shard = linear

    def forward(self, x: Tensor) -> Tensor:
        y = all_reduce(self.shard(x))
        return y if self.bias is None else y + self.bias


class ColumnParallel(nn.Module):
    """A linear of which each rank has some outputs, the last ranks perhaps fewer."""

    def __init__(self, linear: nn.Module, outputs: int, count: int):
        super().__init__()
        self.shard, self.outputs = linear, outputs
        self.idle = -(-outputs // count) - linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.shard(x), (0, self.idle))  # (..., most)
        return gather(y)[..., : self.outputs]


def all_reduce(x: Tensor) -> Tensor:
    """The sum of what all ranks have, on all of them."""
    return collectives.all_reduce(x, "sum", dist.group.WORLD)


def gather(x: Tensor) -> Tensor:
    """What all ranks have, along the last dimension, on all of them."""
    return ALL_GATHER(x, x.dim() - 1, dist.group.WORLD)


@dataclass(frozen=True)
class TensorParallel:
    """Each rank has a share of every layer, of whatever can be cut by heads, neurons or words."""

    ranks: Ranks

    def shard_args(self, args: ModelArgs, scheme: dict[str, Any] | None) -> ModelArgs:
        """Raises ValueError naming the numbers of ranks that would do, where this one does not."""
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
            model.output.weight = model.tok_embeddings.weight  # all of it, until `finish`
        for layer in model.layers:
            layer.attention.wo = RowParallel(layer.attention.wo)
            layer.feed_forward.w2 = RowParallel(layer.feed_forward.w2)
        model.output = ColumnParallel(model.output, args.vocab_size, ranks.world_size)
        return model

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        """A function that fills one tensor and reads only this rank's slice of the stored one."""
        kept = dict(shard_slices(checkpoint.args, self.ranks))
        stage = staging_buffer(device)

        def filling(name: str, tensor: Tensor) -> None:
            stored = checkpoint_name(name)
            part = kept.get(re.sub(r"^layers\.\d+\.", "", stored.rpartition(".")[0]))
            # By the name, and not by comparing shapes: a slice may have the shape of the whole, as
            # the zero points of two groups, which are one byte, have on each of two ranks.
            if part and part.rows:
                checkpoint.read_rows_into(stored, part.rows, tensor, stage)
            elif part and (per := inputs_per_column(model, name)):
                read_input_columns(checkpoint, stored, part.columns, per, tensor, stage)
            else:
                fill(stored, tensor)

        return filling

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        return lambda name, dtype: None  # shares lie in pieces

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        """A tied head becomes this rank's rows of the table, the same memory."""
        head, table = model.output.shard, model.tok_embeddings.weight
        if getattr(head, "weight", None) is table:
            part = self.ranks.shard_range(len(table))
            head.weight = nn.Parameter(table[part.start : part.stop], requires_grad=False)

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        return lm


def read_input_columns(
    checkpoint: Checkpoint, name: str, inputs: range, per: int, tensor: Tensor, stage: Tensor
) -> None:
    """Fill a tensor with what a stored one has for some inputs of its linear, `per` to a column."""
    columns = range(inputs.start // per, -(-inputs.stop // per))
    if inputs.start % per == inputs.stop % per == 0:
        return checkpoint.read_columns_into(name, columns, tensor, stage)
    # Zero points, two to a byte: the share begins or ends with half a byte.
    covering = torch.empty(len(tensor), len(columns), dtype=tensor.dtype)
    checkpoint.read_columns_into(name, columns, covering, stage)
    first, count = (2 * n // per for n in (inputs.start % per, len(inputs)))
    tensor.copy_(pack_nibbles(unpack_nibbles(covering)[:, first : first + count]))


def inputs_per_column(model: Transformer, name: str) -> int | None:
    """How many of a linear's inputs a column of one of its tensors is for; None for a tensor that
    has nothing for single inputs: a bias, or scales of outputs."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), "inputs_per_column", {}).get(leaf)


def checkpoint_name(name: str) -> str:
    """Of a rank's tensor, what the checkpoint calls the whole."""
    return name.replace(".shard.", ".")

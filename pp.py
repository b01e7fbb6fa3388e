"""Pipeline parallelism: consecutive layers on consecutive ranks, micro-batches in flight.

Start at PipelineParallel. A rank's stage is a Transformer with some of the layers. In place of the
embedding it receives activations from the previous rank; in place of the output head it sends them
to the next rank. Only the last rank has logits: it draws the tokens and sends them to the others.

The rows of a batch are split into micro-batches, so that all stages work at the same time, each on
another micro-batch. A rank launches the next step of a micro-batch as soon as the tokens of the
last step have arrived.

A scheme (quant/linear.py) says how a model's linears are quantised; None: a dense model. A tied
head is one that shares the embedding's table. A transfer is one send, which another rank receives;
ranks must make the transfers between them in the same order.

Based on GPipe (arXiv 1811.06965), with decoding steps in place of training's micro-batches, and
FlexGen's multi-GPU mode (2303.06865, section 4.3).

Shapes: B rows, T tokens, D dim, V vocab.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import Checkpoint
from decoding import LoadedModel
from layers.args import ModelArgs
from layers.kv_cache import Cache
from layers.positions import LearnedPositions, Rotation
from model import Transformer
from offload import Stored
from quant.linear import meta_model
from ranks import COLLECTIVE_TIMEOUT, Ranks
from sampling import NOT_FINITE, Sampler, to_host
from weights.allocation import Fill

# Prompt tokens of a micro-batch in one call of prefill, by device type. Large chunks make the next
# stage wait for the first chunk; in small chunks reading the weights takes longer than computing.
PREFILL_CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class PipelineParallel:
    """Divides a model by layers; the first rank has the embedding and the last rank the head.

    It implements load.ParallelStrategy. micro_batches: the number of micro-batches of a batch.
    """

    ranks: Ranks
    micro_batches: int

    def shard_args(self, args: ModelArgs, scheme: dict[str, Any] | None) -> ModelArgs:
        """Return the args of this rank's stage: fewer layers, else as `args`, the whole model's.
        scheme: not used. Raises ValueError if there are more ranks than layers."""
        return args.with_layers(stage_layers(args, self.ranks))

    def build_skeleton(self, args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
        """Build this rank's stage on the meta device, before the weights are read. args, scheme: of
        the whole model.

        All but the first rank get ReceiveActivations for the embedding, all but the last rank
        SendActivations for the head. A last rank whose head is tied to the embedding keeps the
        embedding's table for the head.
        """
        model = meta_model(self.shard_args(args, scheme), scheme)
        if self.ranks.rank > 0:
            tied = self._is_last and model.output.weight is model.tok_embeddings.weight
            table = model.tok_embeddings.weight if tied else None
            model.tok_embeddings = ReceiveActivations(args.dim, self.ranks.rank - 1, table)
            model.project_in = nn.Identity()
            if isinstance(model.positions, LearnedPositions):
                model.positions = NoPositions()
        if not self._is_last:
            model.norm = model.project_out = model.scale_logits = nn.Identity()
            model.output = SendActivations(self.ranks.rank + 1)
        return model

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        """Return a function that fills a tensor, given the tensor's name in the stage. fill: does
        so, given the name in the checkpoint. model, device: not used."""
        return lambda name, tensor: fill(self._checkpoint_name(checkpoint, name), tensor)

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        """Return a function of a tensor's name in the stage and a dtype, which returns the tensor's
        file and byte offset, or None, as Checkpoint.location does. Offload reads layers there."""

        def location(name: str, dtype: torch.dtype) -> tuple[Path, int] | None:
            return checkpoint.location(self._checkpoint_name(checkpoint, name), dtype)

        return location

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        """After loading: give the weight of ReceiveActivations, an empty tensor on the meta device,
        the dtype and device of the activations. Other code takes the model's dtype and device from
        this weight. A weight that is the table of a tied head stays."""
        embedding = model.tok_embeddings
        if isinstance(embedding, ReceiveActivations) and embedding.weight.is_meta:
            embedding.weight = torch.empty(0, model.args.dim, dtype=dtype, device=device)

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        """Return the LoadedModel with micro-batches and with a sampler that sends tokens to all
        ranks. All ranks must call it together, because it makes a process group. Ranks before the
        last compute all positions in prefill and decode, see forward_all_positions."""
        # A process group of its own: in one group NCCL runs the transfers of two ranks in order, so
        # that a micro-batch's activations would wait for another's tokens.
        group = dist.new_group(timeout=COLLECTIVE_TIMEOUT)
        forward = partial(forward_all_positions, lm.model)
        return replace(
            lm,
            prefill=lm.prefill if self._is_last else forward,
            decode=lm.decode if self._is_last else forward,
            sampler=partial(BroadcastSampler, self.ranks, group),
            new_caches=partial(make_micro_batch_caches, self.micro_batches, lm.new_caches),
            micro_batches=split_micro_batches,
            prefill_chunk_tokens=lm.prefill_chunk_tokens or PREFILL_CHUNK_TOKENS[lm.device.type],
        )

    @property
    def _is_last(self) -> bool:
        return self.ranks.rank == self.ranks.world_size - 1

    def _checkpoint_name(self, checkpoint: Checkpoint, name: str) -> str:
        """Convert a tensor's name in the stage, whose layers count from 0, to its name in the
        checkpoint, which numbers the layers of the whole model."""
        if not name.startswith("layers."):
            return name
        prefix, n, rest = name.split(".", 2)
        return f"{prefix}.{stage_layers(checkpoint.args, self.ranks)[int(n)]}.{rest}"


def forward_all_positions(
    model: Transformer,
    tokens: Tensor,
    pos: Tensor,
    key_pos: Tensor,
    caches: Any,
    at: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Transformer.forward for a stage before the last. It computes and sends all positions, because
    the next stage's layers need them all. (The last stage computes the head for `at` only.)

    Returns activations, (B, T, D), or those that `at` lists, (len(at), D): callers use the shape
    and device of the result in place of logits, but not its values. at: None, or indices from 0 to
    B * T - 1. pos: (B, T), positions of the tokens. key_pos, lengths: see Transformer.forward.
    """
    x = model(tokens, pos, key_pos, caches, lengths=lengths)
    return x if at is None else x.flatten(0, 1)[at]  # (B, T, D) -> (B * T, D) -> (len(at), D)


def stage_layers(args: ModelArgs, ranks: Ranks) -> range:
    """Return the layers of this rank: at least one, and so many that all ranks have about the same
    number of multiplications.

    args: of the whole model. The output head, which the last rank has, counts as head_layers layers
    after the last one. Raises ValueError if there are more ranks than layers.
    """
    if ranks.world_size > args.n_layers:
        raise ValueError(
            f"{ranks.world_size} ranks cannot share {args.n_layers} layers in a pipeline"
        )
    # Multiplications of a layer for one token, divided by dim.
    feed_forward = args.hidden_dim * (3 if args.feed_forward == "gated" else 2)
    attention = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim
    layer = args.dim * (feed_forward + attention)
    head_layers = args.vocab_size * args.embed_dim / layer
    layers_per_rank = (args.n_layers + head_layers) / ranks.world_size
    bounds = [0]  # the first layer of each rank
    for rank in range(1, ranks.world_size):
        # Between these, each rank has at least one layer.
        lowest, highest = bounds[-1] + 1, args.n_layers - (ranks.world_size - rank)
        bounds.append(min(max(round(rank * layers_per_rank), lowest), highest))
    bounds.append(args.n_layers)
    return range(bounds[ranks.rank], bounds[ranks.rank + 1])


class PendingTransfers:
    """Keeps the tensors of transfers alive until they have arrived.

    Neither the sender nor the receiver may free a tensor while its transfer runs. Gloo also drops a
    transfer whose dist.Work nobody holds.
    """

    def __init__(self):
        self._transfers: deque[tuple[dist.Work, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._transfers)

    def add(self, work: dist.Work, tensor: Tensor) -> None:
        """Keep a tensor until its transfer has ended, and release tensors whose transfers have
        ended. They are released in the order of the calls: a transfer that still runs keeps all
        later ones. work: the result of isend or irecv for this tensor."""
        while self._transfers and self._transfers[0][0].is_completed():
            self._transfers.popleft()
        self._transfers.append((work, tensor))


# Global: the last tensors of a batch or a model may arrive after that batch or model is freed.
pending_transfers = PendingTransfers()


class ReceiveActivations(nn.Module):
    """Replaces the embedding: waits for the output of the previous rank, (B, T, D).

    Of its input, (B, T) ids, only the shape matters. dim: D. source: the previous rank. table: the
    embedding's, if this rank's head is tied to the embedding; None: `weight` is an empty tensor, to
    which PipelineParallel.finish gives the dtype and device of the activations. LoadedModel.device
    is the device of `weight`.
    """

    def __init__(self, dim: int, source: int, table: Tensor | None):
        super().__init__()
        self.dim, self.source = dim, source
        self.weight = torch.empty(0, dim, device="meta") if table is None else table

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.weight.new_empty(*tokens.shape, self.dim)
        dist.recv(x, self.source)
        return x


class SendActivations(nn.Module):
    """Replaces the output head: starts to send its input, (B, T, D), to the rank `target`, and
    returns the input."""

    def __init__(self, target: int):
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        pending_transfers.add(dist.isend(x, self.target), x)
        return x


class NoPositions(nn.Module):
    """Replaces LearnedPositions on all ranks but the first, which adds the positions: returns x
    unchanged, and no rotations."""

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Rotation]]:
        return x, []


class BroadcastSampler(Sampler):
    """A Sampler that draws on the last rank only and sends the tokens to the other ranks.

    The other ranks wait for the tokens in the function that copy_to_host_async returns. ranks: this
    rank and the number of ranks. group: a process group for these transfers only. sampler_args: the
    arguments of Sampler. All ranks must draw in the same order, because the transfers have no
    names.
    """

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup, *sampler_args: Any):
        super().__init__(*sampler_args)
        self._rank, self._last, self._group = ranks.rank, ranks.world_size - 1, group

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Return one token for each position, (B, T). logits: (B, T, V) on the last rank; other
        ranks use only their device. numbers: (B, T), see Sampler.

        The last rank draws, and starts to send the tokens, with NOT_FINITE in place of tokens whose
        highest logit is not finite, and then the log-probabilities. Other ranks return a tensor
        that is being received: wait for it before reading it, see copy_to_host_async.
        """
        if self._rank < self._last:
            return self._receive(logits.device, numbers.shape)
        tokens = super().__call__(logits, numbers)
        marked = torch.where(self.max_logits.isfinite(), tokens, NOT_FINITE)
        for rank in range(self._last):
            for tensor in (marked, *self.logprobs):
                pending_transfers.add(dist.isend(tensor, rank, self._group), tensor)
        return tokens

    def _receive(self, device: torch.device, shape: torch.Size) -> Tensor:
        """Start to receive tokens of this shape, (B, T), and with config.logprobs also the three
        tensors of token_logprobs. Returns the tensor of tokens, which is filled later."""
        tokens, count = torch.empty(shape, dtype=torch.long, device=device), self.config.logprobs
        # All finite for to_host: the last rank has put NOT_FINITE among the tokens already.
        self.max_logits = torch.zeros(shape, device=device)
        if count is not None:
            top = torch.empty(*shape, count, device=device)  # (B, T, count)
            self.logprobs = torch.empty(shape, device=device), top, torch.empty_like(top).long()
        self._receiving = []
        for tensor in (tokens, *self.logprobs):
            self._receiving.append(dist.irecv(tensor, self._last, self._group))
            pending_transfers.add(self._receiving[-1], tensor)
        return tokens

    def copy_to_host_async(self, tokens: Tensor) -> Callable[[], list[list[int]]]:
        """Return a function that waits for the tokens of the latest draw, (B, T), and returns them
        as to_host does. On ranks before the last, the wait ends when they are received. Call it
        before the next draw."""
        if self._rank == self._last:
            return super().copy_to_host_async(tokens)
        receiving, drawn = self._receiving, (tokens, self.max_logits, *self.logprobs)

        def wait() -> list[list[int]]:
            """Wait until all tensors of this draw are received, and return each row's ids.

            NOT_FINITE stays among the ids, so that the caller raises.
            """
            for work in receiving:
                work.wait()
            ids = to_host(*drawn)
            if any(NOT_FINITE in row for row in ids):
                # A next step may be launched before the error ends the run: its embedding takes no
                # negative ids.
                tokens.clamp_(min=0)
            return ids

        return wait


class MicroBatchCache:
    """One layer's cache of all rows. parts: the cache of each micro-batch, in the order of the
    rows. length, ring, device: those of each part. rows: the number of rows of all parts, or fewer
    after `first`."""

    def __init__(self, parts: Sequence[Cache]):
        self.parts, self.length, self.device = parts, parts[0].length, parts[0].device
        self.ring = parts[0].ring
        self.rows = sum(part.rows for part in parts)

    def first(self, count: int) -> "MicroBatchCache":
        """Return a cache of the first `count` rows, with the same memory. Its `parts` have all rows
        still; split_micro_batches leaves the other rows out."""
        first = copy.copy(self)
        first.rows = count
        return first


def make_micro_batch_caches(
    micro_batches: int,
    make: Callable[..., Sequence[Cache]],
    lm: LoadedModel,
    batch: int,
    length: int,
) -> list[MicroBatchCache]:
    """Return a cache of `batch` rows for each layer, which holds a cache for each micro-batch.

    A micro-batch has batch / micro_batches rows, rounded up; the last one may have fewer, and there
    may be fewer micro-batches. make: called with lm, the rows of a micro-batch and length; returns
    the caches of all layers. length: positions of each row.
    """
    size = -(-batch // micro_batches)
    made = [make(lm, min(size, batch - start), length) for start in range(0, batch, size)]
    return [MicroBatchCache(parts) for parts in zip(*made, strict=True)]


def split_micro_batches(caches: Sequence[MicroBatchCache]) -> list[tuple[range, list[Cache]]]:
    """Return for each micro-batch the indices of its rows in the batch, and its caches of all
    layers. caches: of all layers, from make_micro_batch_caches or MicroBatchCache.first.
    Micro-batches without rows are left out: `first` may have dropped them."""
    micro_batches, start = [], 0
    for n, part in enumerate(caches[0].parts):
        rows = range(start, min(start + part.rows, caches[0].rows))
        start = rows.stop
        if rows:
            micro_batches.append((rows, [cache.parts[n].first(len(rows)) for cache in caches]))
    return micro_batches


def default_micro_batches(ranks: Ranks) -> int:
    """Return the number of stages: one micro-batch for each keeps all stages busy. With more
    micro-batches the weights would be read more often."""
    return ranks.world_size

"""Pipeline parallelism: consecutive layers on consecutive ranks, several micro_batches of rows under way.

Start at PipelineParallel. A rank's stage is a Transformer like any other, of fewer layers, whose embedding
receives what the rank before it sends, and whose head sends. The last rank alone has logits; it
draws the tokens and tells them to the others. Rows go through the stages in micro_batches: while the last
stage has one, those before it have others. A rank launches a micro_batch's next step as soon as it knows
the tokens of the one before, which is what keeps all of them busy.

Based on GPipe (arXiv 1811.06965), with steps of decoding in place of micro-batches of one step,
and FlexGen's multi-GPU mode (2303.06865, section 4.3).

Shapes: B rows, T tokens, D dim, V vocab.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import Checkpoint
from decoding import LoadedModel
from model import KVCache, LearnedPositions, ModelArgs, Transformer
from offload import Fill, Stored
from quant.linear import meta_model
from ranks import COLLECTIVE_TIMEOUT, Ranks
from sampling import NOT_FINITE, Sampler, to_host

# Prompt tokens of a micro_batch that go on together: the next stage waits for the first of them, and
# products of fewer would read weights more often than they compute with them.
PREFILL_CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class PipelineParallel:
    """Each rank has consecutive layers, the first the embedding, the last the head."""

    ranks: Ranks
    micro_batches: int  # of rows, that are under way

    def shard_args(self, args: ModelArgs, scheme: dict[str, Any] | None) -> ModelArgs:
        """Raises ValueError where there are more ranks than layers."""
        return replace(args, n_layers=len(stage_layers(args, self.ranks)))

    def build_skeleton(self, args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
        first, last = self.ranks.rank == 0, self.ranks.rank == self.ranks.world_size - 1
        model = meta_model(self.shard_args(args, scheme), scheme)
        if not first:
            tied = model.output.weight is model.tok_embeddings.weight if last else False
            table = model.tok_embeddings.weight if tied else None
            model.tok_embeddings = ReceiveActivations(args.dim, self.ranks.rank - 1, table)
            model.project_in = nn.Identity()
            if isinstance(model.positions, LearnedPositions):
                model.positions = NoPositions()
        if not last:
            model.norm = model.project_out = nn.Identity()
            model.output = SendActivations(self.ranks.rank + 1)
        return model

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        return lambda name, tensor: fill(self._stored_name(checkpoint, name), tensor)

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        return lambda name, dtype: checkpoint.location(self._stored_name(checkpoint, name), dtype)

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        if (
            isinstance(model.tok_embeddings, ReceiveActivations)
            and model.tok_embeddings.weight.is_meta
        ):
            model.tok_embeddings.weight = torch.empty(0, model.args.dim, dtype=dtype, device=device)

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        def view(
            tokens: Tensor,
            pos: Tensor,
            slots: Tensor,
            caches: Any,
            at: Tensor | None = None,
            lengths: Tensor | None = None,
        ) -> Tensor:
            # (B, T, D): the rank behind needs all of it.
            x = lm.model(tokens, pos, slots, caches, lengths=lengths)
            return x if at is None else x.flatten(0, 1)[at]

        last = self.ranks.rank == self.ranks.world_size - 1
        return replace(
            lm,
            prefill=lm.prefill if last else view,
            decode=lm.decode if last else view,
            # A group of its own: NCCL does what two ranks have to do in one group in its order,
            # and micro_batches would wait for each other's tokens.
            sampler=partial(
                BroadcastSampler, self.ranks, dist.new_group(timeout=COLLECTIVE_TIMEOUT)
            ),
            new_caches=partial(make_micro_batch_caches, self.micro_batches, lm.new_caches),
            micro_batches=split_micro_batches,
            prefill_chunk_tokens=lm.prefill_chunk_tokens or PREFILL_CHUNK_TOKENS[lm.device.type],
        )

    def _stored_name(self, checkpoint: Checkpoint, name: str) -> str:
        if not name.startswith("layers."):
            return name
        layers, n, rest = name.split(".", 2)
        return f"{layers}.{stage_layers(checkpoint.args, self.ranks)[int(n)]}.{rest}"


def stage_layers(args: ModelArgs, ranks: Ranks) -> range:
    """The layers of a rank, so that all ranks have as much to multiply, the head included.

    Raises ValueError where there are more ranks than layers.
    """
    if ranks.world_size > args.n_layers:
        raise ValueError(
            f"{ranks.world_size} ranks cannot share {args.n_layers} layers in a pipeline"
        )
    inner = args.hidden_dim * (3 if args.feed_forward == "gated" else 2)
    heads = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim
    head = args.vocab_size * args.embed_dim / (args.dim * (inner + heads))  # in layers
    share = (args.n_layers + head) / ranks.world_size
    bounds = [0]
    for rank in range(1, ranks.world_size):
        least, most = bounds[-1] + 1, args.n_layers - (ranks.world_size - rank)
        bounds.append(min(max(round(rank * share), least), most))
    bounds.append(args.n_layers)
    return range(bounds[ranks.rank], bounds[ranks.rank + 1])


class PendingSends:
    """What is on its way: nobody else may hold it, and it must stay until it has arrived."""

    def __init__(self):
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def add(self, work: dist.Work, tensor: Tensor) -> None:
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
        self._under_way.append((work, tensor))


# As long as the process lives: what a batch, or a model, has sent last may arrive after its end.
pending_sends = PendingSends()


class ReceiveActivations(nn.Module):
    """In place of the embedding: (B, T) ids -> (B, T, D), what the rank before made of them.

    weight: the table, where this rank's head is tied to it, else nothing of the right dtype.
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
    """In place of the head: (B, T, D) is sent to the rank behind, and is what comes out, too."""

    def __init__(self, target: int):
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        pending_sends.add(dist.isend(x, self.target), x)
        return x


class NoPositions(nn.Module):
    """In place of learned positions, which the first rank has added."""

    def forward(self, x: Tensor, pos: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, None]:
        return x, None


class BroadcastSampler(Sampler):
    """The last rank draws, and tells the others, which know when they begin to read."""

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup, *given: Any):
        super().__init__(*given)
        self._rank, self._last, self._group = ranks.rank, ranks.world_size - 1, group

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        if self._rank < self._last:
            return self._receive(logits.device, numbers.shape)
        tokens = super().__call__(logits, numbers)
        told = torch.where(self.peaks.isfinite(), tokens, NOT_FINITE)
        for other in range(self._last):
            for tensor in (told, *self.scores):
                pending_sends.add(dist.isend(tensor, other, self._group), tensor)
        return tokens

    def _receive(self, device: torch.device, shape: torch.Size) -> Tensor:
        tokens, count = torch.empty(shape, dtype=torch.long, device=device), self.config.logprobs
        self.peaks = torch.zeros(shape, device=device)  # what is not finite has been marked
        if count is not None:
            top = torch.empty(*shape, count, device=device)  # (B, T, count)
            self.scores = torch.empty(shape, device=device), top, torch.empty_like(top).long()
        self._coming = []
        for tensor in (tokens, *self.scores):
            self._coming.append(dist.irecv(tensor, self._last, self._group))
            pending_sends.add(self._coming[-1], tensor)
        return tokens

    def copy_to_host_async(self, tokens: Tensor) -> Callable[[], list[list[int]]]:
        if self._rank == self._last:
            return super().copy_to_host_async(tokens)
        coming, host = self._coming, (tokens, self.peaks, *self.scores)

        def read() -> list[list[int]]:
            for work in coming:
                work.wait()
            ids = to_host(*host)
            if any(NOT_FINITE in row for row in ids):
                tokens.clamp_(min=0)  # the next step, which is launched all the same, looks them up
            return ids

        return read


class MicroBatchCache:
    """One layer's cache of all rows, as KVCache is used: each micro_batch has one of its own."""

    def __init__(self, parts: Sequence[KVCache]):
        self.parts, self.length, self.device = parts, parts[0].length, parts[0].device
        self.rows = sum(part.rows for part in parts)

    def first(self, count: int) -> "MicroBatchCache":
        """The same memory, of so many rows."""
        first = copy.copy(self)
        first.rows = count
        return first


def make_micro_batch_caches(
    micro_batches: int,
    make: Callable[..., Sequence[KVCache]],
    lm: LoadedModel,
    batch: int,
    length: int,
) -> list[MicroBatchCache]:
    size = -(-batch // micro_batches)
    made = [make(lm, min(size, batch - start), length) for start in range(0, batch, size)]
    return [MicroBatchCache(parts) for parts in zip(*made, strict=True)]


def split_micro_batches(caches: Sequence[MicroBatchCache]) -> list[tuple[range, list[KVCache]]]:
    """The rows of each micro_batch, and its caches."""
    found, start = [], 0
    for n, part in enumerate(caches[0].parts):
        rows = range(start, min(start + part.rows, caches[0].rows))
        start = rows.stop
        if rows:
            found.append((rows, [cache.parts[n].first(len(rows)) for cache in caches]))
    return found


def default_micro_batches(ranks: Ranks) -> int:
    """As many as keep all stages busy, and no more: weights are read for each."""
    return ranks.world_size

"""Pipeline parallelism: consecutive layers on consecutive ranks, micro-batches in flight.

Start at PipelineParallel. A rank's stage is a Transformer with some of the layers. In place of the
embedding it receives activations from the rank before; in place of the head it sends them to the
rank after. Only the last rank has logits: it draws the tokens and sends them to the other ranks.

The rows of a batch are split into micro-batches, so that all stages work at the same time, each on
another micro-batch. A rank launches a micro-batch's next step as soon as it knows its last tokens.

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
from model import KVCache, LearnedPositions, ModelArgs, Transformer
from offload import Fill, Stored
from quant.linear import meta_model
from ranks import COLLECTIVE_TIMEOUT, Ranks
from sampling import NOT_FINITE, Sampler, to_host

# Prompt tokens of a micro-batch in one call. The next stage waits for the first chunk, and smaller
# chunks take more time to read the weights than to compute with them.
PREFILL_CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class PipelineParallel:
    """Divides a model by layers; the first rank has the embedding and the last rank the head.

    It implements load.ParallelStrategy. micro_batches: the number of micro-batches in flight.
    """

    ranks: Ranks
    micro_batches: int

    def shard_args(self, args: ModelArgs, scheme: dict[str, Any] | None) -> ModelArgs:
        """Raises ValueError if there are more ranks than layers."""
        return replace(args, n_layers=len(stage_layers(args, self.ranks)))

    def build_skeleton(self, args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
        model = meta_model(self.shard_args(args, scheme), scheme)
        if self.ranks.rank > 0:
            tied = self._is_last and model.output.weight is model.tok_embeddings.weight
            table = model.tok_embeddings.weight if tied else None
            model.tok_embeddings = ReceiveActivations(args.dim, self.ranks.rank - 1, table)
            model.project_in = nn.Identity()
            if isinstance(model.positions, LearnedPositions):
                model.positions = NoPositions()
        if not self._is_last:
            model.norm = model.project_out = nn.Identity()
            model.output = SendActivations(self.ranks.rank + 1)
        return model

    def fill_function(
        self, checkpoint: Checkpoint, model: Transformer, device: torch.device, fill: Fill
    ) -> Fill:
        return lambda name, tensor: fill(self._checkpoint_name(checkpoint, name), tensor)

    def location_function(self, checkpoint: Checkpoint) -> Stored:
        def location(name: str, dtype: torch.dtype) -> tuple[Path, int] | None:
            return checkpoint.location(self._checkpoint_name(checkpoint, name), dtype)

        return location

    def finish(self, model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
        embedding = model.tok_embeddings
        if isinstance(embedding, ReceiveActivations) and embedding.weight.is_meta:
            embedding.weight = torch.empty(0, model.args.dim, dtype=dtype, device=device)

    def wrap(self, lm: LoadedModel) -> LoadedModel:
        # A process group of its own: in one group NCCL runs the transfers of two ranks in order,
        # so that a micro-batch's activations would wait for another's tokens.
        group = dist.new_group(timeout=COLLECTIVE_TIMEOUT)
        view = partial(forward_all_positions, lm.model)
        return replace(
            lm,
            prefill=lm.prefill if self._is_last else view,
            decode=lm.decode if self._is_last else view,
            sampler=partial(BroadcastSampler, self.ranks, group),
            new_caches=partial(make_micro_batch_caches, self.micro_batches, lm.new_caches),
            micro_batches=split_micro_batches,
            prefill_chunk_tokens=lm.prefill_chunk_tokens or PREFILL_CHUNK_TOKENS[lm.device.type],
        )

    @property
    def _is_last(self) -> bool:
        return self.ranks.rank == self.ranks.world_size - 1

    def _checkpoint_name(self, checkpoint: Checkpoint, name: str) -> str:
        """Convert the name of a stage's tensor to the checkpoint's, which counts all layers."""
        if not name.startswith("layers."):
            return name
        layers, n, rest = name.split(".", 2)
        return f"{layers}.{stage_layers(checkpoint.args, self.ranks)[int(n)]}.{rest}"


def forward_all_positions(
    model: Transformer,
    tokens: Tensor,
    pos: Tensor,
    key_pos: Tensor,
    caches: Any,
    at: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Transformer.forward for a stage before the last: it computes all positions, because the next
    stage needs them, and selects those of `at` from the result, (B, T, D)."""
    x = model(tokens, pos, key_pos, caches, lengths=lengths)
    return x if at is None else x.flatten(0, 1)[at]  # (B, T, D) -> (B * T, D) -> (len(at), D)


def stage_layers(args: ModelArgs, ranks: Ranks) -> range:
    """Return the layers of this rank, such that all ranks do as many multiplications; the head
    counts as layers of the last rank.

    Raises ValueError if there are more ranks than layers.
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
    """Keeps sent tensors alive until they have arrived.

    A sender must not free or overwrite a tensor while its transfer runs.
    """

    def __init__(self):
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._sends)

    def add(self, work: dist.Work, tensor: Tensor) -> None:
        """Keep the tensor of a transfer, and release those of finished transfers."""
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        self._sends.append((work, tensor))


# Global, because a batch's or a model's last tensors may arrive after that batch or model is gone.
pending_sends = PendingSends()


class ReceiveActivations(nn.Module):
    """Replaces the embedding: (B, T) ids -> (B, T, D), the output of the rank before.

    weight: the embedding's table if this rank's head is tied to it; else an empty tensor, which
    tells dtype and device.
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
    """Replaces the head: sends its input, (B, T, D), to the rank after, and returns it."""

    def __init__(self, target: int):
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        pending_sends.add(dist.isend(x, self.target), x)
        return x


class NoPositions(nn.Module):
    """Replaces learned positions, which only the first rank adds."""

    def forward(self, x: Tensor, pos: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, None]:
        return x, None


class BroadcastSampler(Sampler):
    """A Sampler that draws on the last rank alone and sends the tokens to the other ranks.

    The other ranks wait for the tokens in the function that copy_to_host_async returns.
    """

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup, *given: Any):
        super().__init__(*given)
        self._rank, self._last, self._group = ranks.rank, ranks.world_size - 1, group

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        if self._rank < self._last:
            return self._receive(logits.device, numbers.shape)
        tokens = super().__call__(logits, numbers)
        marked = torch.where(self.max_logits.isfinite(), tokens, NOT_FINITE)
        for other in range(self._last):
            for tensor in (marked, *self.logprobs):
                pending_sends.add(dist.isend(tensor, other, self._group), tensor)
        return tokens

    def _receive(self, device: torch.device, shape: torch.Size) -> Tensor:
        """Start to receive the tokens, and the log-probabilities if config asks for them."""
        tokens, count = torch.empty(shape, dtype=torch.long, device=device), self.config.logprobs
        self.max_logits = torch.zeros(shape, device=device)  # tokens carry NOT_FINITE already
        if count is not None:
            top = torch.empty(*shape, count, device=device)  # (B, T, count)
            self.logprobs = torch.empty(shape, device=device), top, torch.empty_like(top).long()
        self._receiving = []
        for tensor in (tokens, *self.logprobs):
            self._receiving.append(dist.irecv(tensor, self._last, self._group))
            pending_sends.add(self._receiving[-1], tensor)
        return tokens

    def copy_to_host_async(self, tokens: Tensor) -> Callable[[], list[list[int]]]:
        if self._rank == self._last:
            return super().copy_to_host_async(tokens)
        receiving, drawn = self._receiving, (tokens, self.max_logits, *self.logprobs)

        def wait() -> list[list[int]]:
            for work in receiving:
                work.wait()
            ids = to_host(*drawn)
            if any(NOT_FINITE in row for row in ids):
                tokens.clamp_(min=0)  # the next step, launched before the error, embeds them
            return ids

        return wait


class MicroBatchCache:
    """One layer's cache of all rows; each micro-batch has a KVCache of its own in `parts`."""

    def __init__(self, parts: Sequence[KVCache]):
        self.parts, self.length, self.device = parts, parts[0].length, parts[0].device
        self.rows = sum(part.rows for part in parts)

    def first(self, count: int) -> "MicroBatchCache":
        """Return a view of the first `count` rows, on the same memory."""
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
    """Make the caches of each micro-batch, of batch / micro_batches rows, rounded up, or fewer.

    make, lm, batch, length: see LoadedModel.new_caches.
    """
    size = -(-batch // micro_batches)
    made = [make(lm, min(size, batch - start), length) for start in range(0, batch, size)]
    return [MicroBatchCache(parts) for parts in zip(*made, strict=True)]


def split_micro_batches(caches: Sequence[MicroBatchCache]) -> list[tuple[range, list[KVCache]]]:
    """Return the rows of each micro-batch, and its caches of all layers."""
    found, start = [], 0
    for n, part in enumerate(caches[0].parts):
        rows = range(start, min(start + part.rows, caches[0].rows))
        start = rows.stop
        if rows:
            found.append((rows, [cache.parts[n].first(len(rows)) for cache in caches]))
    return found


def default_micro_batches(ranks: Ranks) -> int:
    """Return one micro-batch for each stage: enough to keep all stages busy. More would read the
    weights more often."""
    return ranks.world_size

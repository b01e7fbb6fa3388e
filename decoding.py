"""A model that is ready to run, and its steps: prefill, then one token per row after another.

Start at plain_steps, which `generate` (generate.py) consumes; speculate.py has the other way to
make steps, several tokens at a time. load.py makes the LoadedModel that both run.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from host.memory import check_memory
from model import KVCache, Transformer, visible_length
from sampling import Sampler

if TYPE_CHECKING:
    from draft_length import DraftLengthController
    from text.tokenizer import Tokenizer

T = TypeVar("T")
PREFILL_TOKENS = 4096  # of all rows together in one call: bounds the mask and the activations
# So many of the rows must have ended for the others to be moved together. That copies three
# quarters of what attention read in a step and saves it a quarter from then on: six steps pay for
# it. All the copies of a batch together are less than three times its filled cache.
ENDED = 1 / 4

Texts = Sequence[Sequence[int]]  # of each row, prompt and answer so far
# A step's rows, and what waits for their ids and reads them.
Launched = tuple[Sequence[int], Callable[[], list[list[int]]]]
# Proposes at most k draft tokens for the live rows: their ids, (B, k), and the count of each row.
Propose = Callable[[int, AbstractSet[int]], tuple[Tensor, list[int]]]

MicroBatch = tuple[Sequence[int], Sequence[KVCache]]  # rows of a batch, and the caches of those


class Draft(Protocol):
    """Proposes draft tokens, which the model verifies: see speculate.py."""

    controller: "DraftLengthController"
    lm: "LoadedModel | None"  # the draft model; None for NgramDraft

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Propose:
        """Return a function that proposes draft tokens for these texts as they grow.

        caches, sampler: those of the model that verifies.
        """

    def warm_up_inputs(
        self, caches: list[KVCache]
    ) -> "tuple[LoadedModel, list[KVCache], int] | None":
        """The model that guesses, the caches that it uses beside those given, and how many tokens
        of a row it reads at once."""

    def kv_bytes_per_token(self) -> int:
        """Bytes of one position of the draft's own caches."""


def one_micro_batch(caches: Sequence[KVCache]) -> list[MicroBatch]:
    return [(range(caches[0].rows), caches)]


def caches_on_device(lm: "LoadedModel", batch: int, length: int) -> list[KVCache]:
    needed = batch * length * lm.kv_bytes_per_token()
    what = f"a KV cache of {batch} rows of {length} tokens"
    hint = "lower --batch_size or --max_new_tokens, or shorten the texts"
    check_memory(needed, lm.device, what, hint)
    return lm.model.make_caches(batch, length)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run: its two views, eager or compiled, and its tokenizer."""

    model: Transformer
    prefill: Callable[..., Tensor]  # many tokens per row; called as Transformer.forward is
    decode: Callable[..., Tensor]  # one token per row, or with a draft the few to be verified
    tokenizer: "Tokenizer"
    draft: Draft | None = None
    any_rows: bool = True  # a step may have any number of rows; a compiled one is compiled for each
    new_caches: Callable[["LoadedModel", int, int], Sequence[KVCache]] = caches_on_device
    prefill_chunk_tokens: int | None = (
        None  # prompt tokens of all rows in one call, None: PREFILL_TOKENS
    )
    sampler: Callable[..., Sampler] = Sampler
    # Rows that go through the model by themselves, and their caches.
    micro_batches: Callable[[Sequence[KVCache]], Sequence[MicroBatch]] = one_micro_batch

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @torch.inference_mode()
    def make_caches(self, batch: int, length: int) -> Sequence[KVCache]:
        """Caches for `batch` rows of up to `length` tokens; MemoryError before allocating."""
        return self.new_caches(self, batch, visible_length(length, self.model.args.context))

    def kv_bytes_per_token(self) -> int:
        """Bytes of one slot of the caches of all layers, the draft's included."""
        drafted = self.draft.kv_bytes_per_token() if self.draft else 0
        return self.model.kv_bytes_per_token() + drafted


def plain_steps(
    lm: LoadedModel, prompts: Texts, caches: Sequence[KVCache], *given: Any
) -> Iterator[list[list[int]]]:
    """Steps of one new id for each row; given: what launched_steps takes. The host waits for a
    step's ids alone: where the device works by itself, it has been given the next step by then."""
    micro_batches = [
        launched_steps(lm, prompts, micro_batch, *given) for micro_batch in lm.micro_batches(caches)
    ]
    if lm.micro_batches is not one_micro_batch:
        steps = together(micro_batches)
    else:
        steps = launched_ahead(micro_batches[0]) if lm.device.type == "cuda" else micro_batches[0]
    for rows, read in steps:
        new = dict(zip(rows, read(), strict=True))
        yield [new.get(row, []) for row in range(len(prompts))]


def launched_steps(
    lm: LoadedModel,
    prompts: Texts,
    micro_batch: MicroBatch,
    past: int,
    sampler: Sampler,
    count: int,
    live: AbstractSet[int],
) -> Iterator[Launched]:
    """At most `count` steps of a micro_batch, each launched when it is asked for: the rows that it
    computes, and what reads their ids. Once enough rows have ended, caches and sampler are of the
    others alone.

    sampler: of all rows. live: the rows that go on, looked at before every step; the others get
    nothing, or ids that mean nothing.
    """
    (rows, caches), length = micro_batch, micro_batch[1][0].length
    slots = torch.arange(length, device=lm.device)
    texts, sampler = [prompts[row] for row in rows], sampler.select_rows(slots.new_tensor(rows))
    lengths = torch.tensor([len(p) for p in texts], device=lm.device).unsqueeze(1)  # (B, 1)
    logits = prefill(lm, texts, caches, past, slots)  # (B, 1, V)
    for n in range(count):
        tokens = sampler(logits, slots[n : n + 1].expand(len(rows), 1))  # (B, 1)
        yield rows, sampler.copy_to_host_async(tokens)
        going = [i for i, row in enumerate(rows) if row in live]
        if n + 1 == count or not going:
            return
        if lm.any_rows and worth_moving(len(rows), len(going), caches[0].row_granularity):
            rows, at = [rows[i] for i in going], torch.tensor(going, device=lm.device)
            tokens, lengths, sampler = tokens[at], lengths[at], sampler.select_rows(at)
            filled = min(longest(prompts, rows) + n, length)
            caches = [cache.compacted(going, filled) for cache in caches]
        # A row that has ended and is still computed must stay within the cache too.
        pos = (lengths + n).clamp_max(length - 1)  # (B, 1)
        visible = visible_length(longest(prompts, rows) + n + 1, length)
        logits = lm.decode(tokens, pos, slots[:visible], caches)  # (B, 1, V)


def worth_moving(rows: int, going: int, row_granularity: int) -> bool:
    """Whether to move the rows that go on together. row_granularity: rows that cost as much as one."""
    return going <= (1 - ENDED) * rows and -(-going // row_granularity) < -(
        -rows // row_granularity
    )


def longest(prompts: Texts, rows: Sequence[int]) -> int:
    return max(len(prompts[row]) for row in rows)


def together(micro_batches: Sequence[Iterator[Launched]]) -> Iterator[Launched]:
    """Steps of several micro_batches as steps of all their rows. Of each the next is launched as soon as
    its ids are known, while the others are under way."""
    under_way = [(micro_batch, next(micro_batch)) for micro_batch in micro_batches]
    while under_way:
        rows, ids, going = [], [], []
        for micro_batch, (some, read) in under_way:
            rows += some
            ids += read()
            if launched := next(micro_batch, None):
                going.append((micro_batch, launched))
        yield rows, partial(list, ids)
        under_way = going


def launched_ahead(steps: Iterator[T]) -> Iterator[T]:
    """The same steps, each launched before the one before it is read: the device never waits."""
    waiting = next(steps)
    for step in steps:
        yield waiting
        waiting = step
    yield waiting


def prefill(
    lm: LoadedModel,
    prompts: Texts,
    caches: list[KVCache],
    past: int,
    slots: Tensor,
) -> Tensor:
    """Fill the caches with the prompts after their first `past` tokens.

    Returns the logits that follow each prompt's last token, (B, 1, V).
    """
    whole = torch.tensor([[len(p)] for p in prompts], device=lm.device)  # (B, 1)
    lengths = whole[:, 0] - past  # (B,)
    width = max(map(len, prompts)) - past
    padded = [[*p[past:], *[0] * (past + width - len(p))] for p in prompts]
    tokens = torch.tensor(padded, device=lm.device)  # (B, width)
    chunk = max(1, (lm.prefill_chunk_tokens or PREFILL_TOKENS) // len(prompts))
    logits = None
    for n in range(len(caches)):
        caches[n].keep(past)
    for start in range(0, width, chunk):
        part = tokens[:, start : start + chunk]  # (B, T)
        end = past + start + part.shape[1]
        pos = slots[past + start : end].expand_as(part)  # (B, T)
        last = (lengths - 1 - start).clamp(0, part.shape[1] - 1)  # (B,)
        last += torch.arange(0, part.numel(), part.shape[1], device=lm.device)
        visible = slots[: visible_length(end, len(slots))]
        out = lm.prefill(part, pos, visible, caches, last, whole).unsqueeze(1)  # (B, 1, V)
        # A row that ended in an earlier chunk keeps the logits it had there.
        reached = (lengths > start).view(-1, 1, 1)
        logits = out if logits is None else torch.where(reached, out, logits)
    return logits

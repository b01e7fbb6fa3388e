"""A model that is ready to run, and its steps: prefill, then one new token per row and step.

A row is one text of the batch: a prompt and its new ids. A step computes the next id of every
unfinished row; `live` is the set of these rows, from which the caller removes rows that end. The
number of a new token counts the new tokens of its row from 0. lm.prefill and lm.decode are two
views of a model: functions that compute Transformer.forward, eager or compiled. A micro-batch is
some of the rows with their caches: a pipeline of ranks (pp.py) divides a batch into several, so
that each rank computes another one. A draft proposes tokens that the model verifies.

Start at plain_steps, which engine.generate consumes. speculate.py makes steps of several tokens.
load.py makes the LoadedModel that both run.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from host.memory import check_memory
from layers.kv_cache import WINDOW_SLACK, Cache, visible_length
from layers.positions import same_rotations
from model import Transformer
from options.settings import MAX_DRAFT_TOKENS
from sampling import Sampler

if TYPE_CHECKING:
    from draft_length import DraftLengthController
    from text.tokenizer import Tokenizer

T = TypeVar("T")
# Prompt tokens of all rows together in one call: bounds the size of the mask and activations.
PREFILL_TOKENS = 4096
# Share of the rows that must have ended before the other rows are moved together. At a quarter, the
# move copies three quarters of the KV cache, and every later step reads a quarter less, so that six
# steps make up for it. All moves of a batch together copy less than three times its filled cache.
MIN_ENDED_SHARE = 1 / 4

Texts = Sequence[Sequence[int]]  # of each row, prompt and answer so far
# A launched step: its rows, and a function that waits for their new ids and returns a list of each.
Launched = tuple[Sequence[int], Callable[[], list[list[int]]]]
# Called with k and the live rows; proposes at most k draft tokens for each: ids, (B, at most k),
# and the count of each row.
Propose = Callable[[int, AbstractSet[int]], tuple[Tensor, list[int]]]

MicroBatch = tuple[Sequence[int], Sequence[Cache]]  # rows of a batch, and their caches


class Draft(Protocol):
    """Proposes draft tokens, which the model verifies: see speculate.py."""

    controller: "DraftLengthController"  # chooses how many tokens to ask for
    lm: "LoadedModel | None"  # the draft model; None for NgramDraft

    def start(self, prompts: Texts, texts: Texts, caches: list[Cache], sampler: Sampler) -> Propose:
        """Return a function that proposes draft tokens for these texts as they grow.

        texts: the prompts, each with one new id or more. caches, sampler: those of the model that
        verifies.
        """

    def warm_up_inputs(self, caches: list[Cache]) -> "tuple[LoadedModel, list[Cache], int] | None":
        """Return the draft model, its caches and the most tokens of a row that one of its decoding
        steps reads; None if no model drafts. caches: those of the model that verifies. load.py
        compiles the draft model for these."""

    def kv_bytes(self, length: int) -> int:
        """Return the bytes of one row of `length` positions in the draft's own caches."""


def one_micro_batch(caches: Sequence[Cache]) -> list[MicroBatch]:
    """Returns a single micro-batch of all rows: the default of LoadedModel.micro_batches."""
    return [(range(caches[0].rows), caches)]


def caches_on_device(lm: "LoadedModel", batch: int, length: int) -> list[Cache]:
    """Make caches for `batch` rows of `length` positions, on the model's device: the default of
    LoadedModel.new_caches. Raises MemoryError before it allocates anything."""
    needed = batch * lm.kv_bytes(length)
    what = f"a KV cache of {batch} rows of {length} tokens"
    hint = "lower --batch_size or --max_new_tokens, or shorten the texts"
    check_memory(needed, lm.device, what, hint)
    return lm.model.make_caches(batch, length)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run: its two views, eager or compiled, and its tokenizer.

    load.py makes it. Offloading and CUDA graphs replace new_caches; a pipeline of ranks also
    replaces sampler and micro_batches.
    """

    model: Transformer
    prefill: Callable[..., Tensor]  # many tokens per row; called as Transformer.forward is
    decode: Callable[..., Tensor]  # one token per row, or with a draft the few that it verifies
    tokenizer: "Tokenizer"
    draft: Draft | None = None
    # Whether a step takes any number of rows; False: it is compiled for all rows of the caches.
    any_rows: bool = True
    # Called with this model, a number of rows and a number of positions; see make_caches.
    new_caches: Callable[["LoadedModel", int, int], Sequence[Cache]] = caches_on_device
    # Prompt tokens of all rows together in one call of prefill. None: PREFILL_TOKENS.
    prefill_chunk_tokens: int | None = None
    sampler: Callable[..., Sampler] = Sampler  # makes the Sampler of a batch
    # Splits the caches of a batch into micro-batches.
    micro_batches: Callable[[Sequence[Cache]], Sequence[MicroBatch]] = one_micro_batch

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @torch.inference_mode()
    def make_caches(self, batch: int, length: int) -> Sequence[Cache]:
        """Make the caches of all layers for `batch` rows of `length` tokens. The length is rounded
        up, at most to the model's context: see visible_length. Raises MemoryError before it
        allocates."""
        return self.new_caches(self, batch, visible_length(length, self.model.args.context))

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of one row of `length` positions in the caches of all layers, those of
        a draft model included."""
        of_draft = self.draft.kv_bytes(length) if self.draft else 0
        return self.model.kv_bytes(length) + of_draft


def reusable_tokens(
    lm: LoadedModel, caches: Sequence[Cache], past: int, stored: int, length: int
) -> int:
    """Returns how many leading tokens of a prompt need no prefill, because the caches of one row
    hold their keys and values: past or 0.

    past: leading tokens that the prompt has in common with the text in the caches. stored: the most
    tokens that the caches have held since they were last filled from position 0. length: tokens of
    the prompt. The result is 0 if a ring has overwritten a key that is still seen, or if the keys
    have other rotations than in the prompt, see same_rotations.
    """
    # The caches may also have stored rejected draft tokens beyond the text.
    kept = keeps_past(lm, caches, past, stored + MAX_DRAFT_TOKENS)
    return past if kept and same_rotations(lm.model.args, stored, length) else 0


def keeps_past(lm: LoadedModel, caches: Sequence[Cache], past: int, written: int) -> bool:
    """Returns whether the caches still have every key that tokens at and after position `past` see.

    Only rings lose keys: once more than WINDOW_SLACK positions beyond `past` have been stored.
    written: the most positions of a row that have been stored since the caches were last filled
    from position 0; tokens that the text no longer has, and rejected draft tokens, count.
    """
    return written - past <= WINDOW_SLACK or not lm.model.has_rings(caches[0].length)


def plain_steps(
    lm: LoadedModel, prompts: Texts, caches: Sequence[Cache], *given: Any
) -> Iterator[list[list[int]]]:
    """Yield, for each step, a list of new ids for each row: one id; none, or a meaningless one, for
    a row that has ended.

    prompts: the ids of each row's prompt, one for each row of the caches. given: past, sampler,
    numbers and live of launched_steps. Ends after the last number, or when `live` is empty.
    On a GPU the host launches a step before it reads the ids of the step before. On a CPU the
    launch itself computes the step.
    """
    micro_batches = [
        launched_steps(lm, prompts, micro_batch, *given) for micro_batch in lm.micro_batches(caches)
    ]
    if lm.micro_batches is not one_micro_batch:
        steps = join_micro_batches(micro_batches)
    else:
        steps = launch_ahead(micro_batches[0]) if lm.device.type == "cuda" else micro_batches[0]
    for rows, read in steps:
        new = dict(zip(rows, read(), strict=True))
        yield [new.get(row, []) for row in range(len(prompts))]


def launched_steps(
    lm: LoadedModel,
    prompts: Texts,
    micro_batch: MicroBatch,
    past: int,
    sampler: Sampler,
    numbers: range,
    live: AbstractSet[int],
) -> Iterator[Launched]:
    """Launch the steps of a micro-batch, each when the next item is asked for.

    To launch is to start a step's computation without waiting for its ids; see Launched.
    prompts: of all rows. past: leading tokens of each prompt that the caches have. sampler: for all
    rows. numbers: of the tokens to draw: from 0, unless the prompts end with new tokens of an
    earlier call. live: the unfinished rows, read before every step; a finished row gets no ids, or
    meaningless ones. Once enough rows have finished, the caches of the other rows are moved
    together, if the model takes any number of rows.
    """
    rows, caches = micro_batch
    length = caches[0].length  # positions of each cache
    key_pos = torch.arange(length, device=lm.device)  # (length,)
    texts, sampler = [prompts[row] for row in rows], sampler.select_rows(key_pos.new_tensor(rows))
    lengths = torch.tensor([len(p) for p in texts], device=lm.device).unsqueeze(1)  # (B, 1)
    logits = prefill(lm, texts, caches, past, key_pos)  # (B, 1, V)
    for n, number in enumerate(numbers):
        # This slice of key_pos, arange, holds `number` on the device without a copy from the host.
        tokens = sampler(logits, key_pos[number : number + 1].expand(len(rows), 1))  # (B, 1)
        yield rows, sampler.copy_to_host_async(tokens)
        going = [i for i, row in enumerate(rows) if row in live]  # indices of unfinished rows
        if n + 1 == len(numbers) or not going:
            return
        if lm.any_rows and pays_to_compact(len(rows), len(going), caches[0].row_granularity):
            rows, at = [rows[i] for i in going], torch.tensor(going, device=lm.device)
            tokens, lengths, sampler = tokens[at], lengths[at], sampler.select_rows(at)
            # Positions that the longest row has stored: its prompt and n tokens of this call; the
            # token that was just drawn is not stored yet.
            filled = min(longest(prompts, rows) + n, length)
            caches = [cache.compacted(going, filled) for cache in caches]
        # Clamped for finished rows that are still computed: they must stay within the cache.
        pos = (lengths + n).clamp_max(length - 1)  # (B, 1)
        visible = visible_length(longest(prompts, rows) + n + 1, length)
        logits = lm.decode(tokens, pos, key_pos[:visible], caches)  # (B, 1, V)


def pays_to_compact(rows: int, going: int, row_granularity: int) -> bool:
    """Returns whether to move the unfinished rows together. rows: their number with the rows that
    have ended; going: the number of unfinished ones.

    Moving pays if at least MIN_ENDED_SHARE of the rows have ended, and if fewer groups of
    row_granularity rows remain: a started group takes as long as a full one, see Cache.
    """
    groups, needed = -(-rows // row_granularity), -(-going // row_granularity)  # rounded up
    return going <= (1 - MIN_ENDED_SHARE) * rows and needed < groups


def longest(prompts: Texts, rows: Sequence[int]) -> int:
    """Returns the number of tokens of the longest prompt of some rows."""
    return max(len(prompts[row]) for row in rows)


def join_micro_batches(micro_batches: Sequence[Iterator[Launched]]) -> Iterator[Launched]:
    """Join the steps of several micro-batches into steps of all rows. micro_batches: the
    launched_steps of each.

    Each item has the rows of all micro-batches and a function that returns their ids, which are
    known already. A micro-batch that has ended drops out. A micro-batch's next step is launched as
    soon as the ids of its previous step are known, while the other micro-batches are computed.
    """
    in_flight = [(steps, next(steps)) for steps in micro_batches]
    while in_flight:
        rows, ids, going = [], [], []
        for steps, (some_rows, read) in in_flight:
            rows += some_rows
            ids += read()
            if launched := next(steps, None):
                going.append((steps, launched))
        yield rows, partial(list, ids)
        in_flight = going


def launch_ahead(steps: Iterator[T]) -> Iterator[T]:
    """Yield the same steps, each after the next one is launched, so that the device never waits for
    the host.

    Asking `steps` for an item launches it: so the next step is already launched when the consumer
    waits for the ids of the step that it got. `steps` must not be empty.
    """
    waiting = next(steps)
    for step in steps:
        yield waiting
        waiting = step
    yield waiting


def prefill(
    lm: LoadedModel,
    prompts: Texts,
    caches: Sequence[Cache],
    past: int,
    key_pos: Tensor,
) -> Tensor:
    """Fill the caches with the prompts. Returns the logits that follow each prompt's last token,
    (B, 1, V).

    prompts: one for each row, padded on the right here. past: leading tokens of every prompt that
    the caches have; later positions are overwritten. A prompt with no more tokens than `past` gets
    padding only, and its logits mean nothing. key_pos: arange over the positions of the caches. A
    chunk is what one call of lm.prefill reads: at most lm.prefill_chunk_tokens tokens of all rows
    together (None: PREFILL_TOKENS), but at least one token of each row.
    """
    # Lengths of the whole prompts, and of the parts to compute.
    whole = torch.tensor([[len(p)] for p in prompts], device=lm.device)  # (B, 1)
    lengths = whole[:, 0] - past  # (B,)
    width = max(map(len, prompts)) - past  # tokens of the longest prompt that are to be computed
    padded = [[*p[past:], *[0] * (past + width - len(p))] for p in prompts]
    tokens = torch.tensor(padded, device=lm.device)  # (B, width)
    # Tokens of each row in a chunk.
    chunk = max(1, (lm.prefill_chunk_tokens or PREFILL_TOKENS) // len(prompts))
    if lm.model.has_rings(len(key_pos)):
        chunk = min(chunk, WINDOW_SLACK)  # a ring takes no more tokens of a row in one call
    logits = None
    for cache in caches:
        cache.keep(past)
    for start in range(0, width, chunk):
        part = tokens[:, start : start + chunk]  # (B, T)
        end = past + start + part.shape[1]
        pos = key_pos[past + start : end].expand_as(part)  # (B, T)
        # The index of each row's last token in the chunk, then among the chunk's B*T tokens.
        last = (lengths - 1 - start).clamp(0, part.shape[1] - 1)  # (B,)
        last += torch.arange(0, part.numel(), part.shape[1], device=lm.device)
        visible = key_pos[: visible_length(end, len(key_pos))]
        out = lm.prefill(part, pos, visible, caches, last, whole).unsqueeze(1)  # (B, 1, V)
        # A row whose prompt ended in an earlier chunk keeps the logits of that chunk.
        reached = (lengths > start).view(-1, 1, 1)  # (B, 1, 1)
        logits = out if logits is None else torch.where(reached, out, logits)
    return logits

"""Speculative decoding: a draft guesses the next tokens, and one sweep of the model verifies them.

Start at speculative_steps, the counterpart of decoding.plain_steps. Three drafts guess: NgramDraft
looks the text's last tokens up in the text itself, ModelDraft runs another model, SelfDraft the
model's own quantised copy. How many tokens they guess is chosen in controller.py.

A text is the same with any draft, any number of guesses, or none, sampled texts too. The model
draws each token as it always does, by noise that belongs to the token's place (sampling.py); the
draft draws by the same noise; and a guess holds only where it is what the model has drawn.

Sources: verification in one sweep, arXiv 2211.17192 and 2302.01318; shared noise, 2408.07978; a
quantised copy on the model's own cache, 2502.10424; guesses looked up in the text, 2304.04487.

Shapes: B rows, k guesses, V vocab.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding import LoadedModel, Propose, Texts, prefill
from draft_length import DraftLengthController
from model import KVCache, visible_length
from sampling import Sampler

NGRAM_LENGTHS = 8, 4, 3, 2  # lengths of what is looked up, the likeliest to be followed alike first


def speculative_steps(
    lm: LoadedModel,
    prompts: Texts,
    caches: list[KVCache],
    past: int,
    sampler: Sampler,
    limits: Sequence[int],
    live: AbstractSet[int],
) -> Iterator[list[list[int]]]:
    """Steps of new ids for each row: first one, then in every step one more than guesses held.

    limits: how many ids each row may get at most. live: the rows that go on, looked at before
    every step; the others get nothing.
    """
    slots = torch.arange(caches[0].length, device=lm.device)
    texts = [list(prompt) for prompt in prompts]
    logits = prefill(lm, prompts, caches, past, slots)  # (B, 1, V)
    first = sampler(logits, slots[:1].expand(len(texts), 1))  # (B, 1)
    step = sampler.copy_to_host_async(first)()
    controller = lm.draft.controller.for_batch(len(texts))
    for text, ids in zip(texts, step, strict=True):
        text += ids
    guess = lm.draft.start(texts, caches, sampler)
    nothing = slots.new_empty(len(texts), 0), [0] * len(texts)
    yield step
    while True:
        start = time.perf_counter()
        wanted = max(limits[row] - len(texts[row]) + len(prompts[row]) for row in live)
        k = controller.choose(wanted - 1)
        guesses, offered = guess(k, live) if k else nothing
        drawn = verify(lm, texts, prompts, guesses, caches, slots, sampler)
        step = [[] for _ in texts]
        read = sampler.copy_to_host_async(drawn)
        pairs = zip(read(), guesses.tolist(), strict=True)  # the host waits here
        for row, (ids, guessed) in enumerate(pairs):
            if row in live:
                step[row] = ids[: count_accepted(ids, guessed) + 1]
                texts[row] += step[row]
        seconds = time.perf_counter() - start
        controller.update(
            guesses.shape[1], [(offered[row], len(step[row]) - 1) for row in live], seconds
        )
        yield step


def verify(
    lm: LoadedModel,
    texts: Texts,
    prompts: Texts,
    guesses: Tensor,
    caches: list[KVCache],
    slots: Tensor,
    sampler: Sampler,
) -> Tensor:
    """What the model draws after each text, and after it with each of its guesses: (B, k + 1).

    One sweep of k + 1 tokens. What it leaves in the caches of guesses that do not hold is not seen
    by any query before it is overwritten.
    """
    k, length = guesses.shape[1], len(slots)
    known = []  # of each row: its last id, the positions that are read, the numbers that are drawn
    for text, prompt in zip(texts, prompts, strict=True):
        at, number = len(text) - 1, len(text) - len(prompt)
        pos = (min(at + j, length - 1) for j in range(k + 1))  # beyond a row's limit only
        known.append([text[-1], *pos, *range(number, number + k + 1)])
    known = torch.tensor(known, device=slots.device)  # (B, 1 + 2 * (k + 1))
    last, pos, numbers = known.split((1, k + 1, k + 1), dim=1)
    visible = visible_length(max(map(len, texts)) + k, length)
    tokens = torch.cat((last, guesses), dim=1) if k else last  # (B, k + 1)
    logits = lm.decode(tokens, pos, slots[:visible], caches)  # (B, k + 1, V)
    if k:
        sampler.record_draft(guesses, numbers[:, :k])
    return sampler(logits, numbers)


def count_accepted(drawn: Sequence[int], guessed: Sequence[int]) -> int:
    """How many guesses, from the first on, are what was drawn."""
    wrong = (n for n, (a, b) in enumerate(zip(drawn, guessed, strict=False)) if a != b)
    return next(wrong, len(guessed))


class NgramDraft:
    """What followed when the text's last tokens stood in it before: no model, and no memory.

    Of the longest of NGRAM_LENGTHS that was there before, the latest place. Where what follows it runs
    into the end of the text, the text repeats itself, and is guessed to go on so.
    """

    lm = None

    def __init__(self, controller: DraftLengthController):
        self.controller = controller

    def kv_bytes_per_token(self) -> int:
        return 0

    def warm_up_inputs(self, caches: list[KVCache]) -> None:
        return None

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Propose:
        tables: list[dict[Sequence[int], int]] = [{} for _ in texts]
        indexed = [0] * len(texts)
        device = caches[0].device

        def guess(k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
            rows: list[list[int]] = [[] for _ in texts]
            for row in live if k else ():
                index_ngrams(texts[row], tables[row], indexed[row])
                indexed[row] = len(texts[row])
                rows[row] = continuation(texts[row], tables[row], k)
            width = max(map(len, rows))
            padded = [[*row, *[0] * (width - len(row))] for row in rows]
            return torch.tensor(padded, dtype=torch.long, device=device), list(map(len, rows))

        return guess


def index_ngrams(text: Sequence[int], table: dict[Sequence[int], int], start: int) -> None:
    """Enter where each n-gram of the text that something follows ends; `start` are there."""
    for end in range(max(start, 1), len(text)):
        for n in NGRAM_LENGTHS:
            table[tuple(text[max(0, end - n) : end])] = end


def continuation(text: Sequence[int], table: dict[Sequence[int], int], k: int) -> list[int]:
    """k tokens that may follow, or none."""
    places = (table.get(tuple(text[-n:])) for n in NGRAM_LENGTHS)
    at = next((place for place in places if place), None)
    return [] if at is None else [text[at + i % (len(text) - at)] for i in range(k)]


class ModelDraft:
    """Another model, with caches of its own."""

    def __init__(self, controller: DraftLengthController, lm: LoadedModel):
        self.controller, self.lm = controller, lm
        self._latest: OwnCacheProposer | None = None

    def kv_bytes_per_token(self) -> int:
        return self.lm.model.kv_bytes_per_token()

    def warm_up_inputs(self, caches: list[KVCache]) -> tuple[LoadedModel, list[KVCache], int]:
        return self.lm, self._like(caches), OwnCacheProposer.tail

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Propose:
        filled, old = [0] * len(texts), self._latest
        caches = self._like(caches)
        if old and old.caches is caches:
            pairs = zip(old.texts, texts, old.filled, strict=True)
            filled = [min(len(os.path.commonprefix([a, b])), most) for a, b, most in pairs]
        self._latest = OwnCacheProposer(self.lm, texts, caches, sampler, filled)
        return self._latest

    def _like(self, caches: list[KVCache]) -> list[KVCache]:
        """Caches for as many rows, as long as this model can use: the latest ones, if they fit."""
        rows, length = caches[0].rows, min(caches[0].length, self.lm.model.args.context)
        own = self._latest.caches if self._latest else []
        if own and (own[0].rows, own[0].length) == (rows, length):
            return own
        return self.lm.model.make_caches(rows, length)


def match_vocab_size(draft: LoadedModel, vocab_size: int) -> LoadedModel:
    """A draft whose logits are of so many ids, and which can be given so many.

    Models with the same tokenizer may pad their tables to different sizes: ids of padding alone are
    dropped or, as nobody can guess them, get -inf.
    """
    known = draft.model.args.vocab_size
    if known == vocab_size:
        return draft

    def resized(view: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(tokens: Tensor, *given: Any) -> Tensor:
            logits = view(tokens.clamp_max(known - 1), *given)  # (..., known)
            return F.pad(logits, (0, vocab_size - known), value=-math.inf)  # (..., vocab_size)

        return call

    return replace(draft, prefill=resized(draft.prefill), decode=resized(draft.decode))


class SelfDraft:
    """The model's own quantised copy, on the model's caches: what it guesses from is exact, and
    what it writes there the model writes again when it verifies."""

    def __init__(self, controller: DraftLengthController, lm: LoadedModel):
        self.controller, self.lm = controller, lm

    def kv_bytes_per_token(self) -> int:
        return 0

    def warm_up_inputs(self, caches: list[KVCache]) -> tuple[LoadedModel, list[KVCache], int]:
        return self.lm, caches, ModelProposer.tail

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Propose:
        return ModelProposer(self.lm, texts, caches, sampler)


class ModelProposer:
    """A model that guesses for texts as they grow, on caches that hold all but their last token."""

    tail = 1  # tokens of each text to read before the first guess

    def __init__(self, lm: LoadedModel, texts: Texts, caches: list[KVCache], sampler: Sampler):
        self.lm, self.texts, self.caches = lm, texts, caches
        self._sampler = sampler
        self._starts = [len(text) - 1 for text in texts]  # texts have one id of their answer
        self._slots = torch.arange(caches[0].length, device=lm.device)

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        rows, length = len(self.texts), len(self._slots)
        k = min(k, length - max(len(self.texts[row]) for row in live))
        if k <= 0:
            return self._slots.new_empty(rows, 0), [0] * rows
        pairs = zip(self.texts, self._starts, strict=True)
        known = [(*text[-self.tail :], len(text), len(text) - start) for text, start in pairs]
        known = torch.tensor(known, device=self._slots.device)  # (B, tail + 2)
        tokens, ends, numbers = known.split((self.tail, 1, 1), dim=1)
        # Rows that have ended stay within the cache too.
        pos = (ends - self.tail + self._slots[: self.tail]).clamp_max(length - 1)  # (B, tail)
        visible = visible_length(min(length, max(map(len, self.texts)) + k), length)
        guesses = []
        for n in range(k):
            logits = self.lm.decode(tokens, pos, self._slots[:visible], self.caches)
            tokens = self._sampler(logits[:, -1:], numbers + n)  # (B, 1)
            pos = (ends + n).clamp_max(length - 1)  # (B, 1)
            guesses.append(tokens)
        return torch.cat(guesses, dim=1), [k] * rows


class OwnCacheProposer(ModelProposer):
    """The same on caches that nobody else fills.

    filled: how many slots of each row are. Those before the text's last token are as the text
    says: what was written further on did not hold.
    """

    tail = 2  # where every guess has held, the last of them was never read

    def __init__(
        self,
        lm: LoadedModel,
        texts: Texts,
        caches: list[KVCache],
        sampler: Sampler,
        filled: list[int],
    ):
        super().__init__(lm, texts, caches, sampler)
        self.filled = filled
        self._catch_up()

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        if k > 0:
            self._catch_up()
        guesses, offered = super().__call__(k, live)
        if made := guesses.shape[1]:
            self.filled = [len(text) + made - 1 for text in self.texts]
        return guesses, offered

    def _catch_up(self) -> None:
        """Read what the texts have got since this model last guessed, if that is much."""
        wanted = [min(len(text) - 1, len(self._slots)) for text in self.texts]
        self.filled = list(map(min, self.filled, wanted))
        if any(n - f > 1 for n, f in zip(wanted, self.filled, strict=True)):
            texts = [text[:n] for text, n in zip(self.texts, wanted, strict=True)]
            prefill(self.lm, texts, self.caches, min(self.filled), self._slots)
            self.filled = wanted

"""Speculative decoding: a draft proposes the next tokens, and one pass of the model verifies them.

Start at speculative_steps, the counterpart of decoding.plain_steps. There are three drafts.
NgramDraft looks the text's last tokens up in the text itself; ModelDraft runs another model;
SelfDraft runs the model's own quantised copy. draft_length.py chooses how many tokens they propose.

The text does not depend on the draft or on the number of draft tokens, sampled texts included. The
model draws every token with the noise of the token's position (sampling.py), as without a draft. A
draft draws with the same noise. A draft token is accepted if the model draws the same token.

Sources: verification in one pass, arXiv 2211.17192 and 2302.01318; shared noise, 2408.07978; a
quantised copy on the model's own cache, 2502.10424; n-gram lookup in the text, 2304.04487.

Shapes: B rows, k draft tokens, V vocab.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from decoding import LoadedModel, Propose, Texts, prefill
from draft_length import DraftLengthController
from host.memory import check_memory
from model import Cache, Transformer, visible_length
from quant.linear import make_scheme, meta_model, quantized_bytes, quantized_copy
from sampling import Sampler
from text.tokenizer import Tokenizer, first_difference

NGRAM_LENGTHS = 8, 4, 3, 2  # looked up in this order: a longer match predicts better
SELF_BITS = {"self-int8": 8, "self-int4": 4}  # per weight of a SelfDraft
# Rows of padding by which a draft's vocabulary may differ from its model's, as in llama.cpp.
MAX_PADDED_IDS = 128


def speculative_steps(
    lm: LoadedModel,
    prompts: Texts,
    caches: Sequence[Cache],
    past: int,
    sampler: Sampler,
    limits: Sequence[int],
    live: AbstractSet[int],
) -> Iterator[list[list[int]]]:
    """Yield each row's new ids: one after prefill, then the accepted draft tokens and one more.

    past: prompt tokens that the caches hold already. limits: the most new ids of each row. live:
    the unfinished rows, read before every step; other rows get no ids.
    """
    key_pos = torch.arange(caches[0].length, device=lm.device)
    logits = prefill(lm, prompts, caches, past, key_pos)  # (B, 1, V)
    first = sampler(logits, key_pos[:1].expand(len(prompts), 1))  # (B, 1)
    step = sampler.copy_to_host_async(first)()
    texts = [[*prompt, *ids] for prompt, ids in zip(prompts, step, strict=True)]
    controller = lm.draft.controller.for_batch(len(texts))
    cycle = Cycle(lm, prompts, texts, caches, sampler, key_pos)
    yield step
    while True:
        start = time.perf_counter()
        wanted = max(limits[row] - len(texts[row]) + len(prompts[row]) for row in live)
        step, drafted = cycle.run(controller.choose(wanted - 1), live)
        seconds = time.perf_counter() - start
        rows = [(drafted[row], len(step[row]) - 1) for row in live]
        controller.update(cycle.k, rows, seconds)
        yield step


@dataclass
class Cycle:
    """A batch under speculation. Each cycle proposes draft tokens, verifies them, and appends the
    accepted ones and one token more to `texts`."""

    lm: LoadedModel
    prompts: Texts
    texts: list[list[int]]
    caches: Sequence[Cache]
    sampler: Sampler
    key_pos: Tensor  # (length,) the positions of the caches
    k: int = 0  # draft tokens of the latest cycle
    propose: Propose = field(init=False)

    def __post_init__(self):
        self.propose = self.lm.draft.start(self.texts, self.caches, self.sampler)

    def run(self, k: int, live: AbstractSet[int]) -> tuple[list[list[int]], list[int]]:
        """Propose at most k draft tokens and verify them.

        Returns the new ids of each row, and how many draft tokens each row had.
        """
        rows = len(self.texts)
        draft, drafted = (
            self.propose(k, live) if k else (self.key_pos.new_empty(rows, 0), [0] * rows)
        )
        self.k = draft.shape[1]
        wait = self.sampler.copy_to_host_async(self.verify(draft))
        step: list[list[int]] = [[] for _ in self.texts]
        pairs = zip(wait(), draft.tolist(), strict=True)  # the host waits for the device here
        for row, (ids, proposed) in enumerate(pairs):
            if row in live:
                step[row] = ids[: count_accepted(ids, proposed) + 1]
                self.texts[row] += step[row]
        return step, drafted

    def verify(self, draft: Tensor) -> Tensor:
        """Return the tokens that the model draws after each text and after each draft token:
        (B, k) -> (B, k + 1).

        This is one verify pass over k + 1 tokens. It also writes rejected draft tokens to the
        caches; no query sees them before later tokens overwrite them.
        """
        k, length = draft.shape[1], len(self.key_pos)
        last, pos, numbers = self._inputs(k)
        visible = visible_length(max(map(len, self.texts)) + k, length)
        tokens = torch.cat((last, draft), dim=1) if k else last  # (B, k + 1)
        logits = self.lm.decode(tokens, pos, self.key_pos[:visible], self.caches)  # (B, k + 1, V)
        if k:
            self.sampler.record_draft(draft, numbers[:, :k])
        return self.sampler(logits, numbers)

    def _inputs(self, k: int) -> Sequence[Tensor]:
        """Return each row's last id, (B, 1), the positions that the verify pass reads, and the
        numbers of the tokens that it draws, (B, k + 1) each, by one copy to the device."""
        inputs = []
        for text, prompt in zip(self.texts, self.prompts, strict=True):
            at, number = len(text) - 1, len(text) - len(prompt)
            # Positions beyond the cache are beyond the row's limit: their tokens are not used.
            pos = (min(at + j, len(self.key_pos) - 1) for j in range(k + 1))
            inputs.append([text[-1], *pos, *range(number, number + k + 1)])
        inputs = torch.tensor(inputs, device=self.key_pos.device)  # (B, 1 + 2 * (k + 1))
        return inputs.split((1, k + 1, k + 1), dim=1)


def count_accepted(drawn: Sequence[int], proposed: Sequence[int]) -> int:
    """Return the number of draft tokens before the first that differs from the drawn token."""
    pairs = enumerate(zip(drawn, proposed, strict=False))
    return next((n for n, (a, b) in pairs if a != b), len(proposed))


class NgramDraft:
    """Proposes the tokens that followed an earlier occurrence of the text's last tokens.

    It takes the latest occurrence of the longest of NGRAM_LENGTHS that occurs. Where the tokens
    after it run into the end of the text, they are repeated. It needs no model and no memory.
    """

    lm = None

    def __init__(self, controller: DraftLengthController):
        self.controller = controller

    def kv_bytes_per_token(self) -> int:
        return 0

    def warm_up_inputs(self, caches: Sequence[Cache]) -> None:
        return None

    def start(self, texts: Texts, caches: Sequence[Cache], sampler: Sampler) -> Propose:
        tables: list[dict[Sequence[int], int]] = [{} for _ in texts]
        indexed = [0] * len(texts)
        device = caches[0].device

        def propose(k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
            rows: list[list[int]] = [[] for _ in texts]
            for row in live if k else ():
                index_ngrams(texts[row], tables[row], indexed[row])
                indexed[row] = len(texts[row])
                rows[row] = continuation(texts[row], tables[row], k)
            width = max(map(len, rows))
            padded = [[*row, *[0] * (width - len(row))] for row in rows]
            return torch.tensor(padded, dtype=torch.long, device=device), list(map(len, rows))

        return propose


def index_ngrams(text: Sequence[int], table: dict[Sequence[int], int], start: int) -> None:
    """Map each n-gram that ends before the text's end to the position after it. start: the length
    of the text at the last call."""
    for end in range(max(start, 1), len(text)):
        for n in NGRAM_LENGTHS:
            table[tuple(text[max(0, end - n) : end])] = end


def continuation(text: Sequence[int], table: dict[Sequence[int], int], k: int) -> list[int]:
    """Return the k tokens after the latest earlier occurrence of the text's last n-gram; [] if
    there is none."""
    places = (table.get(tuple(text[-n:])) for n in NGRAM_LENGTHS)
    at = next((place for place in places if place), None)
    return [] if at is None else [text[at + i % (len(text) - at)] for i in range(k)]


class ModelDraft:
    """Proposes the tokens that another model draws, with caches of its own."""

    def __init__(self, controller: DraftLengthController, lm: LoadedModel):
        self.controller, self.lm = controller, lm
        self._latest: OwnCacheProposer | None = None

    def kv_bytes_per_token(self) -> int:
        return self.lm.model.kv_bytes_per_token()

    def warm_up_inputs(self, caches: Sequence[Cache]) -> tuple[LoadedModel, Sequence[Cache], int]:
        return self.lm, self._caches_like(caches), OwnCacheProposer.tail

    def start(self, texts: Texts, caches: Sequence[Cache], sampler: Sampler) -> Propose:
        filled, old = [0] * len(texts), self._latest
        caches = self._caches_like(caches)
        if old and old.caches is caches:  # they hold the beginning of the same conversation
            pairs = zip(old.texts, texts, old.filled, strict=True)
            filled = [min(len(os.path.commonprefix([a, b])), most) for a, b, most in pairs]
        self._latest = OwnCacheProposer(self.lm, texts, caches, sampler, filled)
        return self._latest

    def _caches_like(self, caches: Sequence[Cache]) -> Sequence[Cache]:
        """Return the draft's caches for as many rows and positions, at most its context. The
        latest caches are used again if they have that shape."""
        rows, length = caches[0].rows, min(caches[0].length, self.lm.model.args.context)
        own = self._latest.caches if self._latest else []
        if own and (own[0].rows, own[0].length) == (rows, length):
            return own
        return self.lm.model.make_caches(rows, length)


def match_vocab_size(draft: LoadedModel, vocab_size: int) -> LoadedModel:
    """Return the draft with logits of `vocab_size` ids, and inputs of as many.

    Models with the same tokenizer may pad their tables to different sizes. Ids that the draft
    lacks get -inf, so that it never proposes them; surplus ids of padding are dropped.
    """
    own_size = draft.model.args.vocab_size
    if own_size == vocab_size:
        return draft

    def resized(view: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(tokens: Tensor, *given: Any) -> Tensor:
            logits = view(tokens.clamp_max(own_size - 1), *given)  # (..., own_size)
            return F.pad(logits, (0, vocab_size - own_size), value=-math.inf)  # (..., vocab_size)

        return call

    return replace(draft, prefill=resized(draft.prefill), decode=resized(draft.decode))


def check_draft(
    draft: "str | LoadedModel", vocab_size: int, tokenizer: Tokenizer, scheme: dict[str, Any] | None
) -> None:
    """Raises ValueError for a draft model with another tokenizer than the model's, and for a
    quantised copy with no fewer bits than the model. The other arguments describe the model."""
    if isinstance(draft, LoadedModel):
        draft_size = draft.model.args.vocab_size
        if abs(draft_size - vocab_size) > MAX_PADDED_IDS:
            why = f"the draft knows {draft_size} ids and the model {vocab_size}"
        elif not (why := first_difference(draft.tokenizer, tokenizer)):
            return
        raise ValueError(f"{why}: the draft must be a model with the same tokenizer")
    bits = scheme["linears"].get("bits", 16) if scheme else 16
    if SELF_BITS.get(draft, 0) >= bits:
        raise ValueError(
            f"--draft {draft}: the model has {bits} bits per weight already; use --draft ngram or "
            "--draft_checkpoint_path"
        )


def self_copy(model: Transformer, draft: str) -> Transformer:
    """Return a quantised copy of a model. draft: its name, a key of SELF_BITS. Raises MemoryError
    before allocating."""
    scheme = make_scheme(draft.removeprefix("self-"))
    nbytes = quantized_bytes(meta_model(model.args, scheme))
    what = f"the model's copy for --draft {draft}"
    hint = "use --draft ngram, which takes none"
    check_memory(nbytes, model.tok_embeddings.weight.device, what, hint)
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc=draft, delay=1) as bar:
        return quantized_copy(model, scheme, bar.update)


class SelfDraft:
    """Proposes the tokens that the model's own quantised copy draws, on the model's own caches.

    The copy reads exact keys and values of the text. Those that it writes for draft tokens, the
    verify pass overwrites.
    """

    def __init__(self, controller: DraftLengthController, lm: LoadedModel):
        self.controller, self.lm = controller, lm

    def kv_bytes_per_token(self) -> int:
        return 0

    def warm_up_inputs(self, caches: Sequence[Cache]) -> tuple[LoadedModel, Sequence[Cache], int]:
        return self.lm, caches, ModelProposer.tail

    def start(self, texts: Texts, caches: Sequence[Cache], sampler: Sampler) -> Propose:
        return ModelProposer(self.lm, texts, caches, sampler)


class ModelProposer:
    """Draws draft tokens with a model whose caches hold all but the last token of each text.

    It is a decoding.Propose. The texts, which have one generated id at first, grow between calls.
    """

    tail = 1  # last tokens of each text that the first draft step reads

    def __init__(self, lm: LoadedModel, texts: Texts, caches: Sequence[Cache], sampler: Sampler):
        self.lm, self.texts, self.caches = lm, texts, caches
        self._sampler = sampler
        self._starts = [len(text) - 1 for text in texts]  # the lengths of the prompts
        self._slots = torch.arange(caches[0].length, device=lm.device)

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        rows, length = len(self.texts), len(self._slots)
        k = min(k, length - max(len(self.texts[row]) for row in live))
        if k <= 0:
            return self._slots.new_empty(rows, 0), [0] * rows
        tokens, ends, numbers = self._inputs()
        # Ended rows are computed, too, and must stay within the cache.
        pos = (ends - self.tail + self._slots[: self.tail]).clamp_max(length - 1)  # (B, tail)
        visible = visible_length(min(length, max(map(len, self.texts)) + k), length)
        draft = []
        for n in range(k):
            logits = self.lm.decode(tokens, pos, self._slots[:visible], self.caches)
            tokens = self._sampler(logits[:, -1:], numbers + n)  # (B, 1)
            pos = (ends + n).clamp_max(length - 1)  # (B, 1)
            draft.append(tokens)
        return torch.cat(draft, dim=1), [k] * rows

    def _inputs(self) -> Sequence[Tensor]:
        """Return the last ids of each text, (B, tail), its length, (B, 1), and the number of the
        next generated token, (B, 1), by one copy to the device."""
        pairs = zip(self.texts, self._starts, strict=True)
        inputs = [(*text[-self.tail :], len(text), len(text) - start) for text, start in pairs]
        inputs = torch.tensor(inputs, device=self._slots.device)  # (B, tail + 2)
        return inputs.split((self.tail, 1, 1), dim=1)


class OwnCacheProposer(ModelProposer):
    """A ModelProposer whose caches belong to the draft model, so that it must fill them itself.

    filled: how many positions of each row's cache hold the text; positions after them may hold
    rejected draft tokens.
    """

    # If all draft tokens were accepted, the draft model has not yet read the last of them.
    tail = 2

    def __init__(
        self,
        lm: LoadedModel,
        texts: Texts,
        caches: Sequence[Cache],
        sampler: Sampler,
        filled: list[int],
    ):
        super().__init__(lm, texts, caches, sampler)
        self.filled = filled
        self._catch_up()

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        if k > 0:
            self._catch_up()
        draft, drafted = super().__call__(k, live)
        if made := draft.shape[1]:
            self.filled = [len(text) + made - 1 for text in self.texts]
        return draft, drafted

    def _catch_up(self) -> None:
        """Prefill the tokens that the texts have gained since the last call, if a row lacks more
        than the one that the next draft step reads anyway."""
        wanted = [min(len(text) - 1, len(self._slots)) for text in self.texts]
        self.filled = list(map(min, self.filled, wanted))
        if any(n - f > 1 for n, f in zip(wanted, self.filled, strict=True)):
            texts = [text[:n] for text, n in zip(self.texts, wanted, strict=True)]
            prefill(self.lm, texts, self.caches, min(self.filled), self._slots)
            self.filled = wanted

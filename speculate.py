"""Speculative decoding: a draft proposes the next tokens, and one pass of the model verifies them.

Start at speculative_steps, the counterpart of decoding.plain_steps. There are three drafts.
NgramDraft looks the text's last tokens up in the text itself; ModelDraft runs another model;
SelfDraft runs the model's own quantised copy. draft_length.py chooses how many tokens they propose.

The text does not depend on the draft or on the number of draft tokens, sampled texts included. The
model draws every token with the noise of the token's position (sampling.py), as without a draft. A
draft draws with the same noise. A draft token is accepted if the model draws the same token.

A cycle is drafting, then the verify pass, in which the model reads the draft tokens. A plain step
is a cycle without draft tokens. A text is a list of ids: a row's prompt and its new ids. A live row
is an unfinished one. The number of a new token counts the new tokens of its row from 0. A Propose
(decoding.py) is called with k and the live rows, and returns at most k draft tokens of each row and
their count. Caches are made for `length` positions; key_pos, (length,), are 0, 1, 2, ...

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

from decoding import LoadedModel, Propose, Texts, keeps_past, prefill
from draft_length import DraftLengthController
from host.memory import check_memory
from layers.kv_cache import Cache, visible_length
from model import Transformer
from quant.linear import make_scheme, meta_model, quantized_bytes, quantized_copy
from sampling import Sampler
from text.tokenizer import Tokenizer, first_difference

NGRAM_LENGTHS = 8, 4, 3, 2  # looked up in this order: a longer match predicts better
SELF_BITS = {"self-int8": 8, "self-int4": 4}  # --draft -> bits per weight of the model's copy
# Embedding tables are often padded with rows of no token. A draft's vocabulary size may differ from
# its model's by so many ids, as in llama.cpp.
MAX_PADDED_IDS = 128


def speculative_steps(
    lm: LoadedModel,
    prompts: Texts,
    texts: Texts,
    caches: Sequence[Cache],
    past: int,
    sampler: Sampler,
    limits: Sequence[int],
    live: AbstractSet[int],
) -> Iterator[list[list[int]]]:
    """Yield lists of each row's new ids: first one id after prefill; then, after every cycle, the
    accepted draft tokens and the token after them. Does not end by itself.

    lm: has a draft. prompts: the ids of each row. texts: the same, or the prompts with new ids of
    an earlier call. caches: of all layers. past: leading tokens of each prompt that the caches
    hold already. limits: the most new ids of each row; a row may get more, which the caller
    discards. live: the unfinished rows; other rows get no ids after the first. The caller removes
    rows that end, and must not ask for another step when `live` is empty.
    """
    key_pos = torch.arange(caches[0].length, device=lm.device)
    logits = prefill(lm, texts, caches, past, key_pos)  # (B, 1, V)
    numbers = [[len(t) - len(p)] for t, p in zip(texts, prompts, strict=True)]
    first = sampler(logits, torch.tensor(numbers, device=lm.device))  # (B, 1)
    step = sampler.copy_to_host_async(first)()
    texts = [[*text, *ids] for text, ids in zip(texts, step, strict=True)]
    controller = lm.draft.controller.for_batch(len(texts))
    batch = DraftedBatch(lm, prompts, texts, caches, sampler, key_pos)
    yield step
    while True:
        start = time.perf_counter()
        remaining = max(limits[row] - len(texts[row]) + len(prompts[row]) for row in live)
        # The verify pass itself yields one of the remaining tokens.
        step, drafted = batch.run_cycle(controller.choose(remaining - 1), live)
        seconds = time.perf_counter() - start
        rows = [(drafted[row], len(step[row]) - 1) for row in live]  # draft and accepted tokens
        controller.update(batch.k, rows, seconds)
        yield step


@dataclass
class DraftedBatch:
    """A batch that is generated with draft tokens. Each call of run_cycle proposes draft tokens,
    verifies them, and appends the accepted ones and the token after them to `texts`.

    The caches hold all tokens of a text but the last one. propose: the draft's function for these
    texts.
    """

    lm: LoadedModel
    prompts: Texts
    texts: list[list[int]]  # of each row: the prompt and all new ids
    caches: Sequence[Cache]
    sampler: Sampler
    key_pos: Tensor  # (length,) the positions of the caches
    k: int = 0  # draft tokens in the latest cycle, of the row that had most
    propose: Propose = field(init=False)

    def __post_init__(self):
        self.propose = self.lm.draft.start(self.prompts, self.texts, self.caches, self.sampler)

    def run_cycle(self, k: int, live: AbstractSet[int]) -> tuple[list[list[int]], list[int]]:
        """Propose at most k draft tokens for each row, and verify them; k = 0 is a plain step.

        live: the unfinished rows. Returns each row's new ids, none for finished rows, and each
        row's number of draft tokens. Rows with fewer draft tokens than another one are padded; a
        padding id is accepted, too, if the model draws the same id.
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
        """Run one verify pass: the model reads the last token of each text and its k draft tokens.

        draft: (B, k) ids; k may be 0. Returns the tokens that the model draws after each token
        read, (B, k + 1). The caches also get rejected draft tokens; later tokens overwrite these
        positions before any query reads them.
        """
        k, length = draft.shape[1], len(self.key_pos)
        last, pos, numbers = self._verify_inputs(k)
        visible = visible_length(max(map(len, self.texts)) + k, length)
        tokens = torch.cat((last, draft), dim=1) if k else last  # (B, k + 1)
        logits = self.lm.decode(tokens, pos, self.key_pos[:visible], self.caches)  # (B, k + 1, V)
        if k:
            self.sampler.record(draft, numbers[:, :k])
        return self.sampler(logits, numbers)

    def _verify_inputs(self, k: int) -> Sequence[Tensor]:
        """Return inputs of a verify pass: each row's last id, (B, 1); the positions of the k + 1
        tokens that the pass reads, (B, k + 1); and the numbers of the k + 1 tokens that it draws,
        (B, k + 1). They are made as one tensor, so that one copy brings them to the device."""
        inputs = []
        for text, prompt in zip(self.texts, self.prompts, strict=True):
            last, number = len(text) - 1, len(text) - len(prompt)
            # Only tokens beyond the row's limit, which the caller discards, need a lower position
            # than their own to stay within the cache.
            pos = (min(last + j, len(self.key_pos) - 1) for j in range(k + 1))
            inputs.append([text[-1], *pos, *range(number, number + k + 1)])
        inputs = torch.tensor(inputs, device=self.key_pos.device)  # (B, 1 + 2 * (k + 1))
        return inputs.split((1, k + 1, k + 1), dim=1)


def count_accepted(drawn: Sequence[int], proposed: Sequence[int]) -> int:
    """Return how many draft tokens precede the first one that differs from the model's token.

    drawn: the tokens that the model draws in place of the draft tokens, and maybe later ones.
    proposed: the draft tokens. Returns 0 to len(proposed).
    """
    pairs = enumerate(zip(drawn, proposed, strict=False))
    return next((n for n, (a, b) in pairs if a != b), len(proposed))


class NgramDraft:
    """Proposes the tokens that followed an earlier occurrence of the text's last tokens.

    It looks up the last 8 tokens, then fewer (NGRAM_LENGTHS), until they occur earlier in the text,
    and takes the latest earlier occurrence. If fewer than k tokens follow it, they are repeated. It
    needs no model and no device memory. It implements decoding.Draft.
    """

    lm = None

    def __init__(self, controller: DraftLengthController):
        self.controller = controller

    def kv_bytes(self, length: int) -> int:
        return 0

    def warm_up_inputs(self, caches: Sequence[Cache]) -> None:
        return None

    def start(
        self, prompts: Texts, texts: Texts, caches: Sequence[Cache], sampler: Sampler
    ) -> Propose:
        """Return a function that proposes draft tokens for these texts, which grow between calls.

        The function returns ids, (B, the most ids of a row), padded with 0, and each row's number
        of ids. caches: only their device is used. prompts, sampler: not used, because nothing is
        drawn.
        """
        tables: list[dict[Sequence[int], int]] = [{} for _ in texts]
        indexed = [0] * len(texts)  # tokens of each text that its table covers
        device = caches[0].device

        def propose(k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
            """A decoding.Propose: look up the last tokens of each live row; others have no ids.

            Each call adds to the row's table the n-grams of the ids since its last call.
            """
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
    """Add the n-grams of a text to `table`, which maps an n-gram to the position after it; a later
    occurrence replaces an earlier one.

    The n-gram that ends the text is not added, because no token follows it. start: the text's
    length at the last call for this table, 0 at first: only n-grams that end at this position or
    later are new. Their lengths are NGRAM_LENGTHS; near the text's beginning they may be shorter.
    """
    for end in range(max(start, 1), len(text)):  # before position 0 there is no n-gram
        for n in NGRAM_LENGTHS:
            table[tuple(text[max(0, end - n) : end])] = end


def continuation(text: Sequence[int], table: dict[Sequence[int], int], k: int) -> list[int]:
    """Return k tokens that followed an earlier occurrence of the text's last n-gram, or [] if it
    does not occur earlier. Tries the n-grams of NGRAM_LENGTHS, the longest first.

    table: as index_ngrams has filled it for the whole text: n-gram -> the position after it. If
    fewer than k tokens follow, they are repeated.
    """
    positions = (table.get(tuple(text[-n:])) for n in NGRAM_LENGTHS)
    start = next((position for position in positions if position), None)  # positions are from 1 on
    return [] if start is None else [text[start + i % (len(text) - start)] for i in range(k)]


class ModelDraft:
    """Proposes the tokens that another model draws, on caches of its own.

    It implements decoding.Draft. lm: the draft model, with views from match_vocab_size.
    """

    def __init__(self, controller: DraftLengthController, lm: LoadedModel):
        self.controller, self.lm = controller, lm
        self._latest: OwnCacheProposer | None = None

    def kv_bytes(self, length: int) -> int:
        return self.lm.model.kv_bytes(length)

    def warm_up_inputs(self, caches: Sequence[Cache]) -> tuple[LoadedModel, Sequence[Cache], int]:
        return self.lm, self._caches_like(caches), OwnCacheProposer.tail

    def start(
        self, prompts: Texts, texts: Texts, caches: Sequence[Cache], sampler: Sampler
    ) -> Propose:
        """Return a function that proposes draft tokens for these texts, after the draft model has
        read them. caches, sampler: of the model that verifies; the draft's caches have their size.

        In a chat the new text begins with the text of the last call: tokens that the draft's caches
        still hold are not read again. `filled` is the number of these tokens of each row.
        """
        filled, written, last = [0] * len(texts), [0] * len(texts), self._latest
        caches = self._caches_like(caches)
        if last and last.caches is caches:
            rows = zip(last.texts, last.filled, texts, strict=True)
            # At the position of the old text's last token there may be a rejected draft token.
            held = ((old[: min(n, len(old) - 1)], new) for old, n, new in rows)
            filled, written = [len(os.path.commonprefix(pair)) for pair in held], last.written
        given = self.lm, prompts, texts, caches, sampler
        self._latest = OwnCacheProposer(*given, filled, written)
        return self._latest

    def _caches_like(self, caches: Sequence[Cache]) -> Sequence[Cache]:
        """Return caches for the draft model with the rows and at least the length of `caches`, the
        verifying model's; the length is at most the draft's context. If the caches of the last call
        of `start` have this size, return these objects, with their contents."""
        rows, length = caches[0].rows, min(caches[0].length, self.lm.model.args.context)
        own = self._latest.caches if self._latest else []
        if own and own[0].rows == rows and own[0].length >= length:
            return own
        # lm.make_caches, not the model's: on a GPU it reuses the memory of caches that are dropped,
        # for which CUDA graphs are recorded.
        return self.lm.make_caches(rows, length)


def match_vocab_size(draft: LoadedModel, vocab_size: int) -> LoadedModel:
    """Return the draft model with views (prefill and decode) that take ids below `vocab_size` and
    return `vocab_size` logits, as the verifying model does.

    Precondition: the same tokenizer (check_draft); only the padding of the embedding tables
    differs. Ids that the draft lacks get the logit -inf, so that it never proposes them; as inputs
    they are read as its last id. Logits of ids that the verifying model lacks are dropped.
    """
    own_size = draft.model.args.vocab_size
    if own_size == vocab_size:
        return draft

    def resized(view: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function like `view` (prefill or decode) for `vocab_size` ids.

        Both functions are called as Transformer.forward is, by position.
        """

        def call(tokens: Tensor, *other: Any) -> Tensor:
            logits = view(tokens.clamp_max(own_size - 1), *other)  # (..., own_size)
            # A negative padding removes ids.
            return F.pad(logits, (0, vocab_size - own_size), value=-math.inf)  # (..., vocab_size)

        return call

    return replace(draft, prefill=resized(draft.prefill), decode=resized(draft.decode))


def check_draft(
    draft: "str | LoadedModel", vocab_size: int, tokenizer: Tokenizer, scheme: dict[str, Any] | None
) -> None:
    """Raises ValueError for a draft model with another tokenizer than the model's, and for a
    quantised copy that would not have fewer bits than the model.

    draft: the draft model, or the value of --draft, such as "self-int4". vocab_size, tokenizer,
    scheme: of the model; scheme is None if it is dense, which counts as 16 bits. Vocabulary sizes
    may differ by MAX_PADDED_IDS; match_vocab_size makes them equal.
    """
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
    """Return a quantised copy of a loaded model, for SelfDraft. draft: a key of SELF_BITS. Shows a
    progress bar. Raises MemoryError, before it allocates, if the copy does not fit into memory."""
    scheme = make_scheme(draft.removeprefix("self-"))
    nbytes = quantized_bytes(meta_model(model.args, scheme))
    what = f"the model's copy for --draft {draft}"
    hint = "use --draft ngram, which takes none"
    check_memory(nbytes, model.tok_embeddings.weight.device, what, hint)
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc=draft, delay=1) as bar:
        return quantized_copy(model, scheme, bar.update)


class SelfDraft:
    """Proposes the tokens that the model's own quantised copy draws, on the model's own caches.

    It implements decoding.Draft. The copy attends to the keys and values that the model has stored
    for the text. The verify pass overwrites those that the copy stores for draft tokens. lm: the
    copy.
    """

    def __init__(self, controller: DraftLengthController, lm: LoadedModel):
        self.controller, self.lm = controller, lm

    def kv_bytes(self, length: int) -> int:
        return 0

    def warm_up_inputs(self, caches: Sequence[Cache]) -> tuple[LoadedModel, Sequence[Cache], int]:
        return self.lm, caches, ModelProposer.tail

    def start(
        self, prompts: Texts, texts: Texts, caches: Sequence[Cache], sampler: Sampler
    ) -> Propose:
        return ModelProposer(self.lm, prompts, texts, caches, sampler)


class ModelProposer:
    """Draws draft tokens with a model: a call is a decoding.Propose. A verify pass follows it.

    lm: the draft model. texts: the prompts with new ids; the caller appends to them between calls.
    caches: those that the draft model reads and writes; they hold all tokens of each text but the
    last `tail` ones. sampler: the verifying model's, so that the draft draws with the same noise.
    """

    tail = 1  # the number of last tokens of each text that the first draft step reads

    def __init__(
        self,
        lm: LoadedModel,
        prompts: Texts,
        texts: Texts,
        caches: Sequence[Cache],
        sampler: Sampler,
    ):
        self.lm, self.texts, self.caches = lm, texts, caches
        self._sampler = sampler
        self._prompt_lengths = list(map(len, prompts))
        self._key_pos = torch.arange(caches[0].length, device=lm.device)

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        """Draw k draft tokens for each row by k steps of the draft model; fewer, down to none, if
        the caches lack positions for k more tokens of the longest live row.

        live: the unfinished rows. Returns ids, (B, number drawn), and the number drawn for each
        row, finished rows included.
        """
        rows, length = len(self.texts), len(self._key_pos)
        k = min(k, length - max(len(self.texts[row]) for row in live))
        if k <= 0:
            return self._key_pos.new_empty(rows, 0), [0] * rows
        tokens, ends, numbers = self._draft_inputs()
        # Finished rows are computed, too; clamp_max keeps their positions within the cache.
        pos = (ends - self.tail + self._key_pos[: self.tail]).clamp_max(length - 1)  # (B, tail)
        visible = visible_length(min(length, max(map(len, self.texts)) + k), length)
        draft = []
        for n in range(k):
            logits = self.lm.decode(tokens, pos, self._key_pos[:visible], self.caches)
            tokens = self._sampler(logits[:, -1:], numbers + n)  # (B, 1)
            pos = (ends + n).clamp_max(length - 1)  # (B, 1)
            draft.append(tokens)
        return torch.cat(draft, dim=1), [k] * rows

    def _draft_inputs(self) -> Sequence[Tensor]:
        """Return inputs of the first draft step: the last ids of each text, (B, tail); the texts'
        lengths, (B, 1); and the number of each row's next token, (B, 1). They are made as one
        tensor, so that one copy brings them to the device."""
        pairs = zip(self.texts, self._prompt_lengths, strict=True)
        inputs = [(*text[-self.tail :], len(text), len(text) - start) for text, start in pairs]
        inputs = torch.tensor(inputs, device=self._key_pos.device)  # (B, tail + 2)
        return inputs.split((self.tail, 1, 1), dim=1)


class OwnCacheProposer(ModelProposer):
    """A ModelProposer for a draft model with its own caches, which this class fills.

    filled: for each row, how many positions of its cache, from the first on, hold its text; later
    positions may hold rejected draft tokens. written: for each row, how many positions have been
    stored since the cache was last filled from position 0, see keeps_past. The constructor prefills
    the texts.
    """

    # If all draft tokens are accepted, the draft model has read neither the last of them nor the
    # model's token after it.
    tail = 2

    def __init__(
        self,
        lm: LoadedModel,
        prompts: Texts,
        texts: Texts,
        caches: Sequence[Cache],
        sampler: Sampler,
        filled: list[int],
        written: list[int],
    ):
        super().__init__(lm, prompts, texts, caches, sampler)
        self.filled, self.written = filled, written
        self._prefill_missing()

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        """Draw draft tokens as ModelProposer does; the draft model first reads the tokens of plain
        steps since the last call, if any. Then record how many positions the caches hold."""
        if k > 0:
            self._prefill_missing()
        draft, drafted = super().__call__(k, live)
        if steps := draft.shape[1]:
            # - 1: the last draft token is drawn, but not read. The next _prefill_missing leaves out
            # the tokens that the verify pass rejects.
            self.filled = [len(text) + steps - 1 for text in self.texts]
            self.written = list(map(max, self.written, self.filled))
        return draft, drafted

    def _prefill_missing(self) -> None:
        """Prefill the tokens that the caches lack, except the last token of each text.

        Skipped if no row lacks more than one of them: the first draft step reads the last two
        tokens of each text. All rows are read from the smallest number in `filled` on, or from
        their first tokens if a ring has lost keys that these tokens see.
        """
        # How many positions of each row are to be filled: without the last token.
        targets = [min(len(text) - 1, len(self._key_pos)) for text in self.texts]
        # Positions from the text's last token on may hold rejected draft tokens.
        self.filled = list(map(min, self.filled, targets))
        lacking = any(n - f > 1 for n, f in zip(targets, self.filled, strict=True))
        if lacking or not self._keep_past(self.filled):
            texts = [text[:n] for text, n in zip(self.texts, targets, strict=True)]
            past = min(self.filled)
            past = past if self._keep_past([past] * len(texts)) else 0
            prefill(self.lm, texts, self.caches, past, self._key_pos)
            before = self.written if past else targets  # read from position 0: written anew
            self.filled, self.written = targets, list(map(max, before, targets))

    def _keep_past(self, past: list[int]) -> bool:
        """Return whether the caches still have every key that each row's tokens from its position
        `past` on see; see keeps_past."""
        rows = zip(past, self.written, strict=True)
        return all(keeps_past(self.lm, self.caches, *row) for row in rows)

"""Speculative decoding: a draft guesses the next tokens, and one sweep of the model verifies them.

Start at speculative_steps, the counterpart of decoding.plain_steps. Three drafts guess: NgramDraft
looks the text's last tokens up in the text itself, ModelDraft runs another model, SelfDraft the
model's own quantised copy. Pace chooses how many tokens they guess.

A text is the same with any draft, any number of guesses, or none, sampled texts too. The model
draws each token as it always does, by noise that belongs to the token's place (sampling.py); the
draft draws by the same noise; and a guess holds only where it is what the model has drawn.

Sources: verification in one sweep, arXiv 2211.17192 and 2302.01318; shared noise, 2408.07978; a
quantised copy on the model's own cache, 2502.10424; guesses looked up in the text, 2304.04487.

Shapes: B rows, k guesses, V vocab.
"""

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from statistics import mean, median
from typing import Protocol

import torch
from torch import Tensor

from decoding import LoadedModel, prefill, visible_slots
from model import KVCache
from sampling import Sampler

NGRAMS = 8, 4, 3, 2  # lengths of what is looked up, the likeliest to be followed alike first
MOST = (
    15  # guesses in a cycle, where Pace chooses: with one more token as many rows as cost like one
)
RECENT = 9  # times of each number of guesses that a median is taken of
UNTYPICAL = 2  # first cycles of each kind that are not timed: CUDA graphs warm up, and record
PLAIN_EVERY = 64  # cycles; a plain step among them says what plain decoding takes now
STALE = 4 * PLAIN_EVERY  # cycles after which a time says nothing any more
TRIAL = 6  # cycles with guesses, before guessing is judged
PAUSE = 16, 512  # steps without guesses between trials: at first; at most
FADING = 0.97  # weight that what was counted keeps from one cycle to the next

Texts = Sequence[Sequence[int]]  # of each row, prompt and answer so far
# Asked for k guesses for some rows: up to so many, (B, k), and how many are one in each row.
Guess = Callable[[int, AbstractSet[int]], tuple[Tensor, list[int]]]


class Draft(Protocol):
    """What guesses. `start` is told of texts that will grow, and of the model's caches."""

    pace: "Pace"
    lm: LoadedModel | None  # the model that guesses, if one does

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Guess: ...

    def kv_bytes_per_token(self) -> int: ...

    def views(self, caches: list[KVCache]) -> tuple[LoadedModel, list[KVCache], int] | None:
        """That model, the caches that it uses beside those given, and how many tokens of a row it
        reads at once."""


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
    step = sampler(logits, slots[:1].expand(len(texts), 1)).tolist()
    pace = lm.draft.pace.of(len(texts))
    for text, ids in zip(texts, step, strict=True):
        text += ids
    guess = lm.draft.start(texts, caches, sampler)
    yield step
    while True:
        start = time.perf_counter()
        wanted = max(limits[row] - len(texts[row]) + len(prompts[row]) for row in live)
        guesses, offered = guess(pace.choose(wanted - 1), live)
        drawn = verify(lm, texts, prompts, guesses, caches, slots, sampler)
        k = guesses.shape[1]
        both = torch.cat((drawn, guesses), dim=1).tolist()  # the host waits here
        step = [[] for _ in texts]
        for row in live:
            ids, guessed = both[row][: k + 1], both[row][k + 1 :]
            step[row] = ids[: held(ids, guessed) + 1]
            texts[row] += step[row]
        seconds = time.perf_counter() - start
        pace.learn(k, [(offered[row], len(step[row]) - 1) for row in live], seconds)
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
    pairs = zip(texts, prompts, strict=True)
    known = [(text[-1], len(text), len(text) - len(prompt)) for text, prompt in pairs]
    last, ends, numbers = torch.tensor(known, device=slots.device).split(1, dim=1)  # (B, 1) each
    steps = slots[: k + 1]
    pos = (ends - 1 + steps).clamp_max(length - 1)  # (B, k + 1); beyond a row's limit only
    visible = visible_slots(max(map(len, texts)) + k, length)
    tokens = torch.cat((last, guesses), dim=1)  # (B, k + 1)
    logits = lm.decode(tokens, pos, slots[:visible], caches)  # (B, k + 1, V)
    return sampler(logits, numbers + steps)


def held(drawn: Sequence[int], guessed: Sequence[int]) -> int:
    """How many guesses, from the first on, are what was drawn."""
    wrong = (n for n, (a, b) in enumerate(zip(drawn, guessed, strict=False)) if a != b)
    return next(wrong, len(guessed))


class NgramDraft:
    """What followed when the text's last tokens stood in it before: no model, and no memory.

    Of the longest of NGRAMS that was there before, the latest place. Where what follows it runs
    into the end of the text, the text repeats itself, and is guessed to go on so.
    """

    lm = None

    def __init__(self, pace: "Pace"):
        self.pace = pace

    def kv_bytes_per_token(self) -> int:
        return 0

    def views(self, caches: list[KVCache]) -> None:
        return None

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Guess:
        tables: list[dict[Sequence[int], int]] = [{} for _ in texts]
        indexed = [0] * len(texts)
        device = caches[0].k.device

        def guess(k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
            rows: list[list[int]] = [[] for _ in texts]
            for row in live if k else ():
                index(texts[row], tables[row], indexed[row])
                indexed[row] = len(texts[row])
                rows[row] = follow(texts[row], tables[row], k)
            width = max(map(len, rows))
            padded = [[*row, *[0] * (width - len(row))] for row in rows]
            return torch.tensor(padded, dtype=torch.long, device=device), list(map(len, rows))

        return guess


def index(text: Sequence[int], table: dict[Sequence[int], int], start: int) -> None:
    """Enter where each n-gram of the text that something follows ends; `start` are there."""
    for end in range(max(start, 1), len(text)):
        for n in NGRAMS:
            table[tuple(text[max(0, end - n) : end])] = end


def follow(text: Sequence[int], table: dict[Sequence[int], int], k: int) -> list[int]:
    """k tokens that may follow, or none."""
    places = (table.get(tuple(text[-n:])) for n in NGRAMS)
    at = next((place for place in places if place), None)
    return [] if at is None else [text[at + i % (len(text) - at)] for i in range(k)]


class ModelDraft:
    """Another model, with caches of its own."""

    def __init__(self, pace: "Pace", lm: LoadedModel):
        self.pace, self.lm = pace, lm
        self._latest: ModelGuess | None = None

    def kv_bytes_per_token(self) -> int:
        return self.lm.model.kv_bytes_per_token()

    def views(self, caches: list[KVCache]) -> tuple[LoadedModel, list[KVCache], int]:
        return self.lm, self._like(caches), 2

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Guess:
        filled, old = [0] * len(texts), self._latest
        caches = self._like(caches)
        if old and old.caches is caches:
            pairs = zip(old.texts, texts, old.filled, strict=True)
            filled = [min(len(os.path.commonprefix([a, b])), most) for a, b, most in pairs]
        self._latest = ModelGuess(self.lm, texts, caches, filled, sampler)
        self._latest.catch_up()
        return self._latest

    def _like(self, caches: list[KVCache]) -> list[KVCache]:
        """Caches for as many rows, as long as this model can use: the latest ones, if they fit."""
        rows, length = caches[0].rows, min(caches[0].length, self.lm.model.args.context)
        own = self._latest.caches if self._latest else []
        if own and (own[0].rows, own[0].length) == (rows, length):
            return own
        return self.lm.model.make_caches(rows, length)


class SelfDraft:
    """The model's own quantised copy, on the model's caches: what it guesses from is exact, and
    what it writes there the model writes again when it verifies."""

    def __init__(self, pace: "Pace", lm: LoadedModel):
        self.pace, self.lm = pace, lm

    def kv_bytes_per_token(self) -> int:
        return 0

    def views(self, caches: list[KVCache]) -> tuple[LoadedModel, list[KVCache], int]:
        return self.lm, caches, 1

    def start(self, texts: Texts, caches: list[KVCache], sampler: Sampler) -> Guess:
        return ModelGuess(self.lm, texts, caches, None, sampler)


class ModelGuess:
    """A model that guesses for texts as they grow.

    filled: how many slots of each row it has written. Of those, the text's tokens but the last are
    as the text says: what it wrote further on did not hold. None: another writes what it lacks.
    """

    def __init__(
        self,
        lm: LoadedModel,
        texts: Texts,
        caches: list[KVCache],
        filled: list[int] | None,
        sampler: Sampler,
    ):
        self.lm, self.texts, self.caches, self.filled = lm, texts, caches, filled
        self._sampler = sampler
        self._starts = [len(text) - 1 for text in texts]  # texts have one id of their answer
        self._slots = torch.arange(caches[0].length, device=lm.device)

    def __call__(self, k: int, live: AbstractSet[int]) -> tuple[Tensor, list[int]]:
        B, longest = len(self.texts), max(map(len, self.texts))
        k = min(k, len(self._slots) - longest)
        if k <= 0:
            return self._slots.new_empty(B, 0), [0] * B
        self.catch_up()
        # Where every guess has held, the last of them was never read: it is read now.
        tail = 1 if self.filled is None else 2
        pairs = zip(self.texts, self._starts, strict=True)
        known = [(*text[-tail:], len(text), len(text) - start) for text, start in pairs]
        known = torch.tensor(known, device=self._slots.device)  # (B, tail + 2)
        tokens, ends, numbers = known.split((tail, 1, 1), dim=1)
        pos = ends - tail + self._slots[:tail]  # (B, tail)
        visible = self._slots[: visible_slots(longest + k - 1, len(self._slots))]
        guesses = []
        for n in range(k):
            logits = self.lm.decode(tokens, pos, visible, self.caches)[:, -1:]  # (B, 1, V)
            tokens, pos = self._sampler(logits, numbers + n), ends + n  # (B, 1) each
            guesses.append(tokens)
        if self.filled is not None:
            self.filled = [len(text) + k - 1 for text in self.texts]
        return torch.cat(guesses, dim=1), [k] * B

    def catch_up(self) -> None:
        """Read what the texts have got since this model last guessed, if that is much."""
        if self.filled is None:
            return
        most = len(self._slots)
        wanted = [min(len(text) - 1, most) for text in self.texts]
        self.filled = list(map(min, self.filled, wanted))
        if any(n - f > 1 for n, f in zip(wanted, self.filled, strict=True)):
            texts = [text[:n] for text, n in zip(self.texts, wanted, strict=True)]
            prefill(self.lm, texts, self.caches, min(self.filled), self._slots)
            self.filled = wanted


class Pace:
    """How many tokens to guess in a cycle, from how often guesses hold and what cycles take.

    k: always so many. None: the number that gives most tokens per second, down to none at all;
    then guessing is tried again after a while, and each time later.
    """

    def __init__(self, k: int | None):
        self.k = k
        self.report = Report()
        self._rows = 0
        self._forget()

    def of(self, rows: int) -> "Pace":
        """This one, for so many rows: what it has learned of other numbers is worth nothing."""
        if rows != self._rows:
            self._rows = rows
            self._forget()
        return self

    def _forget(self) -> None:
        self._cycle = 0
        self._met: dict[int, int] = defaultdict(int)  # cycles of each number of guesses
        self._times: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._plain: float | None = None  # seconds of a plain step
        self._asked = [0.0] * MOST  # rows that guessed an n-th token, all before having held
        self._held = [0.0] * MOST  # rows in which it held too
        self._rows_live, self._rows_guessed = 1e-9, 1e-9  # in cycles with guesses
        self._trial = TRIAL
        self._pause = self._wait = PAUSE[0]
        self._paused = self._resumed = False

    def choose(self, most: int) -> int:
        """How many guesses to ask for, at most `most`."""
        self._cycle += 1
        plain = self._times[0]
        due = len(plain) < 2 or self._cycle - plain[-1][0] >= PLAIN_EVERY
        k = 0 if due else self.k or self._best()
        self._resumed, self._paused = self._paused and k > 0, k == 0
        return max(0, min(k, most))

    def _best(self) -> int:
        times, shares = self._expected_times(), self._expected_shares()
        kept = self._rows_guessed / self._rows_live

        def rate(k: int) -> float:
            return (1 + kept * sum(shares[:k])) / times[k]

        if self._trial:
            return max(range(1, MOST + 1), key=rate)
        best = max(range(MOST + 1), key=rate)
        if best:
            self._pause = self._wait = PAUSE[0]
            return best
        self._wait -= 1
        if self._wait == 0:
            self._trial = TRIAL
            self._pause = self._wait = min(2 * self._pause, PAUSE[1])
        return 0

    def _expected_shares(self) -> list[float]:
        """For n = 1, 2, ...: in what share of rows the first n guesses will hold."""
        pooled = (sum(self._held) + 1.6) / (sum(self._asked) + 2)
        shares, share = [], 1.0
        for asked, held in zip(self._asked, self._held, strict=True):
            share *= (held + 2 * pooled) / (asked + 2)
            shares.append(share)
        return shares

    def _expected_times(self) -> list[float]:
        """What a cycle of 0, 1, 2, ... guesses takes: measured, or else on the line through what
        was."""
        known = {}
        for k, times in self._times.items():
            fresh = [seconds for at, seconds in times if self._cycle - at < STALE or k == 0]
            if len(fresh) >= 2:
                known[k] = median(fresh)
        middle = mean(known)
        spread = sum((k - middle) ** 2 for k in known)
        slope = sum((k - middle) * known[k] for k in known) / spread if spread else known[0] / 5
        base = mean(known.values()) - slope * middle
        floor = min(known.values())
        return [known.get(k, max(base + slope * k, floor)) for k in range(MOST + 1)]

    def learn(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """A cycle of k guesses: how many were offered and how many held, in each live row."""
        self._met[k] += 1
        if self._met[k] > UNTYPICAL and not (k and self._resumed):  # it may have had to catch up
            self._times[k].append((self._cycle, seconds))
        if k == 0 or self._plain is None:
            self._plain = median(s for _, s in self._times[0]) if self._times[0] else seconds
        self.report.add(k, rows, seconds, self._plain)
        if k == 0:
            return
        self._trial = max(0, self._trial - 1)
        self._rows_live = FADING * self._rows_live + len(rows)
        self._rows_guessed = FADING * self._rows_guessed + sum(offered > 0 for offered, _ in rows)
        for n in range(min(k, MOST)):
            asked = [held for offered, held in rows if offered > n and held >= n]
            self._asked[n] = FADING * self._asked[n] + len(asked)
            self._held[n] = FADING * self._held[n] + sum(held > n for held in asked)


class Report:
    """What guessing came to, all cycles together."""

    def __init__(self):
        self.cycles = self.tokens = self.plain_steps = 0
        self.offered: list[int] = []  # how often an n-th guess was made
        self.held: list[int] = []  # how often it held, and all before it
        self.seconds = self.plain_seconds = 0.0  # measured; of plain decoding for the same ids

    def add(self, k: int, rows: list[tuple[int, int]], seconds: float, plain: float) -> None:
        """plain: seconds of a plain step."""
        self.seconds += seconds
        self.plain_seconds += plain * (1 + sum(held for _, held in rows) / len(rows))
        self.plain_steps += k == 0
        self.cycles += k > 0
        more = k - len(self.offered)
        self.offered += [0] * more
        self.held += [0] * more
        for offered, held in rows:
            self.tokens += (1 + held) * (k > 0)
            for n in range(offered):
                self.offered[n] += 1
                self.held[n] += held > n

    @property
    def speed_up(self) -> float:
        """Over plain decoding, by plain steps of the same run."""
        return self.plain_seconds / max(self.seconds, 1e-9)

    def lines(self) -> Iterator[str]:
        if not self.cycles:
            yield f"speculation: nothing was guessed in {self.plain_steps} steps"
            return
        guessed, right = sum(self.offered), sum(self.held)
        shares = [f"{h / o:.0%}" for h, o in zip(self.held, self.offered, strict=True) if o]
        yield (
            f"speculation: {self.cycles} cycles and {self.plain_steps} plain steps, "
            f"{right} of {guessed} guesses held ({right / guessed:.0%}), "
            f"{self.speed_up:.2f}x plain decoding"
        )
        yield f"guesses that held, by position: {' '.join(shares)}"

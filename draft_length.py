"""How many draft tokens to ask for: chosen from how often they are accepted and what cycles take.

Start at DraftLengthController.choose and DraftLengthController.learn, which speculate.py calls before and after each cycle. DraftStats
counts the results. A cycle of k guesses yields the guesses that were right and one token more. It
takes the time of k guesses and of one pass over k + 1 tokens. The best k gives most tokens per
second. The text does not depend on k, so k may be chosen by the clock.

Trying a draft costs time, too, and a short text does not win it back. So guessing has a budget,
counted in plain steps. The budget begins with STAKE, changes by what each cycle gains or loses
against plain decoding, and grows by TAX of all steps. A cycle runs only if the budget covers the
case that all of its guesses are wrong. A draft that never pays costs two steps and 1 % of the time.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from statistics import median

from ranks import broadcast_from_rank0

MAX_DRAFT_TOKENS = (
    15  # guesses that are chosen; with one token more, as many rows as cost about what one does
)
RECENT = 9  # times of each number of guesses that a median is taken of
UNTYPICAL = 2  # first cycles of each kind in which CUDA graphs warm up, and record: not timed
PLAIN_EVERY = 64  # cycles; a plain step among them says what plain decoding takes now
STALE = 4 * PLAIN_EVERY  # cycles after which a time says nothing any more
STAKE, TAX = 2.0, 0.01  # the budget at first, in plain steps; what it gets of each step
TRIAL = 6  # cycles with guesses, before guessing is judged
# Guesses in trials, by turns: few, which cost little, and more, as a sweep of two tokens may take
# far longer than a step of one, and a sweep of five hardly longer than one of two.
PROBES = 1, 4
PAUSE = 16, 512  # steps without guesses between trials: at first; at most
FADING = 0.97  # weight that what was counted keeps from one cycle to the next


class DraftLengthController:
    """How many tokens to guess in a cycle, from how often guesses hold and what cycles take.

    k: the number of draft tokens of every cycle, except in the plain steps that time plain
    decoding. None: in each cycle the number that gives most tokens per second within the budget.
    Where no number pays, guessing pauses; each further pause is twice as long, up to PAUSE[1]
    steps. graphs: the first cycles of each kind record CUDA graphs. catches_up: after a pause, the
    draft model first reads the tokens generated during the pause.
    """

    def __init__(self, k: int | None, graphs: bool = False, catches_up: bool = False):
        self.k, self._catches_up = k, catches_up
        self._untypical = UNTYPICAL if graphs else 0
        self.stats = DraftStats()
        self._rows = 0
        self._forget()

    def for_batch(self, rows: int) -> "DraftLengthController":
        """This one, for so many rows: what it has learned of other numbers is worth nothing."""
        if rows != self._rows:
            self._rows = rows
            self._forget()
        return self

    def _forget(self) -> None:
        self._cycle = 0
        self._met: dict[int, int] = defaultdict(int)  # cycles of each number of guesses
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._typical: dict[int, float] = {}  # their medians
        self._timed: dict[int, int] = defaultdict(int)  # the cycle of the last of them
        self._asked = [
            0.0
        ] * MAX_DRAFT_TOKENS  # rows that guessed an n-th token, all before having held
        self._held = [0.0] * MAX_DRAFT_TOKENS  # rows in which it held too
        self._rows_live, self._rows_guessed = 1e-9, 1e-9  # in cycles with guesses
        self._budget = STAKE
        self._trial, self._trials = TRIAL, 0
        self._pause, self._wait = PAUSE[0], 0  # of the next pause; left of this one
        self._paused = self._resumed = False

    def choose(self, most: int) -> int:
        """How many guesses to ask for, at most `most`. Rank 0 decides, for its clock counts."""
        self._cycle += 1
        # A plain step is timed if fewer than two were, or the latest is PLAIN_EVERY cycles old.
        due = len(self._times[0]) < 2 or self._cycle - self._timed[0] >= PLAIN_EVERY
        k = broadcast_from_rank0(lambda: 0 if due else self._best() if self.k is None else self.k)
        self._resumed, self._paused = self._paused and k > 0, k == 0
        return max(0, min(k, most))

    def _best(self) -> int:
        if self._wait:  # nothing is reckoned in a pause: that takes 1 % of a step of a small model
            self._wait -= 1
            if not self._wait:
                self._trial, self._trials = TRIAL, self._trials + 1
            return 0
        times, tokens = self._expected_times(), self._expected_tokens()

        def rate(k: int) -> float:
            return tokens[k] / times[k]

        tried = any(k for k in self._typical if self._known(k))
        risks = ((times[k] / times[0] - 1 if tried else k) for k in range(MAX_DRAFT_TOKENS + 1))
        affordable = [k for k, risk in enumerate(risks) if risk <= self._budget]
        best = max(affordable, key=rate, default=0)
        if best and tried:
            self._pause = PAUSE[0]
            return best
        probes = PROBES[self._trials % len(PROBES)], PROBES[0]
        probe = next((k for k in probes if k in affordable), 0)
        if self._trial and probe:
            return probe
        self._wait, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
        self._trial = 0
        return 0

    def _expected_tokens(self) -> list[float]:
        """Of cycles of 0, 1, 2, ... guesses, for each row."""
        # Where little was asked, the share of all guesses counts, and at first a hopeful one.
        pooled = (sum(self._held) + 2 * 0.8) / (sum(self._asked) + 2)
        each = zip(self._asked, self._held, strict=True)
        shares = accumulate(((held + 2 * pooled) / (asked + 2) for asked, held in each), mul)
        guessed = self._rows_guessed / self._rows_live
        return list(accumulate((guessed * share for share in shares), initial=1.0))

    def _known(self, k: int) -> bool:
        """Whether the time that was measured of cycles of k guesses is recent enough."""
        return k == 0 or self._cycle - self._timed[k] < STALE

    def _expected_times(self) -> list[float]:
        """Of cycles of 0, 1, 2, ... guesses: measured, or else on the line through what was."""
        known = {k: seconds for k, seconds in self._typical.items() if self._known(k)}
        middle, height = (sum(of) / len(known) for of in (known, known.values()))
        spread = sum((k - middle) ** 2 for k in known)
        slope = sum((k - middle) * known[k] for k in known) / spread if spread else known[0] / 5
        base, floor = height - slope * middle, min(known.values())
        return [known.get(k, max(base + slope * k, floor)) for k in range(MAX_DRAFT_TOKENS + 1)]

    def update(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """A cycle of k guesses: how many were offered and how many held, in each live row."""
        self._met[k] += 1
        caught_up = self._catches_up and self._resumed and k > 0
        timed = self._met[k] > self._untypical and not caught_up
        if timed:
            if self._cycle - self._timed[k] >= STALE:
                self._times[k].clear()
            self._times[k].append(seconds)
            self._timed[k] = self._cycle
            self._typical[k] = median(self._times[k])
        self.stats.add(k, rows, seconds, self._typical.get(0, seconds))
        self._account(k, rows, self._typical[k] if timed else seconds)
        if k == 0:
            return
        self._trial = max(0, self._trial - 1)
        self._rows_live = FADING * self._rows_live + len(rows)
        self._rows_guessed = FADING * self._rows_guessed + sum(offered > 0 for offered, _ in rows)
        for n in range(min(k, MAX_DRAFT_TOKENS)):
            asked = [held for offered, held in rows if offered > n and held >= n]
            self._asked[n] = FADING * self._asked[n] + len(asked)
            self._held[n] = FADING * self._held[n] + sum(held > n for held in asked)

    def _account(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """Update the budget, in plain steps: add TAX of the cycle's cost; for k > 0 also add the
        tokens that it yielded for each row, and subtract its cost."""
        steps = seconds / self._typical.get(0, seconds)
        if self._met[k] <= self._untypical:
            steps = min(steps, 1 + k)  # graphs are recorded once: that is no cost of guessing
        self._budget += TAX * steps
        if k:
            self._budget += 1 + sum(held for _, held in rows) / len(rows) - steps


class DraftStats:
    """What guessing came to, all cycles together."""

    def __init__(self):
        self.cycles = self.tokens = self.plain_steps = 0
        self.drafted: list[int] = []  # how often an n-th guess was made
        self.accepted: list[int] = []  # how often it held, and all before it
        self.seconds = self.plain_seconds = 0.0  # measured; of plain decoding for the same ids

    def add(self, k: int, rows: list[tuple[int, int]], seconds: float, plain: float) -> None:
        """plain: seconds of a plain step."""
        self.seconds += seconds
        self.plain_seconds += plain * (1 + sum(held for _, held in rows) / len(rows))
        self.plain_steps += k == 0
        self.cycles += k > 0
        more = k - len(self.drafted)
        self.drafted += [0] * more
        self.accepted += [0] * more
        for offered, held in rows:
            self.tokens += (1 + held) * (k > 0)
            for n in range(offered):
                self.drafted[n] += 1
                self.accepted[n] += held > n

    @property
    def speed_up(self) -> float:
        """Over plain decoding, by plain steps of the same run."""
        return self.plain_seconds / max(self.seconds, 1e-9)

    def lines(self) -> Iterator[str]:
        if not self.cycles:
            yield f"speculation: nothing was guessed in {self.plain_steps} steps"
            return
        guessed, right = sum(self.drafted), sum(self.accepted)
        shares = [f"{h / o:.0%}" for h, o in zip(self.accepted, self.drafted, strict=True) if o]
        yield (
            f"speculation: {self.cycles} cycles and {self.plain_steps} plain steps, "
            f"{right} of {guessed} guesses held ({right / guessed:.0%}), "
            f"{self.speed_up:.2f}x plain decoding"
        )
        yield f"guesses that held, by position: {' '.join(shares)}"

"""Chooses how many draft tokens to propose, from the acceptance rate and measured times.

Start at DraftLengthController.choose and .update, which speculate.py calls before and after each
cycle. A cycle with k draft tokens is k draft steps and one verify pass over k + 1 tokens; it yields
the accepted draft tokens and one token more. The best k yields the most tokens per second. k does
not change the text, so measured times may decide it. DraftStats counts the results for the user.

Trying a draft costs time, which a short text may not win back. So cycles with draft tokens have a
budget, counted in plain steps. It begins with INITIAL_BUDGET_STEPS, grows by BUDGET_SHARE of all
steps, and changes by what each cycle gains or loses against plain decoding. A k is allowed only if
the budget covers a cycle in which all k draft tokens are rejected. A draft that never pays costs
two steps and 1 % of the time.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from statistics import median

from ranks import broadcast_from_rank0

# A verify pass over MAX_DRAFT_TOKENS + 1 = 16 tokens takes about as long as a step of one token.
MAX_DRAFT_TOKENS = 15
TIMES_PER_MEDIAN = 9  # latest times of cycles with the same k
GRAPH_CYCLES = 2  # the first cycles with each k warm up and record CUDA graphs: not timed
PLAIN_EVERY_CYCLES = 64  # a plain step among so many cycles times plain decoding
STALE_CYCLES = 4 * PLAIN_EVERY_CYCLES  # older times are dropped
INITIAL_BUDGET_STEPS, BUDGET_SHARE = 2.0, 0.01
TRIAL_CYCLES = 6  # cycles with draft tokens before a draft is judged
# The k of trials, in turn. One token costs little; a verify pass of five tokens may take hardly
# longer than one of two, where one of two takes far longer than a plain step.
TRIAL_DRAFT_TOKENS = 1, 4
MIN_PAUSE_STEPS, MAX_PAUSE_STEPS = 16, 512  # plain steps between trials
DECAY = 0.97  # factor of older counts, per cycle
PRIOR_RATE, PRIOR_WEIGHT = 0.8, 2  # acceptance rate before anything is counted


class DraftLengthController:
    """Chooses k, the number of draft tokens of the next cycle.

    k: the same number in every cycle, except in the plain steps that time plain decoding. None:
    the number with the most expected tokens per second within the budget. Where no number pays,
    drafting pauses; each further pause is twice as long, up to MAX_PAUSE_STEPS. graphs: the first
    cycles with each k record CUDA graphs. catches_up: after a pause, the draft model first reads
    the tokens generated during the pause.
    """

    def __init__(self, k: int | None, graphs: bool = False, catches_up: bool = False):
        self.k, self._catches_up = k, catches_up
        self._untimed = GRAPH_CYCLES if graphs else 0
        self.stats = DraftStats()
        self._rows = 0
        self._reset()

    def for_batch(self, rows: int) -> "DraftLengthController":
        """Return self, reset if the number of rows differs from the last call's: times and rates
        of another batch size do not apply."""
        if rows != self._rows:
            self._rows = rows
            self._reset()
        return self

    def _reset(self) -> None:
        self._cycle = 0
        self._cycles_of: dict[int, int] = defaultdict(int)  # by k
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=TIMES_PER_MEDIAN))
        self._median: dict[int, float] = {}  # seconds of a cycle, by k
        self._timed_at: dict[int, int] = defaultdict(int)  # the latest timed cycle, by k
        # Rows in which the first n draft tokens were accepted and an n-th was proposed (counted
        # from 0); and rows in which the n-th was accepted, too. Decayed, as the next two are.
        self._drafted = [0.0] * MAX_DRAFT_TOKENS
        self._accepted = [0.0] * MAX_DRAFT_TOKENS
        # Live rows of cycles with draft tokens, and those of them that had a proposal.
        self._rows_live, self._rows_drafted = 1e-9, 1e-9
        self._budget = INITIAL_BUDGET_STEPS
        self._trial_left, self._trials = TRIAL_CYCLES, 0
        self._next_pause, self._pause_left = MIN_PAUSE_STEPS, 0
        self._paused = self._resumed = False

    def choose(self, most: int) -> int:
        """Return k for the next cycle, at most `most`. Rank 0 decides, because clocks differ."""
        self._cycle += 1
        # A plain step is timed if fewer than two were, or the latest is old.
        age = self._cycle - self._timed_at[0]
        due = len(self._times[0]) < 2 or age >= PLAIN_EVERY_CYCLES
        k = broadcast_from_rank0(lambda: 0 if due else self._best() if self.k is None else self.k)
        self._resumed, self._paused = self._paused and k > 0, k == 0
        return max(0, min(k, most))

    def _best(self) -> int:
        """Return the best k within the budget, a trial's k, or 0 during a pause."""
        if self._pause_left:  # no estimates: they take 1 % of a small model's step
            self._pause_left -= 1
            if not self._pause_left:
                self._trial_left, self._trials = TRIAL_CYCLES, self._trials + 1
            return 0
        times, tokens = self._expected_times(), self._expected_tokens()
        tried = any(k for k in self._median if self._is_recent(k))
        # Plain steps lost if all k draft tokens are rejected.
        losses = ((times[k] / times[0] - 1 if tried else k) for k in range(MAX_DRAFT_TOKENS + 1))
        affordable = [k for k, loss in enumerate(losses) if loss <= self._budget]
        best = max(affordable, key=lambda k: tokens[k] / times[k], default=0)
        if best and tried:
            self._next_pause = MIN_PAUSE_STEPS
            return best
        return self._try_or_pause(affordable)

    def _try_or_pause(self, affordable: list[int]) -> int:
        """Return the k of a trial if one is left and affordable; else begin a pause."""
        wanted = TRIAL_DRAFT_TOKENS[self._trials % len(TRIAL_DRAFT_TOKENS)], TRIAL_DRAFT_TOKENS[0]
        k = next((k for k in wanted if k in affordable), 0)
        if self._trial_left and k:
            return k
        self._pause_left = self._next_pause
        self._next_pause = min(2 * self._next_pause, MAX_PAUSE_STEPS)
        self._trial_left = 0
        return 0

    def _expected_tokens(self) -> list[float]:
        """Return the expected tokens of a row in a cycle of k = 0, 1, 2, ... draft tokens."""
        # A position with few counts takes the rate of all positions, which starts at PRIOR_RATE.
        accepted = sum(self._accepted) + PRIOR_WEIGHT * PRIOR_RATE
        overall = accepted / (sum(self._drafted) + PRIOR_WEIGHT)
        counts = zip(self._drafted, self._accepted, strict=True)
        rates = ((a + PRIOR_WEIGHT * overall) / (d + PRIOR_WEIGHT) for d, a in counts)
        drafted = self._rows_drafted / self._rows_live
        return list(accumulate((drafted * rate for rate in accumulate(rates, mul)), initial=1.0))

    def _is_recent(self, k: int) -> bool:
        """Whether a cycle with k draft tokens was timed recently; always true for plain steps."""
        return k == 0 or self._cycle - self._timed_at[k] < STALE_CYCLES

    def _expected_times(self) -> list[float]:
        """Return the seconds of a cycle of k = 0, 1, 2, ... draft tokens: the median of recent
        cycles, or the value on the least-squares line through the medians."""
        known = {k: seconds for k, seconds in self._median.items() if self._is_recent(k)}
        mean_k, mean_time = (sum(values) / len(known) for values in (known, known.values()))
        spread = sum((k - mean_k) ** 2 for k in known)
        slope = sum((k - mean_k) * known[k] for k in known) / spread if spread else known[0] / 5
        base, floor = mean_time - slope * mean_k, min(known.values())
        return [known.get(k, max(base + slope * k, floor)) for k in range(MAX_DRAFT_TOKENS + 1)]

    def update(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """Take in a cycle of k draft tokens. rows: the drafted and accepted tokens of each live
        row."""
        self._cycles_of[k] += 1
        caught_up = self._catches_up and self._resumed and k > 0
        timed = self._cycles_of[k] > self._untimed and not caught_up
        if timed:
            self._add_time(k, seconds)
        self.stats.add(k, rows, seconds, self._median.get(0, seconds))
        self._update_budget(k, rows, self._median[k] if timed else seconds)
        if k:
            self._trial_left = max(0, self._trial_left - 1)
            self._count(k, rows)

    def _add_time(self, k: int, seconds: float) -> None:
        if self._cycle - self._timed_at[k] >= STALE_CYCLES:
            self._times[k].clear()
        self._times[k].append(seconds)
        self._timed_at[k] = self._cycle
        self._median[k] = median(self._times[k])

    def _count(self, k: int, rows: list[tuple[int, int]]) -> None:
        """Count drafted and accepted tokens by position, and let older counts decay."""
        self._rows_live = DECAY * self._rows_live + len(rows)
        self._rows_drafted = DECAY * self._rows_drafted + sum(drafted > 0 for drafted, _ in rows)
        for n in range(min(k, MAX_DRAFT_TOKENS)):
            reached = [accepted for drafted, accepted in rows if drafted > n and accepted >= n]
            self._drafted[n] = DECAY * self._drafted[n] + len(reached)
            self._accepted[n] = DECAY * self._accepted[n] + sum(a > n for a in reached)

    def _update_budget(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """Add BUDGET_SHARE of the cycle's time in plain steps; for k > 0 also add the tokens that
        it yielded for each row, and subtract its time."""
        steps = seconds / self._median.get(0, seconds)
        if self._cycles_of[k] <= self._untimed:
            steps = min(steps, 1 + k)  # recording a CUDA graph happens once: no cost of drafting
        self._budget += BUDGET_SHARE * steps
        if k:
            self._budget += 1 + sum(accepted for _, accepted in rows) / len(rows) - steps


class DraftStats:
    """Counts and times of all cycles, for the lines printed at the end of a run."""

    def __init__(self):
        self.cycles = self.tokens = self.plain_steps = 0
        self.drafted: list[int] = []  # by position: how often an n-th draft token was proposed
        self.accepted: list[int] = []  # by position: how often it was accepted
        # Measured; and estimated for the same tokens by plain decoding.
        self.seconds = self.plain_seconds = 0.0

    def add(self, k: int, rows: list[tuple[int, int]], seconds: float, plain: float) -> None:
        """Add a cycle. rows: as in DraftLengthController.update; plain: seconds of a plain step."""
        self.seconds += seconds
        self.plain_seconds += plain * (1 + sum(accepted for _, accepted in rows) / len(rows))
        self.plain_steps += k == 0
        self.cycles += k > 0
        more = k - len(self.drafted)
        self.drafted += [0] * more
        self.accepted += [0] * more
        for drafted, accepted in rows:
            self.tokens += (1 + accepted) * (k > 0)
            for n in range(drafted):
                self.drafted[n] += 1
                self.accepted[n] += accepted > n

    @property
    def speed_up(self) -> float:
        """The factor over plain decoding, whose time is that of plain steps in the same run."""
        return self.plain_seconds / max(self.seconds, 1e-9)

    def lines(self) -> Iterator[str]:
        """Yield the lines for the user."""
        if not self.cycles:
            yield f"speculation: no draft tokens in {self.plain_steps} steps"
            return
        drafted, accepted = sum(self.drafted), sum(self.accepted)
        rates = [f"{a / d:.0%}" for a, d in zip(self.accepted, self.drafted, strict=True) if d]
        yield (
            f"speculation: {self.cycles} cycles and {self.plain_steps} plain steps, "
            f"{accepted} of {drafted} draft tokens accepted ({accepted / drafted:.0%}), "
            f"{self.speed_up:.2f}x plain decoding"
        )
        yield f"acceptance rate by position: {' '.join(rates)}"

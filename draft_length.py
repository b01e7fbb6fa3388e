"""Chooses how many draft tokens to propose, from the acceptance rate and measured times.

Start at DraftLengthController.choose and .update, which speculate.py calls before and after each
cycle. A cycle with k draft tokens is k draft steps and one verify pass over k + 1 tokens; it yields
the accepted draft tokens and one token more. The best k yields the most tokens per second. k does
not change the text, so measured times may decide it. DraftStats counts the results for the user.
A draft token is accepted if the model draws the same token. A live row is an unfinished one. The
position of a draft token counts the draft tokens of its cycle from 0.

A plain step is a cycle with k = 0. Trying a draft costs time, which may exceed the gain in a short
text. So cycles with draft tokens have a budget, counted in plain steps. It begins with
INITIAL_BUDGET_STEPS, grows by BUDGET_SHARE of the time of all cycles, and changes by the steps that
each cycle gains or loses against plain decoding. A k is allowed only if the budget covers the loss
of a cycle in which all k draft tokens are rejected. So a draft that never helps costs
INITIAL_BUDGET_STEPS steps and BUDGET_SHARE of the time.

If no k is known to be faster than plain decoding, a trial of TRIAL_CYCLES cycles measures one k.
A pause of plain steps precedes the next trial.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from statistics import median

from options.settings import MAX_DRAFT_TOKENS
from ranks import broadcast_from_rank0

TIMES_PER_MEDIAN = 9  # the time of a k is the median of so many latest cycles with this k
GRAPH_CYCLES = 2  # so many first cycles with each k warm up and record CUDA graphs: not timed
PLAIN_EVERY_CYCLES = 64  # one of so many cycles is a plain step, which times plain decoding
STALE_CYCLES = 4 * PLAIN_EVERY_CYCLES  # times are ignored after this many cycles
INITIAL_BUDGET_STEPS, BUDGET_SHARE = 2.0, 0.01
TRIAL_CYCLES = 6  # cycles with draft tokens before a draft is judged
# Successive trials alternate between these k. k = 1 costs least. But without AMX a second token can
# cost more than each later one: PyTorch's float32 products on a CPU with AVX2 took 2.1, 3.5 and 4.6
# times one row's time for 2, 5 and 16 rows. There k = 4 can pay where k = 1 does not.
TRIAL_DRAFT_TOKENS = 1, 4
ASSUMED_DRAFT_COST = 0.2  # plain steps per draft token, before a cycle with draft tokens is timed
MIN_PAUSE_STEPS, MAX_PAUSE_STEPS = 16, 512  # plain steps between trials
DECAY = 0.97  # older counts are multiplied by this at each cycle with draft tokens
# The acceptance rate before any token is counted, and the number of counted draft tokens that has
# the same weight.
PRIOR_RATE, PRIOR_WEIGHT = 0.8, 2


class DraftLengthController:
    """Chooses k, the number of draft tokens of the next cycle.

    k: a number, at most MAX_DRAFT_TOKENS, fixes k, except in the plain steps that time plain
    decoding. None chooses the k with the most expected tokens per second within the budget. If no k
    is faster than plain decoding, drafting pauses; each further pause is twice as long, up to
    MAX_PAUSE_STEPS. graphs: whether the first cycles with each k record CUDA graphs.
    draft_reads_after_plain: whether, in the first cycle after plain steps, a draft model also reads
    the tokens of those steps, so that this cycle is not timed.
    """

    def __init__(self, k: int | None, graphs: bool = False, draft_reads_after_plain: bool = False):
        self.k, self._draft_reads_after_plain = k, draft_reads_after_plain
        self._untimed_cycles = GRAPH_CYCLES if graphs else 0  # the first cycles with each k
        self.stats = DraftStats()
        self._rows = 0
        self._reset()

    def for_batch(self, rows: int) -> "DraftLengthController":
        """Return this controller. Call it at the start of each batch. rows: of the batch.

        If this number differs from the last batch's, the controller forgets all times, rates,
        pauses and the budget, which depend on it. `stats` goes on counting.
        """
        if rows != self._rows:
            self._rows = rows
            self._reset()
        return self

    def _reset(self) -> None:
        """Forget all times, rates, pauses and the budget: at first, and for another number of rows.

        The next cycles are plain steps, until two of them are timed; a trial follows.
        """
        self._cycle = 0  # the number of the current cycle, from 1
        self._cycles_of: dict[int, int] = defaultdict(int)  # cycles with each k
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=TIMES_PER_MEDIAN))
        self._median: dict[int, float] = {}  # seconds of a cycle, by k
        self._timed_at: dict[int, int] = defaultdict(int)  # number of the latest timed cycle, by k
        # For each position n: rows that had a draft token n and accepted all before it, and rows
        # that accepted draft token n, too. These counts decay, as do the next two.
        self._drafted = [0.0] * MAX_DRAFT_TOKENS
        self._accepted = [0.0] * MAX_DRAFT_TOKENS
        # Live rows in cycles with draft tokens, and the rows among them that had a draft token. Not
        # 0, so that their quotient is 1 before any cycle.
        self._rows_live, self._rows_drafted = 1e-9, 1e-9
        self._budget = INITIAL_BUDGET_STEPS
        self._trial_cycles_left, self._past_trials = TRIAL_CYCLES, 0
        self._next_pause_steps, self._pause_steps_left = MIN_PAUSE_STEPS, 0
        # Whether the latest chosen k, before max_k limits it, is 0; and whether it is above 0 and
        # the k before it was 0.
        self._is_plain = self._is_after_plain = False

    def choose(self, max_k: int) -> int:
        """Return k for the next cycle, at most max_k. Call it once before each cycle.

        max_k: the most draft tokens that a text can still use; if negative, the result is 0. With
        several ranks, rank 0 chooses for all: times differ between ranks, but all must use the same
        k.
        """
        self._cycle += 1
        # Time a plain step if fewer than two are timed, or PLAIN_EVERY_CYCLES after the latest.
        age = self._cycle - self._timed_at[0]
        time_plain = len(self._times[0]) < 2 or age >= PLAIN_EVERY_CYCLES
        k = broadcast_from_rank0(
            lambda: 0 if time_plain else self._best_k() if self.k is None else self.k
        )
        self._is_after_plain, self._is_plain = self._is_plain and k > 0, k == 0
        return max(0, min(k, max_k))

    def _best_k(self) -> int:
        """Return the k with the most expected tokens per second that the budget covers.

        If that is 0, or no cycle with draft tokens was timed recently, return the k of a trial, or
        begin a pause and return 0. During a pause return 0; a trial follows it. For a controller
        without a fixed k. A plain step must have been timed before.
        """
        if self._pause_steps_left:  # skip the estimates, which take 1 % of a small model's step
            self._pause_steps_left -= 1
            if not self._pause_steps_left:
                self._trial_cycles_left, self._past_trials = TRIAL_CYCLES, self._past_trials + 1
            return 0
        times, tokens = self._expected_times(), self._expected_tokens()
        tried = any(k > 0 and self._is_recent(k) for k in self._median)
        # Plain steps lost if all k draft tokens are rejected: then the cycle yields one token, as a
        # plain step does. Before a draft is timed, assume a loss of one step per draft token.
        losses = ((times[k] / times[0] - 1 if tried else k) for k in range(MAX_DRAFT_TOKENS + 1))
        affordable = [k for k, loss in enumerate(losses) if loss <= self._budget]
        best = max(affordable, key=lambda k: tokens[k] / times[k], default=0)
        if best and tried:
            self._next_pause_steps = MIN_PAUSE_STEPS
            return best
        return self._try_or_pause(affordable)

    def _try_or_pause(self, affordable: list[int]) -> int:
        """Return the k of the current trial, or 1 if the budget does not cover that k but covers 1.
        If the trial is over, or the budget covers neither, begin a pause and return 0.

        Called if no k above 0 is known to pay. Each pause is twice as long as the last one, up to
        MAX_PAUSE_STEPS, until drafting pays. affordable: the k, from 0 on, that the budget covers;
        may be empty.
        """
        trial_k = TRIAL_DRAFT_TOKENS[self._past_trials % len(TRIAL_DRAFT_TOKENS)]
        k = next((k for k in (trial_k, TRIAL_DRAFT_TOKENS[0]) if k in affordable), 0)
        if self._trial_cycles_left and k:
            return k
        self._pause_steps_left = self._next_pause_steps
        self._next_pause_steps = min(2 * self._next_pause_steps, MAX_PAUSE_STEPS)
        self._trial_cycles_left = 0
        return 0

    def _expected_tokens(self) -> list[float]:
        """Return the expected new tokens of a row in cycles with k = 0, 1, ..., MAX_DRAFT_TOKENS.

        One token is certain. Draft token n adds the probability that the row has draft tokens and
        that all up to n are accepted: the share of such rows times the product of the acceptance
        rates of positions 0 to n.
        """
        # A position with few counts takes the rate of all positions, which starts at PRIOR_RATE.
        accepted = sum(self._accepted) + PRIOR_WEIGHT * PRIOR_RATE
        overall = accepted / (sum(self._drafted) + PRIOR_WEIGHT)
        counts = zip(self._drafted, self._accepted, strict=True)
        rates = ((a + PRIOR_WEIGHT * overall) / (d + PRIOR_WEIGHT) for d, a in counts)
        share = self._rows_drafted / self._rows_live  # of rows that have draft tokens
        return list(accumulate((share * rate for rate in accumulate(rates, mul)), initial=1.0))

    def _is_recent(self, k: int) -> bool:
        """Return whether a cycle with k draft tokens was timed in the last STALE_CYCLES cycles;
        always true for k = 0, because plain steps are timed often."""
        return k == 0 or self._cycle - self._timed_at[k] < STALE_CYCLES

    def _expected_times(self) -> list[float]:
        """Return the seconds of cycles with k = 0, 1, ..., MAX_DRAFT_TOKENS.

        A k with recent times has their median. Another k has the value on the least-squares line
        through these medians, and at least the shortest median. If only plain steps are timed, a
        draft token is estimated at ASSUMED_DRAFT_COST plain steps. A plain step must have been
        timed.
        """
        timed = {k: seconds for k, seconds in self._median.items() if self._is_recent(k)}
        mean_k, mean_time = (sum(values) / len(timed) for values in (timed, timed.values()))
        variance = sum((k - mean_k) ** 2 for k in timed)
        if variance:
            slope = sum((k - mean_k) * timed[k] for k in timed) / variance  # seconds per token
        else:
            slope = timed[0] * ASSUMED_DRAFT_COST
        base, shortest = mean_time - slope * mean_k, min(timed.values())
        return [timed.get(k, max(base + slope * k, shortest)) for k in range(MAX_DRAFT_TOKENS + 1)]

    def update(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """Record a cycle, after it has ended: its time, its tokens and its effect on the budget.

        k: the draft tokens of the row that has most, which may be fewer than chosen. rows: the
        numbers of draft and of accepted tokens of each live row; at least one row. seconds: the
        duration of the whole cycle. It does not enter the median of this k if the cycle is one of
        the first, which record CUDA graphs, or if the draft model also read the tokens of plain
        steps.
        """
        self._cycles_of[k] += 1
        draft_read_more = self._draft_reads_after_plain and self._is_after_plain and k > 0
        timed = self._cycles_of[k] > self._untimed_cycles and not draft_read_more
        if timed:
            self._add_time(k, seconds)
        self.stats.add(k, rows, seconds, self._median.get(0, seconds))
        self._update_budget(k, rows, self._median[k] if timed else seconds)
        if k:
            self._trial_cycles_left = max(0, self._trial_cycles_left - 1)
            self._count_tokens(k, rows)

    def _add_time(self, k: int, seconds: float) -> None:
        """Add the duration of a cycle with k draft tokens, and update the median of this k. If the
        latest was STALE_CYCLES ago or more, drop all earlier durations."""
        if self._cycle - self._timed_at[k] >= STALE_CYCLES:
            self._times[k].clear()
        self._times[k].append(seconds)
        self._timed_at[k] = self._cycle
        self._median[k] = median(self._times[k])

    def _count_tokens(self, k: int, rows: list[tuple[int, int]]) -> None:
        """Count draft tokens and accepted tokens by position, after multiplying older counts by
        DECAY. A draft token after a rejected one is not counted: it tells nothing. k, rows: see
        update."""
        self._rows_live = DECAY * self._rows_live + len(rows)
        self._rows_drafted = DECAY * self._rows_drafted + sum(drafted > 0 for drafted, _ in rows)
        for n in range(k):
            reached = [accepted for drafted, accepted in rows if drafted > n and accepted >= n]
            self._drafted[n] = DECAY * self._drafted[n] + len(reached)
            self._accepted[n] = DECAY * self._accepted[n] + sum(a > n for a in reached)

    def _update_budget(self, k: int, rows: list[tuple[int, int]], seconds: float) -> None:
        """Change the budget, which is in plain steps, after a cycle.

        Every cycle adds BUDGET_SHARE of its time. A cycle with draft tokens also adds its gain
        over plain decoding: its new tokens per row, minus its time in plain steps. The gain is
        negative for a loss. seconds: the median of this k, or the cycle's own time if it was not
        timed. k, rows: see update.
        """
        # In plain steps; 1 until a plain step is timed.
        steps = seconds / self._median.get(0, seconds)
        if self._cycles_of[k] <= self._untimed_cycles:
            steps = min(steps, 1 + k)  # do not charge the one-time recording of a CUDA graph
        self._budget += BUDGET_SHARE * steps
        if k:
            self._budget += 1 + sum(accepted for _, accepted in rows) / len(rows) - steps


class DraftStats:
    """Counts and times of all cycles, for the lines printed at the end of a run."""

    def __init__(self):
        # cycles: those with draft tokens. tokens: new tokens of these cycles, of all rows.
        self.cycles = self.tokens = self.plain_steps = 0
        # For each position n: how often a row had a draft token n, and how often it accepted it. A
        # draft token after a rejected one counts, too.
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self.seconds = 0.0  # of all cycles, plain steps included
        self.plain_seconds = 0.0  # estimate: plain decoding of the tokens of all these cycles

    def add(self, k: int, rows: list[tuple[int, int]], seconds: float, plain_step: float) -> None:
        """Add a cycle of k draft tokens (0: a plain step) to the counts.

        rows: the numbers of draft and of accepted tokens of each live row; at least one row.
        seconds: of this cycle. plain_step: seconds of a plain step. Plain decoding of the same
        tokens would take as many plain steps as the cycle's new tokens per row.
        """
        self.seconds += seconds
        self.plain_seconds += plain_step * (1 + sum(accepted for _, accepted in rows) / len(rows))
        self.plain_steps += k == 0
        self.cycles += k > 0
        new_positions = k - len(self.drafted)  # [0] * a negative number is []
        self.drafted += [0] * new_positions
        self.accepted += [0] * new_positions
        for drafted, accepted in rows:
            self.tokens += (1 + accepted) * (k > 0)
            for n in range(drafted):
                self.drafted[n] += 1
                self.accepted[n] += accepted > n

    @property
    def speed_up(self) -> float:
        """Return how many times as fast as plain decoding this run was, by the times of its plain
        steps. 1e-9: before any cycle, no division by 0."""
        return self.plain_seconds / max(self.seconds, 1e-9)

    def lines(self) -> Iterator[str]:
        """Yield the lines that are printed for the user at the end of a run. Without a cycle with
        draft tokens, it is one line."""
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

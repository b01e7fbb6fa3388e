"""Draws the next token from logits.

Start at Sampler. Logits processors (text/processors.py) change the logits; `candidates` applies
temperature, top-k, top-p and min-p and returns probabilities; `draw` draws one id.

The noise of a row's n-th new token depends only on the seed, the number of the row's random stream
and n. So a row's text does not depend on the other rows of its batch, on the batch size, on
compilation, or on a draft (speculate.py).

Sources: nucleus sampling (arXiv 1904.09751), min-p (2407.01082); the order of the filters is that
of transformers. `draw` is the Gumbel-max trick; a draft and its model share noise as in 2408.07978.
The noise is a hash by SplitMix64's mixing function.

The n-th number of a random stream is the noise key of its row's n-th new token: an int64. A hash of
the key and an id of the vocabulary is that id's noise. The number of a token counts the new tokens
of its row from 0. A draft is a model or a rule that proposes tokens; the verify pass is the
model's call that checks them.

Shapes: B rows, T positions drawn at once, V vocab, K candidates of a position.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from text.generation_config import GenerationConfig

if TYPE_CHECKING:
    from text.processors import LogitsProcessors

# SplitMix64's increment, and the shifts and factors of its mixing function.
# 2**64 is subtracted to write an unsigned number as int64.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
# Replaces a drawn id if the highest logit is NaN or infinite; engine.Batch then raises an error.
NOT_FINITE = -1


class Logprobs(NamedTuple):
    """Log-probabilities (natural logarithm) of a drawn token and of the likeliest tokens.

    They are the log-softmax of the model's logits, before penalties, temperature and filters.
    """

    logprob: float
    top: list[tuple[int, float]]  # ids and log-probabilities, the likeliest first


class ScoredId(int):
    """A drawn token's id, with its Logprobs as an attribute. It is an int, so code that handles ids
    needs no other case for it."""

    logprobs: Logprobs

    def __new__(cls, token: int, logprobs: Logprobs):
        scored = super().__new__(cls, token)
        scored.logprobs = logprobs
        return scored


class Sampler:
    """Draws tokens for the rows of one batch.

    streams: the number of each row's random stream. processors: change the logits before the draw;
    None: nothing changes them. device: of the logits. The constructor makes the noise keys of all
    tokens, so that no step waits for the host.
    """

    def __init__(
        self,
        config: GenerationConfig,
        streams: Sequence[int],
        device: torch.device,
        processors: "LogitsProcessors | None" = None,
    ):
        self.config, self.processors = config, processors
        # numpy, because torch's CPU generator takes only 32 bits of a seed. A row's keys do not
        # depend on max_new_tokens: fewer keys are the first ones of more.
        generators = [np.random.default_rng((config.seed, stream)) for stream in streams]
        keys = [each.integers(-(2**63), 2**63, config.max_new_tokens) for each in generators]
        self.noise_keys = torch.from_numpy(np.stack(keys)).to(device)  # (B, max_new_tokens)
        # Of the latest draw: the highest logits, (B, T), and, with config.logprobs, the three
        # tensors of token_logprobs.
        self.max_logits = torch.empty(0)
        self.logprobs: tuple[Tensor, ...] = ()

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Draw one token from each position's logits: (B, T, V), (B, T) -> (B, T).

        numbers: each token's number in its row, 0 for the first new token. Numbers from
        max_new_tokens on use the last noise key; callers discard these tokens. Also gives the
        tokens to the processors, and stores the highest logits and the log-probabilities, which
        copy_to_host_async reads.
        """
        changed = self.processors(logits, numbers) if self.processors else logits
        if self.config.greedy:
            self.max_logits, tokens = changed.max(-1)  # max: in bfloat16 4 times as fast as argmax
        else:
            last = self.noise_keys.shape[1] - 1
            keys = self.noise_keys.gather(1, numbers.clamp_max(last))  # (B, T)
            ids, probabilities, self.max_logits = candidates(changed, self.config)
            tokens = draw(ids, probabilities, keys)
        if self.processors:
            self.processors.write(tokens, numbers)
        if self.config.logprobs is not None:
            self.logprobs = token_logprobs(logits, tokens, self.config.logprobs)
        return tokens

    def record(self, tokens: Tensor, numbers: Tensor) -> None:
        """Give tokens that this Sampler did not draw, such as draft tokens, to the processors.

        The processors count them as text for tokens of later numbers; call it before those are
        drawn. tokens: (B, T) ids. numbers: (B, T), as in __call__.
        """
        if self.processors:
            self.processors.write(tokens, numbers)

    def copy_to_host_async(self, tokens: Tensor) -> Callable[[], list[list[int]]]:
        """Start to copy `tokens`, the ids of the latest draw, (B, T), to the host.

        Returns a function that waits for this copy only, not for later work on the device, and
        returns the ids as to_host does. Call copy_to_host_async before the next draw, which
        replaces max_logits and logprobs.
        """
        drawn = tokens, self.max_logits, *self.logprobs
        if tokens.device.type != "cuda":
            return lambda: to_host(*drawn)
        on_host = [tensor.to("cpu", non_blocking=True) for tensor in drawn]
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[list[int]]:
            copied.synchronize()
            return to_host(*on_host)

        return wait

    def select_rows(self, rows: Tensor) -> "Sampler":
        """Return a Sampler for some of the rows, which draws the tokens that this one would.

        decoding.py calls it for a micro-batch, and when other rows have ended. rows: indices of the
        rows in this Sampler, 1-D, on the device. The new Sampler has its own processors, so the
        processors of this one miss the tokens that the new one draws.
        """
        selected = copy.copy(self)
        selected.noise_keys = self.noise_keys[rows]
        selected.processors = self.processors and self.processors.part(rows)
        return selected


def to_host(tokens: Tensor, max_logits: Tensor, *logprobs: Tensor) -> list[list[int]]:
    """Return drawn ids, `tokens`, (B, T), as a list for each row.

    max_logits: (B, T), the highest logit at each position; NOT_FINITE replaces an id if it is NaN
    or infinite. logprobs: no tensor, or the three tensors of token_logprobs; then the ids are
    ScoredIds. The caller waits for copies from a GPU before this call.
    """
    ids = tokens.tolist()
    if logprobs:
        add_logprobs(ids, *logprobs)
    for row, row_max_logits in zip(ids, max_logits.tolist(), strict=True):
        for t, max_logit in enumerate(row_max_logits):
            if not math.isfinite(max_logit):
                row[t] = NOT_FINITE
    return ids


def add_logprobs(
    ids: list[list[int]], logprobs: Tensor, top_logprobs: Tensor, top_ids: Tensor
) -> None:
    """Replace ids, B lists of T, by ScoredIds, in place. The three tensors, on the host, are those
    that token_logprobs returns for these ids."""
    logprobs, top_logprobs, top_ids = logprobs.tolist(), top_logprobs.tolist(), top_ids.tolist()
    for b, row in enumerate(ids):
        for t, token in enumerate(row):
            top = list(zip(top_ids[b][t], top_logprobs[b][t], strict=True))
            row[t] = ScoredId(token, Logprobs(logprobs[b][t], top))


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors for GenerationConfig.logprobs: the log-probabilities of the drawn
    tokens, (B, T); those of the `count` likeliest tokens, (B, T, count), the likeliest first; and
    the ids of the likeliest tokens, (B, T, count). logits: (B, T, V). tokens: (B, T)."""
    logprobs = logits.float().log_softmax(-1)  # (B, T, V)
    top = logprobs.topk(count)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), top.values, top.indices


def candidates(logits: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Apply temperature, top-k, top-p and min-p to logits, (..., V).

    Returns the candidates' ids, (..., K); their probabilities, (..., K), float32, 0 for ids that
    top-p or min-p removes; and the highest logits, (...), before the temperature. K is
    config.top_k; without top-k it is V, and at temperature 0 (config.greedy) it is 1. top-p and
    min-p see the probabilities after temperature and top-k. The likeliest token always has a
    probability above 0.
    """
    V, logits = logits.shape[-1], logits.float()
    K = 1 if config.greedy else min(config.top_k or V, V)
    if K < V or config.top_p < 1:
        logits, ids = logits.topk(K)  # sorted, the highest first, as top-p needs them
        max_logits = logits[..., :1]
    else:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
        max_logits = logits.amax(-1, keepdim=True)  # (..., 1)
    if not config.greedy:
        logits = (logits - max_logits) / config.temperature  # at most 0: cannot overflow
    probabilities = logits.softmax(-1)  # (..., K)
    if config.top_p < 1:
        # The sum of the probabilities of all likelier tokens: 0 for the first, which always stays.
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= config.top_p, 0.0)
    if config.min_p > 0:
        threshold = config.min_p * probabilities.amax(-1, keepdim=True)  # (..., 1)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    return ids, probabilities / probabilities.sum(-1, keepdim=True), max_logits.squeeze(-1)


def draw(ids: Tensor, probabilities: Tensor, keys: Tensor) -> Tensor:
    """Draw one id in proportion to the probabilities: (..., K), (..., K), (...) -> (...).

    ids, probabilities: of `candidates`. keys: the noise keys, int64. Each id's exponential variable
    is divided by its probability; the id with the smallest quotient is drawn. This is exact
    sampling: of exponential variables, each is the smallest in proportion to its rate. A draft and
    its model that draw with the same key draw the same id nearly as often as any method that keeps
    their distributions can.
    """
    # (..., K); infinite where the probability is 0
    scaled = exponentials(keys.unsqueeze(-1), ids).div_(probabilities)
    return ids.gather(-1, scaled.argmin(-1, keepdim=True)).squeeze(-1)


def exponentials(keys: Tensor, ids: Tensor) -> Tensor:
    """Return an exponential variable (of mean 1), float32 and above 0, for each id, from a hash of
    its key and the id. ids: int64, any shape, not changed; keys: int64, broadcast to that shape."""
    x = (ids + 1).mul_(GOLDEN).add_(keys)  # int64, which wraps around; ids + 1 is a copy
    # >> copies the sign bit of an int64; the mask removes these copies.
    for shift, factor in MIXING:
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    # u is uniform in (0, 1); the limits exclude 0 and 1, whose results would be 0 and infinity.
    # -log1p(-u) is accurate for small u; -log(1 - u) would lose digits.
    u = x.bitwise_and_(2**63 - 1).float().mul_(2.0**-63).clamp_(2.0**-63, 1 - 2.0**-24)
    return u.neg_().log1p_().neg_()

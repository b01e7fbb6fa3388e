"""From logits to the next token: what may be drawn, and the draw.

Start at Sampler. It joins two halves: `candidates` gives the tokens that the GenerationConfig
allows and their probabilities, `draw` lets a race among them decide. What changes the logits before
that is in processors.py.

The n-th token of a row is drawn by noise that depends on the seed, the row's number and n alone:
its text does not depend on which rows share its batch, on the batch's size, on compilation, or on
whether a draft guessed it (speculate.py).

Sources: nucleus sampling (arXiv 1904.09751), min-p (2407.01082); the order in which filters
apply (temperature, top-k, top-p, min-p) is that of transformers. The race is the Gumbel-max trick;
that a draft and its model share its noise is from 2408.07978. The noise is SplitMix64's.
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

# SplitMix64: its step from one number to the next, and the shifts and factors that mix its bits.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
NOT_FINITE = -1  # on the host, in place of an id: the likeliest token's logit was no finite number


class Logprobs(NamedTuple):
    """Natural logarithms of a token's probability, and of the likeliest tokens' ones: the softmax
    of the model's own logits, before penalties, temperature and filters."""

    logprob: float
    top: list[tuple[int, float]]  # ids and log-probabilities, the likeliest first


class ScoredId(int):
    """The id of a token that was drawn, with its Logprobs: so they go wherever the id goes."""

    logprobs: Logprobs

    def __new__(cls, token: int, logprobs: Logprobs):
        scored = super().__new__(cls, token)
        scored.logprobs = logprobs
        return scored


class Sampler:
    """Draws tokens for the rows of one batch.

    rows: the number of each row's random stream. The keys of a row's noise are all drawn up front,
    so that no step waits for the host. processors: what changes the logits, if anything does.
    """

    def __init__(
        self,
        config: GenerationConfig,
        rows: Sequence[int],
        device: torch.device,
        processors: "LogitsProcessors | None" = None,
    ):
        self.config, self.processors = config, processors
        # numpy's streams, as torch's CPU generator takes no more than 32 bits of a seed. A shorter
        # stream is the beginning of a longer one.
        streams = [np.random.default_rng((config.seed, row)) for row in rows]
        keys = [stream.integers(-(2**63), 2**63, config.max_new_tokens) for stream in streams]
        self.keys = torch.from_numpy(np.stack(keys)).to(device)  # (B, max_new_tokens)
        # Of the latest draw: the highest logits, (B, T), and what there is to report of the tokens.
        self.peaks = torch.empty(0)
        self.scores: tuple[Tensor, ...] = ()

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """The tokens of those numbers in their row, 0 for the first: (B, T, V), (B, T) -> (B, T).

        A token beyond max_new_tokens is drawn like the last.
        """
        changed = self.processors(logits, numbers) if self.processors else logits
        if self.config.greedy:
            self.peaks, tokens = changed.max(dim=-1)  # in bfloat16 four times as fast as argmax
        else:
            keys = self.keys.gather(1, numbers.clamp_max(self.keys.shape[1] - 1))  # (B, T)
            ids, probabilities, self.peaks = candidates(changed, self.config)
            tokens = draw(ids, probabilities, keys)
        if self.processors:
            self.processors.write(tokens, numbers)
        if self.config.logprobs is not None:
            self.scores = scores(logits, tokens, self.config.logprobs)
        return tokens

    def record_draft(self, guesses: Tensor, numbers: Tensor) -> None:
        """Tokens of later numbers are to be drawn as if these, (B, T), had been drawn before."""
        if self.processors:
            self.processors.write(guesses, numbers)

    def copy_to_host_async(self, tokens: Tensor) -> Callable[[], list[list[int]]]:
        """Start copying the ids of the latest draw, (B, T), to the host. The call returned waits
        for them alone, not for work that was queued on the device after them. It gives NOT_FINITE
        in place of an id whose highest logit is NaN or infinite, and ScoredIds where
        config.logprobs asks for them.
        """
        host = tokens, self.peaks, *self.scores
        if tokens.device.type != "cuda":
            return lambda: to_host(*host)
        host = [tensor.to("cpu", non_blocking=True) for tensor in host]
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[list[int]]:
            copied.synchronize()
            return to_host(*host)

        return read

    def select_rows(self, rows: Tensor) -> "Sampler":
        """The same draws, of some rows, (B,)."""
        part = copy.copy(self)
        part.keys = self.keys[rows]
        part.processors = self.processors and self.processors.part(rows)
        return part


def to_host(tokens: Tensor, peaks: Tensor, *scores: Tensor) -> list[list[int]]:
    """Ids as the host sees them, (B, T); see Sampler.copy_to_host_async."""
    ids = tokens.tolist()
    if scores:
        logprobs, top_logprobs, top_ids = (tensor.tolist() for tensor in scores)
        for b, row in enumerate(ids):
            for t, token in enumerate(row):
                top = list(zip(top_ids[b][t], top_logprobs[b][t], strict=True))
                row[t] = ScoredId(token, Logprobs(logprobs[b][t], top))
    for row, heights in zip(ids, peaks.tolist(), strict=True):
        for t, height in enumerate(heights):
            if not math.isfinite(height):
                row[t] = NOT_FINITE
    return ids


def scores(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens, (B, T), and of the `count` likeliest, with their ids:
    (B, T, V) -> (B, T), (B, T, count), (B, T, count)."""
    logprobs = logits.float().log_softmax(-1)  # (B, T, V)
    top = logprobs.topk(count)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), top.values, top.indices


def candidates(logits: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What may be drawn, with which probability, and the highest logit:
    (..., V) -> ids and float32, (..., K) each, and (...).

    The likeliest token always may. A temperature of 0 leaves no other.
    """
    V, logits = logits.shape[-1], logits.float()
    K = 1 if config.greedy else min(config.top_k or V, V)
    if K < V or config.top_p < 1:
        logits, ids = logits.topk(K)  # the likeliest first
        peaks = logits[..., :1]
    else:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
        peaks = logits.amax(-1, keepdim=True)  # (..., 1)
    if not config.greedy:
        logits = (logits - peaks) / config.temperature  # at most 0: nothing overflows
    probabilities = logits.softmax(-1)  # (..., K)
    if config.top_p < 1:
        likelier = probabilities.cumsum(-1) - probabilities  # the mass before each; first: 0
        probabilities = probabilities.masked_fill(likelier >= config.top_p, 0.0)
    if config.min_p > 0:
        least = config.min_p * probabilities.amax(-1, keepdim=True)  # (..., 1)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return ids, probabilities / probabilities.sum(-1, keepdim=True), peaks.squeeze(-1)


def draw(ids: Tensor, probabilities: Tensor, keys: Tensor) -> Tensor:
    """One id of each row, with its probability: (..., K), (..., K), (...) -> (...).

    A race: each id arrives after an exponential time at the rate of its probability. Two models
    that draw by the same key choose the same id as often as their distributions nearly allow.
    """
    arrivals = exponentials(keys.unsqueeze(-1), ids).div_(probabilities)  # (..., K), inf at 0
    return ids.gather(-1, arrivals.argmin(-1, keepdim=True)).squeeze(-1)


def exponentials(keys: Tensor, ids: Tensor) -> Tensor:
    """An exponential variable, float32 and above 0, for each pair of a key and an id."""
    x = (ids + 1).mul_(GOLDEN).add_(keys)  # of 64 bits; what is beyond them is dropped
    for shift, factor in MIXING:
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    # 63 bits; as 1 - u rounds to few digits near 1, the small arrival times come from small u.
    u = x.bitwise_and_(2**63 - 1).float().mul_(2.0**-63).clamp_(2.0**-63, 1 - 2.0**-24)
    return u.neg_().log1p_().neg_()

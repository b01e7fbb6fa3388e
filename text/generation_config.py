"""GenerationConfig: how to continue a prompt, with the only place of the defaults.

Start at GenerationConfig; VALIDATORS holds the type and the range of each field. Nothing here
imports torch, so that the commands parse their options without it.

Source: repetition_penalty as in transformers (arXiv 1909.05858); frequency_penalty,
presence_penalty and logit_bias as in OpenAI's interface and vLLM; logprobs as vLLM's "raw"
logprobs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

MIN_TEMPERATURE = 1e-5  # below, sampling is greedy, as in vLLM: float32 would overflow
MAX_PENALTY = 1e3  # and 1 / MAX_PENALTY is the least: logits stay finite in float32
MAX_LOGIT_BIAS = 1e9  # acts as infinity, and stays finite in float32
MAX_LOGPROBS = 1000  # for each token; each of them is a Python object


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError for a value of the wrong type or range.

    stop also takes one string, and logit_bias a dict.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: greedy, always the most likely token
    top_k: int = 200  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the most likely tokens whose probabilities add up to this
    min_p: float = 0.0  # drop tokens below min_p times the probability of the most likely one
    repetition_penalty: float = 1.0  # divides positive logits of seen ids, multiplies others
    frequency_penalty: float = 0.0  # subtracted from a logit for each generated occurrence
    presence_penalty: float = 0.0  # subtracted from the logit of each generated id
    logit_bias: tuple[tuple[int, float], ...] = ()  # pairs (id, value added to its logit)
    seed: int = 0
    stop: tuple[str, ...] = ()  # a text ends before the first of these strings
    ignore_eos: bool = False
    logprobs: int | None = None  # also report this many most likely ids; None: report no logprobs

    def __post_init__(self):
        for name, (convert, wanted) in VALIDATORS.items():
            given = getattr(self, name)
            try:
                value = convert(given)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name} is {given!r} and must be {wanted}") from error
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits before temperature and filters."""
        penalties = self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty
        return any(penalties) or bool(self.logit_bias)


def integer(least: int, most: float = math.inf) -> Callable[[Any], int]:
    """Return a converter that accepts integers from `least` to `most`; others raise an error."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError
        if not least <= value <= most:
            raise ValueError
        return int(value)

    return convert


def number(allowed: Callable[[float], bool] = lambda value: True) -> Callable[[Any], float]:
    """Return a converter that accepts finite numbers that are `allowed`; others raise an error."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        value = float(value)
        if not math.isfinite(value) or not allowed(value):
            raise ValueError
        return value

    return convert


def stop_strings(value: str | Iterable[str]) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in value):
        raise TypeError
    return value


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def logit_biases(value: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[Any, ...]:
    token_id, bias = integer(0), number(lambda bias: abs(bias) <= MAX_LOGIT_BIAS)
    return tuple((token_id(token), bias(added)) for token, added in dict(value).items())


def logprob_count(value: Any) -> int | None:
    return None if value is None else integer(0, MAX_LOGPROBS)(value)


# For each field a function that checks and converts its value, and the error message's "must be".
VALIDATORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "max_new_tokens": (integer(1), "a whole number, at least 1"),
    "temperature": (number(lambda value: value >= 0), "a number, 0 or more"),
    "top_k": (integer(0), "a whole number, 0 (no limit) or more"),
    "top_p": (number(lambda value: 0 < value <= 1), "a number above 0 and at most 1"),
    "min_p": (number(lambda value: 0 <= value <= 1), "a number from 0 to 1"),
    "repetition_penalty": (
        number(lambda value: 1 / MAX_PENALTY <= value <= MAX_PENALTY),
        f"a number from {1 / MAX_PENALTY:g} to {MAX_PENALTY:g} (1: no penalty)",
    ),
    "frequency_penalty": (
        number(lambda value: abs(value) <= MAX_PENALTY),
        f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g} (0: no penalty)",
    ),
    "presence_penalty": (
        number(lambda value: abs(value) <= MAX_PENALTY),
        f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g} (0: no penalty)",
    ),
    "logit_bias": (logit_biases, f"numbers up to {MAX_LOGIT_BIAS:g} by token id"),
    "seed": (integer(0), "a whole number, 0 or more"),
    "stop": (stop_strings, "a string, or several, none of them empty"),
    "ignore_eos": (boolean, "True or False"),
    "logprobs": (logprob_count, f"None or a whole number from 0 to {MAX_LOGPROBS}"),
}

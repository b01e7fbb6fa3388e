"""How to continue a prompt: the one source of defaults for everything that generates.

Start at GenerationConfig; VALIDATORS says what each of its fields may be. Nothing here imports torch, so
that the commands can read their options before they load it.

Definitions: repetition_penalty as in transformers (arXiv 1909.05858), the other two penalties and
logit_bias as in OpenAI's interface and vLLM, logprobs as vLLM's "raw" ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

COLDEST = 1e-5  # a lower temperature is 0, as in vLLM: float32 would overflow
STRONGEST = 1e3  # repetition_penalty, and 1 / it at least: logits stay finite in float32
MAX_LOGIT_BIAS = 1e9  # of a logit: as good as infinite, and finite in float32
MOST_LOGPROBS = 1000  # of one token; each is a Python object on the host


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError for a value of a wrong type or range.

    stop may be given as one string, logit_bias as a dict.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 200  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    min_p: float = 0.0  # drop what is less than min_p times as likely as the likeliest
    repetition_penalty: float = 1.0  # of ids in the text: divides logits above 0, multiplies others
    frequency_penalty: float = 0.0  # subtracted for each time that an id was generated
    presence_penalty: float = 0.0  # subtracted if an id was generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # pairs of an id and what its logit is raised by
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end a text and are not part of it
    ignore_eos: bool = False
    logprobs: int | None = None  # of each token and of so many likeliest ones; None: not reported

    def __post_init__(self):
        for name, (convert, wanted) in VALIDATORS.items():
            given = getattr(self, name)
            try:
                value = convert(given)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name} is {given!r} and must be {wanted}") from error
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the filters stands between the model's logits and the draw."""
        penalties = self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty
        return any(penalties) or bool(self.logit_bias)


def whole(least: int, most: float = math.inf) -> Callable[[Any], int]:
    """A converter that takes whole numbers from `least` to `most` and raises for all else."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError
        if not least <= value <= most:
            raise ValueError
        return int(value)

    return convert


def real(allowed: Callable[[float], bool] = lambda value: True) -> Callable[[Any], float]:
    """A converter that takes finite numbers for which `allowed` holds and raises for all else."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        value = float(value)
        if not math.isfinite(value) or not allowed(value):
            raise ValueError
        return value

    return convert


def strings(value: str | Iterable[str]) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in value):
        raise TypeError
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def biases(value: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[Any, ...]:
    token_id, bias = whole(0), real(lambda bias: abs(bias) <= MAX_LOGIT_BIAS)
    return tuple((token_id(token), bias(added)) for token, added in dict(value).items())


def count_or_none(value: Any) -> int | None:
    return None if value is None else whole(0, MOST_LOGPROBS)(value)


# Of each field, what checks and converts a value, and what the message asks for.
VALIDATORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "max_new_tokens": (whole(1), "a whole number, at least 1"),
    "temperature": (real(lambda value: value >= 0), "a number, 0 or more"),
    "top_k": (whole(0), "a whole number, 0 (no limit) or more"),
    "top_p": (real(lambda value: 0 < value <= 1), "a number above 0 and at most 1"),
    "min_p": (real(lambda value: 0 <= value <= 1), "a number from 0 to 1"),
    "repetition_penalty": (
        real(lambda value: 1 / STRONGEST <= value <= STRONGEST),
        f"a number from {1 / STRONGEST:g} to {STRONGEST:g} (1: no penalty)",
    ),
    "frequency_penalty": (
        real(lambda value: abs(value) <= STRONGEST),
        f"a number from -{STRONGEST:g} to {STRONGEST:g} (0: no penalty)",
    ),
    "presence_penalty": (
        real(lambda value: abs(value) <= STRONGEST),
        f"a number from -{STRONGEST:g} to {STRONGEST:g} (0: no penalty)",
    ),
    "logit_bias": (biases, f"numbers up to {MAX_LOGIT_BIAS:g} by token id"),
    "seed": (whole(0), "a whole number, 0 or more"),
    "stop": (strings, "a string, or several, none of them empty"),
    "ignore_eos": (flag, "True or False"),
    "logprobs": (count_or_none, f"None or a whole number from 0 to {MOST_LOGPROBS}"),
}

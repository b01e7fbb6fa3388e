"""GenerationConfig: how to continue a prompt, and its defaults, which stand nowhere else.

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

MIN_TEMPERATURE = 1e-5  # a lower one means greedy, as in vLLM: logits / it could overflow float32
MAX_PENALTY = 1e3  # repetition: 1 / MAX_PENALTY to MAX_PENALTY, so that logits stay finite
MAX_LOGIT_BIAS = 1e9  # larger than any logit, and still finite in float32
MAX_LOGPROBS = 1000  # limit for each token, because each logprob is a Python object


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError for a value of the wrong type or range.

    stop may also be given as a str, and logit_bias as a dict: __post_init__ converts them to
    tuples.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: greedy, always the most likely token
    top_k: int = 200  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the most likely tokens whose probabilities add up to this
    min_p: float = 0.0  # drop tokens below min_p times the probability of the most likely one
    # positive logits of ids in prompt or new text are divided by it, negative ones multiplied
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # subtracted from a logit for each generated occurrence
    presence_penalty: float = 0.0  # subtracted from the logit of each generated id
    logit_bias: tuple[tuple[int, float], ...] = ()  # pairs (id, value added to its logit)
    seed: int = 0  # of the random streams of all rows
    stop: tuple[str, ...] = ()  # a text ends before the first of these strings
    ignore_eos: bool = False  # whether a text goes on after an EOS
    logprobs: int | None = None  # also report this many most likely ids; None: report no logprobs

    def __post_init__(self):
        """Check and convert each field by its validator in VALIDATORS. The dataclass calls this at
        the end of __init__. Raises ValueError, naming the field, its value and the values that are
        allowed."""
        for name, (convert, expected) in VALIDATORS.items():
            value = getattr(self, name)
            try:
                converted = convert(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name} is {value!r} and must be {expected}") from error
            object.__setattr__(self, name, converted)  # the dataclass is frozen

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and none is sampled."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits, so that LogitsProcessors are needed."""
        penalties = self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty
        return any(penalties) or bool(self.logit_bias)


def integer(minimum: int, maximum: float = math.inf) -> Callable[[Any], int]:
    """Return a validator (see VALIDATORS) for integers from minimum to maximum: it returns such a
    value as an int, and raises TypeError or ValueError for any other. A bool is not an integer
    here."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError
        if not minimum <= value <= maximum:
            raise ValueError
        return int(value)

    return convert


def number(allowed: Callable[[float], bool] = lambda value: True) -> Callable[[Any], float]:
    """Return a validator (see VALIDATORS) for finite numbers for which `allowed` is true: it
    returns such a value as a float, and raises TypeError or ValueError for any other. A bool is not
    a number here."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        value = float(value)
        if not math.isfinite(value) or not allowed(value):
            raise ValueError
        return value

    return convert


def stop_strings(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return a string, or several, as a tuple of strings: the validator of stop. Raises TypeError
    for an empty string and for other types."""
    value = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in value):
        raise TypeError
    return value


def boolean(value: Any) -> bool:
    """Return the value: the validator of a bool. Raises TypeError for other types, such as int."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def logit_biases(value: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[Any, ...]:
    """Return a dict id -> bias, or pairs (id, bias), as a tuple of pairs: the validator of
    logit_bias. Of several pairs with one id, the last counts. Raises TypeError or ValueError for
    ids below 0 and other types, and for a bias beyond MAX_LOGIT_BIAS."""
    check_id, check_bias = integer(0), number(lambda bias: abs(bias) <= MAX_LOGIT_BIAS)
    return tuple((check_id(token), check_bias(bias)) for token, bias in dict(value).items())


def logprob_count(value: Any) -> int | None:
    """Return None, or an integer from 0 to MAX_LOGPROBS: the validator of logprobs. Raises
    TypeError or ValueError for any other value."""
    return None if value is None else integer(0, MAX_LOGPROBS)(value)


# field -> (validator, the values that are allowed, as the error message names them)
# A validator returns the converted value of its field, or raises TypeError, ValueError or
# OverflowError for a wrong one: __post_init__ turns it into an error that names the field.
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

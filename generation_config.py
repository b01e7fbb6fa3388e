"""How to continue a prompt: the one source of defaults for everything that generates.

Start at GenerationConfig; RULES says which values each of its fields takes. Nothing here imports
torch, so that the commands can read their options before they load it.
"""

import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError for a value of a wrong type or outside its range.

    stop may also be one string or a list.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 200  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    min_p: float = 0.0  # drop what is less than min_p times as likely as the likeliest
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end a text and are not part of it
    ignore_eos: bool = False
    # Logits of tokens in prompt or answer: divided by this above 0, multiplied below (transformers)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # taken from a token's logit for each time it is in the answer
    presence_penalty: float = 0.0  # taken once from those of the tokens in the answer (OpenAI)
    logit_bias: dict[int, float] | None = field(default=None, hash=False)  # added to an id's logit
    logprobs: int | None = (
        None  # report log probabilities: of each chosen token and the N likeliest
    )

    def __post_init__(self):
        if isinstance(self.stop, (str, list)):
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            object.__setattr__(self, "stop", stop)
        for name in (f.name for f in fields(self)):
            holds, wanted = RULES[name]
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} is {reprlib.repr(value)} and must be {wanted}")


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Also false for NaN, and for integers that no float can hold."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_whole(token) and token >= 0 and is_finite(bias) and abs(bias) <= 1e9
        for token, bias in value.items()
    )


# For each field: the check, and its words. The penalties' and the bias's bounds keep float32 logits
# finite; those of frequency and presence are OpenAI's.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: is_whole(v) and v >= 1, "a whole number, at least 1"),
    "temperature": (lambda v: is_finite(v) and v >= 0, "a finite number, 0 or more"),
    "top_k": (lambda v: is_whole(v) and v >= 0, "a whole number, 0 (no limit) or more"),
    "top_p": (lambda v: is_finite(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda v: is_finite(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "seed": (lambda v: is_whole(v) and 0 <= v < 2**64, "a whole number from 0 to 2**64 - 1"),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "a string, or several, that are not empty",
    ),
    "ignore_eos": (lambda v: isinstance(v, bool), "True or False"),
    "repetition_penalty": (
        lambda v: is_finite(v) and 0.001 <= v <= 1000,
        "a number from 0.001 to 1000 (1: no penalty)",
    ),
    "frequency_penalty": (lambda v: is_finite(v) and abs(v) <= 2, "a number from -2 to 2"),
    "presence_penalty": (lambda v: is_finite(v) and abs(v) <= 2, "a number from -2 to 2"),
    "logit_bias": (
        lambda v: v is None or is_bias(v),
        "None, or numbers from -1e9 to 1e9 by token id: {1820: -100.0}",
    ),
    "logprobs": (
        lambda v: v is None or (is_whole(v) and v >= 0),
        "None, or a whole number, 0 or more",
    ),
}

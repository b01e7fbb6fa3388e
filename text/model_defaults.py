"""How the makers of a model want it sampled: the values of its generation_config.json.

Start at model_defaults. Where transformers and vLLM differ, the rule is: `"do_sample": false` means
the likeliest token always (transformers); without do_sample the values that are given are used
(vLLM; transformers would ignore them). Nothing here imports torch.
"""

import sys
from pathlib import Path
from typing import Any

from host.files import read_object, short
from text.generation_config import GenerationConfig

FILE = "generation_config.json"
KEYS = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"


def model_defaults(directory: Path) -> dict[str, float]:
    """Values for GenerationConfig by the name of the field, only those that the file determines.

    Without the file there are none. Raises ValueError naming the file and the key for a value that
    is of a wrong type or outside its range; null is the same as no value.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    config = {key: value for key, value in read_object(path).items() if value is not None}
    values = {key: checked(path, key, config[key]) for key in KEYS if key in config}
    do_sample = config.get("do_sample")
    if do_sample is True:
        return {"temperature": 1.0} | values  # the default of transformers and vLLM
    if do_sample is False:  # a penalty changes what is likeliest; the others do not
        penalty = {k: v for k, v in values.items() if k == "repetition_penalty"}
        return {"temperature": 0.0} | penalty
    if do_sample is not None:
        raise ValueError(f"{path}: do_sample is {do_sample!r} and must be true or false")
    return values


def checked(path: Path, key: str, value: Any) -> float:
    """The value of a key as the number that GenerationConfig takes; ValueError naming both."""
    kind = int if key == "top_k" else float
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= sys.float_info.max  # also NaN
        or kind(value) != value
    ):
        wanted = "a whole number" if kind is int else "a finite number"
        raise ValueError(f"{path}: {key} is {short(value)} and must be {wanted}")
    value = 0 if (key, value) == ("top_k", -1) else kind(value)  # -1: vLLM's word for all
    try:
        GenerationConfig(**{key: value})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return value


def defaults_line(values: dict[str, float], directory: Path) -> str:
    """What to say of the defaults that are used, those without an option of their own."""
    listed = ", ".join(f"{key} {value:g}" for key, value in values.items())
    return f"{listed}: from {directory / FILE}; options override"

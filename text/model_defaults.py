"""The sampling values that a model's authors chose, from its generation_config.json.

Start at model_defaults. Where transformers and vLLM differ: "do_sample": false means greedy, as in
transformers; without do_sample the file's values are used, as in vLLM. Nothing here imports torch.
"""

import sys
from pathlib import Path
from typing import Any

from host.files import read_object, short_json
from text.generation_config import GenerationConfig

FILE = "generation_config.json"
KEYS = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"


def model_defaults(directory: Path) -> dict[str, float]:
    """Return the values for GenerationConfig that a checkpoint's generation_config.json has, by the
    names of its fields; {} if the file does not exist.

    Only KEYS are read, and null counts as absent. "do_sample": false gives temperature 0 and the
    repetition penalty; true gives temperature 1 unless the file has another. Raises ValueError,
    naming the file and the key, for a value of the wrong type or range.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    config = {key: value for key, value in read_object(path).items() if value is not None}
    values = {key: checked(path, key, config[key]) for key in KEYS if key in config}
    do_sample = config.get("do_sample")
    if do_sample is True:
        return {"temperature": 1.0} | values  # the default of transformers and vLLM
    if do_sample is False:
        # Greedy: of the other values only the penalty changes which token is the most likely.
        penalty = {k: v for k, v in values.items() if k == "repetition_penalty"}
        return {"temperature": 0.0} | penalty
    if do_sample is not None:
        raise ValueError(f"{path}: do_sample is {do_sample!r} and must be true or false")
    return values


def checked(path: Path, key: str, value: Any) -> float:
    """Return the value of a key as a number that GenerationConfig accepts for this field. path: the
    file. Raises ValueError, naming the file and the key, for any other value. top_k -1 becomes 0:
    no limit."""
    kind = int if key == "top_k" else float
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= sys.float_info.max  # `not <=`, because > is false for NaN
        or kind(value) != value  # top_k with a fraction
    ):
        expected = "a whole number" if kind is int else "a finite number"
        raise ValueError(f"{path}: {key} is {short_json(value)} and must be {expected}")
    value = 0 if (key, value) == ("top_k", -1) else kind(value)  # vLLM's -1 means no limit
    try:
        GenerationConfig(**{key: value})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return value


def defaults_line(values: dict[str, float], directory: Path) -> str:
    """Return the log line that lists values of model_defaults and the file that they come from.
    directory: the checkpoint's."""
    listed = ", ".join(f"{key} {value:g}" for key, value in values.items())
    return f"{listed}: from {directory / FILE}; options override"

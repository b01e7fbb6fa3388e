"""The choices of a user as frozen dataclasses: the only place of their defaults."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CalibrationOptions:
    """Which texts GPTQ, training and the predictors of active neurons learn from."""

    file: Path | None = None  # a text file
    tasks: tuple[str, ...] = ()  # of lm_eval: their documents are the text
    seq_length: int = 2048  # tokens of a text
    samples: int = 128  # texts at most

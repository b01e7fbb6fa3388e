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


@dataclass(frozen=True)
class FlashOptions:
    """How a model's feed-forward neurons are left on disk.

    memory: for all its weights, a share of their bytes up to 1, else bytes. window: tokens whose
    neurons stay in memory. depth: reads in flight at a time. Both are chosen by cost if None.
    directory: of the pack; None: beside the checkpoint.
    """

    memory: float = 0.5
    window: float | None = None
    depth: int | None = None
    directory: Path | None = None


@dataclass(frozen=True)
class PredictorOptions:
    """How flash.py trains the predictors of active neurons."""

    rank: int | None = None  # None: by the model's width
    recall: float = 0.97  # share of active neurons to predict
    epochs: int = 4

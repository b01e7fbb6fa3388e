"""The Session that each mode of generate.py runs with, and the protocol of the modes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench import Stats
from decoding import LoadedModel
from host.log import log
from load import compile_now
from model import Cache, ModelArgs
from options.settings import ModelChoice
from text.generation_config import GenerationConfig
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Session:
    """A loaded model, how it continues texts, and the times of the run."""

    lm: LoadedModel
    config: GenerationConfig
    stats: Stats

    def compile(self, caches: Sequence[Cache]) -> None:
        """Compile and time it, for the shape of the caches, if the model is to be compiled."""
        if self.lm.any_rows:
            return
        log("compiling ...")
        start = time.perf_counter()
        compile_now(self.lm, caches)
        self.stats.compile_seconds = time.perf_counter() - start


class Mode(Protocol):
    """A mode of generate.py: it continues prompts, chats, or measures the speed of a model."""

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the number of prompt tokens of each text, for a plan. new: tokens that follow."""

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None:
        """Open output files. Called before the model is loaded. settings: options that change
        texts."""

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """Run the mode. batch_size: rows at a time; None: the mode's default. cache_length: the
        positions of the KV cache for which a plan has memory; None: no plan."""

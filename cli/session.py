"""What the modes of generate.py share: a loaded model, how it continues texts, and its times."""

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
    lm: LoadedModel
    config: GenerationConfig
    stats: Stats

    def compile(self, caches: Sequence[Cache]) -> None:
        """Compile for the shape of the caches, if the model is compiled, and time it."""
        if self.lm.any_rows:
            return
        log("compiling ...")
        start = time.perf_counter()
        compile_now(self.lm, caches)
        self.stats.compile_seconds = time.perf_counter() - start


class Mode(Protocol):
    """What generate.py does with a model: continue prompts, chat, or measure its speed."""

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Tokens of the prompt of each text, for a plan. new: tokens that follow each."""

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None:
        """Open files that are written to, before the model is loaded."""

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """batch_size: rows at a time; cache_length: positions of the KV cache that a plan has
        memory for. None: not limited."""

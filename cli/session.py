"""What the modes of generate.py share: a loaded model, sampling settings and statistics.

A plan says how an offloaded model is divided among device, host memory and disk (plan.py).

The modes are PromptMode, ChatMode and BenchMode; generation.py chooses one and calls it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench import Stats
from decoding import LoadedModel
from host.log import log
from layers.args import ModelArgs
from layers.kv_cache import Cache
from load import compile_now
from options.settings import ModelChoice
from text.generation_config import GenerationConfig
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Session:
    """A loaded model, the settings of sampling, and the statistics of this run."""

    lm: LoadedModel
    config: GenerationConfig
    stats: Stats

    def compile(self, caches: Sequence[Cache]) -> None:
        """Compile decoding for the shape of these caches, and record the seconds in `stats`.

        Each mode calls it once, before its first batch. Does nothing if the model is not compiled.
        """
        if self.lm.any_rows:  # only steps that are not compiled take any number of rows
            return
        log("compiling ...")
        start = time.perf_counter()
        compile_now(self.lm, caches)
        self.stats.compile_seconds = time.perf_counter() - start


class Mode(Protocol):
    """One of three uses of a model by generate.py: continue prompts, chat, or measure the speed.

    generation.py calls prompt_lengths (if it plans offloading), then open, then loads the model,
    then calls run.
    """

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the number of prompt tokens of each text, for a plan. tokenizer, args: of the
        model, whose weights are not loaded. new: the most tokens that are added to each."""

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None:
        """Open output files, if the mode has any, before the model is loaded. settings: name ->
        value of the options that the texts depend on."""

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """Use the loaded model: generate, chat or measure.

        batch_size: rows at a time; None: the mode chooses. cache_length: positions of the KV cache
        for which a plan has reserved memory; None: there is no plan.
        """

"""generate.py --bench: measures the speed of prefill and of decoding. Start at BenchMode.run.

Rows are the texts of a batch. The model's context is the largest length of prompt and new text.
"""

import json
from typing import Any

import bench
from cli.session import Session
from engine import complete
from layers.args import ModelArgs
from options.settings import ModelChoice
from text.tokenizer import Tokenizer

PROMPT_TOKENS = 512


class BenchMode:
    """A Mode (session.py) that times the prefill of random prompts and the decoding after them.

    prompt_tokens: the length of each prompt; None: PROMPT_TOKENS, but at most half of the context.
    rows: prompts in a batch. repeats: timed runs. about: more entries for the line of JSON (--json)
    that is printed; None: no such line.
    """

    def __init__(
        self, prompt_tokens: int | None, rows: int, repeats: int, about: dict[str, Any] | None
    ):
        self.prompt_tokens, self.rows, self.repeats = prompt_tokens, rows, repeats
        self.about = about

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the length of each prompt, for the planner of offloading. tokenizer, new: not
        used, because the prompts are random ids."""
        return [self._length(args.context - 1)] * self.rows

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None: ...

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """Time the model, and print the figures as JSON if `about` is not None.

        session: has the loaded model. batch_size: rows, by --batch_size or by an offloading plan;
        None: self.rows. cache_length: not used. Raises ValueError if the prompt and the new tokens
        exceed the context.
        """
        lm, config, stats = session.lm, session.config, session.stats
        context, rows = lm.model.args.context, batch_size or self.rows
        length = self._length(context)
        if length + config.max_new_tokens > context:
            raise ValueError(
                f"{length} and {config.max_new_tokens} tokens do not fit the model's context of "
                f"{context}: lower --prompt or --max_new_tokens"
            )
        caches = lm.make_caches(rows, length + config.max_new_tokens)
        session.compile(caches)
        figures = bench.measure(lm, complete, caches, config, length, self.repeats)
        if self.about is not None:
            times = {"load_s": stats.load_seconds, "compile_s": stats.compile_seconds}
            dtype = str(lm.model.tok_embeddings.weight.dtype).removeprefix("torch.")
            print(json.dumps(figures | self.about | {"dtype": dtype} | times))

    def _length(self, context: int) -> int:
        """Returns the length of each prompt, in tokens, for a model with this context."""
        return self.prompt_tokens or min(PROMPT_TOKENS, context // 2)

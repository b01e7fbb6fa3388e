"""A loaded model as EleutherAI's evaluation harness (lm_eval) knows models, and a run of its tasks.

Start at run_tasks. HarnessModel answers the three questions that tasks ask: how likely a text is
after another, how likely a whole text is, and what follows a text. Only eval.py --tasks imports
this file, as it needs lm_eval.

Ids are those that lm_eval's own Hugging Face backend makes with add_bos_token=True, so that the
figures can be compared; of a text for loglikelihood_rolling that backend then has BOS twice, and
this one once.
"""

import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_table, setup_logging
from tqdm import tqdm

from decoding import LoadedModel
from engine import complete
from evaluation.scoring import Ids, common, log_likelihoods
from text.completion import Completion
from text.generation_config import GenerationConfig

GENERATED = 256  # tokens at most, where a task says nothing; as lm_eval's own backends
ROWS = 16  # of a batch that is generated, where none are asked for
SETTINGS = {"temperature", "top_k", "top_p", "min_p", "seed"}  # of gen_kwargs, taken as they are
Request = tuple[Any, list[int], list[int]]  # what was asked, ids before, and ids that are scored


@dataclass(frozen=True)
class HarnessOptions:
    """What lm_eval is asked for, in its own words; task_data: a file for each local task."""

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    system: str | None = None
    gen_kwargs: str | None = None
    include_path: Path | None = None
    task_data: dict[str, str] | None = None
    log_samples: bool = False
    use_cache: str | None = None


class HarnessModel(TemplateLM):
    """lm_eval's view of a LoadedModel.

    batch_size: None: as many rows as are fast. max_length: ids that the model may read at once;
    what is longer loses its beginning. bos: whether every text begins with BOS.
    """

    def __init__(self, lm: LoadedModel, batch_size: int | None, max_length: int, bos: bool):
        super().__init__()
        self.lm, self.rows, self.max_length = lm, batch_size, max_length
        self._device, self._tokenizer = lm.device, lm.tokenizer
        self._bos = [lm.tokenizer.bos_id] if bos else []
        # lm_eval asks for a question's ids again with each of its answers.
        self._ids = lru_cache(64)(lambda text: lm.tokenizer.encode(text, bos=False, special=True))
        self.shortened = 0  # sequences that lost their beginning
        self.fused = 0  # texts that share their ids with those before them

    @property
    def eot_token_id(self) -> int:
        return next(iter(self._tokenizer.eos_ids), self._tokenizer.bos_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return f"gpt-flex-{self._tokenizer.vocab_size}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids; after BOS, once, unless add_special_tokens is False or the model runs without."""
        ids = self._ids(string)
        bos = [] if add_special_tokens is False or ids[:1] == self._bos else self._bos
        return [*bos, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and of what follows it: those of both together that are beyond the first.

        A tokenizer that merges across words may need no more ids for both: then those are scored
        that what follows changes. lm_eval's own backend stops there.
        """
        before, said = super()._encode_pair(context, continuation)
        if said:
            return before, said
        self.fused += 1
        whole = self.tok_encode(context + continuation)
        same = min(common(whole, before), len(whole) - 1)
        return whole[:same] or [self.prefix_token_id], whole[same:]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self._tokenizer.chat_text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        # The last message is an answer that the model is to go on with: nothing may close it.
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        for number, nats, greedy in self.score([r[1:] for r in requests], disable_tqdm):
            answers[number] = nats, greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of max_length, each with one id of the window before."""
        texts = [request.args[0] for request in requests]
        pairs: list[tuple[Ids, Ids]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = self.tok_encode(text, add_special_tokens=False)
            for before, said in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                pairs.append((before[: len(before) - len(said) + 1], said))
                owners.append(number)
        totals, left = [0.0] * len(texts), Counter(owners)
        for window, nats, _ in self.score(pairs, disable_tqdm):
            owner = owners[window]
            totals[owner] += nats
            left[owner] -= 1
            if not left[owner]:
                args = requests[owner].args
                self.cache_hook.add_partial("loglikelihood_rolling", args, totals[owner])
        return totals

    def score(self, pairs: Sequence[tuple[Ids, Ids]], quiet: bool) -> Iterator[Any]:
        """Results for ids that follow ids, with a bar.

        What is longer than the model can read loses its first ids, BOS too, as in lm_eval.
        """
        sequences = []
        for before, said in pairs:
            if not 0 < len(said) <= self.max_length:
                raise ValueError(
                    f"a text to be scored has {len(said)} tokens: it must have 1 to "
                    f"{self.max_length}, the model's context"
                )
            whole = [*before, *said][-(self.max_length + 1) :]
            self.shortened += len(whole) < len(before) + len(said)
            sequences.append((whole, len(whole) - len(said)))
        results = log_likelihoods(self.lm, sequences, self.rows)
        yield from tqdm(results, "score", len(sequences), disable=quiet, unit="text")

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to a stop string, EOS or the number of tokens asked for."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm, unit="text") as bar:
            for asked, numbers in groups.items():
                config = generation_config(json.loads(asked), self.max_length)
                room = self.max_length - config.max_new_tokens
                prompts = {n: self.tok_encode(requests[n].args[0]) for n in numbers}
                self.shortened += sum(len(ids) > room for ids in prompts.values())
                prompts = {n: ids[-room:] for n, ids in prompts.items()}
                for number, text in self.generated(prompts, config):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return texts

    def generated(
        self, prompts: dict[int, list[int]], config: GenerationConfig
    ) -> Iterator[tuple[int, str]]:
        """The text that follows each prompt, the longest prompts first."""
        numbers = sorted(prompts, key=lambda n: -len(prompts[n]))
        size = min(self.rows or ROWS, len(numbers))
        caches = self.lm.make_caches(size, len(prompts[numbers[0]]) + config.max_new_tokens)
        for first in range(0, len(numbers), size):
            rows = numbers[first : first + size]
            given = [prompts[n] for n in rows]
            done = complete(self.lm, given, config, rows=rows, caches=caches)
            for number, completion in zip(rows, done, strict=True):
                # Of the ids alone, as the harness has it: a first space may be lost.
                alone = Completion(self._tokenizer, [], config)
                text = alone.extend(completion.ids) + alone.close()
                yield number, postprocess_generated_text(text, list(config.stop), None)


def generation_config(gen_kwargs: dict[str, Any], max_length: int) -> GenerationConfig:
    """ValueError for what a task asks for and this program lacks."""
    asked = dict(normalize_gen_kwargs(gen_kwargs, GENERATED))
    count = asked.pop("max_gen_toks")
    if not 0 < count < max_length:
        raise ValueError(
            f"a task asks for {count} tokens and the model's context is {max_length}, which must "
            "hold prompt and answer: give --gen_kwargs max_gen_toks=N"
        )
    stop = tuple(text for text in asked.pop("until") if text)
    sampled = asked.pop("do_sample", False)
    if unknown := asked.keys() - SETTINGS:
        raise ValueError(f"gen_kwargs {', '.join(sorted(unknown))}: known are {sorted(SETTINGS)}")
    asked = {"top_k": 0, "temperature": 1.0} | asked if sampled else {"temperature": 0.0}
    return GenerationConfig(max_new_tokens=count, stop=stop, **asked)


def run_tasks(model: HarnessModel, options: HarnessOptions, manager: TaskManager) -> dict[str, Any]:
    """lm_eval's results of the tasks that find_tasks found."""
    with contextlib.redirect_stdout(sys.stderr):  # lm_eval prints now and then
        return lm_eval.simple_evaluate(
            model,
            tasks=list(options.tasks),
            task_manager=manager,
            batch_size=model.rows or "auto",
            device=str(model.device),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system,
            gen_kwargs=options.gen_kwargs,
            log_samples=options.log_samples,
            use_cache=options.use_cache,
        )


def find_tasks(options: HarnessOptions) -> TaskManager:
    """The tasks in include_path, and lm_eval's own where those are not all that is asked for.

    To look through lm_eval's 14,000 takes ten seconds. ValueError naming a task that there is not.
    """
    setup_logging(logging.ERROR)
    given = {"include_path": options.include_path, "metadata": {"task_data": options.task_data}}
    for defaults in (False, True):
        if defaults or options.include_path:
            manager = TaskManager(include_defaults=defaults, **given)
            unknown = [name for name in options.tasks if not manager.match_tasks([name])]
            if not unknown:
                return manager
    raise ValueError(
        f"there is no task {unknown[0]}: python -m lm_eval ls tasks lists those of lm_eval, and "
        "--include_path names a directory of others"
    )


def table(results: dict[str, Any]) -> str:
    """As lm_eval prints it."""
    columns = [column for column in ("results", "groups") if results.get(column)]
    return "\n".join(make_table(results, column) for column in columns)

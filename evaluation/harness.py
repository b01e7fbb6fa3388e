"""The adapter from a LoadedModel to EleutherAI's evaluation harness, lm_eval, and a run of tasks.

Start at run_tasks. HarnessModel implements lm_eval's three requests: loglikelihood of a
continuation, loglikelihood_rolling of a whole text, and generate_until. Only eval.py --tasks
imports this file, because it needs lm_eval. Some of lm_eval's terms: a request is one question to
the model, and request.args its arguments; gen_kwargs are a task's settings for generation, such as
until (stop strings) and max_gen_toks; lm_eval's cache (--use_cache, cache_hook in HarnessModel)
stores the answers of requests on disk.

Source: lm_eval's Hugging Face backend (lm_eval/models/huggingface.py). The ids are those of that
backend with add_bos_token=True, so that the figures can be compared, with one exception: for
loglikelihood_rolling that backend puts BOS twice, and this one once.
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
from evaluation.scoring import Ids, SequenceScore, common, log_likelihoods
from text.completion import Completion
from text.generation_config import GenerationConfig

DEFAULT_MAX_GEN_TOKS = 256  # for tasks without max_gen_toks, as in lm_eval's own backends
DEFAULT_GENERATION_BATCH_SIZE = 16  # rows
SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "seed"}  # keys of a task's gen_kwargs
# (lm_eval's key for its cache, the ids of the context, the ids of the continuation)
Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class HarnessOptions:
    """What run_tasks and find_tasks pass to lm_eval. None: as lm_eval or the task has it."""

    tasks: Sequence[str]  # names
    num_fewshot: int | None = None  # answered examples before each question
    limit: float | None = None  # documents of each task: a number or, below 1, a share; None: all
    apply_chat_template: bool = False
    system: str | None = None  # the system message of a chat
    gen_kwargs: str | None = None  # "key=value,...", changes of the tasks' settings
    include_path: Path | None = None  # a directory of tasks; None: lm_eval's own tasks only
    task_data: dict[str, str] | None = None  # the data file of each task of scripts/tasks
    log_samples: bool = False  # whether the results contain each document's answers
    use_cache: str | None = None  # the path of lm_eval's cache; None: no cache


class HarnessModel(TemplateLM):
    """A LoadedModel with the interface of an lm_eval model.

    batch_size: rows of one call of the model; None: chosen by the scorer, and
    DEFAULT_GENERATION_BATCH_SIZE for generation. max_length: tokens of a sequence; longer texts
    lose their beginning. bos: whether every text begins with BOS.
    """

    def __init__(self, lm: LoadedModel, batch_size: int | None, max_length: int, bos: bool):
        """Keep the arguments, and count shortened and fused texts from 0. bos=True needs a
        tokenizer with a BOS."""
        super().__init__()
        self.lm, self.rows, self.max_length = lm, batch_size, max_length
        self._device, self._tokenizer = lm.device, lm.tokenizer
        self._bos = [lm.tokenizer.bos_id] if bos else []
        # A cache, because lm_eval encodes a question again for each of its answers.
        self._ids = lru_cache(64)(lambda text: lm.tokenizer.encode(text, bos=False, special=True))
        self.shortened = 0  # number of texts that lost their beginning
        self.fused = 0  # number of continuations that add no id to the context: see _encode_pair

    @property
    def eot_token_id(self) -> int:
        """The id that for lm_eval ends a text: EOS, or BOS if there is no EOS."""
        return next(iter(self._tokenizer.eos_ids), self._tokenizer.bos_id)

    @property
    def prefix_token_id(self) -> int:
        """The id that lm_eval puts before a text without context: BOS, or EOS if there is no
        BOS."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A part of the key under which lm_eval stores the requests of a task on disk."""
        return f"gpt-flex-{self._tokenizer.vocab_size}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text.

        BOS is put before them, unless the text begins with it, add_special_tokens is False, or this
        HarnessModel was made with bos=False.
        """
        ids = self._ids(string)
        bos = [] if add_special_tokens is False or ids[:1] == self._bos else self._bos
        return [*bos, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of the context, and the further ids of context + continuation. Called by
        TemplateLM.loglikelihood for each request with a context.

        There may be no further ids if the tokenizer merges tokens across words. lm_eval's own
        backend then fails. This function then divides the ids of context + continuation after their
        common prefix with the context's ids, so that at least one id is scored, and counts the case
        in `fused`.
        """
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if continuation_ids:
            return context_ids, continuation_ids
        self.fused += 1
        whole = self.tok_encode(context + continuation)
        same = min(common(whole, context_ids), len(whole) - 1)
        # A context must not be empty: an id is predicted from the one before it.
        return whole[:same] or [self.prefix_token_id], whole[same:]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the checkpoint's chat template, or None unless lm_eval uses one. chat_template:
        whether it does; a template's name counts as True."""
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation in the checkpoint's chat template.

        chat_history: messages with "role" and "content". add_generation_prompt=False: the model
        continues the last message, so the text that the template writes after this message is cut
        off. Raises ValueError if the template does not write the content of this message as it is.
        """
        text = self._tokenizer.chat_text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        Called by TemplateLM.loglikelihood. Each result also goes to lm_eval's cache at once, so
        that an interrupted run keeps it.
        """
        answers: list[Any] = [None] * len(requests)
        for number, nats, greedy in self.score([r[1:] for r in requests], disable_tqdm):
            answers[number] = nats, greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text in nats, summed over its windows (see
        rolling_windows). request.args: (text,).

        The result of a text goes to lm_eval's cache when all its windows are scored.
        """
        totals = [0.0] * len(requests)
        pairs, owners = self.rolling_windows([request.args[0] for request in requests])
        remaining = Counter(owners)
        for window, nats, _ in self.score(pairs, disable_tqdm):
            owner = owners[window]
            totals[owner] += nats
            remaining[owner] -= 1
            if not remaining[owner]:
                args = requests[owner].args
                self.cache_hook.add_partial("loglikelihood_rolling", args, totals[owner])
        return totals

    def rolling_windows(self, texts: Sequence[str]) -> tuple[list[tuple[Ids, Ids]], list[int]]:
        """Divide texts into windows for loglikelihood_rolling. Return two lists with an entry for
        each window: its (context ids, scored ids), and the index of its text.

        A window scores max_length ids; the last window of a text scores the ids that remain. The
        context is the one id before the scored ids, in the first window BOS or EOS. If there are
        several windows, the last, shorter one has as much context as fills max_length.
        """
        pairs: list[tuple[Ids, Ids]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = self.tok_encode(text, add_special_tokens=False)
            for context, scored in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                # lm_eval's context also has the scored ids but the last one: cut them off.
                pairs.append((context[: len(context) - len(scored) + 1], scored))
                owners.append(number)
        return pairs, owners

    def score(self, pairs: Sequence[tuple[Ids, Ids]], quiet: bool) -> Iterator[SequenceScore]:
        """Yield the score of each continuation, given pairs (context ids, continuation ids).

        The scores come in another order than the pairs: SequenceScore.number is the pair's index. A
        context must not be empty. As in lm_eval, a pair that is too long loses its first ids, BOS
        included, and is counted in `shortened`. Raises ValueError for a continuation that is empty
        or longer than max_length. quiet: show no progress bar.
        """
        sequences = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a text to be scored has {len(continuation)} tokens: it must have 1 to "
                    f"{self.max_length}, the model's context"
                )
            # The last id is scored but not read, so max_length + 1 ids are possible.
            whole = [*context, *continuation][-(self.max_length + 1) :]
            self.shortened += len(whole) < len(context) + len(continuation)
            sequences.append((whole, len(whole) - len(continuation)))
        scores = log_likelihoods(self.lm, sequences, self.rows)
        yield from tqdm(scores, "score", len(sequences), disable=quiet, unit="text")

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each text, up to a stop string, EOS or max_gen_toks.

        request.args: (text, gen_kwargs). Requests with equal gen_kwargs are generated together. The
        continuations of a batch go to lm_eval's cache at once, so that an interrupted run keeps
        them.
        """
        groups: dict[str, list[int]] = {}  # gen_kwargs as JSON -> indices of its requests
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm, unit="text") as bar:
            for gen_kwargs, numbers in groups.items():
                config = generation_config(json.loads(gen_kwargs), self.max_length)
                prompts = {n: self.prompt_ids(requests[n].args[0], config) for n in numbers}
                for number, text in self.generated(prompts, config):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return texts

    def prompt_ids(self, text: str, config: GenerationConfig) -> list[int]:
        """Return the last ids of a prompt, as many as leave room for config.max_new_tokens in
        max_length. A prompt that loses its first ids is counted in `shortened`. max_new_tokens must
        be less than max_length: the function generation_config checks it."""
        ids, max_prompt = self.tok_encode(text), self.max_length - config.max_new_tokens
        self.shortened += len(ids) > max_prompt
        return ids[-max_prompt:]

    def generated(
        self, prompts: dict[int, list[int]], config: GenerationConfig
    ) -> Iterator[tuple[int, str]]:
        """Yield (number, continuation) for each prompt. prompts: number -> ids, not empty. The
        number also selects the random stream of the text.

        The longest prompts come first, so that a lack of memory shows at once and the prompts of a
        batch have similar lengths. All batches use the same KV caches.
        """
        numbers = sorted(prompts, key=lambda n: -len(prompts[n]))
        size = min(self.rows or DEFAULT_GENERATION_BATCH_SIZE, len(numbers))
        caches = self.lm.make_caches(size, len(prompts[numbers[0]]) + config.max_new_tokens)
        for first in range(0, len(numbers), size):
            rows = numbers[first : first + size]
            batch = [prompts[n] for n in rows]
            completions = complete(self.lm, batch, config, streams=rows, caches=caches)
            for number, completion in zip(rows, completions, strict=True):
                # As lm_eval: the new ids are decoded without the prompt, which may lose a space
                # before the first word.
                without_prompt = Completion(self._tokenizer, [], config)
                text = without_prompt.extend(completion.ids) + without_prompt.close()
                yield number, postprocess_generated_text(text, list(config.stop), None)


def generation_config(gen_kwargs: dict[str, Any], max_length: int) -> GenerationConfig:
    """Return the GenerationConfig for a task's gen_kwargs, with lm_eval's defaults: greedy, unless
    do_sample is true. max_length: tokens of prompt and answer together. Raises ValueError for an
    unsupported key or value, and if max_gen_toks is not less than max_length."""
    kwargs = dict(normalize_gen_kwargs(gen_kwargs, DEFAULT_MAX_GEN_TOKS))
    count = kwargs.pop("max_gen_toks")
    if not 0 < count < max_length:
        raise ValueError(
            f"a task asks for {count} tokens and the model's context is {max_length}, which must "
            "hold prompt and answer: give --gen_kwargs max_gen_toks=N"
        )
    stop = tuple(text for text in kwargs.pop("until") if text)
    do_sample = kwargs.pop("do_sample", False)
    if unknown := kwargs.keys() - SAMPLING_KEYS:
        raise ValueError(
            f"gen_kwargs {', '.join(sorted(unknown))}: known are {sorted(SAMPLING_KEYS)}"
        )
    sampling = {"top_k": 0, "temperature": 1.0} | kwargs if do_sample else {"temperature": 0.0}
    return GenerationConfig(max_new_tokens=count, stop=stop, **sampling)


def run_tasks(model: HarnessModel, options: HarnessOptions, manager: TaskManager) -> dict[str, Any]:
    """Run the tasks; return the dict of results of lm_eval.simple_evaluate. manager: from
    find_tasks. lm_eval's own output goes to stderr, because stdout carries only the figures."""
    with contextlib.redirect_stdout(sys.stderr):
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
    """Return lm_eval's TaskManager, which knows all tasks of the options.

    The directory options.include_path is searched first. lm_eval's own 14,000 tasks, which take ten
    seconds to list, are added only if a task is not there. Raises ValueError for an unknown task.
    """
    setup_logging(logging.ERROR)  # lm_eval logs errors only
    # The tasks of scripts/tasks read their metadata.
    files = {"include_path": options.include_path, "metadata": {"task_data": options.task_data}}
    for defaults in (False, True):
        if defaults or options.include_path:
            manager = TaskManager(include_defaults=defaults, **files)
            unknown = [name for name in options.tasks if not manager.match_tasks([name])]
            if not unknown:
                return manager
    raise ValueError(
        f"there is no task {unknown[0]}: python -m lm_eval ls tasks lists those of lm_eval, and "
        "--include_path names a directory of others"
    )


def table(results: dict[str, Any]) -> str:
    """Return the table of results that lm_eval's command prints, and, if there are groups of tasks,
    the table of groups. results: from run_tasks."""
    columns = [column for column in ("results", "groups") if results.get(column)]
    return "\n".join(make_table(results, column) for column in columns)

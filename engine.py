"""The generation loop: continues a batch of prompts, as ids or as text.

A row is one text of a batch: a prompt and its new ids. A step adds an id to each unfinished row, or
with a draft one or more; a draft proposes tokens that the model verifies (speculate.py). Caches
store the keys and values of each layer for a number of rows; compiled steps always compute all
these rows. A random stream is a row's source of noise (sampling.py).

Start at `generate`, which yields new ids step by step. `complete` and `stream` turn the ids into
texts. decoding.py makes the steps or, with a draft, speculate.py; load.py makes the model.

Based on gpt-fast (prefill and decode as two views of one model) and mlx-lm (a generator that
launches a step before it reads the ids of the previous one).
"""

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from decoding import LoadedModel, Texts, plain_steps
from layers.kv_cache import Cache
from layers.positions import same_rotations
from sampling import NOT_FINITE, Sampler
from text.completion import Completion
from text.generation_config import GenerationConfig

if TYPE_CHECKING:
    from bench import Stats
    from text.processors import LogitsProcessor

Prompts = str | Sequence[str | Sequence[int]]  # one text; or several, each as text or as ids


@torch.inference_mode()
def generate(
    lm: LoadedModel,
    prompts: Prompts,
    config: GenerationConfig = GenerationConfig(),
    *,
    streams: Sequence[int] | None = None,
    caches: Sequence[Cache] | None = None,
    past: int = 0,
    live: set[int] | None = None,
    logits_processors: "Sequence[LogitsProcessor]" = (),
) -> Iterator[list[list[int]]]:
    """Continue B prompts together; each row gets the ids that it would get alone.

    prompts: B texts, or lists of token ids, of any lengths.
    streams: the number of each row's random stream; None: 0 to B - 1.
    caches: from lm.make_caches, for B rows or more; None: new ones. If the model is compiled, calls
    with the same caches run the same compiled code.
    past: how many leading tokens of every prompt the caches have already (only after a call with
    one prompt: a batch moves its rows; see decoding.reusable_tokens).
    live: a set that is updated to the unfinished rows after each step; a row ends when the caller
    removes it.
    logits_processors: functions that change logits before tokens are drawn, see LogitsProcessor in
    text/processors.py.

    Yields, for each step, B lists of new ids: one id, or with a draft one or more, for an
    unfinished row; none for a row that has ended: with an id of tokenizer.eos_ids, at
    max_new_tokens, or at the last position of the caches, which at most cover the model's context.
    Raises ValueError for a prompt that is empty, too long or has ids that the model lacks, and for
    logits that are not finite numbers.
    """
    texts = encoded(lm, prompts)
    config = fitted(config, lm.model.args.vocab_size)
    if caches is None:
        longest = max(map(len, texts))
        # Compiled: at least 512 positions, so that short texts have equal caches, hence one step.
        least = 0 if lm.any_rows else 512
        caches = lm.make_caches(len(texts), max(least, longest + config.max_new_tokens))
    # The most new tokens of each row: their positions must stay within the caches.
    counts = new_token_limits(texts, config.max_new_tokens, caches[0].length)
    # The batch appends new ids to `texts`; `padded` below keeps the prompts as they are.
    ends = () if config.ignore_eos else lm.tokenizer.eos_ids
    batch = Batch(texts, counts, ends, live, lm.model.args.recompute_after)
    if lm.any_rows and not lm.draft:  # a draft's own caches have the rows of the given ones
        caches = [cache.first(len(texts)) for cache in caches]
    if not same_rotations(lm.model.args, past, max(map(len, texts))):
        past = 0  # the caches may have the rotations of shorter texts
    # A compiled step has a fixed number of rows: the last prompt fills the unused ones.
    unused = caches[0].rows - len(texts)
    padded = [*map(tuple, texts), *[tuple(texts[-1])] * unused]
    # Unused rows draw from stream 0; their ids are dropped.
    streams = [*(streams or range(len(texts))), *[0] * unused]
    # The sampler makes no more noise keys than the caches have room for tokens.
    config = replace(config, max_new_tokens=max(counts))
    sampler = make_sampler(lm, config, padded, streams, logits_processors)
    steps = make_steps(lm, counts, padded, padded, caches, past, sampler, live=batch.live)
    while True:
        yield batch.add(next(steps), lambda text: error_not_finite(lm, text, caches))
        if not batch.live:
            return
        if batch.outdated:  # fill the caches again, with the rotary positions for longer texts
            texts = [*map(tuple, batch.texts), *[tuple(batch.texts[-1])] * unused]
            record_new_ids(sampler, padded, texts, lm.device)
            steps = make_steps(lm, counts, padded, texts, caches, 0, sampler, live=batch.live)


def make_steps(
    lm: LoadedModel,
    counts: Sequence[int],
    prompts: Texts,
    texts: Texts,
    *given: Any,
    live: set[int],
) -> Iterator[list[list[int]]]:
    """Yield steps, lists of each row's new ids, by plain decoding or with the model's draft.

    counts: the most new tokens of each row, without unused rows. prompts, texts: of all rows;
    texts: the prompts, followed by the new ids so far if the caches must be filled again. given:
    caches, past and sampler, as in plain_steps. live: the unfinished rows. Steps with a draft do
    not end by themselves, and may give a row more ids than its count: the caller stops asking, and
    cuts the ids.
    """
    if not lm.draft:
        # The number of the next token: without a draft, all live rows have as many new ids.
        first = max(len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True))
        return plain_steps(lm, texts, *given, range(first, max(counts)), live)
    from speculate import speculative_steps

    return speculative_steps(lm, prompts, texts, *given, counts, live)


def record_new_ids(sampler: Sampler, prompts: Texts, texts: Texts, device: torch.device) -> None:
    """Record the new ids of all rows in the batch's sampler, which did not draw them: plain steps
    draw with samplers that Sampler.select_rows makes of it. Called before the caches are filled
    again. texts: the prompts with their new ids."""
    new = [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
    width = max(map(len, new))
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in new], device=device)
    # The zeros that pad a shorter row are overwritten when its next ids are drawn; a finished row
    # draws none.
    sampler.record(padded, torch.arange(width, device=device).expand_as(padded))


def error_not_finite(lm: LoadedModel, text: Sequence[int], caches: Sequence[Cache]) -> ValueError:
    """Returns the error to raise for a text whose next logits are not finite; see finite.py.

    text: the ids of the prompt and the answer before those logits. caches: of the batch; they are
    overwritten. All ranks must call this.
    """
    from finite import explain_not_finite

    return ValueError(explain_not_finite(lm, text, caches))


class Batch:
    """The rows of a batch while they grow.

    texts: the ids of each row, to which `add` appends. counts: the most new ids of each row.
    ends: the ids that end a text. live: the set of unfinished rows; the constructor adds all rows,
    `add` and the caller remove them; None: a new set. recompute_after: see ModelArgs. outdated:
    whether a text that is still live grew beyond recompute_after tokens in the latest step, so that
    all keys must be computed again. limits: of each row, the most ids of its prompt and answer.
    """

    def __init__(
        self,
        texts: list[list[int]],
        counts: Sequence[int],
        ends: Sequence[int],
        live: set[int] | None = None,
        recompute_after: int | None = None,
    ):
        self.texts, self.ends = texts, ends
        self.recompute_after, self.outdated = recompute_after or math.inf, False
        self.limits = [len(text) + count for text, count in zip(texts, counts, strict=True)]
        self.live = set() if live is None else live
        self.live.update(range(len(texts)))

    def add(
        self, step: list[list[int]], error: Callable[[list[int]], Exception]
    ) -> list[list[int]]:
        """Append a step's ids to the texts of the live rows, and remove rows that end from `live`.

        step: a list of new ids for each row; at least one id for a live row. Ids of other rows are
        ignored. Returns the appended ids of each row: cut after an id of `ends` and at the row's
        limit; [] for a row that is not live. The sampler puts NOT_FINITE in place of an id whose
        logits are not finite numbers. error: called with a text's ids before NOT_FINITE; returns
        the exception to raise.
        """
        new: list[list[int]] = [[]] * len(self.texts)
        self.outdated = False
        for row in tuple(self.live):
            text = self.texts[row]
            new[row] = until_end(step[row], self.most(row), self.ends)
            if NOT_FINITE in new[row]:
                raise error(text + new[row][: new[row].index(NOT_FINITE)])
            grows = len(text) <= self.recompute_after < len(text) + len(new[row])
            text += new[row]
            if len(text) == self.limits[row] or new[row][-1] in self.ends:
                self.live.remove(row)
            elif grows:
                self.outdated = True
        return new

    def most(self, row: int) -> int:
        """Returns how many ids of a step to append to a row at most: up to its limit; if the text
        grows beyond recompute_after, up to the first id beyond, because the model chose later ids
        with outdated keys."""
        have = len(self.texts[row])
        first_beyond = self.recompute_after + 1
        return min(self.limits[row], first_beyond if have < first_beyond else math.inf) - have


def new_token_limits(texts: Sequence[Sequence[int]], most: int, length: int) -> list[int]:
    """Returns how many tokens may follow each prompt in caches of `length` positions: up to `most`,
    which is max_new_tokens. texts: the ids of each prompt. Raises ValueError if a prompt leaves no
    free position."""
    counts = [min(most, length - len(text)) for text in texts]
    if min(counts) < 1:
        raise ValueError(f"the caches have {length} positions, and a prompt fills them all")
    return counts


def make_sampler(
    lm: LoadedModel,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[int],
    functions: "Sequence[LogitsProcessor]",
) -> Sampler:
    """Make the sampler of a batch. streams: the number of each row's random stream.

    prompts: the ids of each row's prompt, which the repetition penalty counts. functions: logits
    processors of the caller, which run after those that the config asks for.
    """
    processors = None
    if config.changes_logits or functions:
        from text.processors import LogitsProcessors

        processors = LogitsProcessors(config, prompts, functions, lm.device)
    return lm.sampler(config, streams, lm.device, processors)


def encoded(lm: LoadedModel, prompts: Prompts) -> list[list[int]]:
    """Returns the ids of each prompt. Raises ValueError for prompts that the model cannot read."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    texts = [lm.tokenizer.encode(p) if isinstance(p, str) else token_ids(p) for p in prompts]
    check_prompts(texts, lm.model.args.context, lm.model.args.vocab_size)
    return texts


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Returns a prompt's ids as a list of int, also from numpy's or torch's integers. Raises
    ValueError for anything but a sequence of integers."""
    try:
        return [index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(
            f"a prompt is {type(prompt).__name__} {reprlib.repr(prompt)} and must be a text or a "
            "list of token ids (several prompts: a list of those)"
        ) from error


def fitted(config: GenerationConfig, vocab_size: int) -> GenerationConfig:
    """Returns the config, with logprobs (the number of likeliest tokens to report) at most
    vocab_size. Raises ValueError for a logit bias of an id that the model lacks."""
    for token, _ in config.logit_bias:
        if token >= vocab_size:
            raise ValueError(f"logit_bias has id {token} and the model knows 0 to {vocab_size - 1}")
    return replace(config, logprobs=config.logprobs and min(config.logprobs, vocab_size))


def until_end(ids: list[int], most: int, ends: Sequence[int]) -> list[int]:
    """Returns the first `most` ids, cut after the first one that is in `ends`, which is kept."""
    end = next((n for n, token in enumerate(ids[:most], 1) if token in ends), most)
    return ids[:end]


def check_prompts(prompts: Sequence[Sequence[int]], context: int, vocab_size: int) -> None:
    """Raises ValueError if there is no prompt, or for a prompt that is empty, leaves no room for an
    answer in the model's context, or has ids that the model lacks. prompts: the ids of each."""
    if not prompts:
        raise ValueError("no prompt was given")
    for n, prompt in enumerate(prompts, 1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {n} of {len(prompts)}"
        if not prompt:
            raise ValueError(f"{which} is empty: give at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"{which} has {len(prompt)} tokens and the model's context is {context}, which "
                "must hold prompt and answer: shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"{which} has token ids from {min(prompt)} to {max(prompt)} and the model knows "
                f"0 to {vocab_size - 1}: its tokenizer files belong to another model"
            )


def complete(
    lm: LoadedModel,
    prompts: Prompts,
    config: GenerationConfig = GenerationConfig(),
    *,
    on_text: Callable[[int, str], Any] = lambda row, text: None,
    on_end: Callable[[list[int], list[Completion]], Any] = lambda rows, completions: None,
    stats: "Stats | None" = None,
    interruptible: bool = False,
    **options: Any,
) -> list[Completion]:
    """Continue B prompts, texts or lists of token ids, to their ends. Returns B completions.

    on_text: called with a row and a piece of its text, as soon as no later id can change the piece.
    on_end: called with the rows that end in a step, and all completions. stats: gets the times of
    this call. interruptible: Ctrl-C ends the texts, and no KeyboardInterrupt is raised. options:
    keyword arguments of `generate`, whose exceptions this function raises.
    """
    given = encoded(lm, prompts)
    completions = [Completion(lm.tokenizer, ids, config) for ids in given]
    # `live`: rows that `generate` continues; `growing`: rows whose completion is not closed yet.
    live, growing = set(), set(range(len(given)))

    def end(rows: list[int], reason: str | None = None) -> None:
        """Close these rows' completions, pass their last characters to on_text, and call on_end if
        there are any rows. reason: the finish reason; None: the one that the completion has."""
        for row in rows:
            if text := completions[row].close(reason):
                on_text(row, text)
        growing.difference_update(rows)
        if rows:
            on_end(rows, completions)

    steps = generate(lm, given, config, live=live, **options)
    steps = stats.timed(steps, given, options.get("past", 0)) if stats else steps
    try:
        for step in steps:
            for row, ids in enumerate(step):
                if text := completions[row].extend(ids):
                    on_text(row, text)
                if completions[row].finish_reason == "stop":
                    live.discard(row)
            end(sorted(growing - live))
    except KeyboardInterrupt:
        if not interruptible:
            raise
        end(sorted(growing), "interrupted")
    return completions


def stream(
    lm: LoadedModel,
    prompt: str | Sequence[int],
    config: GenerationConfig = GenerationConfig(),
    **options: Any,
) -> Iterator[str]:
    """Yield pieces of the text that continues one prompt, as soon as no later id can change them.

    options: keyword arguments of `generate`, whose exceptions this function raises.
    """
    (ids,) = encoded(lm, [prompt])
    completion, live = Completion(lm.tokenizer, ids, config), set()
    for (new,) in generate(lm, [ids], config, live=live, **options):
        if text := completion.extend(new):
            yield text
        if completion.finish_reason == "stop":
            live.clear()
    if text := completion.close():
        yield text

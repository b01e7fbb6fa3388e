"""generate.py for prompts: reads them, continues them in batches, and prints or saves the texts.

A job is one text to generate: a prompt is continued num_samples times. A sink writes the texts of
jobs (text/jobs.py). Rows are the texts of a batch. Ranks are the processes that torchrun started;
all compute the same, and only rank 0 writes.

Start at PromptMode.run. Texts go to stdout or, each when it is complete, to the file of --output.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cli.session import Session
from decoding import LoadedModel
from engine import check_prompts, complete
from host.files import read_text, without_surrogates
from host.log import log
from layers.args import ModelArgs
from options.settings import ModelChoice, PromptOptions
from ranks import broadcast_from_rank0, is_rank0
from text import chat, jobs
from text.tokenizer import Tokenizer
from weights.weight_files import find_weights, shards

DEMO_PROMPT = "Once upon a time"
MAX_BATCH = 16  # rows of a batch without --batch_size
# Files beside the weights that change the generated texts.
BESIDE_WEIGHTS = (
    "config.json tokenizer.json tokenizer.model vocab.json merges.txt tokenizer_config.json "
    "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json "
    "generation_config.json quantize_config.json quant_config.json"
).split()


class PromptMode:
    """A Mode (session.py) that continues every prompt num_samples times, in batches.

    The constructor reads the prompts, so that errors in them come before the model is loaded.
    """

    def __init__(self, options: PromptOptions):
        self.options, self.prompts = options, read_prompts(options)
        self.output: jobs.ResultsFile | None = None

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the number of prompt tokens of each text that is to be generated, for a plan.

        args: the shape of the model, for its vocabulary. new: not used. Called before the model is
        loaded.
        """
        encoded = encoded_prompts(tokenizer, args.vocab_size, self.prompts, self.options)
        return [len(ids) for _, ids in encoded] * self.options.num_samples

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None:
        """Open the file of --output before the model is loaded, so that its errors come early.

        settings: all options that the texts depend on, except the model. The file records them and
        a hash of the model's files, so that a rerun with others is refused. Only rank 0 opens the
        file. Without --output this does nothing.
        """
        if not (self.options.output and is_rank0()):
            return
        shape = model.random_weights
        files = [shape] if shape else model_files(find_weights(model.checkpoint_path))
        origin = jobs.Provenance(model.name, jobs.fingerprint(files), settings)
        samples = self.options.num_samples
        self.output = jobs.ResultsFile(self.options.output, self.prompts, samples, origin)

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """Generate the texts that the output does not contain yet, in batches.

        batch_size: rows of a batch; None: at most MAX_BATCH. cache_length: not used, because the
        caches get the length of the longest text. All ranks must call this.
        """
        lm, options = session.lm, self.options
        all_jobs = self._jobs(lm, session.config.max_new_tokens)
        sink = self._sink(all_jobs, session)
        # Rank 0 alone reads the output file, and so knows the jobs that have no result yet.
        sink.todo = broadcast_from_rank0(lambda: sink.todo)
        if not sink.todo:
            return log(f"{options.output} has all {len(all_jobs)} results already")
        size = min(batch_size or MAX_BATCH, len(sink.todo))
        # The length is that of all jobs, so that a rerun for some of them has equally long caches.
        caches = lm.make_caches(size, max(len(job.ids) + job.limit for job in all_jobs))
        session.compile(caches)
        with sink:
            for batch in jobs.batches(sink.todo, size):
                sink.begin(batch)
                complete(
                    lm,
                    [job.ids for job in batch],
                    session.config,
                    streams=[job.number for job in batch],
                    caches=caches,
                    stats=session.stats,
                    on_text=sink.text,
                    on_end=sink.ended,
                )

    def _jobs(self, lm: LoadedModel, new: int) -> list[jobs.Job]:
        """Returns one job for each text to generate, of up to `new` new tokens. Raises ValueError
        as check_prompts does, for example for a prompt that the model's context cannot hold."""
        context, vocab_size = lm.model.args.context, lm.model.args.vocab_size
        encoded = encoded_prompts(lm.tokenizer, vocab_size, self.prompts, self.options)
        check_prompts([ids for _, ids in encoded], context, vocab_size)
        return jobs.make_jobs(encoded, self.options.num_samples, new, context)

    def _sink(
        self, all_jobs: list[jobs.Job], session: Session
    ) -> jobs.ConsoleSink | jobs.JsonlSink:
        """Returns the object that writes the texts: to the file of --output, or to stdout. Its
        attribute todo holds the jobs without a result in that file; for stdout, all jobs.

        all_jobs: one for each text. Prompts for --chat, or of random tokens, are not printed. Ranks
        other than 0, which have no file, get a sink for stdout; their stdout drops the texts.
        """
        ends = jobs.FinishCounts(session.config.max_new_tokens)
        if self.output:
            return jobs.JsonlSink(self.output, all_jobs, ends, lambda: session.stats.new_tokens)
        with_prompt = not (self.options.chat or self.options.random_tokens)
        return jobs.ConsoleSink(all_jobs, ends, with_prompt=with_prompt)


def read_prompts(options: PromptOptions) -> list[jobs.Prompt]:
    """Returns the prompts of --prompts, --prompt_file or --prompt; without these the text of a pipe
    on stdin, else DEMO_PROMPT. Raises ValueError for an empty prompt."""
    if options.prompts:
        return jobs.read_prompts(options.prompts, options.chat)
    if options.prompt_file:
        texts = [jobs.without_line_end(read_text(options.prompt_file))]
    elif options.prompt:
        texts = [without_surrogates(text) for text in options.prompt]
    else:
        piped = broadcast_from_rank0(jobs.piped_prompt)
        texts = [DEMO_PROMPT if piped is None else piped]
    if not all(texts):
        raise ValueError("the prompt is empty: give it some text")
    return texts


def model_files(weights: Path) -> list[Path]:
    """Returns the files of a checkpoint that its texts depend on: weights, config, tokenizer.

    weights: the path that find_weights returned.
    """
    beside = (weights.parent / name for name in BESIDE_WEIGHTS)
    return [*shards(weights)[0], *(file for file in beside if file.is_file())]


def encoded_prompts(
    tokenizer: Tokenizer, vocab_size: int, prompts: Sequence[jobs.Prompt], options: PromptOptions
) -> list[tuple[jobs.Prompt, list[int]]]:
    """Returns each prompt with its token ids. A prompt is a text or, with --chat, messages, which
    the chat template joins.

    With --random_weights, which has no tokenizer, a prompt is a number: so many random tokens below
    vocab_size. Raises ValueError for a prompt that is no number.
    """
    if options.chat:
        given = options.system, options.chat_template_kwargs
        return [(prompt, chat.prompt_ids(tokenizer, prompt, *given)) for prompt in prompts]
    if not options.random_tokens:
        return [(prompt, tokenizer.encode(prompt)) for prompt in prompts]
    if not_numbers := [prompt for prompt in prompts if not prompt.isdecimal()]:
        raise ValueError(
            "random weights have no tokenizer: give a number of tokens as --prompt, not "
            f"{not_numbers[0]}"
        )
    # --seed may be any whole number, and torch takes 64 bits.
    generator = torch.Generator().manual_seed((options.seed or 0) % 2**63)
    return [
        (prompt, torch.randint(vocab_size, (int(prompt),), generator=generator).tolist())
        for prompt in prompts
    ]

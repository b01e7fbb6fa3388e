"""Generate text: prefill, decode, stream. The command, and the Python interface.

    python generate.py --compile --checkpoint_path checkpoints/demo --prompt "Once upon a time"

Start at `generate`, the loop that everything else consumes: `complete` and `stream`, which turn its
ids into texts, files of prompts (jobs.py), chat (chat.py) and benchmarks (bench.py). Its steps are
made by decoding.py or, where a draft guesses tokens, by speculate.py; load.py makes the model that
it runs; the command is the second half of the file.

    lm = load_model("checkpoints/demo", compile=True)
    for piece in stream(lm, "Once upon a time"):
        print(piece, end="", flush=True)
    prompts = ["Once upon a time", "The big dog"]
    for completion in complete(lm, prompts, GenerationConfig(max_new_tokens=50)):
        print(completion.text)

Based on gpt-fast (prefill and decode as two views of one model) and mlx-lm (generation as a
generator that launches a step before it reads the one before).
"""

import argparse
import contextlib
import json
import reprlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

from cli import command
from cli.options import parse_args

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    ARGS = command.begin(parse_args)

import torch

import bench
import flash
import plan
from checkpoint import (
    DTYPES,
    available_memory,
    find_weights,
    shards,
    size_text,
    stored_tensors,
)
from cli.command import be_quiet, exit_code, log
from compiled import graphs_report
from decoding import LoadedModel, plain_steps
from finite import not_finite
from host.files import DEMO, read_text, without_surrogates
from host.threads import set_threads
from load import compile_now, count_weights, find_device, load_model, random_model
from model import KVCache
from pp import enough_flights
from quant.linear import make_scheme
from ranks import agreed, join, leave, own_device, writes
from sampling import NOT_FINITE, Sampler
from speculate import speculative_steps
from text import chat, jobs
from text.completion import Completion
from text.generation_config import GenerationConfig
from text.model_defaults import model_defaults, taken
from text.processors import LogitsProcessor, Processors
from text.tokenizer import Tokenizer
from weights import hub

DEMO_PROMPT = "Once upon a time"
BESIDE_WEIGHTS = (
    "config.json tokenizer.json tokenizer.model vocab.json merges.txt tokenizer_config.json "
    "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json "
    "generation_config.json quantize_config.json quant_config.json"
).split()
# The options, beside those of GenerationConfig, that a text depends on.
CHANGE_TEXTS = (
    "chat system dtype kv_dtype num_samples compress_weight attn_sparsity flash random_mode".split()
)


Prompts = str | Sequence[str | Sequence[int]]  # one text; or several, each as text or as ids


@torch.inference_mode()
def generate(
    lm: LoadedModel,
    prompts: Prompts,
    config: GenerationConfig = GenerationConfig(),
    *,
    rows: Sequence[int] | None = None,
    caches: list[KVCache] | None = None,
    past: int = 0,
    live: set[int] | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> Iterator[list[list[int]]]:
    """Continue B prompts together; each row gets the ids that it would get alone.

    prompts: B texts, or lists of token ids, of any lengths. rows: the random stream that each row
    draws from, default 0 to B - 1. caches: from lm.make_caches, for B rows or more, so that a later
    call can use them (and what was compiled for their shape) again; past: how many leading tokens
    of every prompt they hold already (only after a call with one prompt: a batch moves its rows).
    live: a set that is updated to the unfinished rows after each step; a row that the caller
    removes from it ends there. logits_processors: functions that change logits before tokens are
    drawn, called with ids and logits of rows of the same length: see LogitsProcessor in
    processors.py.

    Yields, for each step, B lists of new ids: one id for a live row, with a draft often several,
    none for a row that ended with an id of tokenizer.eos_ids, with max_new_tokens or with the
    model's context.
    Raises ValueError for a prompt that is empty, too long or has ids that the model lacks, and
    where logits are not finite numbers.
    """
    texts = encoded(lm, prompts)
    B, args = len(texts), lm.model.args
    config = fitted(config, args.vocab_size)
    if caches is None:
        longest = max(map(len, texts))
        caches = lm.make_caches(B, max(512, longest + config.max_new_tokens))
    counts = new_token_limits(texts, config.max_new_tokens, caches[0].length)
    limits = [len(text) + count for text, count in zip(texts, counts, strict=True)]
    if lm.any_rows and not lm.draft:  # a draft has caches of its own, of the same rows
        caches = [cache.first(B) for cache in caches]
    idle = caches[0].rows - B  # padding: rows that are computed and whose ids are dropped
    given = [*map(tuple, texts), *[tuple(texts[-1])] * idle]
    # No more is prepared than the caches can hold, whatever limit is asked for.
    config = replace(config, max_new_tokens=max(counts))
    streams = [*(rows or range(B)), *[0] * idle]
    sampler = make_sampler(lm, config, given, streams, logits_processors)
    ends = () if config.ignore_eos else lm.tokenizer.eos_ids
    live = set() if live is None else live
    live.update(range(B))
    make, most = (speculative_steps, counts) if lm.draft else (plain_steps, max(counts))
    for step in make(lm, given, caches, past, sampler, most, live):
        new = [[]] * B
        for row in tuple(live):
            new[row] = until_end(step[row], limits[row] - len(texts[row]), ends)
            if NOT_FINITE in new[row]:
                texts[row] += new[row][: new[row].index(NOT_FINITE)]
                raise ValueError(not_finite(lm, texts[row], caches))
            texts[row] += new[row]
            if len(texts[row]) == limits[row] or new[row][-1] in ends:
                live.remove(row)
        yield new
        if not live:
            return


def new_token_limits(texts: Sequence[Sequence[int]], most: int, slots: int) -> list[int]:
    """How many tokens may follow each prompt, in caches of so many slots.

    Raises ValueError if a prompt leaves no free slot.
    """
    counts = [min(most, slots - len(text)) for text in texts]
    if min(counts) < 1:
        raise ValueError(f"the caches have {slots} slots, and a prompt fills them all")
    return counts


def make_sampler(
    lm: LoadedModel,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[int],
    functions: Sequence[LogitsProcessor],
) -> Sampler:
    """What draws tokens after those prompts, each with noise of its stream."""
    changing = config.changes_logits or functions
    processors = Processors(config, prompts, functions, lm.device) if changing else None
    return lm.sampler(config, streams, lm.device, processors)


def encoded(lm: LoadedModel, prompts: Prompts) -> list[list[int]]:
    """The ids of each prompt. ValueError for what is no prompt, or none that the model can read."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    texts = [lm.tokenizer.encode(p) if isinstance(p, str) else token_ids(p) for p in prompts]
    check_prompts(texts, lm.model.args.context, lm.model.args.vocab_size)
    return texts


def token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(
            f"a prompt is {type(prompt).__name__} {reprlib.repr(prompt)} and must be a text or a "
            "list of token ids (several prompts: a list of those)"
        ) from error


def fitted(config: GenerationConfig, vocab_size: int) -> GenerationConfig:
    """ValueError for a bias of an id that the model lacks; no more logprobs than it has ids."""
    for token, _ in config.logit_bias:
        if token >= vocab_size:
            raise ValueError(f"logit_bias has id {token} and the model knows 0 to {vocab_size - 1}")
    return replace(config, logprobs=config.logprobs and min(config.logprobs, vocab_size))


def until_end(ids: list[int], most: int, ends: Sequence[int]) -> list[int]:
    """The first `most` ids, and of those none after the first that ends a text."""
    end = next((n for n, token in enumerate(ids[:most], 1) if token in ends), most)
    return ids[:end]


def check_prompts(prompts: Sequence[Sequence[int]], context: int, vocab_size: int) -> None:
    """ValueError for prompts, as ids, that a model of that context and vocabulary cannot read."""
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
    stats: bench.Stats | None = None,
    interruptible: bool = False,
    **options: Any,
) -> list[Completion]:
    """Continue B prompts, texts or lists of token ids, to their ends: B completions.

    on_text is called with a row and a piece of its text as soon as that is certain, on_end with
    the rows that end in a step and all completions as they are then; stats, where given, is added
    to; interruptible: Ctrl-C ends the texts instead of the program. The other options, and what is
    raised, are those of `generate`.
    """
    given = encoded(lm, prompts)
    completions = [Completion(lm.tokenizer, ids, config) for ids in given]
    live, growing = set(), set(range(len(given)))

    def end(rows: list[int], reason: str | None = None) -> None:
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
    """The pieces of the text that continues one prompt, each as soon as it is certain.

    Options, and what is raised, are those of `generate`.
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


def given_prompts(args: argparse.Namespace) -> list[jobs.Prompt]:
    """The prompts that the options name, or a pipe holds. Raises ValueError for an empty one."""
    if args.prompts:
        return jobs.read_prompts(args.prompts, args.chat)
    if args.prompt_file:
        texts = [jobs.without_line_end(read_text(args.prompt_file))]
    elif args.prompt:
        texts = [without_surrogates(text) for text in args.prompt]
    else:
        piped = agreed(jobs.piped_prompt)
        texts = [DEMO_PROMPT if piped is None else piped]
    if not all(texts):
        raise ValueError("the prompt is empty: give it some text")
    return texts


def open_output(
    args: argparse.Namespace, config: GenerationConfig, prompts: Sequence[jobs.Prompt]
) -> jobs.JsonlOutput | None:
    """Open the file of results, so that its errors come before a model is loaded."""
    if not (args.output and writes()):
        return None
    shape = args.random_weights
    files = [shape] if shape else model_files(find_weights(args.checkpoint_path))
    settings = asdict(config) | {name: getattr(args, name) for name in CHANGE_TEXTS}
    origin = jobs.Origin(str(shape or args.checkpoint_path), jobs.fingerprint(files), settings)
    return jobs.JsonlOutput(args.output, prompts, args.num_samples, origin)


def model_files(weights: Path) -> list[Path]:
    """All that the texts of a checkpoint depend on: its weights, config and tokenizer."""
    beside = (weights.parent / name for name in BESIDE_WEIGHTS)
    return [*shards(weights)[0], *(file for file in beside if file.is_file())]


def run_prompts(
    lm: LoadedModel,
    config: GenerationConfig,
    stats: bench.Stats,
    args: argparse.Namespace,
    prompts: Sequence[jobs.Prompt],
    output: jobs.JsonlOutput | None,
) -> None:
    """Every prompt num_samples times, in batches, to stdout or, as each ends, to --output."""
    context, vocab = lm.model.args.context, lm.model.args.vocab_size
    encoded = encoded_prompts(lm.tokenizer, vocab, prompts, args)
    check_prompts([ids for _, ids in encoded], context, vocab)
    todo = jobs.make_jobs(encoded, args.num_samples, config.max_new_tokens, context)
    ends = jobs.Ends(config.max_new_tokens)
    if output:
        sink = jobs.FileSink(output, todo, ends, lambda: stats.new_tokens)
    else:
        sink = jobs.Console(todo, ends, continued=not (args.chat or args.random_weights))
    sink.todo = agreed(lambda: sink.todo)
    if not sink.todo:
        return log(f"{args.output} holds all {len(todo)} results: nothing was to be done")
    size = min(args.batch_size or 16, len(sink.todo))
    caches = lm.make_caches(size, max(len(job.ids) + job.limit for job in todo))
    compile_timed(lm, caches, stats)
    with sink:
        for batch in jobs.batches(sink.todo, size):
            sink.begin(batch)
            complete(
                lm,
                [job.ids for job in batch],
                config,
                rows=[job.number for job in batch],
                caches=caches,
                stats=stats,
                on_text=sink.text,
                on_end=sink.ended,
            )


def encoded_prompts(
    tokenizer: Tokenizer, vocab: int, prompts: Sequence[jobs.Prompt], args: argparse.Namespace
) -> list[tuple[jobs.Prompt, list[int]]]:
    """Each prompt and its ids; with random weights a number stands for so many random tokens."""
    if args.chat:
        return [(prompt, chat.prompt_ids(tokenizer, prompt, args.system)) for prompt in prompts]
    if not args.random_weights:
        return [(prompt, tokenizer.encode(prompt)) for prompt in prompts]
    if wrong := [prompt for prompt in prompts if not prompt.isdecimal()]:
        raise ValueError(
            f"random weights have no tokenizer: give a number of tokens as --prompt, not {wrong[0]}"
        )
    generator = torch.Generator().manual_seed((args.seed or 0) % 2**63)
    return [
        (prompt, torch.randint(vocab, (int(prompt),), generator=generator).tolist())
        for prompt in prompts
    ]


def run_chat(
    lm: LoadedModel, config: GenerationConfig, stats: bench.Stats, args: argparse.Namespace
) -> None:
    half_free = agreed(lambda: available_memory(lm.device) // 2)
    fitting = args.slots or half_free // lm.kv_bytes_per_token()
    caches = lm.make_caches(1, min(lm.model.args.context, fitting))
    compile_timed(lm, caches, stats)
    conversation = chat.Conversation(
        lm.tokenizer, caches[0].length, config.max_new_tokens, args.system
    )

    def answer(ids: list[int], held: int, show: Callable[[int, str], None]) -> Completion:
        (completion,) = complete(
            lm,
            [ids],
            config,
            rows=[len(conversation.messages)],  # every answer draws anew
            caches=caches,
            past=held,
            stats=stats,
            interruptible=True,
            on_text=show,
        )
        print(flush=True)
        return completion

    chat.chat(conversation, answer)


def compile_timed(lm: LoadedModel, caches: list[KVCache], stats: bench.Stats) -> None:
    if lm.any_rows:
        return
    log("compiling ...")
    start = time.perf_counter()
    compile_now(lm, caches)
    stats.compile_seconds = time.perf_counter() - start


def run_bench(
    lm: LoadedModel, config: GenerationConfig, stats: bench.Stats, args: argparse.Namespace
) -> None:
    context, rows = lm.model.args.context, args.batch_size or 1
    length = int(args.prompt[0]) if args.prompt else min(512, context // 2)
    if length + config.max_new_tokens > context:
        raise ValueError(
            f"{length} and {config.max_new_tokens} tokens do not fit the model's context of "
            f"{context}: lower --prompt or --max_new_tokens"
        )
    caches = lm.make_caches(rows, length + config.max_new_tokens)
    compile_timed(lm, caches, stats)
    figures = bench.measure(lm, complete, caches, config, length, args.repeats)
    if args.json:
        figures |= {
            "model": str(args.random_weights or args.checkpoint_path),
            "kv_dtype": args.kv_dtype,
            "dtype": str(lm.model.tok_embeddings.weight.dtype).removeprefix("torch."),
            "compiled": args.compile,
            "load_s": stats.load_seconds,
            "compile_s": stats.compile_seconds,
        }
        print(json.dumps(figures))


def run(args: argparse.Namespace) -> None:
    """What the options ask for, from a name to a report."""
    set_threads(args.threads)
    args.device = str(own_device(find_device(args.device)))
    args.ranks = join(torch.device(args.device))
    if args.pipeline and args.ranks:
        args.flights = args.flights or enough_flights(args.ranks)
    find_models(args)
    config = generation_config(args)
    texts = not (args.bench or args.interactive)
    prompts = given_prompts(args) if texts else []
    expected = agreed(lambda: offload_plan(args, config, prompts)) if args.placed else None
    if args.plan:
        return print_plan(expected, args)
    mode = run_bench if args.bench else run_chat
    if texts:
        output = open_output(args, config, prompts)
        mode = partial(run_prompts, prompts=prompts, output=output)
    check_directory("--profile", args.profile)
    lm, stats = load(args, expected)
    for line in model_lines(lm, args):
        log(line)
    with profiled(args.profile):
        mode(lm, config, stats, args)
    for line in report(lm, stats, expected):
        log(line)
    leave()


def print_plan(expected: plan.Plan, args: argparse.Namespace) -> None:
    """--plan: what would run where, on stdout, and no more."""
    for line in plan.lines(expected):
        print(line, flush=True)
    for line in plan.on_devices(plan.subject(args)[0], args) if args.link else ():
        print(line, flush=True)
    leave()


def check_directory(option: str, file: Path | None) -> None:
    if file and not file.parent.is_dir():
        raise FileNotFoundError(f"{option} {file}: there is no directory {file.parent}")


def find_models(args: argparse.Namespace) -> None:
    """Replace the names of repositories by the folders that hold them."""
    args.checkpoint_path = hub.resolve(args.checkpoint_path or DEMO, args.revision)
    if args.draft_checkpoint_path:
        args.draft_checkpoint_path = hub.resolve(args.draft_checkpoint_path)


def generation_config(args: argparse.Namespace) -> GenerationConfig:
    """What the options say; what they leave open, the model's generation_config.json does."""
    given = {f.name: getattr(args, f.name) for f in fields(GenerationConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    path = Path(args.checkpoint_path)
    directory = path if path.is_dir() else path.parent
    defaults = {} if args.random_weights else model_defaults(directory)
    if defaults := {name: value for name, value in defaults.items() if name not in given}:
        log(taken(defaults, directory))
    return GenerationConfig(**(defaults | given))


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What load_model and random_model are given."""
    return {
        "device": args.device,
        "ranks": args.ranks,
        "pipeline": args.pipeline,
        "flights": args.flights,
        "kv_dtype": args.kv_dtype,
        "dtype": DTYPES.get(args.dtype),
        "compile": args.compile,
        "compile_prefill": args.compile_prefill,
        "draft": args.draft_checkpoint_path or args.draft,
        "speculate_k": None if args.speculate_k == "auto" else args.speculate_k,
    }


def model_lines(lm: LoadedModel, args: argparse.Namespace) -> Iterator[str]:
    """What was loaded."""
    weight = lm.model.tok_embeddings.weight
    nbytes = sum(tensor.nbytes for tensor, _ in stored_tensors(lm.model).values())
    yield (
        f"{args.random_weights or args.checkpoint_path}: "
        f"{count_weights(lm.model.args):,} weights in {size_text(nbytes)}, "
        f"{str(weight.dtype).removeprefix('torch.')} on {bench.machine_name(weight.device)}"
    )
    if lm.draft and lm.draft.lm:
        reads = (size_text(m.bytes_per_step()) for m in (lm.draft.lm.model, lm.model))
        yield "draft: reads {} for a guess, the model {} for a step".format(*reads)
    hint = chat.template_hint(lm.tokenizer)
    if hint and not (args.chat or args.interactive or args.bench):
        yield hint


def report(lm: LoadedModel, stats: bench.Stats, expected: plan.Plan | None) -> Iterator[str]:
    """What the run took, feature by feature."""
    if stats.prefill_seconds:
        yield from stats.report(bench.known_bandwidth(lm.device))
    yield from graphs_report(lm.decode)
    if expected and stats.decoded_tokens:
        yield from plan.report(expected, lm, stats)
    yield from flash.report(lm.model)
    if lm.draft:
        yield from lm.draft.pace.report.lines()


def load(args: argparse.Namespace, expected: plan.Plan | None) -> tuple[LoadedModel, bench.Stats]:
    """The model that the options name, where a plan says, and the time that loading it took."""
    options, args.slots = model_options(args), None
    if expected:
        for line in plan.lines(expected):
            log(line)
        options["policy"] = expected.policy
        args.batch_size = expected.policy.rows * (args.flights or 1)
        args.slots = expected.work.prompt + expected.work.new
    start = time.perf_counter()
    if args.random_weights:
        scheme = make_scheme(args.random_mode) if args.random_mode else None
        lm = random_model(args.random_weights, scheme=scheme, **options)
    else:
        lm = load_model(args.checkpoint_path, flash=flash.chosen(args), **options)
    stats = bench.Stats(lm)
    stats.load_seconds = time.perf_counter() - start
    return lm, stats


def offload_plan(
    args: argparse.Namespace, config: GenerationConfig, prompts: Sequence[jobs.Prompt]
) -> plan.Plan:
    """Where the model that the options name is to be, for the texts that they ask for."""
    subject, tokenizer = plan.subject(args)
    most = subject.args.context - 1
    if args.interactive:
        lengths = [most - config.max_new_tokens]
    elif args.bench:
        lengths = [int(args.prompt[0]) if args.prompt else min(512, most // 2)]
        lengths *= args.batch_size or 1
    else:
        encoded = encoded_prompts(tokenizer, subject.args.vocab_size, prompts, args)
        lengths = [len(ids) for _, ids in encoded] * args.num_samples
    longest = min(max(lengths), most)
    new = min(config.max_new_tokens, subject.args.context - longest)
    texts = -(-len(lengths) // (args.flights or 1))
    return plan.make_plan(subject, plan.Work(texts, longest, new), args)


@contextlib.contextmanager
def profiled(file: Path | None) -> Iterator[None]:
    """A trace for chrome://tracing or ui.perfetto.dev, where a file is named."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(file))
    log(f"profile: {file}")


def main(args: argparse.Namespace) -> int:
    be_quiet(args.quiet)
    return exit_code("generate.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(ARGS))

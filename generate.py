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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from cli import command
from cli.options import parse_args

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    ARGS = command.begin(parse_args)

import torch

import bench
import plan
from checkpoint import DTYPES, find_weights, shards, stored_tensors
from cli.command import exit_code
from compiled import graphs_report
from decoding import LoadedModel
from engine import check_prompts, complete
from host.bandwidth import known_bandwidth
from host.devices import find_device
from host.files import DEMO, read_text, without_surrogates
from host.log import be_quiet, log
from host.memory import available_memory, machine_name, size_text
from host.threads import set_threads
from load import compile_now, count_weights, load_model, random_model
from model import KVCache
from neurons.feed_forward import Flash
from neurons.feed_forward import report as flash_report
from pp import default_micro_batches
from quant.linear import make_scheme
from ranks import broadcast_from_rank0, leave, own_device, writes
from text import chat, jobs
from text.completion import Completion
from text.generation_config import GenerationConfig
from text.model_defaults import model_defaults, taken
from text.tokenizer import Tokenizer
from weights import hub

# The Python interface.
__all__ = "Completion GenerationConfig LoadedModel complete generate load_model stream".split()
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


def given_prompts(args: argparse.Namespace) -> list[jobs.Prompt]:
    """The prompts that the options name, or a pipe holds. Raises ValueError for an empty one."""
    if args.prompts:
        return jobs.read_prompts(args.prompts, args.chat)
    if args.prompt_file:
        texts = [jobs.without_line_end(read_text(args.prompt_file))]
    elif args.prompt:
        texts = [without_surrogates(text) for text in args.prompt]
    else:
        piped = broadcast_from_rank0(jobs.piped_prompt)
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
    sink.todo = broadcast_from_rank0(lambda: sink.todo)
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
    half_free = broadcast_from_rank0(lambda: available_memory(lm.device) // 2)
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
    args.ranks = join_process_group(torch.device(args.device))
    if args.pipeline and args.ranks:
        args.micro_batches = args.micro_batches or default_micro_batches(args.ranks)
    find_models(args)
    config = generation_config(args)
    texts = not (args.bench or args.interactive)
    prompts = given_prompts(args) if texts else []
    expected = (
        broadcast_from_rank0(lambda: offload_plan(args, config, prompts)) if args.placed else None
    )
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
        "micro_batches": args.micro_batches,
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
        f"{str(weight.dtype).removeprefix('torch.')} on {machine_name(weight.device)}"
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
        yield from stats.report(known_bandwidth(lm.device))
    yield from graphs_report(lm.decode)
    if expected and stats.decoded_tokens:
        yield from plan.report(expected, lm, stats)
    yield from flash_report(lm.model)
    if lm.draft:
        yield from lm.draft.controller.report.lines()


def load(args: argparse.Namespace, expected: plan.Plan | None) -> tuple[LoadedModel, bench.Stats]:
    """The model that the options name, where a plan says, and the time that loading it took."""
    options, args.slots = model_options(args), None
    if expected:
        for line in plan.lines(expected):
            log(line)
        options["policy"] = expected.policy
        args.batch_size = expected.policy.rows * (args.micro_batches or 1)
        args.slots = expected.work.prompt + expected.work.new
    start = time.perf_counter()
    if args.random_weights:
        scheme = make_scheme(args.random_mode) if args.random_mode else None
        lm = random_model(args.random_weights, scheme=scheme, **options)
    else:
        lm = load_model(args.checkpoint_path, flash=flash_chosen(args), **options)
    stats = bench.Stats(lm)
    stats.load_seconds = time.perf_counter() - start
    return lm, stats


def flash_chosen(options: argparse.Namespace) -> Flash | None:
    if not options.flash:
        return None
    given = options.flash_window, options.flash_threads, options.flash_dir
    return Flash(options.dram_budget or 0.5, *given)


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
    texts = -(-len(lengths) // (args.micro_batches or 1))
    return plan.make_plan(subject, plan.Workload(texts, longest, new), args)


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

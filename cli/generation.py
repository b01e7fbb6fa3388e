"""Runs the command generate.py: finds and loads a model, runs a mode, and reports.

A mode is one of three uses of a model: prompts, chat, benchmark. An offloaded model has parts on
device, host memory and disk; a plan (plan.py) says which, in its policy, and predicts the speed.
Under torchrun several ranks, which are processes, run one model together (ranks.py). A draft
proposes tokens that the model verifies. `args` are the parsed options of generate.py.

Start at run. The modes are in prompts.py, interactive.py and benchmark.py.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import Stats
from cli.options import is_placed
from cli.session import Mode, Session
from decoding import LoadedModel
from host.bandwidth import saved_bandwidth
from host.devices import find_device
from host.files import DEMO
from host.log import log
from host.memory import machine_name, size_text
from host.threads import set_threads
from load import count_weights, load_model, random_model
from options.settings import FlashOptions, LoadOptions, ModelChoice, PlanOptions, PromptOptions
from quant.linear import make_scheme
from ranks import broadcast_from_rank0, join_process_group, leave_process_group, local_device
from text import chat
from text.generation_config import GenerationConfig
from text.model_defaults import defaults_line, model_defaults
from weights import hub
from weights.allocation import stored_tensors

if TYPE_CHECKING:
    from plan import Plan

# Options that change the generated texts, in addition to those of GenerationConfig. The file of
# --output records them, so that a rerun does not mix texts of different options.
TEXT_OPTIONS = (
    "chat system chat_template_kwargs dtype kv_dtype num_samples compress_weight attn_sparsity "
    "flash random_mode"
).split()


def run(args: argparse.Namespace) -> None:
    """Run generate.py: load the model that the options name, run a mode, log a report.

    args: of cli/options.py's parse_args. Under torchrun every rank calls this. exit_code
    (command.py) catches the errors. With --plan, print the plan and load nothing. The order
    matters: whatever can fail quickly (prompts, plan, output files) comes before the model is
    loaded.
    """
    set_threads(args.threads)
    options = load_options(args)  # joins the process group, which the last line leaves
    model = model_choice(args)
    config = generation_config(args, model)
    mode = make_mode(args, model)
    plan = make_plan(args, options, model, config, mode)
    if args.plan:
        return print_plan(plan, args, model, options)
    mode.open(model, asdict(config) | {name: getattr(args, name) for name in TEXT_OPTIONS})
    check_directory("--profile", args.profile)
    lm, stats = load(model, with_policy(options, plan))
    for line in [*model_lines(lm, model), *hints(lm, args)]:
        log(line)
    # In a pipeline of ranks the plan is for the rows of one of the pipeline's micro-batches.
    batch_size = plan.policy.rows * (options.micro_batches or 1) if plan else args.batch_size
    with profiled(args.profile):
        cache_length = plan and plan.workload.prompt + plan.workload.new
        mode.run(Session(lm, config, stats), batch_size, cache_length)
    for line in report(lm, stats, plan, args.flash):
        log(line)
    leave_process_group()


def load_options(args: argparse.Namespace) -> LoadOptions:
    """Returns the LoadOptions that `args` ask for, with this process's device and the ranks.

    The policy of an offloaded model is added later, by with_policy. Under torchrun, joins the
    process group. Downloads the draft model (--draft_checkpoint_path) if it is a repository.
    """
    device = local_device(find_device(args.device))
    ranks = join_process_group(device)
    micro_batches = args.micro_batches
    if args.pipeline and ranks:  # the plan, too, needs the number that load_model would choose
        from pp import default_micro_batches

        micro_batches = micro_batches or default_micro_batches(ranks)
    draft_model = args.draft_checkpoint_path  # None: --draft names the draft, or there is none
    return LoadOptions(
        device=str(device),
        dtype=None if args.dtype == "auto" else args.dtype,
        kv_dtype=args.kv_dtype,
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        draft=hub.resolve(draft_model) if draft_model else args.draft,
        speculate_k=None if args.speculate_k == "auto" else args.speculate_k,
        flash=flash_options(args) if args.flash else None,
        ranks=ranks,
        pipeline=args.pipeline,
        micro_batches=micro_batches,
    )


def flash_options(args: argparse.Namespace) -> FlashOptions:
    """Returns the options of --flash as a dataclass. Without --dram_budget, the memory is half of
    the weights' bytes."""
    return FlashOptions(
        args.dram_budget or 0.5, args.flash_window, args.flash_threads, args.flash_dir
    )


def model_choice(args: argparse.Namespace) -> ModelChoice:
    """Returns the model that the options name, by default the demo model of this repository.

    A Hugging Face repository is downloaded. Raises the errors of hub.resolve.
    """
    path = hub.resolve(args.checkpoint_path or DEMO, args.revision)
    return ModelChoice(path, args.random_weights, args.random_mode)


def generation_config(args: argparse.Namespace, model: ModelChoice) -> GenerationConfig:
    """Returns the sampling settings: each from its option, else from the model's
    generation_config.json, else the default.

    Logs the settings that come from the model. An option that the user did not give is None in
    `args`.
    """
    chosen = {field.name: getattr(args, field.name) for field in fields(GenerationConfig)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    path = model.checkpoint_path
    directory = path if path.is_dir() else path.parent
    defaults = {} if model.random_weights else model_defaults(directory)
    if defaults := {name: value for name, value in defaults.items() if name not in chosen}:
        log(defaults_line(defaults, directory))
    return GenerationConfig(**(defaults | chosen))


def make_mode(args: argparse.Namespace, model: ModelChoice) -> Mode:
    """Returns the mode that the options ask for: chat, benchmark or prompts.

    PromptMode reads the prompts here, so that an error in them comes before the model is loaded.
    """
    if args.interactive:
        from cli.interactive import ChatMode

        return ChatMode(args.system, args.chat_template_kwargs)
    if args.bench:
        from cli.benchmark import BenchMode

        about = {"model": model.name, "kv_dtype": args.kv_dtype, "compiled": args.compile}
        tokens = int(args.prompt[0]) if args.prompt else None  # check_values refuses other texts
        return BenchMode(tokens, args.batch_size or 1, args.repeats, about if args.json else None)
    from cli.prompts import PromptMode

    random = bool(model.random_weights)
    return PromptMode(PromptOptions.from_arguments(args, random_tokens=random))


def make_plan(
    args: argparse.Namespace,
    options: LoadOptions,
    model: ModelChoice,
    config: GenerationConfig,
    mode: Mode,
) -> "Plan | None":
    """Returns the plan of an offloaded model, the same on all ranks; None without offloading.

    options, model, config: what load_options, model_choice and generation_config returned.
    mode: its prompt_lengths gives the lengths of the prompts. Rank 0 computes the plan and sends it
    to all ranks.
    """
    if not is_placed(args):
        return None
    import plan

    choice = PlanOptions.from_arguments(
        args,
        micro_batches=options.micro_batches,
        any_dtype=args.dtype == "auto",
        # A config.json without weights stands for a model that the user may download later.
        downloaded=not model.random_weights,
    )
    lengths = partial(mode.prompt_lengths, new=config.max_new_tokens)
    return broadcast_from_rank0(
        lambda: plan.plan_texts(model, options, choice, lengths, config.max_new_tokens)
    )


def print_plan(
    plan: "Plan", args: argparse.Namespace, model: ModelChoice, options: LoadOptions
) -> None:
    """Print on stdout where each part of the model would be, and how fast it would run (--plan).
    Then leave the process group, as nothing follows.

    With --link, also print how fast 1 to 64 devices that are joined by such links would be.
    """
    from plan import find_model_spec, lines, on_devices

    for line in lines(plan):
        print(line, flush=True)
    if args.link:
        spec, _ = find_model_spec(model, options, args.compress_weight)
        for line in on_devices(spec, args.link, args.read_rate):
            print(line, flush=True)
    leave_process_group()


def check_directory(option: str, file: Path | None) -> None:
    """Raises FileNotFoundError, which names the option, if the file's directory does not exist."""
    if file and not file.parent.is_dir():
        raise FileNotFoundError(f"{option} {file}: there is no directory {file.parent}")


def with_policy(options: LoadOptions, plan: "Plan | None") -> LoadOptions:
    """Returns the options with the plan's policy, and logs the plan; without a plan, returns the
    options unchanged."""
    if plan is None:
        return options
    from plan import lines

    for line in lines(plan):
        log(line)
    return replace(options, policy=plan.policy)


def load(model: ModelChoice, options: LoadOptions) -> tuple[LoadedModel, Stats]:
    """Load the model, or make one with random weights. Returns it, and the Stats of this run, which
    have only the seconds that loading took."""
    start = time.perf_counter()
    if model.random_weights:
        scheme = make_scheme(model.random_mode) if model.random_mode else None
        lm = random_model(model.random_weights, options, scheme=scheme)
    else:
        lm = load_model(model.checkpoint_path, options)
    stats = Stats(lm)
    stats.load_seconds = time.perf_counter() - start
    return lm, stats


def model_lines(lm: LoadedModel, model: ModelChoice) -> Iterator[str]:
    """Yield lines for the log about the loaded model: weights, dtype, device, and draft model."""
    weight = lm.model.tok_embeddings.weight  # has the model's dtype and device
    nbytes = sum(tensor.nbytes for tensor, _ in stored_tensors(lm.model).values())
    yield (
        f"{model.name}: {count_weights(lm.model.args):,} weights in {size_text(nbytes)}, "
        f"{str(weight.dtype).removeprefix('torch.')} on {machine_name(weight.device)}"
    )
    if lm.draft and lm.draft.lm:
        reads = (size_text(m.bytes_per_step()) for m in (lm.draft.lm.model, lm.model))
        yield "draft: reads {} for a draft token, the model {} for a step".format(*reads)


def hints(lm: LoadedModel, args: argparse.Namespace) -> Iterator[str]:
    """Yield a line of advice for the log if a model with a chat template gets a plain prompt,
    without --chat."""
    hint = chat.template_hint(lm.tokenizer)
    if hint and not (args.chat or args.interactive or args.bench):
        yield hint


def report(lm: LoadedModel, stats: Stats, plan: "Plan | None", flash: bool) -> Iterator[str]:
    """Yield lines for the log after the run: times and rates, and what each feature in use did.

    stats: of the run; if its prefill_seconds are 0, it has no figures: all results existed already,
    or a benchmark used Stats of its own. plan: None if nothing is offloaded. flash: whether neurons
    are read from disk (--flash).
    """
    if stats.prefill_seconds:
        yield from stats.report(saved_bandwidth(lm.device))
    if not lm.any_rows:
        from compiled import graphs_report

        yield from graphs_report(lm.decode)
    if plan and stats.decoded_tokens:
        from plan import report as plan_report

        yield from plan_report(plan, lm, stats)
    if flash:
        from neurons.feed_forward import flash_report

        yield from flash_report(lm.model)
    if lm.draft:
        yield from lm.draft.controller.stats.lines()


@contextlib.contextmanager
def profiled(file: Path | None) -> Iterator[None]:
    """Profile the body of the with statement with torch.profiler, and write the trace to a file;
    None: do nothing. The file's directory must exist. chrome://tracing and ui.perfetto.dev show the
    trace."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(file))
    log(f"profile: {file}")

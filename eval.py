"""How good a model is: the perplexity of a text, or lm_eval's tasks. The command.

    python eval.py --checkpoint_path checkpoints/demo --perplexity text.txt
    python eval.py --checkpoint_path checkpoints/demo --tasks hellaswag winogrande

Start at run. evaluation/perplexity.py scores a text, and evaluation/harness.py, imported only for
--tasks, is the adapter to lm_eval. The figures go as JSON to stdout and to --output; everything
else goes to stderr. Under torchrun several ranks, which are processes, run one model together
(ranks.py).
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cli import command
from cli.early import find_inputs
from cli.options import parse_eval_args as parse_args

if __name__ == "__main__":  # before torch is imported, so that a wrong option is reported at once
    ARGS = command.begin(parse_args)
    find_inputs("eval.py", ARGS, ARGS.perplexity, output=ARGS.output)

from checkpoint import Checkpoint
from cli.command import exit_code
from decoding import LoadedModel
from evaluation.perplexity import DEFAULT_WINDOW, PerplexityOptions, perplexity
from host.devices import find_device
from host.files import DEMO, check_writable, json_text, read_text, write_whole
from host.log import log, set_quiet
from host.threads import set_threads
from layers.args import DTYPES
from load import load_model
from ranks import is_rank0, join_process_group, leave_process_group, local_device
from weights import hub

# Keys of lm_eval's results that are written to --output but not to stdout.
DETAILS = {"configs", "pretty_env_info", "group_subtasks", "higher_is_better"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the model; return the figures and the settings that they depend on (`conditions`).

    The text or the tasks are read before the model is loaded, so that a missing one is reported at
    once. Under torchrun every rank calls this. Raises the errors of hub.resolve, load_model and the
    evaluation.
    """
    args.checkpoint_path = hub.resolve(args.checkpoint_path or DEMO, args.revision)
    # A text, or the result of find_tasks: the options and the TaskManager of the tasks.
    source = read_text(args.perplexity) if args.perplexity else find_tasks(args)
    lm = load(args)
    settings = conditions(lm, args)
    log(
        f"{args.checkpoint_path}: {settings['dtype']} on {lm.model.tok_embeddings.weight.device}, "
        f"BOS: {settings['bos']}"
    )
    evaluate = evaluate_text if args.perplexity else evaluate_tasks
    figures = evaluate(lm, args, source)
    if args.limit:
        settings["note"] = f"--limit {args.limit}: a part of the data, not a score"
        log(settings["note"])
    leave_process_group()
    return settings | figures


def load(args: argparse.Namespace) -> LoadedModel:
    """Load the model on this rank's device, after joining the process group of torchrun, if any.

    Raises ValueError for --use_cache under torchrun: lm_eval's cache is for one process.
    """
    set_threads(args.threads)
    device = local_device(find_device(args.device))
    ranks = join_process_group(device)
    if ranks and args.use_cache:
        raise ValueError("--use_cache is for one process, without torchrun")
    return load_model(
        args.checkpoint_path,
        device=str(device),
        ranks=ranks,
        dtype=DTYPES.get(args.dtype),  # None for "auto": as stored
        kv_dtype=args.kv_dtype,
        compile=args.compile,
        # On a CPU compiled prefill, which scoring uses, is slower: 0.67x at 1.1 billion weights.
        compile_prefill=args.compile and device.type != "cpu",
    )


def conditions(lm: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the figures depend on, as entries of the output. "bos" says which
    token begins every text (BOS), or "none"; "kv_dtype" of None is the model's dtype."""
    bos = adds_bos(lm, args)
    return {
        "model": str(args.checkpoint_path),
        "dtype": str(lm.model.tok_embeddings.weight.dtype).removeprefix("torch."),
        "kv_dtype": args.kv_dtype,
        "bos": f"{lm.tokenizer.bos_token} before every text" if bos else "none",
        "chat_template": args.apply_chat_template,
        "limit": args.limit,
    }


def evaluate_text(lm: LoadedModel, args: argparse.Namespace, text: str) -> dict[str, Any]:
    """Return the figures of a text, from evaluation.perplexity.perplexity, which reads it in
    windows of --max_seq_length tokens, by default DEFAULT_WINDOW or, if shorter, the context."""
    length, bos = max_length(lm, args, DEFAULT_WINDOW), adds_bos(lm, args)
    options = PerplexityOptions(length, args.stride, args.limit, args.batch_size, bos)
    return perplexity(lm, text, str(args.perplexity), options)


def find_tasks(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the HarnessOptions of the arguments (fields and options have the same names), and the
    TaskManager, lm_eval's object that knows the tasks.

    Called before the model is loaded. Raises ImportError without lm_eval, and ValueError for an
    unknown task.
    """
    try:
        from evaluation import harness  # here: lm_eval takes seconds to import
    except ImportError as error:
        raise ImportError(
            f"--tasks needs lm_eval ({error}): ./scripts/setup.sh requirements-eval.lock"
        ) from error
    values = {name: getattr(args, name) for name in harness.HarnessOptions.__dataclass_fields__}
    values["task_data"] = dict(pair.split("=", 1) for pair in args.task_data)  # TASK=PATH
    if args.use_cache:
        values["use_cache"] = f"{args.use_cache}-{cache_key(args):08x}"
    options = harness.HarnessOptions(**values)
    return options, harness.find_tasks(options)


def evaluate_tasks(
    lm: LoadedModel, args: argparse.Namespace, options_and_manager: tuple[Any, Any]
) -> dict[str, Any]:
    """Run lm_eval's tasks, log the table of results, and return the results.

    options_and_manager: as returned by find_tasks. The results also have the number of texts that
    were too long and lost their beginning ("shortened"), and of continuations that have no token of
    their own after their context ("fused"). With --log_samples they contain each document and the
    model's answer ("samples").
    """
    from evaluation import harness

    length = max_length(lm, args, lm.model.args.context)
    model = harness.HarnessModel(lm, args.batch_size, length, adds_bos(lm, args))
    results = harness.run_tasks(model, *options_and_manager)
    for line in harness.table(results).splitlines():
        log(line)
    if model.shortened:
        log(f"{model.shortened:,} texts were longer than {length} tokens and lost their beginning")
    if model.fused:
        log(f"{model.fused:,} texts share all tokens with the text before: those were scored")
    counts = {"shortened": model.shortened, "fused": model.fused}
    return results | {"max_seq_length": length} | counts


def max_length(lm: LoadedModel, args: argparse.Namespace, default: int) -> int:
    """Return the most tokens that the model reads at once: --max_seq_length; without it `default`
    or, if shorter, the model's context. Raises ValueError for a --max_seq_length below 2 or above
    the context."""
    context = lm.model.args.context
    length = args.max_seq_length or min(default, context)
    if not 2 <= length <= context:
        raise ValueError(f"--max_seq_length {length} is not between 2 and the context, {context}")
    return length


def adds_bos(lm: LoadedModel, args: argparse.Namespace) -> bool:
    """Return whether every text begins with BOS: if the tokenizer adds one, without --no_bos."""
    return lm.tokenizer.adds_bos and not args.no_bos


def cache_key(args: argparse.Namespace) -> int:
    """Return a hash, 32 bits, of the path and modification time of the model's weight file or
    index, and of the settings that an answer depends on.

    It is part of the file name of lm_eval's cache (--use_cache), because lm_eval finds a stored
    answer by its request only: answers of another model or dtype must be in another file.
    """
    file = Checkpoint(args.checkpoint_path).path.resolve()
    model = str(file), file.stat().st_mtime_ns
    settings = args.dtype, args.kv_dtype, args.no_bos, args.max_seq_length
    return zlib.crc32(repr((*model, *settings)).encode())


def write(figures: dict[str, Any], output: Path | None) -> None:
    """Write the figures to stdout and to files: see destinations.

    If one of them cannot be written, the others are still written, and then the first OSError is
    raised. A file is written completely or not at all.
    """
    errors = []
    for write_one in destinations(figures, output):
        try:
            write_one()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    if output:
        log(f"written: {output}")


def destinations(figures: dict[str, Any], output: Path | None) -> Iterator[Callable[[], Any]]:
    """Yield one function for each destination, which writes to it: stdout, the file --output and,
    with --log_samples, a JSON Lines file for each task's documents. stdout gets no DETAILS.

    Removes "samples" from `figures`: documents are written to their own files only.
    """
    samples = figures.pop("samples", {})
    shown = {key: figures[key] for key in figures if key not in DETAILS}
    # Only ASCII: stdout may have another encoding than UTF-8.
    yield partial(print, to_json(shown, ensure_ascii=True), flush=True)
    if not output:
        return
    yield partial(write_whole, output, [to_json(figures, indent=2), "\n"])
    for task, documents in samples.items():
        file = output.with_name(f"{output.stem}.{task.replace('/', '_')}.jsonl")
        yield partial(write_whole, file, [f"{to_json(d)}\n" for d in documents])


def to_json(value: Any, **options: Any) -> str:
    """Return figures as JSON. Those of lm_eval contain values that JSON lacks: a set becomes a
    sorted list, a numpy number a number, and a function or other object its str. options: of
    json_text."""

    def plain(x: Any) -> Any:
        """Return what replaces a value that JSON lacks."""
        if isinstance(x, set):
            return sorted(x)
        return x.item() if hasattr(x, "item") else str(x)

    return json_text(value, default=plain, **options)


def main(args: argparse.Namespace) -> int:
    """Run the command; return its exit code: see exit_code in cli/command.py. Under torchrun only
    rank 0 writes the figures."""
    set_quiet(args.quiet)

    def work() -> None:
        """Evaluate and write the figures; exit_code turns errors into messages and exit codes."""
        if args.output and is_rank0():  # raise before hours of work, not after them
            check_writable(args.output)
        figures = run(args)
        if is_rank0():
            write(figures, args.output)

    more = "; the same command goes on from --use_cache" if args.use_cache else ""
    return exit_code("eval.py", work, f"stopped; no file was written{more}")


if __name__ == "__main__":
    sys.exit(main(ARGS))

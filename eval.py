"""How good a model is: perplexity of a text, or lm_eval's tasks. The command.

    python eval.py --checkpoint_path checkpoints/demo --perplexity text.txt
    python eval.py --checkpoint_path checkpoints/demo --tasks hellaswag winogrande

Start at run. Both modes score ids with scoring.py on what load_model makes of a checkpoint, dense
or quantised; harness.py, imported only for --tasks, is the way to lm_eval. The figures come as JSON
on stdout and, where asked for, in --output; everything else goes to stderr.
"""

import argparse
import math
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli import command
from cli.options import parse_eval_args as parse_args

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    ARGS = command.begin(parse_args)

from tqdm import tqdm

from checkpoint import DTYPES, Checkpoint
from cli.command import exit_code
from decoding import LoadedModel
from evaluation.scoring import Ids, log_likelihoods
from host.devices import find_device
from host.files import DEMO, check_writable, json_text, read_text, write_whole
from host.log import log, set_quiet
from host.memory import size_text
from host.threads import set_threads
from load import load_model
from ranks import is_rank0, join_process_group, leave_process_group, local_device
from weights import hub

WINDOW = 2048  # ids of a window of --perplexity, where the model's context has room
DETAILS = {"configs", "pretty_env_info", "group_subtasks", "higher_is_better"}  # not for stdout


def windows(ids: Ids, prefix: Ids, length: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """Sequences that score each id once, and the position where each begins to score.

    A window has `length` ids, of which the first are the prefix, and begins `stride` ids after the
    one before; what that scored is context here. Without a prefix the first id of all has nothing
    before it, and where windows do not overlap each one's first.
    """
    room, done = length - len(prefix), 0
    for begin in range(0, len(ids), stride):
        end = min(begin + room, len(ids))
        start = max(len(prefix) + done - begin, 1)
        if start < len(prefix) + end - begin:
            yield [*prefix, *ids[begin:end]], start
        done = end
        if end == len(ids):
            return


def first_of(limit: int | float | None, count: int) -> int:
    """How many of so many --limit leaves: that number, or, below 1, that share (as lm_eval)."""
    share = limit is not None and limit < 1
    return count if limit is None else math.ceil(count * limit) if share else limit


def perplexity(lm: LoadedModel, args: argparse.Namespace, text: str) -> dict[str, Any]:
    """Of a text, over windows: nats per token, perplexity, bits per byte, tokens/s."""
    ids, nbytes = lm.tokenizer.encode(text, bos=False, special=True), len(text.encode())
    length = max_length(lm, args, WINDOW)
    prefix = [lm.tokenizer.bos_id] if begins_with_bos(lm, args) else []
    room = length - len(prefix)
    stride = args.stride or room
    if not 0 < stride <= room:
        raise ValueError(f"--stride {stride} is not between 1 and {room}, a window's tokens")
    todo = list(windows(ids, prefix, length, stride))
    todo = todo[: first_of(args.limit, len(todo))]
    count = sum(len(window) - start for window, start in todo)
    if not count:
        raise ValueError(f"{args.perplexity} has {len(ids)} tokens: too few to score one")
    log(
        f"{args.perplexity}: {size_text(nbytes)}, {len(ids):,} tokens; "
        f"{len(todo):,} windows of {length}, stride {stride}, {count:,} tokens scored"
    )
    start = time.perf_counter()
    nats = nats_per_token(lm, todo, args.batch_size)
    seconds = time.perf_counter() - start
    return {
        "text": str(args.perplexity),
        "perplexity": math.exp(nats),
        "nats_per_token": nats,
        "bits_per_byte": nats / math.log(2) * len(ids) / nbytes,
        "tokens": count,
        "tokens_per_s": count / seconds,
        "max_seq_length": length,
        "stride": stride,
    }


def nats_per_token(
    lm: LoadedModel, sequences: Sequence[tuple[Ids, int]], batch_size: int | None = None
) -> float:
    """Of the ids that the sequences score, with a bar."""
    nats, total = 0.0, sum(len(ids) - start for ids, start in sequences)
    with tqdm(total=total, desc="perplexity", unit="token", unit_scale=True) as bar:
        for result in log_likelihoods(lm, sequences, batch_size):
            ids, start = sequences[result.number]
            nats -= result.nats
            bar.update(len(ids) - start)
    return nats / total


def find_tasks(args: argparse.Namespace) -> Any:
    """The tasks that are asked for, and how."""
    try:
        from evaluation import (
            harness,  # lm_eval takes seconds to import, and perplexity does without
        )
    except ImportError as error:
        raise ImportError(
            f"--tasks needs lm_eval ({error}): ./scripts/setup.sh requirements-eval.lock"
        ) from error
    given = {name: getattr(args, name) for name in harness.HarnessOptions.__dataclass_fields__}
    given["task_data"] = dict(pair.split("=", 1) for pair in args.task_data)
    if args.use_cache:
        given["use_cache"] = f"{args.use_cache}-{fingerprint(args):08x}"
    options = harness.HarnessOptions(**given)
    return harness, options, harness.find_tasks(options)


def tasks(lm: LoadedModel, args: argparse.Namespace, found: Any) -> dict[str, Any]:
    """lm_eval's results of its tasks, and with --log_samples what was asked and answered."""
    harness, options, manager = found
    length, bos = max_length(lm, args, lm.model.args.context), begins_with_bos(lm, args)
    model = harness.HarnessModel(lm, args.batch_size, length, bos)
    results = harness.run_tasks(model, options, manager)
    for line in harness.table(results).splitlines():
        log(line)
    if model.shortened:
        log(f"{model.shortened:,} texts were longer than {length} tokens and lost their beginning")
    if model.fused:
        log(f"{model.fused:,} texts share all tokens with the text before: those were scored")
    counts = {"shortened": model.shortened, "fused": model.fused}
    return results | {"max_seq_length": length} | counts


def max_length(lm: LoadedModel, args: argparse.Namespace, default: int) -> int:
    context = lm.model.args.context
    length = args.max_seq_length or min(default, context)
    if not 2 <= length <= context:
        raise ValueError(f"--max_seq_length {length} is not between 2 and the context, {context}")
    return length


def begins_with_bos(lm: LoadedModel, args: argparse.Namespace) -> bool:
    return lm.tokenizer.bos_id is not None and not args.no_bos


def fingerprint(args: argparse.Namespace) -> int:
    """Of all that an answer depends on but the question: other models have other caches."""
    file = Checkpoint(args.checkpoint_path).path.resolve()
    known = str(file), file.stat().st_mtime_ns, args.dtype, args.kv_dtype, args.no_bos
    return zlib.crc32(repr((*known, args.max_seq_length)).encode())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The figures, with how they came about. Raises what load_model and scoring.py raise."""
    args.checkpoint_path = hub.resolve(args.checkpoint_path or DEMO, args.revision)
    # What is wrong with it is said before a model is loaded.
    asked = read_text(args.perplexity) if args.perplexity else find_tasks(args)
    evaluate = perplexity if args.perplexity else tasks
    set_threads(args.threads)
    device = local_device(find_device(args.device))
    ranks = join_process_group(device)
    if ranks and args.use_cache:
        raise ValueError("--use_cache is for one process, without torchrun")
    lm = load_model(
        args.checkpoint_path,
        device=str(device),
        ranks=ranks,
        dtype=DTYPES.get(args.dtype),
        kv_dtype=args.kv_dtype,
        compile=args.compile,
        # On a CPU what is scored, many ids at once, runs slower compiled: 0.67x at 1.1 billion.
        compile_prefill=args.compile and device.type != "cpu",
    )
    bos = f"{lm.tokenizer.bos_token} before every text" if begins_with_bos(lm, args) else "none"
    weight = lm.model.tok_embeddings.weight
    how = {
        "model": str(args.checkpoint_path),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "kv_dtype": args.kv_dtype,
        "bos": bos,
        "chat_template": args.apply_chat_template,
        "limit": args.limit,
    }
    log(f"{args.checkpoint_path}: {how['dtype']} on {weight.device}, BOS: {bos}")
    figures = evaluate(lm, args, asked)
    if args.limit:
        how["note"] = f"--limit {args.limit}: a part of the data, not a score"
        log(how["note"])
    leave_process_group()
    return how | figures


def write(figures: dict[str, Any], output: Path | None) -> None:
    """The figures to stdout and to files, each of which is there whole or not at all.

    What was asked and answered goes to a file for each task, one line for each document. A place
    that cannot be written keeps nothing from the others; then the first such error is raised.
    """
    samples = figures.pop("samples", {})
    shown = {key: figures[key] for key in figures if key not in DETAILS}
    writing = [partial(print, to_json(shown, ensure_ascii=True), flush=True)]
    if output:
        writing.append(partial(write_whole, output, [to_json(figures, indent=2), "\n"]))
        for task, documents in samples.items():
            file = output.with_name(f"{output.stem}.{task.replace('/', '_')}.jsonl")
            writing.append(partial(write_whole, file, [f"{to_json(d)}\n" for d in documents]))
    errors = []
    for work in writing:
        try:
            work()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    if output:
        log(f"written: {output}")


def to_json(value: Any, **options: Any) -> str:
    """lm_eval's results hold numpy's numbers, sets and functions, too."""

    def plain(x: Any) -> Any:
        if isinstance(x, set):
            return sorted(x)
        return x.item() if hasattr(x, "item") else str(x)

    return json_text(value, default=plain, **options)


def main(args: argparse.Namespace) -> int:
    set_quiet(args.quiet)

    def work() -> None:
        if args.output and is_rank0():  # not after hours
            check_writable(args.output)
        figures = run(args)
        if is_rank0():
            write(figures, args.output)

    more = "; the same command goes on from --use_cache" if args.use_cache else ""
    return exit_code("eval.py", work, f"stopped; no file was written{more}")


if __name__ == "__main__":
    sys.exit(main(ARGS))

"""Documents per second of eval.py beside lm_eval's own Hugging Face backend, on the same tasks.

    python benchmarks/evaluate.py --data ../shared/data/eval/hellaswag_val_full.txt.bz2
    python benchmarks/evaluate.py --config benchmarks/configs/tinyllama-1.1b.json \\
        --tokenizer ../shared/data/tokenizers/llama-2 --limit 48 --data ...

Start at main. Both are lm_eval models that answer the same requests, tokenising included; they take
turns, and of the other's batch sizes the one goes on that is fastest on the first 128 requests. The
ceiling is the speed of our plain prefill, of as many ids as a call has and without an output head,
measured in the same run: padding, and all work beside the layers, falls short of it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import provenance
from benchmarks.common import CONFIG, ROOT, Others, exit_code, log, show, spread
from evaluation.scoring import CALL_LIMITS, build_prefix_trees
from layers.args import DTYPES
from load import load_model

DATA = ROOT / ".." / "shared" / "data" / "eval" / "hellaswag_val_full.txt.bz2"
CPU = torch.device("cpu")


def save_random(config: Path, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """A model of that shape, as transformers would initialise it."""
    import transformers

    made = transformers.AutoConfig.from_pretrained(config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def requests(task: str, data: Path, limit: int) -> list[Any]:
    """What lm_eval asks of a model for the first documents of a task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=ROOT / "scripts" / "tasks",
        include_defaults=False,
        metadata={"task_data": {task: str(data)}},
    )
    (found,) = manager.load([task])["tasks"].values()
    found.set_config("num_fewshot", 0)
    found.build_all_requests(limit=limit, rank=0, world_size=1)
    return found.instances


def timed(model: Any, asked: list[Any]) -> tuple[float, list[float]]:
    """Seconds, and the log-likelihoods."""
    start = time.perf_counter()
    answers = model.loglikelihood(asked, disable_tqdm=True)
    return time.perf_counter() - start, [nats for nats, _ in answers]


@torch.inference_mode()
def prefill_rate(model: Any) -> float:
    """Ids per second of the layers alone."""
    lm, (count, *_) = model.lm, CALL_LIMITS["cpu"]
    tokens = torch.arange(count).view(8, -1) % lm.model.args.vocab_size  # (8, T)
    key_pos = torch.arange(tokens.shape[1])
    given = tokens, key_pos.expand_as(tokens), key_pos, lm.make_caches(8, len(key_pos)), key_pos[:1]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        lm.model(*given)
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def counted(model: Any, asked: list[Any]) -> dict[str, int]:
    """Ids of all requests, and those that are left when what they share is read once."""
    pairs = [model._encode_pair(*request.args) for request in asked]
    whole = [[*before, *continuation][-(model.max_length + 1) :] for before, continuation in pairs]
    sequences = [
        (ids, len(ids) - len(continuation))
        for ids, (_, continuation) in zip(whole, pairs, strict=True)
    ]

    def fed(nodes: list[Any]) -> int:
        return sum(node.read_length + fed(node.children) for node in nodes)

    return {
        "ids": sum(len(ids) - 1 for ids in whole),
        "ids_read": fed(build_prefix_trees(sequences)),
    }


def measure(folder: Path, tokenizer: Any, asked: list[Any], args: Any) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    from evaluation.harness import HarnessModel

    documents = len({request.doc_id for request in asked})
    dtype = DTYPES[args.dtype]

    def ours(compiled: bool) -> HarnessModel:
        lm = load_model(folder, dtype=dtype, compile=compiled, compile_prefill=compiled)
        return HarnessModel(lm, None, lm.model.args.context, True)

    models = {"eager": ours(False)} | ({"compiled": ours(True)} if args.compile else {})
    given = {
        "pretrained": str(folder),
        "dtype": args.dtype,
        "device": "cpu",
        "tokenizer": tokenizer,
    }
    theirs = {n: HFLM(batch_size=n, add_bos_token=True, **given) for n in args.batch_sizes}
    ceiling, counts = prefill_rate(models["eager"]), counted(models["eager"], asked)
    log(f"prefill: {ceiling:.0f} ids/s; {counts['ids']} ids, {counts['ids_read']} to be read")
    few = asked[: min(len(asked), 128)]
    for name, model in models.items():
        log(f"{name}: the first call took {timed(model, few)[0]:.1f} s")
    tries = {n: timed(model, few)[0] for n, model in theirs.items()}
    best = min(tries, key=tries.__getitem__)
    log(f"lm_eval's backend: {', '.join(f'{n} rows {s:.1f} s' for n, s in tries.items())}")
    models["huggingface"] = theirs.pop(best)
    others = Others()
    rates, answers = alternate(models, asked, documents, args.rounds)
    found = compare(rates, answers, counts["ids_read"] / documents, ceiling)
    return (
        found
        | counts
        | {
            "documents": documents,
            "ceiling": ceiling,
            "batch_size": best,
            "others": others.share(),
        }
    )


def alternate(
    models: dict[str, Any], asked: list[Any], documents: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time the models in turn. Returns documents per second of each round, and the last answers."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    answers = {}
    for n in range(rounds):
        for name, model in models.items():
            seconds, answers[name] = timed(model, asked)
            rates[name].append(documents / seconds)
            log(f"round {n + 1}, {name}: {rates[name][-1]:.2f} documents/s")
    return rates, answers


def compare(
    rates: dict[str, list[float]],
    answers: dict[str, list[float]],
    ids_per_document: float,
    ceiling: float,
) -> dict[str, Any]:
    """Our rates and log-likelihoods beside those of lm_eval's backend. ceiling: ids per second of
    prefill."""
    found: dict[str, Any] = {name: spread(values) for name, values in rates.items()}
    for name in rates.keys() - {"huggingface"}:
        pairs = zip(rates[name], rates["huggingface"], strict=True)
        found[f"{name}, ratio"] = spread([a / b for a, b in pairs])
        pairs = zip(answers[name], answers["huggingface"], strict=True)
        found[f"{name}, largest difference"] = max(abs(a - b) for a, b in pairs)
        read = statistics.median(rates[name]) * ids_per_document
        found[f"{name}, share of prefill"] = read / ceiling
        log(
            f"{name}: {show(found[name])} documents/s, {show(found[f'{name}, ratio'])} of "
            f"lm_eval's {show(found['huggingface'])}; {read:.0f} ids/s, {read / ceiling:.0%} of "
            f"prefill; log-likelihoods differ by {found[f'{name}, largest difference']:.1e}"
        )
    return found


def main(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import lm_eval.models.huggingface  # noqa: F401
        import transformers
    except ImportError as error:
        raise ValueError(f"skipped: {error}; ./scripts/setup.sh requirements-test.lock") from error
    if not args.data.exists():
        raise ValueError(f"skipped: no {args.data}; give --data, a file of HellaSwag")
    asked = requests("hellaswag_local", args.data, args.limit)
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer = args.model, None
        if args.config:
            folder = Path(temporary)
            tokenizer = transformers.LlamaTokenizer.from_pretrained(
                args.tokenizer, add_bos_token=True
            )
            save_random(args.config, tokenizer, folder, DTYPES[args.dtype])
        found = measure(folder, tokenizer, asked, args)
    record = {
        "benchmark": "evaluate",
        "model": (args.config or args.model).name,
        "dtype": args.dtype,
    }
    return record | found | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    demo = ROOT / "checkpoints" / "demo"
    add("--model", type=Path, default=demo, help="a Hugging Face directory (default: the demo)")
    add("--config", type=Path, help=f"random weights of a shape instead, such as {CONFIG.name}")
    add("--tokenizer", type=Path, help="Llama's tokenizer.model, for --config")
    add("--data", type=Path, default=DATA, help="HellaSwag (default: that in ../shared/data)")
    add("--limit", type=int, default=400, help="documents (default: 400)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    add("--compile", action="store_true", help="a compiled model, too")
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="of the other (1 8 32)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

"""Is what a GPU generates right? Greedy ids against the CPU's, replay after replay, graphs counted.

    python benchmarks/gpu_check.py --modes dense int8 int4 --drafts

Start at `checks`: it yields what was asked, what should be and what came out, for each embedded
demo model, dense or quantised into a file that the CPU and the GPU both read. --device cpu tries
the script itself. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import provenance
from benchmarks.common import ROOT, exit_code, log
from checkpoint import Checkpoint
from decoding import LoadedModel
from engine import complete
from evaluation.scoring import log_likelihoods
from host.devices import find_device
from host.torch_private import compiled_graphs
from layers.args import DTYPES
from layers.kv_cache import KVCache, visible_length
from load import load_model, make_views
from quant.linear import make_scheme
from quantize import quantize
from text.generation_config import GenerationConfig

MODELS = ("demo", "demo-opt")
MODES = ("dense", "int8", "int4")
DRAFT_MODEL = ROOT / "checkpoints" / "demo-draft"
DRAFTS_OF = {  # drafts for a model whose weights are of that mode
    "dense": ("ngram", "self-int8", DRAFT_MODEL),
    "int8": ("self-int4",),
    "int4": (DRAFT_MODEL,),
}
TEXTS = (
    "Once upon a time",
    "The big dog ran to the park because",
    "One day, a little girl named Lily found a needle in her room. She knew it was",
    "Tom was sad",
)
NEW = 48  # tokens for each prompt
NEAR = 1e-2  # nats, of sums over NEW tokens
LENGTHS = (3, 40, 64, 90, 180, 300)  # of prompts; NEW more cross into larger sizes
CACHE_LENGTH = 512  # of every cache, kept or new: generate() makes no fewer
Check = tuple[str, Any, Any]  # what, wanted, found


def checks(
    path: Path, device: torch.device, dtype: torch.dtype, drafts: tuple[str | Path, ...]
) -> Iterator[Check]:
    on_cpu = load_model(path, device="cpu", dtype=dtype)
    eager = load_model(path, device=str(device), dtype=dtype)
    compiled = make_views(eager.model, eager.tokenizer, compile=True, compile_prefill=True)
    prompts = [eager.tokenizer.encode(text) for text in TEXTS]
    wanted = singly(on_cpu, prompts)
    yield "eager, one by one", wanted, singly(eager, prompts)
    yield "eager, a batch of 4", wanted, greedy(eager, prompts)
    yield "compiled, one by one", wanted, singly(compiled, prompts)
    yield "compiled, a batch of 4", wanted, greedy(compiled, prompts)
    likely = scored(on_cpu, prompts, wanted)
    for name, lm in (("eager", eager), ("compiled", compiled)):
        furthest = max(abs(a - b) for a, b in zip(likely, scored(lm, prompts, wanted), strict=True))
        yield f"log-likelihoods within {NEAR}, {name}", True, furthest < NEAR
    for draft in drafts:
        options = {"device": str(device), "dtype": dtype, "draft": draft, "compile": True}
        drafted = load_model(path, **options)
        name = getattr(draft, "name", draft)
        yield f"{name} draft tokens, one by one", wanted, singly(drafted, prompts)
        yield f"{name} draft tokens, a batch of 4", wanted, greedy(drafted, prompts)
        held = sum(drafted.draft.controller.stats.accepted)
        yield f"{name} draft tokens held now and then", True, held > 0
    yield from lengths(eager, device)


def scored(lm: LoadedModel, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Log-likelihoods of each answer after each prompt."""
    asked = [(prompt + answer, len(prompt)) for prompt in prompts for answer in answers]
    return [result.nats for result in sorted(log_likelihoods(lm, asked, 4))]


def lengths(eager: LoadedModel, device: torch.device) -> Iterator[Check]:
    """Prompts of many lengths through the same graphs, with caches kept and caches made anew."""
    torch.compiler.reset()
    compiled = make_views(eager.model, eager.tokenizer, compile=True, compile_prefill=True)
    text = eager.tokenizer.encode(" ".join(TEXTS * 8))
    prompts = [text[:n] for n in LENGTHS]
    wanted = singly(eager, prompts)
    kept = compiled.make_caches(1, CACHE_LENGTH)
    yield "caches kept, turn 1", wanted, singly(compiled, prompts, kept)
    graphs = compiled_graphs()
    yield "caches kept, turn 2", wanted, singly(compiled, prompts, kept)
    kept_graphs = recorded(compiled)
    for turn in (1, 2):
        yield f"new caches, turn {turn}", wanted, singly(compiled, prompts)
    yield "graphs compiled after turn 1", 0, compiled_graphs() - graphs
    sizes = {visible_length(n + i, CACHE_LENGTH) for n in LENGTHS for i in range(NEW)}
    log(f"  {len(sizes)} sizes of visible cache; {kept_graphs} CUDA graphs with caches kept")
    if device.type == "cuda":
        yield "no more CUDA graphs than sizes, caches kept", True, kept_graphs <= len(sizes)
        # generate() makes new caches for each prompt: their graphs are those of the first ones.
        new = recorded(compiled) - kept_graphs
        yield "no more CUDA graphs than sizes, new caches", True, new <= len(sizes)


def singly(
    lm: LoadedModel, prompts: list[list[int]], caches: list[KVCache] | None = None
) -> list[list[int]]:
    return [greedy(lm, [prompt], caches)[0] for prompt in prompts]


def greedy(
    lm: LoadedModel, prompts: list[list[int]], caches: list[KVCache] | None = None
) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, temperature=0, ignore_eos=True)
    return [completion.ids for completion in complete(lm, prompts, config, caches=caches)]


def recorded(lm: LoadedModel) -> int:
    """CUDA graphs that its decoding has recorded so far."""
    return getattr(lm.decode, "recorded", 0)


def difference(wanted: Any, found: Any) -> str:
    """Where rows of ids part, else the two values."""
    if not isinstance(wanted, list):
        return f"{found}, not {wanted}"
    first = [
        next((n for n, (a, b) in enumerate(zip(*rows, strict=True)) if a != b), None)
        for rows in zip(wanted, found, strict=True)
    ]
    return f"{NEW} tokens of each row, first that differs: {first}"


def main(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    failed: list[str] = []
    done = 0
    for name, mode in itertools.product(args.models, args.modes):
        log(f"{name}, {mode}, {args.dtype} on {device}")
        torch.compiler.reset()
        drafts = DRAFTS_OF[mode] if args.drafts else ()
        try:
            with stored(ROOT / "checkpoints" / name, mode) as path:
                for what, wanted, found in checks(path, device, dtype, drafts):
                    done += 1
                    verdict = "ok" if wanted == found else f"DIFFERS: {difference(wanted, found)}"
                    log(f"  {what}: {verdict}")
                    failed += [f"{name}, {mode}: {what}: {verdict}"] * (wanted != found)
        except Exception as error:  # the other models are to be checked all the same
            failed.append(f"{name}, {mode}: {type(error).__name__}: {error}")
            log(f"  {failed[-1]}")
    figures = {
        "benchmark": "gpu_check",
        "dtype": args.dtype,
        "checks": done,
        "failed": failed,
    } | provenance(device)
    if failed:
        print(json.dumps(figures))
        raise ValueError(f"{len(failed)} of {done} checks failed: {failed[0]}")
    return figures


@contextlib.contextmanager
def stored(directory: Path, mode: str) -> Iterator[Path]:
    """A checkpoint, quantised if the mode says so into a file that is gone afterwards."""
    if mode == "dense":
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(directory, Path(scratch) / directory.name)
        file = copy / f"model_{mode}.pth"
        quantize(Checkpoint(directory), make_scheme(mode), file)
        yield file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda", help="(default: cuda)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--modes", nargs="+", choices=MODES, default=["dense"], help="of weights (default: dense)")
    add("--drafts", action="store_true", help="with what may guess tokens too")
    add("--models", nargs="+", default=MODELS, help="under checkpoints/ (default: all that speak)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

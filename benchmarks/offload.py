"""Models larger than memory: their rates beside the disk's, and predicted beside measured rates.

    python benchmarks/offload.py stream     decoding from disk, beside raw reads of the same file
    python benchmarks/offload.py predict    many policies: predicted and measured tokens/s
    python benchmarks/offload.py grid       the planner's policy beside others that fit
    python benchmarks/offload.py compress   4-bit weights and cache beside bfloat16, from disk
    python benchmarks/offload.py resident   nothing offloaded, beside the plain path
    python benchmarks/offload.py peers      in half the memory: ours, accelerate, llama.cpp
    python benchmarks/offload.py contexts   the same after prompts of 512 tokens: many texts
    python benchmarks/offload.py budget     plans within memory limits that the kernel enforces
    python benchmarks/offload.py link       a GPU: layers in host memory, beside copies to it alone
    python benchmarks/offload.py check      random policies make the tokens of the model in memory

Start at MODES. Weights are random, in TinyLlama-1.1B's shape unless --config names another.
Compared runs alternate, and ceilings are measured in the same run. offload_peers.py writes the
files that the peers read.
"""

import argparse
import gc
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bench import provenance
from benchmarks.common import CONFIG, Others, exit_code, log, show, spread
from benchmarks.limited import OutOfMemory, unsupported_reason
from benchmarks.offload_peers import (
    Forms,
    beside_accelerate,
    beside_llama_cpp,
    beside_ourselves,
)
from engine import complete, generate
from host.memory import page_aligned
from load import DEMO, LoadedModel, config_dtype, load_model, place_caches, random_model
from plan import ModelSpec, Planner, Workload, machine, sizes
from text.generation_config import GenerationConfig
from tiers.policy import Policy, Share
from weights.hf import model_args
from weights.weight_files import read_json

CPU = torch.device("cpu")
SEED = 20261122
TEXTS = "Once upon a time", "Lily", "Tim saw a ball. They", "One day, a", "The sun", "A cat named"
RUNS = 3  # of a policy; the median counts
POLICIES_PER_PROBE = 3  # the machine's speed drifts, so it is measured again after these
PROMPT_TOKENS = 512  # of a long prompt
ANSWER_TOKENS = 128  # after such a prompt
ROW_COUNTS = 48, 32, 24, 16, 12, 8, 4  # tried until they fit
REQUESTS = (2**20, 8), (2**22, 4), (2**22, 8), (2**24, 4)  # bytes of a read, reads in flight


def run(lm: LoadedModel, rows: int, length: int, new: int) -> list[float]:
    """Return the seconds of the prompts, then of each step. Greedy, with prompts of random ids."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(lm.model.args.vocab_size, (rows, length), generator=generator).tolist()
    config = GenerationConfig(max_new_tokens=new, temperature=0, ignore_eos=True)
    times = [time.perf_counter()]
    for _ in generate(lm, ids, config):
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def raw_seconds(lm: LoadedModel) -> float:
    """Return the seconds of only reading the bytes of a step, with the best of REQUESTS."""
    layers = lm.model.layers
    scratch, _ = next(iter(layers.locations.values()))
    total = len(layers.locations) * layers.layout.nbytes
    file = os.open(f"/proc/self/fd/{scratch.fileno()}", os.O_RDONLY | os.O_DIRECT)

    def once(size: int, depth: int) -> float:
        memory = [memoryview(page_aligned(size, CPU).numpy()) for _ in range(depth)]

        def read(n: int) -> None:
            for at in range(n * size, total, depth * size):
                os.preadv(file, [memory[n][: min(size, total - at)]], at)

        start = time.perf_counter()
        with ThreadPoolExecutor(depth) as threads:
            list(threads.map(read, range(depth)))
        return time.perf_counter() - start

    best = min(once(*request) for request in REQUESTS)
    os.close(file)
    return best


def stream(args: argparse.Namespace) -> dict[str, Any]:
    """All layers on disk: a step, beside reads of its bytes and its computation alone."""
    figures = {}
    for rows in args.rows:
        policy = Policy(Share(0, 0), micro_batch=rows, directory=args.directory)
        moving = random_model(args.config, device=args.device, policy=policy)
        still = random_model(args.config, device=args.device)
        nbytes = len(moving.model.layers.locations) * moving.model.layers.layout.nbytes
        of_raw, of_slowest, rates = [], [], []
        for _ in range(args.repeats):
            raw = raw_seconds(moving)
            step = statistics.median(run(moving, rows, 32, args.new)[1:])
            raw = min(raw, raw_seconds(moving))
            computing = statistics.median(run(still, rows, 32, args.new)[1:])
            of_raw.append(raw / step)
            of_slowest.append(step / max(raw, computing))
            rates.append(nbytes / step / 1e9)
        log(
            f"{rows} rows: {show(spread(rates))} GB/s, {show(spread(of_raw))} of the raw rate; a "
            f"step takes {show(spread(of_slowest))} of its slowest resource"
        )
        figures[str(rows)] = {
            "bytes_per_step": nbytes,
            "gigabytes_per_s": spread(rates),
            "of_raw_rate": spread(of_raw),
            "of_slowest_resource": spread(of_slowest),
        }
    return {"rows": figures}


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """Random policies, to which nothing was fitted: predicted and measured tokens/s."""
    config = read_json(args.config)
    spec = ModelSpec(model_args(config), None, config_dtype(config), None, CPU)
    draw, off, results = random.Random(args.seed), [], []
    for n in tqdm(range(args.policies), disable=None):
        if n % POLICIES_PER_PROBE == 0:
            measured = machine(spec, args.directory, needed=True, anew=True)
            planner = Planner(sizes(spec), measured, True)
        policy = some_policy(draw, args.directory)
        work = Workload(policy.rows, args.prompt, args.new)
        plan = planner.predict(policy, work)
        lm = None
        gc.collect()  # the model before this one refers to itself
        lm = random_model(args.config, device=args.device, policy=policy)
        run(lm, policy.rows, 2, 2)  # by its end the disk has finished the writes
        runs = [run(lm, policy.rows, args.prompt, args.new) for _ in range(RUNS)]
        seconds = sorted(runs, key=sum)[RUNS // 2]
        achieved = policy.rows * args.new / sum(seconds)
        off.append(abs(plan.rate / achieved - 1))
        log(
            f"weights {policy.weights.device:3.0f} %, cache {policy.cache.device:3.0f} %, "
            f"{policy.micro_batches} of {policy.micro_batch} rows: {plan.rate:7.3f} tokens/s "
            f"predicted, {achieved:7.3f} measured; a step {max(plan.step.values()):.3f} s, "
            f"{statistics.median(seconds[1:]):.3f}; prompts {max(plan.prefill.values()):.2f} s, "
            f"{seconds[0]:.2f}"
        )
        shares = {"weights": policy.weights.device, "cache": policy.cache.device}
        grouping = {"micro_batch": policy.micro_batch, "micro_batches": policy.micro_batches}
        results.append(shares | grouping | {"expected": plan.rate, "achieved": achieved})
    off.sort()
    median, most = statistics.median(off), off[math.ceil(0.95 * len(off)) - 1]
    log(f"{len(off)} policies: off by {median:.1%}, 95 % of them by at most {most:.1%}")
    return {"median_error": median, "p95_error": most, "policies": results}


def grid(args: argparse.Namespace) -> dict[str, Any]:
    """The planner's policy beside a grid of others that fit into the same memory."""
    config = read_json(args.config)
    spec = ModelSpec(model_args(config), None, config_dtype(config), None, CPU)
    measured = machine(spec, args.directory, needed=True, anew=True)
    planner = Planner(sizes(spec), measured, True)
    work, budgets = Workload(48, args.prompt, args.new), {"device": 1.3e9, "disk": 1e12}
    chosen = planner.choose(work, budgets, Policy(directory=args.directory), work.texts).policy
    others = [fullest(planner, work, budgets, chosen, *way) for way in GRID]
    rates: dict[Policy, list[float]] = {}

    def measure(policies: Iterable[Policy], runs: int) -> None:
        for policy in policies:
            lm = random_model(args.config, device=args.device, policy=policy)
            run(lm, policy.rows, 2, 2)
            for _ in range(runs):
                seconds = sum(run(lm, policy.rows, work.prompt, work.new))
                tokens = work.texts * work.new / math.ceil(work.texts / policy.rows)
                rates.setdefault(policy, []).append(tokens / seconds)
            lm = None
            gc.collect()  # a model refers to itself
            log(f"{summary(policy)}: {rates[policy][-1]:.2f} tokens/s")

    measure(tqdm([chosen, *(other for other in others if other)], disable=None), 1)
    near = [p for p, found in rates.items() if p == chosen or found[0] > NEAR * rates[chosen][0]]
    for _ in range(args.repeats):  # alternating, because the machine's speed drifts
        measure(near, RUNS)
    medians = {p: statistics.median(found) for p, found in rates.items()}
    best = medians[chosen] / max(medians[p] for p in near)
    log(f"the chosen one, {summary(chosen)}, makes {best:.3f} of the best")
    return {"of_best": best, "tokens_per_s": {str(p): found for p, found in rates.items()}}


def summary(policy: Policy) -> str:
    return (
        f"{policy.micro_batches} of {policy.micro_batch} rows, weights "
        f"{policy.weights.device:.0f} %, cache {policy.cache.device:.0f} %"
    )


NEAR = 0.85  # policies above this share of the chosen one's rate are measured again
GRID = list(itertools.product((12, 24, 48), (1, 2, 4), (0, 100)))  # g, K, per cent of the cache


def fullest(
    planner: Planner,
    work: Workload,
    budgets: dict[str, float],
    like: Policy,
    g: int,
    K: int,
    cache: int,
) -> Policy | None:
    """Return the policy of this grouping with the most layers in memory, or None if none fits."""
    layers = planner.sizes.layers
    for kept in range(layers, -1, -1):
        grouped = replace(like, micro_batch=g, micro_batches=K, cache=Share(cache, 0))
        policy = replace(grouped, weights=Share(100 * kept / layers, 0))
        if (
            g * K <= work.texts
            and planner.predict(policy, work).memory["device"] <= budgets["device"]
        ):
            return policy
    return None


def some_policy(draw: random.Random, directory: Path) -> Policy:
    return Policy(
        weights=Share(draw.choice((0, 25, 50, 75, 100)), 0),
        cache=Share(draw.choice((0, 50, 100, 100)), 0),
        micro_batch=draw.choice((1, 2, 4, 8, 16, 32)),
        micro_batches=draw.choice((1, 2, 3, 4)),
        directory=directory,
    )


def compress(args: argparse.Namespace) -> dict[str, Any]:
    """All layers and the cache on disk: 4 bits beside bfloat16, alternating."""
    policy = Policy(Share(0, 0), Share(0, 0), micro_batch=args.rows[0], directory=args.directory)
    dense = random_model(args.config, device=args.device, policy=policy)
    packed = random_model(
        args.config,
        device=args.device,
        policy=replace(policy, compress_weight=True),
        kv_dtype="int4",
    )
    gains, rates = [], {"bfloat16": [], "4 bits": []}
    for _ in range(args.repeats):
        steps = {
            name: statistics.median(run(lm, args.rows[0], 128, args.new)[1:])
            for name, lm in (("bfloat16", dense), ("4 bits", packed))
        }
        for name, step in steps.items():
            rates[name].append(args.rows[0] / step)
        gains.append(steps["bfloat16"] / steps["4 bits"])
    log(f"4 bits make {show(spread(gains))} times the tokens/s of bfloat16")
    return {"gain": spread(gains), "tokens_per_s": {n: spread(r) for n, r in rates.items()}}


def resident(args: argparse.Namespace) -> dict[str, Any]:
    """Everything on the device, with a policy and without one, alternating."""
    rows = 2 * args.rows[0]
    policy = Policy(micro_batch=rows // 2, micro_batches=2, directory=args.directory)
    plain = random_model(args.config, device=args.device)
    one = random_model(args.config, device=args.device, policy=replace(policy, micro_batches=1))
    ratios = []
    for _ in range(args.repeats):
        a, b = (statistics.median(run(lm, rows, 32, args.new)[1:]) for lm in (plain, one))
        ratios.append(b / a)
    log(f"a step takes {show(spread(ratios), 3)} of the plain path's")
    return {"of_plain": spread(ratios)}


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """Limited to half the weights' bytes: one text, then each side's best number of texts."""
    forms = Forms(args.forms)
    limit = args.share * sum(f.stat().st_size for f in forms.hf.glob("*.safetensors"))
    if reason := unsupported_reason():
        raise ValueError(f"skipped: {reason}")
    ours = {"memory": limit, "directory": args.directory, "new_tokens": args.new}
    theirs = {"offload_folder": args.directory / "accelerate", "new_tokens": args.new}
    sides = {
        "ours, 1": lambda: beside_ourselves(forms, limit, batch=1, **ours),
        "llama.cpp, 1": lambda: beside_llama_cpp(
            forms, limit, peer_python=args.peer_python, threads=3, new_tokens=args.new
        ),
        "accelerate, 1": lambda: beside_accelerate(
            forms, limit, batch=1, memory=8e8, keep=True, threads=1, **theirs
        ),
        "ours, many": lambda: beside_ourselves(forms, limit, batch=256, **ours),
        "accelerate, many": lambda: beside_accelerate(
            forms, limit, batch=128, memory=4e8, keep=True, **theirs
        ),
    }
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            results[name].append(side())
            log(f"{name}: {results[name][-1]['tokens_per_s']:.2f} tokens/s")
    rates = {name: [run["tokens_per_s"] for run in runs] for name, runs in results.items()}
    ratios = {}
    for name, other in (
        ("ours, 1", "llama.cpp, 1"),
        ("ours, 1", "accelerate, 1"),
        ("ours, many", "accelerate, many"),
    ):
        pairs = zip(rates[name], rates[other], strict=True)
        ratios[f"{name} over {other}"] = spread([a / b for a, b in pairs])
        log(f"{name} over {other}: {show(ratios[f'{name} over {other}'])}")
    return {"limit_bytes": limit, "ratios": ratios, "runs": results}


def contexts(args: argparse.Namespace) -> dict[str, Any]:
    """The same limit, prompts of 512 tokens: accelerate keeps its cache in memory, a policy need
    not. The policy is chosen for the whole answer; only its first tokens are generated.
    """
    forms = Forms(args.forms)
    limit = args.share * sum(f.stat().st_size for f in forms.hf.glob("*.safetensors"))
    if reason := unsupported_reason():
        raise ValueError(f"skipped: {reason}")
    common = {"new_tokens": args.new, "prompt_length": PROMPT_TOKENS}
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "accelerate": []}
    placed = {"memory": 4e8, "offload_folder": args.directory / "accelerate", "keep": True}
    for rows in ROW_COUNTS:
        try:
            run = beside_accelerate(forms, limit, batch=rows, **placed, **common)
        except OutOfMemory:
            log(f"accelerate, {rows} rows: killed")
            continue
        log(f"accelerate, {rows} rows: {run['tokens_per_s']:.2f} tokens/s")
        runs["accelerate"].append(run | {"rows": rows})
        if len(runs["accelerate"]) == 2:  # the most rows that fit, and fewer
            break
    ours = {"memory": limit, "directory": args.directory, "answer": ANSWER_TOKENS}
    for rows in args.rows:
        runs["ours"].append(beside_ourselves(forms, limit, batch=rows, **ours, **common))
        log(f"ours, {rows} rows: {runs['ours'][-1]['tokens_per_s']:.2f} tokens/s")
    best = {
        side: max(run["tokens_per_s"] for run in found) for side, found in runs.items() if found
    }
    log(f"ours over accelerate: {best['ours'] / best['accelerate']:.2f}")
    return {"limit_bytes": limit, "ratio": best["ours"] / best["accelerate"], "runs": runs}


def budget(args: argparse.Namespace) -> dict[str, Any]:
    """Plans within a budget, under a limit of 1.05 times the budget: a larger run is killed."""
    forms, runs = Forms(args.forms), []
    if reason := unsupported_reason():
        raise ValueError(f"skipped: {reason}")
    for memory, batch in itertools.product((0.9e9, 1.3e9, 2e9), (1, 96)):
        given = {"memory": memory, "directory": args.directory, "new_tokens": args.new}
        found = beside_ourselves(forms, int(1.05 * memory), batch=batch, **given)
        planned = found["planned_bytes"]["device"]
        peak = found["peak_rss_bytes"]
        log(
            f"budget {memory / 1e9:.1f} GB, {found['rows']} rows: planned {planned / 1e9:.2f}, "
            f"took {peak / 1e9:.2f} GB; {found['tokens_per_s']:.2f} tokens/s"
        )
        runs.append({"budget": memory, "of_budget": peak / memory} | found)
    worst = max(run["of_budget"] for run in runs)
    log(f"at most {worst:.3f} of the budget")
    return {"worst": worst, "runs": runs}


def link(args: argparse.Namespace) -> dict[str, Any]:
    """All layers in host memory: a step beside pinned copies of its bytes; then with the cache in
    host memory, and attention on the device or the host; without overlap; with layers of 4 bits."""
    g, K = args.rows[0], 4
    policy = Policy(Share(0, 100), micro_batch=g, micro_batches=K, directory=args.directory)
    lm = random_model(args.config, device=args.device, policy=policy)
    away = replace(policy, cache=Share(0, 100))
    ways = {
        "cache on the device": policy,
        "cache on the host": away,
        "attention there": replace(away, cpu_attention=True),
        "no overlap": replace(policy, overlap=False),
    }
    nbytes, figures = len(lm.model.layers) * lm.model.layers.layout.nbytes, {}
    for name, way in ways.items():
        lm.model.layers.set_policy(way)
        placed = replace(lm, new_caches=partial(place_caches, way))
        ceiling = copy_rate(lm)
        step = statistics.median(run(placed, g * K, args.prompt, args.new)[1:])
        figures[name] = {"tokens_per_s": g * K / step, "of_link": nbytes / step / ceiling}
        log(
            f"{name}: {g * K / step:.1f} tokens/s, {nbytes / step / ceiling:.2f} of the link's rate"
        )
    sixteen, lm, placed = figures[next(iter(ways))]["tokens_per_s"], None, None
    gc.collect()  # a model refers to itself
    packed = random_model(
        args.config, device=args.device, policy=replace(policy, compress_weight=True)
    )
    step = statistics.median(run(packed, g * K, args.prompt, args.new)[1:])
    figures["4 bits"] = {"tokens_per_s": g * K / step, "of_16_bits": g * K / step / sixteen}
    log(f"4 bits: {g * K / step:.1f} tokens/s, {g * K / step / sixteen:.2f} times as many")
    return figures | {"link_bytes_per_s": ceiling}


def copy_rate(lm: LoadedModel) -> float:
    """Return the bytes per second of copies from pinned memory to the device, a layer at a time."""
    size = lm.model.layers.layout.nbytes
    there = page_aligned(size, CPU, pinned=lm.device.type == "cuda")
    here = page_aligned(size, lm.device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        here.copy_(there)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Check that random policies generate the tokens of the model in memory, for both families."""
    draw, wrong = random.Random(args.seed), []
    for name in ("demo", "demo-opt"):
        options = {"device": args.device, "dtype": torch.float32}
        still = load_model(DEMO.parent / name, **options)
        for _ in range(args.policies):
            shares = [
                Share(a := draw.choice((0, 30, 100)), draw.uniform(0, 100 - a)) for _ in range(3)
            ]
            policy = Policy(
                *shares,
                micro_batch=draw.randint(1, 3),
                micro_batches=3,
                cpu_attention=draw.random() < 0.5,
                directory=args.directory,
            )
            moving = load_model(DEMO.parent / name, policy=policy, **options)
            if tokens(moving) != tokens(still):
                wrong.append(str(policy))
    if wrong:
        raise ValueError(f"{len(wrong)} policies make other tokens: {wrong[0]}")
    return {"policies": 2 * args.policies}


def tokens(lm: LoadedModel) -> list[list[int]]:
    ids = [lm.tokenizer.encode(text) for text in TEXTS]
    return [c.ids for c in complete(lm, ids, GenerationConfig(max_new_tokens=24, temperature=0))]


MODES = {
    "stream": stream,
    "predict": predict,
    "grid": grid,
    "compress": compress,
    "resident": resident,
    "peers": peers,
    "contexts": contexts,
    "budget": budget,
    "link": link,
    "check": check,
}


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    others = Others()
    figures = MODES[args.mode](args)
    return {
        "benchmark": f"offload {args.mode}",
        "config": args.config.stem,
        **figures,
        "others": others.share(),
    } | provenance(torch.device(args.device))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--forms", type=Path, default=Path("/tmp/peers"), help="as offload_peers.py wrote them")
    add("--peer_python", default="/tmp/llama/bin/python", help="has llama-cpp-python")
    add("--share", type=float, default=0.5, help="of the weights' bytes, for peers (default: 0.5)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--directory", type=Path, default=Path("offload"), help="on the disk to be used")
    add("--rows", type=int, nargs="+", default=[1, 16], help="(default: 1 and 16)")
    add("--repeats", type=int, default=5, help="rounds (default: 5)")
    add("--prompt", type=int, default=16, help="tokens (default: 16)")
    add("--new", type=int, default=8, help="tokens of a run (default: 8)")
    add("--policies", type=int, default=24, help="of predict (default: 24)")
    add("--seed", type=int, default=SEED, help="of the policies")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

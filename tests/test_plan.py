"""Plans: against brute force over every split, against what runs really take, and on bad input."""

import argparse
import dataclasses
import itertools
import json
import platform
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import ROOT, window_slack

import generate
import plan
from cli.arguments import nbytes
from cli.options import parse_args
from load import load_model
from options.settings import PlanOptions
from plan import ModelSpec, sizes
from tiers.kv_cache import TieredCaches
from tiers.planner import Planner, Prediction, Sizes, Split, Workload
from tiers.policy import Policy, Share
from tiers.probe import Curve, Machine, sample_args
from weights.hf import model_args
from weights.weight_files import read_json

SEED = 20261122
MB = 10**6


def line(rate: float, start: float = 1e-4) -> Curve:
    """Seconds of a call: a start, then bytes at a rate."""
    return Curve((1e5, 1e8), (start + 1e5 / rate, start + 1e8 / rate))


def some_machine(draw: random.Random) -> Machine:
    disk = draw.uniform(0.3e9, 5e9)
    link = draw.uniform(3e9, 50e9)
    token = draw.uniform(1e-5, 1e-3)
    return Machine(
        stream=disk,
        read=line(disk),
        write=line(disk / 2),
        to_device=line(link),
        to_host=line(link),
        products=Curve((1, 64, 512), (20 * token, 24 * token, 24 * token + 448 * token)),
        per_position=draw.uniform(1e-9, 1e-6),
        per_pair=draw.uniform(1e-9, 1e-7),
        host_per_position=draw.uniform(1e-8, 1e-5),
    )


def some_sizes(draw: random.Random, *windows: int | None) -> Sizes:
    """windows: the pattern of the layers' sliding windows; none: no layer has one."""
    layer, layers = draw.randint(20, 200) * MB, draw.randint(2, 6)
    return Sizes(
        layers=layers,
        layer=layer,
        layer_on_device=layer,
        layer_in_buffer=layer,
        always_on_device=draw.randint(50, 200) * MB,
        head=draw.randint(10, 50) * MB,
        cache_position=draw.choice((1000, 20_000)),
        activations_between_layers=10_000,
        activations_in_layer=50_000,
        logits=100_000,
        windows=tuple(itertools.islice(itertools.cycle(windows or (None,)), layers)),
    )


@pytest.mark.parametrize("device_is_cpu", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("number", range(8))
def test_the_chosen_policy_is_nearly_the_best_of_all(number: int, device_is_cpu: bool):
    """Of every number of layers and cells on each tier, for each grouping that is tried."""
    draw = random.Random(SEED + number)
    windows = (150, None) if number % 2 else ()
    planner = Planner(some_sizes(draw, *windows), some_machine(draw), device_is_cpu)
    work = Workload(texts=draw.choice((1, 6)), prompt=draw.randint(8, 300), new=draw.randint(2, 64))
    whole = planner.sizes.layers * planner.sizes.layer
    # So small a share of the layers fits on a GPU that host memory decides.
    share = draw.uniform(*((0.9, 1.3) if device_is_cpu else (0.2, 1.0)))
    device = planner.sizes.always_on_device + share * whole
    budgets = {"device": device, "disk": 1e12}
    if not device_is_cpu:
        host = {"host": draw.uniform(0.5, 1.2) * whole}
        budgets = {"device": budgets["device"], **host, "disk": 1e12}
    with window_slack(16):
        try:
            chosen = planner.choose(work, budgets, Policy(), work.texts)
        except ValueError:
            chosen = None
        best = max(every_rate(planner, work, budgets), default=None)
    assert (chosen is None) == (best is None)
    if chosen:
        assert all(chosen.memory[tier] <= budgets[tier] for tier in budgets)
        assert chosen.rate >= 0.95 * best, (number, chosen, best)


def every_rate(planner: Planner, work: Workload, budgets: dict[str, float]) -> list[float]:
    """The rates of the policies that fit, by the parts of Planner.predict, to compute each once."""
    rates, layers = [], planner.sizes.layers
    for policy in planner.groupings(Policy(), work.texts):
        cells = layers * policy.micro_batches
        weights = splits(layers, planner.device_is_cpu, 1)
        caches = splits(cells, planner.device_is_cpu, max(1, cells // 6))
        counts = [weight.counts(layers) for weight in weights]
        for cache in caches:
            policy = dataclasses.replace(policy, cache=cache)
            cell_counts = planner.cell_counts(policy, work)
            for weight, count in zip(weights, counts, strict=True):
                split = Split(count, cell_counts)
                memory = planner.memory(policy, split, work)
                if all(memory[tier] <= budgets[tier] for tier in budgets):
                    policy = dataclasses.replace(policy, weights=weight)
                    times = planner.times(policy, split, work)
                    rates.append(Prediction(policy, work, split, memory, *times).rate)
    return rates


def splits(total: int, device_is_cpu: bool, step: int) -> list[Share]:
    counts = {*range(0, total, step), total}
    return [
        Share(100 * device / total, 100 * host / total)
        for device in counts
        for host in ({0} if device_is_cpu else counts)
        if device + host <= total
    ]


def test_a_budget_that_is_too_small_says_what_would_do():
    draw = random.Random(SEED)
    planner = Planner(some_sizes(draw), some_machine(draw), True)
    work = Workload(1, 64, 8)
    least = planner.predict(
        Policy(Share(0, 0), Share(0, 0), micro_batch=1, prefill_chunk_tokens=1024), work
    )
    needed = least.memory["device"]
    planner.choose(work, {"device": needed + 1, "disk": 1e12}, Policy(), 1)
    with pytest.raises(ValueError, match=r"does not fit: it needs .* of memory and may take"):
        planner.choose(work, {"device": needed - 1, "disk": 1e12}, Policy(), 1)


def test_bytes_on_disk_are_those_that_are_planned(tmp_path: Path):
    lm = load_model(ROOT / "checkpoints" / "demo", device="cpu", dtype=torch.float32)
    spec = ModelSpec(lm.model.args, None, torch.float32, None, lm.device)
    policy = Policy(Share(50, 0), Share(0, 0), micro_batch=2, micro_batches=3, directory=tmp_path)
    planned = Planner(sizes(spec), None, True).predict(policy, Workload(6, 60, 39))
    moving = load_model(lm_path(), device="cpu", dtype=torch.float32, policy=policy)
    layers = moving.model.layers
    weights = layers.tiers.count("disk") * layers.layout.nbytes
    caches = moving.make_caches(6, 99)
    assert isinstance(caches, TieredCaches)
    cells = sum(cell.kind.layout.nbytes for cache in caches for cell in cache.cells if cell.store)
    assert 0.95 < planned.memory["disk"] / (weights + cells) <= 1.05


@pytest.mark.parametrize("cache", [Share(0, 0), Share(40, 0)], ids=str)
def test_bytes_of_rings_on_disk_are_those_that_are_planned(
    cache: Share, family_folder: Callable[[str], Path], tmp_path: Path
):
    with window_slack(16):
        policy = Policy(cache=cache, micro_batch=2, micro_batches=3, directory=tmp_path)
        options = {"device": "cpu", "dtype": torch.float32, "policy": policy}
        lm = load_model(family_folder("gemma3"), **options)
        spec = ModelSpec(lm.model.args, None, torch.float32, None, lm.device)
        planned = Planner(sizes(spec), None, True).predict(policy, Workload(6, 150, 30))
        on_disk = [
            sum(buffer.nbytes for buffer in cell.kind.resident(lm.device).buffers())
            for cache in lm.make_caches(6, 180)
            for cell in cache.cells
            if cell.store
        ]
    assert planned.memory["disk"] == pytest.approx(sum(on_disk)) and len(set(on_disk)) == 2


def test_prompts_are_planned_in_the_chunks_that_rings_take():
    """A pass for each 512 tokens of a row, each of which reads the layers on the disk."""
    draw = random.Random(SEED)
    with_rings, without = some_sizes(draw, 512, None), some_sizes(random.Random(SEED))
    policy, work = Policy(Share(0, 0), micro_batch=1), Workload(1, 8192, 8)
    machine = some_machine(draw)
    chunks = [Planner(s, machine, True).chunk_tokens(policy, work) for s in (with_rings, without)]
    assert chunks == [512, policy.prefill_chunk_tokens]
    assert Planner(with_rings, machine, True).chunk_tokens(policy, Workload(1, 900, 8)) == 900


def lm_path() -> Path:
    return ROOT / "checkpoints" / "demo"


@pytest.mark.parametrize(
    ("text", "count"), [("6GB", 6e9), ("1.5GiB", 1.5 * 2**30), ("512M", 512e6), ("1000", 1000)]
)
def test_amounts_of_memory(text: str, count: float):
    assert nbytes(text) == int(count)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.4", "six", "1e9"])
def test_what_is_no_amount_of_memory(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="amount of memory"):
        nbytes(text)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, (16, 2)),
        ({"batch_size": 40}, (20, 2)),
        ({"batch_size": 5}, (2, 2)),
        ({"batch_size": 1}, (1, 1)),
        ({"batch_size": 1000}, (50, 2)),  # as many as there are texts
        ({"batch_size": 40, "gpu_batch_size": 3}, (3, 2)),
    ],
    ids=str,
)
def test_micro_batches_by_hand_share_the_rows_of_the_batch(given: dict, rows: tuple[int, int]):
    options = PlanOptions(percent=(100, 0, 100, 0, 100, 0), num_gpu_batches=2, **given)
    found = plan.policy_by_hand(Policy(), Workload(100, 8, 8), options)
    assert (found.micro_batch, found.micro_batches) == rows


def test_micro_batches_of_a_pipeline_share_the_rows_of_batch_size(monkeypatch: pytest.MonkeyPatch):
    args = model_args(json.loads((lm_path() / "config.json").read_text()))
    spec = ModelSpec(args, None, torch.bfloat16, None, torch.device("cpu"))
    monkeypatch.setattr(plan, "find_model_spec", lambda *given: (spec, None))
    monkeypatch.setattr(plan, "make_plan", lambda spec, work, options: (work, options))
    given = PlanOptions(batch_size=64, micro_batches=4)
    work, options = plan.plan_texts(None, None, given, lambda tokenizer, args: [8] * 250, 8)
    assert (work.texts, options.batch_size) == (63, 16)


def test_a_call_of_a_layer_gets_one_row_at_least():
    policy = Policy(micro_batch=4, tokens_at_once=512)
    assert [policy.rows_per_call(tokens) for tokens in (1, 128, 200, 512, 513)] == [4, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "at_once"),
    [(100, 400), (200, 512), (600, 600), (5000, 1024)],  # chunks of 4096 tokens: 1024 of each row
)
def test_activations_of_a_layer_are_those_of_whole_rows(prompt: int, at_once: int):
    args = model_args(json.loads((lm_path() / "config.json").read_text()))
    spec = ModelSpec(args, None, torch.bfloat16, None, torch.device("cpu"))
    parts = dataclasses.replace(sizes(spec), activations_between_layers=0, logits=0)
    policy, work = Policy(micro_batch=4, tokens_at_once=512), Workload(4, prompt, 8)
    found = Planner(parts, None, True).activation_bytes(policy, work)
    assert found == at_once * parts.activations_in_layer


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ranks_share_the_memory_of_the_host_and_not_that_of_the_gpus(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = {"cpu": 800, "cuda": 500}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(plan, "available_memory", lambda device: free[device.type])
    monkeypatch.setattr(plan, "process_memory", lambda device: 80 * (device.type == "cpu"))
    monkeypatch.setattr(plan, "RESERVED_SHARE", 0.0)
    options = PlanOptions(offload_dir=tmp_path)
    found = plan.budgets(options, torch.device(kind), 0)
    found.pop("disk")
    assert found == ({"device": 280} if kind == "cpu" else {"host": 200, "device": 500})
    given = dataclasses.replace(options, device_memory=7.0)
    assert plan.budgets(given, torch.device(kind), 0)["device"] == 7
    given = dataclasses.replace(given, host_memory=5.0)
    limited = plan.budgets(given, torch.device(kind), 0)
    assert limited["device" if kind == "cpu" else "host"] == 5


def test_curves_are_straight_between_points_and_beyond():
    curve = Curve((1, 3, 5), (10.0, 20.0, 40.0))
    assert [curve(size) for size in (0.5, 1, 2, 3, 4, 5, 7)] == [10, 10, 15, 20, 30, 40, 60]


def test_large_layers_are_timed_in_part():
    big = load_model(lm_path(), device="cpu").model.args
    big = dataclasses.replace(big, dim=8192, n_heads=64, n_kv_heads=8, hidden_dim=28672)
    small = sample_args(big, 4 * 2**29)
    assert (small.dim, small.n_heads, small.n_kv_heads, small.hidden_dim) == (4096, 32, 4, 14336)
    assert small.n_layers == 1


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """In the place of this machine's measurements, which take time."""
    machine = some_machine(random.Random(SEED))
    monkeypatch.setattr(plan, "machine", lambda *given: machine)
    return machine


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture) -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs generate.py in this process."""

    def run(*options: object) -> subprocess.CompletedProcess:
        args = parse_args(["--device", "cpu", *map(str, options)])
        capfd.readouterr()
        code = generate.main(args)
        return subprocess.CompletedProcess(options, code, *capfd.readouterr())

    return run


def test_a_run_by_hand_says_what_was_realised(
    run_command: Callable[..., subprocess.CompletedProcess], tmp_path: Path
):
    options = "--prompt", "Once upon a time", "--max_new_tokens", 20, "--temperature", 0
    plainly = run_command(*options)
    shares = "--percent", 30, 20, 50, 0, 100, 0, "--offload_dir", tmp_path
    moving = run_command(*options, *shares, "--gpu_batch_size", 1, "--num_gpu_batches", 2)
    assert moving.returncode == 0, moving.stderr
    assert moving.stdout == plainly.stdout
    assert "weights     50.0 % memory, 50.0 % disk" in moving.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_a_config_alone(
    run_command: Callable[..., subprocess.CompletedProcess], tmp_path: Path
):
    config = json.loads((lm_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = "--random_weights", tmp_path / "config.json", "--prompt", 64, "--plan"
    found = run_command(*options, "--offload_dir", tmp_path, "--max_new_tokens", 16)
    assert found.returncode == 0, found.stderr
    verdict, *more = found.stdout.splitlines()
    assert re.fullmatch(r"plan: fits memory; about \S+ tokens/s; bound by computing", verdict)
    assert "device" not in found.stdout and any("is free" in line for line in more)
    again = run_command(*options, "--offload_dir", tmp_path / "none", "--host_memory", "1MB")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert again.returncode == 2
    assert "does not fit" in again.stderr and "allow more" in again.stderr.splitlines()[-1]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What a measurement asks for: its key, and the arguments of use_fast_layers. It measures
    nothing, and a CPU with AVX2 and a compiler is assumed."""
    asked: dict[str, list] = {"keys": [], "layers": []}
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.delenv("GPT_FLEX_ISA", raising=False)
    has = dict.fromkeys(("avx2", "fma3", "f16c", "bmi2"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(plan, "load_measurement", lambda name, key: asked["keys"].append(key))
    monkeypatch.setattr(plan, "save_measurement", lambda *given: None)
    monkeypatch.setattr(plan, "probe", lambda *given: some_machine(random.Random(SEED)))
    monkeypatch.setattr(plan, "use_fast_layers", lambda *given: asked["layers"].append(given[1:]))
    return asked


def dense_spec(dtype: torch.dtype, device: str = "cpu") -> ModelSpec:
    args = model_args(read_json(ROOT / "checkpoints" / "demo" / "config.json"))
    return ModelSpec(args, None, dtype, None, torch.device(device))


def test_the_layer_that_is_measured_runs_on_the_kernels_of_the_whole_model(
    probed: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = dense_spec(torch.bfloat16)
    plan.machine(spec, tmp_path, needed=True)
    # More than the layer that is measured has, and less than the model.
    monkeypatch.setattr("fast_layers.cpu.MIN_DENSE_BYTES", sizes(spec).layer + 2**18)
    plan.machine(spec, tmp_path, needed=True)
    assert probed["layers"] == [(torch.bfloat16, False), (torch.bfloat16, True)]


def test_what_was_measured_counts_for_its_instruction_set_alone(
    probed: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = dense_spec(torch.bfloat16)
    for chosen in ("", "scalar", ""):
        monkeypatch.setenv("GPT_FLEX_ISA", chosen)
        plan.machine(spec, tmp_path, needed=False)
    first, scalar, again = probed["keys"]
    assert first == again != scalar


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_make_half_precision_as_fast_as_float32(
    probed: dict[str, list], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    spec = dense_spec(dtype)
    assert plan.multiplies_fast(dense_spec(torch.float32))
    assert not plan.multiplies_fast(spec)  # a small model runs on PyTorch's products
    monkeypatch.setattr("fast_layers.cpu.MIN_DENSE_BYTES", 0)
    assert plan.multiplies_fast(spec)
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    assert not plan.multiplies_fast(spec)

"""What a GPU would run, on a device that is pretended: nothing is mixed up, no stream overtakes
another, and the text is the CPU's."""

import dataclasses
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from common import ROOT, complete_ids, window_slack
from pretended_cuda import CUDA, Race, here, pretended_cuda
from test_flash import foresee, sparse, texts
from test_flash import in_memory as demo_in_memory
from test_offload import GREEDY, SEED, TEXTS, demo, some_policy
from test_offload import ids as all_ids
from torch import Tensor

import flash
from calibration import predictor
from layers.kv_cache import KVCache, sdpa_attention
from load import LoadedModel, load_model, meta_model, random_filler
from model import Transformer
from neurons import feed_forward
from neurons.feed_forward import neuron_source
from neurons.records import KINDS
from quant.linear import Int4Linear
from tiers.host_attention import HostAttention
from tiers.policy import Policy, Share
from tiers.probe import probe
from weights.allocation import allocate

TEXT = "Once upon a time there was a little dog. He liked to play in the sun. " * 20
DEVICE = "cuda:0"
POLICIES = 6  # of both families in turn
FEW = dataclasses.replace(GREEDY, max_new_tokens=4)


def ids(lm: LoadedModel, **options: Any) -> list[list[int]]:
    return all_ids(lm, FEW, **options)


def pack(path: Path, *options: object) -> Path:
    given = ["--checkpoint_path", path, "--calibration_seq_length", 64, "--rank", 16, *options]
    return flash.run(flash.parse_args([str(word) for word in given]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo OPT with what is learned of it there, by the start of training alone: the pretended
    device has no gradients. (Steps of training are gone through, but for these.)"""
    folder = tmp_path_factory.mktemp("pretended")
    path = shutil.copytree(ROOT / "checkpoints" / "demo-opt", folder / "opt")
    (folder / "text.txt").write_text(TEXT)
    given = "--calibration_file", folder / "text.txt"
    with pretended_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "train_factors", torch.no_grad()(predictor.train_factors))
        pack(path, *given, "--epochs", 1, "--device", DEVICE)
        pack(path, *given, "--epochs", 0, "--device", DEVICE)
    return path


# The device itself.


def test_it_is_strict():
    with pretended_cuda():
        there = torch.ones(3, device=CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        late = there.to("cpu", non_blocking=True)
        assert (late != 1).all()
        here().synchronize()
        assert (late == 1).all()


def test_it_sees_a_stream_that_does_not_wait():
    with pretended_cuda():
        there, other = torch.zeros(3, device=CUDA), torch.cuda.Stream()
        with torch.cuda.stream(other), pytest.raises(Race):
            there.copy_(torch.ones(3), non_blocking=True)
        done = here().record_event()
        with torch.cuda.stream(other):
            other.wait_event(done)
            there.copy_(torch.ones(3), non_blocking=True)
        with pytest.raises(Race):
            there + 1
        other.synchronize()
        assert (there + 1).tolist() == [2, 2, 2]


# Neurons from disk.


def test_a_threshold_is_found_on_the_device():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(SEED))
    expected = predictor.score_threshold(scores, scores > -1, 0.9)
    none = predictor.score_threshold(scores, scores > 100, 0.9)
    with pretended_cuda():
        there = scores.to(CUDA)
        found = predictor.score_threshold(there, there > -1, 0.9)
        assert found.device == CUDA and found.item() == expected.item()
        assert predictor.score_threshold(there, there > 100, 0.9).item() == none.item() == 0


def test_what_is_learned_is_the_same(model: Path, tmp_path: Path):
    path = shutil.copytree(ROOT / "checkpoints" / "demo-opt", tmp_path / "opt")
    pack(path, "--calibration_file", model.parent / "text.txt", "--epochs", 0, "--device", "cpu")
    for n in range(4):
        name = f"model.flash.learned/layer{n}.pt"
        here, there = (torch.load(folder / name, weights_only=True) for folder in (path, model))
        for what in ("order", "down", "up", "bias"):
            assert torch.equal(here[what], there[what])


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_from_disk(kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Missing neurons and whole layers, in a batch; of dense ones those of the model in memory."""
    options = {"directory": tmp_path / "model.flash", "memory": 0.95}
    pack(model, "--neurons", kind, "--flash_dir", options["directory"])
    more = 0.05 if kind == "dense" else 1.0  # what is active behind rounded weights is not known
    # Of dense ones a second step finds neurons that the first has read.
    few, two = (dataclasses.replace(GREEDY, max_new_tokens=n) for n in (2 + (kind == "dense"), 2))
    wanted = texts(foresee(sparse(model, **options), model, more), few, 2)
    assert kind != "dense" or wanted == texts(demo_in_memory(model), few, 2)
    prefers = "neurons.budget.CachePlan.prefers_whole_layer"
    with pretended_cuda():
        lm = foresee(sparse(model, device=DEVICE, **options), model, more)
        stats = neuron_source(lm.model).stats
        monkeypatch.setattr(prefers, lambda *_: False)
        assert texts(lm, few, 2) == wanted
        assert stats.missed and int(stats.active) and not stats.whole_layers
        assert list(feed_forward.flash_report(lm.model))
        monkeypatch.setattr(prefers, lambda *_: True)
        assert texts(lm, two, 2) == [ids[:2] for ids in wanted]
        assert stats.whole_layers
        assert list(feed_forward.flash_report(lm.model))


def test_the_host_waits_once_a_layer_where_nothing_is_missed(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("neurons.budget.CachePlan.prefers_whole_layer", lambda *_: False)
    with pretended_cuda() as device:
        lm = foresee(sparse(model, device=DEVICE), model, more=0)
        layer = lm.model.layers[1].feed_forward
        layer.attach(1, layer.source, lm.model.args.hidden_dim)  # an entry for each neuron
        x = torch.randn(1, 1, lm.model.args.dim, generator=torch.Generator().manual_seed(SEED))
        waits = []
        for _ in range(3):
            before, missed = device.waits, neuron_source(lm.model).stats.missed
            with torch.inference_mode():
                layer(x.to(CUDA, non_blocking=True))
            waits.append((neuron_source(lm.model).stats.missed - missed, device.waits - before))
        assert waits[0][0] > 0 and waits[1:] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_neurons_from_disk_with_a_draft(draft: str, model: Path):
    config, memory = dataclasses.replace(GREEDY, max_new_tokens=8), demo_in_memory(model)
    starts = [memory.tokenizer.encode(text) for text in TEXTS[:3]]
    found = complete_ids(memory, starts, config)
    prompts = [start + more + start for start, more in zip(starts, found, strict=True)]
    wanted = complete_ids(memory, prompts, config)
    with pretended_cuda():
        guess = draft if draft == "ngram" else demo_in_memory(model, device=DEVICE)
        given = {"device": DEVICE, "memory": 0.95, "draft": guess, "speculate_k": 3}
        lm = foresee(sparse(model, **given), model)
        assert complete_ids(lm, prompts, config) == wanted
        assert sum(lm.draft.controller.stats.drafted)


# Layers and caches on several tiers.


@pytest.fixture(scope="module")
def still() -> dict[str, list[list[int]]]:
    return {name: ids(demo(name)) for name in ("demo", "demo-opt")}


@pytest.mark.parametrize("number", range(POLICIES))
def test_any_policy(still: dict[str, list[list[int]]], number: int, tmp_path: Path):
    name = ("demo", "demo-opt")[number % 2]
    policy = some_policy(random.Random(SEED + 100 + number), tmp_path)
    print(policy)
    with pretended_cuda():
        assert ids(demo(name, policy=policy, device=DEVICE)) == still[name]


@pytest.mark.parametrize(
    ("variant", "number"),
    [("gemma3", 0), ("gemma3", 1), ("gemma3", 2), ("mistral-window", 0), ("mistral-window", 3)],
)
def test_any_policy_over_rings_that_wrap(
    variant: str, number: int, family_folder: Callable[[str], Path], tmp_path: Path
):
    draw = random.Random(f"{SEED} {variant} {number}")
    policy = some_policy(draw, tmp_path)
    # Attention on the host and on the device, of cells in host memory and on disk.
    cache = (Share(0, 100), Share(0, 0), Share(20, 40), Share(0, 50))[number]
    policy = dataclasses.replace(policy, cache=cache, cpu_attention=number % 2 == 0)
    given = families.prompts_of(SEED, (60, 1, 24, 25)[: policy.micro_batch + 1])
    print(policy)
    options = {"dtype": torch.float32}
    with window_slack(16):
        path = family_folder(variant)
        wanted = complete_ids(load_model(path, device="cpu", **options), given, FEW)
        with pretended_cuda():
            lm = load_model(path, device=DEVICE, policy=policy, **options)
            assert complete_ids(lm, given, FEW) == wanted


AWAY = Policy(Share(0, 100), Share(0, 100), micro_batch=2, micro_batches=5, cpu_attention=True)


def away(policy: Policy) -> LoadedModel:
    return demo("demo", policy=policy, device=DEVICE)


@pytest.mark.parametrize("cache", [Share(0, 100), Share(30, 30), Share(0, 0)], ids=str)
def test_the_host_attends_while_the_device_computes(
    cache: Share,
    still: dict[str, list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Queries of a micro-batch come before those of the one before it have been answered."""
    wanted, waiting, most, really = still["demo"], [], [], HostAttention._to_host
    second = threading.Condition()

    def received(self: HostAttention, *tensors: torch.Tensor) -> list[torch.Tensor]:
        there = really(self, *tensors)
        with second:
            waiting.append(1)
            most.append(len(waiting))
            second.notify_all()
            if len(most) < 40:
                second.wait_for(lambda: len(waiting) > 1, timeout=0.05)
            waiting.pop()
        return there

    monkeypatch.setattr(HostAttention, "_to_host", received)
    policy = dataclasses.replace(AWAY, cache=cache, directory=tmp_path)
    with pretended_cuda():
        assert ids(away(policy)) == wanted
        assert max(most) > 1
        if cache != Share(30, 30):  # of which cells are on all tiers
            return
        most.clear()
        assert ids(away(dataclasses.replace(policy, overlap=False))) == wanted
        assert max(most) == 1


def test_attention_on_the_host_is_measured_without_the_kernels_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kernel(cache: KVCache, q: Tensor, *given: Tensor) -> Tensor:
        assert q.is_cuda
        return sdpa_attention(cache, q, *given)

    def sample(device: torch.device) -> Transformer:
        model = meta_model(args, None)
        allocate(model, device, torch.float32, random_filler())
        return model

    def moved(model: Transformer, device: str) -> Transformer:  # the pretended device moves none
        host = sample(torch.device(device))
        host.cache_factory = model.cache_factory
        return host

    monkeypatch.setattr(Transformer, "to", moved)
    args = demo("demo").model.args
    args = dataclasses.replace(args, n_layers=1, layer_types=args.layer_types[:1])
    with pretended_cuda():
        model = sample(CUDA)
        model.cache_factory = dataclasses.replace(model.cache_factory, attention=kernel)
        found = probe(model, args, tmp_path)
    assert len(found.products.seconds) > 1


def test_packed_layers_are_unpacked_once_for_all_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    policy = dataclasses.replace(AWAY, compress_weight=True, directory=tmp_path)
    wanted = ids(demo("demo", policy=policy))
    calls, really = [], Int4Linear.dequantize
    monkeypatch.setattr(Int4Linear, "dequantize", lambda *given: calls.append(1) or really(*given))
    with pretended_cuda():
        lm = away(policy)
        assert ids(lm) == wanted
        kinds = {type(m) for m in lm.model.layers.buffers[0].contents.block.modules()}
    linears = 4 * len(lm.model.layers)
    assert len(calls) == FEW.max_new_tokens * linears and Int4Linear in kinds


def test_sparse_attention_is_the_host_s(tmp_path: Path):
    policy = dataclasses.replace(AWAY, attention_share=1.0, directory=tmp_path)
    few = dataclasses.replace(policy, attention_share=0.3)
    on_host = ids(demo("demo", policy=few), texts=TEXTS[:4])
    with pretended_cuda():
        assert ids(away(few), texts=TEXTS[:4]) == on_host


def test_a_micro_batch_that_fails_leaves_nothing_under_way(
    still: dict[str, list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted, really, calls = still["demo"], HostAttention._to_host, []

    def failing(self: HostAttention, *tensors: torch.Tensor) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) == 40:
            raise ValueError("it failed")
        return really(self, *tensors)

    with pretended_cuda():
        lm = away(dataclasses.replace(AWAY, cache=Share(0, 50), directory=tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(HostAttention, "_to_host", failing)
            with pytest.raises(ValueError, match="it failed"):
                ids(lm)
        assert ids(lm) == wanted

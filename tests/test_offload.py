"""Offload: any mix of tiers gives the tokens of the model in memory, and faults are clear."""

import dataclasses
import errno
import functools
import itertools
import math
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT

from checkpoint import Checkpoint
from engine import complete
from host.torch_private import compiled_graphs
from layers.kv_cache import KVCache
from load import LoadedModel, load_model, random_model
from quant.linear import make_scheme
from quantize import quantize
from text.generation_config import GenerationConfig
from tiers.host_attention import SparseHostAttention
from tiers.kv_cache import Cell, TieredCaches
from tiers.policy import TIERS, Policy, Share
from tiers.prefetch import Buffer
from weights.saving import save_checkpoint

DEMOS = ("demo", "demo-opt")
SEED = 20261122
POLICIES = 20  # half of them of each family
GREEDY = GenerationConfig(max_new_tokens=16, temperature=0, ignore_eos=True)
SHORT = dataclasses.replace(GREEDY, max_new_tokens=8)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.9, top_k=50, seed=3)
TEXTS = (
    "Once upon a time",
    "Lily",
    "Tim and his dog saw a big red ball. They",
    "One day, a little",
    "The sun was",
    "A cat named Tom liked to",
    "Mom said",
    "In the forest there lived a",
    "Ben",
)


def demo(name: str, **options) -> LoadedModel:
    options = {"device": "cpu", "dtype": torch.float32} | options
    return load_model(ROOT / "checkpoints" / name, **options)


@pytest.fixture(scope="module")
def resident() -> Callable[..., list[list[int]]]:
    """A function of a demo model, a configuration and options, which returns the ids that the model
    in memory gives for TEXTS, computed once."""

    @functools.cache
    def wanted(name: str, config: GenerationConfig = GREEDY, **options: Any) -> list[list[int]]:
        return ids(demo(name, **options), config)

    return wanted


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """A function of a demo model, which returns it with moving layers, compiled once."""
    policy = dataclasses.replace(MIXED, directory=tmp_path_factory.mktemp("compiled"))
    return functools.cache(lambda name: demo(name, policy=policy, compile=True))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a model.pth, whose layers are read in place, as no other file's are."""
    folder = tmp_path_factory.mktemp("prepared")
    source = Checkpoint(ROOT / "checkpoints" / "demo")
    tensors = {name: source.read(name, torch.float32) for name in source.tensors}
    save_checkpoint(folder / "model.pth", source.config, None, tensors)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source.directory / name, folder)
    return folder


def ids(lm: LoadedModel, config: GenerationConfig = GREEDY, texts=TEXTS, **options) -> list:
    prompts = [lm.tokenizer.encode(text) for text in texts]
    return [c.ids for c in complete(lm, prompts, config, **options)]


def some_share(draw: random.Random) -> Share:
    """All on one tier, or any mix."""
    if draw.random() < 0.4:
        return draw.choice([Share(100, 0), Share(0, 100), Share(0, 0)])
    device = draw.uniform(0, 100)
    return Share(device, draw.uniform(0, 100 - device))


def some_policy(draw: random.Random, directory: Path) -> Policy:
    return Policy(
        weights=some_share(draw),
        cache=some_share(draw),
        activations=some_share(draw),
        micro_batch=draw.randint(1, 4),
        micro_batches=draw.randint(2, 5),
        cpu_attention=draw.random() < 0.5,
        overlap=draw.random() < 0.8,
        directory=directory,
    )


@pytest.mark.parametrize("number", range(POLICIES))
def test_any_policy_gives_the_tokens_of_the_model_in_memory(
    number: int, resident: Callable[..., list[list[int]]], tmp_path: Path
):
    """The families take turns."""
    name = DEMOS[number % 2]
    draw = random.Random(SEED + number)
    policy = some_policy(draw, tmp_path)
    texts = draw.sample(TEXTS, draw.randint(policy.micro_batch + 1, len(TEXTS)))
    print(name, policy, texts)
    wanted = dict(zip(TEXTS, resident(name), strict=True))
    assert ids(demo(name, policy=policy), texts=texts) == [wanted[text] for text in texts]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize("number", range(6))
def test_any_policy_on_a_gpu(
    name: str, number: int, resident: Callable[..., list[list[int]]], tmp_path: Path
):
    """Attention on the host beside the device's work among them."""
    policy = some_policy(random.Random(SEED + number), tmp_path)
    policy = dataclasses.replace(policy, cpu_attention=number % 2 == 0, overlap=True)
    assert ids(demo(name, policy=policy, device="cuda")) == resident(name)


@pytest.mark.parametrize("first", range(len(DEMOS)), ids=DEMOS)
def test_every_tier_and_choice_is_among_the_policies(first: int):
    """Of each family."""
    policies = [some_policy(random.Random(SEED + n), Path()) for n in range(first, POLICIES, 2)]
    for what in ("weights", "cache", "activations"):
        for tier in TIERS:
            of_tier = [tier in getattr(p, what).tiers(12) for p in policies]
            assert sum(of_tier) > len(policies) / 4, (what, tier)
    moving = [p for p in policies if p.cache.device < 100]
    assert {p.cpu_attention for p in moving} == {p.overlap for p in moving} == {True, False}


@pytest.mark.parametrize("name", DEMOS)
def test_the_texts_show_batches_that_are_mixed_up(
    name: str,
    resident: Callable[..., list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """As in FlexGen, where a micro-batch attended to what the next one had brought."""
    fetch = TieredCaches._fetch

    def of_the_next(self: TieredCaches, cell: Cell, slot: Buffer) -> Future:
        cells = self._prefetcher._order
        return fetch(self, cells[(cells.index(cell) + 1) % len(cells)], slot)

    policy = Policy(cache=Share(0, 100), micro_batch=3, micro_batches=3, directory=tmp_path)
    monkeypatch.setattr(TieredCaches, "_fetch", of_the_next)
    wrong = ids(demo(name, policy=policy))
    assert all(a != b for a, b in zip(wrong, resident(name), strict=True))


MIXED = Policy(Share(30, 30), Share(30, 30), Share(50, 25), micro_batch=2, micro_batches=5)


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [("demo", None), ("demo-opt", "int8"), ("demo", "int4"), ("demo-opt", "int4")],
)
def test_quantised_caches_move_as_others_do(
    name: str, kv_dtype: str | None, resident: Callable[..., list[list[int]]], tmp_path: Path
):
    policy = dataclasses.replace(MIXED, directory=tmp_path)
    moving = demo(name, kv_dtype=kv_dtype, policy=policy)
    assert ids(moving) == (resident(name, kv_dtype=kv_dtype) if kv_dtype else resident(name))


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DEMOS)
def test_drafts_compiled_blocks_and_sampling_over_moving_layers(
    name: str,
    config: GenerationConfig,
    resident: Callable[..., list[list[int]]],
    compiled: Callable[[str], LoadedModel],
    tmp_path: Path,
):
    """Greedily without drafts: MIXED is among test_quantised_caches_move_as_others_do."""
    wanted, policy = resident(name, config), dataclasses.replace(MIXED, directory=tmp_path)
    if config is SAMPLED:
        assert ids(demo(name, policy=policy), config) == wanted
    draft = {"draft": "ngram"} if config is GREEDY else {"draft": demo(name), "speculate_k": 3}
    assert ids(demo(name, policy=policy, **draft), config) == wanted
    assert ids(compiled(name), config) == wanted


def test_one_graph_serves_every_layer_and_every_slot(compiled: Callable[[str], LoadedModel]):
    lm = compiled("demo")
    ids(lm)
    before = compiled_graphs()
    data = [tensor.data_ptr() for slot in lm.model.layers.buffers for tensor in slot.parts.values()]
    ids(lm, texts=TEXTS[::-1])
    assert compiled_graphs() == before
    after = [
        tensor.data_ptr() for slot in lm.model.layers.buffers for tensor in slot.parts.values()
    ]
    assert data == after


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_layers_move_packed(scheme: str, tmp_path: Path):
    """bfloat16, which the packed products take: the same bits, as the batch is the same."""
    config = ROOT / "checkpoints" / "demo" / "config.json"
    options = {"device": "cpu", "dtype": torch.bfloat16, "scheme": make_scheme(scheme)}
    policy = dataclasses.replace(MIXED, directory=tmp_path, micro_batch=3)
    prompts = torch.randint(500, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    policy = dataclasses.replace(policy, micro_batches=1)
    moving, still = (random_model(config, policy=p, **options) for p in (policy, None))
    given = prompts, GREEDY
    assert [c.ids for c in complete(moving, *given)] == [c.ids for c in complete(still, *given)]


def test_compressed_weights_are_those_that_quantize_writes(tmp_path: Path):
    policy = dataclasses.replace(MIXED, directory=tmp_path, compress_weight=True)
    moving = demo("demo", policy=policy)
    file = tmp_path / "model.pth"
    source = Checkpoint(ROOT / "checkpoints" / "demo")
    quantize(source, make_scheme("int4", 64, head="dense"), file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source.directory / name, tmp_path)
    assert ids(moving, SHORT) == ids(load_model(file, device="cpu", dtype=torch.float32), SHORT)


def test_a_conversation_goes_on_from_moving_caches(tmp_path: Path):
    policy = dataclasses.replace(MIXED, directory=tmp_path, micro_batch=1, micro_batches=1)
    still, moving = demo("demo"), demo("demo", policy=policy)
    answers = []
    for lm in (still, moving):
        caches, text, held, said = lm.make_caches(1, 300), [], 0, []
        for turn in TEXTS[:4]:
            text += lm.tokenizer.encode(turn)
            (answer,) = complete(lm, [text], GREEDY, caches=caches, past=held)
            held = len(text) + len(answer.ids) - 1
            text += answer.ids
            said.append(answer.ids)
        answers.append(said)
    assert answers[0] == answers[1]


def test_a_prepared_file_is_read_in_place(
    prepared: Path, resident: Callable[..., list[list[int]]], tmp_path: Path
):
    policy = Policy(Share(0, 0), micro_batches=2, directory=tmp_path / "never")
    lm = load_model(prepared, device="cpu", policy=policy)
    assert not policy.directory.exists()
    assert {s.path for s, _ in lm.model.layers.locations.values()} == {prepared / "model.pth"}
    assert ids(lm) == resident("demo")


def test_without_o_direct_the_page_cache_serves(
    prepared: Path,
    resident: Callable[..., list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    really = os.open

    def refuse(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    policy = Policy(Share(0, 0), Share(0, 0), micro_batches=2, directory=tmp_path)
    lm = load_model(prepared, device="cpu", policy=policy)
    assert not any(store.direct for store, _ in lm.model.layers.locations.values())
    assert ids(lm) == resident("demo")


def test_a_file_cut_short_is_an_error(prepared: Path, tmp_path: Path):
    folder = tmp_path / "cut"
    shutil.copytree(prepared, folder)
    policy = Policy(Share(0, 0), overlap=False, directory=tmp_path)
    lm = load_model(folder, device="cpu", policy=policy)
    os.truncate(folder / "model.pth", (folder / "model.pth").stat().st_size // 2)
    with pytest.raises(ValueError, match="cut short"):
        ids(lm)


def test_a_disk_that_fails_is_an_error_and_the_next_run_is_right(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    policy = Policy(Share(0, 0), Share(0, 0), micro_batch=3, micro_batches=3, directory=tmp_path)
    lm = load_model(prepared, device="cpu", policy=policy)
    wanted, really, calls = ids(lm, SHORT), os.preadv, []

    def failing(*given: Any) -> int:
        calls.append(given)
        if len(calls) == 40:
            raise OSError(errno.EIO, "Input/output error")
        return really(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="Input/output"):
            ids(lm, SHORT)
    assert ids(lm, SHORT) == wanted


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="free"):
        demo("demo", policy=Policy(Share(0, 0), directory=tmp_path))


@pytest.mark.parametrize("count", [1, 7, 22, 96])
def test_shares_are_honoured_to_within_one(count: int):
    draw = random.Random(SEED)
    for _ in range(100):
        share = some_share(draw)
        shares = dict(zip(TIERS, (share.device, share.host, share.disk), strict=True))
        for tier, percent in shares.items():
            assert abs(share.tiers(count).count(tier) - percent * count / 100) < 1.01
    with pytest.raises(ValueError, match="more than 100"):
        Share(60, 50)


@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_sparse_attention_reads_the_values_that_weigh_most(share: float):
    """Against one query after the other, with every weight but those of the best set to 0."""
    B, S, G, R, E, length = 3, 40, 2, 3, 8, 33
    draw = torch.Generator().manual_seed(SEED)
    cache = KVCache((B, S, G, E), torch.float32, torch.device("cpu"))
    for buffer in (cache.k, cache.v):
        buffer.normal_(generator=draw)
    q = torch.randn(B, 1, G * R, E, generator=draw)
    k, v = torch.randn(2, B, 1, G, E, generator=draw)
    pos = torch.tensor([[length - 1]] * B)
    mask = torch.zeros(B, 1, R, S - 1).masked_fill(torch.arange(S - 1) >= length, -torch.inf)
    y = SparseHostAttention(cache, share).attend(q, k, v, mask, pos)
    for b, g in itertools.product(range(B), range(G)):
        keys, values = cache.k[b, :length, g], cache.v[b, :length, g]
        assert torch.equal(keys[-1], k[b, 0, g])
        queries = q[b, 0, g * R : g * R + R]
        weights = (queries @ keys.T / E**0.5).softmax(-1)  # (R, length)
        worst = weights.sum(0).argsort()[: length - math.ceil(share * length)]
        weights[:, worst] = 0
        torch.testing.assert_close(y[b, 0, g * R : g * R + R], weights @ values)


def test_sparse_attention_of_all_values_changes_nothing(
    resident: Callable[..., list[list[int]]], tmp_path: Path
):
    policy = Policy(cache=Share(0, 50), cpu_attention=True, micro_batches=3, directory=tmp_path)
    assert ids(demo("demo", policy=policy)) == resident("demo")
    sparse = dataclasses.replace(policy, attention_share=0.1)
    assert ids(demo("demo", policy=sparse)) != resident("demo")

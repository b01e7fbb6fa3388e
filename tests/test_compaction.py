"""Compaction: once rows have ended, the others move together, and their texts do not change."""

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT

import decoding
from decoding import LoadedModel, launch_ahead, launched_steps, pays_to_compact
from engine import complete, generate
from layers.kv_cache import KVCache
from load import load_model
from sampling import Sampler
from text.completion import Completion
from text.generation_config import GenerationConfig
from tiers.kv_cache import TieredCaches, tiered_caches
from tiers.policy import Policy, Share

TEXTS = (
    "Once upon a time",
    "Lily",
    "Tim and his dog saw a big red ball. They",
    "One day, a little",
    "The sun was hot",
    "A cat",
    "Mom said that it was time to",
    "In the garden there was a frog. It",
)
LONG = 5  # the row whose prompt nearly fills the caches
LENGTH = 96  # of the caches: more positions take longer and change nothing
LIMIT = 32
GREEDY = GenerationConfig(max_new_tokens=LIMIT, temperature=0)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.9, top_k=50, top_p=0.95, seed=3)
DEVICE, HOST, DISK = Share(100, 0), Share(0, 100), Share(0, 0)
CONFIGS = pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
DEMOS = pytest.mark.parametrize("name", ["demo", "demo-opt"])
POLICIES: dict[str, dict[str, Any]] = {
    "device": {"cache": DEVICE, "micro_batch": 3},
    "host": {"cache": HOST, "micro_batch": 2},
    "disk": {"cache": DISK, "micro_batch": 2},
    "all, waiting": {"cache": Share(30, 30), "micro_batch": 2, "overlap": False},
    "all": {"cache": Share(40, 30), "micro_batch": 3},
    "attention there": {"cache": Share(30, 40), "micro_batch": 3, "cpu_attention": True},
    "weights too": {"cache": Share(20, 40), "weights": Share(0, 50), "micro_batch": 3},
    "int8": {"cache": Share(30, 30), "micro_batch": 2, "kv_dtype": "int8"},
}
ON_GPU = "host", "attention there", "weights too", "int8"  # the others take as long again


@functools.cache
def plain_demo(name: str) -> LoadedModel:
    return demo(name)


def demo(name: str, device: str = "cpu", **options) -> LoadedModel:
    return load_model(ROOT / "checkpoints" / name, device=device, dtype=torch.float32, **options)


@dataclasses.dataclass(frozen=True)
class Case:
    """Prompts whose texts end at different steps, and the text that each gets alone, in caches of
    LENGTH positions."""

    lm: LoadedModel
    given: list[list[int]]
    config: GenerationConfig
    wanted: list[tuple]

    def ended(self, lm: LoadedModel) -> LoadedModel:
        """Return the model with this case's EOS ids."""
        return dataclasses.replace(lm, tokenizer=self.lm.tokenizer)


@functools.cache
def case(name: str, config: GenerationConfig, kv: str | None = None, device: str = "cpu") -> Case:
    lm = demo(name, device, kv_dtype=kv)
    given = [lm.tokenizer.encode(text) for text in TEXTS]
    given[LONG] = (given[2] * LENGTH)[: LENGTH - 20]  # its cache ends after 20 tokens
    caches = lm.make_caches(len(given), LENGTH)
    free = complete(lm, given, dataclasses.replace(config, ignore_eos=True), caches=caches)

    def alone_in(row: int, items: list, has: Callable[[Completion, Any], bool]) -> Any:
        others = free[:row] + free[row + 1 :]
        return next(item for item in items if not any(has(other, item) for other in others))

    tokenizer = copy.copy(lm.tokenizer)
    tokenizer.eos_ids = tuple(
        alone_in(row, free[row].ids[start:], lambda c, i: i in c.ids)
        for row, start in ((0, 3), (3, 9), (6, 16))
    )
    stops = []
    for row, start in ((1, 5), (7, 60)):
        pieces = [free[row].text[n : n + 5] for n in range(start, len(free[row].text) - 5)]
        stops.append(alone_in(row, pieces, lambda c, piece: piece in c.text))
    config, lm = (
        dataclasses.replace(config, stop=tuple(stops)),
        dataclasses.replace(lm, tokenizer=tokenizer),
    )
    wanted = []
    for row, prompt in enumerate(given):
        caches = lm.make_caches(1, LENGTH)
        wanted += told(complete(lm, [prompt], config, streams=[row], caches=caches))
    return Case(lm, given, config, wanted)


def told(completions: list[Completion]) -> list[tuple]:
    return [(c.ids, c.text, c.finish_reason) for c in completions]


class Widths:
    """Records the number of rows of each call of a model."""

    def __init__(self, lm: LoadedModel):
        self.seen: list[int] = []
        self._hook = lm.model.register_forward_pre_hook(
            lambda module, given: self.seen.append(len(given[0]))
        )

    def __enter__(self) -> list[int]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


@CONFIGS
@DEMOS
def test_rows_that_end_leave_and_the_others_get_what_they_get_alone(
    name: str, config: GenerationConfig, monkeypatch: pytest.MonkeyPatch
):
    early = case(name, config)
    lengths = {len(ids) for ids, _, _ in early.wanted}
    assert {reason for _, _, reason in early.wanted} == {"eos", "stop", "length"}
    assert len(lengths) > 4 and {20, LIMIT} <= lengths and min(lengths) < 10
    caches = early.lm.make_caches(len(TEXTS), LENGTH)
    with Widths(early.lm) as moved:
        found = told(complete(early.lm, early.given, early.config, caches=caches))
    assert found == early.wanted
    monkeypatch.setattr(decoding, "MIN_ENDED_SHARE", 2.0)
    with Widths(early.lm) as never:
        found = told(complete(early.lm, early.given, early.config, caches=caches))
    assert found == early.wanted
    assert set(never) == {len(TEXTS)} and len(moved) == len(never)
    assert moved == sorted(moved, reverse=True) and moved[0] == len(TEXTS) > 2 * moved[-1]
    assert len(set(moved)) > 2


OF_NAME = {"demo": SAMPLED, "demo-opt": GREEDY}
ON_CPU = [
    *(("cpu", "demo", tiers) for tiers in POLICIES),
    # demo-opt has as many heads of keys as of queries, which matters where these are computed.
    *(("cpu", "demo-opt", tiers) for tiers in ("disk", "all", "attention there", "int8")),
]


@pytest.mark.parametrize(
    ("device", "name", "tiers"),
    [
        *ON_CPU,
        *(
            pytest.param("cuda", name, tiers, marks=pytest.mark.gpu)
            for name in OF_NAME
            for tiers in ON_GPU
        ),
    ],
)
def test_rows_leave_caches_on_any_tier(device: str, name: str, tiers: str, tmp_path: Path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    options = dict(POLICIES[tiers])
    kv = options.pop("kv_dtype", None)
    early = case(name, OF_NAME[name], kv, device)
    policy = Policy(**options, micro_batches=4, directory=tmp_path)
    lm = early.ended(demo(name, device, policy=policy, kv_dtype=kv))
    caches = lm.make_caches(len(TEXTS), LENGTH)
    with Widths(lm) as widths:
        assert told(complete(lm, early.given, early.config, caches=caches)) == early.wanted
    assert widths[-1] <= len(TEXTS) / 2
    assert widths == sorted(widths, reverse=True)
    for rows in (range(7, -1, -1), range(3)):  # reuse all rows of the caches, then some
        given, wanted = [early.given[row] for row in rows], [early.wanted[row] for row in rows]
        assert told(complete(lm, given, early.config, caches=caches, streams=rows)) == wanted


def test_cells_of_rows_that_have_ended_are_not_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    early = case("demo", GREEDY)
    policy = Policy(cache=Share(0, 50), micro_batch=2, micro_batches=4, directory=tmp_path)
    lm = early.ended(demo("demo", policy=policy))
    brought: list[list[object]] = [[]]
    fetch = TieredCaches._fetch

    def counted(caches: TieredCaches, cell: object, slot: object) -> object:
        brought[-1].append(cell)
        return fetch(caches, cell, slot)

    monkeypatch.setattr(TieredCaches, "_fetch", counted)
    caches = lm.make_caches(len(TEXTS), LENGTH)
    for _ in generate(lm, early.given, early.config, caches=caches):
        brought.append([])
    layers = lm.model.args.n_layers
    assert len(brought[1]) == 4 * layers
    assert len(set(brought[-2])) == len(brought[-2]) <= 2 * layers


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_prompts_than_the_caches_have_rows_are_computed_alone(rows: int):
    early = case("demo", GREEDY)
    caches = early.lm.make_caches(8, LENGTH)
    with Widths(early.lm) as widths:
        found = told(complete(early.lm, early.given[:rows], early.config, caches=caches))
    assert found == early.wanted[:rows]
    assert max(widths) == rows


def test_a_compiled_step_keeps_its_rows():
    """Otherwise each number of rows would need a compilation."""
    early = case("demo", GREEDY)
    like_compiled = dataclasses.replace(early.lm, any_rows=False)
    caches = early.lm.make_caches(9, LENGTH)
    with Widths(early.lm) as widths:
        found = told(complete(like_compiled, early.given, early.config, caches=caches))
    assert found == early.wanted
    assert set(widths) == {9}


@CONFIGS
@DEMOS
def test_ends_may_be_known_a_step_late(name: str, config: GenerationConfig):
    """As on a GPU, where a step is launched before the previous step's ids are read."""
    early = case(name, config)
    live, rows = set(range(len(TEXTS))), range(len(TEXTS))
    ends = [len(ids) for ids, _, _ in early.wanted]
    caches = early.lm.make_caches(len(TEXTS), LENGTH)
    found: list[list[int]] = [[] for _ in TEXTS]
    widths = []
    with torch.inference_mode():
        sampler = Sampler(config, rows, early.lm.device)
        micro_batch = rows, caches
        steps = launched_steps(early.lm, early.given, micro_batch, 0, sampler, range(LIMIT), live)
        for computed, read in launch_ahead(steps):
            widths.append(len(computed))
            for row, ids in zip(computed, read(), strict=True):
                found[row] += ids
            live -= {row for row in live if len(found[row]) == ends[row]}
    ids = [ids for ids, _, _ in early.wanted]
    assert [new[:end] for new, end in zip(found, ends, strict=True)] == ids
    assert widths[0] == len(TEXTS) > 2 * widths[-1]


def test_rows_are_moved_when_it_pays():
    assert [pays_to_compact(8, going, 1) for going in (8, 7, 6, 1)] == [False, False, True, True]
    assert pays_to_compact(2, 1, 1) and not pays_to_compact(1, 1, 1)
    # In micro-batches of 4, what remains of one costs as much as all of it.
    assert [pays_to_compact(8, going, 4) for going in (6, 5, 4, 1)] == [False, False, True, True]
    assert (
        not pays_to_compact(12, 10, 4)
        and pays_to_compact(12, 8, 4)
        and not pays_to_compact(4, 1, 4)
    )
    assert [pays_to_compact(100, going, 10) for going in (90, 76, 75)] == [False, False, True]


def filled(caches: Sequence[KVCache], pos: torch.Tensor, draw: random.Random) -> list[torch.Tensor]:
    """Write noise to pos, (B, T), of every layer; return each layer's k and v, (2, B, T, G, E)."""
    noise = [torch.randn(2, *pos.shape, 4, 32) * draw.uniform(1, 9) for _ in caches]
    for cache, (k, v) in zip(caches, noise, strict=True):
        for rows in parts(cache, pos):
            with cache.opened(rows, pos) as part:
                part.update(pos[rows], k[rows], v[rows], 1)
    return noise


def contents(caches: Sequence[KVCache], pos: torch.Tensor) -> list[torch.Tensor]:
    """Read pos, (B, T), of every layer: (2, B, T, G, E) each."""
    found = []
    for cache in caches:
        kv = []
        for rows in parts(cache, pos):
            with cache.opened(rows, pos[:, -1:]) as part:
                at = torch.arange(len(pos[rows])).unsqueeze(1), pos[rows]
                kv.append(torch.stack([getattr(part, name)[at] for name in "kv"]))
        found.append(torch.cat(kv, dim=1))
    return found


def parts(cache: KVCache, pos: torch.Tensor) -> Iterator[slice]:
    g = cache.row_granularity
    return (slice(n, min(n + g, len(pos))) for n in range(0, len(pos), g))


@pytest.mark.parametrize("seed", range(20))
@torch.inference_mode()
def test_any_rows_of_caches_on_any_tiers_can_be_kept(seed: int, tmp_path: Path):
    """Random rows are kept repeatedly, with steps between; then the whole caches are used again."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    device = draw.choice([0, 30, 90, 100])
    policy = Policy(
        cache=Share(device, draw.choice([0, 0.5, 1]) * (100 - device)),
        micro_batch=draw.randint(1, 5),
        overlap=draw.random() < 0.7,
        directory=tmp_path,
    )
    model, rows, length = plain_demo("demo").model, draw.randint(1, 16), 40
    caches = whole = tiered_caches(model, policy, rows, length)
    for _ in range(2):
        caches, count = whole, rows
        for cache in caches:
            cache.keep(0)
        ends = torch.tensor([draw.randint(1, 20) for _ in range(rows)])
        pos = torch.arange(21).expand(rows, -1)
        wanted = filled(caches, pos, draw)
        for n in range(21, 40):
            if count > 1 and draw.random() < 0.4:
                kept = sorted(draw.sample(range(count), draw.randint(1, count)))
                caches, count = [cache.compacted(kept, n) for cache in caches], len(kept)
                wanted, ends = [kv[:, kept] for kv in wanted], ends[kept]
            pos = torch.full((count, 1), n)
            new = filled(caches, pos, draw)
            wanted = [torch.cat(pair, dim=2) for pair in zip(wanted, new, strict=True)]
            assert {cache.rows for cache in caches} == {count}
        found = contents(caches, torch.arange(40).expand(count, -1))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

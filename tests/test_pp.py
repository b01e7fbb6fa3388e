"""A pipeline gives the tokens of one process, with and without offloading."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT

from checkpoint import Checkpoint
from decoding import join_micro_batches
from layers.args import ModelArgs
from pp import MicroBatchCache, PendingTransfers, split_micro_batches, stage_layers
from quant.linear import meta_model
from ranks import Ranks
from tests.ranks_worker import TEXTS, answers
from tests.test_tp import on_ranks, random_llama

MANY = [*TEXTS, "The sun", "A dragon lived in a cave and", "Mom said", "Ben was"]
PLAIN = {"pipeline": True}
# Greedy and sampled; compacted; int8 caches; weights and caches on other tiers.
CASES: list[dict[str, Any]] = [
    {"model": "demo"},
    {"model": "demo-opt"},
    {"model": "demo", "texts": MANY, "micro_batches": 2},
    {"model": "demo", "texts": MANY, "micro_batches": 3, "how": {"ignore_eos": False}},
    {"model": "demo-opt", "texts": MANY, "how": {"temperature": 0.8, "ignore_eos": False}},
    # The last sends have not arrived when the sender has finished its batch and freed its model.
    {
        "model": "demo",
        "texts": MANY[:3],
        "micro_batches": 3,
        "how": {"max_new_tokens": 3},
        "lag": 0.2,
    },
    {"model": "demo", "texts": MANY[:1]},
    {"model": "demo-opt", "kv_dtype": "int8"},
    {"model": "random"},
    {"model": "demo", "texts": MANY, "micro_batches": 2, "percent": [0, 0, 100, 0]},
    {"model": "demo-opt", "texts": MANY, "micro_batches": 2, "percent": [30, 30, 0, 0]},
    {"model": "demo", "texts": MANY, "micro_batches": 3, "percent": [0, 50, 50, 0]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: ROOT / "checkpoints" / name for name in ("demo", "demo-opt")}
    return found | {"random": random_llama(folder / "random", num_hidden_layers=5)}


# On three ranks, whose middle one has neither the embedding nor the head: plain, sampled,
# compacted, late and uneven, and on other tiers.
OF_THREE = [case for n, case in enumerate(CASES) if n in (0, 3, 4, 5, 8, 10)]


@pytest.fixture(scope="module")
def run_all(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[list[dict[str, Any]]]]:
    """A function of the number of ranks, which returns each rank's results."""

    @functools.cache
    def run(count: int) -> list[list[dict[str, Any]]]:
        cases = [PLAIN | case for case in (CASES if count == 2 else OF_THREE)]
        for case in cases:
            case["path"] = str(models[case.pop("model")])
        return on_ranks(count, cases, tmp_path_factory.mktemp("ranks"))

    return run


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> Callable[[dict[str, Any]], list[list[int]]]:
    """A function of a case, which returns the ids that one process gives."""
    known: dict[str, list[list[int]]] = {}

    def ids(case: dict[str, Any]) -> list[list[int]]:
        given = {k: v for k, v in case.items() if k not in ("micro_batches", "lag", "percent")}
        if (key := repr(given)) not in known:
            known[key] = answers(str(models[given.pop("model")]), None, **given)["ids"]
        return known[key]

    return ids


@pytest.mark.parametrize("count", [2, 3])
def test_tokens_are_those_of_one_process(
    count: int,
    run_all: Callable[[int], list[list[dict[str, Any]]]],
    alone: Callable[[dict[str, Any]], list[list[int]]],
):
    cases, by_rank = CASES if count == 2 else OF_THREE, run_all(count)
    for n, case in enumerate(cases):
        expected = alone(case)
        assert len({tuple(ids) for ids in expected}) == len(expected)
        for rank in range(count):
            assert by_rank[rank][n]["ids"] == expected, (case, rank)


def test_a_stage_holds_its_layers_and_no_more(
    models: dict[str, Path], run_all: Callable[[int], list[list[dict[str, Any]]]]
):
    """The first rank has the table, the last the head."""
    place = CASES.index({"model": "random"})
    args = Checkpoint(models["random"]).args
    model = meta_model(args, None)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    table = args.vocab_size * args.dim
    frequencies = args.head_dim // 2
    own_numbers = [results[place]["weights"] / 4 - frequencies for results in run_all(2)]
    shares = [len(stage_layers(args, Ranks(rank, 2))) for rank in range(2)]
    assert own_numbers == [shares[0] * layer + table, shares[1] * layer + table + args.dim]


def shape(layers: int, vocab: int = 1000) -> ModelArgs:
    return ModelArgs(64, layers, 4, 4, 16, 128, vocab, 100, 64)


@pytest.mark.parametrize("layers", range(1, 12))
def test_every_layer_is_somewhere_once(layers: int):
    for vocab in (10, 1000, 10**6):
        for count in range(1, layers + 1):
            parts = [
                stage_layers(shape(layers, vocab), Ranks(rank, count)) for rank in range(count)
            ]
            assert [n for part in parts for n in part] == list(range(layers))
            assert all(parts)


def test_a_large_head_leaves_the_last_rank_fewer_layers():
    even = [len(stage_layers(shape(12, 8), Ranks(rank, 2))) for rank in range(2)]
    uneven = [len(stage_layers(shape(12, 2560), Ranks(rank, 2))) for rank in range(2)]
    assert even == [6, 6] and uneven[0] > uneven[1]


def test_more_ranks_than_layers():
    with pytest.raises(ValueError, match="3 ranks cannot share 2 layers"):
        stage_layers(shape(2), Ranks(0, 3))


def test_micro_batches_are_split_by_rows():
    model = meta_model(shape(2), None)
    parts = [
        model.cache_factory((rows, 9, 4, 16), torch.float32, torch.device("cpu"))
        for rows in (3, 3, 2)
    ]
    cache = MicroBatchCache(parts)
    assert cache.rows == 8 and cache.length == 8
    for count, expected in ((8, [3, 3, 2]), (7, [3, 3, 1]), (4, [3, 1]), (3, [3]), (1, [1])):
        found = split_micro_batches([cache.first(count)])
        assert [len(rows) for rows, _ in found] == expected
        assert [row for rows, _ in found for row in rows] == list(range(count))
        assert [caches[0].rows for _, caches in found] == expected


def test_tensors_are_released_once_they_have_arrived():
    class Done:
        def __init__(self, done: bool):
            self.done = done

        def is_completed(self) -> bool:
            return self.done

    some, waiting = PendingTransfers(), Done(False)
    some.add(Done(True), torch.zeros(1))
    some.add(waiting, torch.zeros(1))
    some.add(Done(True), torch.zeros(1))
    assert len(some) == 2  # released in order: the last waits for the one in flight
    waiting.done = True
    some.add(Done(False), torch.zeros(1))
    assert len(some) == 1


def test_micro_batches_that_end_early_leave_the_others():
    """Each launches its next step after its own ids are read, and before the others' are."""
    calls = []

    def micro_batch(name: str, rows: list[int], steps: int):
        for n in range(steps):
            calls.append(f"launch {name}{n}")
            yield (
                rows,
                lambda n=n: calls.append(f"read {name}{n}") or [[10 * row + n] for row in rows],
            )

    steps = [
        (rows, read())
        for rows, read in join_micro_batches(
            [micro_batch("a", [0, 1], 3), micro_batch("b", [2], 1)]
        )
    ]
    assert steps == [
        ([0, 1, 2], [[0], [10], [20]]),
        ([0, 1], [[1], [11]]),
        ([0, 1], [[2], [12]]),
    ]
    assert calls == "launch a0,launch b0,read a0,launch a1,read b0,read a1,launch a2,read a2".split(
        ","
    )

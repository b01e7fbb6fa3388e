"""scoring.py against transformers, one sequence at a time, and its claim to read nothing twice."""

import random
from collections.abc import Sequence

import pytest
import torch
from common import ROOT, hugging_face_model

from decoding import LoadedModel
from evaluation import scoring
from evaluation.scoring import PrefixNode, SequenceScore, build_prefix_trees, log_likelihoods
from host.torch_private import compiled_graphs
from load import load_model

DEMOS = {"llama": ROOT / "checkpoints" / "demo", "opt": ROOT / "checkpoints" / "demo-opt"}
TOLERANCE = 1e-3
Asked = list[tuple[list[int], int]]


@pytest.fixture(scope="module", params=DEMOS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lm(family: str) -> LoadedModel:
    return load_model(DEMOS[family], device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(family: str) -> list[tuple[float, bool]]:
    """By transformers: each sequence alone, all of it."""
    path = DEMOS[family]
    model = hugging_face_model(path)
    found = []
    with torch.no_grad():
        for ids, start in sequences():
            logits = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :].double()
            said = torch.tensor(ids[start:])
            nats = logits.log_softmax(-1).gather(1, said.unsqueeze(1)).sum()
            found.append((float(nats), bool((logits.argmax(-1) == said).all())))
    return found


def sequences(seed: int = 0, vocab: int = 2048, context: int = 512) -> Asked:
    """Questions with one to five answers, half of them after the same long examples; and all that
    is unusual: a sequence twice, one that begins another, two starts in one, the longest."""
    print(f"seed {seed}")
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab) for _ in range(count)]

    examples, made = ids(100), []
    for number in range(16):
        question = (examples if number % 2 else [0]) + ids(draw.randrange(1, 60))
        for _ in range(draw.randrange(1, 6)):
            made.append((question + ids(draw.choice([1, 1, 5, 30])), len(question)))
    made += [made[0], (made[3][0][:-1], 1), (made[3][0], 2), ([0, 5], 1), ([0, 5, 6], 1)]
    made += [(ids(context + 1), 1), (ids(context), context - 12), (ids(context + 1), context)]
    made.append(([0, 405, 407, 260, 378], 1))  # Once upon a
    draw.shuffle(made)
    return made


def check(results: Sequence[SequenceScore], expected: list[tuple[float, bool]]) -> None:
    assert sorted(r.number for r in results) == list(range(len(expected)))
    for number, nats, greedy in results:
        assert nats == pytest.approx(expected[number][0], abs=TOLERANCE)
        assert greedy == expected[number][1]


@pytest.mark.parametrize("batch_size", [None, 1, 3, 64])
def test_sequences_of_all_kinds(lm: LoadedModel, expected: list, batch_size: int | None):
    check(list(log_likelihoods(lm, sequences(), batch_size)), expected)


def test_small_calls_and_small_pools(
    lm: LoadedModel, expected: list, monkeypatch: pytest.MonkeyPatch
):
    """Nodes in pieces, and more nodes than a level has room for at once."""
    monkeypatch.setattr(scoring, "MAX_LOGITS", 50 * lm.model.args.vocab_size)
    monkeypatch.setattr(scoring, "CALL_LIMITS", {"cpu": (64, 600, 0)})
    monkeypatch.setattr(scoring, "MAX_POOL_ROWS", 3)
    check(list(log_likelihoods(lm, sequences())), expected)


def test_compiled(expected: list, family: str):
    lm = load_model(
        DEMOS[family], device="cpu", dtype=torch.float32, compile=True, compile_prefill=True
    )
    check(list(log_likelihoods(lm, sequences(), 4)), expected)
    graphs = compiled_graphs()
    check(list(log_likelihoods(lm, sequences(), 4)), expected)
    assert compiled_graphs() == graphs


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_caches_are_what_is_measured(family: str, expected: list, kv_dtype: str):
    """As one sequence alone gives it in small pieces; and another result than dense caches give.

    In float64: in float32 a key that lies between two integers may go to either, as the order of a
    sum has it, and so the CPU.
    """
    lm = load_model(DEMOS[family], device="cpu", dtype=torch.float64, kv_dtype=kv_dtype)
    asked = sequences()
    alone = [next(iter(log_likelihoods(lm, [one]))).nats for one in asked]
    together = {r.number: r.nats for r in log_likelihoods(lm, asked)}
    for number, (dense, _) in enumerate(expected):
        assert together[number] == pytest.approx(alone[number], rel=1e-6, abs=1e-5)
        assert together[number] == pytest.approx(dense, rel=0.1)
    assert max(abs(together[n] - dense) for n, (dense, _) in enumerate(expected)) > 10 * TOLERANCE


def test_what_is_shared_is_read_once(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """Five questions with four answers each after common examples: each id goes in once, and the
    last of an answer not at all."""
    draw = random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(lm.model.args.vocab_size) for _ in range(count))

    examples, asked = ids(90), []
    for _ in range(5):
        question = examples + ids(20)
        asked += [((*question, *ids(5)), len(question)) for _ in range(4)]
    seen, forward = [], lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda tokens, *rest: seen.append(tokens) or forward(tokens, *rest)
    )
    list(log_likelihoods(lm, asked))
    assert sum(t.numel() for t in seen) == 90 + 5 * 20 + 5 * 4 * (5 - 1)
    assert len(seen) == 3


def test_the_head_is_computed_for_scored_ids_only(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    widths, forward = [], lm.model.output.forward
    monkeypatch.setattr(lm.model.output, "forward", lambda x: widths.append(x.shape) or forward(x))
    list(log_likelihoods(lm, [(list(range(40)), 37), (list(range(50, 85)), 34)]))
    assert [w[0] for w in widths] == [3 + 1]


def test_trees_hold_every_sequence():
    asked = sequences()
    paths: dict[int, list[int]] = {}

    def walk(node: PrefixNode, before: list[int]) -> None:
        assert node.begin == len(before) and len(node.ids) > 0
        ids = [*before, *node.ids]
        paths.update({number: ids for number, _ in node.ends})
        for child in node.children:
            walk(child, ids)

    for root in build_prefix_trees(asked):
        walk(root, [])
    assert [paths[n] for n in range(len(asked))] == [ids for ids, _ in asked]


def test_nothing_asked_nothing_said(lm: LoadedModel):
    assert list(log_likelihoods(lm, [])) == []


@pytest.mark.parametrize(
    ("ids", "start", "message"),
    [
        ([1, 2, 3], 0, "the first id cannot be scored"),
        ([1, 2, 3], 3, "no ids from 3 on, it has 3"),
        ([1] * 514, 1, "514 ids and the model's context is 512"),
        ([1, 2048], 1, "ids from 1 to 2048 and the model knows 0 to 2047"),
    ],
)
def test_what_cannot_be_scored_is_named(lm: LoadedModel, ids: list[int], start: int, message: str):
    with pytest.raises(ValueError, match=message):
        list(log_likelihoods(lm, [([1, 2], 1), (ids, start)]))

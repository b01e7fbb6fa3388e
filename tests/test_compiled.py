"""Compiled steps: called without Dynamo they compute what they compute through it."""

import dataclasses
import gc
import weakref

import pytest
import torch
from common import ROOT

from compiled import CompiledGraphCache
from decoding import LoadedModel
from engine import complete
from load import load_model, make_views
from text.generation_config import GenerationConfig

GREEDY = GenerationConfig(max_new_tokens=70, temperature=0, ignore_eos=True)
LENGTH = 100  # of the caches, which most tests share, since each length is compiled
TEXTS = "Once upon a time", "The big dog", "Tim had a red ball. One day"


@pytest.fixture(scope="module", params=[None, "int8"], ids=["dense-cache", "int8-cache"])
def lm(request: pytest.FixtureRequest) -> LoadedModel:
    options = {"kv_dtype": request.param, "compile": True, "compile_prefill": True}
    return load_model(ROOT / "checkpoints" / "demo", device="cpu", dtype=torch.float32, **options)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each compiled step was called without Dynamo."""
    found, run = [], CompiledGraphCache.run

    def watched(self: CompiledGraphCache, given: list[torch.Tensor]) -> torch.Tensor | None:
        logits = run(self, given)
        found.append(logits is not None)
        return logits

    monkeypatch.setattr(CompiledGraphCache, "run", watched)
    return found


def ids(lm: LoadedModel, texts: tuple[str, ...], **options) -> list[list[int]]:
    prompts = [lm.tokenizer.encode(text) for text in texts]
    options.setdefault("caches", lm.make_caches(len(texts), LENGTH))
    return [c.ids for c in complete(lm, prompts, GREEDY, **options)]


def eager(lm: LoadedModel) -> LoadedModel:
    return make_views(lm.model, lm.tokenizer, compile=False, compile_prefill=False)


def test_only_the_first_call_of_its_shapes_goes_through_dynamo(lm: LoadedModel, direct: list[bool]):
    caches = [lm.make_caches(1, LENGTH) for _ in range(2)]
    wanted = [ids(eager(lm), (text,)) for text in TEXTS]
    assert ids(lm, TEXTS[:1], caches=caches[0]) == wanted[0]
    # Prefill, then steps of 64, 96 and 100 visible positions, each once.
    assert 2 <= direct.count(False) <= 4
    assert len(direct) == GREEDY.max_new_tokens
    dynamo_calls = direct.count(False)
    for n in (1, 2, 0):  # other contents, and other caches of these shapes
        assert ids(lm, TEXTS[n : n + 1], caches=caches[n % 2]) == wanted[n]
    assert direct.count(False) <= dynamo_calls + 2  # prefills of other lengths
    assert len(set(map(str, wanted))) == 3


@pytest.mark.parametrize("lm", [None], ids=["dense-cache"], indirect=True)
def test_other_shapes_and_dtypes_find_graphs_of_their_own(lm: LoadedModel, direct: list[bool]):
    batch = ids(lm, TEXTS)
    assert batch == ids(eager(lm), TEXTS)
    assert [ids(lm, (text,))[0] for text in TEXTS] == batch
    caches, key_pos = lm.make_caches(1, LENGTH), torch.arange(64)
    with torch.inference_mode():
        for dtype in (torch.long, torch.int32, torch.long, torch.int32):
            token, pos = torch.tensor([[7]], dtype=dtype), torch.tensor([[0]])
            logits = lm.decode(token, pos, key_pos, caches)
            torch.testing.assert_close(logits, lm.model(token, pos, key_pos, caches))
    assert direct[-2:] == [True, True]


def test_neither_an_interrupted_call_nor_a_recorded_one_keeps_a_cache_alive(
    lm: LoadedModel, direct: list[bool], monkeypatch: pytest.MonkeyPatch
):
    """And an interrupted call is not recorded."""

    def interrupted(*args) -> None:
        raise KeyboardInterrupt

    def new_caches() -> tuple[list, list[weakref.ref]]:
        caches = lm.make_caches(1, 150)  # of a shape that is new
        return caches, [weakref.ref(tensor) for cache in caches for tensor in cache.buffers()]

    caches, kept = new_caches()
    with monkeypatch.context() as patched:
        patched.setattr(CompiledGraphCache, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ids(lm, TEXTS[:1], caches=caches)
    del caches
    gc.collect()
    assert kept and not any(ref() is not None for ref in kept)
    caches, kept = new_caches()
    assert ids(lm, TEXTS[:1], caches=caches) == ids(eager(lm), TEXTS[:1])
    assert direct[:2] == [False, False] and direct[-1]
    del caches
    gc.collect()
    assert kept and not any(ref() is not None for ref in kept)


def test_weights_that_change_in_place_are_seen(lm: LoadedModel):
    before = ids(lm, TEXTS[:1])
    weight = lm.model.layers[0].attention.wo.weight
    saved = weight.detach().clone()
    with torch.inference_mode():
        weight.neg_()
        try:
            changed = ids(lm, TEXTS[:1])
            assert changed == ids(eager(lm), TEXTS[:1]) != before
        finally:
            weight.copy_(saved)
    assert ids(lm, TEXTS[:1]) == before


def test_a_step_that_may_not_be_compiled_runs_all_the_same(lm: LoadedModel):
    short = dataclasses.replace(GREEDY, max_new_tokens=5)
    prompt = lm.tokenizer.encode("A step of a shape that nothing else has here")
    with torch.compiler.set_stance("force_eager"):
        (completion,) = complete(lm, [prompt], short, caches=lm.make_caches(1, 200))
    assert completion.ids == complete(eager(lm), [prompt], short)[0].ids

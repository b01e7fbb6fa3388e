"""A KV cache of fewer bits: what it stores, what it gives back, and the texts that come of it."""

import pytest
import torch
from common import ROOT

from engine import complete
from layers.kv_cache import KVCache
from load import load_model
from quant.kv_cache import QuantizedKVCache
from text.generation_config import GenerationConfig

CPU = torch.device("cpu")
GREEDY = GenerationConfig(max_new_tokens=40, temperature=0, ignore_eos=True)
TEXTS = ("Once upon a time", "Lily", "Tim and his dog saw a big red ball. They")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", [64, 16, 48])  # two groups; one that is smaller; one of 48
def test_what_comes_back_is_within_half_a_step(bits: int, channels: int):
    torch.manual_seed(3)
    cache = QuantizedKVCache((2, 12, 3, channels), torch.float32, CPU, bits)
    k, v = torch.randn(2, 2, 5, 3, channels) * 4 + 1
    pos = torch.stack((torch.arange(5), torch.arange(5) + 3))  # rows begin at different places
    found = cache.update(pos, k, v, 10)
    size = 32 if channels % 32 == 0 else channels
    for row in range(2):
        for new, whole in zip((k, v), found, strict=True):
            back = whole[row, pos[row]]  # (5, 3, channels)
            groups = new[row].unflatten(-1, (-1, size))
            step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
            error = (back.unflatten(-1, (-1, size)) - groups).abs().amax(-1)
            assert (error <= 0.51 * step + 0.005).all()  # 0.005: the lowest value, in float16
    assert found[0].shape == (2, 10, 3, channels)
    assert not found[0][1, :3].any() and not found[0][0, 5:].any()  # what nobody wrote is zero


def test_a_group_of_equal_values_comes_back_exactly():
    cache = QuantizedKVCache((1, 4, 1, 32), torch.float32, CPU, 4)
    k, _ = cache.update(
        torch.tensor([[0]]), torch.full((1, 1, 1, 32), 2.5), torch.zeros(1, 1, 1, 32), 1
    )
    assert (k == 2.5).all()


@pytest.mark.parametrize("name", ["demo", "demo-opt"])
def test_text_of_an_int8_cache_is_nearly_that_of_a_dense_one(name: str):
    """With distinct prompts in a batch; every row alone gives what it gives there."""
    path, texts = ROOT / "checkpoints" / name, {}
    for kv in (None, "int8", "int4"):
        lm = load_model(path, device="cpu", dtype=torch.float32, kv_dtype=kv)
        prompts = [lm.tokenizer.encode(text) for text in TEXTS]
        texts[kv] = [c.ids for c in complete(lm, prompts, GREEDY)]
        assert texts[kv] == [complete(lm, [prompt], GREEDY)[0].ids for prompt in prompts]
    agreeing = sum(
        a == b
        for r, s in zip(texts[None], texts["int8"], strict=True)
        for a, b in zip(r, s, strict=True)
    )
    assert agreeing > 0.7 * 40 * len(TEXTS)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_compiled_text_is_eager_text(kv: str):
    texts = []
    for compile in (False, True):
        options = {"device": "cpu", "dtype": torch.float32, "kv_dtype": kv, "compile": compile}
        lm = load_model(ROOT / "checkpoints" / "demo", **options)
        prompts = [lm.tokenizer.encode(text) for text in TEXTS]
        texts.append([c.ids for c in complete(lm, prompts, GREEDY)])
    assert texts[0] == texts[1]


def test_bytes_per_token_are_those_of_the_buffers():
    sizes = {}
    for kv in (None, "int8", "int4"):
        lm = load_model(ROOT / "checkpoints" / "demo", device="cpu", kv_dtype=kv)
        caches = lm.make_caches(2, 63)
        positions = 2 * caches[0].k.shape[1]
        sizes[kv] = lm.model.kv_bytes(1)
        assert sizes[kv] * positions == sum(b.nbytes for c in caches for b in c.buffers())
        assert isinstance(caches[0], KVCache) and caches[0].rows == 2
    assert sizes["int4"] < sizes["int8"] < sizes[None]


def test_an_unknown_cache_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="int2 is not one of None, int8, int4"):
        load_model(ROOT / "checkpoints" / "demo", kv_dtype="int2")

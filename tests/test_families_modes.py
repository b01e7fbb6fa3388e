"""The families in the modes of Llama: compiled, quantised, offloaded, with drafts, on ranks.

One variant of each family; windows in every mode in which caches are cut, moved or written ahead.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from common import complete_ids
from families import OF_EACH_FAMILY, WINDOW
from torch import nn

from decoding import LoadedModel
from engine import complete, generate
from load import load_model
from options.settings import MAX_DRAFT_TOKENS
from quant.linear import QuantizedLinear
from tests.ranks_worker import answers
from tests.test_tp import on_ranks, quantised
from text.generation_config import GenerationConfig
from tiers.policy import Policy, Share

Folder = Callable[[str], Path]
SEED = 20261130
COUNT = 20  # new tokens
GREEDY = GenerationConfig(max_new_tokens=COUNT, temperature=0, ignore_eos=True)
FEW = 13  # new tokens: the prompts cross window and original context, and reach 63 positions
SHORT = dataclasses.replace(GREEDY, max_new_tokens=FEW)
# From within the window across it, from within the original context across it, and beyond both.
PROMPTS = families.prompts_of(SEED, (3, 21, 50))
# Windows on all layers and on some; keys that are rotated again when a text outgrows its context.
WINDOWED = ["mistral-window", "gemma3-pattern", "phi3-longrope-window", "olmo3-yarn"]
# A variant of each graph, with few layers, since compilation takes long. The graphs of Mistral and
# OLMo 3 are made of parts of these: windows on all layers (StarCoder2), on some, OLMo 2's norms.
COMPILED = (
    "qwen2-layer-types qwen3-biases gemma2-layer-types gemma3-linear phi4-mini smollm3-no-rope "
    "olmo2-groups granite-tied starcoder2 stablelm-parallel nemotron-biases"
).split()
MIXED = Policy(Share(30, 30), Share(30, 30), Share(50, 25), micro_batch=2, micro_batches=2)


def loaded(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, device="cpu", dtype="float32", **options)


@cache
def plain_ids(path: Path) -> list[list[int]]:
    """The continuations of PROMPTS by the model in memory, eager."""
    print(f"seed {SEED}")
    found = complete_ids(loaded(path), PROMPTS, GREEDY)
    assert len({tuple(ids) for ids in found}) == len(found)
    return found


@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_tokens_are_eager_tokens(variant: str, family_folder: Folder):
    path = family_folder(variant)
    # To 63 positions: up to 64 one graph is enough.
    compiled = complete_ids(loaded(path, compile=True), PROMPTS, SHORT)
    torch.compiler.reset()
    assert compiled == [ids[:FEW] for ids in plain_ids(path)]


def relative_error(path: Path, **options: Any) -> float:
    """The error of the logits of other caches, over the tokens that are the same; relative."""
    pairs = zip(
        families.continued(loaded(path), PROMPTS, COUNT),
        families.continued(loaded(path, **options), PROMPTS, COUNT),
        strict=True,
    )
    error, size = 0.0, 0.0
    for (ids, logits), (others, found) in pairs:
        same = next((n for n in range(COUNT) if ids[n] != others[n]), COUNT - 1) + 1
        error += (found - logits)[:same].square().sum().item()
        size += logits[:same].square().sum().item()
    return (error / size) ** 0.5


@pytest.mark.parametrize("variant", OF_EACH_FAMILY)
def test_logits_of_an_int8_cache_are_close(variant: str, family_folder: Folder):
    assert 0 < relative_error(family_folder(variant), kv_dtype="int8") < 0.05


@pytest.mark.parametrize(
    ("variant", "mode"),
    [(variant, ("int4", "int8")[n % 2]) for n, variant in enumerate(OF_EACH_FAMILY)],
)
def test_quantised_weights_give_the_logits_of_their_values(
    variant: str, mode: str, family_folder: Folder
):
    path = family_folder(variant)
    file = quantised(path, "--mode", mode)
    lm, dense = loaded(file), loaded(path)
    file.unlink()  # other tests load the folder
    count = 0
    for name, linear in lm.model.named_modules():
        if isinstance(linear, QuantizedLinear):
            values = nn.Parameter(linear.dequantize(torch.float32))
            dense.model.get_submodule(name).weight, count = values, count + 1
    assert count == 4 * lm.model.args.n_layers + 1  # the output head is quantised, too
    pairs = (families.continued(model, PROMPTS, 10) for model in (lm, dense))
    for found, expected in zip(*pairs, strict=True):
        families.check_continuation(found, expected, 1e-4)


def test_two_ranks_are_one(family_folder: Folder, tmp_path: Path):
    """Each has shares of the matrices, or half of the layers."""
    shared = {"texts": PROMPTS, "how": {"max_new_tokens": FEW}}
    cases = [shared | {"path": str(family_folder(variant))} for variant in OF_EACH_FAMILY]
    cases = [case | {"pipeline": pipeline} for case in cases for pipeline in (False, True)]
    by_rank = on_ranks(2, cases, tmp_path)
    for n, variant in enumerate(OF_EACH_FAMILY):
        alone = answers(cases[2 * n]["path"], None, **shared)
        for shares, stages in (results[2 * n : 2 * n + 2] for results in by_rank):
            assert shares["ids"] == stages["ids"] == alone["ids"], variant
            assert (shares["logits"] - alone["logits"]).abs().max() < 1e-4, variant


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("variant", WINDOWED)
def test_offloaded_tokens_are_those_of_the_model_in_memory(
    variant: str, kv_dtype: str | None, family_folder: Folder, tmp_path: Path
):
    path = family_folder(variant)
    expected = complete_ids(loaded(path, kv_dtype=kv_dtype), PROMPTS, SHORT)
    for policy in (
        MIXED,
        Policy(Share(0, 0), Share(0, 0), micro_batch=1, micro_batches=3),
        Policy(cache=Share(0, 100), micro_batch=3, micro_batches=1, cpu_attention=True),
    ):
        policy = dataclasses.replace(policy, directory=tmp_path)
        moving = loaded(path, kv_dtype=kv_dtype, policy=policy)
        assert complete_ids(moving, PROMPTS, SHORT) == expected, policy


@pytest.mark.parametrize("draft", ["ngram", "self-int8", "self-int4"])
@pytest.mark.parametrize("variant", WINDOWED)
def test_drafts_change_no_token(variant: str, draft: str, family_folder: Folder):
    """A rejected token may not have overwritten what a window still shows."""
    path = family_folder(variant)
    for k in (2, 5, MAX_DRAFT_TOKENS):
        lm = loaded(path, draft=draft, speculate_k=k)
        assert complete_ids(lm, PROMPTS, GREEDY) == plain_ids(path), k


@pytest.mark.parametrize("chunk", [1, WINDOW - 1, WINDOW, WINDOW + 1, 23])
@pytest.mark.parametrize("variant", WINDOWED)
def test_a_prompt_may_be_read_in_chunks(variant: str, chunk: int, family_folder: Folder):
    path = family_folder(variant)
    lm = dataclasses.replace(loaded(path), prefill_chunk_tokens=chunk * len(PROMPTS))
    assert complete_ids(lm, PROMPTS, GREEDY) == plain_ids(path)


@pytest.mark.parametrize("variant", WINDOWED)
def test_a_row_that_ends_early_leaves_the_others(variant: str, family_folder: Folder):
    """The batch is compacted while other rows go on."""
    path, live = family_folder(variant), set()
    prompts = [*PROMPTS, *families.prompts_of(SEED + 1, (5, 9, 33))]
    alone = [complete_ids(loaded(path), [prompt], GREEDY)[0] for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for n, step in enumerate(generate(loaded(path), prompts, GREEDY, live=live)):
        for row, ids in enumerate(step):
            found[row] += ids
        live -= {n // 3} if n < 15 else set()  # rows 0 to 4, one after the other
    for row, ids in enumerate(found):
        assert len(ids) == (COUNT if row == 5 else 3 * row + 1)
        assert ids == alone[row][: len(ids)], row


@pytest.mark.parametrize("variant", WINDOWED)
def test_a_conversation_goes_on_from_its_caches(variant: str, family_folder: Folder):
    lm = loaded(family_folder(variant))
    short = dataclasses.replace(GREEDY, max_new_tokens=15)
    caches, text, held = lm.make_caches(1, 200), [], 0
    for prompt in PROMPTS:
        text += prompt
        (answer,) = complete(lm, [text], short, caches=caches, past=held)
        assert [answer.ids] == complete_ids(lm, [text], short)
        held = len(text) + len(answer.ids) - 1
        text += answer.ids

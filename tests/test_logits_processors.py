"""What changes logits, and what is reported of them: against transformers, in batches, with drafts.

Texts of 24 tokens in float32; the drafts are other models, so that guesses are right and wrong.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import DEMO, DRAFT, TEXTS, hugging_face_model
from common import complete_ids as ids
from torch import Tensor

from decoding import LoadedModel
from engine import complete, generate
from load import load_model
from text.generation_config import GenerationConfig
from text.processors import LogitsProcessors

DRAFTS = ("ngram", "self-int4", DRAFT)
GREEDY = GenerationConfig(max_new_tokens=24, temperature=0, ignore_eos=True)
PENALTIES = (
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8},
    {"frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"repetition_penalty": 1.2, "presence_penalty": 1.5, "logit_bias": {15: -3.0, 7: 2.5}},
)


@pytest.fixture(scope="module")
def plain() -> LoadedModel:
    return load_model(DEMO, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    return hugging_face_model(DEMO)


def prompts(lm: LoadedModel) -> list[list[int]]:
    return [lm.tokenizer.encode(text) for text in TEXTS]


def openai_penalties(config: GenerationConfig, start: int) -> Callable[[Tensor, Tensor], Tensor]:
    """OpenAI's formula, mu[j] - c[j] * frequency - (c[j] > 0) * presence, in a loop over ids."""

    def change(text: Tensor, logits: Tensor) -> Tensor:
        logits = logits.clone()
        for row, said in zip(logits, text[:, start:].tolist(), strict=True):
            for token in set(said):
                count = said.count(token)
                row[token] -= count * config.frequency_penalty + config.presence_penalty
        return logits

    return change


def generate_greedily(theirs: Any, given: Tensor, **options: Any) -> Any:
    """What transformers' model makes of ids, (1, T), with as many new ones as GREEDY asks for."""
    return theirs.generate(
        given,
        attention_mask=torch.ones_like(given),
        pad_token_id=1,
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=None,
        **options,
    )


def wanted_ids(theirs, prompt: list[int], config: GenerationConfig) -> list[int]:
    """What transformers generates, with its own repetition penalty and sequence bias."""
    given = torch.tensor([prompt])
    tokens = generate_greedily(
        theirs,
        given,
        repetition_penalty=config.repetition_penalty,
        sequence_bias={(token,): bias for token, bias in config.logit_bias} or None,
        logits_processor=[openai_penalties(config, len(prompt))],
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_penalties_in_a_batch_are_those_of_transformers(plain, theirs, options: dict):
    config = dataclasses.replace(GREEDY, **options)
    found = ids(plain, prompts(plain), config)
    assert found == [wanted_ids(theirs, prompt, config) for prompt in prompts(plain)]
    assert found != ids(plain, prompts(plain), GREEDY)


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("draft", DRAFTS, ids=str)
def test_with_a_draft_the_text_is_the_same(plain, draft: str | Path, temperature: float):
    lm = load_model(DEMO, device="cpu", dtype=torch.float32, draft=draft, speculate_k=3)
    changes = {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "logit_bias": {15: 1.0}}
    config = dataclasses.replace(GREEDY, temperature=temperature, seed=5, **changes)
    options = {"logits_processors": [never_twice_in_a_row]}
    wanted = ids(plain, prompts(plain), config, **options)
    assert ids(lm, prompts(plain), config, **options) == wanted
    numbered = enumerate(prompts(plain))
    alone = [ids(plain, [p], config, streams=[n], **options)[0] for n, p in numbered]
    assert wanted == alone
    assert sum(lm.draft.controller.stats.drafted) > 0


def never_twice_in_a_row(text: Tensor, logits: Tensor) -> Tensor:
    assert text.dim() == 2 and len(text) == len(logits)
    return logits.scatter(1, text[:, -1:], float("-inf"))


def test_processors_of_transformers_can_be_given(plain, theirs):
    processors = pytest.importorskip("transformers.generation.logits_process")
    given = [
        processors.NoRepeatNGramLogitsProcessor(2),
        processors.RepetitionPenaltyLogitsProcessor(1.3),
    ]
    found = ids(plain, prompts(plain), GREEDY, logits_processors=given)
    for prompt, row in zip(prompts(plain), found, strict=True):
        text = torch.tensor([prompt])
        wanted = generate_greedily(theirs, text, logits_processor=given)
        assert row == wanted[0, len(prompt) :].tolist()


def test_with_compiled_code_too(plain: LoadedModel):
    compiled = load_model(DEMO, device="cpu", dtype=torch.float32, compile=True)
    config = dataclasses.replace(GREEDY, repetition_penalty=1.3, logprobs=1)
    options = {"logits_processors": [never_twice_in_a_row]}
    two = prompts(plain)[:2]
    assert ids(compiled, two, config, **options) == ids(plain, two, config, **options)


def test_rows_that_have_ended_leave_the_others_their_history(plain: LoadedModel):
    """Three of four rows end early, and the caches and what was generated are moved together."""
    config = dataclasses.replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.3)
    wanted = ids(plain, prompts(plain), config)
    live: set[int] = set()
    found = [[] for _ in wanted]
    for n, step in enumerate(generate(plain, prompts(plain), config, live=live)):
        for row, new in enumerate(step):
            found[row] += new
        if n == 3:
            live -= {0, 1, 2}
    assert found == [*(row[:4] for row in wanted[:3]), wanted[3]]


def test_functions_see_rows_of_one_length_together_and_without_padding(plain: LoadedModel):
    seen = []

    def look(text: Tensor, logits: Tensor) -> Tensor:
        seen.extend(text.tolist())
        return logits

    found = ids(plain, [[5, 6], [7, 8], [9]], GREEDY, logits_processors=[look])
    texts = [[*p, *row] for p, row in zip([[5, 6], [7, 8], [9]], found, strict=True)]
    starts = [2, 2, 1]
    wanted = [t[: s + n] for t, s in zip(texts, starts, strict=True) for n in range(24)]
    assert sorted(seen) == sorted(wanted)


def test_nothing_is_made_where_nothing_changes(plain: LoadedModel, monkeypatch):
    monkeypatch.setattr(LogitsProcessors, "__init__", lambda *_: pytest.fail("made"))
    ids(plain, prompts(plain), dataclasses.replace(GREEDY, max_new_tokens=2))


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda text, logits: None, "returned NoneType"),
        (lambda text, logits: logits[:, :5], r"returned shape \(1, 5\)"),
        (lambda text, logits: logits.argmax(-1), r"returned shape \(1,\)"),
    ],
)
def test_a_function_that_returns_no_logits_is_named(plain: LoadedModel, function, words: str):
    with pytest.raises(ValueError, match=f"logits processor <lambda> {words}"):
        ids(plain, ["Lily"], GREEDY, logits_processors=[function])


def test_a_function_that_makes_nan_ends_the_run(plain: LoadedModel):
    options = {"logits_processors": [lambda text, logits: logits * float("nan")]}
    with pytest.raises(ValueError, match="logits processor"):
        ids(plain, ["Lily"], GREEDY, **options)


def test_a_bias_of_an_id_that_the_model_lacks_is_refused(plain: LoadedModel):
    vocab = plain.model.args.vocab_size
    config = dataclasses.replace(GREEDY, logit_bias={vocab: 1.0})
    with pytest.raises(ValueError, match=f"logit_bias has id {vocab} and the model knows 0 to"):
        ids(plain, ["Lily"], config)


@pytest.mark.parametrize("draft", [None, *DRAFTS], ids=str)
def test_logprobs_are_those_of_transformers(plain, theirs, draft: str | Path | None):
    """Of drawn tokens too, and whatever temperature, filters and penalties there are."""
    lm = plain
    if draft:
        lm = load_model(DEMO, device="cpu", dtype=torch.float32, draft=draft, speculate_k=3)
    changes = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "logprobs": 3}
    completions = complete(lm, prompts(lm), dataclasses.replace(GREEDY, **changes))
    for prompt, completion in zip(prompts(lm), completions, strict=True):
        text = torch.tensor([[*prompt, *completion.ids]])
        with torch.no_grad():
            logits = theirs(text).logits[0, len(prompt) - 1 : -1]  # (24, V)
        wanted = logits.log_softmax(-1)
        chosen = wanted.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)
        found = torch.tensor([entry.logprob for entry in completion.logprobs])
        torch.testing.assert_close(found, chosen, atol=1e-4, rtol=0)
        top = wanted.topk(3)
        for n, entry in enumerate(completion.logprobs):
            assert [token for token, _ in entry.top] == top.indices[n].tolist()
            assert [p for _, p in entry.top] == pytest.approx(top.values[n].tolist(), abs=1e-4)


def test_logprobs_are_transition_scores(plain: LoadedModel, theirs):
    (completion,) = complete(plain, [TEXTS[0]], dataclasses.replace(GREEDY, logprobs=0))
    given = torch.tensor(prompts(plain)[:1])
    said = generate_greedily(theirs, given, output_scores=True, return_dict_in_generate=True)
    wanted = theirs.compute_transition_scores(said.sequences, said.scores, normalize_logits=True)
    found = [entry.logprob for entry in completion.logprobs]
    assert found == pytest.approx(wanted[0].tolist(), abs=1e-4)
    assert all(entry.top == [] for entry in completion.logprobs)


def test_no_more_logprobs_than_ids_and_none_unless_asked_for(plain: LoadedModel):
    short = dataclasses.replace(GREEDY, max_new_tokens=2)
    (completion,) = complete(plain, ["Lily"], dataclasses.replace(short, logprobs=1000))
    assert len(completion.logprobs) == 2 and len(completion.logprobs[0].top) == 1000
    assert complete(plain, ["Lily"], short)[0].logprobs == []

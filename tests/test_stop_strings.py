"""What ends a text: stop strings, special tokens among them, limits, and numbers that are none.

"." is made a special token of the demo model, as <|im_end|> is elsewhere: it then has no text.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import DEMO, DRAFT, TEXTS, hugging_face_model
from safetensors.torch import load_file, save_file

from decoding import LoadedModel
from engine import complete, generate, stream
from load import load_model
from text.completion import Completion
from text.generation_config import GenerationConfig
from text.tokenizer import load_tokenizer
from tiers.policy import Policy, Share

GREEDY = GenerationConfig(max_new_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, whose tokens "." and "!" are special."""
    folder = tmp_path_factory.mktemp("special")
    for file in DEMO.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in (".", "!"):
        entry = {"id": vocab[token], "content": token, "special": True, **flags}
        tokenizer["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def lm(special: Path) -> LoadedModel:
    return load_model(special, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def spelled() -> list[str]:
    """The texts with every special token as text: those of the model where none is special."""
    plain = load_model(DEMO, device="cpu", dtype=torch.float32)
    return [c.text for c in complete(plain, [prompt_ids(text) for text in TEXTS], GREEDY)]


def prompt_ids(text: str) -> list[int]:
    return load_tokenizer(DEMO).encode(text)


def shown(text: str) -> str:
    return text.replace(".", "").replace("!", "")


STOPS = [(".",), (". ",), ("y.",), (".", "!"), ("ily. S", "!"), ("never", "! ")]
DRAFTED = ("ngram", "self-int4", DRAFT)


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings_are_found_where_special_tokens_are_spelled_out(lm, spelled, stop: tuple):
    config = dataclasses.replace(GREEDY, stop=stop)
    completions = complete(lm, [prompt_ids(text) for text in TEXTS], config)
    for whole, completion in zip(spelled, completions, strict=True):
        cuts = [at for text in stop if (at := whole.find(text)) >= 0]
        assert completion.text == shown(whole[: min(cuts, default=None)])
        assert completion.finish_reason == ("stop" if cuts else "length")


def test_a_special_token_as_stop_string_ends_where_transformers_ends(special: Path, lm):
    transformers = pytest.importorskip("transformers")
    theirs = hugging_face_model(special)
    tokenizer = transformers.AutoTokenizer.from_pretrained(special)
    for stop in (".", "ily.", ". "):
        given = torch.tensor([prompt_ids(TEXTS[0])])
        wanted = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            pad_token_id=1,
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=None,
            stop_strings=[stop],
            tokenizer=tokenizer,
        )
        config = dataclasses.replace(GREEDY, stop=stop)
        (completion,) = complete(lm, [prompt_ids(TEXTS[0])], config)
        assert completion.ids == wanted[0, given.shape[1] :].tolist()
        assert completion.finish_reason == "stop"


@pytest.mark.parametrize("draft", DRAFTED, ids=str)
def test_with_drafts_too(special: Path, lm, draft: str | Path):
    if draft == DRAFT:  # which needs the same tokenizer
        draft = dataclasses.replace(
            load_model(DRAFT, device="cpu", dtype=torch.float32), tokenizer=lm.tokenizer
        )
    drafted = load_model(special, device="cpu", dtype=torch.float32, draft=draft, speculate_k=4)
    config = dataclasses.replace(GREEDY, stop=". ")
    given = [prompt_ids(text) for text in TEXTS]
    assert contents(complete(drafted, given, config)) == contents(complete(lm, given, config))


def test_offloaded_too(special: Path, lm, offloaded: Policy):
    away = load_model(special, device="cpu", dtype=torch.float32, policy=offloaded)
    config = dataclasses.replace(GREEDY, stop=(". ", "ily."), repetition_penalty=1.1)
    assert contents(complete(away, TEXTS, config)) == contents(complete(lm, TEXTS, config))


@pytest.fixture
def offloaded(tmp_path: Path) -> Policy:
    halves = Share(50, 25)
    return Policy(halves, halves, halves, micro_batch=2, micro_batches=2, directory=tmp_path)


def contents(completions: list[Completion]) -> list[tuple]:
    return [(c.ids, c.text, c.finish_reason) for c in completions]


@pytest.mark.parametrize("stop", [".", "a.b", ".b", "b.", "x"])
def test_what_is_shown_is_certain(lm, stop: str):
    """A letter or special token at a time: what is shown never turns out to begin a stop string."""
    text = "aa.b.a.bx"
    letters = {letter: lm.tokenizer.encode(letter, bos=False)[-1] for letter in "abx"}
    letters["."] = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]["."]
    for cut in range(len(text) + 1):
        completion = Completion(lm.tokenizer, [5], GenerationConfig(stop=stop))
        seen = "".join(completion.extend([letters[c]]) for c in text[:cut]) + completion.close()
        wanted = lm.tokenizer.decode([5, *(letters[c] for c in text[:cut].split(stop)[0])])
        assert seen == completion.text == wanted.removeprefix(lm.tokenizer.decode([5]))


def test_a_stop_string_that_is_eos_ends_a_text_where_eos_does_not(lm):
    eos = lm.tokenizer.eos_ids[0]
    for ignore, reason in ((True, "stop"), (False, "stop")):
        config = GenerationConfig(stop="</s>", ignore_eos=ignore)
        completion = Completion(lm.tokenizer, [5], config)
        completion.extend([7, eos, 8])
        assert completion.ids == [7, eos] and completion.finish_reason == reason
    completion = Completion(lm.tokenizer, [5], GenerationConfig())
    completion.extend([7, eos])
    assert completion.finish_reason == "eos"


def test_a_very_long_stop_string_costs_nothing(lm):
    completion = Completion(lm.tokenizer, [5], GenerationConfig(stop="ab" * 10**6))
    for _ in range(200):
        completion.extend([7])
    assert completion.close() or completion.text


def test_the_pieces_of_a_stream_are_the_text(lm):
    config = dataclasses.replace(GREEDY, stop=("ily",))
    (completion,) = complete(lm, TEXTS[0], config)
    pieces = list(stream(lm, TEXTS[0], config))
    assert len(pieces) > 3 and "".join(pieces) == completion.text
    assert "".join(stream(lm, prompt_ids(TEXTS[0]), config)) == completion.text
    assert len("".join(stream(lm, TEXTS[0], GREEDY))) > len(completion.text)
    with pytest.raises(ValueError, match="empty"):
        next(stream(lm, [], config))


def test_prompts_may_be_texts(lm):
    wanted = contents(complete(lm, [prompt_ids(text) for text in TEXTS], GREEDY))
    assert contents(complete(lm, TEXTS, GREEDY)) == wanted
    assert contents(complete(lm, [TEXTS[0], prompt_ids(TEXTS[1])], GREEDY)) == wanted[:2]
    assert contents(complete(lm, TEXTS[0], GREEDY)) == wanted[:1]
    for given in ([1, 2, 3], [[1.5]], [["a"]], [None]):
        with pytest.raises(ValueError, match="must be a text or a list of token ids"):
            next(generate(lm, given, GREEDY))


@pytest.mark.parametrize("draft", [None, "ngram", DRAFT], ids=str)
def test_a_limit_far_beyond_the_context_is_the_contexts_rest(draft: str | Path | None):
    lm = load_model(DEMO, device="cpu", dtype=torch.float32, draft=draft)
    context = lm.model.args.context
    prompt = (prompt_ids(TEXTS[2]) * 60)[: context - 6]
    for limit in (2**31 - 1, 10**30):
        config = GenerationConfig(max_new_tokens=limit, seed=3, ignore_eos=True)
        (completion,) = complete(lm, [prompt], config)
        assert len(completion.ids) == 6 and completion.context_full
        six = dataclasses.replace(config, max_new_tokens=6)
        (same,) = complete(lm, [prompt], six)
        assert same.ids == completion.ids and not same.context_full


def poisoned(change: Callable[[LoadedModel], None], **options) -> LoadedModel:
    lm = load_model(DEMO, device="cpu", dtype=torch.float32, **options)
    with torch.no_grad():
        change(lm)
    return lm


def nan_in_layer(n: int) -> Callable[[LoadedModel], None]:
    return lambda lm: lm.model.layers[n].feed_forward.w2.weight[3, 5].fill_(float("nan"))


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("draft", [None, "ngram"], ids=str)
@pytest.mark.parametrize(
    "change, name",
    [
        (nan_in_layer(2), r"layer 2 \(counted from 0\)"),
        (lambda lm: lm.model.layers[0].attention.wo.weight.fill_(3e38), "layer 0"),
        (lambda lm: lm.model.tok_embeddings.weight[:, 9].fill_(float("inf")), "the embedding"),
        (lambda lm: lm.model.norm.weight.fill_(float("nan")), "the head"),
    ],
    ids=["nan", "large", "embedding", "norm"],
)
def test_logits_that_are_not_finite_name_the_first_layer(change, name, draft, temperature):
    lm = poisoned(change, draft=draft)
    config = dataclasses.replace(GREEDY, temperature=temperature)
    with pytest.raises(
        ValueError, match=f"not finite numbers: {name} .* is the first|{name} is the"
    ):
        complete(lm, TEXTS, config)


def test_an_offloaded_model_and_a_compiled_one_name_the_layer_too(
    tmp_path: Path, offloaded: Policy
):
    """Layers that are on disk cannot be changed in memory: the file is."""
    for file in DEMO.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for options in ({"policy": offloaded}, {"compile": True}):
        lm = load_model(tmp_path, device="cpu", dtype=torch.float32, **options)
        with pytest.raises(ValueError, match="layer 3 .* is the first"):
            complete(lm, TEXTS, GREEDY)


def test_a_draft_whose_logits_are_not_finite_changes_no_text():
    plain = load_model(DEMO, device="cpu", dtype=torch.float32)
    draft = load_model(DRAFT, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        draft.model.norm.weight.fill_(float("nan"))
    lm = load_model(DEMO, device="cpu", dtype=torch.float32, draft=draft, speculate_k=2)
    assert contents(complete(lm, TEXTS, GREEDY)) == contents(complete(plain, TEXTS, GREEDY))


def test_a_row_that_has_ended_may_have_any_logits(lm):
    """A text that nobody looks at any more ends no other one's run."""

    def nan_for_lily(text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        late = text.shape[1] > len(prompt_ids("Lily")) + 5
        ours = (text[:, 1] == prompt_ids("Lily")[1]).unsqueeze(1)
        return torch.where(ours & late, float("nan"), logits)

    live: set[int] = set()
    given = [prompt_ids(text) for text in ("Lily", "Once upon a time")]
    options = {"live": live, "logits_processors": [nan_for_lily]}
    for n, _ in enumerate(generate(lm, given, GREEDY, **options)):
        if n == 2:
            live.discard(0)
    assert n == GREEDY.max_new_tokens - 1

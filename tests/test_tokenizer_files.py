"""The small files beside a vocabulary: contradictions, added tokens, damage; and limits of
templates. The oracle is transformers, over generated combinations."""

import itertools
import json
import random
from pathlib import Path

import pytest
from test_tokenizer import make_small_bpe, make_small_opt, make_small_sp, write_json

import chat_template
from tokenizer import load_tokenizer

SEED = 20250725
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAKERS = {"sp": make_small_sp, "bpe": make_small_bpe, "opt": make_small_opt}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, folder in folders.items():
        MAKERS[name](folder)
    return folders


@pytest.fixture
def beside(made, tmp_path):
    """A folder with a vocabulary and the files given, each time a new one."""
    numbers = itertools.count()

    def make(name: str, **files: object) -> Path:
        folder = tmp_path / f"{name}{next(numbers)}"
        folder.mkdir()
        for file in made[name].iterdir():
            (folder / file.name).symlink_to(file)
        for stem, value in files.items():
            write_json(folder / f"{stem}.json", value)
        return folder

    return make


def entry(text: str, **flags: bool) -> dict:
    return {"content": text, "special": True, "normalized": False} | flags


# ---- who says what BOS and EOS are --------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


# An empty text is left out: transformers 5.23 ends in a RecursionError there.
TYPED = {"__type": "AddedToken"} | {"content": "</s>", "lstrip": False}
BOS = ["absent", "<s>", "</s>", TYPED]


def plain(token):
    return token if isinstance(token, str) else {k: v for k, v in token.items() if k != "__type"}


@pytest.mark.parametrize("name", ["sp", "bpe"])
def test_bos_is_that_of_transformers(beside, transformers, name):
    config_ids = [None, 0, 1, 2, 7, 10**6]
    cases = [*itertools.product(BOS, BOS, [False, True], config_ids, config_ids)]
    for config, overrides, decoder, model, generation in random.Random(SEED).sample(cases, 24):
        settings = dict(LLAMA if name == "sp" else FAST)
        settings |= {} if config == "absent" else {"bos_token": config}
        settings |= {"added_tokens_decoder": {"1": entry("<s>")}} if decoder else {}
        folder = beside(
            name,
            tokenizer_config=settings,
            special_tokens_map={} if overrides == "absent" else {"bos_token": plain(overrides)},
            config={"model_type": "llama", "bos_token_id": model},
            generation_config={"bos_token_id": generation},
        )
        tok = load_tokenizer(folder)
        hf = transformers.AutoTokenizer.from_pretrained(folder)
        case = f"{config} {overrides} {decoder} {model} {generation}"
        if name == "bpe" and hf.bos_token is None:
            assert tok.bos_id == 1, case  # of the post-processor
        else:
            assert tok.bos_id == hf.bos_token_id, case
        if name == "sp" or tok.bos_id == 1:  # transformers leaves the post-processor as it is
            assert tok.encode("Hello there") == hf.encode("Hello there"), case


@pytest.mark.parametrize("ids", [None, 0, -1, 10**6, [], [0, -5]])
@pytest.mark.parametrize("text", ["", None, "<unk>", "<|nowhere|>", {"content": ""}])
def test_what_is_no_bos_leaves_the_models_own(beside, text, ids):
    folder = beside(
        "sp",
        tokenizer_config={"bos_token": text, "eos_token": text},
        config={"bos_token_id": ids, "eos_token_id": ids, "vocab_size": 500},
    )
    tok = load_tokenizer(folder)
    assert (tok.bos_id, tok.eos_ids, tok.encode("")) == (1, (2,), [1])


def test_where_a_text_ends_is_generations_affair(beside, transformers):
    ids = [None, [], -1, 0, 2, [5, 2], [0, 5], 10**6]
    for generation, config in itertools.product(ids, ids):
        folder = beside(
            "bpe",
            generation_config={"eos_token_id": generation},
            config={"eos_token_id": config},
            tokenizer_config={"eos_token": "<|eot_id|>"},
        )
        expected: tuple[int, ...] = (5,)
        for source in (config, generation):
            entries = source if isinstance(source, list) else [source]
            valid = [i for i in entries if i in (2, 5)]
            expected = tuple(valid) or expected
        assert load_tokenizer(folder).eos_ids == expected, f"{generation} {config}"


def test_an_id_that_the_model_alone_has_can_end_a_text(beside):
    folder = beside("bpe", config={"vocab_size": 600, "eos_token_id": 599})
    assert load_tokenizer(folder).eos_ids == (599,)


# ---- added tokens -------------------------------------------------------------------------------


def chatml_files(size: int, **settings: object) -> dict:
    """As the ChatML fine-tunes of 2023 came: no tokenizer.json."""
    start, end = "<|im_start|>", "<|im_end|>"
    special = {"0": entry("<unk>"), "1": entry("<s>"), "2": entry("</s>")}
    special |= {str(size): entry(start), str(size + 1): entry(end)}
    settings = {"bos_token": "<s>", "eos_token": end, "chat_template": CHATML} | settings
    return {
        "added_tokens": {start: size, end: size + 1},
        "tokenizer_config": LLAMA | settings | {"added_tokens_decoder": special},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": end},
        "config": {"model_type": "llama", "eos_token_id": size + 1, "vocab_size": size + 2},
    }


@pytest.fixture(scope="module")
def sp_size(made):
    return load_tokenizer(made["sp"]).vocab_size


@pytest.mark.parametrize("legacy", [True, False])
def test_chatml_beside_a_sentencepiece_model(beside, transformers, sp_size, legacy):
    folder = beside("sp", **chatml_files(sp_size, legacy=legacy))
    tok, chat = load_tokenizer(folder), [{"role": "user", "content": "Hello there"}] * 2
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tok.apply_chat_template(chat)
    expected = hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == expected and ids.count(sp_size) == 3 and ids.count(sp_size + 1) == 2
    assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True)
    assert tok.eos_ids == (sp_size + 1,) and tok.vocab_size == sp_size + 2
    assert tok.special_id("<|im_end|>") == sp_size + 1
    plain = tok.encode("a<|im_end|>b")  # no user forges the end of a turn
    assert sp_size + 1 not in plain and tok.decode(plain) == "a<|im_end|>b"


@pytest.mark.parametrize("how", ["decoder", "file", "file and map", "list"])
def test_added_tokens_in_any_file(beside, transformers, sp_size, how):
    files: dict = {"tokenizer_config": dict(LLAMA, legacy=True)}
    if how == "decoder":
        decoder = {str(sp_size + i): entry(f"[X{i}]", special=i == 1) for i in range(2)}
        files["tokenizer_config"]["added_tokens_decoder"] = decoder
    elif how == "list":
        files["tokenizer_config"]["additional_special_tokens"] = ["[X0]", "[X1]"]
    else:
        files["added_tokens"] = {"[X0]": sp_size, "[X1]": sp_size + 1}
    if how == "file and map":
        files["special_tokens_map"] = {"additional_special_tokens": ["[X0]", "[X1]"]}
    folder = beside("sp", config={"model_type": "llama"}, **files)
    tok, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "Once[X0]upon a[X1]time[X0]"
    ids = tok.encode(text, special=True)
    assert ids == hf.encode(text) and {sp_size, sp_size + 1} < set(ids)
    if how != "file and map":  # where transformers 5.23 forgets that these are special
        assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True)


def test_flags_of_added_tokens(beside, transformers, sp_size):
    names, rng = ("lstrip", "rstrip", "single_word", "normalized", "special"), random.Random(SEED)
    for _ in range(12):
        decoder = {
            str(sp_size + i): entry(text) | {name: rng.random() < 0.5 for name in names}
            for i, text in enumerate(["<a>", "foo", "[B]"])
        }
        # Not legacy: else the model's space comes before a stretch that begins with a space, too,
        # as in llama.cpp and the older transformers, but no longer in this one.
        settings = LLAMA | {"legacy": False, "added_tokens_decoder": decoder}
        folder = beside("sp", tokenizer_config=settings, config={"model_type": "llama"})
        tok, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("cat <a> mat", "food foo the foo", "the  [B]  dog<a><a>\n[B]", "foo[B]foo"):
            ids = tok.encode(text, special=True)
            assert ids == hf.encode(text), f"{text!r} {decoder}"
            assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True)


def test_gaps_and_flags_beside_merges(beside, transformers):
    size = 450
    decoder = {"451": entry("<|im_start|>"), "460": entry("[X]", special=False, lstrip=True)}
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder}
    tok = load_tokenizer(beside("opt", tokenizer_config=settings))
    assert tok.vocab_size == 461 > size
    ids = tok.encode("<|im_start|>the cat [X]", special=True)
    assert 451 in ids and ids[-1] == 460 and tok.decode(ids) == "the cat[X]"
    assert 460 in tok.encode("the [X]") and 451 not in tok.encode("<|im_start|>")


def test_tokens_added_beside_tokenizer_json(beside, transformers):
    settings = FAST | {"eos_token": "the", "additional_special_tokens": ["<|im_end|>"]}
    folder = beside("bpe", tokenizer_config=settings, config={"model_type": "llama"})
    tok, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the cat<|im_end|>", "mat<|im_end|> the"):
        assert tok.encode(text, special=True) == hf.encode(text)
    assert tok.decode(tok.encode("a<|im_end|>b", special=True)) == "ab"


# ---- templates ----------------------------------------------------------------------------------

TEMPLATES = {
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}",
    "generation trimmed": "{%- for m in messages %}\n  {%- generation -%}\n {% set x = m.content %}"
    " {{ x }} {%- endgeneration %}{{ x }}{% endfor %}",
    "named": "{{ unk_token + pad_token + cls_token }}{% if sep_token is defined %}{{ 1 }}{% endif %}"
    "{{ image_token }}{{ add_bos_token }}",
    "break": "{% for m in messages %}{{ m | tojson(indent=2) }}{% break %}{% endfor %}{{ tools }}",
}
CHAT = [{"role": "user", "content": "Hé<"}, {"role": "assistant", "content": "2\n"}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("where", ["settings", "list", "dict", "jinja"])
def test_templates_are_those_of_transformers(beside, transformers, template, where):
    values = {"settings": template, "dict": {"default": template, "rag": "no"}}
    values["list"] = [{"name": n, "template": t} for n, t in (("rag", "no"), ("default", template))]
    names = {"unk_token": "<unk>", "pad_token": TYPED, "cls_token": "<s>"}
    names |= {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<img>"}
    settings = FAST | names | {"chat_template": values.get(where, "old")}
    folder = beside("bpe", tokenizer_config=settings, config={"model_type": "llama"})
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tok, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tok.chat_text(CHAT) == hf.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_chat_template_json(beside):
    folder = beside("bpe", chat_template={"chat_template": "{{ messages[0].content }}"})
    assert load_tokenizer(folder).chat_text(CHAT) == "Hé<"


ENDLESS = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "prints": "{% for i in range(99999) %}{% for j in range(99999) %}aa{% endfor %}{% endfor %}",
    "repeats": "{{ 'x' * 10**9 }}",
    "doubles": "{% set n = namespace(a='ab') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}"
    "{% endfor %}",
    "pads": "{{ ('%999999999d' % 1) | length }}",
    "centres": "{{ 'x' | center(10**10) }}",
    "power": "{{ (9 ** (9 ** 9)) % 7 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
    "words": "{{ lipsum(n=10**9) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=list(ENDLESS))
def test_a_template_without_end_is_ended(template):
    with pytest.raises(ValueError, match="the chat template failed") as caught:
        chat_template.render(template, {}, seconds=1)
    assert "\n" not in str(caught.value)
    assert chat_template.render("{{ x }}", {"x": "goes on"}) == "goes on"

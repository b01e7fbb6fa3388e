"""The small files beside a vocabulary: contradictions, added tokens, damage; and limits of
templates. The oracle is transformers, over generated combinations."""

import itertools
import json
import random
from pathlib import Path

import pytest
from test_tokenizer import make_small_bpe, make_small_opt, make_small_sp, write_json

from text import chat_template
from text.tokenizer import load_tokenizer

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
    "named": "{{ unk_token + pad_token + cls_token }}"
    "{% if sep_token is defined %}{{ 1 }}{% endif %}"
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
        chat_template.render(template, {}, cpu_seconds=1)
    assert "\n" not in str(caught.value)
    assert chat_template.render("{{ x }}", {"x": "goes on"}) == "goes on"


# ---- damage -------------------------------------------------------------------------------------

WRONG = [
    ("tokenizer_config", "bos_token", 5),
    ("tokenizer_config", "eos_token", ["</s>"]),
    ("tokenizer_config", "pad_token", {"content": 1.5}),
    ("tokenizer_config", "eos_token", "\ud800"),
    ("tokenizer_config", "add_bos_token", "yes"),
    ("tokenizer_config", "legacy", 0),
    ("tokenizer_config", "chat_template", 7),
    ("tokenizer_config", "chat_template", [{"name": "default", "template": ["a"]}]),
    ("tokenizer_config", "added_tokens_decoder", [1]),
    ("tokenizer_config", "added_tokens_decoder", {"one": entry("x")}),
    ("tokenizer_config", "added_tokens_decoder", {"7": "x", "8": 9}),
    ("tokenizer_config", "added_tokens_decoder", {"999999999": entry("x")}),
    ("tokenizer_config", "added_tokens_decoder", {"7": entry("x", lstrip=None)}),
    ("tokenizer_config", "additional_special_tokens", "<x>"),
    ("special_tokens_map", "bos_token", [1]),
    ("special_tokens_map", "additional_special_tokens", [3]),
    ("added_tokens", "<x>", "7"),
    ("added_tokens", "<x>", -1),
    ("config", "bos_token_id", "1"),
    ("config", "eos_token_id", [2, "x"]),
    ("config", "eos_token_id", {"a": 2}),
    ("generation_config", "eos_token_id", True),
    ("generation_config", "eos_token_id", 2.5),
    ("chat_template", "chat_template", True),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_value_of_a_wrong_type_is_named(beside, file, key, value):
    folder = beside("sp", **{file: {key: value}})
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert f"{folder / file}.json" in message and f'"{key}"' in message and "\n" not in message


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "chat_template.jinja", "tokenizer.model"]
)
def test_a_pointer_of_git_lfs_is_called_one(beside, file):
    folder = beside("sp")
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match=f"{file} is a git-lfs pointer.*git lfs pull"):
        load_tokenizer(folder)


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    write_json(path, content | changes)
    return folder


SPECIAL_PIECE = [{"SpecialToken": {"id": "<zz>", "type_id": 0}}]
PANICS = {
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": SPECIAL_PIECE,
            "pair": SPECIAL_PIECE,
            "special_tokens": {},
        }
    },
    "normalizer": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000}
    },
    "ids": {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
    "no tokens": {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=list(PANICS))
def test_a_panic_of_the_library_is_one_line(beside, changes, capfd):
    folder = edited(beside("bpe"), **changes)
    with pytest.raises(ValueError, match="tokenizer.json: not a readable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["sp", "bpe", "opt"])
def test_half_a_surrogate_pair_is_no_character(beside, name):
    tok = load_tokenizer(beside(name))
    for special in (False, True):
        ids = tok.encode("caf\udce9 \ud83d", special=special)
        assert ids == tok.encode("caf\ufffd \ufffd", special=special)
    settings = {"chat_template": "{{ messages[0].content }}"}
    tok = load_tokenizer(beside(name, tokenizer_config=settings))
    ids = tok.apply_chat_template([{"role": "user", "content": "\udcff!"}])
    assert ids == tok.encode("\ufffd!", bos=False)


ODD = [None, True, -1, 2**31, 2**63, 1e30, float("nan"), "", "\ud800", [], {}, [[]], ["a"], -2.5]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to what a JSON value holds, of long lists and objects the first part."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in itertools.islice(pairs, 40):
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


def damaged(content: bytes, rng: random.Random, is_json: bool) -> bytes:
    if is_json and rng.random() < 0.7:
        value = json.loads(content)
        *path, last = rng.choice(places(value))
        at = value
        for key in path:
            at = at[key]
        at[last] = rng.choice(ODD)
        return json.dumps(value).encode()
    start = rng.randrange(len(content))
    middle = rng.randbytes(rng.choice([0, 1, 9]))
    return content[:start] + middle + content[start + rng.choice([0, 1, 40]) :]


def test_damaged_files_work_or_are_one_line(beside, sp_size):
    rng, outcomes = random.Random(SEED), {"works": 0, "one line": 0}
    for n in range(100):
        name = rng.choice(list(MAKERS))
        files = chatml_files(sp_size) | {"generation_config": {"eos_token_id": [1, 2]}}
        folder = beside(name, **files)
        path = rng.choice(sorted(folder.iterdir()))
        content = damaged(path.read_bytes(), rng, path.suffix == ".json")
        path.unlink()
        path.write_bytes(content)
        try:
            tok = load_tokenizer(folder)
            tok.decode(tok.encode("Hello <|im_end|> é😀\n", special=True))
            if tok.chat_template is not None:
                tok.apply_chat_template(CHAT)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), f"seed {SEED}, {n}: {path.name}"
            outcomes["one line"] += 1
        else:
            outcomes["works"] += 1
    print(outcomes)
    assert all(count > 10 for count in outcomes.values())

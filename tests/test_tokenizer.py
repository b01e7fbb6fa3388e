"""tokenizer.py against independent oracles: sentencepiece, transformers, a brute-force tiktoken.

Small tokenizers are trained here, so everything but the published vocabularies is tested without
data. The byte tables below are read from the files by other means than tokenizer.py's.
"""

import base64
import json
import random
import shutil
from functools import cache

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from text.tokenizer import TextStream, load_tokenizer

TEXTS = [
    "",
    "Hello",
    " Hello",
    "  two before, two  between, two after  ",
    "Once upon a time, there was a little girl.",
    "line\nbreak\n\n\tand tab\r\n",
    "\n",
    " ",
    "     ",
    "1234567890 3.14 2024-01-31",
    "ünïcödé naïve Ångström",
    "你好，世界。こんにちは 안녕",
    "😀 family 👨‍👩‍👧‍👦 flag 🇨🇭!",
    "def f(x):\n    return x ** 2  # don't\n",
    "it's WE'LL they'Re 'tis",
    "\u00a0\u2003 odd\u200bspaces \ufffd",
    "plain </s> <s> <|eot_id|> text",
]
SMALL = ["small-bpe", "small-sp", "small-ranks", "small-opt"]
LOSSLESS = [*SMALL, "tokenizers/llama-2", "tokenizers/llama-3", "tokenizers/opt"]
ALL = [*LOSSLESS, "models/stories260K", "models/tinystories-656k"]
SEED = 20240131

LLAMA2_TEMPLATE = """\
{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = messages[0] %}
{% else %}{% set rest = messages %}{% endif %}
{% for m in rest %}
    {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if m.role == 'user' %}
{{ bos_token + '[INST] ' + ((first.content + '\n\n') if first and loop.first else '') -}}
{{ m.content.strip() + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if tools is not none %}{{- 'tools' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'stop' %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.content is mapping %}{{- m.content | tojson(indent=1) }}
    {%- else %}{{- m.content | trim }}{% endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
{{- strftime_now('%Y') }}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2 + 2? 😀 "},
    {"role": "assistant", "content": "<b>4</b> & done"},
    {"role": "user", "content": "And\n\n3 + 3?"},
]


# ---- small tokenizers, made here ----------------------------------------------------------------

SPECIAL = ["<unk>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def corpus():
    return [*TEXTS[1:5], *TEXTS[9:15], "the cat sat on the mat and the dog sat on the log"] * 4


def train_bpe(special):
    tk = tokenizers.Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tk.train_from_iterator(corpus(), trainer)
    return tk


def make_small_bpe(directory):
    tk = train_bpe(SPECIAL)
    tk.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tk.save(str(directory / "tokenizer.json"))


def make_small_opt(directory):
    train_bpe(["<s>", "<pad>", "</s>", "<unk>"]).model.save(str(directory))


def make_small_ranks(directory):
    tokens = [bytes([b]) for b in random.Random(SEED).sample(range(256), 256)]
    byte_of = byte_alphabet()
    learnt = train_bpe([])
    by_id = sorted((i, t) for t, i in learnt.get_vocab().items() if len(t) > 1)
    tokens += [bytes(byte_of[c] for c in token) for _, token in by_id]
    tokens.append(b"zqxj")  # no two parts of it are tokens: only the whole word finds it
    lines = [base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)]
    (directory / "tokenizer.model").write_bytes(b"".join(lines))


def make_small_sp(directory):
    (directory / "corpus").write_text("\n".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "corpus").unlink()
    (directory / "tokenizer.vocab").unlink()


@pytest.fixture(scope="session")
def small_dirs(tmp_path_factory):
    makers = [make_small_bpe, make_small_sp, make_small_ranks, make_small_opt]
    paths = {name: tmp_path_factory.mktemp(name) for name in SMALL}
    for name, make in zip(SMALL, makers, strict=True):
        make(paths[name])
    return paths


@pytest.fixture
def locate(request, small_dirs):
    def find(name):
        return small_dirs[name] if name in SMALL else request.getfixturevalue("data_dir") / name

    return find


@pytest.fixture
def copy_of(small_dirs, tmp_path):
    """A small tokenizer's directory to spoil or to add configs to."""

    def copy(name, **files):
        directory = tmp_path / name
        shutil.copytree(small_dirs[name], directory)
        for stem, content in files.items():
            write_json(directory / f"{stem}.json", content)
        return directory

    return copy


load = cache(load_tokenizer)  # Llama 3's takes a second


# ---- oracles ------------------------------------------------------------------------------------


@cache
def byte_alphabet():
    """GPT-2's character of each byte that UTF-8 uses, asked of the library."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    points = [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x10000, 64)]
    points += range(0x10000, 0x110000, 4096)
    table = {}
    for char in map(chr, points):
        ((spelt, _),) = spell.pre_tokenize_str(char)
        table |= dict(zip(spelt, char.encode(), strict=True))
    return table


def ranks_of(path):
    lines = path.read_bytes().split(b"\n")
    return {base64.b64decode(x.split()[0]): int(x.split()[1]) for x in lines if x}


@cache
def byte_table(directory):
    """What each id stands for, read from the files; special tokens stand for nothing."""
    if (directory / "tokenizer.json").exists():
        spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = {i: t for t, i in spec["model"]["vocab"].items()}
        hidden = {t["id"] for t in spec["added_tokens"]}
        is_byte_level = spec["decoder"]["type"] == "ByteLevel"
    elif (directory / "vocab.json").exists():
        text = (directory / "vocab.json").read_text(encoding="utf-8")
        vocab = {i: t for t, i in json.loads(text).items()}
        hidden = {i for i, t in vocab.items() if t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
        is_byte_level = True
    elif (directory / "tokenizer.model").read_bytes()[:1] == b"\n":
        sp = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        vocab = {i: sp.id_to_piece(i) for i in range(sp.vocab_size())}
        hidden, is_byte_level = {0, 1, 2}, False
    else:
        return [*ranks_of(directory / "tokenizer.model"), *[b""] * 256]

    def spelt(piece):
        if is_byte_level:
            return bytes(byte_alphabet().get(c, 0xFF) for c in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[1:5], 16)])
        return piece.replace("▁", " ").encode()

    return [b"" if i in hidden else spelt(vocab[i]) for i in range(len(vocab))]


def read_bytes(directory, ids):
    data = b"".join(byte_table(directory)[i] for i in ids)
    is_metaspace = any(p in str(directory) for p in ("sp", "llama-2", "stories"))
    return (data.removeprefix(b" ") if is_metaspace else data).decode("utf-8", "replace")


def brute_force_bpe(ranks, word):
    """tiktoken's definition: join the adjacent pair of lowest rank, leftmost first, until none."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([b]) for b in word]
    while True:
        joins = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]  # noqa: B905
        joins = [join for join in joins if join[0] is not None]
        if not joins:
            return [ranks[part] for part in parts]
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# ---- text to ids and back -----------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_round_trip(locate, name):
    tok = load(locate(name))
    for text in TEXTS:
        assert tok.decode(tok.encode(text)) == tok.decode(tok.encode(text, bos=False)) == text
    assert (tok.encode(""), tok.encode("", bos=False)) == ([tok.bos_id], [])


@pytest.mark.parametrize("name", ["small-sp", "tokenizers/llama-2", "models/stories260K"])
def test_sentencepiece_agrees(locate, name):
    path = locate(name) / "tokenizer.model"
    sp, tok = sentencepiece.SentencePieceProcessor(model_file=str(path)), load(locate(name))
    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (1, (2,), sp.vocab_size())
    for text in TEXTS:
        assert tok.encode(text) == [1, *sp.encode(text)]
        assert tok.decode(tok.encode(text)) == sp.decode(sp.encode(text))
    rng = random.Random(SEED)
    for _ in range(200):  # byte pieces apart: the library shows a bad sequence byte by byte
        ids = rng.choices(range(259, sp.vocab_size()), k=rng.randrange(20))
        assert tok.decode(ids) == sp.decode(ids), f"seed {SEED}: {ids}"


def test_transformers_agrees_on_opt(locate):
    transformers = pytest.importorskip("transformers")
    path, tok = locate("tokenizers/opt"), load(locate("tokenizers/opt"))
    hf = transformers.GPT2Tokenizer.from_pretrained(
        path, bos_token="</s>", eos_token="</s>", unk_token="</s>", add_bos_token=True
    )
    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (2, (2,), 50265)
    for text in [t for t in TEXTS if "</s>" not in t]:  # transformers parses it wherever it is
        assert tok.encode(text) == hf.encode(text)
        assert tok.decode(tok.encode(text)) == hf.decode(hf.encode(text), skip_special_tokens=True)
    assert tok.encode("Hello") == [2, 31414]


def test_transformers_agrees_on_tokenizer_json(locate):
    transformers = pytest.importorskip("transformers")
    path = locate("models/tinystories-656k")
    tok = load(path)
    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (1, (2,), 2048)
    # As published. Its Llama class makes a pipeline of its own, which takes the first of leading
    # spaces for the one to be added and drops what the vocabulary lacks; on these it agrees.
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    for text in TEXTS:
        ids = tok.encode(text)
        assert ids == hf.encode(text)
        # Without special ids: this file calls them normalised, and then the library shows them.
        assert tok.decode(ids) == hf.decode([i for i in ids if i > 2])
    assert tok._backend.id_to_token(1) == "<|start_story|>"  # its vocabulary has a space before
    llama = transformers.AutoTokenizer.from_pretrained(path)
    for text in ["Hello", TEXTS[4], "One day, Tim  and his dog\nran."]:
        assert tok.encode(text) == llama.encode(text)


@pytest.mark.parametrize("name", ["small-ranks", "tokenizers/llama-3"])
def test_rank_file_is_tiktoken_bpe(locate, name):
    regex = pytest.importorskip("regex")
    published = (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"""
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    )
    tok, ranks = load(locate(name)), ranks_of(locate(name) / "tokenizer.model")
    rng = random.Random(SEED)
    alphabets = ["ab", "abc '\n", "thecaston ", "0123 .,;-", "éüλж你好の안😀👨\u200d \t\r\n"]
    made = ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 40))) for _ in range(400)]
    for text in [*TEXTS, *made, "a" * 100, " " * 50 + "x", "he'llo I'mx 're2", "zqxj zqxj"]:
        words = regex.findall(published, text)
        assert "".join(words) == text
        expected = [i for word in words for i in brute_force_bpe(ranks, word.encode())]
        assert tok.encode(text, bos=False) == expected, f"seed {SEED}: {text!r}"


def test_transformers_agrees_on_llama3(locate, monkeypatch):
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    path = locate("tokenizers/llama-3")
    monkeypatch.setattr(convert.TikTokenConverter, "load_tiktoken_bpe", staticmethod(ranks_of))
    hf = convert.TikTokenConverter(path / "tokenizer.model").converted()
    for text in TEXTS:
        assert load(path).encode(text, bos=False) == hf.encode(text).ids


def test_llama3_special_tokens_are_where_published(locate):
    tok = load(locate("tokenizers/llama-3"))
    assert (tok.bos_id, tok.vocab_size) == (128000, 128256)
    assert sorted(tok.eos_ids) == [128001, 128008, 128009]
    names = {
        "begin_of_text": 128000, "end_of_text": 128001, "reserved_special_token_0": 128002,
        "finetune_right_pad_id": 128004, "start_header_id": 128006, "end_header_id": 128007,
        "eom_id": 128008, "eot_id": 128009, "python_tag": 128010,
    }  # fmt: skip
    for name, i in names.items():
        assert tok.encode(f"<|{name}|>", bos=False, special=True) == [i]
        assert tok.decode([i]) == ""
    assert tok.encode("Hello world") == [128000, 9906, 1917]


@pytest.mark.parametrize("name", SMALL)
def test_special_tokens_are_parsed_only_when_asked(locate, name):
    tok = load(locate(name))
    bos, eos = tok._backend.id_to_token(tok.bos_id), tok._backend.id_to_token(tok.eos_ids[0])
    text = f"{bos}the cat{eos}"
    plain, parsed = tok.encode(text), tok.encode(text, special=True)
    assert plain.count(tok.bos_id) == 1 and tok.decode(plain) == text
    assert parsed[0] == tok.bos_id != parsed[1] and parsed[-1] == tok.eos_ids[0]
    assert parsed == tok.encode(text, bos=False, special=True)
    assert tok.decode(parsed) == "the cat"
    assert tok.encode(text) == plain  # asking once must not leak into the next call
    assert tok.decode([*plain, tok.vocab_size, tok.vocab_size + 7]) == text


# ---- streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_stream_prints_what_decode_returns(locate, name):
    tok, rng = load(locate(name)), random.Random(SEED)
    byte_like = [i for i, b in enumerate(byte_table(locate(name))) if b and max(b) > 127]
    prompts = [(), tok.encode(""), *(tok.encode(t) for t in ("Hello", "  ", "你好 "))]
    for turn in range(300):
        pool = byte_like if turn % 3 == 0 and byte_like else range(tok.vocab_size)
        prompt, ids = rng.choice(prompts), rng.choices(pool, k=rng.randrange(1, 30))
        stream = tok.stream(prompt)
        pieces = [stream.push(i) for i in ids]
        pieces.append(stream.flush())
        whole = read_bytes(locate(name), [*prompt, *ids])
        shown = read_bytes(locate(name), prompt)
        assert "".join(pieces) == whole[len(shown) :], f"seed {SEED}, turn {turn}: {ids}"
        assert tok.decode([*prompt, *ids]) == whole
        assert stream.flush() == ""


@pytest.mark.parametrize("name", LOSSLESS)
def test_stream_never_shows_half_a_character(locate, name):
    tok = load(locate(name))
    ids = tok.encode("a😀b", bos=False)
    stream = tok.stream()
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) == "a😀b" and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in shown)
    for cut in range(len(ids)):  # a prompt may even end inside the character
        stream = tok.stream(ids[:cut])
        rest = "".join(map(stream.push, ids[cut:])) + stream.flush()
        assert rest in ("a😀b", "😀b", "b")


@pytest.mark.parametrize("name", ["small-sp", "tokenizers/llama-2", "models/stories260K"])
def test_continuation_keeps_its_space(locate, name):
    tok = load(locate(name))
    word = tok.encode("the", bos=False)
    assert "".join(map(tok.stream().push, word)) == "the"
    assert "".join(map(tok.stream([tok.bos_id]).push, word)) == "the"
    assert "".join(map(tok.stream(tok.encode("on")).push, word)) == " the"


class Bytes:
    """A backend whose ids are bytes, and which counts how often it is asked."""

    strips_space = False
    asked = 0

    def token_bytes(self, token):
        self.asked += 1
        return bytes([token])


def test_stream_looks_at_each_id_once():
    backend = Bytes()
    stream = TextStream(backend, b"prompt")
    text = "".join(map(stream.push, "näïve 😀".encode() * 100))
    assert text == "näïve 😀" * 100
    assert backend.asked == 6 + 100 * len("näïve 😀".encode())


@pytest.mark.parametrize(
    ("data", "shown", "flushed"),
    [
        (b"\xff", ["\ufffd"], ""),
        (b"\xc3A", ["", "\ufffdA"], ""),
        (b"\xf0\x9f\x98A", ["", "", "", "\ufffdA"], ""),
        (b"\xe0\x80", ["", "\ufffd\ufffd"], ""),
        (b"\xe4\xbd\xa0", ["", "", "你"], ""),
        (b"\xe4\xbd", ["", ""], "\ufffd"),
        (b"\xe4\xe4\xbd\xa0", ["", "\ufffd", "", "你"], ""),
    ],
)
def test_stream_gives_up_on_what_cannot_become_a_character(data, shown, flushed):
    stream = TextStream(Bytes())
    assert [stream.push(b) for b in data] == shown
    assert stream.flush() == flushed


# ---- what the configs say -----------------------------------------------------------------------


def test_bos_and_eos_come_from_the_configs(copy_of):
    assert load_tokenizer(copy_of("small-bpe")).eos_ids == (2, 5)  # </s> and <|eot_id|>
    directory = copy_of("small-sp", config={"bos_token_id": 7, "eos_token_id": 8})
    tok = load_tokenizer(directory)
    assert (tok.bos_id, tok.eos_ids, tok.encode("")) == (1, (8,), [1])  # the model's own BOS
    write_json(directory / "generation_config.json", {"eos_token_id": [9, 2, 9]})
    assert load_tokenizer(directory).eos_ids == (9, 2)
    entry = {"content": "<s>", "lstrip": False}
    settings = {"bos_token": entry, "eos_token": "<s>", "add_bos_token": None}
    write_json(directory / "tokenizer_config.json", settings)
    tok = load_tokenizer(directory)
    assert (tok.bos_id, tok.eos_ids, tok.encode("")) == (1, (9, 2), [1])
    write_json(directory / "special_tokens_map.json", {"bos_token": "</s>"})
    assert load_tokenizer(directory).bos_id == 2  # as transformers has it ...
    write_json(directory / "tokenizer_config.json", settings | {"added_tokens_decoder": {}})
    assert load_tokenizer(directory).bos_id == 1  # ... unless this file is of the newer kind
    write_json(directory / "generation_config.json", {"eos_token_id": None})
    write_json(directory / "config.json", {})
    assert load_tokenizer(directory).eos_ids == (1,)


@pytest.mark.parametrize("name", SMALL)
def test_add_bos_token_false(copy_of, name):
    directory = copy_of(name)
    tok = load_tokenizer(directory)
    assert tok.encode("cat") == [tok.bos_id, *tok.encode("cat", bos=False)]
    write_json(directory / "tokenizer_config.json", {"add_bos_token": False})
    silent = load_tokenizer(directory)
    assert silent.encode("cat") == tok.encode("cat", bos=False) and silent.bos_id == tok.bos_id


def test_ids_outside_the_vocabulary_do_no_harm(copy_of):
    config = {"bos_token_id": -1, "eos_token_id": 10**6}
    for name in SMALL:
        directory = copy_of(name)
        plain = load_tokenizer(directory)
        write_json(directory / "config.json", config)
        tok = load_tokenizer(directory)
        assert (tok.bos_id, tok.eos_ids) == (plain.bos_id, plain.eos_ids)
        assert tok.decode([10**6]) == ""


def test_opt_begins_with_its_eos(locate):
    tok = load(locate("small-opt"))
    assert tok.bos_id == 2 and tok.eos_ids == (2,) and tok.encode("cat")[0] == 2


def test_tokenizer_json_limits_are_lifted(copy_of):
    directory = copy_of("small-bpe")
    tk = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tk.enable_truncation(4)
    tk.enable_padding(length=64)
    tk.save(str(directory / "tokenizer.json"))
    text = "the cat sat on the mat " * 3
    tok = load_tokenizer(directory)
    assert tok.decode(tok.encode(text)) == text and tok.encode("")[1:] == []


# ---- chat templates -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [LLAMA2_TEMPLATE, LLAMA3_TEMPLATE])
@pytest.mark.parametrize("prompted", [True, False])
def test_chat_template_agrees_with_transformers(copy_of, template, prompted):
    transformers = pytest.importorskip("transformers")
    directory = copy_of("small-bpe", tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    tok = load_tokenizer(directory)
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    options = {"add_generation_prompt": prompted, "return_dict": False}
    extra = [{"role": "assistant", "content": {"é<": 1}}, {"role": "stop", "content": ""}]
    for chat in [CHAT, CHAT[1:], *([CHAT + extra] if template == LLAMA3_TEMPLATE else [])]:
        ids = tok.apply_chat_template(chat, prompted)
        assert ids == hf.apply_chat_template(chat, **options)
        assert ids[0] == 1 != ids[1]
    llama2_turns = 2 if template == LLAMA2_TEMPLATE else 1
    assert tok.apply_chat_template(CHAT).count(1) == llama2_turns


def test_chat_template_gets_the_tokenizers_own_eos(copy_of):
    settings = {"eos_token": "<|eot_id|>", "chat_template": "{{ bos_token + eos_token }}"}
    generation = {"eos_token_id": [2, 5]}
    tok = load_tokenizer(
        copy_of("small-bpe", tokenizer_config=settings, generation_config=generation)
    )
    assert tok.eos_ids == (2, 5) and tok.apply_chat_template([]) == [1, 5]


def test_llama2_chat_is_its_turns_one_by_one(copy_of):
    directory = copy_of("small-sp", tokenizer_config={"chat_template": LLAMA2_TEMPLATE})
    sp = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    first = sp.encode("[INST] Be brief.\n\nWhat is 2 + 2? 😀 [/INST] <b>4</b> & done ")
    expected = [1, *first, 2, 1, *sp.encode("[INST] And\n\n3 + 3? [/INST]")]
    assert load_tokenizer(directory).apply_chat_template(CHAT) == expected


def test_llama3_chat(locate, tmp_path):
    shutil.copy(locate("tokenizers/llama-3") / "tokenizer.model", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA3_TEMPLATE.rpartition("\n")[0])
    tok = load_tokenizer(tmp_path)
    ids = tok.apply_chat_template([{"role": "user", "content": "Hello"}])
    head = [128006, 882, 128007, 271, 9906, 128009]
    assert ids == [128000, *head, 128006, 78191, 128007, 271]


def test_which_chat_template(copy_of):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "cat"}]
    directory = copy_of("small-bpe", tokenizer_config={"chat_template": named})
    tok = load_tokenizer(directory)
    assert tok.chat_template == "cat"
    assert tok.apply_chat_template([]) == tok.encode("cat", bos=False)  # no BOS was written
    (directory / "chat_template.jinja").write_text("dog")
    assert load_tokenizer(directory).chat_template == "dog"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "template failed"),
        ("{{ messages[0].content + 1 }}", "template failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        (None, "no chat template"),
    ],
)
def test_chat_template_errors(copy_of, template, reason):
    tok = load_tokenizer(copy_of("small-bpe", tokenizer_config={"chat_template": template}))
    with pytest.raises(ValueError, match=reason) as caught:
        tok.apply_chat_template(CHAT)
    assert "\n" not in str(caught.value)


# ---- what is missing or broken ------------------------------------------------------------------


def test_no_tokenizer(tmp_path):
    write_json(tmp_path / "vocab.json", {})
    with pytest.raises(FileNotFoundError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message and "found vocab.json" in message
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json with merges.txt"):
        assert name in message
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tokenizer(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("small-bpe", "tokenizer.json"),
        ("small-sp", "tokenizer.model"),
        ("small-ranks", "tokenizer.model"),
        ("small-opt", "vocab.json"),
        ("small-opt", "merges.txt"),
        ("small-bpe", "config.json"),
        ("small-bpe", "tokenizer_config.json"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "pointer", "binary"])
def test_corrupt_file(copy_of, name, file, damage):
    directory = copy_of(name, config={"vocab_size": 450}, tokenizer_config={"bos_token": "<s>"})
    path = directory / file
    whole = path.read_bytes()
    spoilt = {
        "cut": whole[: whole.find(b" ", len(whole) * 2 // 3)],  # inside a line
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 499723\n",
        "binary": bytes(range(200, 256)) * 20,
    }
    path.write_bytes(spoilt[damage])
    if (file, damage) == ("merges.txt", "cut"):
        pytest.skip("fewer merges are a valid file")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(directory)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_rank_file_must_count(copy_of):
    directory = copy_of("small-ranks")
    path = directory / "tokenizer.model"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-40:2]))
    with pytest.raises(ValueError, match="tokenizer.model.*ranks"):
        load_tokenizer(directory)


def test_tokenizer_json_wins(copy_of, small_dirs):
    directory = copy_of("small-bpe")
    shutil.copy(small_dirs["small-sp"] / "tokenizer.model", directory)
    assert load_tokenizer(directory).vocab_size == load(small_dirs["small-bpe"]).vocab_size


def test_unknown_decoder_is_refused(copy_of):
    directory = copy_of("small-bpe")
    tk = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tk.decoder = decoders.WordPiece()
    tk.save(str(directory / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json.*decoder"):
        load_tokenizer(directory)

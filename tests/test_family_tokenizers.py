"""The tokenizers and chat templates of Qwen, Mistral, Gemma, Phi, SmolLM, OLMo, Granite, StarCoder2
and StableLM, against transformers.

Start at FAMILIES. Small vocabularies are trained here; normalizers, split patterns, decoders,
post-processors and the flags of added tokens are those that each family published.
"""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from text.chat import Conversation
from text.completion import Completion
from text.generation_config import GenerationConfig
from text.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

SEED = 20260729
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)  # Llama 3's, OLMo-2's and StableLM-2's, too
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "",
    "Hello",
    " Hello",
    "  two   three     five",
    " " * 30 + "x" + " " * 17,
    "\n",
    "\n\n\nx \n \n",
    "\n" * 20,
    "\t\tx = 1\r\n\r\n" + "\t" * 9,
    "1234567890 3.14 1,000,000 2024-01-31T12:00 ١٢٣ ²",
    "don't WE'LL they'Re I'M 'tis rock'n'roll",
    "e\u0301 café cafe\u0301 Å A\u030a \u212b ﬁ \u0301x",
    "नमस्ते हिन्दी ก็ตาม",
    "你好，世界。こんにちは 안녕하세요 \u1112\u1161\u11ab",
    "😀 👨‍👩‍👧‍👦 🇨🇭 🏳️‍🌈 1️⃣ 𝔘𝔫𝔦",
    "a\u200bb\u00a0c\u2003d\ufeffe \ufffd\x00\x01\x7f",
    "\u2581 \u2581\u2581 lower block",
    "camelCaseHTTPServer XMLParser/foo/bar\n/baz ...!!!//\n\n//",
    "def f(x):\n    return x ** 2  # İstanbul ß ẞ ǅ\n",
    "<0x0A> <0xE4> <unk> <s> </s> [INST] <think>\n</think> <|im_end|>",
]
CORPUS = [
    *TEXTS[9:18],
    "the cat sat on the mat and the dog sat on the log, the end",
    "import os\n\nfor i in range(10):\n    print(i)\n",
] * 4


# ---- vocabularies -------------------------------------------------------------------------------


def entry(text: str, **flags: bool) -> dict:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {"content": text, "special": True} | dict.fromkeys(names, False) | flags


def special(*texts: str, **flags: bool) -> list[dict]:
    return [entry(text, **flags) for text in texts]


def plain(*texts: str, **flags: bool) -> list[dict]:
    return [entry(text, special=False, **flags) for text in texts]


def split(pattern: str, removed: bool = False) -> pre_tokenizers.PreTokenizer:
    how = ("removed", True) if removed else ("isolated", False)  # two ways to write the same
    pieces = pre_tokenizers.Split(Regex(pattern), *how)
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, spell])


def digits() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def byte_level(pre, added: list[dict], *, nfc=False, first=False, bos=None) -> tokenizers.Tokenizer:
    """first: whether the added tokens have the lowest ids. bos: what the post-processor adds."""
    tk = tokenizers.Tokenizer(models.BPE())
    if nfc:
        tk.normalizer = normalizers.NFC()
    tk.pre_tokenizer, tk.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[token["content"] for token in added] if first else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tk.train_from_iterator(CORPUS, trainer)
    tk.add_tokens([AddedToken(**token) for token in added])
    tk.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tk.token_to_id(bos))])
        tk.post_processor = processors.Sequence([tk.post_processor, template])
    return tk


def train_sentencepiece(folder: Path, **options: object) -> Path:
    corpus = folder / "corpus"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    settings = {"vocab_size": 440, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= {"split_digits": True, "hard_vocab_limit": False}
    settings |= {"input": str(corpus), "model_prefix": str(folder / "tokenizer")} | options
    sentencepiece.SentencePieceTrainer.train(**settings)
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def converted(model: Path) -> tokenizers.Tokenizer:
    """The pieces of a sentencepiece model, their merges in order of score, and its special and
    user-defined pieces as added tokens."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    named = {t: i for t, i in vocab.items() if sp.is_control(i) or sp.is_unknown(i)}
    user = [text for text in GEMMA_PIECES if vocab.get(text, sp.unk_id()) != sp.unk_id()]
    words = [t for t, i in vocab.items() if t not in named and not sp.is_byte(i)]
    halves = [(w, w[:i], w[i:]) for w in words for i in range(1, len(w))]
    halves = [(w, a, b) for w, a, b in halves if a in words and b in words]
    halves.sort(key=lambda half: (-sp.get_score(vocab[half[0]]), vocab[half[0]]))
    merges = [(a, b) for _, a, b in halves]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tk = tokenizers.Tokenizer(bpe)
    turns = ("<start_of_turn>", "<end_of_turn>")
    added = [(text, text in named or text in turns) for text in [*named, *user]]
    tk.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in added])
    return tk


PIECES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
RUNS = [*("\n" * n for n in range(1, 32)), *("▁" * n for n in range(2, 32))]
GEMMA_PIECES = ["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", *RUNS, "<table>"]


def gemma(folder: Path) -> tokenizers.Tokenizer:
    model = train_sentencepiece(
        folder,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "vocab_size": 520},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
        **{"add_dummy_prefix": False, "user_defined_symbols": GEMMA_PIECES},
    )
    tk = converted(model)
    tk.normalizer = normalizers.Replace(" ", "▁")
    tk.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tk.decoder = decoders.Sequence(PIECES)
    tk.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    return tk


def llama_like(folder: Path, *, legacy=True, added=(), **options) -> tokenizers.Tokenizer:
    """legacy: whether a space is put before each part of a text between two added tokens."""
    tk = converted(train_sentencepiece(folder, **options))
    if legacy:
        prefix, spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tk.normalizer = normalizers.Sequence([prefix, spaces])
    else:
        tk.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tk.decoder = decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)])
    tk.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tk.add_tokens([AddedToken(**token) for token in added])
    return tk


def phi3(folder: Path) -> tokenizers.Tokenizer:
    added = [*plain("</s>", rstrip=True), *special("<|endoftext|>")]
    added += special("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True)
    tk = llama_like(folder, added=added)
    tk.post_processor = processors.TemplateProcessing("$A", None, [])
    return tk


# ---- families -----------------------------------------------------------------------------------

THINK = plain("<tool_call>", "</tool_call>", "<think>", "</think>")


@dataclass
class Family:
    """build: returns the tokenizer, and may write tokenizer.model. tokens: the keys of
    tokenizer_config.json. auto: whether transformers' AutoTokenizer reads tokenizer.json as it is;
    its class GPT2Tokenizer replaces the pre-tokenizer."""

    build: Callable[[Path], tokenizers.Tokenizer]
    model_type: str
    tokenizer_class: str
    tokens: dict = field(default_factory=dict)
    auto: bool = True


def names(bos, eos, pad, unk) -> dict:
    return {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}


END = "<|endoftext|>"
GPT = {"add_prefix_space": False}
QWEN_ADDED = special(END, "<|im_start|>", "<|im_end|>", "<|vision_pad|>") + THINK
TEKKEN_ADDED = special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]")
PHI4_ADDED = [
    *special(END),
    *special("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", rstrip=True),
    *plain("<|tool_call|>", "<|/tool_call|>", rstrip=True),
]
SMOLLM3_ADDED = special("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
OLMO_ADDED = [
    *plain("<|extra_id_0|>", "|||PHONE_NUMBER|||"),
    *special(END, "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|pad|>"),
    *plain("<functions>", "</functions>"),
]
GRANITE_ADDED = special(
    "<|end_of_text|>", "<fim_prefix>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"
)
NEOX_ADDED = special(END, "<|padding|>") + [
    entry(" " * n, special=False, normalized=True) for n in range(24, 1, -1)
]
STABLELM_ADDED = special(END, "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|reg_extra|>")
FAMILIES = {
    "qwen": Family(
        lambda folder: byte_level(split(QWEN), QWEN_ADDED, nfc=True),
        *("qwen3", "Qwen2Tokenizer"),
        names(None, "<|im_end|>", END, None) | {"add_bos_token": False},
    ),
    "mistral": Family(
        lambda folder: llama_like(folder, control_symbols=["[INST]", "[/INST]", "[TOOL_CALLS]"]),
        *("mistral", "LlamaTokenizer"),
        names("<s>", "</s>", None, "<unk>") | {"add_bos_token": True, "legacy": True},
    ),
    "mistral-v3": Family(
        lambda folder: llama_like(folder, legacy=False, control_symbols=["[INST]", "[/INST]"]),
        *("mistral", "LlamaTokenizer"),
        names("<s>", "</s>", None, "<unk>") | {"add_bos_token": True, "legacy": False},
    ),
    "tekken": Family(
        lambda folder: byte_level(split(TEKKEN), TEKKEN_ADDED, first=True, bos="<s>"),
        *("mistral", "PreTrainedTokenizerFast"),
        names("<s>", "</s>", None, "<unk>") | {"add_bos_token": True},
    ),
    "gemma": Family(
        gemma,
        *("gemma2", "GemmaTokenizer"),
        names("<bos>", "<eos>", "<pad>", "<unk>") | {"add_bos_token": True},
    ),
    "phi-3": Family(
        phi3,
        *("phi3", "LlamaTokenizer"),
        names("<s>", END, END, "<unk>") | {"add_bos_token": False, "legacy": False},
    ),
    "phi-4-mini": Family(
        lambda folder: byte_level(split(O200K), PHI4_ADDED),
        *("phi3", "GPT2TokenizerFast"),
        names(END, END, END, END) | GPT,
    ),
    "smollm2": Family(
        lambda folder: byte_level(
            digits(), special(END, "<|im_start|>", "<|im_end|>", "<repo_name>"), first=True
        ),
        *("llama", "GPT2Tokenizer"),
        names("<|im_start|>", "<|im_end|>", "<|im_end|>", END) | GPT,
        auto=False,
    ),
    "smollm3": Family(
        lambda folder: byte_level(split(CL100K), SMOLLM3_ADDED + THINK),
        *("smollm3", "PreTrainedTokenizerFast"),
        names(None, "<|im_end|>", "<|im_end|>", None),
    ),
    "olmo": Family(
        lambda folder: byte_level(split(CL100K), OLMO_ADDED),
        *("olmo2", "GPT2Tokenizer"),
        names(END, END, "<|pad|>", END) | GPT,
    ),
    "granite": Family(
        lambda folder: byte_level(digits(), GRANITE_ADDED, first=True),
        *("granite", "GPT2Tokenizer"),
        names(*["<|end_of_text|>"] * 4) | GPT,
    ),
    "starcoder2": Family(
        lambda folder: byte_level(digits(), special(END, "<fim_prefix>", "<file_sep>"), first=True),
        *("starcoder2", "GPT2Tokenizer"),
        names(END, END, None, END) | GPT,
        auto=False,
    ),
    "stablelm": Family(
        lambda folder: byte_level(split(CL100K, removed=True), STABLELM_ADDED, nfc=True),
        *("stablelm", "GPT2TokenizerFast"),
        names(END, "<|im_end|>", END, None) | GPT,
    ),
    "neox": Family(
        lambda folder: byte_level(pre_tokenizers.ByteLevel(False), NEOX_ADDED, nfc=True),
        *("gpt_neox", "GPTNeoXTokenizerFast"),
        names(END, END, None, END) | GPT,
    ),
}
SENTENCEPIECE = ["mistral", "mistral-v3", "gemma", "phi-3"]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_family(family: Family, folder: Path) -> Path:
    tk = family.build(folder)
    tk.save(str(folder / "tokenizer.json"))
    decoder = {str(i): json.loads(t) for i, t in flags_of(tk).items()}
    settings = family.tokens | {"tokenizer_class": family.tokenizer_class}
    settings |= {"added_tokens_decoder": decoder, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": family.model_type})
    return folder


def flags_of(tk: tokenizers.Tokenizer) -> dict[int, str]:
    keys = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    added = tk.get_added_tokens_decoder()
    return {i: json.dumps({key: getattr(t, key) for key in keys}) for i, t in added.items()}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, written at the first call."""
    written: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in written:
            written[name] = write_family(FAMILIES[name], tmp_path_factory.mktemp(name))
        return written[name]

    return folder_of


@pytest.fixture
def copy_of(folders: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's folder, without some files, with others and with other settings."""

    numbers = itertools.count()

    def copy(name: str, *without: str, **files: object) -> Path:
        folder = tmp_path / f"{name}-{next(numbers)}"
        shutil.copytree(folders(name), folder)
        path = folder / "tokenizer_config.json"
        write_json(path, json.loads(path.read_text()) | files.pop("settings", {}))
        for file in without:
            (folder / file).unlink()
        for stem, value in files.items():
            write_json(folder / f"{stem}.json", value)
        return folder

    return copy


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()


def texts_for(added: list[str]) -> list[str]:
    """TEXTS, texts with the added tokens inside, and random ones."""
    rng = random.Random(SEED)
    parts = [*added, *"ab \n\té😀你0'<", "  ", "the", "e\u0301"]
    made = ["".join(rng.choices(parts, k=rng.randrange(1, 12))) for _ in range(60)]
    inside = [f"a {token} \nb{token}{token} c" for token in added]
    return [*TEXTS, *inside, "".join(added), *made]


# ---- ids and texts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_ids_and_texts_are_those_of_transformers(folders, name):
    folder = folders(name)
    tok = load_tokenizer(folder)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder) if FAMILIES[name].auto else hf
    for text in texts_for(list(hf.get_added_vocab())):
        ids = tok.encode(text, bos=False, special=True)
        assert ids == hf.encode(text, add_special_tokens=False), repr(text)
        assert ids == auto.encode(text, add_special_tokens=False), repr(text)
        assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True), repr(text)
        assert tok.encode(text) == hf.encode(text, split_special_tokens=True), repr(text)
    assert (tok.bos_id, *tok.eos_ids) == (hf.bos_token_id, hf.eos_token_id)
    assert tok.vocab_size == len(hf)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_stream_is_the_whole(folders, name):
    tok = load_tokenizer(folders(name))
    added = [token.content for token in tok._backend._added.values()]
    for text in texts_for(added):
        ids = tok.encode(text, special=True)
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tok.decode(ids)
        for cut in (1, len(ids) // 2):
            before, stream = tok.decode(ids[:cut]), tok.stream(ids[:cut])
            after = "".join(map(stream.push, ids[cut:])) + stream.flush()
            if tok.decode(ids[:cut]) and not before.endswith("\ufffd"):
                assert before + after == tok.decode(ids), repr(text)


def test_spaces_between_added_tokens_are_spaces(folders):
    """Gemma's runs of spaces are added tokens, written with the block that marks a space."""
    tok = load_tokenizer(folders("gemma"))
    run = tok._backend.token_to_id("▁▁▁▁")
    assert tok.encode("    ", bos=False) == [run] and tok.decode([run]) == " " * 4
    assert tok.id_to_text(run) == " " * 4


# ---- tokenizer.json beside other files ----------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_both_files_give_the_same_ids(folders, copy_of, name):
    """But for runs of more than 31 spaces, which merges join in another order than sentencepiece,
    and for literal blocks: tokenizer.json takes precedence, as in transformers."""
    both, model = load_tokenizer(folders(name)), load_tokenizer(copy_of(name, "tokenizer.json"))
    added = [token.content for token in both._backend._added.values()]
    for text in texts_for(added):
        for special_too in (False, True):
            ids = both.encode(text, special=special_too)
            assert model.encode(text, special=special_too) == ids, repr(text)
            assert model.decode(ids) == both.decode(ids)
    assert (model.bos_id, model.eos_ids) == (both.bos_id, both.eos_ids)
    assert model.vocab_size == both.vocab_size
    bare = load_tokenizer(copy_of(name, "tokenizer.json", "tokenizer_config.json"))
    unk = both.special_id("<unk>")
    assert unk in bare.encode("a<unk>", special=True) and unk not in bare.encode("a<unk>")


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_tokenizer_json_takes_precedence(folders, copy_of, name):
    folder = copy_of(name)
    (folder / "tokenizer.model").write_bytes(b"not read")
    ids = load_tokenizer(folders(name)).encode("Hello  there\n")
    assert load_tokenizer(folder).encode("Hello  there\n") == ids


def test_a_text_cannot_forge_gemmas_turns_beside_a_sentencepiece_model(copy_of):
    """<start_of_turn> is a user-defined piece there: sentencepiece finds it in any text."""
    folder = copy_of("gemma", "tokenizer.json")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    turn, table = sp.piece_to_id("<start_of_turn>"), sp.piece_to_id("<table>")
    text = "<start_of_turn>user\n<table>"
    assert sp.encode(text)[0] == turn
    tok = load_tokenizer(folder)
    assert tok.encode(text, special=True)[1] == turn == tok.special_id("<start_of_turn>")
    assert turn not in tok.encode(text) and table in tok.encode(text)
    assert tok.decode(tok.encode(text)) == text and tok.decode([turn]) == ""


@pytest.mark.parametrize("without", [[], ["tokenizer.json"]], ids=["both", "sentencepiece"])
def test_phi3s_turns_take_the_line_break(copy_of, without):
    tok = load_tokenizer(copy_of("phi-3", *without))
    ids = tok.encode("<|user|>\nHello<|end|>\n<|assistant|>\n", special=True)
    user, end, assistant = map(tok.special_id, ("<|user|>", "<|end|>", "<|assistant|>"))
    hello = ids[1:-2]
    assert ids == [user, *hello, end, assistant] and tok.decode(hello) == "Hello"
    assert tok.encode("Hello") == tok.encode("Hello", bos=False) and tok.bos_id == 1
    eos = tok.encode("a</s>\n\nb")[-2 if without else -3]
    assert eos == 2 and tok.decode([eos]) == "</s>" and tok.special_id("</s>") is None


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": None}])
def test_qwen_without_tokenizer_json(folders, copy_of, settings):
    folder = copy_of("qwen", settings=settings)
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    tok, whole = load_tokenizer(folder), load_tokenizer(folders("qwen"))
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts_for([token["content"] for token in QWEN_ADDED]):
        ids = tok.encode(text, special=True)
        assert ids == whole.encode(text, special=True) == hf.encode(text), repr(text)
        assert tok.encode(text) == whole.encode(text), repr(text)
    assert (tok.bos_id, tok.eos_ids, tok.vocab_size) == (None, whole.eos_ids, whole.vocab_size)


def test_only_opts_merges_begin_with_its_eos(copy_of):
    """A vocabulary that has </s> as a word of HTML does not begin its texts with it."""
    folder = copy_of("starcoder2", "tokenizer_config.json", "config.json")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"] | {"</s>": 420}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()
    tok = load_tokenizer(folder)
    assert tok.encode("a") == [vocab["a"]] and tok.eos_ids == ()


def set_flags(folder: Path, text: str, json_flags: dict, decoder_flags: dict | None) -> None:
    """Change the flags of a token in tokenizer.json and in added_tokens_decoder; None: remove the
    latter, and write added_tokens.json."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token |= json_flags if token["content"] == text else {}
    write_json(folder / "tokenizer.json", spec)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if decoder_flags is None:
        del settings["added_tokens_decoder"]
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        write_json(folder / "added_tokens.json", ids)
    else:
        for token in settings["added_tokens_decoder"].values():
            token |= decoder_flags if token["content"] == text else {}
    write_json(folder / "tokenizer_config.json", settings)


FLAGS = [
    {"special": s, "rstrip": r, "normalized": n} for s in (0, 1) for r in (0, 1) for n in (0, 1)
]
FLAGS = [{key: bool(value) for key, value in flags.items()} for flags in FLAGS]
TOKEN = {"content": "<|im_start|>", "lstrip": True}
WAYS = [
    {},
    {"eos_token": "<|im_start|>"},
    {"eos_token": TOKEN},
    {"additional_special_tokens": ["<|im_start|>", "[NEW]"]},
    {"extra_special_tokens": [TOKEN]},
]


def test_flags_that_contradict_one_another(copy_of):
    """A token that a config names is special, and only added_tokens_decoder replaces flags."""
    rng = random.Random(SEED)
    for _ in range(40):
        json_flags, decoder_flags = rng.choice(FLAGS), rng.choice([*FLAGS, None, None, None])
        way, in_map = rng.choice(WAYS), rng.random() < 0.5
        typed = json.dumps(way).replace('{"content', '{"__type": "AddedToken", "content')
        files = {"special_tokens_map": way} if in_map else {"settings": json.loads(typed)}
        folder = copy_of("qwen", **files)
        set_flags(folder, "<|im_start|>", json_flags, decoder_flags)
        tok = load_tokenizer(folder)
        hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        case = f"seed {SEED}: {json_flags} {decoder_flags} {way} {in_map}"
        for text in ("hi <|im_start|> \nthere[NEW]", "<|im_end|>\n<|im_start|>\n"):
            ids = tok.encode(text, special=True)
            assert ids == hf.encode(text), case
            assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True), case


@pytest.mark.parametrize("without", [[], ["tokenizer.json"]], ids=["both", "sentencepiece"])
def test_the_eos_that_a_config_names_is_special(copy_of, without):
    folder = copy_of("gemma", settings={"eos_token": "<end_of_turn>"})
    set_flags(folder, "<end_of_turn>", {"special": False}, {"special": False})
    for file in without:
        (folder / file).unlink()
    tok = load_tokenizer(folder)
    assert tok.decode(tok.eos_ids) == "" and tok.special_id("<end_of_turn>") == tok.eos_ids[0]
    assert tok.eos_ids[0] not in tok.encode("<end_of_turn>")


# ---- what ends a text ---------------------------------------------------------------------------


def ids_of(tok: Tokenizer, *texts: str) -> tuple[int, ...]:
    return tuple(tok._backend.token_to_id(text) for text in texts)


EOS = [
    ("qwen", ["<|im_end|>", END]),
    ("gemma", ["<eos>", "<end_of_turn>"]),
    ("phi-3", [END, "<|assistant|>", "<|end|>"]),
    ("phi-4-mini", ["<|end|>", END]),
    ("smollm3", ["<|im_end|>"]),
    ("granite", ["<|end_of_text|>"]),
    ("olmo", ["<|im_end|>", END]),
    ("stablelm", [END, "<|im_end|>"]),
]


def with_eos(where: str, model_type: str, value: int | list[int]) -> dict:
    """The files, by stem, of a model that has EOS ids in one place."""
    config = {"model_type": model_type}
    if where == "generation_config":
        return {"config": config, "generation_config": {"eos_token_id": value}}
    if where == "config":
        return {"config": config | {"eos_token_id": value}}
    inner = {"model_type": "gemma3_text", "eos_token_id": value}
    return {"config": {"model_type": "gemma3", "eos_token_id": None, "text_config": inner}}


@pytest.mark.parametrize(("name", "texts"), EOS)
@pytest.mark.parametrize("where", ["generation_config", "config", "text_config"])
def test_eos_ids_are_those_of_transformers(folders, copy_of, name, texts, where):
    """text_config: a model that reads images, too, such as Gemma 3 and Mistral Small 3."""
    ids = ids_of(load_tokenizer(folders(name)), *texts)
    value = list(ids) if len(ids) > 1 else ids[0]
    folder = copy_of(name, **with_eos(where, FAMILIES[name].model_type, value))
    config = transformers.AutoConfig.from_pretrained(folder)
    expected = transformers.GenerationConfig.from_model_config(config)
    if where == "generation_config":
        expected = transformers.GenerationConfig.from_pretrained(folder)
    assert expected.eos_token_id == value
    assert load_tokenizer(folder).eos_ids == ids


def test_the_outer_config_counts_first(copy_of):
    inner = {"eos_token_id": 5, "vocab_size": 900}
    folder = copy_of("gemma", config={"eos_token_id": [1, 7], "text_config": inner})
    assert load_tokenizer(folder).eos_ids == (1, 7)
    write_json(folder / "config.json", {"text_config": inner | {"eos_token_id": 899}})
    assert load_tokenizer(folder).eos_ids == (899,)


@pytest.mark.parametrize(
    ("name", "texts"),
    [("qwen", [END, "<|im_end|>"]), ("gemma", ["<eos>", "<end_of_turn>"])]
    + [("phi-4-mini", [END, "<|end|>"]), ("granite", ["<|end_of_text|>"])],
)
def test_eos_without_any_config(copy_of, name, texts):
    tok = load_tokenizer(copy_of(name, "tokenizer_config.json", "config.json"))
    assert tok.eos_ids == ids_of(tok, *texts)


def test_a_bos_of_null_is_none(copy_of):
    """Qwen's config.json has a bos_token_id, which transformers does not show to templates."""
    template = "{{ bos_token }}{{ messages[0].content }}"
    config = {"model_type": "qwen3", "bos_token_id": 420}
    folder = copy_of("qwen", settings={"chat_template": template}, config=config)
    tok, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hi"}]
    assert tok.bos_id is None and hf.bos_token is None
    assert tok.apply_chat_template(chat) == hf.apply_chat_template(chat, return_dict=False)


# ---- chat templates -----------------------------------------------------------------------------

QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message.role == 'user' %}{{- 'calls' }}{%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content, thoughts = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
SMOLLM3_TEMPLATE = """\
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = "/think" if enable_thinking else "/no_think" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content %}
    {%- if "/no_think" in system %}{% set mode = "/no_think" %}{% endif %}
    {%- set system = system.replace("/no_think", "").rstrip() %}
{%- endif %}
{{- "<|im_start|>system\\n" }}
{%- set today = strftime_now("%d %B %Y") %}
{{- "Today: " ~ today ~ "\\nMode: " + mode + "\\n\\n" + (system or "You help.") }}
{%- if tools %}{{- "\\n" + tools | map("tojson") | join("\\n") }}{% endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages if message.role != "system" %}
    {%- if message.role == "assistant" %}
        {% generation %}
        {%- if mode == "/think" %}
            {{ "<|im_start|>assistant\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else %}
            {{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + message.content }}
            {{- "<|im_end|>\\n" }}
        {%- endif %}
        {% endgeneration %}
    {%- else %}
        {{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{ "<|im_start|>assistant\\n" + ("" if mode == "/think" else "<think>\\n\\n</think>\\n") }}
{%- endif %}"""
ALTERNATES = """\
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
"""
GEMMA_TEMPLATE = (
    """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- SYSTEM %}
{%- else %}
    {%- set first, rest = "", messages %}
{%- endif %}
{%- for m in rest %}
"""
    + ALTERNATES
    + """\
    {%- set role = "model" if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if m.content is string %}{{ m.content | trim }}
    {%- elif m.content is iterable %}
        {%- for item in m.content if item.type == 'text' %}{{ item.text | trim }}{% endfor %}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
)
GEMMA2_TEMPLATE = GEMMA_TEMPLATE.replace("SYSTEM", "{ raise_exception('No system role') }")
GEMMA2_TEMPLATE = GEMMA2_TEMPLATE.replace("{%- { raise", "{{ raise").replace(
    "role') } %}", "role') }}"
)
GEMMA3_TEMPLATE = GEMMA_TEMPLATE.replace(
    "SYSTEM", "set first, rest = messages[0].content + '\\n\\n', messages[1:]"
)
MISTRAL_TEMPLATE = (
    """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in rest %}
"""
    + ALTERNATES
    + """\
    {%- if m['role'] == 'user' and loop.last and system is defined %}
        {{- '[INST] ' + system + '\\n\\n' + m['content'] + ' [/INST]' }}
    {%- elif m['role'] == 'user' %}{{- '[INST] ' + m['content'] + ' [/INST]' }}
    {%- else %}{{- ' ' + m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
)
PHI_TEMPLATE = """\
{% for message in messages %}\
{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}\
{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] }}\
{{ '<|/tool|><|end|>' }}{% else %}\
{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
GRANITE_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set system = "Today is " + strftime_now('%B %d, %Y') + "." %}
    {%- if tools and documents %}{%- set system = system + " Tools and documents." %}
    {%- elif tools %}{%- set system = system + " Tools." %}
    {%- elif thinking %}{%- set system = system + " Think first." %}
    {%- endif %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in rest %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}
    {{- '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {
    "qwen": ("qwen", QWEN_TEMPLATE),
    "smollm3": ("smollm3", SMOLLM3_TEMPLATE),
    "gemma-2": ("gemma", GEMMA2_TEMPLATE),
    "gemma-3": ("gemma", GEMMA3_TEMPLATE),
    "mistral": ("mistral", MISTRAL_TEMPLATE),
    "mistral-v3": ("mistral-v3", MISTRAL_TEMPLATE),
    "tekken": ("tekken", MISTRAL_TEMPLATE),
    "phi-3": ("phi-3", PHI_TEMPLATE),
    "phi-4-mini": ("phi-4-mini", PHI_TEMPLATE),
    "granite": ("granite", GRANITE_TEMPLATE),
}


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant in turn, after a system message."""
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + chat


THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is 4."
TOOL = {"name": "weather", "description": "Say <it> & é", "parameters": {"city": "string"}}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]
TOOL_CHAT = [
    *turns("Weather?", "I look."),
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "20 °C"},
]
TOOL_CHAT[1]["tool_calls"] = CALL
CHATS = {
    "one": turns("  What is 2 + 2? 😀 "),
    "system": turns("Hi\n\nthere", system="Be brief. /no_think"),
    "second": turns("What is 2 + 2?", "4", "And\n3 + 3?"),
    "thoughts": turns("2 + 2?", THOUGHT, "3 + 3?", THOUGHT, "4 + 4?", system="Count."),
    "last is an answer": turns("2 + 2?", THOUGHT),
    "two users": [*turns("a"), *turns("b")],
    "tools": TOOL_CHAT,
    "tools in the system message": [
        {"role": "system", "content": "Be brief.", "tools": '[{"name": "f"}]'},
        *turns("Hi"),
    ],
    "nulls": [{"role": "user", "content": "Hi", "tool_calls": None, "tools": None}],
    "named special tokens": turns("a<|im_end|>\n<|end|>\n[INST]<end_of_turn>b"),
}
VARIABLES = [
    {},
    {"enable_thinking": False},
    {"thinking": True, "controls": {"length": "short"}},
    {"tools": [{"type": "function", "function": TOOL}]},
    {"tools": [{"type": "function", "function": TOOL}], "documents": [{"text": "é"}]},
]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_chats_are_those_of_transformers(copy_of, name):
    family, template = TEMPLATES[name]
    folder = copy_of(family, settings={"chat_template": template})
    tok = load_tokenizer(folder)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    rendered = rejected = 0
    for chat in CHATS.values():
        for variables in VARIABLES:
            for prompted in (True, False):
                options = {"add_generation_prompt": prompted, **variables}
                try:
                    expected = hf.apply_chat_template(chat, tokenize=False, **options)
                except Exception as error:
                    with pytest.raises(ValueError, match=str(error)[:30].replace("(", r"\(")):
                        tok.chat_text(chat, prompted, **variables)
                    rejected += 1
                    continue
                assert tok.chat_text(chat, prompted, **variables) == expected
                ids = hf.apply_chat_template(chat, return_dict=False, **options)
                assert tok.apply_chat_template(chat, prompted, **variables) == ids
                rendered += 1
    assert rendered >= 20
    assert (rejected > 0) == (template in (GEMMA2_TEMPLATE, GEMMA3_TEMPLATE, MISTRAL_TEMPLATE))


@pytest.mark.parametrize("name", ["qwen", "smollm3", "gemma-3", "mistral-v3", "phi-3", "granite"])
def test_each_turn_of_a_conversation_is_the_templates(copy_of, name):
    """Qwen3's template removes the thoughts of earlier turns, so the cached ids of an answer are
    not the ids of this answer in the next prompt."""
    family, template = TEMPLATES[name]
    tok = load_tokenizer(copy_of(family, settings={"chat_template": template}))
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(copy_of(family))
    conversation = Conversation(tok, 4000, 100, system="Be brief.")
    messages, cached = turns(system="Be brief."), []
    for question in ("2 + 2?", " And\n3 + 3? ", "Why?"):
        ids, reused = conversation.ask(question)
        messages += turns(question)
        options = {"chat_template": template, "add_generation_prompt": True}
        assert ids == hf.apply_chat_template(messages, return_dict=False, **options)
        assert ids[:reused] == cached[:reused]
        assert reused == len(ids) - 1 or ids[reused : reused + 1] != cached[reused : reused + 1]
        answer = tok.encode(THOUGHT, bos=False)
        completion = Completion(tok, ids, GenerationConfig())
        completion.extend([*answer, tok.eos_ids[0]])
        # sentencepiece puts a space before a word, which a continuation keeps.
        assert completion.text.removeprefix(" ") == THOUGHT and completion.finish_reason == "eos"
        conversation.add_answer(ids, completion.ids, completion.text)
        messages.append({"role": "assistant", "content": completion.text})
        cached = [*ids, *answer]
    assert ("Two and two." in tok.decode(ids)) == (name != "qwen")


@pytest.mark.parametrize("is_special", [False, True])
def test_markers_are_text_unless_they_are_special(copy_of, is_special):
    folder = copy_of("qwen")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token["special"] |= is_special
    write_json(path, spec)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for token in settings["added_tokens_decoder"].values():
        token["special"] |= is_special
    write_json(path, settings)
    tok, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = hf.encode('<think>\nhm</think>\n<tool_call>{"a": 1}</tool_call><|im_end|>')
    completion = Completion(tok, [], GenerationConfig(stop=("</tool_call>",)))
    shown = completion.extend(ids) + completion.close()
    assert completion.finish_reason == "stop"  # a special token's name can be a stop string
    whole = hf.decode(ids, skip_special_tokens=True)
    assert shown == completion.text == whole.removesuffix("</tool_call>")
    assert ("<think>" in shown) != is_special


NAMED = {"default": "{{ 'default' }}", "tool_use": "{{ 'tools' }}", "rag": "{{ 'rag' }}"}


@pytest.mark.parametrize("where", ["list", "folder", "folder and list"])
def test_the_default_of_several_templates(copy_of, where):
    entries = [{"name": name, "template": text} for name, text in NAMED.items()]
    old = [{"name": "default", "template": "old"}]
    folder = copy_of("qwen", settings={"chat_template": entries if where == "list" else old})
    if where != "list":
        more = folder / "additional_chat_templates"
        more.mkdir()
        (folder / "chat_template.jinja").write_text(NAMED["default"])
        for name in ("tool_use", "rag"):
            (more / f"{name}.jinja").write_text(NAMED[name])
    tok = load_tokenizer(folder)
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    text = hf.apply_chat_template(CHATS["one"], tokenize=False)
    assert tok.chat_text(CHATS["one"]) == text == "default"


def test_templates_read_further_named_tokens(copy_of):
    settings = {"extra_special_tokens": {"image_token": "<|image|>", "boi": "<|start_image|>"}}
    settings |= {"chat_template": "{{ image_token }}|{{ boi }}|{{ pad_token }}|{{ eos_token }}"}
    folder = copy_of("qwen", settings=settings)
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    text = hf.apply_chat_template(CHATS["one"], tokenize=False)
    assert load_tokenizer(folder).chat_text(CHATS["one"]) == text
    assert text == f"<|image|>|<|start_image|>|{END}|<|im_end|>"

"""The vocabularies that Llama and OPT checkpoints ship, each behind the same Backend.

Start at open_backend and, at the end, FORMATS: tokenizer.json, sentencepiece's tokenizer.model,
Llama 3's rank file of the same name, and GPT-2's vocab.json with merges.txt.

Built on tokenizers and sentencepiece. Rank files follow tiktoken (merge the adjacent pair whose
joined bytes have the lowest rank) with Llama 3's published split and special tokens; the byte
alphabet is GPT-2's.
"""

import base64
import re
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

END_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
OPT_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Llama 3.1's names. What Llama 3 left reserved at these ids it never learnt to emit, so one list
# serves both; the file itself is the same.
LLAMA3_NAMED = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag"
).split()
LLAMA3_RESERVED = [f"reserved_special_token_{i}" for i in range(2, 258 - len(LLAMA3_NAMED))]
LLAMA3_SPECIAL = [f"<|{name}|>" for name in LLAMA3_NAMED + LLAMA3_RESERVED]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2 writes a byte as the character of that number where it is visible, and the other bytes,
# in order, as the characters from 256 on: its vocabularies are text without blanks.
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = (b for b in range(256) if b not in VISIBLE)
CHAR_OF = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE_OF = {c: b for b, c in CHAR_OF.items()}


def open_backend(directory: Path) -> "Backend":
    """The first format of FORMATS whose files the directory holds.

    Raises FileNotFoundError if it holds none, ValueError naming a file that cannot be read.
    """
    for names, read in FORMATS.items():
        paths = [directory / name for name in names]
        if all(path.is_file() for path in paths):
            try:
                return read(*paths)
            except Exception as err:  # the libraries raise bare Exception and RuntimeError
                files = " with ".join(map(str, paths))
                raise ValueError(f"{files}: not a readable tokenizer ({one_line(err)})") from err
    wanted = ", ".join(" with ".join(names) for names in FORMATS)
    held = ", ".join(sorted(path.name for path in directory.glob("*"))) or "nothing"
    raise FileNotFoundError(f"no tokenizer in {directory}: looked for {wanted}; found {held}")


def one_line(err: Exception) -> str:
    return " ".join(str(err).split()) or type(err).__name__


class Backend(Protocol):
    """One library's view of one vocabulary; configs may overrule what it says of BOS and EOS."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    strips_space: bool  # encode puts a space before the text, for decoding to take away

    def encode(self, text: str, special: bool) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...  # empty for special tokens and unknown ids
    def id_of(self, text: str) -> int | None: ...
    def special_id(self, text: str) -> int | None: ...  # id_of, for special tokens alone
    def text_of(self, token: int) -> str: ...


class TokenizersBackend:
    """A tokenizers.Tokenizer: tokenizer.json, and what is built in memory below."""

    def __init__(self, tk: tokenizers.Tokenizer):
        # The file may hold the limits of somebody's training run, which would cut prompts.
        tk.no_truncation()
        tk.no_padding()
        self._tk = tk
        self._added = tk.get_added_tokens_decoder()
        self._bytes_of, self.strips_space = _piece_rule(tk.decoder)
        self._special = {t.content: i for i, t in self._added.items() if t.special}
        self.eos_ids = tuple(self._special[t] for t in END_TOKENS if t in self._special)
        self.vocab_size = max([tk.get_vocab_size(), *(i + 1 for i in self._added)])
        probe = tk.encode("a")
        self.adds_bos = probe.special_tokens_mask[:1] == [1]
        self.bos_id = probe.ids[0] if self.adds_bos else None

    def encode(self, text: str, special: bool) -> list[int]:
        self._tk.encode_special_tokens = not special  # the library's name for "as characters"
        return self._tk.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        if added := self._added.get(token):
            return b"" if added.special else added.content.encode()
        return self._bytes_of(self._tk.id_to_token(token) or "")

    def id_of(self, text: str) -> int | None:
        return self._tk.token_to_id(text)

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def text_of(self, token: int) -> str:
        # Added tokens first: one that is normalised goes by another name in the vocabulary.
        added = self._added.get(token)
        return added.content if added else self._tk.id_to_token(token) or ""


class SentencePieceBackend:
    """A sentencepiece model: Llama and Llama 2 as first published."""

    adds_bos = True

    def __init__(self, path: Path):
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = sp.vocab_size()
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        self.strips_space = sp.encode("a", out_type=str)[0].startswith("▁")
        control = (i for i in range(self.vocab_size) if sp.is_control(i))
        self._special = {sp.id_to_piece(i): i for i in control}
        longest_first = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first) or '(?!)'})").split

    def encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return self._sp.encode(text)
        # Every stretch between special tokens gets its own leading space, as every turn of a
        # chat does in Llama 2's reference code.
        ids = self._special
        parts = ([ids[p]] if p in ids else self._sp.encode(p) for p in self._split(text))
        return [i for part in parts for i in part]

    def token_bytes(self, token: int) -> bytes:
        if token >= self.vocab_size or self._sp.is_control(token) or self._sp.is_unknown(token):
            return b""
        return _metaspace_bytes(self._sp.id_to_piece(token))

    def id_of(self, text: str) -> int | None:
        token = self._sp.piece_to_id(text)
        return token if self.text_of(token) == text else None  # it answers <unk> for the unknown

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def text_of(self, token: int) -> str:
        return self._sp.id_to_piece(token) if token < self.vocab_size else ""


class IdBackend:
    """No vocabulary at all: an id stands for its own number."""

    bos_id, eos_ids, adds_bos, strips_space = None, (), False, False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, special: bool) -> list[int]:
        raise ValueError("random weights have no tokenizer: give a number of tokens as the prompt")

    def token_bytes(self, token: int) -> bytes:
        return f"{token} ".encode()

    def id_of(self, text: str) -> int | None:
        return None

    def special_id(self, text: str) -> int | None:
        return None

    def text_of(self, token: int) -> str:
        return ""


def _piece_rule(decoder):
    """How pieces spell bytes, and whether a text's first space goes. Asks the decoder what it
    does: the same rule is written in many ways."""
    decode = decoder.decode if decoder else " ".join
    if decode(["Ġa"]) == " a":
        return _byte_level_bytes, False
    if decode(["a", "▁a"]) == "a a":
        return _metaspace_bytes, decode(["▁a"]) == "a"
    raise ValueError("its decoder is neither GPT-2's nor sentencepiece's")


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(BYTE_OF[c] for c in piece)
    except KeyError:  # not in the byte alphabet, so it stands for itself
        return piece.encode()


def _metaspace_bytes(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def _from_json(path: Path) -> Backend:
    return TokenizersBackend(tokenizers.Tokenizer.from_file(str(path)))


def _from_model(path: Path) -> Backend:
    with path.open("rb") as file:
        is_ranks = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
    return _from_ranks(path) if is_ranks else SentencePieceBackend(path)


def _from_ranks(path: Path) -> Backend:
    """Llama 3's file: on each line a token in base64 and its rank."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    tokens = ((base64.b64decode(token, validate=True), int(rank)) for token, rank in lines)
    ranks = {"".join(map(CHAR_OF.get, token)): rank for token, rank in tokens}
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks do not count 0, 1, 2, ...")
    # Every way to join a token counts, not the one alone that its training took: tiktoken looks
    # at the joined bytes only. (Where two ways overlap it takes the left one, this the first.)
    merges = [
        (token[:i], token[i:])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tk = tokenizers.Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tk.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    return _byte_level(tk, LLAMA3_SPECIAL, LLAMA3_SPECIAL[0])


def _from_merges(vocab: Path, merges: Path) -> Backend:
    """OPT's files: GPT-2's tokenizer, except that </s> begins a text as well as ends it."""
    tk = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(tk, [t for t in OPT_SPECIAL if tk.token_to_id(t) is not None], "</s>")


def _byte_level(tk: tokenizers.Tokenizer, special: list[str], bos: str) -> Backend:
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens(special)
    if bos in special:
        bos_id = (bos, tk.token_to_id(bos))
        tk.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [bos_id])
    return TokenizersBackend(tk)


FORMATS = {  # in order of preference
    ("tokenizer.json",): _from_json,
    ("tokenizer.model",): _from_model,
    ("vocab.json", "merges.txt"): _from_merges,
}

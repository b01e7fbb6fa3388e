"""The vocabulary formats of Llama and OPT checkpoints behind one interface, Backend.

Start at open_backend and at FORMATS, the last lines: tokenizer.json, sentencepiece's
tokenizer.model, Llama 3's tiktoken file of the same name, and GPT-2's vocab.json with merges.txt.

Source: the libraries tokenizers and sentencepiece. Tiktoken files follow tiktoken (merge the
adjacent pair whose joined bytes have the lowest rank) with the split pattern and the special tokens
that Llama 3 published; the byte alphabet is that of GPT-2.
"""

import base64
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from text.special_tokens import MAX_IDS, TokenizerConfig, refuse_lfs_pointer

EOS_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
UNK_TOKENS = ("<unk>", "[UNK]", "<|unk|>")
OPT_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Llama 3.1's names. Llama 3 has the same file and names other ids "reserved", which it never
# generates, so one list serves both.
LLAMA3_NAMED = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag"
).split()
LLAMA3_RESERVED = [f"reserved_special_token_{i}" for i in range(2, 258 - len(LLAMA3_NAMED))]
LLAMA3_SPECIAL_TOKENS = [f"<|{name}|>" for name in LLAMA3_NAMED + LLAMA3_RESERVED]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# These bytes, appended to a sentencepiece model, set normalizer_spec.add_dummy_prefix to false:
# Protocol Buffers merge concatenated messages, and the last value of a field counts.
NO_PREFIX = b"\x1a\x02\x18\x00"
# GPT-2's byte alphabet: a byte is written as the Latin-1 character of its number if visible.
# The other bytes, in order, are written as the characters from U+0100 on.
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = (b for b in range(256) if b not in VISIBLE)
CHAR_OF = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE_OF = {c: b for b, c in CHAR_OF.items()}


def open_backend(directory: Path, config: TokenizerConfig) -> "Backend":
    """Return a backend for the first format of FORMATS whose files are in the directory, with the
    added tokens of the config.

    Raises FileNotFoundError if the directory has no vocabulary, and ValueError naming the file that
    cannot be read.
    """
    for names, read in FORMATS.items():
        paths = [directory / name for name in names]
        if all(path.is_file() for path in paths):
            for path in paths:
                refuse_lfs_pointer(path)
            config.added  # noqa: B018 -- here, so that an error in it names its own file
            what = " with ".join(map(str, paths)) + ": not a readable tokenizer"
            with library_errors(what):
                backend = read(*paths, config)
                check_usable(backend)
            return backend
    wanted = ", ".join(" with ".join(names) for names in FORMATS)
    found = ", ".join(sorted(path.name for path in directory.glob("*"))) or "nothing"
    raise FileNotFoundError(f"no tokenizer in {directory}: looked for {wanted}; found {found}")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn any error of a tokenizer library into a ValueError that begins with `what`.

    A panic of Rust code derives from BaseException and prints to stderr first, which is suppressed.
    """
    try:
        with stderr_to_devnull():
            yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as err:
        raise ValueError(f"{what} ({one_line(err)})") from err


@contextlib.contextmanager
def stderr_to_devnull() -> Iterator[None]:
    """Redirect file descriptor 2 to /dev/null: libraries write to it without Python."""
    try:
        original = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def check_usable(backend: "Backend") -> None:
    """Encode and decode once, so that a damaged file raises here and not in the middle of a run."""
    if not 0 < backend.vocab_size <= MAX_IDS:
        raise ValueError(f"it has token ids up to {backend.vocab_size - 1}")
    for special in (False, True):
        for token in backend.encode("Hello <s>\n\t42 \u00e9\u4f60\U0001f600", special):
            backend.token_bytes(token)


def one_line(err: BaseException) -> str:
    """Return the message of an error on one line, or its type if it has no message."""
    return " ".join(str(err).split()) or type(err).__name__


class Backend(Protocol):
    """The interface of a vocabulary. Tokenizer may override its BOS and EOS by the config files."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool  # whether a text begins with BOS
    strips_space: bool  # encode adds a space before the text, which decoding removes

    def encode(self, text: str, special: bool) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...  # empty for special tokens and missing ids
    def token_to_id(self, text: str) -> int | None: ...
    def special_id(self, text: str) -> int | None: ...  # None if the token is not special
    def id_to_token(self, token: int) -> str: ...  # "" for missing ids
    def is_unknown(self, token: int) -> bool: ...  # whether it is the id of <unk>


class TokenizersBackend:
    """A tokenizers.Tokenizer, from tokenizer.json or built by the functions below."""

    def __init__(self, tk: tokenizers.Tokenizer, config: TokenizerConfig):
        # The file may contain the truncation of a training run, which would cut prompts.
        tk.no_truncation()
        tk.no_padding()
        self._tk = tk
        tk.add_tokens([token for _, token in config.added])
        marked = {token.content for token in tk.get_added_tokens_decoder().values()}
        named = [t for t in config.special_texts() if tk.token_to_id(t) is not None]
        tk.add_tokens([special_token(text) for text in named if text not in marked])
        self._added = tk.get_added_tokens_decoder()
        self._bytes_of, self.strips_space = _piece_rule(tk.decoder)
        self._special = {t.content: i for i, t in self._added.items() if t.special}
        self.eos_ids = tuple(self._special[t] for t in EOS_TOKENS if t in self._special)
        self.vocab_size = 1 + max(tk.get_vocab().values(), default=-1)  # ids may have gaps
        example = tk.encode("a")
        self.adds_bos = example.special_tokens_mask[:1] == [1]
        self.bos_id = example.ids[0] if self.adds_bos else None

    def encode(self, text: str, special: bool) -> list[int]:
        # encode_special_tokens: whether the library encodes their names as plain characters
        self._tk.encode_special_tokens = not special
        return self._tk.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        if added := self._added.get(token):
            return b"" if added.special else added.content.encode()
        return self._bytes_of(self._tk.id_to_token(token) or "")

    def token_to_id(self, text: str) -> int | None:
        return self._tk.token_to_id(text)

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def id_to_token(self, token: int) -> str:
        # A normalized added token has another name in the library's vocabulary.
        added = self._added.get(token)
        return added.content if added else self._tk.id_to_token(token) or ""

    def is_unknown(self, token: int) -> bool:
        # The model's unk_token does not serve: GPT-2's is also its BOS and EOS.
        return self.id_to_token(token) in UNK_TOKENS


class SentencePieceBackend:
    """A sentencepiece model with added tokens: Llama and Llama 2 as Meta published them."""

    adds_bos = True

    def __init__(self, path: Path, config: TokenizerConfig):
        model = path.read_bytes()
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._continue = sp  # encodes the text after an added token
        if config.flag("legacy") is False:
            self._continue = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        self.strips_space = sp.encode("a", out_type=str)[0].startswith("▁")
        self._added = added_to_pieces(sp, config)
        self.vocab_size = max(sp.vocab_size(), *(i + 1 for i in self._added))
        self._split = AddedTokenSplitter(self._added)
        self._ids = {token.content: i for i, token in self._added.items()}

    def encode(self, text: str, special: bool) -> list[int]:
        # The text after a special token gets a leading space, as each turn of a chat does in
        # Llama 2's reference code, unless "legacy" is false.
        ids: list[int] = []
        for n, part in enumerate(self._split(text, special)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._continue if n else self._sp).encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        if added := self._added.get(token):
            return b"" if added.special else added.content.encode()
        if not self._is_piece(token) or self._sp.is_unknown(token):
            return b""
        return _metaspace_bytes(self._sp.id_to_piece(token))

    def token_to_id(self, text: str) -> int | None:
        token = self._ids.get(text, self._sp.piece_to_id(text))
        # piece_to_id returns the id of <unk> for a text that is no piece
        return token if self.id_to_token(token) == text else None

    def special_id(self, text: str) -> int | None:
        token = self._ids.get(text)
        return token if token is not None and self._added[token].special else None

    def id_to_token(self, token: int) -> str:
        if added := self._added.get(token):
            return added.content
        return self._sp.id_to_piece(token) if self._is_piece(token) else ""

    def is_unknown(self, token: int) -> bool:
        return self._is_piece(token) and self._sp.is_unknown(token)

    def _is_piece(self, token: int) -> bool:
        return token < self._sp.vocab_size()


def added_to_pieces(
    sp: sentencepiece.SentencePieceProcessor, config: TokenizerConfig
) -> dict[int, AddedToken]:
    """Return the control pieces of a sentencepiece model and the added tokens of the config by id.

    An added token without an id has that of the piece with its text, else the next free id.
    """
    pieces = {i: sp.id_to_piece(i) for i in range(sp.vocab_size()) if sp.is_control(i)}
    added = {i: special_token(piece) for i, piece in pieces.items()}
    added |= {i: token for i, token in config.added if i is not None}
    size = max(sp.vocab_size(), *(i + 1 for i in added))
    for token in (token for i, token in config.added if i is None):
        piece = sp.piece_to_id(token.content)  # the id of <unk> for a text that is no piece
        i = piece if sp.id_to_piece(piece) == token.content else size
        added[i] = token
        size = max(size, i + 1)
    return added


class AddedTokenSplitter:
    """Splits a text at added tokens, with the tokenizers library, which implements their flags.

    Its vocabulary has the added tokens alone, so it returns the text between them as one unknown
    token.
    """

    def __init__(self, added: dict[int, AddedToken]):
        self._tk = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        self._tk.add_tokens(list(added.values()))
        self._ids = {self._tk.token_to_id(token.content): i for i, token in added.items()}

    def __call__(self, text: str, special: bool) -> Iterator[str | int]:
        self._tk.encode_special_tokens = not special
        found = self._tk.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            yield self._ids.get(token, text[start:end])


class IdBackend:
    """The backend of a model without tokenizer files: an id decodes to its own number."""

    bos_id, eos_ids, adds_bos, strips_space = None, (), False, False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, special: bool) -> list[int]:
        raise ValueError("random weights have no tokenizer: give a number of tokens as the prompt")

    def token_bytes(self, token: int) -> bytes:
        return f"{token} ".encode()

    def token_to_id(self, text: str) -> int | None:
        return None

    def special_id(self, text: str) -> int | None:
        return None

    def id_to_token(self, token: int) -> str:
        return ""

    def is_unknown(self, token: int) -> bool:
        return False


def special_token(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _piece_rule(decoder):
    """Return the function from a piece to its bytes, and whether decoding strips the first space.

    The decoder is tried on pieces, because tokenizer.json files write the same rule in many ways.
    """
    decode = decoder.decode if decoder else " ".join
    if decode(["Ġa"]) == " a":
        return _byte_level_bytes, False
    if decode(["a", "▁a"]) == "a a":
        return _metaspace_bytes, decode(["▁a"]) == "a"
    raise ValueError("its decoder is neither GPT-2's nor sentencepiece's")


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(BYTE_OF[c] for c in piece)
    except KeyError:  # a piece with other characters is plain text
        return piece.encode()


def _metaspace_bytes(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def _from_json(path: Path, config: TokenizerConfig) -> Backend:
    return TokenizersBackend(tokenizers.Tokenizer.from_file(str(path)), config)


def _from_model(path: Path, config: TokenizerConfig) -> Backend:
    with path.open("rb") as file:
        is_ranks = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
    return _from_ranks(path, config) if is_ranks else SentencePieceBackend(path, config)


def _from_ranks(path: Path, config: TokenizerConfig) -> Backend:
    """Read Llama 3's tiktoken file: each line has a token in base64 and its rank."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    tokens = ((base64.b64decode(token, validate=True), int(rank)) for token, rank in lines)
    ranks = {"".join(map(CHAR_OF.get, token)): rank for token, rank in tokens}
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks do not count 0, 1, 2, ...")
    # tiktoken merges any two tokens whose joined bytes are a token, so every such pair is a merge.
    # (Of two overlapping pairs tiktoken takes the left one, this library the first in the list.)
    merges = [
        (token[:i], token[i:])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tk = tokenizers.Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tk.pre_tokenizer = pre_tokenizers.Sequence([split, to_alphabet])
    return _byte_level(tk, LLAMA3_SPECIAL_TOKENS, LLAMA3_SPECIAL_TOKENS[0], config)


def _from_merges(vocab: Path, merges: Path, config: TokenizerConfig) -> Backend:
    """Read OPT's files: GPT-2's tokenizer, except that </s> is both BOS and EOS."""
    pieces, pairs = models.BPE.read_file(str(vocab), str(merges))
    taken = set(pieces.values())
    for i, token in config.added:  # the library would number them without gaps
        if i is not None and i not in taken:
            pieces.setdefault(token.content, i)
    tk = tokenizers.Tokenizer(models.BPE(pieces, pairs))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [text for text in OPT_SPECIAL_TOKENS if text in pieces]
    return _byte_level(tk, special, "</s>", config)


def _byte_level(
    tk: tokenizers.Tokenizer, special: list[str], bos: str, config: TokenizerConfig
) -> Backend:
    """Give a byte-level tokenizer its decoder, its special tokens and a BOS before each text."""
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens(special)
    if bos in special:
        bos_id = (bos, tk.token_to_id(bos))
        tk.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [bos_id])
    return TokenizersBackend(tk, config)


FORMATS = {  # in order of preference
    ("tokenizer.json",): _from_json,
    ("tokenizer.model",): _from_model,
    ("vocab.json", "merges.txt"): _from_merges,
}

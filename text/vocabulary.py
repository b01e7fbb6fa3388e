"""The vocabulary formats of checkpoints behind one interface, Backend.

Start at open_backend and at FORMATS, the last lines: tokenizer.json, sentencepiece's
tokenizer.model, Llama 3's tiktoken file of the same name, and GPT-2's vocab.json with merges.txt.
Of several formats in one folder the first in this order is read, as in transformers.

Words: a piece is a token's text in the notation of its format ("▁the", "Ġthe"); a special token,
such as </s>, stands for no text; an added token is listed in the checkpoint's JSON files, and text
is split at it before the vocabulary encodes the parts. `special` in `encode`: whether the names of
special tokens in the text become their ids, else they are plain text. `tk` is a tokenizer of the
library tokenizers.

Source: the libraries tokenizers and sentencepiece. Tiktoken files follow tiktoken (merge the
adjacent pair whose joined bytes have the lowest rank) with the split pattern and the special tokens
that Llama 3 published; the byte alphabet is that of GPT-2; the other split pattern is Qwen2's.
"""

import base64
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from text.special_tokens import MAX_IDS, TokenizerConfig, refuse_lfs_pointer

# Tokens taken for EOS if none of the checkpoint's JSON files names one: Llama's, those of Qwen and
# other ChatML models, Gemma's, Phi's.
EOS_TOKENS = (
    *("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|endoftext|>", "<|im_end|>", "<eos>", "<end_of_turn>", "<|end|>"),
)
UNK_TOKENS = ("<unk>", "[UNK]", "<|unk|>")
OPT_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Llama 3.1's names. Llama 3 has the same file; it calls some of these ids "reserved" and never
# generates them, so one list is right for both.
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
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit is a piece
# These bytes, appended to a sentencepiece model, set normalizer_spec.add_dummy_prefix to false:
# Protocol Buffers merge concatenated messages, and the last value of a field counts.
NO_PREFIX = b"\x1a\x02\x18\x00"
# GPT-2's byte alphabet: a byte whose Latin-1 character is visible is written as this character.
# The other bytes, in ascending order, are written as the characters from U+0100 on.
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = (b for b in range(256) if b not in VISIBLE)
CHAR_OF = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE_OF = {c: b for b, c in CHAR_OF.items()}
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # sentencepiece's piece of one byte


def open_backend(directory: Path, config: TokenizerConfig) -> "Backend":
    """Read the vocabulary in a checkpoint's directory, in the first format of FORMATS whose files
    are there, and add the added tokens of the config. Return its Backend.

    Raises FileNotFoundError if the directory has no vocabulary, and ValueError naming the file that
    cannot be read.
    """
    for names, read in FORMATS.items():
        paths = [directory / name for name in names]
        if all(path.is_file() for path in paths):
            for path in paths:
                refuse_lfs_pointer(path)
            # A lazy property, read here so that its errors name the config file, not the tokenizer.
            config.added  # noqa: B018
            what = " with ".join(map(str, paths)) + ": not a readable tokenizer"
            with library_errors(what):
                backend = read(*paths, config)
                check_usable(backend)
            return backend
    expected = ", ".join(" with ".join(names) for names in FORMATS)
    present = ", ".join(sorted(path.name for path in directory.glob("*"))) or "nothing"
    raise FileNotFoundError(f"no tokenizer in {directory}: looked for {expected}; found {present}")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn any error of a tokenizer library in this block into a ValueError: `what (message)`.

    A panic of the library's Rust code raises a BaseException and prints to stderr, so all output to
    stderr in the block is suppressed. Ctrl-C, exit and MemoryError pass.
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
    """Redirect file descriptor 2 to /dev/null in this block, for all threads: native libraries
    write to it directly, past sys.stderr."""
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
    """Encode and decode a text, so that a damaged vocabulary raises its error now and not in the
    middle of a run. Raises ValueError for a vocabulary without ids or with more than MAX_IDS, and
    any error of the library."""
    if not 0 < backend.vocab_size <= MAX_IDS:
        raise ValueError(f"it has token ids up to {backend.vocab_size - 1}")
    # The text has characters of 1 to 4 bytes, spaces, and the name of a special token.
    for special in (False, True):
        for token in backend.encode("Hello <s>\n\t42 \u00e9\u4f60\U0001f600", special):
            backend.token_bytes(token)


def one_line(err: BaseException) -> str:
    """Return the message of an error on one line, or its type if it has no message."""
    return " ".join(str(err).split()) or type(err).__name__


class Backend(Protocol):
    """The interface of a vocabulary, in each of the formats.

    It never adds BOS. Tokenizer (tokenizer.py) does, and may replace the vocabulary's BOS and EOS
    by those of the config files. `token` is an id. `text` in special_id and token_to_id is a
    token's text, such as "</s>".
    """

    vocab_size: int  # 1 + the largest id; ids may have gaps
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool  # whether the vocabulary asks for BOS before each text
    strips_space: bool  # encode adds a space before the text, and decoding must remove it

    # special: whether the names of special tokens in the text become their ids
    def encode(self, text: str, special: bool) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...  # empty for special tokens and missing ids
    def token_to_id(self, text: str) -> int | None: ...  # None: no token has this text
    def special_id(self, text: str) -> int | None: ...  # None: no special token has this text
    def id_to_token(self, token: int) -> str: ...  # "" for missing ids
    def is_unknown(self, token: int) -> bool: ...  # whether it is the id of <unk>


class TokenizersBackend:
    """A Backend on a tokenizers.Tokenizer, which _from_json reads from tokenizer.json, or
    _from_ranks or _from_merges builds."""

    def __init__(self, tk: tokenizers.Tokenizer, config: TokenizerConfig):
        """Add the config's added tokens to `tk`: see _add_tokens. BOS is the token that the
        post-processor of `tk` puts before a text, if any."""
        # tokenizer.json may contain the truncation of a training run, which would cut prompts.
        tk.no_truncation()
        tk.no_padding()
        self._tk = tk
        _add_tokens(tk, config)
        self._added = tk.get_added_tokens_decoder()
        self._bytes_of, self._bytes_of_added, self.strips_space = _piece_rules(tk.decoder)
        self._special = {t.content: i for i, t in self._added.items() if t.special}
        self.eos_ids = tuple(self._special[t] for t in EOS_TOKENS if t in self._special)
        self.vocab_size = _id_count(tk)
        # The mask of its ids has a 1 for each id that the post-processor adds.
        example = tk.encode("a")
        self.adds_bos = example.special_tokens_mask[:1] == [1]
        self.bos_id = example.ids[0] if self.adds_bos else None

    def encode(self, text: str, special: bool) -> list[int]:
        # encode_special_tokens=True: the library encodes names of special tokens as plain text.
        self._tk.encode_special_tokens = not special
        return self._tk.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        if added := self._added.get(token):
            return b"" if added.special else self._bytes_of_added(added.content)
        return self._bytes_of(self._tk.id_to_token(token) or "")

    def token_to_id(self, text: str) -> int | None:
        return self._tk.token_to_id(text)

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def id_to_token(self, token: int) -> str:
        # The library's vocabulary has the normalized text of an added token, not its own text.
        added = self._added.get(token)
        return added.content if added else self._tk.id_to_token(token) or ""

    def is_unknown(self, token: int) -> bool:
        # The vocabulary's own unk_token cannot be used: GPT-2's is also its BOS and EOS.
        return self.id_to_token(token) in UNK_TOKENS


class SentencePieceBackend:
    """A Backend on a sentencepiece model with added tokens: Llama 2, Mistral, Gemma and Phi-3
    without tokenizer.json. sentencepiece does not know the added tokens: AddedTokenSplitter splits
    the text at them, and sentencepiece encodes the parts between them."""

    adds_bos = True

    def __init__(self, path: Path, config: TokenizerConfig):
        """Read the sentencepiece model `path`. With "legacy": false in the config, a second
        processor encodes the text after an added token; it puts no space before the text."""
        special = [*config.special_texts(), *(t.content for _, t in config.added if t.special)]
        model = with_control_pieces(path.read_bytes(), special)
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._sp_after_token = sp  # encodes the text after an added token
        if config.flag("legacy") is False:
            without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
            self._sp_after_token = without_prefix
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        self.strips_space = sp.encode("a", out_type=str)[0].startswith("▁")
        self._added = added_to_pieces(sp, config)
        self.vocab_size = max(sp.vocab_size(), *(i + 1 for i in self._added))
        self._split = AddedTokenSplitter(self._added)
        self._ids = {token.content: i for i, token in self._added.items()}

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text; special: see the top of this file. A space is put before
        each part of the text, as Llama 2's reference code does before each turn of a chat; with
        "legacy": false in the config, only before a part that begins the text."""
        ids: list[int] = []
        for n, part in enumerate(self._split(text, special)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._sp_after_token if n else self._sp).encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id adds to a text; b"" for special tokens, <unk> and ids that
        the vocabulary does not have."""
        if added := self._added.get(token):
            return b"" if added.special else _metaspace_bytes(added.content)
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
    """Return the tokens at which text is split, by id: <unk> and the control pieces of a
    sentencepiece model, such as </s>, which become special tokens, and the added tokens of the
    config.

    An added token without an id gets the id of the piece with the same text, else the next free id.
    """
    is_control = sp.is_control(list(range(sp.vocab_size())))
    ids = [sp.unk_id(), *(i for i, control in enumerate(is_control) if control)]
    added = {i: special_token(sp.id_to_piece(i)) for i in ids}
    added |= {i: token for i, token in config.added if i is not None}
    size = max(sp.vocab_size(), *(i + 1 for i in added))
    for token in (token for i, token in config.added if i is None):
        piece = sp.piece_to_id(token.content)  # the id of <unk> for a text that is no piece
        i = piece if sp.id_to_piece(piece) == token.content else size
        added[i] = token
        size = max(size, i + 1)
    return added


def with_control_pieces(model: bytes, texts: Iterable[str]) -> bytes:
    """Return a copy of a sentencepiece model, the bytes of its file, in which the user-defined
    pieces with these texts are control pieces.

    sentencepiece encodes the text of a user-defined piece as that piece wherever it occurs, so that
    a prompt could forge Gemma's <start_of_turn>. It never encodes text as a control piece.
    """
    data = bytearray(model)
    for piece in map(str.encode, texts):
        # Protocol Buffers: field 1 is the text after its length (one byte up to 127), field 2 the
        # score, a float of 4 bytes, and field 3 the type: 4 is user-defined, 3 is control.
        head = b"\x0a%c%b\x15" % (len(piece) % 256, piece)
        start = data.find(head)
        field3 = start + len(head) + 4
        if start >= 0 and data[field3 : field3 + 2] == b"\x18\x04":
            data[field3 + 1] = 3
    return bytes(data)


class AddedTokenSplitter:
    """Splits a text at added tokens, for a vocabulary that does not know them.

    It uses the tokenizers library, which implements the flags lstrip, rstrip, single_word and
    normalized. The library's tokenizer here has no vocabulary but the added tokens, so the text
    between two of them is one unknown token.
    """

    def __init__(self, added: dict[int, AddedToken]):
        """added: the tokens by id. The library numbers them in its own way, so _ids maps its ids to
        those of `added`."""
        self._tk = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        self._tk.add_tokens(list(added.values()))
        self._ids = {self._tk.token_to_id(token.content): i for i, token in added.items()}

    def __call__(self, text: str, special: bool) -> Iterator[str | int]:
        """Yield the parts of a text in order: the id of an added token, or the text between two.

        special: whether the names of special tokens are split off; else they are plain text.
        """
        self._tk.encode_special_tokens = not special
        encoding = self._tk.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield self._ids.get(token, text[start:end])


class IdBackend:
    """The Backend of a model without tokenizer files (random weights): an id decodes to its number
    and a space, and text cannot be encoded."""

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
    """Return a special token that is looked for in a text before the text is normalized."""
    return AddedToken(text, special=True, normalized=False)


def _add_tokens(tk: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Add the config's added tokens to `tk`. An added token that `tk` has already is replaced, with
    its flags, only if added_tokens_decoder lists it: no other file gives flags.

    A token of TOKEN_KEYS, such as eos_token, becomes special if the vocabulary has it. A token that
    is special in `tk` stays special: the library would omit its text in any case.
    """
    own = {token.content: token for token in tk.get_added_tokens_decoder().values()}
    tokens = {}  # those to add, by their text
    for i, token in config.added:
        with_flags = config.has_added_tokens_decoder and i is not None  # None: of EXTRA_KEYS
        if token.content not in own or with_flags:
            tokens[token.content] = token
    for text in config.special_texts():
        if text not in tokens and tk.token_to_id(text) is not None:
            tokens[text] = own.get(text, special_token(text))
            tokens[text].special = True
    for text in tokens.keys() & own.keys():
        tokens[text].special |= own[text].special
    tk.add_tokens(list(tokens.values()))


def _id_count(tk: tokenizers.Tokenizer) -> int:
    """Return 1 + the largest id. It is the number of tokens if each id below that number has a
    token. If ids have gaps, the whole vocabulary is read, which takes twice the time: 0.7 s for
    262,000 tokens."""
    count = tk.get_vocab_size()
    if None not in map(tk.id_to_token, range(count)):
        return count
    return 1 + max(tk.get_vocab().values())


def _piece_rules(decoder) -> tuple[Callable[[str], bytes], Callable[[str], bytes], bool]:
    """Return three values: a function from a piece to its bytes, a function from an added token's
    text to its bytes, and whether decoding removes the space before the first word.

    decoder: of a tokenizers.Tokenizer; None: the library joins pieces with spaces. Files describe
    the same decoder in many ways, so it is recognised by the texts that it returns for two
    examples. Raises ValueError for None, and for a decoder that is neither GPT-2's (byte level) nor
    sentencepiece's (metaspace).
    """
    decode = decoder.decode if decoder else " ".join
    if decode(["Ġa"]) == " a":
        return _byte_level_bytes, str.encode, False
    if decode(["a", "▁a"]) == "a a":
        # Added tokens, too: some of Gemma's are runs of spaces, written "▁▁".
        return _metaspace_bytes, _metaspace_bytes, decode(["▁a"]) == "a"
    raise ValueError("its decoder is neither GPT-2's nor sentencepiece's")


def _byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a piece that is written in GPT-2's byte alphabet (see CHAR_OF)."""
    try:
        return bytes(map(BYTE_OF.__getitem__, piece))
    except KeyError:  # a piece with other characters is plain text
        return piece.encode()


def _metaspace_bytes(piece: str) -> bytes:
    """Return the bytes of a sentencepiece piece: "▁" is a space, and <0x0A> is the byte 10."""
    if BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


# --- the readers of FORMATS


def _from_json(path: Path, config: TokenizerConfig) -> Backend:
    return TokenizersBackend(tokenizers.Tokenizer.from_file(str(path)), config)


def _from_model(path: Path, config: TokenizerConfig) -> Backend:
    """Read tokenizer.model: Llama 3's tiktoken file if the first line is a base64 token and a
    number, else a sentencepiece model."""
    with path.open("rb") as file:
        is_ranks = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
    return _from_ranks(path, config) if is_ranks else SentencePieceBackend(path, config)


def _from_ranks(path: Path, config: TokenizerConfig) -> Backend:
    """Read Llama 3's tiktoken file, and build its byte-level BPE tokenizer.

    Each line of the file has a token in base64 and its rank, which is also its id. Raises
    ValueError if the ranks are not 0, 1, 2, ... in this order.
    """
    lines = (line.split() for line in path.read_bytes().splitlines())
    tokens = ((base64.b64decode(token, validate=True), int(rank)) for token, rank in lines)
    ranks = {"".join(map(CHAR_OF.get, token)): rank for token, rank in tokens}
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks do not count 0, 1, 2, ...")
    # tiktoken merges any two tokens whose joined bytes are a token, so each such pair is a merge.
    # The library merges the pair first that is earlier in `merges`, so they are in order of rank.
    # (If two pairs overlap, tiktoken merges the left one, this library the first of `merges`.)
    merges = [
        (token[:i], token[i:])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tk = tokenizers.Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    # ignore_merges: a piece of text that is a whole token becomes it at once, as in tiktoken.
    tk.pre_tokenizer = _split_by(LLAMA3_SPLIT)
    return _byte_level(tk, LLAMA3_SPECIAL_TOKENS, LLAMA3_SPECIAL_TOKENS[0], config)


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of a byte-level vocabulary with another split pattern than GPT-2's:
    it splits text into the matches of the pattern, and writes each in GPT-2's byte alphabet."""
    # "isolated": each match of the pattern is a piece of its own, within which tokens are merged.
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_alphabet])


def _from_merges(vocab: Path, merges: Path, config: TokenizerConfig) -> Backend:
    """Read vocab.json (piece -> id) and merges.txt (pairs of pieces), and build Qwen's tokenizer if
    the config names it, else GPT-2's. A vocabulary whose id 2 is </s> is OPT's: there this token is
    both BOS and EOS."""
    pieces, pairs = models.BPE.read_file(str(vocab), str(merges))
    used_ids = set(pieces.values())
    # Added tokens get their ids here, because the library would number them without gaps.
    for i, token in config.added:
        if i is not None and i not in used_ids:
            pieces.setdefault(token.content, i)
    tk = tokenizers.Tokenizer(models.BPE(pieces, pairs))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if config.is_qwen():
        tk.normalizer, tk.pre_tokenizer = normalizers.NFC(), _split_by(QWEN_SPLIT)
    is_opt = pieces.get("</s>") == 2
    special = [text for text in OPT_SPECIAL_TOKENS if is_opt and text in pieces]
    return _byte_level(tk, special, "</s>", config)


def _byte_level(
    tk: tokenizers.Tokenizer, special: list[str], bos: str, config: TokenizerConfig
) -> Backend:
    """Complete a byte-level tokenizer: set its decoder, add its special tokens, and let it put
    `bos` before each text if `bos` is in `special`. Return its backend. special, bos: texts of
    special tokens."""
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens(special)
    if bos in special:
        bos_id = (bos, tk.token_to_id(bos))
        tk.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [bos_id])
    return TokenizersBackend(tk, config)


# Names of the files of a format -> its reader, a function of their paths and the config; in order
# of preference.
FORMATS = {
    ("tokenizer.json",): _from_json,
    ("tokenizer.model",): _from_model,
    ("vocab.json", "merges.txt"): _from_merges,
}

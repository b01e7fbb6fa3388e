"""The vocabularies that Llama and OPT checkpoints ship, each behind the same Backend.

Start at open_backend and, at the end, FORMATS: tokenizer.json, sentencepiece's tokenizer.model,
Llama 3's rank file of the same name, and GPT-2's vocab.json with merges.txt.

Built on tokenizers and sentencepiece. Rank files follow tiktoken (merge the adjacent pair whose
joined bytes have the lowest rank) with Llama 3's published split and special tokens; the byte
alphabet is GPT-2's.
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

from text.special_tokens import MOST_IDS, Declared, refuse_pointer

END_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
UNKNOWN = ("<unk>", "[UNK]", "<|unk|>")
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
# Appended to a sentencepiece model: in normalizer_spec, add_dummy_prefix is false. Protocol buffers
# merge messages that way, and what comes last counts.
NO_PREFIX = b"\x1a\x02\x18\x00"
# GPT-2 writes a byte as the character of that number where it is visible, and the other bytes,
# in order, as the characters from 256 on: its vocabularies are text without blanks.
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = (b for b in range(256) if b not in VISIBLE)
CHAR_OF = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE_OF = {c: b for b, c in CHAR_OF.items()}


def open_backend(directory: Path, declared: Declared) -> "Backend":
    """The first format of FORMATS whose files the directory holds, with the tokens declared.

    Raises FileNotFoundError if it holds none, ValueError naming a file that cannot be read.
    """
    for names, read in FORMATS.items():
        paths = [directory / name for name in names]
        if all(path.is_file() for path in paths):
            for path in paths:
                refuse_pointer(path)
            declared.added  # noqa: B018 -- an error there names a file of its own
            what = " with ".join(map(str, paths)) + ": not a readable tokenizer"
            with library_errors(what):
                backend = read(*paths, declared)
                try_out(backend)
            return backend
    wanted = ", ".join(" with ".join(names) for names in FORMATS)
    held = ", ".join(sorted(path.name for path in directory.glob("*"))) or "nothing"
    raise FileNotFoundError(f"no tokenizer in {directory}: looked for {wanted}; found {held}")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever a library raises becomes a ValueError, in silence. A panic of Rust code is no
    Exception, and is written to stderr before it is raised."""
    try:
        with muted():
            yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as err:
        raise ValueError(f"{what} ({one_line(err)})") from err


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Nothing that this process writes to stderr is shown."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def try_out(backend: "Backend") -> None:
    """What a damaged file holds shows at the first use: here, and not in the middle of a run."""
    if not 0 < backend.vocab_size <= MOST_IDS:
        raise ValueError(f"it has token ids up to {backend.vocab_size - 1}")
    for special in (False, True):
        for token in backend.encode("Hello <s>\n\t42 \u00e9\u4f60\U0001f600", special):
            backend.token_bytes(token)


def one_line(err: BaseException) -> str:
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
    def is_unknown(self, token: int) -> bool: ...  # whether it stands for what has no id


class TokenizersBackend:
    """A tokenizers.Tokenizer: tokenizer.json, and what is built in memory below."""

    def __init__(self, tk: tokenizers.Tokenizer, declared: Declared):
        # The file may hold the limits of somebody's training run, which would cut prompts.
        tk.no_truncation()
        tk.no_padding()
        self._tk = tk
        tk.add_tokens([token for _, token in declared.added])
        marked = {token.content for token in tk.get_added_tokens_decoder().values()}
        named = [t for t in declared.special_texts() if tk.token_to_id(t) is not None]
        tk.add_tokens([special_token(text) for text in named if text not in marked])
        self._added = tk.get_added_tokens_decoder()
        self._bytes_of, self.strips_space = _piece_rule(tk.decoder)
        self._special = {t.content: i for i, t in self._added.items() if t.special}
        self.eos_ids = tuple(self._special[t] for t in END_TOKENS if t in self._special)
        self.vocab_size = 1 + max(tk.get_vocab().values(), default=-1)  # there may be gaps
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

    def is_unknown(self, token: int) -> bool:
        # Not the model's unk_token: GPT-2's is its BOS and EOS as well.
        return self.text_of(token) in UNKNOWN


class SentencePieceBackend:
    """A sentencepiece model: Llama and Llama 2 as first published, and added tokens beside it."""

    adds_bos = True

    def __init__(self, path: Path, declared: Declared):
        model = path.read_bytes()
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._continue = sp  # for stretches after an added token
        if declared.flag("legacy") is False:
            self._continue = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        self.strips_space = sp.encode("a", out_type=str)[0].startswith("▁")
        pieces = {i: sp.id_to_piece(i) for i in range(sp.vocab_size()) if sp.is_control(i)}
        self._added = {i: special_token(piece) for i, piece in pieces.items()}
        self._added |= {i: token for i, token in declared.added if i is not None}
        self.vocab_size = max(sp.vocab_size(), *(i + 1 for i in self._added))
        for token in (token for i, token in declared.added if i is None):
            own = sp.piece_to_id(token.content)  # of <unk> for a text that is no piece
            i = own if sp.id_to_piece(own) == token.content else self.vocab_size
            self._added[i] = token
            self.vocab_size = max(self.vocab_size, i + 1)
        self._split = Splitter(self._added)
        self._ids = {token.content: i for i, token in self._added.items()}

    def encode(self, text: str, special: bool) -> list[int]:
        # Every stretch between special tokens gets its own leading space, as every turn of a
        # chat does in Llama 2's reference code, unless "legacy" is false.
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
        if not self._holds(token) or self._sp.is_unknown(token):
            return b""
        return _metaspace_bytes(self._sp.id_to_piece(token))

    def id_of(self, text: str) -> int | None:
        token = self._ids.get(text, self._sp.piece_to_id(text))
        return token if self.text_of(token) == text else None  # it answers <unk> for the unknown

    def special_id(self, text: str) -> int | None:
        token = self._ids.get(text)
        return token if token is not None and self._added[token].special else None

    def text_of(self, token: int) -> str:
        if added := self._added.get(token):
            return added.content
        return self._sp.id_to_piece(token) if self._holds(token) else ""

    def is_unknown(self, token: int) -> bool:
        return self._holds(token) and self._sp.is_unknown(token)

    def _holds(self, token: int) -> bool:
        return token < self._sp.vocab_size()


class Splitter:
    """Finds added tokens in a text, by the tokenizers library, which knows what their flags mean:
    its vocabulary here has no other tokens, so that every stretch between them is one unknown."""

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

    def is_unknown(self, token: int) -> bool:
        return False


def special_token(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


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


def _from_json(path: Path, declared: Declared) -> Backend:
    return TokenizersBackend(tokenizers.Tokenizer.from_file(str(path)), declared)


def _from_model(path: Path, declared: Declared) -> Backend:
    with path.open("rb") as file:
        is_ranks = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000))
    return _from_ranks(path, declared) if is_ranks else SentencePieceBackend(path, declared)


def _from_ranks(path: Path, declared: Declared) -> Backend:
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
    return _byte_level(tk, LLAMA3_SPECIAL, LLAMA3_SPECIAL[0], declared)


def _from_merges(vocab: Path, merges: Path, declared: Declared) -> Backend:
    """OPT's files: GPT-2's tokenizer, except that </s> begins a text as well as ends it."""
    pieces, pairs = models.BPE.read_file(str(vocab), str(merges))
    taken = set(pieces.values())
    for i, token in declared.added:  # the library would give them the next ids, without gaps
        if i is not None and i not in taken:
            pieces.setdefault(token.content, i)
    tk = tokenizers.Tokenizer(models.BPE(pieces, pairs))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [text for text in OPT_SPECIAL if text in pieces]
    return _byte_level(tk, special, "</s>", declared)


def _byte_level(
    tk: tokenizers.Tokenizer, special: list[str], bos: str, declared: Declared
) -> Backend:
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens(special)
    if bos in special:
        bos_id = (bos, tk.token_to_id(bos))
        tk.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [bos_id])
    return TokenizersBackend(tk, declared)


FORMATS = {  # in order of preference
    ("tokenizer.json",): _from_json,
    ("tokenizer.model",): _from_model,
    ("vocab.json", "merges.txt"): _from_merges,
}

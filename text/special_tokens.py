"""The JSON files next to a vocabulary: special tokens, added tokens and the chat template.

Start at TokenizerConfig, which checks the type of each value that it returns. tokenizer.py decides
between these files and the vocabulary; vocabulary.py adds the added tokens to the vocabulary. As in
transformers' `from_pretrained`, special_tokens_map.json and added_tokens.json are read only if
tokenizer_config.json has no added_tokens_decoder; special_tokens_map.json then overrides it.

Words: a special token, such as </s>, stands for no text; an added token extends the vocabulary or
is split off before the vocabulary encodes a text. Some added tokens are special.
added_tokens_decoder maps the ids of added tokens, as texts, to objects {"content": text, flags}.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from host.files import read_object, read_text

LFS_HEADER = b"version https://git-lfs"  # begins a file that git-lfs has not fetched
TOKEN_KEYS = [f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
EXTRA_KEYS = ("additional_special_tokens", "extra_special_tokens")  # in transformers 4 and 5
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # arguments of AddedToken
MAX_IDS = 1 << 24  # far above any vocabulary: a damaged file can contain 2^63

Added = list[tuple[int | None, AddedToken]]  # (id, token); None: the token gets the next free id


class TokenizerConfig:
    """The values of the JSON files next to a vocabulary.

    has_added_tokens_decoder: whether tokenizer_config.json has that key, not null. Each method and
    property raises ValueError, naming the file and the key, if a value has the wrong type.
    """

    def __init__(self, directory: Path):
        """Read the checkpoint directory's tokenizer_config.json; without its added_tokens_decoder,
        special_tokens_map.json, too. Methods read the other files when they need them."""
        self.directory = directory
        self._config = read_config(directory / "tokenizer_config.json")
        self._overrides: dict[str, Any] = {}  # content of special_tokens_map.json
        self.has_added_tokens_decoder = self._config.get("added_tokens_decoder") is not None
        if not self.has_added_tokens_decoder:
            self._overrides = read_config(directory / "special_tokens_map.json")

    def flag(self, key: str) -> bool | None:
        """Return a boolean of tokenizer_config.json, or None if the key is absent or null."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true, false or null")
        return value

    @cached_property
    def names(self) -> dict[str, str]:
        """The texts of the tokens that the files name, by key: {"eos_token": "</s>", ...}.

        The keys are those of TOKEN_KEYS that the files have, with "" for null. For chat templates
        there are also other keys that end in _token, and the keys of an object under
        extra_special_tokens, if their value is a text.
        """
        both = self._config | self._overrides
        texts = {key: self._text(key, both[key]) for key in TOKEN_KEYS if key in both}
        extra = both.get("extra_special_tokens")
        others = {key: both[key] for key in both if key.endswith("_token")}
        others |= extra if isinstance(extra, dict) else {}
        return {key: others[key] for key in others if isinstance(others[key], str)} | texts

    def special_texts(self) -> list[str]:
        """Return the texts under TOKEN_KEYS that are not empty."""
        return [self.names[key] for key in TOKEN_KEYS if self.names.get(key)]

    @cached_property
    def added(self) -> Added:
        """The added tokens as (id, token): first those with an id, in the order of ids, then those
        under EXTRA_KEYS that are not among the former, with None for an id. Tokens of TOKEN_KEYS
        are special, whatever their flag is."""
        extra, named = self._extra(), self.special_texts()
        special = {*named, *(token.content for token in extra)}
        added = sorted(self._numbered(special), key=lambda entry: entry[0])
        for _, token in added:
            token.special |= token.content in named
        added_texts = {token.content for _, token in added}
        return added + [(None, token) for token in extra if token.content not in added_texts]

    def ids(self, file: str, key: str) -> list[int]:
        """Return the token ids that a JSON file has under a key such as eos_token_id, which may be
        an id, a list or null. Returns [] for null and for a missing key or file."""
        value = self._other(file).get(key)
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(e, bool) or not isinstance(e, int | None) for e in entries):
            raise self._wrong(key, value, "a token id, a list of token ids or null", file)
        return [entry for entry in entries if entry is not None]

    def model_vocab_size(self) -> int:
        """Return vocab_size of config.json, or 0 if it is absent or no integer."""
        size = self._other("config.json").get("vocab_size")
        return size if isinstance(size, int) else 0

    def is_qwen(self) -> bool:
        """Return whether the tokenizer's class or, without one, the model's type is Qwen's."""
        name = self._config.get("tokenizer_class") or self._other("config.json").get("model_type")
        return str(name).lower().startswith("qwen")

    def chat_template(self) -> str | None:
        """Return the Jinja source of the chat template, or None. It comes from the first of
        chat_template.jinja, tokenizer_config.json and chat_template.json that has one."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            refuse_lfs_pointer(path)
            return read_text(path)
        for file in ("tokenizer_config.json", "chat_template.json"):
            value = self._other(file).get("chat_template")
            if value is not None:
                return self._default_template(file, value)
        return None

    def _default_template(self, file: str, value: Any) -> str | None:
        """Return the template in `value`, the value of a "chat_template" key: a template, or
        several with names, {name: template} or [{"name": ..., "template": ...}, ...]. Of several
        it is the one named "default", or None if there is none. file: for error messages."""
        template = value
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            value = {str(entry.get("name")): entry.get("template") for entry in value}
        if isinstance(value, dict):
            template = value.get("default")
        if not isinstance(template, str | None):
            raise self._wrong("chat_template", template, "a template's text", file)
        return template

    def _numbered(self, special: set[str | None]) -> Added:
        """Return the added tokens that have ids: those of added_tokens_decoder, else those of
        added_tokens.json.

        special: the texts of special tokens. They are needed for added_tokens.json, which has only
        texts and ids; added_tokens_decoder may have a flag "special" for each token, whose default
        is false.
        """
        key, decoder = "added_tokens_decoder", self._config.get("added_tokens_decoder")
        if self.has_added_tokens_decoder:
            if not isinstance(decoder, dict) or not all(
                re.fullmatch("[0-9]{1,9}", i) for i in decoder
            ):
                raise self._wrong(key, decoder, "an object whose keys are token ids")
            return [(self._id(key, int(i)), self._token(key, e, False)) for i, e in decoder.items()]
        file = "added_tokens.json"
        return [
            (self._id(text, i, file), self._token(text, text, text in special))
            for text, i in self._other(file).items()
            if text
        ]

    def _extra(self) -> list[AddedToken]:
        """Return the tokens under EXTRA_KEYS: additional special tokens, listed without ids. The
        value of a key is a list of tokens or, in transformers 5, an object {name: token}."""
        tokens = []
        for key in EXTRA_KEYS:
            value = (self._config | self._overrides).get(key) or []
            value = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(value, list):
                raise self._wrong(key, value, "a list of tokens")
            tokens += [self._token(key, entry, True) for entry in value if entry]
        return tokens

    def _text(self, key: str, value: Any) -> str:
        """Return the text of a token that JSON describes by a text, by an object with the text as
        "content", or by null (""). Raises ValueError for another value, and for half of a surrogate
        pair, which UTF-8 cannot encode. key: for the message."""
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str | None) or re.search("[\ud800-\udfff]", text or ""):
            raise self._wrong(key, value, "a token's text or null")
        return text or ""

    def _token(self, key: str, entry: Any, special: bool) -> AddedToken:
        """Return the AddedToken that JSON describes by a text, or by an object with text and FLAGS.

        entry: the text or the object. special: the flag of an entry without it. As in transformers,
        tokens that are not special are normalized by default. Raises ValueError for another value.
        key: for the message.
        """
        flags = {f: v for f, v in entry.items() if f in FLAGS} if isinstance(entry, dict) else {}
        text = self._text(key, entry)
        if not text or not all(isinstance(value, bool) for value in flags.values()):
            raise self._wrong(key, entry, "a token's text, or an object with text and flags")
        flags = {"special": special, **flags}
        return AddedToken(text, **{"normalized": not flags["special"], **flags})

    def _id(self, key: str, value: Any, file: str = "tokenizer_config.json") -> int:
        """Return `value` if it is a token id, an integer from 0 to MAX_IDS - 1. Raises ValueError
        if it is not. key, file: where the value stands, for the message."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_IDS:
            raise self._wrong(key, value, f"a token id from 0 to {MAX_IDS - 1}", file)
        return value

    def _other(self, file: str) -> dict[str, Any]:
        """Return the object in a JSON file, {} if the file does not exist. The config.json of a
        model that also reads images has some values of its language model in "text_config": they
        are added to the outer ones, which count first unless they are null."""
        config = read_config(self.directory / file)
        inner = config.get("text_config") if file == "config.json" else None
        outer = {key: value for key, value in config.items() if value is not None}
        return inner | outer if isinstance(inner, dict) else config

    def _wrong(
        self, key: str, value: Any, expected: str, file: str = "tokenizer_config.json"
    ) -> ValueError:
        """Return the error for a value of the wrong type, for the caller to raise. expected: the
        valid values, in words. The error names special_tokens_map.json in place of
        tokenizer_config.json if the former has the key, because its value then counts."""
        if key in self._overrides and file == "tokenizer_config.json":
            file = "special_tokens_map.json"
        shown = json.dumps(value)
        shown = shown if len(shown) < 60 else shown[:57] + "..."
        return ValueError(f'{self.directory / file}: "{key}" is {shown} and must be {expected}')


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file does not exist."""
    if not path.is_file():
        return {}
    refuse_lfs_pointer(path)
    return read_object(path)


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError if the file is a git-lfs pointer: a clone without git-lfs has these short
    text files in place of the large files."""
    with path.open("rb") as file:
        if file.read(len(LFS_HEADER)) == LFS_HEADER:
            raise ValueError(
                f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in its "
                "folder, or download the file again"
            )

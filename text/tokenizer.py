"""Tokenizer: text to token ids and back, with the checkpoint's BOS, EOS and chat template.

Start at load_tokenizer. A Backend (vocabulary.py) encodes text and gives the bytes of each id.
Decoding joins the bytes and reads them as UTF-8. TextStream is the only decoder, so text that is
printed token by token equals the text that decode returns.

The files of a checkpoint often contradict one another. The first valid answer counts:

| question | sources, in order |
|---|---|
| BOS id | bos_token, the vocabulary, generation_config.json, config.json |
| EOS ids | generation_config.json, config.json, eos_token, the vocabulary |
| does encode add BOS? | add_bos_token of tokenizer_config.json, the vocabulary |

The vocabulary is tokenizer.json (its post-processor), tokenizer.model or vocab.json. bos_token and
eos_token come from special_tokens_map.json, then from tokenizer_config.json; the former is ignored
if the latter has an added_tokens_decoder. This order is the order of transformers. There the
tokenizer determines BOS, because config.json may have a library's default values; a bos_token of
null, as Qwen has it, means that only the vocabulary may name a BOS. The generation config
determines EOS. An id is invalid if it is negative, if neither the tokenizer nor the model has it,
or if it is the id of <unk> or of an empty text.
"""

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from host.files import without_surrogates
from text import chat_template
from text.special_tokens import TokenizerConfig
from text.vocabulary import Backend, IdBackend, library_errors, open_backend


class TextStream:
    """Decodes token ids one at a time.

    An id may stand for a part of a character only. Its bytes wait until later ids complete the
    character; invalid bytes become U+FFFD. The ids of the prompt are decoded first, and their text
    is dropped, for two reasons: the space before the first word is removed from the beginning of a
    text but not from a continuation, and the first new id may complete a character of the prompt.
    """

    def __init__(self, backend: Backend, prompt_ids: Iterable[int] = ()):
        """prompt_ids: ids that come before the ids to decode; () at the beginning of a text."""
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = backend.strips_space
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> str:
        """Add an id and return the text that is complete now. It is empty for a special token, for
        an id outside the vocabulary, and while a character is incomplete."""
        data = self._backend.token_bytes(token)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def special_name(self, token: int) -> str:
        """Return the name of a special token, such as "</s>"; "" for an id that stands for text."""
        return "" if self._backend.token_bytes(token) else self._backend.id_to_token(token)

    def flush(self) -> str:
        """End the stream: return U+FFFD if the last ids left an incomplete character, else ""."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """Encodes and decodes text with the special tokens and the chat template of a checkpoint.

    bos_id, bos_token: the id and the text of BOS; None and "" if the checkpoint has no BOS.
    eos_ids: each of them ends a text. vocab_size: 1 + the largest id, that of special tokens
    included. chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: Backend,
        bos_id: int | None = None,
        eos_ids: tuple[int, ...] = (),
        names: dict[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
    ):
        """names: the texts of special tokens by key, such as "eos_token", for the chat template;
        that of "bos_token" is the attribute bos_token. add_bos: whether encode adds BOS; None: as
        the vocabulary asks (Backend.adds_bos)."""
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.vocab_size = backend.vocab_size
        self.chat_template = chat_template
        self._backend = backend
        self.adds_bos = bos_id is not None and (backend.adds_bos if add_bos is None else add_bos)
        self._names = {"bos_token": "", "eos_token": ""} | (names or {})
        self.bos_token = self._names["bos_token"]

    def encode(self, text: str, bos: bool = True, *, special: bool = False) -> list[int]:
        """Return the ids of a text, after BOS if bos is true and this tokenizer adds BOS.

        special: whether the names of special tokens in the text become their ids. By default they
        are plain characters, so that a document cannot forge the end of a turn; the output of a
        chat template needs special=True. No BOS is added if the ids begin with one. Half of a
        surrogate pair, which JSON strings and command-line arguments can hold, becomes U+FFFD.
        Raises ValueError if the tokenizer library fails.
        """
        with library_errors("the tokenizer failed on this text"):
            ids = self._backend.encode(without_surrogates(text), special)
        return [self.bos_id, *ids] if bos and self.adds_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens and ids outside the vocabulary."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with this text, such as "</s>", or None."""
        return self._backend.special_id(text)

    def id_to_text(self, token: int) -> str:
        """Return the text of one id, with U+FFFD for part of a character; for a special token
        return its name."""
        data = self._backend.token_bytes(token)
        return data.decode("utf-8", "replace") or self._backend.id_to_token(token)

    def stream(self, prompt_ids: Iterable[int] = ()) -> TextStream:
        """Return a decoder for the ids that follow prompt_ids."""
        return TextStream(self._backend, prompt_ids)

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Return the ids of a conversation, [{"role": "user", "content": "Hello"}, ...].

        add_generation_prompt, variables: see chat_text. BOS is present if the template writes it.
        As in transformers, the names of special tokens become ids in the messages, too: check
        untrusted messages before the call. Raises ValueError if the checkpoint has no template, or
        if the template fails or rejects the messages.
        """
        text = self.chat_text(messages, add_generation_prompt, **variables)
        return self.encode(text, bos=False, special=True)

    def chat_text(
        self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the text that the chat template makes of a conversation, before it is encoded.

        messages: [{"role": "user", "content": "Hello"}, ...]. Keys of a message whose
        value is None are dropped, as in transformers: templates ask whether a message has a key,
        and OpenAI's interface writes "tool_calls": null.

        add_generation_prompt: whether the text ends with the beginning of the model's answer.
        variables: further values that the template reads, such as tools=[...] and, for Qwen3 and
        SmolLM3, enable_thinking=False; JSON must be able to represent them. Raises ValueError if
        the checkpoint has no template, or if the template fails or rejects the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "no chat template: expected chat_template.jinja, or chat_template in "
                "tokenizer_config.json; give this model a plain prompt"
            )
        messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
        # Templates test "tools is none", which is false for an undefined variable.
        values = {"tools": None, "documents": None} | variables
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return chat_template.render(self.chat_template, self._names | values)


def first_difference(a: Tokenizer, b: Tokenizer) -> str | None:
    """Describe the first id that two tokenizers decode differently; return None if there is none.

    Called before speculative decoding: the draft model's ids become the model's, so each id must
    stand for the same bytes in both.
    """
    if a.vocab_size != b.vocab_size:
        return f"the tokenizers have {a.vocab_size} and {b.vocab_size} ids"
    for token in range(a.vocab_size):
        texts = a._backend.token_bytes(token), b._backend.token_bytes(token)
        if texts[0] != texts[1]:
            return (
                f"id {token} stands for {texts[0]!r} in one tokenizer and {texts[1]!r} in the other"
            )
    return None


def id_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer for a model without tokenizer files: it decodes ids to their numbers, and
    encode raises ValueError."""
    return Tokenizer(IdBackend(vocab_size))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint directory.

    Raises FileNotFoundError if the directory has no vocabulary, and ValueError naming the file that
    cannot be read.
    """
    config = TokenizerConfig(Path(directory))
    backend = open_backend(config.directory, config)
    bos, eos, own_eos = find_bos_and_eos(backend, config)
    # A template gets the texts of the ids that were found, "" if none was: the texts in the files
    # may be of ids that are not valid.
    names = config.names | {
        "bos_token": "".join(map(backend.id_to_token, bos[:1])),
        "eos_token": "".join(map(backend.id_to_token, own_eos[:1])),
    }
    template, add_bos = config.chat_template(), config.flag("add_bos_token")
    return Tokenizer(backend, next(iter(bos), None), eos, names, template, add_bos)


def find_bos_and_eos(
    backend: Backend, config: TokenizerConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return three tuples of ids: BOS, EOS, and the eos_token that chat templates write.

    The ids of a tuple come from its first source with a valid id, in the order of the table at the
    top of this file; () if no source has one. BOS and eos_token are the first id of their tuple;
    every id of EOS ends a text. eos_token may be no EOS: its first source is the tokenizer's
    eos_token, and that of EOS is generation_config.json.
    """
    own_eos = named_id(backend, config, "eos_token")
    # Two lists of lists: the ids in generation_config.json, then the ids in config.json.
    bos_ids, eos_ids = (
        [config.ids(file, key) for file in ("generation_config.json", "config.json")]
        for key in ("bos_token_id", "eos_token_id")
    )
    if config.names.get("bos_token") == "":  # it is null: see the top of this file
        bos_ids = []
    size = max(backend.vocab_size, config.model_vocab_size())
    bos = first_valid(
        backend, size, named_id(backend, config, "bos_token"), [backend.bos_id], *bos_ids
    )
    eos = first_valid(backend, size, *eos_ids, own_eos, backend.eos_ids)
    return bos, eos, first_valid(backend, size, own_eos, eos)


def named_id(backend: Backend, config: TokenizerConfig, name: str) -> list[int | None]:
    """Return [id] of the token whose text the config has under `name`, such as "eos_token"; [None]
    if there is none. The list is a source for first_valid."""
    return [backend.token_to_id(config.names.get(name, ""))]


def first_valid(backend: Backend, size: int, *sources: Iterable[int | None]) -> tuple[int, ...]:
    """Return the valid ids, without repetitions, of the first source that has a valid id; () if no
    source has one.

    An id is valid if it is in range(size), is not <unk>, and has a text. size: the number of ids of
    tokenizer or model, the larger one. An id from backend.vocab_size on needs no text: the model
    has it, and the tokenizer does not.
    """

    def is_valid(token: int | None) -> bool:
        if token is None or not 0 <= token < size:
            return False
        has_text = backend.id_to_token(token) != "" or token >= backend.vocab_size
        return has_text and not backend.is_unknown(token)

    valid_ids = (tuple(dict.fromkeys(filter(is_valid, source))) for source in sources)
    return next(filter(None, valid_ids), ())

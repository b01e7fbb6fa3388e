"""Text to token ids and back, with BOS, EOS and chat templates as the checkpoint's files say.

Start at load_tokenizer. A Backend (vocabulary.py) says which ids a text has and which bytes an id
stands for. Decoding is the stream of those bytes read as UTF-8: TextStream is the only decoder,
so what is printed token by token is what decode returns.

The files of one checkpoint often contradict one another. The first valid answer counts:

| question | in this order |
|---|---|
| BOS | bos_token, the vocabulary, generation_config.json, config.json |
| EOS | generation_config.json, config.json, eos_token, the vocabulary |
| whether BOS begins a text | add_bos_token of tokenizer_config.json, the vocabulary |

The vocabulary is tokenizer.json (its post-processor), tokenizer.model or vocab.json. bos_token and
eos_token are those of special_tokens_map.json, then of tokenizer_config.json; the former is not
read beside an added_tokens_decoder in the latter. That is what transformers does: how a text
begins is its tokenizer's affair, and config.json may hold a library's defaults; where a text ends
is generation's. An id is not valid that is negative, that neither tokenizer nor model has, or that
means <unk> or an empty text.
"""

import codecs
from collections.abc import Iterable
from pathlib import Path

from host.files import without_surrogates
from text import chat_template
from text.special_tokens import Declared
from text.vocabulary import Backend, IdBackend, library_errors, open_backend


class TextStream:
    """Ids in, printable text out; each id is looked at once.

    Half a character is held back until it is complete, or cannot become so and shows as U+FFFD.
    The prompt is pushed first, unprinted: only the first word of a text loses the space before
    it, a continuation never does, and it may complete a character that the prompt began.
    """

    def __init__(self, backend: Backend, prompt_ids: Iterable[int] = ()):
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = backend.strips_space
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this id makes printable, perhaps none."""
        data = self._backend.token_bytes(token)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def special(self, token: int) -> str:
        """The name of a special token, which has no text; of other ids nothing."""
        return "" if self._backend.token_bytes(token) else self._backend.text_of(token)

    def flush(self) -> str:
        """What is still held back, as U+FFFD: no further id will complete it."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """Text to ids and back, with the checkpoint's own special tokens and chat template.

    bos_id is None where there is none, and bos_token its text; any of eos_ids ends a text;
    vocab_size counts every id, special ones included; chat_template is Jinja source or None.
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
        """names: texts of special tokens, for the template; add_bos: None for the backend's."""
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.vocab_size = backend.vocab_size
        self.chat_template = chat_template
        self._backend = backend
        self._adds_bos = bos_id is not None and (backend.adds_bos if add_bos is None else add_bos)
        self._names = {"bos_token": "", "eos_token": ""} | (names or {})
        self.bos_token = self._names["bos_token"]

    def encode(self, text: str, bos: bool = True, *, special: bool = False) -> list[int]:
        """The ids of text, after BOS if this tokenizer begins its texts with one.

        Names of special tokens in text are plain characters, so that no document or user can
        forge the end of a turn; special=True reads them as ids, for what a chat template wrote.
        If the first of those is BOS already, no second one is put before it. Half a surrogate
        pair, as a JSON string or a shell's argument can hold, is no character and becomes U+FFFD.
        """
        with library_errors("the tokenizer failed on this text"):
            ids = self._backend.encode(without_surrogates(text), special)
        return [self.bos_id, *ids] if bos and self._adds_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids outside the vocabulary have none."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text is exactly this; such an id decodes to ""."""
        return self._backend.special_id(text)

    def spelled(self, token: int) -> str:
        """The text of one id, with U+FFFD for part of a character; a special token's name."""
        data = self._backend.token_bytes(token)
        return data.decode("utf-8", "replace") or self._backend.text_of(token)

    def stream(self, prompt_ids: Iterable[int] = ()) -> TextStream:
        """A decoder for the ids that follow prompt_ids."""
        return TextStream(self._backend, prompt_ids)

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation, [{"role": "user", "content": "Hello"}, ...].

        BOS is there if the template writes it, and never twice. Special tokens are parsed in the
        messages as well, as Hugging Face does: text from strangers needs a check before.

        Raises ValueError if there is no template, or it fails or refuses the messages.
        """
        text = self.chat_text(messages, add_generation_prompt)
        return self.encode(text, bos=False, special=True)

    def chat_text(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """What the template makes of a conversation; raises what apply_chat_template raises."""
        if self.chat_template is None:
            raise ValueError(
                "no chat template: expected chat_template.jinja, or chat_template in "
                "tokenizer_config.json; give this model a plain prompt"
            )
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        # tools: templates ask whether they are none, and undefined is not
        given |= {"tools": None, "documents": None}
        return chat_template.render(self.chat_template, self._names | given)


def first_difference(a: Tokenizer, b: Tokenizer) -> str | None:
    """Where two tokenizers first mean different texts by an id; None: nowhere."""
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
    """For a model without tokenizer files: ids print as numbers, and no text can be encoded."""
    return Tokenizer(IdBackend(vocab_size))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises FileNotFoundError if it holds none, ValueError naming a file that cannot be read.
    """
    declared = Declared(Path(directory))
    backend = open_backend(declared.directory, declared)
    own_eos = named_id(backend, declared, "eos_token")
    bos_ids, eos_ids = (
        [declared.ids(file, key) for file in ("generation_config.json", "config.json")]
        for key in ("bos_token_id", "eos_token_id")
    )
    size = declared.model_size()
    bos = first_valid(
        backend, size, named_id(backend, declared, "bos_token"), [backend.bos_id], *bos_ids
    )
    eos = first_valid(backend, size, *eos_ids, own_eos, backend.eos_ids)
    names = declared.names | {
        "bos_token": "".join(map(backend.text_of, bos[:1])),
        "eos_token": "".join(map(backend.text_of, first_valid(backend, size, own_eos, eos)[:1])),
    }
    template, add_bos = declared.chat_template(), declared.flag("add_bos_token")
    return Tokenizer(backend, next(iter(bos), None), eos, names, template, add_bos)


def named_id(backend: Backend, declared: Declared, name: str) -> list[int | None]:
    """The id of a named token, in a list."""
    return [backend.id_of(declared.names.get(name, ""))]


def first_valid(
    backend: Backend, model_size: int, *sources: Iterable[int | None]
) -> tuple[int, ...]:
    """The valid ids of the first source that has any, each once."""

    def is_valid(token: int | None) -> bool:
        if token is None or not 0 <= token < max(backend.vocab_size, model_size):
            return False
        is_named = backend.text_of(token) != "" or token >= backend.vocab_size
        return is_named and not backend.is_unknown(token)

    found = (tuple(dict.fromkeys(filter(is_valid, source))) for source in sources)
    return next(filter(None, found), ())

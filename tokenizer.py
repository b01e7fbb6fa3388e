"""Text to token ids and back, with BOS, EOS and chat templates as the checkpoint's files say.

Start at load_tokenizer. A Backend (vocabulary.py) says which ids a text has and which bytes an id
stands for. Decoding is the stream of those bytes read as UTF-8: TextStream is the only decoder,
so what is printed token by token is what decode returns. Chat templates are rendered by jinja2,
as Hugging Face's library renders them.
"""

import codecs
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vocabulary import Backend, IdBackend, one_line, open_backend

SETTINGS = ("chat_template", "bos_token", "eos_token")


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
        self, backend: Backend, bos_id: int | None, eos_ids: tuple[int, ...], settings: dict
    ):
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.vocab_size = backend.vocab_size
        self.chat_template = settings["chat_template"]
        self._backend = backend
        add_bos = settings.get("add_bos_token")
        self._adds_bos = bos_id is not None and (backend.adds_bos if add_bos is None else add_bos)
        self.bos_token = settings["bos_token"]
        self._names = {key: settings[key] for key in ("bos_token", "eos_token")}

    def encode(self, text: str, bos: bool = True, *, special: bool = False) -> list[int]:
        """The ids of text, after BOS if this tokenizer begins its texts with one.

        Names of special tokens in text are plain characters, so that no document or user can
        forge the end of a turn; special=True reads them as ids, for what a chat template wrote.
        If the first of those is BOS already, no second one is put before it.
        """
        ids = self._backend.encode(text, special)
        return [self.bos_id, *ids] if bos and self._adds_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids outside the vocabulary have none."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

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
        try:  # tools: templates ask whether they are none, and undefined is not
            template = _jinja().from_string(self.chat_template)
            return template.render(**given, **self._names, tools=None, documents=None)
        except Exception as err:  # a template is a program: it can fail in any way
            raise ValueError(f"the chat template failed: {one_line(err)}") from err


def difference(a: Tokenizer, b: Tokenizer) -> str | None:
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
    return Tokenizer(IdBackend(vocab_size), None, (), dict.fromkeys(SETTINGS))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises FileNotFoundError if it holds none, ValueError naming a file that cannot be read.
    """
    directory = Path(directory)
    backend = open_backend(directory)
    settings = _read_json(directory / "special_tokens_map.json")
    settings |= _read_json(directory / "tokenizer_config.json")
    bos_text, eos_text = settings.get("bos_token"), settings.get("eos_token")
    config = _read_json(directory / "config.json")
    generation = _read_json(directory / "generation_config.json")
    bos, eos = "bos_token_id", "eos_token_id"
    # How a text begins is the tokenizer's affair (config.json may hold a library's defaults);
    # where it ends, generation's.
    bos_ids = _ids(backend, bos_text, generation.get(bos), config.get(bos), backend.bos_id)
    eos_ids = _ids(backend, generation.get(eos), config.get(eos), eos_text, backend.eos_ids)
    settings["bos_token"] = "".join(map(backend.text_of, bos_ids[:1]))
    settings["eos_token"] = "".join(map(backend.text_of, _ids(backend, eos_text, eos_ids)[:1]))
    settings["chat_template"] = _chat_template(directory, settings)
    return Tokenizer(backend, next(iter(bos_ids), None), eos_ids, settings)


def _ids(backend: Backend, *sources) -> tuple[int, ...]:
    """The ids in the first source with any: an id, a token's text, a dict around it, or a list."""
    for source in sources:
        entries = source if isinstance(source, list | tuple) else [source]
        entries = (e.get("content") if isinstance(e, dict) else e for e in entries)
        found = (backend.id_of(e) if isinstance(e, str) else e for e in entries)
        if ids := tuple(dict.fromkeys(i for i in found if i is not None and i >= 0)):
            return ids
    return ()


def _chat_template(directory: Path, settings: dict) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name, the others for tools or retrieval
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _jinja() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face's templates expect, sandboxed as they come from afar."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as err:
        raise ValueError(f"{path}: not a JSON object ({one_line(err)})") from err

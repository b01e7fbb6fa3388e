"""Renders chat templates as transformers does, in a separate process with limits.

Start at render. A template is a program that comes with a checkpoint. The sandbox of jinja2 keeps
it from the system; limits on CPU time, memory and output keep it from running for ever. One process
serves all templates; a template that exceeds a limit ends the process, and the next one starts
another. This file is also the program of that process: see serve.
"""

import contextlib
import json
import math
import resource
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

CPU_SECONDS = 3  # for one template; most take milliseconds
REPLY_TIMEOUT_SECONDS = 60.0  # wall-clock time, on a busy machine
MEMORY_BYTES = 1 << 29  # address space of the process; Python with jinja2 takes a fifth
MAX_CHARACTERS = 1 << 20  # of output, plus 8 for each byte of the request


class RenderProcess:
    """The process that renders templates, started at the first request, and its socket."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: str) -> dict[str, str]:
        """Send a line of JSON and return the reply. Raises ValueError if a limit is exceeded."""
        with self._lock:
            if self._process is None:
                self._start()
            line = b""
            try:
                self._socket.sendall(request.encode() + b"\n")
                line = self._replies.readline()
            except OSError:  # the process has ended, or does not answer in time
                pass
            finally:  # after Ctrl-C, too: a late reply must not answer the next request
                if not line.endswith(b"\n"):  # no reply, or a part of one
                    self._end()
        if not line.endswith(b"\n"):
            raise ValueError(
                "the chat template failed: it took too long, or more than "
                f"{MEMORY_BYTES >> 20} MiB of memory"
            )
        return json.loads(line)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(REPLY_TIMEOUT_SECONDS)
        self._replies = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # keeps Ctrl-C of the terminal away from it
            )

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process = None
        self._replies.close()
        self._socket.close()


RENDERER = RenderProcess()


def render(template: str, given: dict[str, Any], cpu_seconds: int = CPU_SECONDS) -> str:
    """Return the text that a template renders from values that JSON can represent.

    Raises ValueError if the template fails, rejects the values or exceeds a limit.
    """
    try:
        request = json.dumps({"template": template, "given": given, "cpu_seconds": cpu_seconds})
    except (TypeError, ValueError, RecursionError) as err:
        raise ValueError(f"the messages cannot be written as JSON ({err})") from err
    reply = RENDERER.ask(request)
    if "error" in reply:
        raise ValueError(f"the chat template failed: {reply['error']}")
    return reply["text"]


def check_messages(messages: Any) -> None:
    """Raise ValueError unless the messages are [{"role": "user", "content": "Hello"}, ...]."""
    form = 'an object {"role": "user", "content": "a text"}'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a conversation must be a text or a list of messages, each {form}")
    for n, message in enumerate(messages, 1):
        which = f"message {n} of {len(messages)}"
        if not isinstance(message, dict):
            raise ValueError(f"{which} is a {type(message).__name__} and must be {form}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = type(message[key]).__name__ if key in message else "missing"
                raise ValueError(f'{which}: its "{key}" is {kind} and must be a text')


def serve() -> None:
    """Answer requests, one line of JSON each, from stdin until its end."""
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            used = math.ceil(time.process_time())
            limit(resource.RLIMIT_CPU, used + request.pop("cpu_seconds"))
            reply = {"text": rendered(**request, max_characters=MAX_CHARACTERS + 8 * len(line))}
        except MemoryError:
            reply = {"error": f"it took more than {MEMORY_BYTES >> 20} MiB of memory"}
        except RecursionError:
            reply = {"error": "it is nested too deeply"}
        except Exception as err:  # a template can raise any error
            reply = {"error": " ".join(str(err).split())[:500] or type(err).__name__}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def limit(kind: int, value: int) -> None:
    """Set the soft limit of a resource of this process; the hard limit stays."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
        resource.setrlimit(kind, (value, hard))


def rendered(template: str, given: dict[str, Any], max_characters: int) -> str:
    """Render a template; ValueError if its output exceeds max_characters."""
    pieces, length = [], 0
    for piece in compiled(template).generate(given):
        length += len(piece)
        if length > max_characters:
            raise ValueError(f"it printed more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(8)
def compiled(template: str) -> Any:
    """Compile a template in the environment that transformers gives to its templates."""
    import jinja2  # here, because only the render process needs it
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the model's answers for training; its content is rendered."""

        tags = {"generation"}

        def parse(self, parser):
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=lineno)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env.from_string(template)


def raise_exception(message: str) -> None:
    """A template calls this to reject the messages."""
    import jinja2

    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The filter of jinja2 escapes HTML; this one does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


if __name__ == "__main__":
    serve()

"""Renders chat templates as transformers does, in a separate process with limits.

Start at render. A template is a program that comes with a checkpoint. jinja2's sandbox denies it
access to files and processes; limits on CPU time, memory and output end a template that would run
for ever. One process, the render process, serves all templates. It ends when a template exceeds a
limit, and the next call of render starts it again. This file is also its program: see serve.
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

CPU_SECONDS = 3  # limit for one template; most need milliseconds
REPLY_TIMEOUT_SECONDS = 60.0  # limit on wall-clock time, long enough for a busy machine
MEMORY_BYTES = 1 << 29  # address space of the render process; Python with jinja2 uses a fifth
MAX_CHARACTERS = 1 << 20  # of the output; each byte of the request allows 8 characters more


class RenderProcess:
    """The render process, started at the first request, and the socket to it. A lock lets only one
    thread at a time send a request."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: str) -> dict[str, str]:
        """Send a request to the render process, and return its reply: {"text": the output} or
        {"error": a message}. request: one line of JSON, the arguments of `render` by name.

        Raises ValueError if no complete reply comes, because the template exceeds a limit. The
        process is then ended, and the next request starts another.
        """
        with self._lock:
            if self._process is None:
                self._start()
            line = b""
            try:
                self._socket.sendall(request.encode() + b"\n")
                line = self._replies.readline()
            except OSError:  # the process has ended, or did not reply in time
                pass
            finally:  # also after Ctrl-C: a late reply must not answer the next request
                if not line.endswith(b"\n"):  # no reply, or only its beginning
                    self._end()
        if not line.endswith(b"\n"):
            raise ValueError(
                "the chat template failed: it took too long, or more than "
                f"{MEMORY_BYTES >> 20} MiB of memory"
            )
        return json.loads(line)

    def _start(self) -> None:
        """Start the render process: this file as a program, with a socket as its stdin and
        stdout."""
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(REPLY_TIMEOUT_SECONDS)
        self._replies = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that the terminal's Ctrl-C does not reach the process
            )

    def _end(self) -> None:
        """Kill the render process, and close the socket. The next request starts another
        process."""
        self._process.kill()
        self._process.wait()
        self._process = None
        self._replies.close()
        self._socket.close()


RENDERER = RenderProcess()


def render(template: str, variables: dict[str, Any], cpu_seconds: int = CPU_SECONDS) -> str:
    """Return the text that a chat template renders from its variables.

    template: Jinja source. variables: by name, with values that JSON can represent. cpu_seconds:
    limit on the CPU time of this call, whole seconds. Raises ValueError if JSON cannot represent
    the variables, or if the template fails, rejects them, or exceeds a limit.
    """
    request = {"template": template, "variables": variables, "cpu_seconds": cpu_seconds}
    try:
        line = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as err:
        raise ValueError(f"the messages cannot be written as JSON ({err})") from err
    reply = RENDERER.ask(line)
    if "error" in reply:
        raise ValueError(f"the chat template failed: {reply['error']}")
    return reply["text"]


def check_messages(messages: Any) -> None:
    """Raise ValueError, naming what is wrong, unless `messages` is a conversation: a list, not
    empty, of objects {"role": "user", "content": "Hello"} with texts."""
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
    """Answer requests, one line of JSON each, until the end of stdin: the program of the render
    process. The reply is a line of JSON with "text", or with the message of an "error".

    Memory is limited for the whole process. CPU time is limited for each request: the kernel counts
    it from the start of the process, so each request sets a later limit. The kernel kills the
    process at this limit, and RenderProcess.ask then gets no reply.
    """
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            used_seconds = math.ceil(time.process_time())
            limit(resource.RLIMIT_CPU, used_seconds + request.pop("cpu_seconds"))
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
    """Set the soft limit of a resource of this process. kind: such as resource.RLIMIT_CPU. value:
    in the unit of this kind (seconds, bytes). The hard limit does not change, and is the upper
    bound. On a system without this kind nothing is limited."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
        resource.setrlimit(kind, (value, hard))


def rendered(template: str, variables: dict[str, Any], max_characters: int) -> str:
    """Return the output of a template; called in the render process by `serve`. Raises ValueError
    if the output has more than max_characters, and jinja2's errors."""
    pieces, length = [], 0
    for piece in compiled(template).generate(variables):
        length += len(piece)
        if length > max_characters:
            raise ValueError(f"it printed more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(8)
def compiled(template: str) -> Any:
    """Return the jinja2.Template of a template's source, in the environment that transformers gives
    to chat templates: the same settings, functions, filter tojson and tag {% generation %}. Called
    in the render process. The last 8 templates are kept, because a chat renders the same one in
    each turn."""
    import jinja2  # here, because only the render process needs it
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %}, which marks the model's answers for training. Here its content
        is only rendered."""

        tags = {"generation"}

        def parse(self, parser):
            """Return the syntax tree of the content up to {% endgeneration %}."""
            lineno = next(parser.stream).lineno  # skips the tag's name
            # drop_needle: also skip the end tag. A Scope keeps variables that are set in it.
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
    """Raise jinja2's TemplateError: templates call this function to reject messages."""
    import jinja2

    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return a value as JSON: the filter tojson of templates. Jinja2's own filter would escape
    HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


if __name__ == "__main__":
    serve()

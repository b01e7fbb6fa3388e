"""Chat templates rendered as Hugging Face's library renders them, in a process with limits.

Start at render. A template is a program from whoever made the checkpoint: jinja2's sandbox keeps
it from the system, and limits of the process that runs it keep it from looping or filling memory
for ever. That process starts with the first template and serves all that follow; one that exceeds
a limit ends with its template alone. This file is that process's program, too.
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

SECONDS = 3  # of computing, for one template; a usual one takes milliseconds
COLLECTIVE_TIMEOUT = 60.0  # seconds of waiting, for a machine that is busy with other things
MEMORY = 1 << 29  # bytes of address space of the process: Python with jinja2 takes a fifth
OUTPUT = 1 << 20  # characters of output, beside 8 for each character of the request


class Worker:
    """The process that renders templates, started when it is asked, and the socket to it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: str) -> dict[str, str]:
        """The reply to a line of JSON. Raises ValueError if the process exceeds a limit."""
        with self._lock:
            if self._process is None:
                self._start()
            line = b""
            try:
                self._socket.sendall(request.encode() + b"\n")
                line = self._replies.readline()
            except OSError:  # it has ended, or does not answer in time
                pass
            finally:  # Ctrl-C, too, must leave no process with an answer under way
                if not line.endswith(b"\n"):  # it may have ended within its reply
                    self._end()
        if not line.endswith(b"\n"):
            raise ValueError(
                "the chat template failed: it took too long, or more than "
                f"{MEMORY >> 20} MiB of memory"
            )
        return json.loads(line)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(COLLECTIVE_TIMEOUT)
        self._replies = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is not meant for it
            )

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process = None
        self._replies.close()
        self._socket.close()


WORKER = Worker()


def render(template: str, given: dict[str, Any], seconds: int = SECONDS) -> str:
    """What a template makes of the values given, which JSON can hold.

    Raises ValueError if it fails, refuses the values or exceeds a limit.
    """
    try:
        request = json.dumps({"template": template, "given": given, "seconds": seconds})
    except (TypeError, ValueError, RecursionError) as err:
        raise ValueError(f"the messages cannot be written as JSON ({err})") from err
    reply = WORKER.ask(request)
    if "error" in reply:
        raise ValueError(f"the chat template failed: {reply['error']}")
    return reply["text"]


def check_messages(messages: Any) -> None:
    """Raises ValueError unless these are [{"role": "user", "content": "Hello"}, ...]."""
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
    """Answer requests on stdin, a line of JSON each, until its end."""
    lower(resource.RLIMIT_AS, MEMORY)
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            spent = math.ceil(time.process_time())
            lower(resource.RLIMIT_CPU, spent + request.pop("seconds"))
            reply = {"text": rendered(**request, most=OUTPUT + 8 * len(line))}
        except MemoryError:
            reply = {"error": f"it took more than {MEMORY >> 20} MiB of memory"}
        except RecursionError:
            reply = {"error": "it is nested too deeply"}
        except Exception as err:  # a template is a program: it can fail in any way
            reply = {"error": " ".join(str(err).split())[:500] or type(err).__name__}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def lower(kind: int, value: int) -> None:
    """Set this process's own limit; the system's stays where it is."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
        resource.setrlimit(kind, (value, hard))


def rendered(template: str, given: dict[str, Any], most: int) -> str:
    pieces, length = [], 0
    for piece in compiled(template).generate(given):
        length += len(piece)
        if length > most:
            raise ValueError(f"it printed more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(8)
def compiled(template: str) -> Any:
    """The template in the environment that Hugging Face's templates expect."""
    import jinja2  # here, for the process that asks has no need of it
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model said, for training; its content is printed."""

        tags = {"generation"}

        def parse(self, parser):
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=lineno)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env.from_string(template)


if __name__ == "__main__":
    serve()

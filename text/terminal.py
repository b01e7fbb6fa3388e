"""What a person types: messages with line editing and history, pastes of many lines, Ctrl-C.

Start at Messages. Editing, history and bracketed paste are readline's; each line of a pipe is a
message. Nothing here imports torch.
"""

import contextlib
import os
import select
import sys
import termios
from collections.abc import Callable, Iterator

CTRL_C = b"\x03"
PASTE_SECONDS = 0.05  # the lines of a paste follow one another faster


class Messages:
    """Messages from stdin. Raises ValueError where it is closed.

    launched: torchrun started this process, and at a SIGINT it ends all processes. So during a
    chat the terminal sends Ctrl-C as the byte 0x03 in place of that signal, and `stoppable` polls
    for it.
    """

    def __init__(self, launched: bool = False):
        if sys.stdin is None or sys.stdin.closed:
            raise ValueError("a chat reads its messages from stdin, which is closed")
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 do not end the chat
        self._is_terminal = sys.stdin.isatty()
        self.keeps_ctrl_c = launched and self._is_terminal
        self._knows_pastes = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """For the time of a chat; the terminal is as before afterwards."""
        if self._is_terminal:
            self._knows_pastes = use_readline()
        with changed_terminal() if self.keeps_ctrl_c else contextlib.nullcontext():
            yield

    def read(self) -> str | None:
        """The next message that says something; None at the end of the input."""
        text = ""
        while not text.strip():
            try:
                text = self._input()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
        return text

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[Callable[[], bool]]:
        """During an answer: a function that tells whether Ctrl-C came as a byte. It is always false
        where Ctrl-C raises KeyboardInterrupt."""
        if not self.keeps_ctrl_c:
            yield lambda: False
            return
        with changed_terminal(termios.ICANON | termios.ECHO):
            yield ctrl_c_pressed

    def _input(self) -> str:
        lines = [input("> " if self._is_terminal else "")]
        if self._is_terminal and not self._knows_pastes:
            with contextlib.suppress(EOFError):  # the lines before the end are a message, too
                while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
                    lines.append(input())
        return "\n".join(line.removesuffix("\r") for line in lines)


def use_readline() -> bool:
    """Let `input` edit lines; whether it takes a paste of many lines as one."""
    try:
        import readline  # for `input`: to be imported is enough
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-m"')  # as a character: drop the line
    return sys.stdout.isatty()  # else `input` does without readline


@contextlib.contextmanager
def changed_terminal(without: int = 0) -> Iterator[None]:
    """A terminal in which Ctrl-C is a character, without these local modes."""
    terminal = sys.stdin.fileno()
    before, changed = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    changed[3] &= ~without
    changed[6][termios.VINTR] = bytes([os.fpathconf(terminal, "PC_VDISABLE")])
    termios.tcsetattr(terminal, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def ctrl_c_pressed() -> bool:
    """Whether the key is among those pressed since the last call; the others are forgotten."""
    terminal = sys.stdin.fileno()
    return bool(select.select([terminal], [], [], 0)[0]) and CTRL_C in os.read(terminal, 4096)

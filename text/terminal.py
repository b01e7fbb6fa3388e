"""Messages from the keyboard: line editing, history, pastes of several lines, Ctrl-C.

Start at Messages. readline edits lines and recognizes pastes. From a pipe each line is a message.
Nothing here imports torch.
"""

import contextlib
import os
import select
import sys
import termios
from collections.abc import Callable, Iterator

CTRL_C = b"\x03"
PASTE_SECONDS = 0.05  # a line that follows within this time belongs to the same paste


class Messages:
    """Reads a user's messages from stdin. Raises ValueError if stdin is closed.

    under_torchrun: whether torchrun started this process. torchrun ends all processes at a SIGINT,
    so during a chat the terminal is set to send Ctrl-C as the byte 0x03 and no signal, and
    `stoppable` polls stdin for this byte. polls_ctrl_c: whether this is so.
    """

    def __init__(self, under_torchrun: bool = False):
        """Check stdin. The terminal changes only within `opened`."""
        if sys.stdin is None or sys.stdin.closed:
            raise ValueError("a chat reads its messages from stdin, which is closed")
        if hasattr(sys.stdin, "reconfigure"):  # not if a program has replaced stdin
            sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 do not end the chat
        self._is_terminal = sys.stdin.isatty()
        self.polls_ctrl_c = under_torchrun and self._is_terminal
        self._has_bracketed_paste = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Prepare the terminal for a chat: line editing and, under torchrun, Ctrl-C as a byte.
        Restore it at the end of the block. All other methods are called in this block."""
        if self._is_terminal:
            self._has_bracketed_paste = use_readline()
        with changed_terminal() if self.polls_ctrl_c else contextlib.nullcontext():
            yield

    def read(self) -> str | None:
        """Return the next message that is not blank, or None at the end of the input (Ctrl-D).

        Ctrl-C at the prompt of a terminal discards the line, and the user is asked again. If stdin
        is a pipe, Ctrl-C raises KeyboardInterrupt.
        """
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
        """Yield a function, to be called while an answer is generated, that returns whether the
        user has pressed Ctrl-C since its last call.

        If Ctrl-C arrives as a byte (polls_ctrl_c), the function reads and discards the keyboard's
        input. Otherwise it returns False, because Ctrl-C raises KeyboardInterrupt.
        """
        if not self.polls_ctrl_c:
            yield lambda: False
            return
        with changed_terminal(without=termios.ICANON | termios.ECHO):
            yield ctrl_c_pressed

    def _input(self) -> str:
        """Return a line of input or, from a terminal, a paste of several lines as one text.

        Without bracketed paste, lines belong to one paste if they arrive within PASTE_SECONDS.
        """
        lines = [input("> " if self._is_terminal else "")]
        if self._is_terminal and not self._has_bracketed_paste:
            with contextlib.suppress(EOFError):  # the lines before Ctrl-D are a message
                while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
                    lines.append(input())
        return "\n".join(line.removesuffix("\r") for line in lines)


def use_readline() -> bool:
    """Let Python's `input` edit lines with readline. Return whether `input` now returns a paste of
    several lines as one text (bracketed paste), which needs GNU readline and a terminal as stdout.
    """
    try:
        import readline  # `input` uses it once it is imported
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):  # macOS's library, without bracketed paste
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    # Ctrl-C as a character: go to the line's end, delete all before it, Enter. `read` asks again.
    readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-m"')
    return sys.stdout.isatty()  # without a terminal `input` ignores readline


@contextlib.contextmanager
def changed_terminal(without: int = 0) -> Iterator[None]:
    """Let the terminal send Ctrl-C as a byte instead of a signal, in this block.

    without: local flags of termios that are cleared in the block, too; 0: none. With ICANON input
    waits for the end of a line; with ECHO typed characters are shown.
    """
    terminal = sys.stdin.fileno()
    before, changed = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    changed[3] &= ~without  # [3]: the local flags; [6]: the characters with a meaning
    # VINTR is the character that sends SIGINT; with PC_VDISABLE no character does.
    changed[6][termios.VINTR] = bytes([os.fpathconf(terminal, "PC_VDISABLE")])
    termios.tcsetattr(terminal, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def ctrl_c_pressed() -> bool:
    """Return whether Ctrl-C was pressed since the last call, without waiting. Other keys are
    discarded, at most 4096 bytes per call. The terminal must send Ctrl-C as a byte, without waiting
    for the end of a line: see changed_terminal."""
    terminal = sys.stdin.fileno()
    return bool(select.select([terminal], [], [], 0)[0]) and CTRL_C in os.read(terminal, 4096)

"""How the commands begin, before torch is imported, and how they end: an error is one line.

Ranks are processes that torchrun starts to run one model together (ranks.py).

Start at begin and exit_code. generate.py, quantize.py, flash.py and eval.py call both. Nothing here
imports torch at the beginning, because its import takes seconds.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

# Errors that the user or the machine causes: reported in one line, without a traceback.
MISTAKES = OSError, ValueError, MemoryError, ImportError
# Parts of the messages of torch's RuntimeErrors that the user or the machine causes; the last names
# torch's reader of .pth files, which fails for a damaged file.
TORCH_MISTAKES = "out of memory", "not enough memory", "can't allocate memory", "inline_container"


def begin(parse_args: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """Prepare the process for a command, and return its options.

    Called before torch is imported. Opens closed standard streams, and lets Ctrl-C during the
    imports that follow end the process without a traceback. With --quiet there are no progress
    bars. parse_args: parses the arguments of the process.
    """
    open_streams()
    sys.excepthook = end_of_imports
    args = parse_args()
    if args.quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    return args


def open_streams() -> None:
    """Open /dev/null in place of each of the three standard streams that is closed.

    Otherwise a file that is opened later would get the number of the stream, and messages of
    libraries would be written into the file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `number`
            os.set_inheritable(number, True)  # child processes, such as a compiler, need the stream
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 -- for good


def end_of_imports(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print "stopped" for Ctrl-C, one line for a missing package, and a traceback for other errors.
    It becomes sys.excepthook, which Python calls for an exception that nothing catches: one while
    a command imports its modules, or a fault of this program, which exit_code raises again."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError):
        remedy = "run ./scripts/setup.sh, then source .venv/bin/activate"
        print(f"{os.path.basename(sys.argv[0])}: {error}: {remedy}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def exit_code(script: str, work: Callable[[], Any], stopped: str = "stopped") -> int:
    """Run a command and return its exit code; an error of the user is one line on stderr.

    0: success. 2: an error of the user or the machine (is_mistake). 3: another rank has ended. 130:
    Ctrl-C. 141: stdout was closed, as by `| head`. Other exceptions are faults of this program, and
    are raised again. script: the command's name, which begins the line. work: runs the command.
    stopped: the line for Ctrl-C.
    """
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed stdout. Python must not flush it again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(BrokenPipeError):  # stderr may be the same pipe
            print(f"{script}: stopped, as the output was closed", file=sys.stderr)
        return 141
    except Exception as error:
        import ranks  # imported here, because it imports torch

        if is_mistake(error):
            ranks.log_failure(error_line(script, error))
            return 2
        ranks.restore_stderr()  # so that the traceback, or the line below, is seen
        if not ranks.wait_if_peer_failed(error):
            raise
        print(f"{script}: another rank has ended, and its connection is closed", file=sys.stderr)
        return 3
    return 0


def error_line(script: str, error: Exception) -> str:
    """Returns an error as one line that begins with the command's name. Of an OSError about a file
    the line has the file's name and the reason, without the error's number."""
    of_file = isinstance(error, OSError) and error.filename is not None and error.strerror
    text = f"{error.filename}: {error.strerror}" if of_file else str(error)
    return f"{script}: {' '.join(text.split()) or type(error).__name__}"


def is_mistake(error: Exception) -> bool:
    """Returns whether the user or the machine caused the error, not a fault of this program: it is
    of a type of MISTAKES, or a RuntimeError whose message has a text of TORCH_MISTAKES."""
    if isinstance(error, RuntimeError) and any(part in str(error) for part in TORCH_MISTAKES):
        return True
    return isinstance(error, MISTAKES)

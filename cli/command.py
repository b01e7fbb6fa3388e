"""Begins and ends a command: parses options before torch is imported, reports an error in one line.

Start at begin and exit_code. generate.py, quantize.py, flash.py and eval.py call both.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from host.log import LOGGER

MISTAKES = OSError, ValueError, MemoryError, ImportError  # caused by the user or the machine
# Parts of the messages of torch's RuntimeErrors that the user or the machine causes.
TORCH_MISTAKES = "out of memory", "not enough memory", "can't allocate memory", "inline_container"
LOGGER.setLevel(logging.INFO)


def begin(parse_args: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """Open the standard streams, and parse the options of a command.

    Ctrl-C then ends the imports that follow without a traceback.
    """
    open_streams()
    sys.excepthook = end_of_imports
    args = parse_args()
    if args.quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    return args


def open_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    A file that is opened later would get the stream's number, and libraries would print into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)  # child processes, such as a compiler, need it, too
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 -- for good


def end_of_imports(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Handle an uncaught exception (sys.excepthook): Ctrl-C prints one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def exit_code(script: str, work: Callable[[], Any], stopped: str = "stopped") -> int:
    """Run a command and return its exit code; a failure is one line on stderr.

    0: success. 2: a mistake (is_mistake). 3: another rank has ended. 130: Ctrl-C. 141: the reader
    of the output has closed it. Other exceptions are errors of the program, and are raised again.
    """
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would flush the closed stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(BrokenPipeError):  # stderr may be the same pipe
            print(f"{script}: stopped, as the output was closed", file=sys.stderr)
        return 141
    except Exception as error:
        import ranks  # here, as it imports torch

        if is_mistake(error):
            ranks.log_failure(f"{script}: {' '.join(str(error).split()) or type(error).__name__}")
            return 2
        ranks.restore_stderr()
        if not ranks.wait_if_peer_failed(error):
            raise
        print(f"{script}: another rank has ended, and its connection is closed", file=sys.stderr)
        return 3
    return 0


def is_mistake(error: Exception) -> bool:
    """Returns whether the user or the machine, and not the program, has caused an error."""
    known = isinstance(error, RuntimeError) and any(t in str(error) for t in TORCH_MISTAKES)
    return known or isinstance(error, MISTAKES)

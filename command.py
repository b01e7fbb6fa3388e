"""What the commands share: a user's mistake is one line, and options may need one another.

Start at exit_code, which generate.py, quantize.py and eval.py end in.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ranks import heard, lost_another, speak

MISTAKES = OSError, ValueError, MemoryError, ImportError, torch.OutOfMemoryError


def exit_code(script: str, work: Callable[[], Any], stopped: str = "stopped") -> int:
    """0, where the work is done; else what hindered it is one line on stderr: 130 for Ctrl-C."""
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        log(f"\n{stopped}")
        return 130
    except BrokenPipeError:
        # Nobody reads stdout any more; Python must not try to flush it again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log(f"{script}: stopped, as the output was closed")
        return 141
    except MISTAKES as error:
        speak(f"{script}: {' '.join(str(error).split())}")
        return 2
    except Exception as error:
        heard()
        if not lost_another(error):
            raise
        log(f"{script}: another rank has ended, and its connection is closed")
        return 3
    return 0


def check_needs(
    parser: argparse.ArgumentParser, args: argparse.Namespace, needs: Iterable[tuple[str, str]]
) -> None:
    """An error of the parser's for an option that is given without the one that it needs."""
    for given, needed in needs:
        if getattr(args, given) and not getattr(args, needed):
            parser.error(f"--{given} needs --{needed}")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Command-line arguments: a parser whose errors are one line, and converters of arguments.

Start at Parser. The functions convert the text of an argument to its value; they are passed to
argparse as type=, and raise ArgumentTypeError or ValueError for a wrong text. Nothing here imports
torch, which takes seconds: a wrong option is reported without delay.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from options.settings import MAX_DRAFT_TOKENS
from text.generation_config import MAX_LOGIT_BIAS

# How long other ranks let rank 0 report an error: time for its start on a busy machine. A rank 0
# that starts later than this prints the line a second time.
RANK0_SECONDS = 4.0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line, which propose a similar option for an unknown one.

    Options may be written with hyphens in place of underscores.
    """

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse arguments; args=None: those of the process. An unknown argument ends the process,
        see `error`. namespace: as in argparse."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return parsed

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Replace hyphens in the names of options by underscores, then parse as argparse does.

        Returns the known options and a list of the unknown arguments. parse_args calls it.
        """
        arguments = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([self._underscored(arg) for arg in arguments], namespace)

    def error(self, message: str) -> None:
        """Print the message in one line on stderr, and end the process with exit code 2.

        Under torchrun all ranks usually fail here. Ranks other than 0 first wait RANK0_SECONDS, so
        that only rank 0 prints the line: torchrun ends them once rank 0 has failed. A rank that is
        not ended then prints the line itself.
        """
        if os.environ.get("RANK", "0") not in ("0", ""):
            time.sleep(RANK0_SECONDS)
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")

    def _underscored(self, arg: str) -> str:
        """Replace hyphens in an option's name: --max-new-tokens=5 -> --max_new_tokens=5.

        Other arguments are returned unchanged. A text with blanks that begins with -- is one of
        them: argparse, too, takes it for a value. An option that was declared with hyphens is
        another.
        """
        name, equals, value = arg.partition("=")
        if not re.fullmatch(r"--[\w-]+", name) or name in self._option_string_actions:
            return arg
        return f"--{name[2:].replace('-', '_')}{equals}{value}"

    def _unknown(self, arg: str) -> str:
        """Returns the error message for an unknown argument, with the most similar option, if one
        is similar enough (0.6 is difflib's default)."""
        if not arg.startswith("-"):
            return f"unrecognized argument '{arg}': a text with blanks needs quotes"
        name = arg.partition("=")[0]
        similar = difflib.get_close_matches(name, self._option_string_actions, 1, 0.6)
        return f"unrecognized option {name}" + (f", did you mean {similar[0]}?" if similar else "")


def whole(minimum: int, why: str = "") -> Callable[[str], int]:
    """Returns a converter of whole numbers that are `minimum` or more.

    why: the end of the error message for a smaller number. For a text that is no number, int()
    raises ValueError, and argparse makes the message.
    """

    def whole_number(text: str) -> int:  # argparse names this function: "invalid whole_number"
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is not at least {minimum}{why}")
        return value

    return whole_number


positive, count = whole(1), whole(0)
text_length = whole(2, ": BOS and a token")  # tokens of a calibration text


def count_or_auto(text: str) -> int | str:
    """Convert --speculate_k: "auto", which stays a text, or a number from 1 to MAX_DRAFT_TOKENS."""
    # A negative number is a number here, so that `positive` says what is wrong with it.
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number")
    if text != "auto" and positive(text) > MAX_DRAFT_TOKENS:
        raise argparse.ArgumentTypeError(
            f"{text} is more than {MAX_DRAFT_TOKENS}: give a smaller number, or auto"
        )
    return text if text == "auto" else int(text)


def rows_or_auto(text: str) -> int | None:
    """Convert eval.py's --batch_size: a number of rows, 1 or more, or "auto" to None, for which the
    scorer chooses as many rows as are fast."""
    return None if text == "auto" else positive(text)


def share(text: str) -> float:
    """Convert a share: above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:  # NaN is refused, too
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def percentage(text: str) -> float:
    """Convert one of the six numbers of --percent: from 0 to 100."""
    value = float(text)
    if not 0 <= value <= 100:  # NaN is refused, too
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return value


def documents(text: str) -> int | float:
    """Convert a number of documents, or a share of them between 0 and 1, as lm_eval's --limit."""
    value = float(text)
    if not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of documents nor 0 to 1")
    return value if value < 1 else int(value)


def nbytes(text: str) -> int:
    """Convert an amount of memory to bytes: 6GB -> 6000000000; 6GiB -> 6442450944; 6 -> 6."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    value = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")  # without a letter 0, K 1, M 2, G 3, T 4
        value = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if value == 0:  # also 0.4, which is less than a byte
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory: say 6GB or 512MB")
    return value


def amount(text: str) -> float:
    """Convert --dram_budget: a percentage to a share, or an amount of memory to bytes: 50% -> 0.5;
    4GB -> 4000000000. FlashOptions.memory tells them apart: a number up to 1 is a share."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) *%", text.strip()):
        if not 0 < float(match[1]) <= 100:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 % and at most 100 %")
        return float(match[1]) / 100
    if (value := nbytes(text)) == 1:  # would count as a share of 1
        raise argparse.ArgumentTypeError(f"{text} is one byte: say 50% or 4GB")
    return value


def window(text: str) -> float:
    """Convert --flash_window, the number of last tokens whose neurons stay in memory: a finite
    number, 1 or more. A plan may choose one with decimals, so decimals are allowed."""
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Convert a JSON object to a dict."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object, as {{"key": true}}')
    return value


def pair(text: str) -> str:
    """Check that a text has the form TASK=PATH; returns it unchanged."""
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"{text} is not TASK=PATH")
    return text


def token_bias(text: str) -> tuple[int, float]:
    """Convert a token id and the number that is added to its logit: 29=-1.5 -> (29, -1.5).

    The number is limited to +-MAX_LOGIT_BIAS, also for inf.
    """
    match = re.fullmatch(r"(\d+)=([-+]?(?:inf|\d+(?:\.\d*)?|\.\d+))", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not ID=BIAS, such as 29=-1.5 or 29=-inf")
    return int(match[1]), max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, float(match[2])))

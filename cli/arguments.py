"""Command-line arguments: a parser whose errors are one line, and the types of arguments.

Start at Parser. Nothing here imports torch, which takes seconds: a wrong option is reported first.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from text.generation_config import MAX_LOGIT_BIAS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line, which suggest an option for an unknown one.

    Options may be written with hyphens in place of underscores.
    """

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return parsed

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([self._underscored(arg) for arg in given], namespace)

    def error(self, message: str) -> None:
        """Print one line to stderr, under torchrun on rank 0 only, and exit with code 2."""
        quiet = os.environ.get("RANK", "0") not in ("0", "")
        message = " ".join(message.split())
        self.exit(2, None if quiet else f"{self.prog}: {message} (--help lists the options)\n")

    def _underscored(self, arg: str) -> str:
        """--max-new-tokens -> --max_new_tokens. A text that begins with -- and has blanks is a
        value, as in argparse, and is not changed."""
        name, equals, value = arg.partition("=")
        if not re.fullmatch(r"--[\w-]+", name) or name in self._option_string_actions:
            return arg
        return f"--{name[2:].replace('-', '_')}{equals}{value}"

    def _unknown(self, arg: str) -> str:
        if not arg.startswith("-"):
            return f"unrecognized argument '{arg}': a text with blanks needs quotes"
        name = arg.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1, 0.6)
        return f"unrecognized option {name}" + (f", did you mean {near[0]}?" if near else "")


def whole(least: int, why: str = "") -> Callable[[str], int]:
    """Returns an argument type for whole numbers from `least` on. why: ends its error message."""

    def whole_number(text: str) -> int:  # argparse names this function: "invalid whole_number"
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not at least {least}{why}")
        return value

    return whole_number


positive, count = whole(1), whole(0)
text_length = whole(2, ": BOS and a token")


def count_or_auto(text: str) -> int | str:
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number")
    return text if text == "auto" else positive(text)


def rows_or_auto(text: str) -> int | None:
    """auto -> None: as many rows as are fast."""
    return None if text == "auto" else positive(text)


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:  # NaN, too
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def percentage(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:  # NaN, too
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return value


def documents(text: str) -> int | float:
    """A number of documents, or below 1 a share of them, as in lm_eval."""
    value = float(text)
    if not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of documents nor 0 to 1")
    return value if value < 1 else int(value)


def nbytes(text: str) -> int:
    """6GB -> 6000000000; 6GiB -> 6442450944."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory: say 6GB or 512MB")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def amount(text: str) -> float:
    """50% -> 0.5; 4GB -> 4e9."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) *%", text.strip()):
        if not 0 < float(found[1]) <= 100:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 % and at most 100 %")
        return float(found[1]) / 100
    return nbytes(text)


def window(text: str) -> float:
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def pair(text: str) -> str:
    """Returns a text of the form TASK=PATH unchanged."""
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"{text} is not TASK=PATH")
    return text


def token_bias(text: str) -> tuple[int, float]:
    """29=-1.5 -> (29, -1.5): a token id, and what is added to its logit."""
    found = re.fullmatch(r"(\d+)=([-+]?(?:inf|\d+(?:\.\d*)?|\.\d+))", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not ID=BIAS, such as 29=-1.5 or 29=-inf")
    return int(found[1]), max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, float(found[2])))

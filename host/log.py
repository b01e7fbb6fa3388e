"""Log lines on stderr. Start at log; --quiet switches them off."""

import logging
import sys

LOGGER = logging.getLogger("gpt_flex")
LOGGER.setLevel(logging.INFO)


def log(line: str) -> None:
    """Print a line on stderr, unless --quiet is set."""
    if LOGGER.isEnabledFor(logging.INFO):
        print(line, file=sys.stderr, flush=True)


def set_quiet(quiet: bool) -> None:
    """Print only what ends the program, or log lines again."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)

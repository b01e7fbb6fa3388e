"""Log lines on stderr, which --quiet switches off."""

import logging
import sys

LOGGER = logging.getLogger("gpt_flex")


def log(line: str) -> None:
    """A line on stderr, unless --quiet."""
    if LOGGER.isEnabledFor(logging.INFO):
        print(line, file=sys.stderr, flush=True)


def set_quiet(quiet: bool) -> None:
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)

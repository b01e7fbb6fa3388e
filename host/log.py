"""Log lines on stderr. Start at log; --quiet switches them off."""

import functools
import logging
import sys

LOGGER = logging.getLogger("gpt_flex")
LOGGER.setLevel(logging.INFO)


def log(line: str) -> None:
    """Print a line on stderr, unless --quiet is set."""
    if LOGGER.isEnabledFor(logging.INFO):
        print(line, file=sys.stderr, flush=True)


@functools.cache
def log_once(line: str) -> None:
    """Log a line once per process: the cache drops later calls with the same line. For notes about
    a file, which may be opened several times."""
    log(line)


def set_quiet(quiet: bool) -> None:
    """Switch log lines off (--quiet) or on. Errors appear in any case: they do not use `log`."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)

"""Shared by the benchmarks: one-line errors, fresh processes, spreads, other processes' CPU use."""

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benchmarks" / "configs" / "tinyllama-1.1b.json"
MAX_OTHERS_SHARE = 0.05  # of the CPUs; above it, figures are unreliable


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exit_code(main: Callable[[Namespace], dict[str, Any]], args: Namespace) -> int:
    """Run a benchmark. Prints its figures as one line on stdout, or a mistake as one on stderr.

    Returns the exit code: 0, 2 for a mistake, 130 for Ctrl-C.
    """
    try:
        figures = main(args)
    except KeyboardInterrupt:
        log("\nstopped")
        return 130
    except (OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
        log(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
        return 2
    print(json.dumps(figures))
    return 0


def fresh_process(script: str | Path, *options: object, env: dict[str, str] | None = None) -> Any:
    """Run a Python script in a new process; return the JSON on the last line that it prints."""
    command = [sys.executable, str(script), *map(str, options)]
    done = subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["no error message"]
        raise ChildProcessError(f"{' '.join(command)} failed: {errors[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum, maximum, and the values in the order measured, with six digits."""
    values = [float(f"{value:.6g}") for value in values]
    middle = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return middle | {"runs": values}


def show(figures: dict[str, Any], digits: int = 2) -> str:
    """Format a spread as "median (min to max)"."""
    median, least, most = (f"{figures[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


class Others:
    """Measures the share of the CPUs that other processes take, from its construction on (Linux).

    Threads that wait for each other lose far more than that share: with a niced process on one of
    two cores llama.cpp fell from 10.7 tokens/s to 0.5, and gpt-flex from 11.4 to 0.5.
    """

    def __init__(self):
        self.start, self.used = time.perf_counter(), others_seconds()

    def share(self) -> float:
        """Return the share, 0 to 1. Children count as others until they have been waited for."""
        elapsed = (time.perf_counter() - self.start) * os.cpu_count()
        taken = max(0.0, (others_seconds() - self.used) / elapsed)
        log(f"other processes took {taken:.0%} of the CPUs meanwhile")
        if taken > MAX_OTHERS_SHARE:
            log("the figures are unreliable: measure again on a quiet machine")
        return round(taken, 3)


def others_seconds() -> float:
    """Return CPU seconds since the machine started, without this process and its children."""
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    user, nice, system, _idle, _waiting, *interrupts = ticks  # interrupts: irq, softirq, steal
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])

"""What the benchmarks share: one-line errors, fresh processes, spreads, and who else worked."""

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
CROWDED = 0.05  # share of the CPUs that others may take before a figure means little


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exit_code(main: Callable[[Namespace], dict[str, Any]], args: Namespace) -> int:
    """Run a benchmark: its figures as the last line of stdout, a mistake as one on stderr."""
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
    """The JSON on the last line that a Python script prints, run alone in a new process."""
    command = [sys.executable, str(script), *map(str, options)]
    done = subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ChildProcessError(f"{' '.join(command)} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves, in the order measured; six digits of each."""
    values = [float(f"{value:.6g}") for value in values]
    middle = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return middle | {"runs": values}


def show(figures: dict[str, Any], digits: int = 2) -> str:
    """A spread as text: median (min to max)."""
    median, least, most = (f"{figures[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


class Others:
    """The share of the CPUs that other processes took since this was made (Linux).

    Two threads that wait for each other suffer from a third far beyond its share: with a niced
    process on one of two cores llama.cpp fell from 10.7 tokens/s to 0.5, and we from 11.4 to 0.5.
    """

    def __init__(self):
        self.start, self.used = time.perf_counter(), others_seconds()

    def share(self) -> float:
        """Between 0 and 1; children count as others until they have been waited for."""
        elapsed = (time.perf_counter() - self.start) * os.cpu_count()
        taken = max(0.0, (others_seconds() - self.used) / elapsed)
        log(f"other processes took {taken:.0%} of the CPUs meanwhile")
        if taken > CROWDED:
            log("that is too much: measure again on a quiet machine")
        return round(taken, 3)


def others_seconds() -> float:
    """CPU seconds since the machine started, without this process and its children."""
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    user, nice, system, _idle, _waiting, *interrupts = ticks  # interrupts: irq, softirq, steal
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])

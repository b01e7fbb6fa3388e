"""Run a command under limits that the kernel enforces, of memory and of a disk's rate.

    python benchmarks/limited.py --limit 1.1e9 -- python benchmarks/offload_peers.py ...

Start at limited. Page cache counts: a page of a file is charged to the group that first read it,
so a mapped file larger than the limit must come from disk again and again. What another group
read before costs nothing, however, so drop_cache the files first. A disk can be held to a rate,
too, where its own drifts with what others do. Linux, cgroups 1 or 2, and the right to make a group:
unsupported_reason says what is missing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import exit_code

MOUNTED = Path("/sys/fs/cgroup")
# Groups, --, and what to run in them: not by preexec_fn, which may deadlock beside threads.
ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit; shift; done; shift; exec "$@"'


class OutOfMemory(ChildProcessError):
    """The kernel ended a command that did not do with its memory."""


@dataclass(frozen=True)
class Version:
    """The files of a group, as a version of cgroups names them."""

    limit: str
    swap: str  # there only where the kernel counts swap
    swap_beside_memory: bool  # or else memory and swap together
    peak: str
    events: str  # counts what was killed


VERSIONS = (
    Version(
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        False,
        "memory.max_usage_in_bytes",
        "memory.oom_control",
    ),
    Version("memory.max", "memory.swap.max", True, "memory.peak", "memory.events"),
)


@dataclass(frozen=True)
class Rate:
    """What may be read in a second from the disk that a file lies on."""

    file: Path
    nbytes: int

    def disk(self) -> str:
        """Its numbers; OSError where the file lies on none."""
        device = self.file.stat().st_dev
        entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        if (entry / "partition").exists():  # only whole disks have rates
            entry = entry.parent
        return (entry / "dev").read_text().strip()


@dataclass(frozen=True)
class Group:
    """A control group."""

    path: Path
    version: Version

    @property
    def procs(self) -> Path:
        return self.path / "cgroup.procs"

    def limit(self, nbytes: int) -> None:
        (self.path / self.version.limit).write_text(str(nbytes))
        with suppress(FileNotFoundError):
            swap = 0 if self.version.swap_beside_memory else nbytes
            (self.path / self.version.swap).write_text(str(swap))

    def peak(self) -> int | None:
        """The most bytes that were charged, page cache with them; None where not counted."""
        file = self.path / self.version.peak
        return int(file.read_text()) if file.exists() else None

    def kills(self) -> int:
        lines = (self.path / self.version.events).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def remove(self) -> None:
        """A group can go once its last process has been ended and waited for by its parent."""
        for _ in range(100):
            for process in self.procs.read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            with suppress(OSError):
                return self.path.rmdir()
            time.sleep(0.1)
        raise OSError(f"{self.path} cannot be removed: its processes do not end")


def limited(
    command: Sequence[object],
    limit_bytes: int,
    env: dict[str, str] | None = None,
    rate: Rate | None = None,
) -> dict[str, Any]:
    """The JSON object on the last line that a command prints, run alone under a memory limit, and
    with a disk no faster than a rate.

    With it goes cgroup_peak_bytes, which page cache usually fills to the limit. Raises
    OutOfMemory where the kernel killed it, ChildProcessError where it failed, both in one line,
    and OSError where there is no such limit, see unsupported_reason.
    """
    words = [str(word) for word in command]
    with new_group(limit_bytes) as group, slow_disk(group, rate) as groups:
        done = subprocess.run(
            ["sh", "-c", ENTER, "sh", *(str(group.procs) for group in groups), "--", *words],
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
        )
        peak, kills = group.peak(), group.kills()
    if kills:
        took = f"it takes more than {limit_bytes / 1e9:.2f} GB of memory"
        raise OutOfMemory(f"{' '.join(words)} was killed: {took}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise ChildProcessError(f"{' '.join(words)} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"cgroup_peak_bytes": peak}


@contextmanager
def new_group(limit_bytes: int) -> Iterator[Group]:
    """A group with a limit, gone afterwards, whatever happens, and its processes with it."""
    with interrupted_by_sigterm():
        group = make_group()
        try:
            group.limit(int(limit_bytes))
            yield group
        finally:
            group.remove()


@contextmanager
def slow_disk(group: Group, rate: Rate | None) -> Iterator[list[Group]]:
    """The groups to be in for a disk no faster than that: in version 1 rates have groups apart."""
    if rate is None:
        yield [group]
    elif (group.path / "io.max").exists():
        (group.path / "io.max").write_text(f"{rate.disk()} rbps={rate.nbytes}")
        yield [group]
    else:
        second = Group(MOUNTED / "blkio" / group.path.name, group.version)
        second.path.mkdir()
        try:
            slowed = second.path / "blkio.throttle.read_bps_device"
            slowed.write_text(f"{rate.disk()} {rate.nbytes}")
            yield [group, second]
        finally:
            second.remove()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """`timeout` sends SIGTERM, which would leave group and processes behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only a main thread can; another is ended with it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_group() -> Group:
    """OSError saying what was tried where no place lets us make one."""
    tried = []
    for place in places():
        path = place / f"gpt-flex-{os.getpid()}-{time.monotonic_ns()}"
        try:
            path.mkdir()
        except OSError as error:
            tried.append(f"{place}: {error.strerror}")
            continue
        for version in VERSIONS:
            if (path / version.limit).exists():
                return Group(path, version)
        path.rmdir()
        tried.append(f"{place}: memory is not controlled there")
    raise OSError(f"no control group can be made ({'; '.join(tried) or 'no cgroups here'})")


def places() -> Iterator[Path]:
    """Where a group may be made, best first.

    Version 1: in the hierarchy that controls memory. Version 2: beside our own group or further
    out, for a group that has processes can have no controlled group below it.
    """
    if (MOUNTED / "memory").is_dir():
        yield MOUNTED / "memory"
    file = Path("/proc/self/cgroup")
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        if line.startswith("0::") and (MOUNTED / "cgroup.controllers").exists():
            own = MOUNTED / line.removeprefix("0::").strip("/")
            outer = [parent for parent in own.parents if parent.is_relative_to(MOUNTED)]
            yield from outer or [MOUNTED]


def unsupported_reason(rate: Rate | None = None) -> str | None:
    """Why no memory limit, or rate, can be enforced here, in one line; None where it can."""
    try:
        limited(["echo", "{}"], 2**30, rate=rate)
    except OSError as error:
        what = "memory limit and rate" if rate else "memory limit"
        return f"no {what} can be enforced: {error}; it takes Linux, cgroups and mostly root"
    return None


def drop_cache(path: Path) -> None:
    """Let the next reader of a file, or of a directory's files, read them from disk.

    Only clean pages that no process maps go: what was just written is synced first.
    """
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--limit", type=float, required=True, help="bytes, such as 1.1e9")
    add("--rate", type=float, help="bytes a second at most from the disk that this directory is on")
    add("--drop", type=Path, nargs="*", default=[], help="read these from disk, not from cache")
    add("command", nargs="+", help="prints a JSON object as its last line")
    return parser.parse_args()


def main(args: argparse.Namespace) -> dict[str, Any]:
    for path in args.drop:
        drop_cache(path)
    rate = Rate(Path.cwd(), int(args.rate)) if args.rate else None
    return limited(args.command, args.limit, rate=rate)


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

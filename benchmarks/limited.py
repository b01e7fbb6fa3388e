"""Runs a command under limits on its memory and on a disk's read rate, enforced by the kernel.

    python benchmarks/limited.py --limit 1.1e9 -- python benchmarks/offload_peers.py ...

Start at limited. The limit includes page cache: the kernel charges a file's page to the control
group that first reads it, so a mapped file larger than the limit is read from disk repeatedly.
Pages that another group has read cost nothing: call drop_cache on the files first. A limit on the
read rate makes a shared disk's speed constant. This needs Linux, cgroups 1 or 2, and the right to
make a group; unsupported_reason tells what is missing.
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
# Shell arguments: the groups' files, --, and the command. preexec_fn may deadlock with threads.
ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit; shift; done; shift; exec "$@"'


class OutOfMemory(ChildProcessError):
    """The kernel killed a command that exceeded its memory limit."""


@dataclass(frozen=True)
class Version:
    """The names of a control group's files in one version of cgroups."""

    limit: str
    swap: str  # exists only if the kernel counts swap
    swap_beside_memory: bool  # the swap limit is for swap alone, else for memory and swap
    peak: str
    events: str  # counts killed processes


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
    """The bytes per second that may be read from a file's disk."""

    file: Path
    nbytes: int

    def disk(self) -> str:
        """Return "major:minor" of the disk. Raises OSError for a file system without a disk."""
        device = self.file.stat().st_dev
        entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        if (entry / "partition").exists():  # a rate applies to a whole disk
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
        """Return the most bytes charged, page cache included; None if the kernel does not count."""
        file = self.path / self.version.peak
        return int(file.read_text()) if file.exists() else None

    def kills(self) -> int:
        lines = (self.path / self.version.events).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def remove(self) -> None:
        """Kill the group's processes, wait until their parents have reaped them, and remove it."""
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
    """Run a command under a memory limit and, if given, a limit on a disk's read rate.

    Returns the JSON object on the last line that it prints, with cgroup_peak_bytes added; page
    cache usually fills that to the limit. Raises OutOfMemory if the kernel killed the command,
    ChildProcessError if it failed, and OSError if no limit can be set, see unsupported_reason.
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
        reason = f"it takes more than {limit_bytes / 1e9:.2f} GB of memory"
        raise OutOfMemory(f"{' '.join(words)} was killed: {reason}")
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise ChildProcessError(f"{' '.join(words)} failed: {errors[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"cgroup_peak_bytes": peak}


@contextmanager
def new_group(limit_bytes: int) -> Iterator[Group]:
    """Make a group with a limit; kill its processes and remove it at the end."""
    with interrupted_by_sigterm():
        group = make_group()
        try:
            group.limit(int(limit_bytes))
            yield group
        finally:
            group.remove()


@contextmanager
def slow_disk(group: Group, rate: Rate | None) -> Iterator[list[Group]]:
    """Limit the disk's rate; yield the groups that the command must join. Cgroups 1 has separate
    groups for disks."""
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
    """Turn SIGTERM, which `timeout` sends, into KeyboardInterrupt, so that groups are removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread can set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_group() -> Group:
    """Make a group in the first of `places` that allows it. Raises OSError listing what failed."""
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
    """Yield directories in which a group may be made, best first.

    Version 1: the hierarchy that controls memory. Version 2: the parents of this process's group,
    because a group with processes cannot have limited groups below it.
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
    """Return one line that tells why no memory limit, or rate, can be enforced; None if it can."""
    try:
        limited(["echo", "{}"], 2**30, rate=rate)
    except OSError as error:
        what = "memory limit and rate" if rate else "memory limit"
        return f"no {what} can be enforced: {error}; it needs Linux, cgroups and usually root"
    return None


def drop_cache(path: Path) -> None:
    """Remove a file's pages, or those of a directory's files, from the page cache.

    The kernel keeps dirty pages and mapped ones; dirty pages are written to disk first.
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
    add("--rate", type=float, help="bytes per second at most from this directory's disk")
    add("--drop", type=Path, nargs="*", default=[], help="remove these from the page cache first")
    add("command", nargs="+", help="a command that prints a JSON object as its last line")
    return parser.parse_args()


def main(args: argparse.Namespace) -> dict[str, Any]:
    for path in args.drop:
        drop_cache(path)
    rate = Rate(Path.cwd(), int(args.rate)) if args.rate else None
    return limited(args.command, args.limit, rate=rate)


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

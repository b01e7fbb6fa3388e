"""Many texts to generate: files of prompts, batches, and results that survive an interruption.

Start at Job; read_prompts and make_jobs make them, `batches` groups them, ConsoleSink and ResultsFile
take the results. A result in a file is one line of JSON, appended in the step in which its text
ends, with the model and the settings that made it: a later run with the same prompts, model,
settings and file reads what is there and does the rest.
"""

import hashlib
import json
import os
import re
import select
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from host.files import decoded, json_text, parse_json, read_text
from host.log import log
from text.chat_template import check_messages

Prompt = str | list[dict[str, str]]  # a text, or the messages of a conversation
PLACES, SAMPLE = 64, 1024  # of each file of a model, and bytes of each, that are hashed
COLLECTIVE_TIMEOUT = 2.0  # seconds without input before a line says what is waited for
SURROGATE = re.compile("[\ud800-\udfff]")
FORMS = 'a string, an object with a "prompt", or, for --chat, one with "messages"'


@dataclass(frozen=True)
class Job:
    """One text to generate; number: its random stream, and its place in the order asked for."""

    number: int
    index: int  # of the prompt
    sample: int  # which of the texts wanted for that prompt
    prompt: Prompt
    ids: tuple[int, ...]
    limit: int = 0  # new tokens, at most: what the settings and the model's context allow


@dataclass(frozen=True)
class Provenance:
    """What a text depends on beside its prompt.

    checkpoint: a hash of the model's files, the same if the model has moved to another path.
    """

    model: str
    checkpoint: str
    settings: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """What each result says of itself, as JSON has it: keys are strings, tuples lists."""
        settings = json.loads(json.dumps(self.settings))
        return {"model": self.model, "checkpoint": self.checkpoint, "settings": settings}

    def differences(self, row: dict[str, Any]) -> list[str]:
        """The settings that differ between a stored result and this run: "seed 0 -> 1"."""
        had = row.get("settings")
        had, has = had if isinstance(had, dict) else {}, self.row()["settings"]
        found = []
        if row.get("checkpoint") != self.checkpoint:
            changed = " (its files have changed)" * (row.get("model") == self.model)
            found = [f"model {row.get('model')} -> {self.model}{changed}"]
        return found + [
            f"{name} {had.get(name)!r} -> {has.get(name)!r}"
            for name in {**has, **had}
            if had.get(name) != has.get(name)
        ]


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of the sizes and of some places of a model's files, whatever their names are."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            for n in range(PLACES):
                opened.seek(size * n // PLACES)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def read_prompts(path: Path, chat: bool = False) -> list[Prompt]:
    """One prompt on each line of a .txt (blank lines aside) or .jsonl (see read_line).

    Raises ValueError naming the file and the line that is no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt nor .jsonl")
    lines = read_text(path).split("\n")  # splitlines would split at U+2028 too
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for _, line in numbered]  # the line ends of Windows
    return [read_line(line, f"{path}, line {n}", chat) for n, line in numbered]


def read_line(line: str, where: str, chat: bool = False) -> Prompt:
    """A string, the "prompt" of an object, or, for chat, a list of messages or "messages"."""
    value = parse_json(line, where)
    prompt = value.get("messages", value.get("prompt")) if isinstance(value, dict) else value
    if isinstance(prompt, list):
        try:
            check_messages(prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not chat:
            raise ValueError(f"{where} holds the messages of a conversation: give --chat")
    elif not isinstance(prompt, str):
        raise ValueError(f"{where} is not {FORMS}")
    elif not prompt:
        raise ValueError(f"{where}: the prompt is empty: give it some text")
    if SURROGATE.search(json.dumps(prompt, ensure_ascii=False)):
        raise ValueError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff): remove it")
    return prompt


def piped_prompt() -> str | None:
    """The text that a pipe or a redirected file brings; None for a terminal or /dev/null."""
    kind = os.fstat(0).st_mode
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return None
    if not select.select([0], [], [], COLLECTIVE_TIMEOUT)[0]:
        log("waiting for the prompt on standard input; or give --prompt TEXT")
    with open(0, "rb", closefd=False) as stdin:
        return without_line_end(decoded(stdin.read(), "standard input"))


def without_line_end(text: str) -> str:
    """A text without the line end that echo and editors put at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def make_jobs(
    prompts: Iterable[tuple[Prompt, Sequence[int]]],
    num_samples: int,
    max_new_tokens: int,
    context: int,
) -> list[Job]:
    """prompts: each with its ids."""
    return [
        Job(
            index * num_samples + sample,
            index,
            sample,
            prompt,
            tuple(ids),
            min(max_new_tokens, context - len(ids)),
        )
        for index, (prompt, ids) in enumerate(prompts)
        for sample in range(num_samples)
    ]


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


class FinishCounts:
    """Counts the texts of a run that were cut off, and says so once."""

    def __init__(self, max_new_tokens: int):
        self.max_new_tokens, self.texts, self.limited, self.filled = max_new_tokens, 0, 0, 0

    def add(self, job: Job, completion: Any) -> None:
        self.texts += 1
        if completion.finish_reason == "length":
            self.limited += job.limit >= self.max_new_tokens
            self.filled += job.limit < self.max_new_tokens

    def say(self) -> None:
        reasons = {
            f"at --max_new_tokens {self.max_new_tokens}": self.limited,
            "at the end of the model's context": self.filled,
        }
        for reason, count in reasons.items():
            if count:
                which = "the text" if self.texts == 1 else f"{count} of {self.texts} texts"
                log(f"{which} ended {reason}")


class ConsoleSink:
    """Texts on stdout, in order. The first of a batch appears as it grows, the others after it.

    continued: the prompt is printed before its text, which goes on with it.
    """

    def __init__(self, todo: Sequence[Job], ends: FinishCounts, continued: bool = True):
        self.todo, self._ends, self._continued = todo, ends, continued
        self._batch: Sequence[Job] = ()
        self._growing = 0  # texts of the batch

    def __enter__(self) -> "ConsoleSink":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0]:
            print(flush=True)  # the shell's prompt begins a line of its own
        self._ends.say()

    def begin(self, batch: Sequence[Job]) -> None:
        self._batch, self._growing = batch, len(batch)
        self._title(batch[0])

    def text(self, row: int, text: str) -> None:
        if row == 0:
            print(text, end="", flush=True)

    def ended(self, rows: Sequence[int], completions: Sequence[Any]) -> None:
        for row in rows:
            self._ends.add(self._batch[row], completions[row])
        self._growing -= len(rows)
        if self._growing:
            return
        print(flush=True)
        for job, completion in list(zip(self._batch, completions, strict=True))[1:]:
            self._title(job)
            print(completion.text, flush=True)

    def _title(self, job: Job) -> None:
        if len(self.todo) > 1:
            print(f"--- {job.number + 1} of {len(self.todo)}")
        if self._continued:
            print(job.prompt, end="", flush=True)


class ResultsFile:
    """A file of results, one line each. It is opened and checked before a model is loaded.

    A device or a pipe (/dev/stdout) takes all results and is not read. Raises ValueError if the
    file holds results of other prompts, models or settings, and OSError if it cannot be written.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], num_samples: int, origin: Provenance):
        self._path, self._origin = path, origin
        self._file = open_for_results(path)
        self._resumable = stat.S_ISREG(os.fstat(self._file).st_mode)
        self.done: set[tuple[int, int]] = set()  # prompts and samples that have a result
        for n, result in complete_lines(path) if self._resumable else ():
            self.done.add(self._checked(result, f"{path}, line {n}", prompts, num_samples))

    def _checked(
        self, row: dict[str, Any], where: str, prompts: Sequence[Prompt], num_samples: int
    ) -> tuple[int, int]:
        """Prompt and sample of a result. Raises ValueError for one that this run would not make."""
        key = index, sample = row.get("index"), row.get("sample")
        if not all(type(n) is int and n >= 0 for n in key) or not isinstance(row.get("text"), str):
            raise ValueError(f"{where} is no result: give another --output")
        if "settings" not in row:
            raise ValueError(
                f"{where} does not say which model and settings made it (an older version wrote "
                "it): give another --output"
            )
        found = self._origin.differences(row)
        if not found and (index >= len(prompts) or row.get("prompt") != prompts[index]):
            found = [f"prompt {index + 1}, {row.get('prompt')!r:.40} -> another or none"]
        if not found and sample >= num_samples:
            found = [f"num_samples {sample + 1} or more -> {num_samples}"]
        if found:
            raise ValueError(
                f"{where} was made with other settings than those of this run "
                f"({'; '.join(found)}): give another --output, or the settings of the file"
            )
        return key

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs without a result: rows of like length need no padding; the longest first, so
        that memory fails early."""
        missing = [job for job in jobs if (job.index, job.sample) not in self.done]
        return sorted(missing, key=lambda job: -len(job.ids))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add results; in a file they are on disk when this returns."""
        content = "".join(json_text(row | self._origin.row()) + "\n" for row in rows)
        remaining = memoryview(content.encode())
        try:
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
            if self._resumable:
                os.fsync(self._file)
        except BrokenPipeError:  # the reader has gone, which is no fault of the path
            raise
        except OSError as error:
            again = "; the same command goes on after the results in it" * self._resumable
            raise OSError(f"{self._path} cannot be written: {error.strerror}{again}") from error

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


def open_for_results(path: Path) -> int:
    """A descriptor to append to. A pipe that nobody reads is an error, and not a wait."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise OSError(f"--output {path} cannot be written: {error.strerror}") from error
    os.set_blocking(file, True)
    return file


class JsonlSink:
    """Puts results into a ResultsFile as they end, and shows a bar of tokens.

    generated: how many tokens this run has made so far.
    """

    def __init__(
        self, output: ResultsFile, jobs: Sequence[Job], ends: FinishCounts, generated: Callable[[], int]
    ):
        self.todo = output.missing(jobs)
        self._output, self._ends, self._generated = output, ends, generated
        self._batch: Sequence[Job] = ()
        self._texts, self._of = len(jobs) - len(self.todo), len(jobs)
        self._ended = 0  # tokens of the texts that have ended
        self._open = sum(job.limit for job in self.todo)  # tokens that the others may still have

    def __enter__(self) -> "JsonlSink":
        # smoothing: texts end in bursts, so that only their mean rate says what time is left.
        self._bar = tqdm(total=self._open, unit="token", smoothing=0)
        self._bar.set_postfix_str(f"{self._texts} of {self._of} texts")
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        self._ends.say()

    def begin(self, batch: Sequence[Job]) -> None:
        self._batch = batch

    def text(self, row: int, text: str) -> None:
        self._move()

    def ended(self, rows: Sequence[int], completions: Sequence[Any]) -> None:
        self._output.append(result(self._batch[row], completions[row]) for row in rows)
        for row in rows:
            self._ends.add(self._batch[row], completions[row])
            self._ended += len(completions[row].ids)
            self._open -= self._batch[row].limit
        self._texts += len(rows)
        self._bar.set_postfix_str(f"{self._texts} of {self._of} texts", refresh=False)
        self._move()

    def _move(self) -> None:
        """Advance the bar. Its total is an upper bound, which falls when a text ends early."""
        self._bar.total = self._ended + self._open
        self._bar.update(min(self._generated(), self._bar.total) - self._bar.n)


FIRST_KEY = b'{"index": '


def result(job: Job, completion: Any) -> dict[str, Any]:
    row = {
        "index": job.index,
        "sample": job.sample,
        "prompt": job.prompt,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
    }
    return row | ({"logprobs": completion.logprobs_json()} if completion.logprobs else {})


def complete_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The results in a file, numbered; a last one that was cut off is removed from it."""
    content = path.read_bytes()
    whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    for n, line in enumerate(whole.split(b"\n"), 1):
        if line.strip():
            value = parse_json(line, f"--output {path} is no result in line {n}: it")
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {n} is no result: give another --output")
            yield n, value
    if not (rest.startswith(FIRST_KEY) or FIRST_KEY.startswith(rest)):
        raise ValueError(f"{path}: the last line is no result: give another --output")
    if rest:
        os.truncate(path, len(whole))

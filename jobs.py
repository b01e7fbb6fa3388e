"""Many texts to generate: files of prompts, batches, and results that survive an interruption.

Start at Job; read_prompts and make_jobs make them, `batches` groups them, Console and JsonlOutput
take what came of them. A result in a file is one line of JSON, appended in the step in which its
text ends: a later run with the same prompts and file reads what is there and does the rest.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """One text to generate; number: its random stream, and its place in the order asked for."""

    number: int
    index: int  # of the prompt
    sample: int  # which of the texts wanted for that prompt
    prompt: str
    ids: tuple[int, ...]


def read_prompts(path: Path) -> list[str]:
    """One prompt on each line of a .txt (blank lines aside) or .jsonl (a string, or "prompt").

    Raises ValueError naming the line that is no prompt.
    """
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split at U+2028 too
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        return [line for _, line in numbered]
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} is neither .txt nor .jsonl")
    return [read_line(line, f"{path}, line {n}") for n, line in numbered]


def read_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{where} is neither a string nor an object with a "prompt"')
    return prompt


def make_jobs(prompts: Iterable[tuple[str, Sequence[int]]], num_samples: int) -> list[Job]:
    """prompts: text and ids of each."""
    return [
        Job(index * num_samples + sample, index, sample, text, tuple(ids))
        for index, (text, ids) in enumerate(prompts)
        for sample in range(num_samples)
    ]


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


class Console:
    """Texts on stdout, in order. The first of a batch appears as it grows, the others after it."""

    def __init__(self, todo: Sequence[Job]):
        self.todo = todo
        self._batch: Sequence[Job] = ()
        self._growing = 0  # texts of the batch

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0]:
            print(flush=True)  # the shell's prompt begins a line of its own

    def begin(self, batch: Sequence[Job]) -> None:
        self._batch, self._growing = batch, len(batch)
        self._title(batch[0])

    def text(self, row: int, text: str) -> None:
        if row == 0:
            print(text, end="", flush=True)

    def ended(self, rows: Sequence[int], completions: Sequence[Any]) -> None:
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
        print(job.prompt, end="", flush=True)


class JsonlOutput:
    """Results in a file, one line each; `todo` is what it has no result for yet.

    Raises ValueError where the file holds results of other prompts.
    """

    def __init__(self, path: Path, jobs: Sequence[Job]):
        self._path, self._batch = path, ()
        self._tokens = self._earlier = 0  # generated in this run; in batches before this one
        path.open("ab").close()  # a path that cannot be written fails now, not after the work
        missing = {(job.index, job.sample): job for job in jobs}
        asked = {key: job.prompt for key, job in missing.items()}
        for n, result in enumerate(complete_lines(path), 1):
            key = (result.get("index"), result.get("sample"))
            if key not in asked or asked[key] != result.get("prompt"):
                raise ValueError(
                    f"{path}, line {n} answers none of these prompts: remove the file, or choose "
                    "another --output"
                )
            missing.pop(key, None)
        # Rows of like length need no padding; the longest first, so that memory fails early.
        self.todo = sorted(missing.values(), key=lambda job: -len(job.ids))
        self._total = len(jobs)

    def __enter__(self) -> "JsonlOutput":
        # smoothing: texts end in bursts, so that only their mean rate says what time is left.
        bar = {"total": self._total, "initial": self._total - len(self.todo), "smoothing": 0}
        self._bar = tqdm(unit="text", **bar)
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def begin(self, batch: Sequence[Job]) -> None:
        self._batch, self._earlier = batch, self._tokens

    def text(self, row: int, text: str) -> None:
        pass

    def ended(self, rows: Sequence[int], completions: Sequence[Any]) -> None:
        """Append the results of those rows of the batch; they are on disk when this returns."""
        lines = "".join(result_line(self._batch[row], completions[row]) for row in rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._tokens = self._earlier + sum(len(completion.ids) for completion in completions)
        rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.update(len(rows))


FIRST_KEY = b'{"index": '


def result_line(job: Job, completion: Any) -> str:
    result = {
        "index": job.index,
        "sample": job.sample,
        "prompt": job.prompt,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
    }
    return json.dumps(result, ensure_ascii=False) + "\n"


def complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The results in a file; a last one that was cut off is removed from it."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {n} is no result: {error}") from error
    rest = content[len(whole) :]
    if not (rest.startswith(FIRST_KEY) or FIRST_KEY.startswith(rest)):
        raise ValueError(f"{path} ends in what is no result: choose another --output")
    if rest:
        os.truncate(path, len(whole))

"""Offline batch generation: files of prompts, batches, and results that an interrupted run resumes.

Start at Job. read_prompts reads a file, make_jobs expands it to one Job for each text, `batches`
groups the jobs, and a sink takes the texts: ConsoleSink prints them, JsonlSink appends them to a
ResultsFile. A later run with the same prompts, model, settings and --output skips the jobs that
have a result.

Words: a row is a text of a batch; the parameters row and rows are indices in the batch. A
completion is the Completion (text/completion.py) of a text. A result is the JSON object of a text
that has ended, with the model and the settings that produced it: a line of the file, on disk in the
step in which the text ends.

cli/prompts.py enters a sink as a context, calls its `begin` with each batch, and passes `text` and
`ended` to engine.complete, which calls them while the batch is generated.
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

from host.files import decode_utf8, json_text, parse_json, read_text
from host.log import log
from text.chat_template import check_messages

Prompt = str | list[dict[str, str]]  # a text, or the messages of a conversation
HASHED_SAMPLES, SAMPLE_BYTES = 64, 1024  # samples of each file that `fingerprint` reads
STDIN_NOTICE_SECONDS = 2.0  # time without input, after which the log says that stdin is awaited
SURROGATE = re.compile("[\ud800-\udfff]")
PROMPT_FORMS = 'a string, an object with a "prompt", or, for --chat, one with "messages"'


@dataclass(frozen=True)
class Job:
    """One text to generate."""

    number: int  # index among all jobs; it also selects the random stream
    index: int  # of the prompt, among all prompts
    sample: int  # index among the num_samples texts of the prompt
    prompt: Prompt
    ids: tuple[int, ...]  # token ids of the prompt
    limit: int = 0  # largest number of new tokens, by max_new_tokens and the model's context


@dataclass(frozen=True)
class Provenance:
    """The model and the settings that a generated text depends on. Each result stores them.

    model: its name for the user. checkpoint: the fingerprint of its files, which does not depend on
    their path. settings: those that change texts, by name.
    """

    model: str
    checkpoint: str
    settings: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """Return the keys and values that are stored in each result. Values have the types that
        reading JSON gives (a tuple becomes a list), so that `differences` can compare them."""
        settings = json.loads(json.dumps(self.settings))
        return {"model": self.model, "checkpoint": self.checkpoint, "settings": settings}

    def differences(self, stored_result: dict[str, Any]) -> list[str]:
        """Return a text such as "seed 0 -> 1" for each setting, and the model, in which a stored
        result and this run differ. An empty list: this run may resume from the result's file."""
        stored, current = stored_result.get("settings"), self.fields()["settings"]
        stored = stored if isinstance(stored, dict) else {}
        model = []
        if stored_result.get("checkpoint") != self.checkpoint:
            changed = " (its files have changed)" * (stored_result.get("model") == self.model)
            model = [f"model {stored_result.get('model')} -> {self.model}{changed}"]
        return model + [
            f"{name} {stored.get(name)!r} -> {current.get(name)!r}"
            for name in {**current, **stored}
            if stored.get(name) != current.get(name)
        ]


def fingerprint(files: Iterable[Path]) -> str:
    """Return a hash of a model's files, by which a run recognises the model of stored results.

    It covers the size of each file and 64 samples of 1 KiB, because reading all weights takes too
    long: a change between the samples is not noticed. File names do not count, but the order of the
    files does. The samples begin at equal distances, and overlap in a file of less than 64 KiB.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            for n in range(HASHED_SAMPLES):
                opened.seek(size * n // HASHED_SAMPLES)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_prompts(path: Path, chat: bool = False) -> list[Prompt]:
    """Return the prompts of a file, one for each line that is not blank. A line of a .txt file is
    the text of a prompt; a line of a .jsonl file is JSON, see read_line.

    chat: whether prompts may be lists of messages. Raises ValueError, naming the file and the line,
    for a line that is no prompt, and for a file without prompts or with another suffix.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt nor .jsonl")
    lines = read_text(path).split("\n")  # splitlines would also split at U+2028
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for _, line in numbered]  # Windows ends lines with \r\n
    return [read_line(line, f"{path}, line {n}", chat) for n, line in numbered]


def read_line(line: str, where: str, chat: bool = False) -> Prompt:
    """Return the prompt in a line of JSON: a string, or the "prompt" of an object; with chat also
    a list of messages, or the "messages" of an object.

    where: the file and the line, for error messages. Raises ValueError for a line of another form,
    an empty prompt, malformed messages, and half of a surrogate pair, which UTF-8 cannot encode.
    """
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
        raise ValueError(f"{where} is not {PROMPT_FORMS}")
    elif not prompt:
        raise ValueError(f"{where}: the prompt is empty: give it some text")
    if SURROGATE.search(json.dumps(prompt, ensure_ascii=False)):
        raise ValueError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff): remove it")
    return prompt


def piped_prompt() -> str | None:
    """Return the text of stdin, without its last line end, if stdin is a pipe or a file; return
    None for a terminal or /dev/null.

    Called on rank 0 if no option gives a prompt. It waits until the pipe is closed; after
    STDIN_NOTICE_SECONDS without input a log line says so. Raises ValueError if the text is not
    UTF-8.
    """
    kind = os.fstat(0).st_mode  # 0: the file descriptor of stdin
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return None
    if not select.select([0], [], [], STDIN_NOTICE_SECONDS)[0]:
        log("waiting for the prompt on standard input; or give --prompt TEXT")
    with open(0, "rb", closefd=False) as stdin:
        return without_line_end(decode_utf8(stdin.read(), "standard input"))


def without_line_end(text: str) -> str:
    """Remove one line end (LF or CR LF), which echo and editors add."""
    return text.removesuffix("\n").removesuffix("\r")


def make_jobs(
    prompts: Iterable[tuple[Prompt, Sequence[int]]],
    num_samples: int,
    max_new_tokens: int,
    context: int,
) -> list[Job]:
    """Return num_samples jobs for each prompt, in the order of the prompts.

    prompts: pairs (prompt, its ids), each with fewer ids than the context, so that a token can
    follow. max_new_tokens: the largest number of new tokens of a text. context: the largest number
    of tokens of prompt and new text together.
    """
    jobs = []
    for index, (prompt, ids) in enumerate(prompts):
        limit = min(max_new_tokens, context - len(ids))
        for sample in range(num_samples):
            number = index * num_samples + sample
            jobs.append(Job(number, index, sample, prompt, tuple(ids), limit))
    return jobs


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    """Yield the jobs in groups of `size`; the last group may be smaller."""
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


class FinishCounts:
    """Counts the texts that were cut: at max_new_tokens, or at the end of the model's context."""

    def __init__(self, max_new_tokens: int):
        self.max_new_tokens = max_new_tokens
        self.texts, self.at_limit, self.at_context = 0, 0, 0

    def add(self, job: Job, completion: Any) -> None:
        """Count a text that has ended, and its `completion`. If it was cut ("length"), the job's
        limit tells where: it is below max_new_tokens if the context leaves room for fewer
        tokens."""
        self.texts += 1
        if completion.finish_reason == "length":
            self.at_limit += job.limit >= self.max_new_tokens
            self.at_context += job.limit < self.max_new_tokens

    def report(self) -> None:
        """Log how many texts were cut at max_new_tokens, and how many at the context, if any."""
        reasons = {
            f"at --max_new_tokens {self.max_new_tokens}": self.at_limit,
            "at the end of the model's context": self.at_context,
        }
        for reason, count in reasons.items():
            if count:
                which = "the text" if self.texts == 1 else f"{count} of {self.texts} texts"
                log(f"{which} ended {reason}")


class ConsoleSink:
    """Prints the generated texts to stdout in the order of the jobs: the first text of a batch
    while it is generated, the others when the whole batch has ended.

    todo: the jobs to run. counts: counts each text that ends. with_prompt: whether to print each
    prompt, too, before the text that continues it.
    """

    def __init__(self, todo: Sequence[Job], counts: FinishCounts, with_prompt: bool = True):
        self.todo, self._counts, self._with_prompt = todo, counts, with_prompt
        self._batch: Sequence[Job] = ()
        self._unfinished = 0  # number of texts of the batch that have not ended

    def __enter__(self) -> "ConsoleSink":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0]:  # the type of the exception, None without one
            print(flush=True)  # so that the shell's prompt begins a new line
        self._counts.report()

    def begin(self, batch: Sequence[Job]) -> None:
        """Called before a batch is generated."""
        self._batch, self._unfinished = batch, len(batch)
        self._print_heading(batch[0])

    def text(self, row: int, text: str) -> None:
        """Called with the new characters of a row of the batch; prints those of the first row."""
        if row == 0:
            print(text, end="", flush=True)

    def ended(self, rows: Sequence[int], completions: Sequence[Any]) -> None:
        """Called when the texts of these rows have ended. When all texts of the batch have, print
        the texts of all rows but the first, which `text` has printed.

        completions: of all rows of the batch.
        """
        for row in rows:
            self._counts.add(self._batch[row], completions[row])
        self._unfinished -= len(rows)
        if self._unfinished:
            return
        print(flush=True)
        for job, completion in list(zip(self._batch, completions, strict=True))[1:]:
            self._print_heading(job)
            print(completion.text, flush=True)

    def _print_heading(self, job: Job) -> None:
        """Print what comes before a job's text: its number if there are several jobs, and its
        prompt."""
        if len(self.todo) > 1:
            print(f"--- {job.number + 1} of {len(self.todo)}")
        if self._with_prompt:
            print(job.prompt, end="", flush=True)


class ResultsFile:
    """A JSON Lines file of results, opened and checked before a model is loaded.

    `done` tells for which jobs the file already has results. A device or a pipe (/dev/stdout) is
    written without being read. Raises ValueError if the file has results of other prompts, models
    or settings, and OSError if it cannot be written.
    """

    def __init__(
        self, path: Path, prompts: Sequence[Prompt], num_samples: int, provenance: Provenance
    ):
        """Open the file, read its results, and check that this run would produce them, too:
        num_samples texts for each of `prompts`, with the model and settings of `provenance`."""
        self._path, self._provenance = path, provenance
        self._file = open_for_results(path)
        self._resumable = stat.S_ISREG(os.fstat(self._file).st_mode)  # a regular file
        self.done: set[tuple[int, int]] = set()  # (Job.index, Job.sample) of each stored result
        for n, stored in complete_lines(path) if self._resumable else ():
            self.done.add(self._checked(stored, f"{path}, line {n}", prompts, num_samples))

    def _checked(
        self, stored: dict[str, Any], where: str, prompts: Sequence[Prompt], num_samples: int
    ) -> tuple[int, int]:
        """Return (Job.index, Job.sample) of a stored result. where: the file and the line.

        prompts, num_samples: those of this run. Raises ValueError if this run would not produce the
        result: it has another model, other settings, another prompt, or a sample from num_samples
        on, or it is not a result at all. So results of two runs are never mixed in one file.
        """
        index, sample = stored.get("index"), stored.get("sample")
        if not is_count(index) or not is_count(sample) or not isinstance(stored.get("text"), str):
            raise ValueError(f"{where} is no result: give another --output")
        if "settings" not in stored:
            raise ValueError(
                f"{where} does not say which model and settings made it (an older version wrote "
                "it): give another --output"
            )
        # The error lists one kind only: model and settings, else the prompt, else the samples.
        differences = self._provenance.differences(stored)
        if not differences and (index >= len(prompts) or stored.get("prompt") != prompts[index]):
            differences = [f"prompt {index + 1}, {stored.get('prompt')!r:.40} -> another or none"]
        if not differences and sample >= num_samples:
            differences = [f"num_samples {sample + 1} or more -> {num_samples}"]
        if differences:
            raise ValueError(
                f"{where} was made with other settings than those of this run "
                f"({'; '.join(differences)}): give another --output, or the settings of the file"
            )
        return index, sample

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs without a result, the longest prompts first.

        A batch then has prompts of similar length, which need little padding, and a lack of memory
        shows in the first batch.
        """
        missing = [job for job in jobs if (job.index, job.sample) not in self.done]
        return sorted(missing, key=lambda job: -len(job.ids))

    def append(self, results: Iterable[dict[str, Any]]) -> None:
        """Append results, as result_of returns them, each with its provenance in a line. In a
        regular file they are on disk (fsync) when this returns, so a crash loses no text that has
        ended.

        Raises BrokenPipeError if the reader of a pipe has ended, and else OSError, naming the file.
        """
        lines = [json_text(each | self._provenance.fields()) + "\n" for each in results]
        remaining = memoryview("".join(lines).encode())
        try:
            while remaining:  # a call may write only a part
                remaining = remaining[os.write(self._file, remaining) :]
            if self._resumable:
                os.fsync(self._file)
        except BrokenPipeError:  # not an error of the path
            raise
        except OSError as error:
            # Multiplied by a bool: the hint, or "".
            again = "; the same command goes on after the results in it" * self._resumable
            raise OSError(f"{self._path} cannot be written: {error.strerror}{again}") from error

    def __del__(self):
        if hasattr(self, "_file"):  # false if the file could not be opened
            os.close(self._file)


def is_count(value: Any) -> bool:
    """Return whether a JSON value is an integer, 0 or more. JSON's true is not an integer."""
    return type(value) is int and value >= 0


def open_for_results(path: Path) -> int:
    """Open or create the file of results; return a file descriptor to append to.

    O_NONBLOCK makes a named pipe without a reader raise OSError; without it, open would wait for a
    reader for ever. Writes do block. Raises OSError, naming the file, if it cannot be written.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise OSError(f"--output {path} cannot be written: {error.strerror}") from error
    os.set_blocking(file, True)
    return file


class JsonlSink:
    """Appends the result of each text that ends to a ResultsFile, and shows a progress bar.

    todo: the jobs without a stored result. The bar counts tokens, and shows how many texts of all
    jobs have a result.
    """

    def __init__(
        self,
        output: ResultsFile,
        jobs: Sequence[Job],
        counts: FinishCounts,
        generated: Callable[[], int],
    ):
        """jobs: all jobs, also those that have a result. counts: counts each text that ends.
        generated: returns how many tokens this run has generated until now."""
        self.todo = output.missing(jobs)
        self._output, self._counts, self._generated = output, counts, generated
        self._batch: Sequence[Job] = ()
        self._done, self._total = len(jobs) - len(self.todo), len(jobs)
        self._ended_tokens = 0  # tokens of the texts that have ended
        self._limit_of_unfinished = sum(job.limit for job in self.todo)  # tokens

    def __enter__(self) -> "JsonlSink":
        """Show the progress bar. Its total is the sum of the token limits of the jobs to run, and
        falls when a text ends early. __exit__ closes it and reports the counts."""
        # smoothing=0: texts end in bursts, so only the mean rate predicts the remaining time.
        self._bar = tqdm(total=self._limit_of_unfinished, unit="token", smoothing=0)
        self._bar.set_postfix_str(f"{self._done} of {self._total} texts")
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        self._counts.report()

    def begin(self, batch: Sequence[Job]) -> None:
        """Called before a batch is generated."""
        self._batch = batch

    def text(self, row: int, text: str) -> None:
        """Called with the new characters of a row of the batch, which are not used: update the
        bar."""
        self._advance_bar()

    def ended(self, rows: Sequence[int], completions: Sequence[Any]) -> None:
        """Called when the texts of these rows have ended: append their results to the file, and
        update the bar. completions: of all rows of the batch."""
        ended = [(self._batch[row], completions[row]) for row in rows]
        self._output.append(result_of(job, completion) for job, completion in ended)
        for job, completion in ended:
            self._counts.add(job, completion)
            self._ended_tokens += len(completion.ids)
            self._limit_of_unfinished -= job.limit
        self._done += len(rows)
        self._bar.set_postfix_str(f"{self._done} of {self._total} texts", refresh=False)
        self._advance_bar()

    def _advance_bar(self) -> None:
        """Show the tokens generated until now, at most the total. The bar's total, an upper bound
        of the tokens of the texts in todo, falls when a text ends before its limit."""
        self._bar.total = self._ended_tokens + self._limit_of_unfinished
        self._bar.update(min(self._generated(), self._bar.total) - self._bar.n)


RESULT_PREFIX = b'{"index": '  # each line of a ResultsFile begins with these bytes


def result_of(job: Job, completion: Any) -> dict[str, Any]:
    """Return the result of a text that has ended; ResultsFile.append adds the provenance. Its first
    key must be "index": see RESULT_PREFIX."""
    values = {
        "index": job.index,
        "sample": job.sample,
        "prompt": job.prompt,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
    }
    return values | ({"logprobs": completion.logprobs_json()} if completion.logprobs else {})


def complete_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object) for each complete line of a results file.

    When the caller has taken all lines, cut off a last line without a line end, which an
    interrupted run leaves: the next result would be appended to it. Raises ValueError for a line
    that is no JSON object and, before anything is cut, for an incomplete line that is not the
    beginning of a result.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1  # 0 without a line end
    complete, incomplete = content[:end], content[end:]
    for n, line in enumerate(complete.split(b"\n"), 1):
        if line.strip():
            # The second argument is the beginning of the error message.
            value = parse_json(line, f"--output {path} is no result in line {n}: it")
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {n} is no result: give another --output")
            yield n, value
    # The incomplete line may end within RESULT_PREFIX, or be empty.
    if not (incomplete.startswith(RESULT_PREFIX) or RESULT_PREFIX.startswith(incomplete)):
        raise ValueError(f"{path}: the last line is no result: give another --output")
    if incomplete:
        os.truncate(path, len(complete))

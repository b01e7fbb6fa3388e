"""Many prompts at once: a result is in the file as soon as its text ends, whatever ends the run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from cli.options import parse_args
from engine import complete
from generate import GenerationConfig, load_model, main
from model import Transformer
from text import jobs

ROOT = Path(__file__).resolve().parent.parent
DRAFT = ROOT / "checkpoints" / "demo-draft"
TEXTS = (
    "Once upon a time",
    "Lily",
    "Tim had a red ball and",
    "The dog",
    "A cat",
    "One day",
    "Mom said",
    "Ben",
)
# In the demo model's texts, with seed 0: from the 5th token on, one after the other.
ENDS = {"max_new_tokens": 150, "stop": " said"}


class Killed(BaseException):
    """The end of the process, as the process itself sees it: not at all."""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A run of all texts in batches of 5, to an --output that is to be named."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    options = {"device": "cpu", "dtype": "float32", "prompts": file, "batch_size": 5} | ENDS
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture
def before_each_step() -> Iterator[list[Callable[[], Any]]]:
    """What is called before each call of a model."""
    calls: list[Callable[[], Any]] = []

    def hook(module: torch.nn.Module, given: tuple) -> None:
        if isinstance(module, Transformer):
            for call in calls:
                call()

    handle = register_module_forward_pre_hook(hook)
    yield calls
    handle.remove()


def lines(path: Path) -> list[dict]:
    """The results in a file, each of which must be there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["index"] for line in found}) == len(found)
    return sorted(found, key=lambda line: line["index"])


def test_a_result_is_in_the_file_before_the_step_after_its_end(
    tmp_path: Path, before_each_step: list, monkeypatch: pytest.MonkeyPatch
):
    lm = load_model(device="cpu", dtype=torch.float32)
    config = GenerationConfig(**(ENDS | {"stop": (ENDS["stop"],)}))
    encoded = [(text, lm.tokenizer.encode(text)) for text in TEXTS]
    todo = jobs.make_jobs(encoded, 1, config.max_new_tokens, lm.model.args.context)
    prompts = [job.ids for job in todo]
    wanted = complete(lm, prompts, config)
    ends = [len(completion.ids) for completion in wanted]
    assert len(set(ends)) > 5 and {c.finish_reason for c in wanted} == {"stop", "eos", "length"}
    output, seen, synced = tmp_path / "out.jsonl", [], []
    monkeypatch.setattr(jobs.os, "fsync", synced.append)
    before_each_step.append(lambda: seen.append([line["index"] for line in lines(output)]))
    file = jobs.ResultsFile(output, TEXTS, 1, jobs.Provenance("demo", "0", {}))
    with jobs.JsonlSink(file, todo, jobs.FinishCounts(config.max_new_tokens), lambda: 0) as sink:
        assert sink.todo != todo  # the longest first
        sink.begin(todo)
        complete(lm, prompts, config, on_end=sink.ended)
    for step, indices in enumerate(seen):
        assert indices == [index for index, end in enumerate(ends) if end <= step]
    assert [line["text"] for line in lines(output)] == [c.text for c in wanted]
    assert len(synced) == len(set(ends))


@pytest.mark.parametrize("draft", [[], ["--draft_checkpoint_path", str(DRAFT)]], ids=["", "draft"])
def test_a_run_that_dies_in_any_step_is_taken_up_without_loss(
    command: list[str], draft: list[str], tmp_path: Path, before_each_step: list
):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(parse_args([*command, "--output", str(whole)])) == 0
    left, lived = 0, []

    def die() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    before_each_step.append(die)
    for steps in (1, 8, 20, 66, 50, 0):
        left, held = steps, output.read_bytes() if output.exists() else b""
        try:
            assert main(parse_args([*command, *draft, "--output", str(output)])) == 0
            lived.append(steps)
        except Killed:
            pass
        assert output.read_bytes().startswith(held)
        assert [line for line in lines(whole) if line in lines(output)] == lines(output)
    assert lived[-1:] == [0]
    assert lines(output) == lines(whole)
    assert len(lines(whole)) == len(TEXTS)


# The command, which waits to be killed once it has written a result.
WAITING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from text import jobs
from generate import main
from cli.options import parse_args

ended = jobs.JsonlSink.ended

def wait(*given):
    ended(*given)
    os.kill(os.getpid(), signal.SIGSTOP)

jobs.JsonlSink.ended = wait
main(parse_args(sys.argv[1:]))
"""


def test_a_run_that_is_killed_within_a_batch_is_taken_up_without_loss(
    command: list[str], tmp_path: Path
):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(parse_args([*command, "--output", str(whole)])) == 0
    script = [sys.executable, str(ROOT / "generate.py"), *command, "--output", str(output)]
    waiting = [sys.executable, "-c", WAITING.format(root=str(ROOT)), *script[2:]]
    counts = [0]
    for _ in range(2):
        process = subprocess.Popen(waiting, stderr=subprocess.DEVNULL)
        os.waitpid(process.pid, os.WUNTRACED)
        process.kill()
        process.wait()
        counts.append(len(complete_lines(output)))
    assert 0 < counts[1] < 5 and counts[1] < counts[2] < len(TEXTS)  # within batches of 5
    assert subprocess.run(script, stderr=subprocess.DEVNULL).returncode == 0
    assert lines(output) == lines(whole)
    assert len(lines(whole)) == len(TEXTS)


def complete_lines(path: Path) -> Sequence[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def test_the_bar_counts_tokens_and_ends_full(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
):
    shown: list[tuple[int, int, str]] = []

    class Bar(jobs.tqdm):
        def update(self, n: int) -> None:
            super().update(n)
            shown.append((self.n, self.total, str(self)))

    monkeypatch.setattr(jobs, "tqdm", Bar)
    output = tmp_path / "out.jsonl"
    for kept in (0, 2):
        shown.clear()
        output.write_bytes(b"".join(line + b"\n" for line in complete_lines(output)[:kept]))
        assert main(parse_args([*command, "--output", str(output)])) == 0
        tokens = sum(json.loads(line)["tokens"] for line in complete_lines(output)[kept:])
        assert shown[-1][:2] == (tokens, tokens) and "8 of 8 texts" in shown[-1][2]
        totals = [total for _, total, _ in shown]
        assert totals == sorted(totals, reverse=True) and totals[0] <= 150 * (8 - kept)
        assert len({n for n, _, text in shown if f"{kept} of 8 texts" in text}) > 2
    assert "of 6 texts ended at --max_new_tokens 150" in capsys.readouterr().err

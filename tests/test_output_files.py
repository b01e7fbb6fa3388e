"""Files of prompts, results and measurements as people have them: what is read, what is refused."""

import argparse
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench
import eval as evaluation
import plan
from cli.arguments import documents
from cli.options import parse_args
from evaluation.perplexity import limited_count
from generate import main
from host import files, measurements, memory
from text import jobs
from tiers.direct_io import ScratchFile, nearest_directory

ROOT = Path(__file__).resolve().parent.parent
OPT = ROOT / "checkpoints" / "demo-opt"
PROMPTS = ["Once upon a time", "Lily", "Tim"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def run(prompts: Path, output: Path | str, *options: object) -> int:
    words = "--device", "cpu", "--prompts", prompts, "--output", output, "--max_new_tokens", 4
    return main(parse_args([str(word) for word in (*words, *options)]))


def refused(capsys: pytest.CaptureFixture, code: int) -> str:
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str):
    lines = PROMPTS if suffix == ".txt" else [json.dumps(text) for text in PROMPTS]
    file = tmp_path / f"prompts{suffix}"
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    assert jobs.read_prompts(file) == PROMPTS


def test_rows_are_texts_or_conversations(tmp_path: Path):
    messages = [{"role": "user", "content": "Hi"}]
    rows = ["text", {"prompt": "text"}, {"messages": messages}, messages]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert jobs.read_prompts(file, chat=True) == ["text", "text", messages, messages]
    with pytest.raises(
        ValueError, match="line 3 holds the messages of a conversation: give --chat"
    ):
        jobs.read_prompts(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"a"\n""', r"line 2: the prompt is empty"),
        (b'"a"\n{"prompt": ""}', r"line 2: the prompt is empty"),
        (b'"a"\n' + b"[" * 100_000, r"line 2 is nested too deeply"),
        (b'"a"\n"\\ud800x"', r"line 2 has half of a surrogate pair"),
        (b'"a"\n"caf\xe9"', r"line 2: byte 0xe9 is not UTF-8"),
        (b'{"prompt": 5}', r"line 1 is not a string, an object"),
        (b'{"messages": [{"role": "user"}]}', r"line 1: message 1 of 1"),
        (b'"a', r"line 1 is not valid JSON"),
        (b"\xef\xbb\xbf\n", r"holds no prompt"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.jsonl.*{message}") as caught:
        jobs.read_prompts(file, chat=True)
    assert "\n" not in str(caught.value)


def test_results_of_another_model_or_of_other_settings_are_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "out.jsonl"
    assert run(prompts, output) == 0
    written = output.read_bytes()
    row = json.loads(written.splitlines()[0])
    assert row["model"].endswith("checkpoints/demo") and row["settings"]["seed"] == 0
    assert row["finish_reason"] == "length"
    said = refused(capsys, run(prompts, output, "--checkpoint_path", OPT, "--max_new_tokens", 40))
    assert "checkpoints/demo -> " in said and "demo-opt" in said
    assert "max_new_tokens 4 -> 40" in said and "give another --output" in said
    assert "seed 0 -> 1" in refused(capsys, run(prompts, output, "--seed", 1))
    prompts.write_text("\n".join(["Ben", *PROMPTS[1:]]))
    assert "'Once upon a time'" in refused(capsys, run(prompts, output))
    assert output.read_bytes() == written
    prompts.write_text("\n".join([*PROMPTS, "Ben"]))  # one more: the same file goes on
    assert run(prompts, output) == 0
    assert output.read_bytes().startswith(written) and output.read_bytes().count(b"\n") == 4
    assert run(prompts, output) == 0
    assert "has all 4 results already" in capsys.readouterr().err


def test_the_same_model_is_known_under_another_path(tmp_path: Path, prompts: Path):
    output, link = tmp_path / "out.jsonl", tmp_path / "model"
    assert run(prompts, output, "--checkpoint_path", OPT) == 0
    link.symlink_to(OPT)
    assert run(prompts, output, "--checkpoint_path", link) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"index": [0]},
        {"index": {}},
        {"index": True},
        {"index": -1},
        {"sample": None},
        {"text": None},
        {"settings": 5},
        {"checkpoint": []},
    ],
)
def test_a_row_of_a_wrong_type_is_refused(tmp_path: Path, change: dict[str, Any]):
    origin = jobs.Provenance("demo", "0", {"seed": 0})
    row = {"index": 0, "sample": 0, "prompt": "Lily", "text": "."} | origin.fields()
    file = tmp_path / "out.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert jobs.ResultsFile(file, ["Lily"], 1, origin).done == {(0, 0)}
    file.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=r"line 1 (is no result|was made with other)"):
        jobs.ResultsFile(file, ["Lily"], 1, origin)


@pytest.mark.parametrize("content", ["[" * 99_999 + "\n", '[["index", 0]]\n', "5\n", "\xff\n"])
def test_a_file_that_is_no_results_is_left_as_it_is(tmp_path: Path, content: str):
    file = tmp_path / "out.jsonl"
    file.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=r"out.jsonl.* is no result"):
        jobs.ResultsFile(file, ["Lily"], 1, jobs.Provenance("demo", "0", {}))
    assert file.read_bytes() == content.encode("latin1")


def test_results_of_a_version_that_kept_no_settings_are_refused(tmp_path: Path):
    file = tmp_path / "out.jsonl"
    file.write_text('{"index": 0, "sample": 0, "prompt": "Lily", "text": "."}\n')
    with pytest.raises(ValueError, match="does not say which model and settings made it"):
        jobs.ResultsFile(file, ["Lily"], 1, jobs.Provenance("demo", "0", {}))


def test_devices_and_pipes_take_results(prompts: Path, tmp_path: Path, capfd: Any):
    assert run(prompts, "/dev/null") == 0
    pipe, taken = tmp_path / "pipe", []
    os.mkfifo(pipe)
    assert "cannot be written" in refused(capfd, run(prompts, pipe))  # nobody reads it
    reader = threading.Thread(target=lambda: taken.append(pipe.read_text()))
    reader.start()
    while run(prompts, pipe) == 2:
        pass  # the reader has not opened it yet
    reader.join(60)
    assert [json.loads(line)["index"] for line in sorted(taken[0].splitlines())] == [0, 1, 2]


def test_stdout_in_a_pipe_takes_results(prompts: Path):
    command = [sys.executable, ROOT / "generate.py", "--device", "cpu", "--max_new_tokens", "4"]
    command += ["--prompts", prompts, "--output", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 3


def test_line_ends_of_windows_are_no_text(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfOnce\r\n\r\nThe dog\r\n")
    assert jobs.read_prompts(file) == ["Once", "The dog"]


def test_what_takes_no_results_is_said_before_a_model_is_loaded(prompts: Path, tmp_path: Path):
    for output in (tmp_path, tmp_path / "none" / "out.jsonl", prompts / "out.jsonl"):
        origin = jobs.Provenance("demo", "", {})
        with pytest.raises(OSError, match=f"--output {output} cannot be written"):
            jobs.ResultsFile(output, ["Once"], 1, origin)


def test_a_full_disk_is_named_and_the_run_goes_on_later(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    assert "/dev/full cannot be written: No space" in refused(capsys, run(prompts, "/dev/full"))
    output, write, calls = tmp_path / "out.jsonl", os.write, []

    def full(file: int, data: memoryview) -> int:
        """The disk takes half of the second result."""
        calls.append(len(data))
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data if len(calls) == 1 else data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(jobs.os, "write", full)
        said = refused(capsys, run(prompts, output, "--batch_size", 1))
    assert f"{output} cannot be written: No space" in said and "same command goes on" in said
    assert run(prompts, output, "--batch_size", 1) == 0
    assert len([json.loads(line) for line in output.read_text().splitlines()]) == 3


def test_figures_reach_stdout_if_no_file_takes_them(capsys: pytest.CaptureFixture):
    with pytest.raises(OSError, match="/dev/full cannot be written: No space"):
        evaluation.write({"perplexity": 4.5, "text": "\udcff"}, Path("/dev/full"))
    assert json.loads(capsys.readouterr().out)["perplexity"] == 4.5


def test_a_file_is_written_if_stdout_takes_nothing(tmp_path: Path, monkeypatch: Any):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(OSError, match="No space"):
            evaluation.write({"text": "\ud800"}, tmp_path / "x.json")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert json.loads((tmp_path / "x.json").read_text()) == {"text": "\ud800"}


def test_a_place_that_takes_no_figures_is_said_before_the_work(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(evaluation, "run", lambda args: pytest.fail("it worked"))
    text = tmp_path / "text"
    text.write_text("Lily")
    for output in (tmp_path, tmp_path / "none" / "x.json", text / "x.json"):
        words = ["--perplexity", str(text), "--output", str(output)]
        assert evaluation.main(evaluation.parse_args(words)) == 2
    files.check_writable(Path("/dev/null"))
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(("limit", "left"), [("0.1", 2), ("0.99", 20), ("1", 1), ("7", 7)])
def test_a_limit_is_a_number_or_a_share(limit: str, left: int):
    """As lm_eval: of 20 documents a share is rounded up."""
    assert limited_count(documents(limit), 20) == min(left, 20)


@pytest.mark.parametrize("limit", ["0", "1.5", "nan", "-0.1", "inf", "-3"])
def test_what_is_no_limit(limit: str):
    with pytest.raises((argparse.ArgumentTypeError, OverflowError)):
        documents(limit)


@pytest.mark.parametrize(
    "shares", ["nan 0 100 0 100 0", "inf 0 100 0 100 0", "-1 0 100 0 100 0", "100 0 60 50 100 0"]
)
def test_shares_that_are_none_are_refused(shares: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse_args(["--percent", *shares.split()])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "percent" in said and ("from 0 to 100" in said or "110 % of the" in said)


def test_without_a_home_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measurements.save_measurement("speed", (1, "a"), {"x": 1.5})
    assert measurements.load_measurement("speed", (1, "a")) == {"x": 1.5}
    assert measurements.load_measurement("speed", (2, "a")) is None
    next((tmp_path / "gpt-flex").iterdir()).write_text("damaged")
    assert measurements.load_measurement("speed", (1, "a")) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    measurements.save_measurement("speed", 1, 2)
    assert "not kept" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification ignores it
    monkeypatch.setattr(measurements.Path, "home", no_home)
    assert (
        measurements.cache_directory() is None and measurements.load_measurement("speed", 1) is None
    )
    measurements.save_measurement("speed", 1, 2)
    assert "no home directory" in capsys.readouterr().err


def test_scratch_leaves_no_directory_and_says_what_a_file_is(tmp_path: Path):
    scratch = ScratchFile(tmp_path / "a" / "b", 4096)
    assert os.fstat(scratch.fileno()).st_size == 4096 and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file: --offload_dir needs a dir"):
            nearest_directory(path)
    with pytest.raises(ValueError, match="GB free and .* choose another --offload_dir"):
        ScratchFile(tmp_path, 2**60)


def test_a_disk_that_fills_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*given: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"{tmp_path} takes no file .*No space left.*--offload_dir"):
        ScratchFile(tmp_path, 4096)


def stats(weights: int) -> bench.Stats:
    model = SimpleNamespace(
        bytes_per_step=lambda: weights, kv_bytes=lambda n: n, kv_slots=lambda n: n
    )
    made = bench.Stats(SimpleNamespace(model=model, draft=None, device=torch.device("cpu")))
    made.decoded_tokens, made.decode_seconds, made.decoded_bytes = 10, 1.0, 10 * weights
    return made


def test_only_what_memory_is_read_for_is_compared_with_memory(tmp_path: Path, monkeypatch: Any):
    for cpu, cpus in enumerate(("0-1", "0-1", "2")):  # two caches of the third level
        index = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        index.mkdir(parents=True)
        for name, value in (("level", "3"), ("shared_cpu_list", cpus), ("size", "1024K")):
            (index / name).write_text(value + "\n")
    assert memory.cache_bytes(torch.device("cpu"), tmp_path) == 2 * 2**20
    assert memory.cache_bytes(torch.device("cpu"), tmp_path / "none") == memory.CPU_CACHE_BYTES
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 2**20)
    assert "measured here" in list(stats(2**22).report(1e9))[-1]
    assert "per token" in list(stats(2**22).report(None))[-1]
    assert "measured" not in list(stats(2**22).report(None))[-1]
    assert list(stats(2**20).report(1e9))[-1].endswith("10.0 tokens/s")


def test_provenance_needs_neither_git_nor_proc(monkeypatch: pytest.MonkeyPatch):
    def absent(*given: Any, **options: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(bench.subprocess, "run", absent)
    monkeypatch.setattr(bench.Path, "read_text", absent)
    assert bench.provenance(torch.device("cpu"))["commit"] == "unknown"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (1.5, "1.5 s"), (25.6, "25.6 s"), (2437, "40.6 min"), (4e5, "4.63 days")],
)
def test_durations_are_for_people(seconds: float, text: str):
    assert plan.duration_text(seconds) == text

"""The command, as its user meets it: streams, files, interruptions and mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.options import parse_args
from generate import main
from text.jobs import read_prompts

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"
COMMAND = [sys.executable, str(ROOT / "generate.py"), "--device", "cpu"]
CONFIG = str(DEMO / "config.json")


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True)


def in_process(*args: object) -> int:
    """The command without its start-up: for runs that end by themselves."""
    return main(parse_args(["--device", "cpu", *map(str, args)]))


def results(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["index"], line["sample"]))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\n\nLily\nTim had a red ball and\nThe dog\nA cat\n")
    return file


def test_the_demo_tells_a_story_on_stdout_and_all_else_goes_to_stderr():
    done = run("--max_new_tokens", 30)
    assert done.returncode == 0
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 60
    for word in (
        "loaded in",
        "prefill: 5 tokens",
        "decode: 29 tokens",
        "ended at --max_new_tokens 30",
    ):
        assert word in done.stderr
    assert "tokens/s" not in done.stdout


def test_prompts_and_samples_come_in_order(capsys: pytest.CaptureFixture):
    options = ("--prompt", "Once", "--prompt", "Lily", "--num_samples", 2, "--max_new_tokens", 8)
    assert in_process(*options, "--batch_size", 3) == 0
    texts = [text.split("\n", 1)[1] for text in capsys.readouterr().out.split("--- ")[1:]]
    assert [text.split()[0][:4] for text in texts] == ["Once", "Once", "Lily", "Lily"]
    assert len(set(texts)) == 4
    assert in_process(*options, "--batch_size", 1) == 0
    assert [t.split("\n", 1)[1] for t in capsys.readouterr().out.split("--- ")[1:]] == texts


@pytest.mark.parametrize(
    "draft",
    [
        ["--draft", "ngram"],
        ["--draft", "self-int4", "--speculate_k", "3"],
        ["--draft_checkpoint_path", str(ROOT / "checkpoints" / "demo-draft")],
    ],
    ids=lambda draft: draft[1].rpartition("/")[2],
)
def test_a_draft_changes_no_text_and_says_what_it_was_worth(
    draft: list[str], capsys: pytest.CaptureFixture
):
    options = ("--prompt", "Once", "--prompt", "Lily", "--num_samples", 2, "--max_new_tokens", 90)
    assert in_process(*options, "--dtype", "float32") == 0
    plain = capsys.readouterr().out
    assert in_process(*options, "--dtype", "float32", *draft) == 0
    captured = capsys.readouterr()
    assert captured.out == plain
    line = r"speculation: \d+ cycles .* accepted \(\d+%\), \d+\.\d\dx plain"
    assert re.search(line, captured.err)
    assert ("draft: reads" in captured.err) == ("ngram" not in draft)


def test_the_same_seed_gives_the_same_text(capsys: pytest.CaptureFixture):
    texts = []
    for seed in (1, 1, 2):
        assert in_process("--max_new_tokens", 20, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_of_prompts_gives_a_line_of_json_for_each(prompts: Path, suffix: str):
    texts = [line for line in prompts.read_text().splitlines() if line]
    if suffix == ".jsonl":
        forms = [json.dumps(t) if n % 2 else json.dumps({"prompt": t}) for n, t in enumerate(texts)]
        prompts = prompts.with_suffix(suffix)
        prompts.write_text("\n".join(forms))
    output = prompts.with_name("out.jsonl")
    options = ("--output", output, "--max_new_tokens", 6, "--batch_size", 2)
    assert in_process("--prompts", prompts, *options) == 0
    assert [r["prompt"] for r in results(output)] == texts
    assert {r["tokens"] for r in results(output)} == {6}
    written = output.read_bytes()
    assert in_process("--prompts", prompts, *options) == 0  # all there: nothing to do
    assert output.read_bytes() == written


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_only_a_line_end_ends_a_prompt(tmp_path: Path, suffix: str):
    texts = ["Once\u2028upon", "a\x0btime\x85there", "was"]
    forms = texts if suffix == ".txt" else [json.dumps(t, ensure_ascii=False) for t in texts]
    file = tmp_path / f"prompts{suffix}"
    file.write_text("\n".join(forms) + "\n", encoding="utf-8")
    assert read_prompts(file) == texts


def test_a_run_that_broke_off_is_taken_up_where_it_stopped(prompts: Path):
    whole, cut = prompts.with_name("whole.jsonl"), prompts.with_name("cut.jsonl")
    options = ("--prompts", prompts, "--max_new_tokens", 6, "--batch_size", 2, "--num_samples", 2)
    assert in_process(*options, "--output", whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:3]) + lines[3][:-9])  # killed within the fourth line
    assert in_process(*options, "--output", cut) == 0
    assert results(cut) == results(whole)
    assert cut.read_bytes().startswith(b"".join(lines[:3]))


def test_a_file_that_is_no_output_is_left_alone(prompts: Path, capsys: pytest.CaptureFixture):
    for content in ("notes without a line end", '{"a": 1}\n', "first line\nsecond"):
        notes = prompts.with_name("notes.jsonl")
        notes.write_text(content)
        assert in_process("--prompts", prompts, "--output", notes) == 2
        assert notes.read_text() == content
        assert "notes.jsonl" in capsys.readouterr().err.splitlines()[-1]


def started(*args: object, **options: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, args)], **pipes, **options)


def test_ctrl_c_in_a_stream_ends_it_cleanly():
    process = started("--max_new_tokens", 450, "--ignore_eos")
    assert process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert b"Traceback" not in err


def test_ctrl_c_leaves_whole_lines_in_the_output(tmp_path: Path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(f"Story {n}" for n in range(200)))
    options = ("--prompts", prompts, "--output", output, "--batch_size", 2)
    process = started(*options, "--max_new_tokens", 30)
    deadline = time.monotonic() + 60
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert 0 < len(results(output)) < 200
    assert output.read_bytes().endswith(b"\n")


def test_a_closed_pipe_ends_the_run():
    process = started("--max_new_tokens", 450, "--ignore_eos")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err and b"Exception" not in err
    assert b"output was closed" in err


def broken(tmp_path: Path, change: str) -> Path:
    """A copy of the demo with one thing wrong."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in DEMO.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if change == "truncated":
        os.truncate(folder / "model.safetensors", 100_000)
    if change == "vocabulary":
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 2000}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "args, said",
    [
        (["--checkpoint_path", "nowhere"], "nowhere does not exist; .* holds: .*README.md"),
        (["--checkpoint_path", "{truncated}"], "is 100000 bytes long and should be 5[0-9]{6}"),
        (["--checkpoint_path", "{vocabulary}"], r"\[2048, 256\] and should have \[2000, 256\]"),
        (["--random_weights", "{config}", "--prompt", "600"], "600 tokens .* context is 512"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "{config}"], "neither .txt nor .jsonl"),
        (["--output", "nowhere/out.jsonl"], "nowhere/out.jsonl"),
        (["--output", "{config}"], "is no result|answers none"),
        (["--draft_checkpoint_path", "nowhere"], "nowhere does not exist"),
        (["--temperature", "-1"], "temperature is -1.0 and must be a number, 0 or more"),
        (["--device", "cuda:99"], "no device cuda:99"),
        (["--device", "abacus"], "no device abacus here; there is"),
        (["--random_weights", "{config}", "--prompt", "text"], "number of tokens"),
        (["--random_weights", "nowhere.json", "--prompt", "5"], "nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    copies = {"{config}": tmp_path / "copy.json"}
    copies["{config}"].write_text(Path(CONFIG).read_text())
    for change in ("truncated", "vocabulary"):
        if f"{{{change}}}" in args:
            copies[f"{{{change}}}"] = broken(tmp_path, change)
    assert in_process(*[copies.get(arg, arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("generate.py: ")
    assert re.search(said, last), last
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--abacus"], "unrecognized"),
        (["--num_samples", "0"], "at least 1"),
        (["--top_k", "many"], "invalid int"),
        (["--dtype", "float8"], "invalid choice"),
        (["--draft", "self-int2"], "invalid choice"),
        (["--draft", "ngram", "--speculate_k", "0"], "0 is not at least 1"),
        (["--draft", "ngram", "--speculate_k", "16"], "16 is more than 15: give a smaller number"),
        (["--draft", "ngram", "--speculate_k", "some"], "some is neither auto nor a number"),
        (["--speculate_k", "4"], "--speculate_k needs --draft or --draft_checkpoint_path"),
        (["--draft", "ngram", "--draft_checkpoint_path", "x"], "not both"),
        (["--json"], "--json needs --bench"),
        (["--compile_prefill"], "--compile_prefill needs --compile"),
        (["--prompt", "a", "--prompts", "b"], "not both"),
        (["--bench", "--prompt", "text"], "number of tokens"),
        (["--bench", "--prompt", "4", "--prompt", "5"], "one number of tokens"),
        (["--bench", "--output", "x.jsonl"], "--output or --bench, not both"),
        (["--interactive", "--prompt", "Once"], "--prompt or --interactive, not both"),
        (["--checkpoint_path", "a", "--random_weights", "b"], "not both"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    args: list[str], said: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as stopped:
        parse_args(args)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_too_little_memory_is_said_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("host.memory.available_memory", lambda device: 10_000_000)
    assert in_process("--num_samples", 64, "--batch_size", 64, "--max_new_tokens", 400) == 2
    assert "a KV cache of 64 rows of 512 tokens needs 67.1 MB" in capsys.readouterr().err


def test_bench_ends_in_a_line_of_json(capsys: pytest.CaptureFixture):
    options = ("--prompt", 16, "--max_new_tokens", 4, "--repeats", 2, "--batch_size", 2)
    assert in_process("--bench", "--json", *options, "--random_weights", CONFIG) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out.splitlines()[-1])
    assert {name: len(runs) for name, runs in figures["tokens_per_s"].items()} == {
        "pp16": 2,
        "tg4": 2,
    }
    assert figures["batch"] == 2 and figures["read_bytes_per_s"] > 0
    assert "pp16" in captured.err and "ceiling" in captured.err


def test_bench_fits_the_context(capsys: pytest.CaptureFixture):
    assert in_process("--bench", "--json", "--max_new_tokens", 2, "--repeats", 1) == 0
    assert json.loads(capsys.readouterr().out)["prompt_length"] == 256  # half of 512
    assert in_process("--bench", "--seed", 2**64, "--max_new_tokens", 2, "--repeats", 1) == 0
    assert in_process("--bench", "--prompt", 500, "--max_new_tokens", 20) == 2
    assert "500 and 20 tokens do not fit" in capsys.readouterr().err


def test_random_weights_print_ids(capsys: pytest.CaptureFixture):
    options = ("--prompt", 7, "--max_new_tokens", 5, "--random_weights", CONFIG)
    assert in_process(*options) == 0
    assert all(word.isdecimal() for word in capsys.readouterr().out.split())


def test_a_profile_is_written(tmp_path: Path):
    assert in_process("--max_new_tokens", 2, "--profile", tmp_path / "trace.json") == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_conversation_over_a_pipe_ends_with_its_input():
    turns = "Once upon a time\n\n/reset\nLily had\nShe said\n"
    done = subprocess.run(
        [*COMMAND, "--interactive", "--max_new_tokens", "8"],
        input=turns,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 3
    assert "prefill:" in done.stderr and "Traceback" not in done.stderr

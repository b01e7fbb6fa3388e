"""What a new user tries first: names, pipes, chat, defaults of the model, quiet runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli.options import parse_args
from generate import main
from host.threads import free_threads, quotas, set_threads
from load import load_model

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"
COMMAND = [sys.executable, str(ROOT / "generate.py"), "--device", "cpu", "--max_new_tokens", "6"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
)


def run(*args: object, shell: str = "", **options: object) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, args)]
    if shell:  # redirections, after the command
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(command, capture_output=True, text=True, **options)


def in_process(*args: object) -> int:
    given = ["--device", "cpu", "--temperature", "0", "--max_new_tokens", "6", *map(str, args)]
    return main(parse_args(given))


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """The demo with a chat template and a generation_config.json."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("script", "package"),
    [("generate.py --prompt x", "torch"), ("scripts/download.py --repo_id A/B", "huggingface_hub")],
)
def test_a_missing_package_is_one_line_with_the_remedy(script: str, package: str):
    command = [sys.executable, "-S", *script.split()]  # -S: without installed packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert f"No module named '{package}': run ./scripts/setup.sh" in line


def test_a_missing_file_is_named_without_a_number(tmp_path: Path):
    done = run("--model", DEMO, "--prompts", tmp_path / "none.txt")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"{tmp_path}/none.txt: No such file or directory")


def test_the_prompt_comes_through_a_pipe_or_from_a_file(tmp_path: Path):
    text = "The big dog\nsaid"
    piped = run("--temperature", 0, input=f"{text}\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.startswith(text) and len(piped.stdout) > len(text) + 5
    file = tmp_path / "prompt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert run("--temperature", 0, "--prompt_file", file).stdout == piped.stdout
    empty = run(input="\n")
    assert empty.returncode == 2 and "the prompt is empty" in empty.stderr
    wrong = run("--prompt_file", file.with_name("latin"), shell="")
    assert wrong.returncode == 2 and "latin" in wrong.stderr.splitlines()[-1]


def test_bytes_of_a_pipe_that_are_no_text_are_refused():
    done = subprocess.run(COMMAND, input=b"good\ncaf\xe9\n", capture_output=True)
    assert done.returncode == 2
    assert b"standard input, line 2: byte 0xe9 is not UTF-8" in done.stderr.splitlines()[-1]


def test_a_number_is_a_text(capsys: pytest.CaptureFixture):
    assert in_process("--prompt", "42") == 0
    assert capsys.readouterr().out.startswith("42")


def test_quiet_runs_say_nothing_but_the_text():
    done = run("--quiet", stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Once upon a time")
    wrong = run("--quiet", "--model", "nowhere/at_all.pth", stdin=subprocess.DEVNULL)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1


def test_quiet_runs_show_no_progress_bar(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("Once\nLily\n")
    files = "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "results.jsonl"
    loud = run(*files)
    assert loud.returncode == 0 and "2 of 2 texts" in loud.stderr
    (tmp_path / "results.jsonl").unlink()
    done = run("--quiet", *files)
    assert done.returncode == 0 and (done.stdout, done.stderr) == ("", "")


def test_closed_streams(tmp_path: Path):
    done = run(shell=">&-")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    done = run("--interactive", shell="<&-")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    done = run(shell="2>&- <&-")
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time")
    assert "tokens/s" not in done.stdout and len(done.stdout.splitlines()) == 1
    done = run("--max_new_tokens", 400, "--ignore_eos", shell="2>&1 | true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 141


def test_chat_applies_the_template(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert in_process("--model", chat_model, "--prompt", "Hello") == 0
    assert "--chat applies it" in capsys.readouterr().err
    assert in_process("--model", chat_model, "--prompt", "user: Hello\n") == 0
    plain = capsys.readouterr().out.removeprefix("user: Hello\n")
    assert in_process("--model", chat_model, "--prompt", "Hello", "--chat") == 0
    captured = capsys.readouterr()
    assert captured.out == plain and "--chat applies" not in captured.err
    assert in_process("--model", chat_model, "--prompt", "system: Be kind\nuser: Hello\n") == 0
    plain = capsys.readouterr().out.partition("Hello\n")[2]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    prompts.write_text("\n".join(map(json.dumps, ({"messages": messages}, "Hello"))))
    options = ("--model", chat_model, "--prompts", prompts, "--output", output)
    assert in_process(*options, "--system", "Be kind") == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["text"] for row in rows} == {plain.removesuffix("\n")}
    capsys.readouterr()
    assert in_process(*options) == 2  # without --chat a row of messages is no prompt
    assert "prompts.jsonl, line 1" in capsys.readouterr().err


def test_a_model_brings_its_sampling_defaults(chat_model: Path, capsys: pytest.CaptureFixture):
    texts = {}
    for name, values in {
        "none": None,
        "greedy": {"do_sample": False, "temperature": 0.9},
        "hot": {"do_sample": True, "temperature": 5.0, "top_k": 0},
    }.items():
        file = chat_model / "generation_config.json"
        file.unlink(missing_ok=True)
        if values:
            file.write_text(json.dumps(values))
        given = ["--device", "cpu", "--model", str(chat_model), "--max_new_tokens", "12"]
        assert main(parse_args(given)) == 0
        captured = capsys.readouterr()
        texts[name] = captured.out
        assert ("generation_config.json" in captured.err) == (values is not None)
    assert len(set(texts.values())) == 3
    assert main(parse_args([*given, "--temperature", "0"])) == 0  # top_k of 0 changes nothing then
    assert capsys.readouterr().out == texts["greedy"]


def test_log_probabilities_are_written(tmp_path: Path):
    output = tmp_path / "out.jsonl"
    assert in_process("--prompt", "Once", "--output", output, "--logprobs", 2) == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert len(row["logprobs"]) == row["tokens"] == 6
    assert all(len(entry["top"]) == 2 for entry in row["logprobs"])
    for entry in row["logprobs"]:  # greedy: what was chosen is the likeliest
        assert entry["top"][0]["id"] == entry["id"] and entry["logprob"] <= 0


def test_penalties_and_biases_are_options(capsys: pytest.CaptureFixture):
    assert in_process() == 0
    plain = capsys.readouterr().out
    token = load_model(device="cpu").tokenizer.encode(plain, bos=False)[4]
    assert in_process("--logit_bias", f"{token}=-inf") == 0
    assert capsys.readouterr().out != plain
    assert in_process("--repetition_penalty", 5) == 0
    assert capsys.readouterr().out != plain


def test_a_profile_nowhere_is_refused_before_the_work(capsys: pytest.CaptureFixture):
    assert in_process("--profile", "nodir/trace.json") == 2
    captured = capsys.readouterr()
    assert "there is no directory nodir" in captured.err and captured.out == ""


def test_dtypes_have_names():
    assert load_model(device="cpu", dtype="float32").model.norm.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype float8 is not one of bfloat16, float16, float32"):
        load_model(device="cpu", dtype="float8")


def test_threads_are_those_that_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert 1 <= free_threads() <= os.cpu_count()
    own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip("/\n")
    group = tmp_path / own
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr("host.threads.CGROUPS", tmp_path)
    assert list(quotas()) == [2]
    (group / "cpu.max").write_text("max 100000\n")
    assert list(quotas()) == []


def test_a_core_gets_one_thread(monkeypatch: pytest.MonkeyPatch):
    """Two threads on a core share its units. A number that is given is not reduced, and the cores
    need not be counted."""
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("host.threads.free_threads", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for cores in (8, None):
        has = {"num_physical_cores": cores}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        set_threads(None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: pytest.fail("counted"))
    set_threads(16)
    assert chosen == [8, 12, 16]


def test_the_number_of_threads_is_an_option():
    before = torch.get_num_threads()
    try:
        assert in_process("--threads", 1) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)

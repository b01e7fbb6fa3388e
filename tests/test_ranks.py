"""The commands under torchrun: rank 0 alone prints and writes; errors are reported once."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import eval as evaluate
import generate
from cli import arguments, options

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "ranks_worker.py"
DEMO = str(ROOT / "checkpoints" / "demo")
OPT = str(ROOT / "checkpoints" / "demo-opt")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
EXACT = ["--device", "cpu", "--dtype", "float32"]
GREEDY = ["--temperature", "0", "--max_new_tokens", "12", *EXACT]
SECONDS = 300  # of a job

Run = Callable[..., subprocess.CompletedProcess]


def environment() -> dict[str, str]:
    """Return the environment without torchrun's variables, as in a user's shell."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    """A process that starts ranks as torchrun does, but has imported torch already."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, str(WORKER)], cwd=ROOT, env=environment(), start_new_session=True, **pipes
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def on_ranks(server: subprocess.Popen, tmp_path: Path) -> Run:
    """A function that runs a command on ranks, and returns what torchrun returns and prints."""

    def run(*words: str, count: int = 2) -> subprocess.CompletedProcess:
        streams = [tmp_path / "stdout", tmp_path / "stderr"]
        for file in streams:
            file.write_text("")
        print(json.dumps([count, words, *map(str, streams)]), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            os.killpg(server.pid, signal.SIGKILL)
        code = server.stdout.readline()
        printed = [file.read_text() for file in streams]
        assert code, f"{SECONDS} seconds, or a server that has ended: {printed}"
        return subprocess.CompletedProcess(words, int(code), *printed)

    return run


def alone(capfd: pytest.CaptureFixture, *words: str) -> str:
    parse, main = {
        "generate.py": (options.parse_args, generate.main),
        "eval.py": (evaluate.parse_args, evaluate.main),
    }[words[0]]
    capfd.readouterr()
    assert main(parse(list(words[1:]))) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("how", [[], ["--pipeline"]], ids=["shares", "pipeline"])
def test_generate_prints_once_what_one_process_prints(
    how: list[str], on_ranks: Run, capfd: pytest.CaptureFixture
):
    words = ["generate.py", "--checkpoint_path", DEMO, *GREEDY, "--prompt", "Lily"]
    words += ["--prompt", "Tim"]
    found = on_ranks(*words, *how)
    assert found.returncode == 0, found.stderr
    assert found.stdout == alone(capfd, *words)
    assert found.stderr.count("loaded in") == found.stderr.count("decode: ") == 1


@pytest.mark.parametrize("how", [[], ["--pipeline"]], ids=["shares", "pipeline"])
def test_results_are_written_once_and_a_rerun_does_the_rest(
    how: list[str], on_ranks: Run, tmp_path: Path
):
    prompts, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("Lily\nTim\nOnce\nThe sun\nBen\n")
    words = ["generate.py", "--checkpoint_path", OPT, *GREEDY, "--prompts", str(prompts)]
    words += ["--output", str(output), "--batch_size", "2", *how]
    assert on_ranks(*words).returncode == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 5
    output.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert on_ranks(*words).returncode == 0
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert {tuple(line.items()) for line in map(plain, again)} == {
        tuple(line.items()) for line in map(plain, lines)
    }


def plain(line: dict) -> dict:
    return {key: str(value) for key, value in sorted(line.items())}


def test_rank_0_reads_and_answers_in_a_conversation():
    """Under torchrun itself: there all ranks have the same stdin."""
    said = subprocess.run(
        [*TORCHRUN, "generate.py", "--checkpoint_path", DEMO, *GREEDY, "--interactive"],
        cwd=ROOT,
        env=environment(),
        input="Hi\n/exit\n",
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_perplexity_is_that_of_one_process(
    on_ranks: Run, tmp_path: Path, capfd: pytest.CaptureFixture
):
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("Once upon a time there was a girl who liked to play with her red ball. " * 30)
    words = ["eval.py", "--checkpoint_path", DEMO, "--perplexity", str(text), *EXACT]
    expected = json.loads(alone(capfd, *words))
    done = on_ranks(*words, "--output", str(output))
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


def test_a_mistake_of_all_ranks_is_printed_once(on_ranks: Run):
    done = on_ranks("generate.py", "--checkpoint_path", "/nowhere", *GREEDY)
    assert done.returncode != 0
    assert done.stderr.count("generate.py: /nowhere") == 1, done.stderr


@pytest.mark.parametrize(
    ("count", "how", "says"),
    [
        (3, [], "3 ranks cannot share this model: it has 8 heads; 1, 2, 4, 8 can"),
        (2, ["--pipeline", "--draft", "ngram"], "a pipeline does not verify draft tokens"),
        (2, ["--pipeline", "--compile"], "the stages of a pipeline are not compiled"),
    ],
)
def test_what_ranks_cannot_do_is_one_line(count: int, how: list[str], says: str, on_ranks: Run):
    done = on_ranks("generate.py", "--checkpoint_path", DEMO, *GREEDY, *how, count=count)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if says in line], done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_that_fails_alone_prints_its_wrong_option(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """torchrun ends all ranks when the first one fails: the line must not depend on the order."""
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SystemExit, match="^2$"):
        options.parse_args(["--pipeline", "--draft", "ngram"])
    assert waits == [arguments.RANK0_SECONDS]
    said = capfd.readouterr().err
    assert said.startswith("generate.py: a pipeline does not verify draft tokens")


def test_a_pipeline_needs_ranks(capfd: pytest.CaptureFixture):
    words = ["generate.py", "--checkpoint_path", DEMO, *GREEDY, "--pipeline"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--pipeline needs ranks" in done.stderr


FAULTS = {
    "error": ('raise ValueError("the disk has gone")', "the disk has gone"),
    "killed": ("os.kill(os.getpid(), 9)", "Signal 9"),
}
FAULT = """
import os, sys
sys.path.insert(0, {root!r})
import generate
from cli import generation, options
from decoding import LoadedModel

if os.environ["RANK"] == "{rank}":
    real = generation.load_model

    def failing(*given, **options):
        lm = real(*given, **options)
        forward, calls = lm.model.forward, []

        def stumble(*given, **options):
            calls.append(1)
            if len(calls) == 5:
                open({begun!r}, "w").close()
                {fault}
            return forward(*given, **options)

        lm.model.forward = stumble
        return lm

    generation.load_model = failing
sys.exit(generate.main(options.parse_args({words!r})))
"""


def processes_of(session: int) -> dict[int, bytes]:
    """Return the ids and commands of a session's processes; not every machine has pgrep."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            # After the name, in parentheses: state, parent, group, session.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
    return found


@pytest.mark.parametrize(
    ("fault", "rank", "how"),
    [
        ("error", 0, ["--pipeline"]),
        ("error", 1, []),
        ("killed", 0, []),
        ("killed", 1, ["--pipeline"]),
    ],
)
def test_a_rank_that_dies_ends_the_job_with_its_error_first(
    fault: str,
    rank: int,
    how: list[str],
    on_ranks: Run,
    server: subprocess.Popen,
    tmp_path: Path,
):
    before = processes_of(server.pid)
    script, begun, says = faulty_script(tmp_path, fault, rank, how)
    done = on_ranks(str(script))
    left = processes_of(server.pid).keys() - before.keys()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    check_end(done, begun, says)
    assert not left, "processes stay behind"


def test_torchrun_ends_a_job_whose_rank_has_died(tmp_path: Path):
    script, begun, says = faulty_script(tmp_path, "error", 1, ["--pipeline"])
    words = [*TORCHRUN, str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=environment(), start_new_session=True, **pipes)
    try:
        printed = process.communicate(timeout=SECONDS)
    finally:
        left = processes_of(process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    check_end(subprocess.CompletedProcess(words, process.returncode, *printed), begun, says)
    assert not left, "processes stay behind"


def faulty_script(folder: Path, fault: str, rank: int, how: list[str]) -> tuple[Path, Path, str]:
    """Return a script in which a rank dies, the file that it writes then, and what is printed."""
    fault, says = FAULTS[fault]
    words = ["--checkpoint_path", DEMO, *GREEDY, "--max_new_tokens", "100", *how]
    script, begun = folder / "faulty.py", folder / "begun"
    names = {"root": str(ROOT), "begun": str(begun), "words": words}
    script.write_text(FAULT.format(rank=rank, fault=fault, **names))
    return script, begun, says


def check_end(done: subprocess.CompletedProcess, begun: Path, says: str) -> None:
    assert done.returncode != 0
    assert time.time() - begun.stat().st_mtime < 60  # from the fault, not from the start
    lines = done.stderr.splitlines()
    own = next(n for n, line in enumerate(lines) if says in line)
    lost = [n for n, line in enumerate(lines) if "another rank has ended" in line]
    assert not lost or own < lost[0], done.stderr

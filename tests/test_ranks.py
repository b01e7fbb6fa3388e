"""The commands under torchrun: rank 0 alone prints and writes; errors are reported once."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "checkpoints" / "demo")
OPT = str(ROOT / "checkpoints" / "demo-opt")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
EXACT = ["--device", "cpu", "--dtype", "float32"]
GREEDY = ["--temperature", "0", "--max_new_tokens", "12", *EXACT]


def environment() -> dict[str, str]:
    """Return the environment without torchrun's variables, as in a user's shell."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1"}


def torchrun(*words: str, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *words],
        cwd=ROOT,
        env=environment(),
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )


def alone(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", [[], ["--pipeline"]], ids=["shares", "pipeline"])
def test_generate_prints_once_what_one_process_prints(how: list[str]):
    words = [
        "generate.py",
        "--checkpoint_path",
        DEMO,
        *GREEDY,
        "--prompt",
        "Lily",
        "--prompt",
        "Tim",
    ]
    found = torchrun(*words, *how)
    assert found.returncode == 0, found.stderr
    assert found.stdout == alone(*words)
    assert found.stderr.count("loaded in") == found.stderr.count("decode: ") == 1


@pytest.mark.parametrize("how", [[], ["--pipeline"]], ids=["shares", "pipeline"])
def test_results_are_written_once_and_a_rerun_does_the_rest(how: list[str], tmp_path: Path):
    prompts, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("Lily\nTim\nOnce\nThe sun\nBen\n")
    words = ["generate.py", "--checkpoint_path", OPT, *GREEDY, "--prompts", str(prompts)]
    words += ["--output", str(output), "--batch_size", "2"]
    assert torchrun(*words, *how).returncode == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 5
    output.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert torchrun(*words, *how).returncode == 0
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert {tuple(line.items()) for line in map(plain, again)} == {
        tuple(line.items()) for line in map(plain, lines)
    }


def plain(line: dict) -> dict:
    return {key: str(value) for key, value in sorted(line.items())}


def test_rank_0_reads_and_answers_in_a_conversation():
    said = torchrun(
        "generate.py", "--checkpoint_path", DEMO, *GREEDY, "--interactive", text="Hi\n/exit\n"
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_perplexity_is_that_of_one_process(tmp_path: Path):
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("Once upon a time there was a girl who liked to play with her red ball. " * 30)
    words = ["eval.py", "--checkpoint_path", DEMO, "--perplexity", str(text), *EXACT]
    expected = json.loads(alone(*words))
    done = torchrun(*words, "--output", str(output))
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


def test_a_mistake_of_all_ranks_is_printed_once():
    done = torchrun("generate.py", "--checkpoint_path", "/nowhere", *GREEDY)
    assert done.returncode != 0
    assert done.stderr.count("generate.py: /nowhere") == 1, done.stderr


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (["--nproc_per_node=3"], "3 ranks cannot share this model: it has 8 heads; 1, 2, 4, 8 can"),
        (["--pipeline", "--draft", "ngram"], "a pipeline does not verify draft tokens"),
        (["--pipeline", "--compile"], "the stages of a pipeline are not compiled"),
    ],
)
def test_what_ranks_cannot_do_is_one_line(how: list[str], says: str):
    ranks = [word for word in how if word.startswith("--nproc")]
    done = subprocess.run(
        [*TORCHRUN, *ranks, "generate.py", "--checkpoint_path", DEMO, *GREEDY]
        + [word for word in how if word not in ranks],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if says in line]
    assert done.stderr.count("Traceback (most recent call last)") <= 1  # torchrun's own


def test_a_rank_that_fails_alone_prints_its_wrong_option():
    """torchrun ends all ranks when the first one fails: the line must not depend on the order."""
    done = subprocess.run(
        [sys.executable, "generate.py", "--pipeline", "--draft", "ngram"],
        cwd=ROOT,
        env=os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("generate.py: a pipeline does not verify draft tokens")


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


def running(script: Path) -> list[int]:
    """Return the ids of processes whose command has the script; not every machine has pgrep."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if os.fsencode(script) in file.read_bytes():
                found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize(
    ("fault", "rank", "how"),
    [
        ("error", 0, []),
        ("error", 1, []),
        ("error", 1, ["--pipeline"]),
        ("killed", 1, []),
        ("killed", 0, ["--pipeline"]),
    ],
)
def test_a_rank_that_dies_ends_the_job_with_its_error_first(
    fault: str, rank: int, how: list[str], tmp_path: Path
):
    fault, says = FAULTS[fault]
    words = ["--checkpoint_path", DEMO, *GREEDY, "--max_new_tokens", "100", *how]
    script = tmp_path / "faulty.py"
    begun = tmp_path / "begun"
    names = {"root": str(ROOT), "begun": str(begun), "words": words}
    script.write_text(FAULT.format(rank=rank, fault=fault, **names))
    process = subprocess.Popen(
        [*TORCHRUN, str(script)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=300)
    finally:
        left = running(script)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode != 0
    assert time.time() - begun.stat().st_mtime < 60  # from the fault, not from the start
    assert not left, "processes stay behind"
    own = next(n for n, line in enumerate(said.splitlines()) if says in line)
    lost = [n for n, line in enumerate(said.splitlines()) if "another rank has ended" in line]
    assert not lost or own < lost[0], said

"""eval.py --perplexity against transformers, on every kind of checkpoint; and the command."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import ROOT, hugging_face_model

import eval as evaluation
import quantize
from eval import main, parse_args
from evaluation.perplexity import windows
from host.files import write_whole
from load import load_model

DEMO, DEMO_OPT = ROOT / "checkpoints" / "demo", ROOT / "checkpoints" / "demo-opt"
TEXT = (ROOT / "checkpoints" / "demo" / "training.log").read_text()[:2000] + "Tom ♥ cats.\n" * 20


def run(*options: Any) -> int:
    return main(parse_args(["--device", "cpu", *map(str, options)]))


def figures(capsys: pytest.CaptureFixture, *options: Any) -> dict[str, Any]:
    code = run(*options)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def error(capsys: pytest.CaptureFixture, *options: Any) -> str:
    assert run(*options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip().splitlines()[-1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@torch.no_grad()
def independent(path: Path, text: str, length: int, stride: int, bos: bool) -> tuple[float, int]:
    """Nats per token and tokens scored, by transformers: a sliding window of `length` ids whose
    labels are masked where the window before had them."""
    transformers = pytest.importorskip("transformers")
    model = hugging_face_model(path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    begins = [json.loads((path / "config.json").read_text())["bos_token_id"]] if bos else []
    total, count, seen = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length - len(begins), len(ids))
        window = torch.tensor(begins + ids[begin:end])
        labels = window.clone()
        labels[: len(begins) + seen - begin] = -100
        logits = model(window.unsqueeze(0)).logits[0, :-1].double()
        total += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
        seen = end
        if end == len(ids):
            break
    return total / count, count


@pytest.mark.parametrize(
    "options", [(64, 63, True), (64, 20, True), (50, 50, False), (50, 7, False)]
)
@pytest.mark.parametrize("path", [DEMO, DEMO_OPT], ids=lambda path: path.name)
def test_perplexity_is_that_of_transformers(
    path: Path, options: tuple[int, int, bool], text: Path, capsys: pytest.CaptureFixture
):
    length, stride, bos = options
    given = ["--checkpoint_path", path, "--dtype", "float32", "--perplexity", text]
    given += ["--max_seq_length", length, "--stride", stride, *([] if bos else ["--no_bos"])]
    found = figures(capsys, *given)
    nats, count = independent(path, TEXT, length, stride, bos)
    assert found["tokens"] == count
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert found["bos"] == ("<s> before every text" if bos else "none")
    if bos:  # then every token is scored, and bits per byte count every byte
        bits = nats * count / math.log(2) / len(TEXT.encode())
        assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_perplexity_of_real_models(name: str, data_dir: Path, capsys: pytest.CaptureFixture):
    """Of real text, whole windows of the model's context; ids are ours, the model is theirs."""
    transformers = pytest.importorskip("transformers")
    path, text = data_dir / "models" / name, data_dir / "text" / "tinystories_val.txt"
    found = figures(
        capsys, "--checkpoint_path", path, "--perplexity", text, "--limit", 20, "--dtype", "float32"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    lm = load_model(path, device="cpu")
    ids = lm.tokenizer.encode(text.read_text(), bos=False, special=True)
    length = lm.model.args.context
    rows = torch.tensor([[1, *ids[n * (length - 1) :][: length - 1]] for n in range(20)])
    with torch.no_grad():
        nats = model(rows, labels=rows).loss
    assert found["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-4)
    assert found["tokens"] == 20 * (length - 1)


@pytest.mark.parametrize(
    "mode", ["int8", "int4", "int4-gptq"], ids=lambda mode: mode.replace("-", "_")
)
def test_quantised_checkpoints(
    mode: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
):
    """Near the dense model's figure, and exactly what the dequantised logits give."""
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    options = ["--checkpoint_path", tmp_path, "--mode", mode, "--device", "cpu"]
    if "gptq" in mode:
        options += ["--calibration_file", text, "--calibration_seq_length", 64, "--train_steps", 0]
    path = quantize.run(quantize.parse_args([str(option) for option in options]))
    given = ["--perplexity", text, "--max_seq_length", 64, "--dtype", "float32"]
    dense = figures(capsys, *given, "--checkpoint_path", DEMO)["nats_per_token"]
    found = figures(capsys, *given, "--checkpoint_path", path)["nats_per_token"]
    assert found != dense
    assert found == pytest.approx(dense, rel=0.001 if mode == "int8" else 0.1)
    lm = load_model(path, device="cpu", dtype=torch.float32)
    key_pos, total, count = torch.arange(63), 0.0, 0
    for ids, _ in windows(lm.tokenizer.encode(TEXT, bos=False), [0], 64, 63):
        given, n = torch.tensor([ids[:-1]]), len(ids) - 1
        with torch.inference_mode():
            caches = lm.make_caches(1, 64)
            logits = lm.model(given, key_pos[None, :n], key_pos[:n], caches)[0]
        total += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += n
    assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("options", [("--compile",), ("--batch_size", "3"), ("--kv_dtype", "int8")])
def test_options_that_hardly_change_the_figure(
    options: tuple[str, ...], text: Path, capsys: pytest.CaptureFixture
):
    given = ["--perplexity", text, "--max_seq_length", 64, "--dtype", "float32"]
    plain = figures(capsys, *given)["nats_per_token"]
    rel = 1e-3 if "--kv_dtype" in options else 1e-5
    assert figures(capsys, *given, *options)["nats_per_token"] == pytest.approx(plain, rel=rel)


def test_windows_score_each_id_once():
    seed = 0
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(300):
        ids = list(range(100, 100 + draw.randrange(1, 80)))
        prefix = draw.choice([[], [7]])
        length = draw.randrange(len(prefix) + 1, 40)
        room = length - len(prefix)
        stride = draw.randrange(1, room + 1)
        scored = []
        for window, start in windows(ids, prefix, length, stride):
            assert 1 <= start < len(window) <= length
            assert window[: len(prefix)] == prefix
            rest = window[len(prefix) :]
            assert rest == list(range(rest[0], rest[0] + len(rest)))  # a piece of the text
            scored += window[start:]
        # Without a prefix nothing stands before the first id of a window that overlaps none.
        bare = set() if prefix else {ids[0]} | (set(ids[::stride]) if stride == room else set())
        assert scored == [n for n in ids if n not in bare]


def test_a_part_of_the_data_is_said_to_be_no_score(text: Path, capsys: pytest.CaptureFixture):
    options = ["--perplexity", text, "--max_seq_length", 64]
    assert run(*options, "--limit", 2) == 0
    printed = capsys.readouterr()
    assert "not a score" in json.loads(printed.out)["note"]
    assert "not a score" in printed.err
    assert "note" not in figures(capsys, *options)


def test_the_output_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "results.json"
    found = figures(capsys, "--perplexity", text, "--max_seq_length", 64, "--output", output)
    assert json.loads(output.read_text()) == found
    assert found["model"].endswith("checkpoints/demo") and found["dtype"] == "bfloat16"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "text.txt"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text("old")

    def pieces():
        yield "new"
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(file, pieces())
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_broken_file(how: int, tmp_path: Path):
    text, output = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(TEXT * 40, encoding="utf-8")
    output.write_text('{"of an earlier run": 1}')
    command = [sys.executable, ROOT / "eval.py", "--perplexity", text, "--output", output]
    command += ["--max_seq_length", "256", "--stride", "1", "--device", "cpu"]  # minutes
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE) as process:
        seen = b""
        while b"perplexity:" not in seen:  # its bar
            seen += os.read(process.stderr.fileno(), 4096)
        time.sleep(0.5)
        process.send_signal(how)
        said = seen + process.stderr.read()
        code = process.wait(60)
    assert code == (-how if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert said.strip().splitlines()[-1] == b"stopped; no file was written"
    assert output.read_text() == '{"of an earlier run": 1}'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "text.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--perplexity", "none.txt"], "none.txt"),
        (["--perplexity", "{empty}"], "has 0 tokens: too few to score one"),
        (["--perplexity", "{text}", "--checkpoint_path", "nowhere"], "nowhere"),
        (["--perplexity", "{text}", "--stride", "600"], "--stride 600 is not between 1 and 511"),
        (["--perplexity", "{text}", "--max_seq_length", "513"], "513 is not between 2 and the"),
        (["--perplexity", "{text}", "--output", "none/x.json"], "there is no directory none"),
        (["--perplexity", "{binary}"], "eval.py: {binary}, line 1: byte 0xff is not UTF-8"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
):
    files = {"text": text, "empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt"}
    files["empty"].write_text("")
    files["binary"].write_bytes(b"\xff\xfe\x00")
    said = error(capsys, *(option.format(**files) for option in options))
    assert message.format(**files) in said


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--perplexity", "x", "--tasks", "hellaswag"],
        ["--perplexity", "x", "--num_fewshot", "2"],
        ["--tasks", "hellaswag", "--stride", "2"],
        ["--tasks", "hellaswag", "--log_samples"],
        ["--tasks", "hellaswag", "--system", "Be brief."],
        ["--tasks", "hellaswag_local", "--task_data", "hellaswag_local=x"],
        ["--tasks", "x", "--include_path", "scripts/tasks", "--task_data", "file"],
        ["--perplexity", "x", "--batch_size", "0"],
    ],
)
def test_options_that_do_not_go_together(options: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        parse_args(options)
    assert caught.value.code == 2


def test_perplexity_needs_no_lm_eval(text: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    assert figures(capsys, "--perplexity", text, "--max_seq_length", 64)["tokens"] > 100
    monkeypatch.delitem(sys.modules, "evaluation.harness", raising=False)
    monkeypatch.delattr("evaluation.harness", raising=False)
    said = error(capsys, "--tasks", "hellaswag")
    assert "--tasks needs lm_eval" in said and "requirements-eval.lock" in said


def test_the_harness_is_imported_for_tasks_only():
    assert not hasattr(evaluation, "harness")

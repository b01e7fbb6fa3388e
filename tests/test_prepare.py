"""Download and conversion against a loopback server that speaks the hub's API for these calls."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import ROOT
from hub_server import CONFIG, REPO, Hub, environment, etag, run

from checkpoint import Checkpoint


def prepare(hub: Hub, folder: Path, *options: str) -> subprocess.CompletedProcess:
    return run([str(ROOT / "scripts/prepare.sh"), REPO, *options], hub.url, folder)


def download(url: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    script = str(ROOT / "scripts/download.py")
    return run([sys.executable, script, "--repo_id", REPO, *options], url, folder)


def convert(folder: Path, *options: str) -> subprocess.CompletedProcess:
    script = str(ROOT / "scripts/convert_hf_checkpoint.py")
    return run([sys.executable, script, *options], "http://unused", folder)


def last_line(result: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


def downloaded(folder: Path) -> set[str]:
    root = folder / "checkpoints" / REPO
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith(".cache")}


def assert_weights(path: Path, hub: Hub, scratch: Path) -> None:
    """The checkpoint holds what the hub serves."""
    scratch.mkdir()
    for name in ("config.json", "model.safetensors"):
        (scratch / name).write_bytes(hub.files[name])
    found, expected = Checkpoint(path), Checkpoint(scratch)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.read(n), expected.read(n)) for n in expected.tensors)


def test_prepare_downloads_only_what_is_needed_and_converts_it(hub: Hub, tmp_path: Path):
    result = prepare(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"checkpoints/{REPO}/model.pth\n"
    needed = {"config.json", "tokenizer.json", "model.safetensors"}
    assert downloaded(tmp_path) == needed | {"model.pth"}
    assert "12.8MB  model.safetensors" in result.stderr
    assert_weights(tmp_path / "checkpoints" / REPO / "model.pth", hub, tmp_path / "scratch")
    hub.requests.clear()
    assert prepare(hub, tmp_path, "--dtype", "bfloat16").returncode == 0
    assert hub.ranges() == []  # all was there
    assert Checkpoint(tmp_path / "checkpoints" / REPO).dtype == torch.bfloat16


def test_bin_weights_come_where_there_are_no_safetensors(hub: Hub, tmp_path: Path):
    safetensors = hub.files.pop("model.safetensors")
    result = download(hub.url, tmp_path, "--revision", "v1")
    assert (result.returncode, result.stdout) == (0, f"checkpoints/{REPO}\n")
    assert downloaded(tmp_path) == {"config.json", "tokenizer.json", "pytorch_model.bin"}
    hub.files["model.safetensors"] = safetensors
    assert_weights(tmp_path / "checkpoints" / REPO, hub, tmp_path / "scratch")


def test_a_dropped_connection_is_resumed(hub: Hub, tmp_path: Path):
    hub.cut, hub.drops = 11 * 2**20, 1
    assert download(hub.url, tmp_path).returncode == 0
    assert None in hub.ranges() and any(r and r != "bytes=0-" for r in hub.ranges())
    assert_weights(tmp_path / "checkpoints" / REPO, hub, tmp_path / "scratch")


def test_after_a_lasting_failure_a_rerun_resumes(hub: Hub, tmp_path: Path):
    hub.cut, hub.drops = 11 * 2**20, 100
    result = download(hub.url, tmp_path)
    assert result.returncode == 1
    assert "run the command again, it will resume" in last_line(result)
    assert "model.safetensors" not in downloaded(tmp_path)
    hub.drops = 0
    hub.requests.clear()
    assert download(hub.url, tmp_path).returncode == 0
    (resumed,) = (r for r in hub.ranges() if r)
    assert int(resumed.removeprefix("bytes=").rstrip("-")) >= 10 * 2**20
    assert_weights(tmp_path / "checkpoints" / REPO, hub, tmp_path / "scratch")


@pytest.mark.parametrize("status", [401, 403])
def test_gated_repository(status: int, hub: Hub, tmp_path: Path):
    hub.refusal = status, "GatedRepo"
    result = prepare(hub, tmp_path)
    assert result.returncode == 2
    line = last_line(result)
    assert f"{REPO} is gated: accept its terms at {hub.url}/{REPO}" in line
    assert "hf auth login" in line and "HF_TOKEN" in line
    assert "model.pth" not in downloaded(tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "expected"),
    [
        (404, "RepoNotFound", 2, f"has no {REPO} that you may see: check its name"),
        (401, "", 2, "hf auth login"),
        (403, "", 2, "refused access"),
        (503, "", 1, "answered 503"),
    ],
)
def test_refused_repository(
    status: int, code: str, exit_code: int, expected: str, hub: Hub, tmp_path: Path
):
    hub.unknown = status, code
    result = download(hub.url, tmp_path)
    assert (result.returncode, expected in last_line(result)) == (exit_code, True), result.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_unknown_revision(hub: Hub, tmp_path: Path):
    result = download(hub.url, tmp_path, "--revision", "v9")
    assert result.returncode == 2
    assert f"{REPO} has no revision v9" in last_line(result)


def test_no_weights(hub: Hub, tmp_path: Path):
    del hub.files["model.safetensors"], hub.files["pytorch_model.bin"]
    result = download(hub.url, tmp_path)
    assert result.returncode == 2
    assert f"{REPO} has no weights as safetensors or .bin" in last_line(result)


def test_no_network(tmp_path: Path):
    with Hub() as server:
        url = server.url  # nobody listens there any more
    result = download(url, tmp_path)
    assert result.returncode == 1
    assert f"no connection to {url}" in last_line(result)


def test_a_corrupt_part_is_noticed_and_comes_again(hub: Hub, tmp_path: Path):
    folder = tmp_path / "checkpoints" / REPO
    folder.mkdir(parents=True)
    part = f"model.safetensors.{etag(hub.files['model.safetensors'])[:12]}.part"
    (folder / part).write_bytes(bytes(1000))
    assert download(hub.url, tmp_path).returncode == 0
    assert hub.ranges() == ["bytes=1000-", None]
    assert_weights(folder, hub, tmp_path / "scratch")


def test_interrupt(hub: Hub, tmp_path: Path):
    hub.stall = True
    script = str(ROOT / "scripts/download.py")
    process = subprocess.Popen(
        [sys.executable, script, "--repo_id", REPO],
        env=environment(hub.url, tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not hub.ranges() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert time.monotonic() - started < 10


def test_usage(tmp_path: Path):
    for arguments in ([], ["--help"]):
        result = run([str(ROOT / "scripts/prepare.sh"), *arguments], "http://unused", tmp_path)
        assert result.returncode == 2
        assert last_line(result).startswith("usage: ")


def test_conversion_refuses_what_is_not_there_or_does_not_fit(tmp_path: Path, hub_files: dict):
    result = convert(tmp_path, "--checkpoint_dir", "nowhere")
    assert result.returncode == 2
    assert "nowhere does not exist" in last_line(result)
    (tmp_path / "model.safetensors").write_bytes(hub_files["model.safetensors"])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 99}))
    result = convert(tmp_path, "--checkpoint_dir", ".")
    assert result.returncode == 2
    assert "should have [99, 32]" in last_line(result)
    assert not (tmp_path / "model.pth").exists()

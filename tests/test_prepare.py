"""Download and conversion against a loopback server that speaks the hub's API for these calls."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import Checkpoint
from hf import export_tensors, model_args
from model import Transformer

ROOT = Path(__file__).resolve().parent.parent
REPO, COMMIT = "maker/model", "c0ffee" * 6 + "c0ff"
# The embedding is 13 MB: huggingface_hub writes, and so can resume from, pieces of 10 MiB.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 100_000,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
UNWANTED = (
    "README.md",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "model-q4.gguf",
    "flax_model.msgpack",
    "tf_model.h5",
)


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files`, and misbehaves as the tests ask; `requests` is what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # verb, path, Range
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code of each file
        self.unknown: tuple[int, str] | None = None  # the same, of the repository
        self.cut: int | None = None  # bytes of a large file sent before the connection drops
        self.drops = 0  # how many connections for a large file drop
        self.stall = False  # stop sending a large file, and keep the connection

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str | None]:
        """Of each request for weights."""
        weights = ("model.safetensors", "pytorch_model.bin")
        return [
            r for method, path, r in self.requests if method == "GET" and path.endswith(weights)
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if self.server.unknown:
            self.fail(*self.server.unknown)
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/v1"):
            siblings = [{"rfilename": n, **metadata(d)} for n, d in self.server.files.items()]
            self.reply_json({"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.fail(404, "RevisionNotFound")
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            files = [{"path": n, **metadata(d)} for n, d in self.server.files.items()]
            self.reply_json(files)
        elif path.startswith(prefix := f"/{REPO}/resolve/{COMMIT}/"):
            self.reply_file(self.server.files[path.removeprefix(prefix)])
        else:
            self.fail(404, "RepoNotFound")

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "from the test")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply_json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reply_file(self, data: bytes) -> None:
        if self.server.refusal:
            return self.fail(*self.server.refusal)
        large, requested = len(data) > 2**20, self.headers["Range"]
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested else 0
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if large and self.server.drops:
            self.server.drops -= 1
            self.close_connection = True
            body = body[: max(0, self.server.cut - start)]
        if large and self.server.stall:
            self.wfile.write(body[: len(body) // 2])
            time.sleep(30)
        self.wfile.write(body)
        return None


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def metadata(data: bytes) -> dict[str, object]:
    """As the listings give it; large files are in git's large file storage."""
    oid, size = etag(data), len(data)
    lfs = {"lfs": {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}}
    return {"type": "file", "size": size, "oid": oid, "blobId": oid} | (lfs if size > 2**20 else {})


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: weights in both forms, a tokenizer, and what nobody needs."""
    print("seed 0")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repository")
    tensors = export_tensors(Transformer(model_args(CONFIG)).state_dict(), CONFIG)
    tensors = {name: t.clone() for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return {p.name: p.read_bytes() for p in folder.iterdir()} | dict.fromkeys(UNWANTED, b"x")


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub() as server:
        server.files = dict(files)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def environment(hub_url: str, folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith(("_proxy", "hf_token"))}
    return kept | {
        "PATH": path,
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def run(command: list[str], url: str, folder: Path) -> subprocess.CompletedProcess:
    env = environment(url, folder)
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)


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
    assert found.records.keys() == expected.records.keys()
    assert all(torch.equal(found.read(n), expected.read(n)) for n in expected.records)


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


def test_conversion_refuses_what_is_not_there_or_does_not_fit(tmp_path: Path, files: dict):
    result = convert(tmp_path, "--checkpoint_dir", "nowhere")
    assert result.returncode == 2
    assert "nowhere does not exist" in last_line(result)
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 99}))
    result = convert(tmp_path, "--checkpoint_dir", ".")
    assert result.returncode == 2
    assert "should have [99, 32]" in last_line(result)
    assert not (tmp_path / "model.pth").exists()

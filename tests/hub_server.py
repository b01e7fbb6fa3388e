"""A loopback server that speaks the hub's API for the calls of hub.py, and misbehaves on demand.

Start at Hub; the fixture `hub` in conftest.py serves `repository_files`.
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import Transformer
from weights.hf import export_tensors, model_args

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
        elif re.fullmatch(f"/api/models/{REPO}(/revision/(v1|main|{COMMIT}))?", path):
            siblings = [{"rfilename": n, **metadata(d)} for n, d in self.server.files.items()]
            self.reply_json({"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.fail(404, "RevisionNotFound")
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            files = [{"path": n, **metadata(d)} for n, d in self.server.files.items()]
            self.reply_json(files)
        elif match := re.fullmatch(f"/{REPO}/resolve/(?:{COMMIT}|main)/(.*)", path):
            self.reply_file(self.server.files[match[1]])
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


def repository_files(folder: Path) -> dict[str, bytes]:
    """A repository: weights in both forms, a tokenizer, and what nobody needs."""
    print("seed 0")
    torch.manual_seed(0)
    tensors = export_tensors(Transformer(model_args(CONFIG)).state_dict(), CONFIG)
    tensors = {name: t.clone() for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return {p.name: p.read_bytes() for p in folder.iterdir()} | dict.fromkeys(UNWANTED, b"x")


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
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600)

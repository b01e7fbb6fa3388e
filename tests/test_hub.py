"""A model by its name: paths, the Hugging Face cache, and a hub on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import ROOT
from hub_server import COMMIT, REPO, Hub, environment, etag

from checkpoint import Checkpoint
from quant.linear import meta_model
from weights.hub import needed_files, resolve

# Prints the path; an error as the commands do, in one line. Neither needs torch.
PROGRAM = """
import sys
from weights.hub import resolve
try:
    print(resolve(*sys.argv[1:]))
except KeyboardInterrupt:
    sys.exit(130)
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
finally:
    assert "torch" not in sys.modules
"""
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def start(url: str, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    env = environment(url, folder) | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def found(url: str, folder: Path, *arguments: str, **variables: str) -> tuple[Path, str]:
    """The path that is printed, and what stderr says."""
    out, err = (process := start(url, folder, *arguments, **variables)).communicate(timeout=120)
    assert process.returncode == 0, err
    return Path(out.strip()), err


def refused(url: str, folder: Path, *arguments: str, **variables: str) -> str:
    """The one line that the error is."""
    out, err = (process := start(url, folder, *arguments, **variables)).communicate(timeout=120)
    assert (process.returncode, out) == (1, ""), err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def download_files(hub: Hub, folder: Path, names: list[str], **variables: str) -> list[str]:
    """As transformers does it: the paths of files of the main branch, one call each."""
    program = (
        "import sys; from huggingface_hub import hf_hub_download as d\n"
        f"for name in sys.argv[1:]: print(d({REPO!r}, name))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *names],
        env=environment(hub.url, folder) | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def store(folder: Path) -> Path:
    return folder / "home/hub" / f"models--{REPO.replace('/', '--')}"


def assert_complete(snapshot: Path, hub: Hub) -> None:
    names = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {p.name for p in snapshot.iterdir()} == names
    assert all((snapshot / name).read_bytes() == hub.files[name] for name in names)


# --- paths


def test_a_path_that_exists_is_itself_and_huggingface_hub_is_not_imported(tmp_path: Path):
    for name in ("maker/model", "maker/model.pth", "plain"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if "." not in name else path.touch()
    program = PROGRAM.replace(
        '"torch" not in', '"torch" not in sys.modules | {} and "huggingface_hub" not in'
    )
    for name in ("maker/model", "maker/model.pth", "plain", str(tmp_path / "plain"), "."):
        result = subprocess.run(
            [sys.executable, "-c", program, name],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{Path(name)}\n", "")


def test_a_link_to_nowhere_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker").mkdir()
    (tmp_path / "maker/model").symlink_to("nowhere")
    assert resolve("maker/model") == Path("maker/model")


def test_a_revision_of_a_path_is_named_as_unused(tmp_path: Path):
    said = []
    assert resolve(tmp_path, "v1", said.append) == tmp_path
    (line,) = said
    assert "--revision v1 is not used" in line


@pytest.mark.parametrize(
    "name",
    ["nowhere", "/nowhere/model", "./maker/model", "../maker/model", "~/model", "a/b/c", "maker/"]
    + [
        "maker/model.pth",
        "models/llama.gguf",
        "https://huggingface.co/maker/model",
        "a b/c",
        "a/ü?",
    ],
)
def test_what_is_neither_path_nor_id_is_told_what_is_there(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").touch()
    with pytest.raises(FileNotFoundError, match="ORGANISATION/NAME") as error:
        resolve(name)
    assert "does not exist" in str(error.value) and "\n" not in str(error.value)
    if not name.startswith(("/", "..")):
        assert "story.txt" in str(error.value)


def test_a_mistyped_path_does_not_go_to_the_network(hub: Hub, tmp_path: Path):
    (tmp_path / "maker/modle").mkdir(parents=True)
    line = refused(hub.url, tmp_path, REPO)
    assert "maker/model does not exist" in line and "modle" in line
    assert "add --revision main" in line
    assert hub.requests == []
    assert_complete(found(hub.url, tmp_path, REPO, "v1")[0], hub)


# --- from the hub into the cache, and from there


def test_a_repository_is_downloaded_once_into_the_cache_that_transformers_uses(
    hub: Hub, tmp_path: Path
):
    path, err = found(hub.url, tmp_path, REPO)
    assert path == store(tmp_path) / "snapshots" / COMMIT
    assert_complete(path, hub)
    checkpoint = Checkpoint(path)  # through the links
    checkpoint.check(meta_model(checkpoint.args, None))
    assert err.index("12.8MB  model.safetensors") < err.index("in all, to") < err.index("100%")
    hub.requests.clear()
    again, err = found(hub.url, tmp_path, REPO)
    assert (again, hub.requests) == (path, [])
    assert f"{REPO}: commit {COMMIT[:7]} from the cache" in err and f"hf download {REPO}" in err
    assert err.count("\n") == 1

    names = ["config.json", "tokenizer.json", "model.safetensors"]
    theirs = download_files(hub, tmp_path, names, **OFFLINE)
    assert theirs == [str(path / name) for name in names]


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_offline_the_cache_serves_what_was_asked_for_before(
    revision: str, hub: Hub, tmp_path: Path
):
    path, _ = found(hub.url, tmp_path, REPO, revision)
    hub.requests.clear()
    for variables in ({}, OFFLINE):
        again, err = found("http://127.0.0.1:9", tmp_path, REPO, revision, **variables)
        assert again == path
        assert ("hf download" in err) == (revision != COMMIT)
    assert "v2" in refused(hub.url, tmp_path, REPO, "v2")
    assert "HF_HUB_OFFLINE is set" in refused(hub.url, tmp_path, REPO, "v2", **OFFLINE)


def test_what_transformers_has_cached_is_used(hub: Hub, tmp_path: Path):
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    download_files(hub, tmp_path, names[:2])
    assert "no complete copy" in refused(hub.url, tmp_path, REPO, **OFFLINE)
    download_files(hub, tmp_path, names[2:])
    assert_complete(found(hub.url, tmp_path, REPO, **OFFLINE)[0], hub)


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path):
    (tmp_path / "file").touch()  # even for root no folder can be made within a file
    line = refused(hub.url, tmp_path, REPO, HF_HUB_CACHE=str(tmp_path / "file/cache"))
    assert str(tmp_path / "file/cache") in line and "HF_HUB_CACHE" in line
    path, _ = found(hub.url, tmp_path, REPO)
    for folder in (path, path.parent, store(tmp_path), store(tmp_path) / "refs"):
        folder.chmod(0o555)
    assert found(hub.url, tmp_path, REPO)[0] == path


def test_shards_of_the_cache_are_counted(hub: Hub, tmp_path: Path):
    path, _ = found(hub.url, tmp_path, REPO)
    whole = path / "model.safetensors"
    whole.rename(path / "model-00001-of-00002.safetensors")
    assert "no complete copy" in refused(hub.url, tmp_path, REPO, **OFFLINE)
    (path / "model-00002-of-00002.safetensors").touch()
    assert found(hub.url, tmp_path, REPO, **OFFLINE)[0] == path
    (path / "model-00002-of-00002.safetensors").unlink()
    (path / "model-00002-of-00002.safetensors").symlink_to("../../blobs/lost")
    assert "no complete copy" in refused(hub.url, tmp_path, REPO, **OFFLINE)


# --- what goes wrong on the way


def test_a_broken_transfer_is_resumed_by_the_next_run(hub: Hub, tmp_path: Path):
    hub.cut, hub.drops = 11 * 2**20, 100
    line = refused(hub.url, tmp_path, REPO)
    assert line.startswith("ConnectionError: no connection") and "it will resume" in line
    assert "no complete copy" in refused(hub.url, tmp_path, REPO, **OFFLINE)
    hub.drops = 0
    hub.requests.clear()
    assert_complete(found(hub.url, tmp_path, REPO)[0], hub)
    (resumed,) = (r for r in hub.ranges() if r)
    assert int(resumed.removeprefix("bytes=").rstrip("-")) >= 10 * 2**20


@pytest.mark.parametrize(("size", "expected"), [(1000, "bytes=1000-"), (2**24, None)])
def test_a_part_with_wrong_bytes_comes_again(
    size: int, expected: str | None, hub: Hub, tmp_path: Path
):
    sha256 = etag(hub.files["model.safetensors"])
    (store(tmp_path) / "blobs").mkdir(parents=True)
    (store(tmp_path) / "blobs" / f"{sha256}.{sha256[:12]}.part").write_bytes(bytes(size))
    assert_complete(found(hub.url, tmp_path, REPO)[0], hub)
    assert hub.ranges() == ([expected, None] if expected else [None])


def test_an_interrupted_download_goes_on(hub: Hub, tmp_path: Path):
    hub.stall = True
    process = start(hub.url, tmp_path, REPO)
    deadline = time.monotonic() + 60
    while not hub.ranges() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    hub.stall = False
    assert_complete(found(hub.url, tmp_path, REPO)[0], hub)


def test_processes_that_ask_at_once_download_once(hub: Hub, tmp_path: Path):
    processes = [start(hub.url, tmp_path, REPO) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        assert_complete(Path(out.strip()), hub)
    assert len(hub.ranges()) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ({"refusal": (403, "GatedRepo")}, f"ValueError: {REPO} is gated: accept its terms"),
        ({"unknown": (404, "RepoNotFound")}, f"has no {REPO} that you may see: check its name"),
        ({"unknown": (401, "")}, "hf auth login"),
        ({"unknown": (503, "")}, "ConnectionError: "),
    ],
)
def test_refusals_of_the_hub(failure: dict, expected: str, hub: Hub, tmp_path: Path):
    vars(hub).update(failure)
    assert expected in refused(hub.url, tmp_path, REPO)


@pytest.mark.parametrize("address", ["http://a\nb", "nonsense", "ftp://127.0.0.1"])
def test_an_address_that_is_none(address: str, tmp_path: Path):
    line = refused(address, tmp_path, REPO)
    assert "HF_ENDPOINT is" in line or "no connection to" in line


def test_a_full_disk(hub: Hub, tmp_path: Path):
    """As the system says it: while writing, after the sizes seemed to fit."""
    program = PROGRAM.replace(
        "import sys",
        "import sys, errno, huggingface_hub.file_download as f\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "f.http_get = full",
    )
    env = environment(hub.url, tmp_path) | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, REPO], env=env, capture_output=True, text=True
    )
    line = result.stderr.strip().splitlines()[-1]
    assert f"the disk of {store(tmp_path)} is full" in line and "it will resume" in line


def test_a_check_of_the_config_comes_before_the_weights(hub: Hub, tmp_path: Path):
    program = PROGRAM.replace(
        "print(resolve(*sys.argv[1:]))",
        "resolve(sys.argv[1], check=lambda folder: int((folder / 'config.json').read_text()))",
    )
    env = environment(hub.url, tmp_path) | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, REPO], env=env, capture_output=True, text=True
    )
    assert "ValueError: invalid literal for int()" in result.stderr
    assert hub.ranges() == []


def test_needed_files_of_a_repository_without_weights_are_named_in_short():
    with pytest.raises(ValueError, match="it has file0, .*file11 and 88 more") as error:
        needed_files([f"file{i}" for i in range(100)], REPO)
    assert json.dumps(str(error.value))

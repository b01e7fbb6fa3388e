"""Turns --model, a path or the id of a Hugging Face repository, into the path of the model's files.

Start at resolve. If the cache of huggingface_hub holds the repository completely, the network is
not used. Otherwise `download` fetches the files that running the model needs into that cache, where
transformers finds them, too, or, for scripts/download.py, into a plain folder. HF_HOME,
HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured. Nothing here imports torch, and
huggingface_hub (0.5 s) is imported only where a repository must be found. The cache's layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache

Words: a snapshot is the cache's folder of one commit; a revision is a branch, a tag or a commit;
a large file is one that the hub stores by git-lfs (RepoSibling.lfs has its hash), such as weights;
the files of SUPPORT are the small ones that running a model needs, such as config and tokenizer.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from host.files import write_whole
from host.log import log

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The end of these names shows that a path was meant, though folder/model.bin could be a REPO_ID.
FILE_NAME = re.compile(r".*\.(pth|pt|bin|safetensors|gguf|json|ckpt|npz|txt)")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of weight files, one pattern for each format, in order of preference. Other copies of the
# weights (consolidated.*, *.fp16.*, original/, onnx, gguf, flax, tf) match none of the patterns.
WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
    r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json",
)
# Names of the small files that running a model needs.
SUPPORT = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template)\.json|tokenizer\.model|merges\.txt|chat_template\.jinja|LICENSE.*|USE_POLICY.*"
)
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def resolve(
    model: str | Path,
    revision: str | None = None,
    say: Callable[[str], Any] = log,
    check: Callable[[Path], Any] | None = None,
) -> Path:
    """Returns the path of a model's files. model: a path, or the id of a Hugging Face repository.

    revision: branch, tag or commit of the repository; None: the branch main. say: called with each
    line for the user. check: see download. An existing path is preferred to a repository. A
    complete copy in the cache is used even if the branch has newer commits; `hf download` fetches
    these.
    Raises FileNotFoundError and ValueError for mistakes that the user can correct, and
    ConnectionError for the network, each with a message of one line.
    """
    path = Path(model)
    if not str(model):
        raise ValueError("--model is empty: give a path, or the id of a repository")
    if path.exists() or path.is_symlink():  # a broken link is a mistake, and no repository
        if revision:
            say(f"{path} is on this disk, so --revision {revision} is not used")
        return path
    repo_id = str(model)
    if not REPO_ID.fullmatch(repo_id) or FILE_NAME.fullmatch(repo_id):
        raise FileNotFoundError(not_found(path))
    if snapshot := cached(repo_id, revision):
        pinned = revision == snapshot.name
        repository = f"{repo_id} --revision {revision}" if revision else repo_id
        update = "" if pinned else f"; `hf download {repository}` brings the newest commit"
        say(f"{repo_id}: commit {snapshot.name[:7]} from the cache{update}")
        return snapshot
    if path.parent.is_dir() and not revision:  # a mistyped path is more likely
        raise FileNotFoundError(
            f"{not_found(path)}; for the repository of that name add --revision main"
        )
    refuse_offline(repo_id)
    return download(repo_id, revision, say=say, check=check)


def not_found(path: Path) -> str:
    """Returns the error message for a path that does not exist. It lists what the nearest folder
    above the path holds."""
    nearest = next(p for p in path.absolute().parents if p.is_dir())
    names = sorted(p.name for p in nearest.iterdir() if p.name[0] != ".")[:12]
    return (
        f"{path} does not exist; {nearest} holds: {', '.join(names) or 'nothing'}; "
        f"the id of a Hugging Face repository has the form ORGANISATION/NAME"
    )


def refuse_offline(repo_id: str) -> None:
    """Raises FileNotFoundError if HF_HUB_OFFLINE is set. Called before a download, when the cache
    has no complete copy of the repository."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{constants.HF_HUB_CACHE} holds no complete copy of {repo_id}, and HF_HUB_OFFLINE is "
            "set: unset it to download the model once"
        )


# --- the cache: models--ORG--NAME/refs/BRANCH names a commit, snapshots/COMMIT/FILE links to a blob


def repository_folder(repo_id: str) -> Path:
    """Returns the folder of a repository in the cache of huggingface_hub; it may not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute() / f"models--{repo_id.replace('/', '--')}"


def cached(repo_id: str, revision: str | None) -> Path | None:
    """Returns the folder of a revision in the cache; None if the cached copy is not complete.

    revision: branch, tag or commit; None: the branch main. No network is used.
    """
    folder = repository_folder(repo_id)
    ref = folder / "refs" / (revision or "main")
    # Without a file of its name in refs, the revision may be a commit itself; None is none.
    commit = ref.read_text().strip() if ref.is_file() else str(revision)
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and is_complete(snapshot) else None


def is_complete(snapshot: Path) -> bool:
    """Returns whether a folder holds a config, a tokenizer and all weights in one format.

    `download` fetches the weights last, so complete weights mean a complete download.
    """
    names = {p.name for p in snapshot.glob("*") if p.is_file()}
    weights = any(all_shards(names, pattern) for pattern in WEIGHTS)
    return "config.json" in names and not TOKENIZERS.isdisjoint(names) and weights


def all_shards(names: set[str], pattern: str) -> bool:
    """Returns whether the names include a single weight file, or every shard of a model.

    pattern: one of WEIGHTS. The shards' names tell their number, as 3 in -00001-of-00003.
    """
    weights = {n for n in names if re.fullmatch(pattern, n) and not n.endswith(".index.json")}
    counts = {int(m[1]) if (m := re.search(r"-of-(\d+)\.", name)) else 1 for name in weights}
    return any(len(weights) >= count for count in counts)


# --- downloading


def download(
    repo_id: str,
    revision: str | None,
    token: str | None = None,
    folder: Path | None = None,
    say: Callable[[str], Any] = log,
    check: Callable[[Path], Any] | None = None,
) -> Path:
    """Download the files that a model needs from a repository; returns their folder.

    revision: branch, tag or commit; None: the branch main. token: of a user who may read the
    repository; None: the one that huggingface_hub finds. folder: a plain folder for the files;
    None: the cache of huggingface_hub. say: called with each line for the user. check: called with
    the folder when all files but the weights are downloaded; it raises an error for a model that
    cannot run. An interrupted download is resumed. Raises the errors of `resolve`.
    """
    from huggingface_hub import HfApi

    store = folder or repository_folder(repo_id)
    with explained(repo_id, revision, store):
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        names = needed_files([file.rfilename for file in info.siblings], repo_id)
        files = [file for file in info.siblings if file.rfilename in names]
        transfer = Transfer(repo_id, info.sha, files, store, folder is None, token)
        transfer.show_sizes(say)
        with locked(store, say):
            return transfer.run(revision, check)


@contextmanager
def locked(folder: Path, say: Callable[[str], Any]) -> Iterator[None]:
    """Lock a folder, which must exist, while the block runs. say: called with a line if it waits.

    The processes of torchrun would otherwise download the same files at the same time. A process
    that finds the folder locked waits. On a file system without locks this does nothing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is downloading these files: waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def needed_files(names: list[str], repo_id: str) -> list[str]:
    """Select, from the names of a repository's files, those that running the model needs.

    These are the small files of SUPPORT and the weights in the preferred format that exists. Raises
    ValueError if there are no weights.
    """
    for pattern in WEIGHTS:
        if weights := [name for name in names if re.fullmatch(pattern, name)]:
            return [name for name in names if re.fullmatch(SUPPORT, name)] + weights
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    raise ValueError(f"{repo_id} has no weights as safetensors or .bin; it has {listed}")


@dataclass(frozen=True)
class Transfer:
    """The download of one commit's files to a folder.

    store: the folder, a plain one or the repository's folder in the cache. in_cache: whether it is
    the latter, whose large files lie in blobs/, named by hash. token: see download.
    """

    repo_id: str
    commit: str  # not a branch, which may move between listing and downloading
    files: list["RepoSibling"]
    store: Path
    in_cache: bool
    token: str | None

    def final_path(self, file: "RepoSibling") -> Path:
        """Returns the path of a large file after its download."""
        return self.store / (f"blobs/{file.lfs.sha256}" if self.in_cache else file.rfilename)

    def part(self, file: "RepoSibling") -> Path:
        """Returns the path of a large file while it is incomplete.

        The name contains the hash, so that a file of another commit is not resumed.
        """
        path = self.final_path(file)
        return path.with_name(f"{path.name}.{file.lfs.sha256[:12]}.part")

    def missing(self, file: "RepoSibling") -> int:
        """Returns how many bytes of a file are still to be downloaded, for the check of disk space.

        Only a large file can be partly there. A small file in the cache always counts as missing:
        its path, below snapshots/, is not looked up.
        """
        path = self.final_path(file) if file.lfs else self.store / file.rfilename
        if path.exists():
            return 0
        part = self.part(file) if file.lfs else path
        return max(0, (file.size or 0) - (part.stat().st_size if part.exists() else 0))

    def show_sizes(self, say: Callable[[str], Any]) -> None:
        """Pass a line for each file, with its size, and one for the sum to `say`; make the folder.

        Raises ValueError if the disk is too small for the missing bytes.
        """
        for file in self.files:
            say(f"{size_text(file.size or 0):>8}  {file.rfilename}")
        say(f"{size_text(sum(f.size or 0 for f in self.files)):>8}  in all, to {self.store}")
        self.store.mkdir(parents=True, exist_ok=True)
        needed = sum(map(self.missing, self.files))
        if needed > (free := shutil.disk_usage(self.store).free):
            raise ValueError(
                f"{self.store} needs {size_text(needed)}, {size_text(free)} of disk is free"
            )

    def run(self, revision: str | None, check: Callable[[Path], Any] | None) -> Path:
        """Download the files; returns the folder that holds them.

        The folder is the snapshot in the cache, or `store`. The small files of SUPPORT come first,
        so that `check` (see download) can refuse the model before its weights are downloaded. At
        the end refs/ in the cache records which commit the branch or tag `revision` names, for
        `cached`; None: the branch main.
        """
        names = [file.rfilename for file in self.files]
        folder = self.download_missing([name for name in names if re.fullmatch(SUPPORT, name)])
        if check:
            check(folder)
        for file in self.files:
            if file.lfs and not self.final_path(file).exists():
                self.download_large(file)
        # Now the remaining small files, such as the index of shards. huggingface_hub also links the
        # large files of the cache into the snapshot, and checks the hashes of those in a folder.
        self.download_missing(names)
        if self.in_cache and revision != self.commit:
            ref = self.store / "refs" / (revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(ref, [self.commit])
        return folder

    def download_missing(self, names: list[str]) -> Path:
        """Let huggingface_hub download those of the named files that are missing.

        Returns the folder of the files: the snapshot in the cache, or `store`. A name must not
        contain *, ? or [, because huggingface_hub reads it as a glob pattern.
        """
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.repo_id,
            revision=self.commit,
            local_dir=None if self.in_cache else self.store,
            allow_patterns=names,
            token=self.token,
        )
        # Of a plain folder snapshot_download returns the absolute path, not the one it was given.
        return Path(folder) if self.in_cache else self.store

    def download_large(self, file: "RepoSibling") -> None:
        """Download one large file, or the remaining bytes of it after an interrupted run.

        Used in place of snapshot_download, which would start again: since huggingface_hub 2 it
        resumes a transfer only within one run. A file whose hash is wrong after it was resumed is
        downloaded again from its first byte.
        """
        part = self.part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a+b") as f:  # "a": f is at its end
            if f.tell() > file.size:  # not the beginning of this file
                f.truncate(0)
            resumed = f.seek(0, os.SEEK_END) > 0
            self.append(file, f)
            if resumed and not has_hash(f, file.lfs.sha256):
                f.truncate(0)
                self.append(file, f)
        part.replace(self.final_path(file))

    def append(self, file: "RepoSibling", f: BinaryIO) -> None:
        """Download the bytes of a file that f lacks, and append them to f. Raises an error if f
        then has another size than the file.

        f: the first bytes of the file, maybe none, opened for appending and reading.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        http_get(
            hf_hub_url(self.repo_id, file.rfilename, revision=self.commit),
            f,
            resume_size=f.seek(0, os.SEEK_END),
            headers=build_hf_headers(token=self.token),
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
        f.flush()


def has_hash(f: BinaryIO, sha256: str) -> bool:
    """Returns whether the content of a file has this hash."""
    f.seek(0)
    return hashlib.file_digest(f, "sha256").hexdigest() == sha256


def size_text(nbytes: int) -> str:
    """Returns bytes as text: 1234567 -> "1.23MB". size_text of host/memory.py would need torch."""
    from tqdm import tqdm  # not sooner: --quiet sets TQDM_DISABLE, which tqdm reads at its import

    return tqdm.format_sizeof(nbytes, "B")


# --- errors


@contextmanager
def explained(repo_id: str, revision: str | None, store: Path) -> Iterator[None]:
    """Turn network and file errors of the block into errors of one line; see explain.

    An HF_ENDPOINT that is no address gives a ValueError. Other errors pass. store: the folder of
    the download.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
        raise explain(error, repo_id, revision, store) from error
    except Exception as error:
        if type(error).__name__ != "InvalidURL":  # of the HTTP library: httpx, or httpx2
            raise
        raise ValueError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, no usable address") from error


def explain(error: Exception, repo_id: str, revision: str | None, store: Path) -> Exception:
    """Returns an error whose message tells the user in one line what failed and what to do.

    It is a ValueError if the user can correct the mistake, else a ConnectionError. error: raised
    while `revision` of `repo_id` was downloaded to the folder `store`; of one of the types that
    `explained` catches. The order of the tests counts: some of these types are subclasses of others
    that are tested later.
    """
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"{hub} has no {repo_id} that you may see: check its name; if private, {LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{repo_id} has no revision {revision}: see {hub}/{repo_id}/commits/main")
    if status in (401, 403):
        return ValueError(f"{hub} refused access to {repo_id} ({status}): {LOGIN}")
    if isinstance(error, errors.HfHubHTTPError) and status:
        return ConnectionError(f"{hub} answered {status} for {repo_id}: try again later")
    if isinstance(error, (errors.HTTPError, ConnectionError, errors.EntryNotFoundError)):
        reason = str(error).partition("\n")[0] or type(error).__name__
        return ConnectionError(
            f"no connection to {hub} ({reason}) to download {repo_id}, which is no path on this "
            "machine: check the path, or run the command again, it will resume"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(
            f"the disk of {store} is full: make space and run the command again, it will resume"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return ValueError(
            f"{store} cannot be written ({error.strerror}): set HF_HUB_CACHE to a folder of yours"
        )
    return ValueError(" ".join(str(error).split()))

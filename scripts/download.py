"""Download a model from a Hugging Face hub: only the files that running it needs.

Start at main. Weights come as safetensors where the repository has them, else as .bin, never as
both; a download that broke off goes on where it stopped when the command is run again. The
folder is printed on stdout, all else on stderr. HF_ENDPOINT, HF_TOKEN and the other variables of
huggingface_hub are honoured.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_url, snapshot_download
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

# In order of preference. Other copies of the weights (consolidated.*, *.fp16.*, original/, onnx,
# gguf, flax, tf) match neither.
WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
    r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json",
)
SUPPORT = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template)\.json|tokenizer\.model|merges\.txt|chat_template\.jinja|LICENSE.*|USE_POLICY.*"
)


def needed_files(names: list[str], repo_id: str) -> list[str]:
    """Those of a repository's files that a model needs; ValueError where it has no weights."""
    for pattern in WEIGHTS:
        if weights := [name for name in names if re.fullmatch(pattern, name)]:
            return [name for name in names if re.fullmatch(SUPPORT, name)] + weights
    raise ValueError(f"{repo_id} has no weights as safetensors or .bin; it has {', '.join(names)}")


def show_sizes(sizes: dict[str, int], folder: Path) -> None:
    """List the files; ValueError where the disk has no room for those that are not there yet."""
    for name, size in sizes.items():
        print(f"{size_text(size):>8}  {name}", file=sys.stderr)
    print(f"{size_text(sum(sizes.values())):>8}  in all, to {folder}", file=sys.stderr)
    needed = sum(size for name, size in sizes.items() if not (folder / name).exists())
    if needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{folder} needs {size_text(needed)}, {size_text(free)} of disk is free")


def size_text(nbytes: int) -> str:
    return tqdm.format_sizeof(nbytes, "B")


def download(repo_id: str, revision: str | None, folder: Path, token: str | None) -> None:
    info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    names = needed_files([file.rfilename for file in info.siblings], repo_id)
    files = [file for file in info.siblings if file.rfilename in names]
    folder.mkdir(parents=True, exist_ok=True)
    show_sizes({file.rfilename: file.size or 0 for file in files}, folder)
    for file in files:
        if file.lfs and not (folder / file.rfilename).exists():
            fetch(repo_id, info.sha, file, folder, token)
    # What is small, and the hub's check of what is large: a file whose SHA-256 is wrong comes
    # again. The commit, not the branch: what was listed is what comes, even if someone pushes.
    snapshot_download(
        repo_id, revision=info.sha, local_dir=folder, allow_patterns=names, token=token
    )


def fetch(repo_id: str, commit: str, file: RepoSibling, folder: Path, token: str | None) -> None:
    """One large file, from where an earlier run broke off.

    snapshot_download alone would begin it again: since huggingface_hub 2 it takes up a broken
    transfer within one run only.
    """
    part = folder / f"{file.rfilename}.{file.lfs.sha256[:12]}.part"
    with open(part, "ab") as f:
        http_get(
            hf_hub_url(repo_id, file.rfilename, revision=commit),
            f,
            resume_size=f.tell(),
            headers=build_hf_headers(token=token),
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
    part.replace(folder / file.rfilename)


def explain(error: Exception, repo_id: str, revision: str | None) -> tuple[str, int]:
    """One line and an exit code: 2 for what the user can put right, 1 for the network."""
    hub = constants.ENDPOINT
    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then {login}", 2
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no {repo_id} that you may see: check its name; if private, {login}", 2
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}: see {hub}/{repo_id}/commits/main", 2
    if status in (401, 403):
        return f"{hub} refused access to {repo_id} ({status}): {login}", 2
    if isinstance(error, errors.HfHubHTTPError) and status:
        return f"{hub} answered {status} for {repo_id}: try again later", 1
    if isinstance(error, (errors.HTTPError, ConnectionError, errors.EntryNotFoundError)):
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"no connection to {hub} ({reason}): run the command again, it will resume", 1
    return " ".join(str(error).split()), 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo_id", required=True, help="such as facebook/opt-125m")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--token", help="default: HF_TOKEN, or what `hf auth login` stored")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    folder = args.checkpoint_dir / args.repo_id
    try:
        download(args.repo_id, args.revision, folder, args.token)
    except KeyboardInterrupt:
        print("\nstopped; run the command again to go on from here", file=sys.stderr)
        return 130
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:
        message, code = explain(error, args.repo_id, args.revision)
        print(f"download.py: {message}", file=sys.stderr)
        return code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))

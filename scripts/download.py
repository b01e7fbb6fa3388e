"""Download from a Hugging Face hub the files that running a model needs, into a folder.

Start at main, then weights/hub.py. Weights are safetensors if the repository has them, else .bin,
never both. The same command resumes an interrupted download. The folder is printed on stdout, all
else on stderr. HF_ENDPOINT, HF_TOKEN and the other variables of huggingface_hub apply.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from weights.hub import download


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo_id", required=True, help="such as facebook/opt-125m")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--token", help="default: HF_TOKEN, or what `hf auth login` stored")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Download to checkpoint_dir/repo_id; return the exit code: 0, 1 for a network error, 2 for an
    error of the user or the machine, 130 for Ctrl-C."""
    try:
        print(download(args.repo_id, args.revision, args.token, args.checkpoint_dir / args.repo_id))
    except KeyboardInterrupt:
        print("\nstopped; run the command again to go on from here", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"download.py: {error}: run ./scripts/setup.sh first", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"download.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, ConnectionError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))

"""Download a model from a Hugging Face hub into a folder: only the files that running it needs.

Start at main; the work is done by hub.py. Weights come as safetensors where the repository has
them, else as .bin, never as both; a download that broke off goes on where it stopped when the
command is run again. The folder is printed on stdout, all else on stderr. HF_ENDPOINT, HF_TOKEN and
the other variables of huggingface_hub are honoured.
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
    try:
        print(download(args.repo_id, args.revision, args.token, args.checkpoint_dir / args.repo_id))
    except KeyboardInterrupt:
        print("\nstopped; run the command again to go on from here", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"download.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, ConnectionError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))

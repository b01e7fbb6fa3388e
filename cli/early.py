"""Finds a command's files before torch is imported, so that a missing file is reported at once.

Start at find_inputs. Nothing here imports torch.
"""

import argparse
import os
import sys
from pathlib import Path

from cli.command import MISTAKES
from host.files import DEMO, check_writable
from host.log import set_quiet
from weights import hub
from weights.weight_files import find_weights


def find_inputs(
    script: str, args: argparse.Namespace, *texts: Path | None, output: Path | None = None
) -> None:
    """Replace model names in `args` by paths, downloading repositories; check a command's files.

    texts: files that must exist. output: a file that must be writable. The weights must exist, too.
    An error ends the process with exit code 2 and one line on stderr, which only rank 0 prints.
    Ctrl-C ends it with exit code 130. script: the command's name, which begins the line.
    """
    set_quiet(args.quiet)
    first_rank = os.environ.get("RANK", "0") in ("0", "")
    try:
        for text in filter(None, texts):
            text.stat()
        if output and first_rank:
            check_writable(output)
        revision = getattr(args, "revision", None)
        args.checkpoint_path = hub.resolve(args.checkpoint_path or DEMO, revision)
        args.revision = None  # the path contains the revision
        find_weights(args.checkpoint_path)
        if getattr(args, "draft_checkpoint_path", None):
            args.draft_checkpoint_path = hub.resolve(args.draft_checkpoint_path)
    except MISTAKES as error:
        if first_rank:
            line = " ".join(str(error).split()) or type(error).__name__
            print(f"{script}: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)

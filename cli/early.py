"""Finds a command's files before torch is imported, so that a missing file is reported at once.

`args` are the parsed options of a command; those that name models are checkpoint_path (--model) and
draft_checkpoint_path. A model is a path, or the id of a repository of huggingface.co.

Start at find_inputs. Nothing here imports torch.
"""

import argparse
import sys
from pathlib import Path

from cli.command import MISTAKES, error_line
from cli.options import several_processes
from host.files import DEMO, check_writable
from host.log import set_quiet
from weights import hub
from weights.weight_files import find_weights


def find_inputs(
    script: str, args: argparse.Namespace, *texts: Path | None, output: Path | None = None
) -> None:
    """Check a command's files, and replace names of models in `args` by paths; see resolve_models,
    which may download. The four commands call this right after parsing, before they import torch.

    texts: files that must exist; output: a file that must be writable; None: the option was not
    given. An error ends the process with exit code 2 and one line on stderr, Ctrl-C with exit code
    130. script: the command's name, which begins the line. Under torchrun this function does
    nothing: the command finds the same errors later, and generate.py finds them after the ranks
    have connected, so that one line reports an error of all ranks.
    """
    if several_processes():
        return
    set_quiet(args.quiet)
    try:
        for text in filter(None, texts):
            text.stat()  # raises OSError if the file is missing
        if output:
            check_writable(output)
        resolve_models(args)
    except MISTAKES as error:
        print(error_line(script, error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def resolve_models(args: argparse.Namespace) -> None:
    """Replace the names of models by paths, and check that the weights exist.

    Changes `args` itself. Commands with --revision (generate.py and eval.py) download repositories,
    and use the demo model by default; the other commands take paths. With --random_weights no
    weights are needed. Raises FileNotFoundError if weights do not exist, and the errors of
    hub.resolve.
    """
    if hasattr(args, "revision"):
        args.checkpoint_path = hub.resolve(args.checkpoint_path or DEMO, args.revision)
        args.revision = None  # the path is already that of the revision
    if not getattr(args, "random_weights", None):
        find_weights(args.checkpoint_path)
    if getattr(args, "draft_checkpoint_path", None):
        args.draft_checkpoint_path = hub.resolve(args.draft_checkpoint_path)

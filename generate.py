"""Generate text. The command, and the Python interface.

    python generate.py --compile --checkpoint_path checkpoints/demo --prompt "Once upon a time"

From Python, with this folder on the path:

    from generate import GenerationConfig, complete, load_model, stream

    lm = load_model("checkpoints/demo", compile=True)
    for piece in stream(lm, "Once upon a time"):
        print(piece, end="", flush=True)
    prompts = ["Once upon a time", "The big dog"]
    for completion in complete(lm, prompts, GenerationConfig(max_new_tokens=50)):
        print(completion.text)

Start at engine.generate, the loop that everything else consumes; load.py makes the model that it
runs. The command, `run` in cli/generation.py, loads the model and hands it to one of three modes:
prompts, chat, benchmark.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

if __name__ == "__main__":  # a wrong option or a missing file is answered before torch is imported
    from cli import command
    from cli.early import find_inputs
    from cli.options import parse_args

    ARGS = command.begin(parse_args)
    find_inputs("generate.py", ARGS, ARGS.prompt_file, ARGS.prompts, ARGS.random_weights)

from decoding import LoadedModel
from engine import complete, generate, stream
from load import load_model, random_model
from text.completion import Completion
from text.generation_config import GenerationConfig

__all__ = [
    "Completion",
    "GenerationConfig",
    "LoadedModel",
    "complete",
    "generate",
    "load_model",
    "random_model",
    "stream",
]


def main(args: "argparse.Namespace") -> int:
    """Run the command on its parsed options; return its exit code: see exit_code in
    cli/command.py."""
    from cli.command import exit_code
    from cli.generation import run
    from host.log import set_quiet

    set_quiet(args.quiet)
    return exit_code("generate.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(ARGS))

"""What drafts gain for a large shape: a small model, then the model's own copy in int4.

    python benchmarks/gpu_speculate.py --acceptance 0.8
    python benchmarks/gpu_speculate.py --warm       # compiles the small model, and times nothing

Start at main. It is the synthetic part of speculate.py (there it says how acceptance is made to be
what it is), with both drafts beside one model that is loaded and compiled once. What is compiled of
the large model and of its copy is what gpu_decode.py compiles of them in bf16 and int4, so that its
warm-up serves here too.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import provenance
from benchmarks.common import ROOT, exit_code
from benchmarks.gpu_common import Attempts, seconds
from benchmarks.gpu_decode import cache_length
from benchmarks.speculate import Large, synthetic
from decoding import LoadedModel
from draft_length import DraftLengthController
from host.devices import find_device
from layers.kv_cache import KVCache
from load import compile_now, compile_views, random_model
from quant.linear import make_scheme
from speculate import ModelDraft


class Loaded(Large):
    """The large model of speculate.py, loaded and compiled here."""

    def __init__(self, lm: LoadedModel, caches: list[KVCache]):
        self.lm, self.caches = lm, caches
        self.vocab, self.device = lm.model.args.vocab_size, lm.device


@torch.inference_mode()
def warm(small: LoadedModel) -> None:
    caches = small.make_caches(1, min(cache_length(1), small.model.args.context))
    compile_views(*ModelDraft(DraftLengthController(None), small).warm_up_inputs(caches))


def time_drafts(
    args: argparse.Namespace, small: LoadedModel, figures: dict[str, Any], attempt: Attempts
) -> None:
    """The small model first, as its draft: each with a fixed and with a chosen number of tokens."""
    options = {"device": args.device, "compile": True, "draft": "self-int4"}
    lm = random_model(args.config, **options)
    caches = lm.make_caches(1, min(cache_length(1), lm.model.args.context))
    drafts = {
        f"{args.draft_config.stem} {args.draft_mode}": ModelDraft(
            DraftLengthController(None), small
        ),
        "self-int4": lm.draft,
    }
    for name, draft in drafts.items():
        drafted = replace(lm, draft=draft)
        compiling = seconds(lambda: compile_now(drafted, caches), lm.device)  # noqa: B023
        found = attempt(name, lambda: synthetic(args, Loaded(drafted, caches)))  # noqa: B023
        figures[name] = {"compile_s": compiling, "synthetic": found}


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = find_device(args.device)
    args.device, attempt, figures = str(device), Attempts(), {}
    scheme = None if args.draft_mode == "bf16" else make_scheme(args.draft_mode)
    small = random_model(args.draft_config, device=args.device, compile=True, scheme=scheme)
    if args.warm:
        figures["compile_s"] = seconds(lambda: warm(small), device)
    else:
        attempt("drafts", lambda: time_drafts(args, small, figures, attempt))
    said = {"benchmark": "gpu_speculate", "config": args.config.stem, "warm": args.warm}
    return said | {"drafts": figures, "failed": attempt.failed} | provenance(device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, configs = parser.add_argument, ROOT / "benchmarks" / "configs"
    add("--config", type=Path, default=configs / "llama-3.1-8b.json", help="(Llama 3.1 8B's)")
    add("--draft_config", type=Path, default=configs / "llama-3.2-1b.json", help="(3.2 1B's)")
    modes = "bf16", "int8", "int4"
    add("--draft_mode", choices=modes, default="int8", help="of the small model (default: int8)")
    add("--device", default="cuda", help="(default: cuda)")
    add("--acceptance", nargs="+", type=float, default=[0.8], help="(default: 0.8)")
    add("--speculate_k", type=int, default=4, help="draft tokens (default: 4; and auto)")
    add("--new_tokens", type=int, default=100, help="of a text (default: 100)")
    add("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    add("--seed", type=int, default=0, help="of the die (default: 0)")
    add("--warm", action="store_true", help="compile the small model; no timing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

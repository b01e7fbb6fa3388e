"""Runs on each rank of a test, which on_ranks in test_tp.py starts.

torchrun --nproc_per_node=N tests/ranks_worker.py CASES.json RESULTS.pt
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import window_slack

import tp
from engine import complete
from layers.kv_cache import WINDOW_SLACK
from load import load_model
from pp import BroadcastSampler
from ranks import Ranks, join_process_group, leave_process_group
from text.generation_config import GenerationConfig
from tiers.policy import Policy, Share

TEXTS = "Once upon a time", "Lily", "Tim and his dog saw a big red ball. They"
CPU = torch.device("cpu")


def answers(
    path: str,
    ranks: Ranks | None,
    *,
    texts: Sequence[str | list[int]] = TEXTS,
    percent: Sequence[float] | None = None,
    how: dict[str, Any] | None = None,
    lag: float = 0,
    slack: int = WINDOW_SLACK,
    **options: Any,
) -> dict[str, Any]:
    """Return the ids of a batch of distinct prompts, the bytes of the rank's weights and, except
    in a pipeline, a step's logits and its number of collectives.

    texts: prompts, each as text or as ids. percent: of weights and of the cache on the device and
    in host memory. how: changes to the GenerationConfig of greedy decoding. lag: seconds by which a
    stage receives tokens late. slack: of the rings of layers with sliding windows.
    """
    with window_slack(slack):
        return answered(path, ranks, texts, percent, how, lag, options)


def answered(
    path: str,
    ranks: Ranks | None,
    texts: Sequence[str | list[int]],
    percent: Sequence[float] | None,
    how: dict[str, Any] | None,
    lag: float,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return what `answers` returns."""
    if percent:
        WG, WC, CG, CC = percent
        options["policy"] = Policy(
            Share(WG, WC), Share(CG, CC), micro_batch=1, directory=Path(path).parent / "scratch"
        )
    lm = load_model(path, device="cpu", dtype=torch.float32, ranks=ranks, **options)
    if lag and ranks.rank < ranks.world_size - 1:
        lm = replace(lm, sampler=partial(LateSampler, lag, *lm.sampler.args))
    prompts = [lm.tokenizer.encode(t) if isinstance(t, str) else t for t in texts]
    how = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True} | (how or {})
    done = complete(lm, prompts, GenerationConfig(**how))
    result: dict[str, Any] = {"ids": [c.ids for c in done]}
    result["weights"] = sum({t.data_ptr(): t.nbytes for t in reversed(tensors(lm.model))}.values())
    if not options.get("pipeline") and not percent:
        caches = lm.make_caches(len(prompts), 512)  # the shape that is compiled already
        key_pos = torch.arange(64)
        for n in range(2):
            tokens = torch.tensor([prompt[n : n + 1] for prompt in prompts])
            with torch.inference_mode(), counted() as calls:
                result["logits"] = lm.decode(tokens, key_pos[n].expand_as(tokens), key_pos, caches)
        result["calls"] = dict(calls)
    return result


class LateSampler(BroadcastSampler):
    def __init__(self, lag: float, *given: Any):
        super().__init__(*given)
        self._lag = lag

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        time.sleep(self._lag)
        return super().__call__(*given)


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


class counted:
    """Counts the calls of the collectives in tp.py."""

    NAMES = "all_reduce", "all_gather"

    def __enter__(self) -> Counter:
        self._before = {name: getattr(tp, name) for name in self.NAMES}
        calls: Counter = Counter()
        for name, call in self._before.items():
            setattr(tp, name, self._counting(name, call, calls))
        return calls

    def _counting(self, name: str, call: Callable, calls: Counter) -> Callable:
        def counting(*given: Any) -> Any:
            calls[name] += 1
            return call(*given)

        return counting

    def __exit__(self, *error: Any) -> None:
        for name, call in self._before.items():
            setattr(tp, name, call)


def main(cases: Path, results: Path) -> None:
    torch.set_num_threads(1)
    ranks = join_process_group(CPU)
    found = [answers(case.pop("path"), ranks, **case) for case in json.loads(cases.read_text())]
    torch.save(found, results.with_name(f"{results.name}.{os.environ['RANK']}"))
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

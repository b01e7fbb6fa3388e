"""What each rank of a test runs: see `on_ranks` in test_tp.py.

torchrun --nproc_per_node=N tests/ranks_worker.py CASES.json RESULTS.pt
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import tp
from generate import GenerationConfig, complete
from load import load_model
from policy import Policy, Share
from ranks import Ranks, join, leave

TEXTS = "Once upon a time", "Lily", "Tim and his dog saw a big red ball. They"
CPU = torch.device("cpu")


def answers(
    path: str,
    ranks: Ranks | None,
    *,
    texts: Sequence[str] = TEXTS,
    percent: Sequence[float] | None = None,
    how: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Ids of distinct prompts in a batch and, eager and not in a pipeline, the logits of a step.

    percent: of weights and cache on the device and in host memory. how: to generate, else greedily.
    """
    if percent:
        WG, WC, CG, CC = percent
        options["policy"] = Policy(
            Share(WG, WC), Share(CG, CC), micro_batch=1, directory=Path(path).parent / "scratch"
        )
    lm = load_model(path, device="cpu", dtype=torch.float32, ranks=ranks, **options)
    prompts = [lm.tokenizer.encode(text) for text in texts]
    how = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True} | (how or {})
    done = complete(lm, prompts, GenerationConfig(**how))
    said: dict[str, Any] = {"ids": [c.ids for c in done]}
    said["weights"] = sum({t.data_ptr(): t.nbytes for t in reversed(tensors(lm.model))}.values())
    if lm.any_rows and not options.get("pipeline") and not percent:
        tokens = torch.tensor([prompt[:2] for prompt in prompts])
        slots = torch.arange(4)
        with torch.inference_mode(), counted() as calls:
            given = tokens, slots[:2].expand_as(tokens), slots, lm.make_caches(len(prompts), 4)
            said["logits"] = lm.model(*given)
        said["calls"] = dict(calls)
    return said


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


class counted:
    """Counts the collectives that are called."""

    NAMES = "all_reduce", "gather"

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
    ranks = join(CPU)
    found = [answers(case.pop("path"), ranks, **case) for case in json.loads(cases.read_text())]
    torch.save(found, results.with_name(f"{results.name}.{os.environ['RANK']}"))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

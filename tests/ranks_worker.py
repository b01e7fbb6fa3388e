"""Runs models and commands on several ranks, for tests: see on_ranks in test_tp.py, and serve.

python tests/ranks_worker.py N CASES.json RESULTS.pt

The process imports what all ranks need, and then starts them as torchrun does (launch), but as
copies of itself: to import torch and its compiler takes four seconds.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import window_slack
from torch.distributed import TCPStore

import tp
from engine import complete
from host.torch_private import import_dynamo
from layers.kv_cache import WINDOW_SLACK
from load import load_model
from pp import BroadcastSampler
from ranks import Ranks, join_process_group, leave_process_group
from text.generation_config import GenerationConfig
from tiers.policy import Policy, Share

TEXTS = "Once upon a time", "Lily", "Tim and his dog saw a big red ball. They"
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")


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


def launch(count: int, work: Callable[..., Any], *given: Any) -> int:
    """Call work(*given) on `count` ranks, and end all when one fails, as torchrun does. Return the
    exit code of the first that failed, or 0. This process must have no other threads."""
    import_dynamo()  # a collective does so
    port, sender = FORK.Pipe(duplex=False)
    store = FORK.Process(target=keep_store, args=(sender,))
    store.start()
    environment = {"MASTER_PORT": port.recv(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [
        FORK.Process(
            target=run_rank, args=(environment | {"RANK": n, "LOCAL_RANK": n}, work, given)
        )
        for n in range(count)
    ]
    for rank in ranks:
        rank.start()
    code, left = 0, set(ranks)
    while left:
        connection.wait(rank.sentinel for rank in left)
        ended = {rank for rank in left if not rank.is_alive()}
        left -= ended
        for rank in ended:
            if rank.exitcode and not code:
                code = rank.exitcode
                what = f"Signal {-code}" if code < 0 else f"exit code {code}"
                print(f"{rank.name}: {what}", file=sys.stderr, flush=True)
                for other in left:
                    other.terminate()
    store.kill()
    store.join()
    return code


def keep_store(port: connection.Connection) -> None:
    """Run the store through which ranks meet, in a process that no rank's end ends."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    end_with_parent()


def end_with_parent() -> None:
    """A parent that is killed, because it took too long, cannot end its ranks."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def run_rank(environment: dict[str, int], work: Callable[..., Any], given: Sequence[Any]) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    threading.Thread(target=end_with_parent, daemon=True).start()
    work(*given)


def serve() -> None:
    """Run commands on ranks, each of which stdin has a line of JSON for: the number of ranks, the
    words, and files for stdout and stderr. Answer with the exit code."""
    for name in ("eval", "generate"):
        importlib.import_module(name)  # once, and not on each rank
    jobs, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # ranks may read their stdin
    for line in jobs:
        count, words, *streams = json.loads(line)
        for number, name in enumerate(streams, 1):
            file = os.open(name, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        print(launch(count, command, words), file=replies, flush=True)


def command(words: Sequence[str]) -> None:
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def main(cases: Path, results: Path) -> None:
    torch.set_num_threads(1)
    ranks = join_process_group(CPU)
    found = [answers(case.pop("path"), ranks, **case) for case in json.loads(cases.read_text())]
    torch.save(found, results.with_name(f"{results.name}.{os.environ['RANK']}"))
    leave_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(launch(int(sys.argv[1]), main, Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        serve()

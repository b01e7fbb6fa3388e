"""All timings of one precision of a shape, in one process: decode, prefill, a pass that verifies.

    python benchmarks/gpu_decode.py --mode int4 --rows 1 8 64
    python benchmarks/gpu_decode.py --mode int4 --warm      # compiles all of it, and times nothing

Start at Timings. The model has random weights and is loaded once. Decoding is compiled for each
number of rows; prefill is timed eager and compiled, as one or the other may be faster. Each rate is
of whole runs of `complete`, which reads every token's id: the device is done when the clock stops.
What is compiled is timed with the caches of Inductor and Triton as they are, so that --warm in an
earlier process makes a warm start of it; --cold compiles the smallest step again without them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import WARM_UP_RUNS, Stats, provenance
from benchmarks.common import ROOT, exit_code, log, show, spread
from benchmarks.gpu_common import Attempts, nominal, seconds
from benchmarks.speculate import CycleTimes
from benchmarks.speculate import seconds as typical_seconds
from decoding import LoadedModel
from engine import complete, generate
from host.bandwidth import read_bandwidth
from host.devices import find_device
from layers.kv_cache import KVCache
from load import compile_now, compile_views, make_views, random_model
from quant.linear import make_scheme
from text.generation_config import GenerationConfig

PROMPT = 128  # tokens before those that are decoded
PREFILLS = {1: (128, 2048), 8: (128,)}  # lengths of prompts timed for so many rows
MOST = 128  # tokens decoded
VERIFIED = 6  # tokens of a pass
VERIFYING = "bf16", "int4"  # what drafts are verified with
PROFILED = 24  # steps


def cache_length(rows: int) -> int:
    """Of the caches for so many rows. One text has room for its longest prompt, and a draft's
    timings (gpu_speculate.py) take the same, as compiled code is for one length."""
    return max(PREFILLS.get(rows, (PROMPT,))) + MOST


class Timings:
    """A model, and figures as they come: compile seconds, decode, prefill and verify."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.attempt = args, device, Attempts()
        scheme = None if args.mode == "bf16" else make_scheme(args.mode)
        start = time.perf_counter()
        options = {"device": str(device), "scheme": scheme, "compile": True}
        self.lm = random_model(args.config, **options)
        views = make_views(self.lm.model, self.lm.tokenizer, compile=True, compile_prefill=True)
        self.prefilling = replace(self.lm, prefill=views.prefill)
        self.figures: dict[str, Any] = {"load_s": time.perf_counter() - start}
        self.figures |= {"compile_s": {}, "decode": {}, "prefill": {}}

    def run(self) -> None:
        if not self.args.warm:
            self.figures["read_bytes_per_s"] = read_bandwidth(self.device)
        for rows in self.args.rows:
            self.of_rows(rows)
        if self.args.profile:  # last, as a profiler may leave something running
            self.attempt("profile", self.profile)
        if self.args.cold:
            self.attempt("cold compile", self.cold)

    def of_rows(self, rows: int) -> None:
        """All that is timed with so many rows, on the same caches."""
        attempt, args = self.attempt, self.args
        caches = self.lm.make_caches(rows, min(cache_length(rows), self.lm.model.args.context))
        attempt(f"decode, {rows} rows", lambda: self.decode(rows, caches))
        if rows == 1 and args.mode in VERIFYING:
            attempt("verify", lambda: self.verify(caches))
        if rows in PREFILLS:
            attempt(f"prefill, {rows} rows", lambda: self.prefill(rows, caches))

    def compiled(self, name: str, call: Callable[[], Any]) -> None:
        """Make a call for the first time; what it takes is compilation."""
        took = self.figures["compile_s"][name] = seconds(call, self.device)
        log(f"{self.args.mode}: {name} compiled in {took:.1f} s")

    def prompts(self, rows: int, length: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        vocab = self.lm.model.args.vocab_size
        return torch.randint(vocab, (rows, length), generator=generator).tolist()

    def runs(self, lm: LoadedModel, caches: list[KVCache], length: int, new: int) -> list[Stats]:
        """Of as many rounds as are to count, after some that are not; --warm: of a short one."""
        prompts, warm_ups = self.prompts(caches[0].rows, length), WARM_UP_RUNS[self.device.type]
        rounds = self.args.rounds if not self.args.warm else 1 - warm_ups
        config = GenerationConfig(
            max_new_tokens=min(new, 2) if self.args.warm else new, temperature=0, ignore_eos=True
        )
        runs = [Stats(lm) for _ in range(warm_ups + rounds)]
        for stats in runs:
            complete(lm, prompts, config, caches=caches, stats=stats)
        return runs[warm_ups:]

    def decode(self, rows: int, caches: list[KVCache]) -> None:
        self.compiled(f"decode {rows}", lambda: compile_now(self.lm, caches))
        if runs := self.runs(self.lm, caches, PROMPT, self.args.new):
            rates = spread([run.decode_rate for run in runs])
            reads = spread([run.bandwidth for run in runs])
            self.figures["decode"][str(rows)] = {"tokens_per_s": rates, "bytes_per_s": reads}
            log(f"{self.args.mode}, {rows} rows: {show(rates)} tokens/s")

    def prefill(self, rows: int, caches: list[KVCache]) -> None:
        for length in PREFILLS[rows]:
            self.prefill_rate(f"{rows}x{length}", "eager", self.lm, caches, length)
        name = f"prefill {rows}"
        self.compiled(name, lambda: compile_now(self.prefilling, caches))
        for length in PREFILLS[rows]:
            self.prefill_rate(f"{rows}x{length}", "compiled", self.prefilling, caches, length)

    def prefill_rate(
        self, shape: str, how: str, lm: LoadedModel, caches: list[KVCache], length: int
    ) -> None:
        if runs := self.runs(lm, caches, length, 1):
            rates = spread([run.prefill_rate for run in runs])
            self.figures["prefill"].setdefault(shape, {})[how] = rates
            log(f"{self.args.mode}, prefill {shape}, {how}: {show(rates, 0)} tokens/s")

    @torch.inference_mode()
    def verify(self, caches: list[KVCache]) -> None:
        """A pass of some tokens over a step of one, in turns."""
        self.compiled("verify", lambda: compile_views(self.lm, caches, 2))
        parts = CycleTimes(self.lm, 0, GenerationConfig(temperature=0))
        step, verify = (parts.step(self.lm, caches, n, PROMPT) for n in (1, VERIFIED))
        for call in WARM_UP_RUNS[self.device.type] * (step, verify):
            call()
        if self.args.warm:
            return
        times = [
            [typical_seconds(call, self.device) for call in (step, verify)]
            for _ in range(self.args.rounds)
        ]
        ratio = spread([b / a for a, b in times])
        steps, passes = (spread(of) for of in zip(*times, strict=True))
        self.figures["verify"] = {"tokens": VERIFIED, "step_s": steps, "pass_s": passes}
        self.figures["verify"]["over_step"] = ratio
        log(f"{self.args.mode}, verifying {VERIFIED} tokens: {show(ratio)}x a step")

    def profile(self) -> None:
        """A trace of steps alone, past the ones in which CUDA graphs are recorded."""
        caches = self.lm.make_caches(1, min(cache_length(1), self.lm.model.args.context))
        config = GenerationConfig(max_new_tokens=2 * PROFILED, temperature=0, ignore_eos=True)
        steps = generate(self.lm, self.prompts(1, PROMPT), config, caches=caches)
        for _ in range(PROFILED):
            next(steps)
        kinds = torch.profiler.ProfilerActivity
        activity = kinds.CUDA if self.device.type == "cuda" else kinds.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in steps:
                pass
        profiler.export_chrome_trace(str(self.args.profile))

    def cold(self) -> None:
        """The step of one row, compiled with empty caches; Inductor has been imported by now."""
        from torch._inductor.utils import fresh_cache

        torch.compiler.reset()
        lm = make_views(self.lm.model, self.lm.tokenizer, compile=True, compile_prefill=False)
        caches = lm.make_caches(1, min(cache_length(1), lm.model.args.context))
        with fresh_cache():
            self.compiled("cold", lambda: compile_now(lm, caches))


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = find_device(args.device)
    said = {"benchmark": "gpu_decode", "mode": args.mode, "config": args.config.stem}
    said |= {"prompt": PROMPT, "new": args.new} | provenance(device)
    said |= {"nominal_bytes_per_s": nominal(said["machine"]), "warm": args.warm}
    timings = Timings(args, device)
    timings.run()
    return said | timings.figures | {"failed": timings.attempt.failed}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    shape = ROOT / "benchmarks" / "configs" / "llama-3.1-8b.json"
    add("--mode", choices=["bf16", "int8", "int4"], default="bf16", help="(default: bf16)")
    add("--config", type=Path, default=shape, help="(default: Llama 3.1 8B's)")
    add("--device", default="cuda", help="(default: cuda)")
    add("--rows", type=int, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    add("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    add("--new", type=int, default=MOST, help=f"tokens to decode, at most {MOST} (default)")
    add("--warm", action="store_true", help="compile every shape, for processes to come; no timing")
    add("--cold", action="store_true", help="at the end, compile one step with empty caches")
    add("--profile", type=Path, metavar="FILE", help="write a trace of steps of one row")
    args = parser.parse_args()
    if not 2 <= args.new <= MOST:
        parser.error(f"--new is 2 to {MOST}")
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

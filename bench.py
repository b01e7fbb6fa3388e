"""Measures the speed of generation, and compares it with the machine's memory bandwidth.

A step computes one new id for each row (text) of a batch. The ceiling is the memory's read
bandwidth, in bytes per second, which host/bandwidth.py measures.

Start at Stats, which times the steps of `generate` and counts the bytes that decoding reads.
`measure` is `generate.py --bench`, after llama.cpp's llama-bench: pp is prompt processing, that is
prefill, and tg is text generation, that is decoding.

Plain decoding reads every weight and the filled part of the KV cache once per step. So the bytes
per second that it reads, divided by the ceiling, tell how close it is to the limit, unless the
model fits into the processor's caches. Measuring the ceiling takes seconds and 1 GB of memory: only
--bench does it, and keeps the result.
"""

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from decoding import LoadedModel
from host.bandwidth import measured_bandwidth
from host.memory import cache_bytes, machine_name, size_text
from kernels.cpu.build import instruction_set
from layers.kv_cache import Cache
from text.generation_config import GenerationConfig

WARM_UP_RUNS = {"cpu": 1, "mps": 1, "cuda": 2}  # a CUDA graph warms up once, then is recorded


class Stats:
    """Seconds, tokens and bytes of one run, or the sums over several runs.

    The first new token of each text belongs to prefill: decoded_tokens, decode_seconds and
    decoded_bytes leave it out. reads_memory: whether the bytes of decoding may be compared with the
    ceiling. lm: the model of all runs. The caller sets load_seconds and compile_seconds.
    """

    def __init__(self, lm: LoadedModel):
        self.load_seconds = self.compile_seconds = 0.0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = self.prompt_tokens = self.decoded_tokens = self.decoded_bytes = 0
        self.new_tokens = 0  # decoded tokens, and the first token of each text
        # Decoding is compared with the ceiling only if the weights have at least twice the size of
        # the processor's caches: smaller models read most weights from the caches. Runs with a
        # draft are not compared, because the draft's reads are not counted.
        in_caches = lm.model.bytes_per_step() < 2 * cache_bytes(lm.device)
        self.reads_memory = lm.draft is None and not in_caches
        self._weight_bytes = lm.model.bytes_per_step()
        self._kv_slots = lm.model.kv_slots  # a function of the length of a row
        self._bytes_per_slot = lm.model.kv_bytes(1) / lm.model.kv_slots(1)

    def timed(
        self, steps: Iterator[list[list[int]]], prompts: Sequence[Sequence[int]], past: int = 0
    ) -> Iterator[list[list[int]]]:
        """Yield the steps unchanged, and add their seconds, tokens and bytes to this object.

        steps: lists of each row's new ids. The first step is prefill, with each row's first token.
        past: leading tokens of each prompt that the caches hold already. The time that the consumer
        spends after a step, on decoding its text for example, counts as time of the next step.
        """
        start, lengths = time.perf_counter(), list(map(len, prompts))  # lengths: of each row's text
        for n, step in enumerate(steps):
            seconds = time.perf_counter() - start
            self.new_tokens += sum(map(len, step))
            if n == 0:
                self.prefill_seconds += seconds
                self.prompt_tokens += sum(lengths) - past * len(prompts)
            else:
                self.decode_seconds += seconds
                self.steps += 1
                self.decoded_tokens += sum(map(len, step))
                rows = zip(lengths, step, strict=True)
                slots_read = sum(self._kv_slots(length) for length, ids in rows if ids)
                self.decoded_bytes += self._weight_bytes + self._bytes_per_slot * slots_read
            lengths = [length + len(ids) for length, ids in zip(lengths, step, strict=True)]
            start = time.perf_counter()
            yield step

    @property
    def prefill_rate(self) -> float:
        """Return the prompt tokens per second. 1e-9: before any run, 0 and no division by 0."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Return the decoded tokens per second."""
        return self.decoded_tokens / max(self.decode_seconds, 1e-9)

    @property
    def bandwidth(self) -> float:
        """Return the bytes per second that decoding read: weights and KV cache, not activations."""
        return self.decoded_bytes / max(self.decode_seconds, 1e-9)

    def report(self, ceiling: float | None) -> Iterator[str]:
        """Yield the lines printed after a run: loading, prefill, and decode if there were steps.

        ceiling: see above; None if it was not measured.
        """
        compiled = f", compiled in {self.compile_seconds:.1f} s" if self.compile_seconds else ""
        kernels = f", CPU kernels for {name}" if (name := instruction_set()) else ""
        yield f"loaded in {self.load_seconds:.1f} s{compiled}{kernels}"
        yield (
            f"prefill: {self.prompt_tokens} tokens in {self.prefill_seconds:.2f} s, "
            f"{self.prefill_rate:.1f} tokens/s"
        )
        if self.decoded_tokens:
            reads = ""
            if self.reads_memory:
                reads = f", {size_text(self.decoded_bytes / self.decoded_tokens)} per token"
            if ceiling and self.reads_memory:
                reads += (
                    f", {size_text(self.bandwidth)}/s, {self.bandwidth / ceiling:.0%} of the "
                    f"{size_text(ceiling)}/s measured here"
                )
            yield (
                f"decode: {self.decoded_tokens} tokens in {self.decode_seconds:.2f} s, "
                f"{self.decode_rate:.1f} tokens/s{reads}"
            )


def measure(
    lm: LoadedModel,
    complete: Callable[..., Any],
    caches: Sequence[Cache],
    config: GenerationConfig,
    prompt_length: int,
    repeats: int,
) -> dict[str, Any]:
    """Run prefill and decode `repeats` times after warm-up, and print a table on stderr.

    complete: engine.complete; a parameter, because this file stands below engine.py and may not
    import it. The prompts are random ids, one for each row of the caches, of prompt_length; every
    text gets config.max_new_tokens tokens, as EOS and stop strings are ignored. The caches must
    have room for both. Returns the settings, the tokens per second of each timed run, the bytes per
    second that decoding read (None with a draft, whose reads are not counted), the ceiling, and
    provenance().
    """
    generator = torch.Generator().manual_seed(config.seed % 2**63)  # it takes 64 bits
    shape = (caches[0].rows, prompt_length)
    prompts = torch.randint(lm.model.args.vocab_size, shape, generator=generator).tolist()
    config = dataclasses.replace(config, ignore_eos=True, stop=())
    ceiling = measured_bandwidth(lm.device)
    print(f"ceiling: memory is read at {size_text(ceiling)}/s", file=sys.stderr)
    runs = [Stats(lm) for _ in range(WARM_UP_RUNS[lm.device.type] + repeats)]
    for stats in tqdm(runs, desc="bench", leave=False, disable=None):
        complete(lm, prompts, config, caches=caches, stats=stats)
    runs = runs[-repeats:]
    tests = {
        f"pp{prompt_length}": [run.prefill_rate for run in runs],
        f"tg{config.max_new_tokens}": [run.decode_rate for run in runs],
    }
    print_table(tests, len(prompts))
    reads = statistics.median(run.bandwidth for run in runs)
    if runs[0].reads_memory:
        print(f"decode reads {size_text(reads)}/s, {reads / ceiling:.0%} of it", file=sys.stderr)
    return {
        "prompt_length": prompt_length,
        "new_tokens": config.max_new_tokens,
        "batch": len(prompts),
        "tokens_per_s": tests,
        "decode_bytes_per_s": None if lm.draft else reads,
        "read_bytes_per_s": ceiling,
    } | provenance(lm.device)


def print_table(tests: dict[str, list[float]], batch: int) -> None:
    """Print the mean and the standard deviation of each test's tokens per second on stderr.

    tests: name, such as pp512, -> the rate of each run. batch: rows.
    """
    print(f"{'test':>8} {'batch':>6} {'tokens/s':>10} {'sd':>8}", file=sys.stderr)
    for test, rates in tests.items():
        mean, deviation = statistics.mean(rates), statistics.pstdev(rates)
        print(f"{test:>8} {batch:6} {mean:10.2f} {deviation:8.2f}", file=sys.stderr)


def provenance(device: torch.device) -> dict[str, str | None]:
    """Return commit, machine, versions, command and date, to store with measured figures. device:
    that of the model, which names the machine.

    "cpu_kernels": the instruction set of the CPU kernels that this process has loaded, or None.
    """
    root = Path(__file__).parent
    # The commit's hash, and whether files have changed; --exclude=* ignores tags.
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {
        "commit": commit or "unknown",
        "machine": machine_name(device),
        "torch": torch.__version__,
        "cpu_kernels": instruction_set(),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }

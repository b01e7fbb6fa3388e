"""Measures the speed-up of speculative decoding, and compares it with a prediction.

    python benchmarks/speculate.py                    # all parts, some ten minutes
    python benchmarks/speculate.py --parts synthetic --acceptance 0.6 0.9

Start at main. Plain and speculative runs alternate; each result is a median of ratios of a round.

demo: the demo model with its trained draft and its own copies, on its own texts. synthetic: a large
shape with random weights. It computes real steps, but its logits are replaced, so that the model
draws a text written beforehand, and the draft draws the same text except for random errors at the
chosen acceptance rate. verify: a verify pass of several tokens beside a step. ngram: the large
shape draws the answers of texts/lookup.jsonl, some of which repeat their prompts.

The prediction: a cycle of k draft tokens yields E tokens, as counted, and takes the time of k draft
steps and one verify pass over k + 1 tokens, measured alone; plain decoding takes E steps for them.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from bench import Stats, provenance
from benchmarks.common import CONFIG, ROOT, Others, exit_code, log, show, spread
from compiled import has_graphs
from decoding import LoadedModel
from draft_length import DraftLengthController
from engine import complete
from host.devices import find_device
from layers.kv_cache import KVCache, visible_length
from load import compile_now, load_model, random_model
from sampling import Sampler
from speculate import ModelDraft, NgramDraft, SelfDraft
from text.generation_config import GenerationConfig
from text.tokenizer import Tokenizer, load_tokenizer

DEMO = ROOT / "checkpoints"
TEXTS = Path(__file__).resolve().parent / "texts" / "lookup.jsonl"
LLAMA_2 = ROOT / ".." / "shared" / "data" / "tokenizers" / "llama-2"
PROMPTS = "Once upon a time", "Lily", "Tim and his dog saw a big red ball. They", "One day, a"
PROMPT_LENGTH = 128


@dataclass(frozen=True)
class ScriptedView:
    """A view of a model whose likeliest token at each position is that of a script, (context,)."""

    view: Callable[..., Tensor]
    script: Tensor

    def __call__(
        self, tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: list[KVCache], *at: Tensor
    ) -> Tensor:
        logits = self.view(tokens, pos, key_pos, caches, *at)  # (B, T, V) or (N, V)
        if at:
            pos = pos.flatten()[at[0]]  # (N,)
        after = self.script[(pos + 1).clamp_max(len(self.script) - 1)]  # (B, T) or (N,)
        return logits.clone().scatter_(-1, after.unsqueeze(-1), 1e4)


def scripted(lm: LoadedModel, script: Tensor) -> LoadedModel:
    """Return the model without a draft, with both views scripted."""
    prefill, decode = ScriptedView(lm.prefill, script), ScriptedView(lm.decode, script)
    return dataclasses.replace(lm, decode=decode, prefill=prefill, draft=None)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of calls repeated for 0.2 s, at least three times."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.2:
        sync(device)
        start = time.perf_counter()
        call()
        sync(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class PairedRuns:
    """Plain and speculative decoding of the same prompts, in alternating runs."""

    def __init__(self, plain: LoadedModel, drafted: LoadedModel, config: GenerationConfig):
        self.plain, self.drafted, self.config = plain, drafted, config
        self.ratios: list[float] = []
        self.rates: dict[str, list[float]] = {"plain": [], "speculative": []}

    def run(self, lm: LoadedModel, prompts: list[list[int]], caches: list[KVCache]) -> Stats:
        stats = Stats(lm)
        for row, prompt in enumerate(prompts):
            given = {"streams": [row], "caches": caches, "stats": stats}
            self.texts.append(complete(lm, [prompt], self.config, **given)[0].ids)
        return stats

    def round(self, prompts: list[list[int]], caches: list[KVCache]) -> None:
        self.texts: list[list[int]] = []
        plain = self.run(self.plain, prompts, caches)
        drafted = self.run(self.drafted, prompts, caches)
        self.identical = self.texts[: len(prompts)] == self.texts[len(prompts) :]
        self.ratios.append(drafted.decode_rate / plain.decode_rate)
        self.rates["plain"].append(plain.decode_rate)
        self.rates["speculative"].append(drafted.decode_rate)

    def figures(self) -> dict[str, Any]:
        stats = self.drafted.draft.controller.stats
        return {
            "speed_up": spread(self.ratios),
            "tokens_per_s": {name: spread(rates) for name, rates in self.rates.items()},
            "tokens_per_cycle": stats.tokens / max(stats.cycles, 1),
            "draft_tokens": stats.drafted,
            "accepted_tokens": stats.accepted,
            "same_text": self.identical,
        }


class CycleTimes:
    """Times a plain step, and a cycle of k draft steps and a verify pass, at a place in a text."""

    def __init__(self, plain: LoadedModel, k: int, config: GenerationConfig):
        self.plain, self.k = plain, k
        self.sampler = Sampler(config, [0], plain.device)
        self.predicted: list[float] = []  # speed-ups

    def step(
        self, lm: LoadedModel, caches: list[KVCache], width: int, past: int
    ) -> Callable[[], list[list[int]]]:
        """Return a function in which a model reads `width` tokens and draws one after each."""
        key_pos = torch.arange(caches[0].length, device=lm.device)
        tokens = torch.ones(1, width, dtype=torch.long, device=lm.device)
        pos, visible = (
            key_pos[None, past : past + width],
            visible_length(past + width, len(key_pos)),
        )
        return lambda: self.sampler(lm.decode(tokens, pos, key_pos[:visible], caches), pos).tolist()

    @torch.inference_mode()
    def round(
        self,
        draft: LoadedModel,
        caches: list[KVCache],
        draft_caches: list[KVCache],
        past: int,
        tokens: float,
    ) -> None:
        """Measure once, and add the predicted speed-up. tokens: that a cycle yields."""
        step = self.step(self.plain, caches, 1, past)
        verify_pass = self.step(self.plain, caches, self.k + 1, past)
        draft_step = self.step(draft, draft_caches, 1, past)
        plain = seconds(step, self.plain.device)
        # Together, because the two models push each other's weights out of the CPU's caches.
        calls = [draft_step] * self.k + [verify_pass]
        cycle = seconds(lambda: [call() for call in calls], self.plain.device)
        self.predicted.append(tokens * plain / cycle)


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the demo model, compiled, greedy and sampled, with fixed and chosen k."""
    found: dict[str, Any] = {}
    options = {"device": args.device, "compile": True, "compile_prefill": True}
    plain = load_model(DEMO / "demo", **options)
    for draft, k in (
        ("demo-draft", 2),
        ("self-int4", 4),
        ("demo-draft", None),
        ("self-int4", None),
    ):
        given = DEMO / draft if draft == "demo-draft" else draft
        lm = load_model(DEMO / "demo", **options, draft=given, speculate_k=k)
        caches = lm.make_caches(1, 400)
        compile_now(plain, caches), compile_now(lm, caches)
        for temperature in (0, 0.8):
            config = GenerationConfig(300, temperature, ignore_eos=True)
            name = f"{draft}, {f'k {k}' if k else 'auto'}, temperature {temperature}"
            found[name] = demo_rounds(PairedRuns(plain, lm, config), caches, k, args.rounds)
            log_speed_up(name, found[name])
    return found


def demo_rounds(
    runs: PairedRuns, caches: list[KVCache], k: int | None, rounds: int
) -> dict[str, Any]:
    """Warm up, then return the figures of `rounds` rounds."""
    plain, lm, config = runs.plain, runs.drafted, runs.config
    prompts = [plain.tokenizer.encode(text) for text in PROMPTS]
    runs.round(prompts, caches)
    drafted = dataclasses.replace(lm, draft=with_new_controller(lm.draft, k))
    runs, times = PairedRuns(plain, drafted, config), CycleTimes(plain, k or 0, config)
    _, draft_caches, _ = lm.draft.warm_up_inputs(caches)
    for _ in range(rounds):
        runs.round(prompts, caches)
        stats = drafted.draft.controller.stats
        if k:
            times.round(lm.draft.lm, caches, draft_caches, 150, stats.tokens / stats.cycles)
    return runs.figures() | ({"formula": spread(times.predicted)} if k else {})


def with_new_controller(draft: ModelDraft | SelfDraft, k: int | None) -> ModelDraft | SelfDraft:
    """Return the same draft with a controller that has counted nothing yet."""
    return type(draft)(DraftLengthController(k, has_graphs(draft.lm.decode)), draft.lm)


def log_speed_up(name: str, figures: dict[str, Any]) -> None:
    formula = figures.get("formula")
    ratio = figures["speed_up"]["median"] / formula["median"] if formula else 0
    beside = f", predicted {show(formula)}, measured over predicted {ratio:.2f}" if formula else ""
    log(
        f"{name}: {show(figures['speed_up'])}x plain decoding{beside}; "
        f"{figures['tokens_per_cycle']:.2f} tokens a cycle"
        f"{'' if figures['same_text'] else '; ANOTHER TEXT'}"
    )


class Large:
    """The large shape and its draft, loaded once for all scripts."""

    def __init__(self, args: argparse.Namespace):
        options = {"device": args.device, "compile": not args.eager}
        draft = random_model(args.draft_config, **options) if args.draft_config else "self-int4"
        self.lm = random_model(args.config, **options, draft=draft)
        self.caches = self.lm.make_caches(1, 2047)
        compile_now(self.lm, self.caches)
        self.vocab, self.device = self.lm.model.args.vocab_size, self.lm.device

    def script(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab, (2048,), generator=generator).to(self.device)


def synthetic(args: argparse.Namespace, large: Large) -> dict[str, Any]:
    """Measure the large shape at the chosen acceptance rates, with a fixed and with a chosen k."""
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(args.seed)
    for acceptance in args.acceptance:
        for k in (args.speculate_k, None):
            name = f"acceptance {acceptance}, {f'k {k}' if k else 'auto'}"
            found[name] = synthetic_rounds(args, large, acceptance, k, generator)
            log_speed_up(f"{args.config.stem}, {name}", found[name])
    return found


def synthetic_rounds(
    args: argparse.Namespace,
    large: Large,
    acceptance: float,
    k: int | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Run args.rounds rounds after some to warm up, each with another text; return the figures."""
    config = GenerationConfig(args.new_tokens, temperature=0, ignore_eos=True)
    graphs = has_graphs(large.lm.decode)  # the first cycles record them and are not judged
    own_caches = isinstance(large.lm.draft, ModelDraft)
    controller, times, ratios = DraftLengthController(k, graphs, own_caches), None, []
    rates: dict[str, list[float]] = {"plain": [], "speculative": []}
    # On a GPU the controller tries other k for a while, and each records CUDA graphs.
    warm_ups = 4 if graphs else 1
    for n in tqdm(range(args.rounds + warm_ups), desc="rounds", leave=False, disable=None):
        script = large.script(n)
        wrong = (torch.rand(len(script), generator=generator) >= acceptance).to(large.device)
        draft_lm = scripted(large.lm.draft.lm, (script + wrong.long()) % large.vocab)
        plain = scripted(large.lm, script)
        draft = type(large.lm.draft)(controller, draft_lm)
        runs = PairedRuns(plain, dataclasses.replace(plain, draft=draft), config)
        times = times or CycleTimes(plain, k or 0, config)
        if n >= warm_ups:
            runs.ratios, runs.rates = ratios, rates
        runs.round([script[:PROMPT_LENGTH].tolist()], large.caches)
        if n >= warm_ups and k:
            past = PROMPT_LENGTH + args.new_tokens // 2
            tokens = controller.stats.tokens / controller.stats.cycles
            # No variable keeps the draft's caches: the next round's then have their addresses, for
            # which CUDA graphs are recorded.
            given = large.caches, draft.warm_up_inputs(large.caches)[1], past, tokens
            times.round(draft_lm, *given)
            del given
    return runs.figures() | ({"formula": spread(times.predicted)} if k else {})


@torch.inference_mode()
def verify(args: argparse.Namespace, large: Large) -> dict[str, Any]:
    """Return the time of a verify pass over that of a step, measured in the same round."""
    times = CycleTimes(large.lm, 0, GenerationConfig(temperature=0))
    widths = 1, 2, 4, 8, 16
    passes = {n: times.step(large.lm, large.caches, n, PROMPT_LENGTH) for n in widths}
    ratios: dict[int, list[float]] = {width: [] for width in widths if width > 1}
    for n in range(3 * args.rounds + 1):
        measured = {width: seconds(call, large.device) for width, call in passes.items()}
        for width, of_width in ratios.items():
            if n:  # the first round warms up
                of_width.append(measured[width] / measured[1])
    found = {width: spread(of_width) for width, of_width in ratios.items()}
    for width, figures in found.items():
        log(f"{args.config.stem}, a verify pass of {width} tokens: {show(figures)}x a step")
    return found


def ngram(args: argparse.Namespace, large: Large) -> dict[str, Any]:
    """Measure n-gram lookup on the answers of texts/lookup.jsonl."""
    found: dict[str, Any] = {}
    tokenizer: Tokenizer = load_tokenizer(LLAMA_2 if LLAMA_2.is_dir() else DEMO / "demo")
    log(f"ngram: tokens of {'llama-2' if LLAMA_2.is_dir() else 'the demo model'}")
    for case in map(json.loads, TEXTS.read_text().splitlines()):
        prompt = tokenizer.encode(case["prompt"])
        answer = tokenizer.encode(case["answer"], bos=False)[: 2 * args.new_tokens]
        plain = scripted(large.lm, torch.tensor([*prompt, *answer], device=large.device))
        config = GenerationConfig(len(answer), temperature=0, ignore_eos=True)
        runs = PairedRuns(plain, with_ngram_draft(plain), config)
        for n in tqdm(range(args.rounds), desc="rounds", leave=False, disable=None):
            if n:  # a new controller, because this one has seen the text
                runs.drafted = with_ngram_draft(plain)
            runs.round([prompt], large.caches)
        name = f"{case['kind']}, {case['name']}"
        found[name] = runs.figures() | {"prompt": len(prompt), "answer": len(answer)}
        log_speed_up(f"ngram, {name}", found[name])
    return found


def with_ngram_draft(lm: LoadedModel) -> LoadedModel:
    return dataclasses.replace(lm, draft=NgramDraft(DraftLengthController(None)))


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    args.device = find_device(args.device).type
    others = Others() if args.device == "cpu" else None
    found = {"demo": demo(args)} if "demo" in args.parts else {}
    if set(args.parts) - {"demo"}:
        large = Large(args)
        for part in (verify, synthetic, ngram):
            if part.__name__ in args.parts:
                found[part.__name__] = part(args, large)
    return {
        "benchmark": "speculate",
        "config": args.config.stem,
        "draft": args.draft_config.stem if args.draft_config else "self-int4",
        "compiled": not args.eager,
        "parts": found,
        "others_cpu_share": others.share() if others else None,
    } | provenance(torch.device(args.device))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, parts = parser.add_argument, ["demo", "verify", "synthetic", "ngram"]
    add("--parts", nargs="+", choices=parts, default=parts, help="(default: all)")
    add("--config", type=Path, default=CONFIG, help="a large shape (default: TinyLlama-1.1B's)")
    add("--draft_config", type=Path, help="its draft's shape (default: its own int4 copy)")
    add("--acceptance", nargs="+", type=float, default=[0.8], help="(default: 0.8)")
    add("--speculate_k", type=int, default=4, help="of the synthetic part (default: 4; and auto)")
    add(
        "--new_tokens",
        type=int,
        default=100,
        help="of a text; twice that of an answer (default: 100)",
    )
    add("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    add("--eager", action="store_true", help="do not compile the large shape")
    add("--device", default="auto", help="(default: auto)")
    add("--threads", type=int, default=2, help="(default: 2)")
    add("--seed", type=int, default=0, help="of the draft's errors (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

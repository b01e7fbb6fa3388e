"""What speculation gains over plain decoding, beside what its parts' times say it must gain.

    python benchmarks/speculate.py                    # all parts, some ten minutes
    python benchmarks/speculate.py --parts synthetic --acceptance 0.6 0.9

Start at main. Plain and speculative runs alternate; each result is a median of ratios of a round.

demo: the demo model with its trained draft and its own copies, on its own texts. synthetic: a large
shape with random weights, where the model says a text that was written beforehand, and the draft
says the same but for the guesses that a die makes wrong: what is computed is real, acceptance is
what it is told to be. verify: one sweep of several tokens beside a step. ngram: the large shape
again says the answers of texts/lookup.jsonl, some of which repeat their prompts.

The formula: of a cycle of k guesses come E tokens, as counted, for the time of k draft steps and a
sweep of k + 1 tokens, measured by themselves; plain decoding takes E steps for them.
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
from decoding import LoadedModel
from draft_length import DraftLengthController
from engine import complete
from host.devices import find_device
from load import compile_now, load_model, random_model
from model import KVCache, visible_length
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
class Said:
    """A view of a model that, whatever it computes, finds a text the likeliest: script, (context,),
    is the token of each position."""

    view: Callable[..., Tensor]
    script: Tensor

    def __call__(
        self, tokens: Tensor, pos: Tensor, slots: Tensor, caches: list[KVCache], *at: Tensor
    ) -> Tensor:
        logits = self.view(tokens, pos, slots, caches, *at)  # (B, T, V) or (N, V)
        if at:
            pos = pos.flatten()[at[0]]  # (N,)
        after = self.script[(pos + 1).clamp_max(len(self.script) - 1)]  # (B, T) or (N,)
        return logits.clone().scatter_(-1, after.unsqueeze(-1), 1e4)


def saying(lm: LoadedModel, script: Tensor) -> LoadedModel:
    return dataclasses.replace(
        lm, decode=Said(lm.decode, script), prefill=Said(lm.prefill, script), draft=None
    )


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call, of as many as a fifth of a second has room for, three at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.2:
        sync(device)
        start = time.perf_counter()
        call()
        sync(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Sides:
    """Plain and speculative decoding of the same prompts, in turns."""

    def __init__(self, plain: LoadedModel, drafted: LoadedModel, config: GenerationConfig):
        self.plain, self.drafted, self.config = plain, drafted, config
        self.ratios: list[float] = []
        self.rates: dict[str, list[float]] = {"plain": [], "speculative": []}

    def run(self, lm: LoadedModel, prompts: list[list[int]], caches: list[KVCache]) -> Stats:
        stats = Stats(lm)
        for row, prompt in enumerate(prompts):
            self.texts.append(
                complete(lm, [prompt], self.config, rows=[row], caches=caches, stats=stats)[0].ids
            )
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
        report = self.drafted.draft.controller.stats
        return {
            "speed_up": spread(self.ratios),
            "tokens_per_s": {name: spread(rates) for name, rates in self.rates.items()},
            "tokens_per_cycle": report.tokens / max(report.cycles, 1),
            "guesses_offered": report.drafted,
            "guesses_held": report.accepted,
            "same_text": self.identical,
        }


class Parts:
    """The bare work of a step, and of a cycle of k draft steps and a sweep of k + 1 tokens, in the
    middle of a text."""

    def __init__(self, plain: LoadedModel, k: int, config: GenerationConfig):
        self.plain, self.k = plain, k
        self.sampler = Sampler(config, [0], plain.device)
        self.predicted: list[float] = []

    def step(
        self, lm: LoadedModel, caches: list[KVCache], width: int, past: int
    ) -> Callable[[], list[list[int]]]:
        """To be called: a model reads so many tokens, and draws after each."""
        slots = torch.arange(caches[0].length, device=lm.device)
        tokens = torch.ones(1, width, dtype=torch.long, device=lm.device)
        pos, visible = slots[None, past : past + width], visible_length(past + width, len(slots))
        return lambda: self.sampler(lm.decode(tokens, pos, slots[:visible], caches), pos).tolist()

    @torch.inference_mode()
    def round(
        self, drafting: LoadedModel, caches: list[KVCache], drafts: list[KVCache], past: int,
        tokens: float,
    ) -> None:  # fmt: skip
        """tokens: of a cycle."""
        step = self.step(self.plain, caches, 1, past)
        sweep = self.step(self.plain, caches, self.k + 1, past)
        guess = self.step(drafting, drafts, 1, past)
        plain = seconds(step, self.plain.device)
        # In turns, as what one has read pushes the other out of the CPU's caches.
        cycle = seconds(lambda: [part() for part in (*[guess] * self.k, sweep)], self.plain.device)
        self.predicted.append(tokens * plain / cycle)


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy and sampled, compiled, each draft with k fixed and chosen."""
    found: dict[str, Any] = {}
    options = {"device": args.device, "compile": True, "compile_prefill": True}
    plain = load_model(DEMO / "demo", **options)
    prompts = [plain.tokenizer.encode(text) for text in PROMPTS]
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
            sides, parts = Sides(plain, lm, config), Parts(plain, k or 0, config)
            sides.round(prompts, caches)  # warms up
            sides = Sides(plain, dataclasses.replace(lm, draft=renewed(lm.draft, k)), config)
            _, drafts, _ = lm.draft.warm_up_inputs(caches)
            for _ in range(args.rounds):
                sides.round(prompts, caches)
                report = sides.drafted.draft.controller.stats
                if k:
                    parts.round(lm.draft.lm, caches, drafts, 150, report.tokens / report.cycles)
            name = f"{draft}, {f'k {k}' if k else 'auto'}, temperature {temperature}"
            found[name] = sides.figures() | ({"formula": spread(parts.predicted)} if k else {})
            say(name, found[name])
    return found


def renewed(draft: ModelDraft | SelfDraft, k: int | None) -> ModelDraft | SelfDraft:
    """The same draft, that has counted nothing yet."""
    return type(draft)(DraftLengthController(k), draft.lm)


def say(name: str, figures: dict[str, Any]) -> None:
    formula = figures.get("formula")
    ratio = figures["speed_up"]["median"] / formula["median"] if formula else 0
    beside = f", the formula says {show(formula)}, measured over it {ratio:.2f}" if formula else ""
    log(
        f"{name}: {show(figures['speed_up'])}x plain decoding{beside}; "
        f"{figures['tokens_per_cycle']:.2f} tokens a cycle"
        f"{'' if figures['same_text'] else '; ANOTHER TEXT'}"
    )


class Large:
    """The large shape, loaded once, with its draft; the scripts are put on it."""

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
    found: dict[str, Any] = {}
    config = GenerationConfig(args.new_tokens, temperature=0, ignore_eos=True)
    generator = torch.Generator().manual_seed(args.seed)
    for acceptance in args.acceptance:
        for k in (args.speculate_k, None):
            sides = parts = None
            controller = DraftLengthController(k)
            for n in tqdm(range(args.rounds + 1), desc="rounds", leave=False, disable=None):
                script = large.script(n)
                wrong = (torch.rand(len(script), generator=generator) >= acceptance).to(
                    large.device
                )
                drafting = saying(large.lm.draft.lm, (script + wrong.long()) % large.vocab)
                plain = saying(large.lm, script)
                draft = type(large.lm.draft)(controller, drafting)
                now = Sides(plain, dataclasses.replace(plain, draft=draft), config)
                if n > 0:  # the first warmed up
                    now.ratios, now.rates = sides.ratios, sides.rates
                sides = now
                parts = parts or Parts(plain, k or 0, config)
                sides.round([script[:PROMPT_LENGTH].tolist()], large.caches)
                if n == 0:
                    sides.ratios, sides.rates = [], {"plain": [], "speculative": []}
                elif k:
                    _, drafts, _ = draft.warm_up_inputs(large.caches)
                    place = PROMPT_LENGTH + args.new_tokens // 2
                    tokens = controller.stats.tokens / controller.stats.cycles
                    parts.round(drafting, large.caches, drafts, place, tokens)
            name = f"acceptance {acceptance}, {f'k {k}' if k else 'auto'}"
            found[name] = sides.figures() | ({"formula": spread(parts.predicted)} if k else {})
            say(f"{args.config.stem}, {name}", found[name])
    return found


@torch.inference_mode()
def verify(args: argparse.Namespace, large: Large) -> dict[str, Any]:
    """A sweep of several tokens over a step of one, in the same round."""
    parts = Parts(large.lm, 0, GenerationConfig(temperature=0))
    sweeps = {n: parts.step(large.lm, large.caches, n, PROMPT_LENGTH) for n in (1, 2, 4, 8, 16)}
    ratios: dict[int, list[float]] = {width: [] for width in sweeps if width > 1}
    for n in range(3 * args.rounds + 1):
        times = {width: seconds(sweep, large.device) for width, sweep in sweeps.items()}
        for width, of in ratios.items():
            if n:  # the first round warmed up
                of.append(times[width] / times[1])
    found = {width: spread(of) for width, of in ratios.items()}
    for width, figures in found.items():
        log(f"{args.config.stem}, verifying {width} tokens at once: {show(figures)}x a step")
    return found


def ngram(args: argparse.Namespace, large: Large) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tokenizer: Tokenizer = load_tokenizer(LLAMA_2 if LLAMA_2.is_dir() else DEMO / "demo")
    log(f"ngram: tokens of {'llama-2' if LLAMA_2.is_dir() else 'the demo model'}")
    for case in map(json.loads, TEXTS.read_text().splitlines()):
        prompt = tokenizer.encode(case["prompt"])
        answer = tokenizer.encode(case["answer"], bos=False)[: 2 * args.new_tokens]
        script = torch.tensor([*prompt, *answer], device=large.device)
        plain = saying(large.lm, script)
        config = GenerationConfig(len(answer), temperature=0, ignore_eos=True)
        sides = Sides(
            plain, dataclasses.replace(plain, draft=NgramDraft(DraftLengthController(None))), config
        )
        for n in tqdm(range(args.rounds), desc="rounds", leave=False, disable=None):
            if n:  # what it learns of a text is not to help it with the same text
                sides.drafted = dataclasses.replace(
                    plain, draft=NgramDraft(DraftLengthController(None))
                )
            sides.round([prompt], large.caches)
        name = f"{case['kind']}, {case['name']}"
        found[name] = sides.figures() | {"prompt": len(prompt), "answer": len(answer)}
        say(f"ngram, {name}", found[name])
    return found


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
    add("--seed", type=int, default=0, help="of the die (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

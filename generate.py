"""Generate text: load a model, prefill, decode, stream. The command and the Python interface.

    python generate.py --compile --checkpoint_path checkpoints/demo --prompt "Once upon a time"

Start at `generate`, the loop that everything else consumes: streaming, files of prompts (jobs.py),
chat (chat.py) and benchmarks (bench.py). Above it stands `load_model`, the one place where a
model's features meet; below it `complete`, which turns tokens into text; the command is at the end.

    lm = load_model("checkpoints/demo", compile=True)
    prompts = [lm.tokenizer.encode(text) for text in ("Once upon a time", "The big dog")]
    for completion in complete(lm, prompts, GenerationConfig(max_new_tokens=50)):
        print(completion.text)

Based on gpt-fast (prefill and decode as two views of one model) and mlx-lm (generation as a
generator that launches a step before it reads the one before).
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import bench
import chat
import jobs
from checkpoint import Checkpoint, allocate, available_memory, check_memory, read_json
from hf import model_args
from model import KVCache, Transformer
from sampling import GenerationConfig, Sampler
from tokenizer import Tokenizer, id_tokenizer, load_tokenizer

DEMO_PROMPT = "Once upon a time"
DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PREFILL_TOKENS = 4096  # of all rows together in one call: bounds the mask and the activations


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run: its two views, eager or compiled, and its tokenizer."""

    model: Transformer
    prefill: Callable[..., Tensor]  # many tokens per row; called as Transformer.forward is
    decode: Callable[..., Tensor]  # one token per row
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @torch.inference_mode()
    def make_caches(self, batch: int, length: int) -> list[KVCache]:
        """Caches for `batch` rows of up to `length` tokens; MemoryError before allocating."""
        length = visible_slots(length, self.model.args.context)
        dtype = self.model.tok_embeddings.weight.dtype
        needed = batch * length * self.model.args.kv_bytes_per_token(dtype)
        what = f"a KV cache of {batch} rows of {length} tokens"
        check_memory(needed, self.device, what, "lower --batch_size or --max_new_tokens")
        return self.model.make_caches(batch, length)


@torch.inference_mode()
def generate(
    lm: LoadedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig = GenerationConfig(),
    *,
    rows: Sequence[int] | None = None,
    caches: list[KVCache] | None = None,
    past: int = 0,
    finished: Callable[[int], bool] = lambda row: False,
) -> Iterator[list[list[int]]]:
    """Continue B prompts together; each row gets what it would get alone.

    prompts: B lists of token ids, of any lengths. rows: the random stream that each row draws
    from, default 0 to B - 1. caches: from lm.make_caches, for B rows or more, so that a later call
    can use them (and what was compiled for their shape) again; past: how many tokens of every
    prompt they hold already. finished: asked about each live row after each step, for ends that
    tokens alone do not show.

    Yields, for each step, B lists of new ids: one id for a live row, none for a row that ended
    with an id of tokenizer.eos_ids, with max_new_tokens or with the model's context.
    Raises ValueError for a prompt that is empty, too long or has ids that the model lacks.
    """
    args = lm.model.args
    check_prompts(prompts, args.context, args.vocab_size)
    limits = [min(config.max_new_tokens, args.context - len(p)) for p in prompts]
    longest = max(map(len, prompts))
    if caches is None:
        caches = lm.make_caches(len(prompts), max(512, longest + max(limits)))
    B, idle = len(prompts), caches[0].rows - len(prompts)  # idle: rows computed and not looked at
    sampler = Sampler(config, [*(rows or range(B)), *[0] * idle], lm.device)
    ends = () if config.ignore_eos else lm.tokenizer.eos_ids
    live = set(range(B))
    filled_up = [*prompts, *[prompts[-1]] * idle]
    steps = sampled_steps(lm, filled_up, caches, past, sampler, max(limits))
    for n, tokens in enumerate(launched_ahead(steps) if lm.device.type == "cuda" else steps):
        ids = tokens.tolist()[:B]  # the host waits here
        yield [[token] if row in live else [] for row, token in enumerate(ids)]
        live -= {r for r in live if ids[r] in ends or n + 1 == limits[r] or finished(r)}
        if not live:
            return


def sampled_steps(
    lm: LoadedModel,
    prompts: Sequence[Sequence[int]],
    caches: list[KVCache],
    past: int,
    sampler: Sampler,
    count: int,
) -> Iterator[Tensor]:
    """`count` steps of (B,) ids, left on the device; each is launched when it is asked for."""
    length = caches[0].length
    slots = torch.arange(length, device=lm.device)
    lengths = torch.tensor([len(p) for p in prompts], device=lm.device).unsqueeze(1)  # (B, 1)
    longest = max(map(len, prompts))
    logits = prefill(lm, prompts, caches, past, slots)  # (B, 1, V)
    for n in range(count):
        tokens = sampler(logits.squeeze(1), n)  # (B,)
        yield tokens
        if n + 1 < count:
            # A row that has ended stays in the batch, and must stay within the cache too.
            pos = (lengths + n).clamp_max(length - 1)  # (B, 1)
            visible = visible_slots(longest + n + 1, length)
            logits = lm.decode(tokens.unsqueeze(1), pos, slots[:visible], caches)  # (B, 1, V)


def launched_ahead(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same steps, each launched before the one before it is read: the device never waits."""
    waiting = next(steps)
    for step in steps:
        yield waiting
        waiting = step
    yield waiting


def prefill(
    lm: LoadedModel,
    prompts: Sequence[Sequence[int]],
    caches: list[KVCache],
    past: int,
    slots: Tensor,
) -> Tensor:
    """Fill the caches with the prompts after their first `past` tokens.

    Returns the logits that follow each prompt's last token, (B, 1, V).
    """
    lengths = torch.tensor([len(p) - past for p in prompts], device=lm.device)  # (B,)
    width = max(map(len, prompts)) - past
    padded = [[*p[past:], *[0] * (past + width - len(p))] for p in prompts]
    tokens = torch.tensor(padded, device=lm.device)  # (B, width)
    chunk = max(1, PREFILL_TOKENS // len(prompts))
    logits = None
    for start in range(0, width, chunk):
        part = tokens[:, start : start + chunk]  # (B, T)
        end = past + start + part.shape[1]
        pos = slots[past + start : end].expand_as(part)  # (B, T)
        last = (lengths - 1 - start).clamp(0, part.shape[1] - 1)  # (B,)
        visible = slots[: visible_slots(end, len(slots))]
        out = lm.prefill(part, pos, visible, caches, last)  # (B, 1, V)
        # A row that ended in an earlier chunk keeps the logits it had there.
        reached = (lengths > start).view(-1, 1, 1)
        logits = out if logits is None else torch.where(reached, out, logits)
    return logits


def visible_slots(filled: int, most: int) -> int:
    """`filled` rounded up to 64, 96, 128, 192, 256, 384, ... and at most `most`.

    Attention reads so many slots: at most half of them beyond what is filled, and there are
    only two sizes, hence two CUDA graphs, for each doubling of the length.
    """
    power = max(64, 1 << (filled - 1).bit_length())
    return min(power * 3 // 4 if filled <= power * 3 // 4 and power > 64 else power, most)


def check_prompts(prompts: Sequence[Sequence[int]], context: int, vocab_size: int) -> None:
    if not prompts:
        raise ValueError("no prompt was given")
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and the model's context is {context}, "
                "which must hold prompt and answer: shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"the prompt has token ids from {min(prompt)} to {max(prompt)} and the model knows "
                f"0 to {vocab_size - 1}: its tokenizer files belong to another model"
            )


class Completion:
    """The continuation of one prompt, as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig):
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason = "length"  # or "eos", or "stop"
        self._ends = () if config.ignore_eos else tokenizer.eos_ids
        self._stops = config.stop
        self._stream = tokenizer.stream(prompt)
        self._held = ""  # text that may turn out to begin a stop string

    def extend(self, ids: Iterable[int]) -> str:
        """Add ids; returns the text that is now certain and can be shown."""
        start = len(self.text)
        for token in ids:
            self.ids.append(token)
            self._take(self._stream.push(token))
            if token in self._ends:
                self.finish_reason = "eos"
        return self.text[start:]

    def close(self) -> str:
        """Nothing follows: returns what was held back."""
        start = len(self.text)
        self._take(self._stream.flush())
        if self.finish_reason != "stop":
            self.text, self._held = self.text + self._held, ""
        return self.text[start:]

    def _take(self, text: str) -> None:
        if self.finish_reason == "stop":
            return
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.finish_reason, sure = "stop", min(found)
        else:
            sure = len(self._held) - max(
                (begun(stop, self._held) for stop in self._stops), default=0
            )
        self.text, self._held = self.text + self._held[:sure], self._held[sure:]


def begun(stop: str, text: str) -> int:
    """How many characters of `stop` the text ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def complete(
    lm: LoadedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig = GenerationConfig(),
    *,
    on_text: Callable[[int, str], Any] = lambda row, text: None,
    stats: bench.Stats | None = None,
    interruptible: bool = False,
    **options: Any,
) -> list[Completion]:
    """Continue B prompts, lists of token ids, to their ends: B completions.

    on_text is called with a row and a piece of its text as soon as that is certain; stats, where
    given, is added to; interruptible: Ctrl-C ends the texts instead of the program. The other
    options, and what is raised, are those of `generate`.
    """
    completions = [Completion(lm.tokenizer, prompt, config) for prompt in prompts]
    stopped = {"finished": lambda row: completions[row].finish_reason == "stop"}
    steps = generate(lm, prompts, config, **(stopped | options))
    steps = stats.timed(steps, prompts, options.get("past", 0)) if stats else steps
    try:
        for step in steps:
            for row, ids in enumerate(step):
                if text := completions[row].extend(ids):
                    on_text(row, text)
    except KeyboardInterrupt:
        if not interruptible:
            raise
    for row, completion in enumerate(completions):
        if text := completion.close():
            on_text(row, text)
    return completions


def load_model(
    path: str | Path = DEMO,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
) -> LoadedModel:
    """A model from a checkpoint: `model.pth`, or a Hugging Face directory as it is.

    dtype None: as stored. device "auto": cuda, else mps, else cpu. compiled views take their
    time at their first call. Raises FileNotFoundError, ValueError and MemoryError, in one line
    each, before anything large is allocated.
    """
    target = find_device(device)
    checkpoint = Checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.directory)
    with compiler_warming(target, compile):
        with torch.device("meta"):
            model = Transformer(checkpoint.args)
        with tqdm(total=checkpoint.nbytes, unit="B", unit_scale=True, desc="load", delay=1) as bar:
            checkpoint.load_into(model, target, dtype, bar.update)
    return make_views(model, tokenizer, compile, compile_prefill)


def random_model(
    config_file: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
) -> LoadedModel:
    """A model of the shape that a config.json gives, with random weights: for benchmarks."""
    target = find_device(device)
    config = read_json(Path(config_file))
    stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02

    def fill(name: str, tensor: Tensor) -> None:
        for piece in tensor.detach().view(-1).split(len(noise)):
            piece.copy_(noise[: len(piece)])

    with compiler_warming(target, compile):
        with torch.device("meta"):
            model = Transformer(model_args(config))
        allocate(model, target, dtype or getattr(torch, str(stored)), fill)
    return make_views(model, id_tokenizer(model.args.vocab_size), compile, compile_prefill)


def make_views(
    model: Transformer, tokenizer: Tokenizer, compile: bool, compile_prefill: bool
) -> LoadedModel:
    """Prefill and decode as two views of one model, each compiled or not."""
    device = model.tok_embeddings.weight.device
    prefill = compiled_view(model, device) if compile and compile_prefill else model
    decode = compiled_view(model, device) if compile else model
    return LoadedModel(model, prefill, decode, tokenizer)


def compiled_view(model: Transformer, device: torch.device) -> Callable[..., Tensor]:
    """One graph for every number of visible slots and, beyond one, of new tokens per row."""
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **compiler_settings(device))

    def view(tokens: Tensor, pos: Tensor, slots: Tensor, caches: Any, *last: Tensor) -> Tensor:
        # A graph holds for certain strides only, even those of dimensions of size 1.
        tokens, pos, *last = (
            t.clone(memory_format=torch.contiguous_format) for t in (tokens, pos, *last)
        )
        torch._dynamo.mark_dynamic(slots, 0)
        if tokens.shape[1] > 1:
            torch._dynamo.mark_dynamic(tokens, 1)
            torch._dynamo.mark_dynamic(pos, 1)
        return compiled(tokens, pos, slots, caches, *last)

    return view


def compiler_settings(device: torch.device) -> dict[str, Any]:
    if device.type != "cpu":
        return {"mode": "reduce-overhead"}
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler here: install g++, or leave it out")
    # The products and the attention are library calls; what is compiled between them takes no
    # measurable time, vectorised or not, but vectorised it takes 12 s longer to compile.
    # Header precompilation pays from some twenty kernels on; a model has seven.
    return {"options": {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}}


@contextlib.contextmanager
def compiler_warming(device: torch.device, wanted: bool) -> Iterator[None]:
    """Import and try out the compiler in a thread, while the weights are read: 2 s saved."""
    if not wanted:
        yield
        return
    settings = compiler_settings(device)
    importlib.import_module("torch._dynamo")  # before the thread: imports in two may collide

    def warm() -> None:
        with contextlib.suppress(Exception):  # the model's own compilation will raise it again
            torch.compile(torch.neg, **settings)(torch.ones(8, device=device))

    thread = threading.Thread(target=warm, daemon=True)
    thread.start()
    yield
    thread.join()


def find_device(name: str) -> torch.device:
    """ "auto": cuda, else mps, else cpu. Raises ValueError for one that this machine lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, found in there.items() if found), "cpu")
    if not there.get(name.partition(":")[0], name == "cpu"):
        found = [kind for kind, found in there.items() if found]
        raise ValueError(f"there is no device {name} here; there is {', '.join([*found, 'cpu'])}")
    return torch.device(name)


def run_prompts(
    lm: LoadedModel, config: GenerationConfig, stats: bench.Stats, args: argparse.Namespace
) -> None:
    """Every prompt num_samples times, in batches, to stdout or as lines of JSON to --output."""
    todo = jobs.make_jobs(encoded_prompts(lm, args), args.num_samples)
    check_prompts([job.ids for job in todo], lm.model.args.context, lm.model.args.vocab_size)
    sink = jobs.JsonlOutput(args.output, todo) if args.output else jobs.Console(todo)
    if not sink.todo:
        return
    longest = max(len(job.ids) for job in todo) + config.max_new_tokens
    size = min(args.batch_size or 16, len(sink.todo))
    caches = lm.make_caches(size, longest)
    compile_views(lm, caches, stats, args)
    with sink:
        for batch in jobs.batches(sink.todo, size):
            sink.begin(batch)
            completions = complete(
                lm,
                [job.ids for job in batch],
                config,
                rows=[job.number for job in batch],
                caches=caches,
                stats=stats,
                on_text=sink.text,
            )
            sink.end(completions)


def encoded_prompts(lm: LoadedModel, args: argparse.Namespace) -> list[tuple[str, list[int]]]:
    """Text and ids of each prompt; a number given as --prompt stands for so many random tokens."""
    if args.prompts:
        return [(text, lm.tokenizer.encode(text)) for text in jobs.read_prompts(args.prompts)]
    generator = torch.Generator().manual_seed(args.seed)
    vocab = lm.model.args.vocab_size
    encoded = []
    for text in args.prompt or [DEMO_PROMPT]:
        if not text:
            raise ValueError("the prompt is empty: give it some text")
        if text.isdecimal():
            ids = torch.randint(vocab, (int(text),), generator=generator).tolist()
            encoded.append(("", ids))
        else:
            encoded.append((text, lm.tokenizer.encode(text)))
    return encoded


def run_chat(
    lm: LoadedModel, config: GenerationConfig, stats: bench.Stats, args: argparse.Namespace
) -> None:
    weight = lm.model.tok_embeddings.weight
    half_free = available_memory(lm.device) // 2
    fitting = half_free // lm.model.args.kv_bytes_per_token(weight.dtype)
    caches = lm.make_caches(1, min(lm.model.args.context, fitting))
    compile_views(lm, caches, stats, args)
    conversation = chat.Conversation(
        lm.tokenizer, caches[0].length, config.max_new_tokens, args.system
    )

    def answer(ids: list[int], held: int) -> Completion:
        (completion,) = complete(
            lm,
            [ids],
            config,
            rows=[len(conversation.messages)],  # every answer draws anew
            caches=caches,
            past=held,
            stats=stats,
            interruptible=True,
            on_text=lambda row, text: print(text, end="", flush=True),
        )
        print(flush=True)
        return completion

    chat.chat(conversation, answer)


def compile_views(
    lm: LoadedModel, caches: list[KVCache], stats: bench.Stats, args: argparse.Namespace
) -> None:
    """Let each compiled view meet the shapes that it will serve; what it writes is overwritten."""
    if not args.compile:
        return
    start = time.perf_counter()
    log("compiling ...")
    with torch.inference_mode():
        slots = torch.arange(caches[0].length, device=lm.device)
        visible = slots[: visible_slots(2, len(slots))]
        for view, width in ((lm.decode, 1), (lm.prefill, 2))[: 1 + args.compile_prefill]:
            tokens = torch.zeros(caches[0].rows, width, dtype=torch.long, device=lm.device)
            last = () if width == 1 else (tokens[:, 0],)
            view(tokens, slots[:width].expand_as(tokens), visible, caches, *last)
    stats.compile_seconds = time.perf_counter() - start


def run_bench(
    lm: LoadedModel, config: GenerationConfig, stats: bench.Stats, args: argparse.Namespace
) -> None:
    length, rows = int((args.prompt or ["512"])[0]), args.batch_size or 1
    caches = lm.make_caches(rows, length + config.max_new_tokens)
    compile_views(lm, caches, stats, args)
    figures = bench.measure(lm, complete, caches, config, length, args.repeats)
    if args.json:
        times = {"load_s": stats.load_seconds, "compile_s": stats.compile_seconds}
        print(json.dumps(figures | times))


def run(args: argparse.Namespace) -> None:
    config = GenerationConfig(**{f.name: getattr(args, f.name) for f in fields(GenerationConfig)})
    options = {
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "compile": args.compile,
        "compile_prefill": args.compile_prefill,
    }
    start = time.perf_counter()
    if args.random_weights:
        lm = random_model(args.random_weights, **options)
    else:
        lm = load_model(args.checkpoint_path, **options)
    stats = bench.Stats(lm.model)
    stats.load_seconds = time.perf_counter() - start
    weight = lm.model.tok_embeddings.weight
    log(
        f"{args.random_weights or args.checkpoint_path}: "
        f"{sum(p.numel() for p in lm.model.parameters()):,} parameters, "
        f"{str(weight.dtype).removeprefix('torch.')} on {bench.machine_name(weight.device)}"
    )
    with profiled(args.profile):
        args.mode(lm, config, stats, args)
    if stats.prefill_seconds:
        for line in stats.report(bench.read_bandwidth(lm.device)):
            log(line)


@contextlib.contextmanager
def profiled(file: Path | None) -> Iterator[None]:
    """A trace for chrome://tracing or ui.perfetto.dev, where a file is named."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(file))
    log(f"profile: {file}")


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint_path",
        type=Path,
        default=DEMO,
        help="model.pth, or a Hugging Face directory (default: the demo model)",
    )
    weights.add_argument(
        "--random_weights", type=Path, metavar="CONFIG.json", help="a shape, for benchmarks"
    )
    add("--prompt", action="append", help="text, or a number: so many random tokens; repeatable")
    add("--prompts", type=Path, metavar="FILE", help=".txt: one per line; or .jsonl")
    add("--output", type=Path, metavar="FILE.jsonl", help="results; a rerun does what is missing")
    add("--num_samples", type=positive, default=1, help="texts for each prompt")
    add("--batch_size", type=positive, help="rows at a time (default: 16 at most; --bench: 1)")
    for field in fields(GenerationConfig):
        name, default, text = f"--{field.name}", field.default, OPTION_HELP[field.name]
        if isinstance(default, bool):
            add(name, action="store_true", help=text)
        elif isinstance(default, tuple):
            add(name, action="append", default=[], help=text)
        else:
            add(name, type=type(default), default=default, help=f"{text} (default: {default})")
    add("--compile", action="store_true", help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile prefill too; needs --compile")
    add("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as stored")
    add("--profile", type=Path, metavar="FILE", help="write a trace of the run")
    add("--interactive", action="store_true", help="chat, by the model's template")
    add("--system", help="system message for --interactive")
    add("--bench", action="store_true", help="time prefill of --prompt N (512) and decode")
    add("--repeats", type=positive, default=5, help="of --bench (default: 5)")
    add("--json", action="store_true", help="print --bench's figures as a line of JSON")
    args = parser.parse_args(argv)
    for given, needed in (
        ("system", "interactive"),
        ("json", "bench"),
        ("compile_prefill", "compile"),
    ):
        if getattr(args, given) and not getattr(args, needed):
            parser.error(f"--{given} needs --{needed}")
    if args.prompt and args.prompts:
        parser.error("give --prompt or --prompts, not both")
    if args.bench and args.interactive:
        parser.error("give --bench or --interactive, not both")
    if args.bench and not all(text.isdecimal() for text in args.prompt or []):
        parser.error("--bench takes a number of tokens as --prompt")
    args.stop = tuple(args.stop)
    args.mode = run_bench if args.bench else run_chat if args.interactive else run_prompts
    return args


OPTION_HELP = {
    "max_new_tokens": "most tokens to add to each prompt",
    "temperature": "0: always the likeliest token",
    "top_k": "draw among the k likeliest; 0: all",
    "top_p": "draw among the likeliest that have this probability together",
    "min_p": "drop what is less than min_p times as likely as the likeliest",
    "seed": "of the random draws",
    "stop": "end a text before this string; repeatable",
    "ignore_eos": "go on after the end-of-text token",
}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(args: argparse.Namespace) -> int:
    try:
        run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        log("\nstopped")
        return 130
    except BrokenPipeError:
        # Nobody reads stdout any more; Python must not try to flush it again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log("generate.py: stopped, as the output was closed")
        return 141
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        log(f"generate.py: {' '.join(str(error).split())}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))

"""A model in half its bytes of memory: neurons read as tokens need them, beside other ways.

    python benchmarks/sparse_model.py --folder /tmp/opt-1.3b     a model to measure with
    python flash.py --checkpoint_path /tmp/opt-1.3b --calibration_file TEXT
    python benchmarks/flash.py modes --model /tmp/opt-1.3b       five ways, under one memory limit
    python benchmarks/flash.py ablate --model /tmp/opt-1.3b      without predictor, window, bundles
    python benchmarks/flash.py quality --model checkpoints/demo-opt     perplexity and recall

Start at WAYS. Every way decodes the same text, given token by token, in a process of its own, with
the page cache empty and memory limited by the kernel: to a share of the model's bytes, and to what
a process takes that does the same with the demo model. Bytes read are counted by the reader and by
the operating system (/proc/self/io). A shared disk drifts by a factor of two within minutes: --rate
holds it to what it gives at all times.
"""

import argparse
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench import provenance
from benchmarks.common import ROOT, Others, exit_code, log, show, spread
from benchmarks.limited import Rate, drop_cache, limited, unsupported_reason
from benchmarks.offload_peers import bytes_read
from calibration.gptq import fill_module
from calibration.predictor import gate
from checkpoint import Checkpoint, stored_tensors
from kernels.cpu import build
from load import LoadedModel, compile_now, load_model, make_views, meta_model
from model import visible_length
from neurons.feed_forward import FlashOptions, Source, neuron_source
from neurons.pack import flash_directory
from neurons.records import NeuronFile
from neurons.uring import Work, nothing
from text.tokenizer import load_tokenizer
from tiers.policy import Policy, Share
from tiers.prefetch import CPU

DATA = ROOT / ".." / "shared" / "data"
UNLIMITED = 16e9  # bytes
FIRST = 32  # tokens after the prompt that are reported apart


@torch.inference_mode()
def decode(lm: LoadedModel, ids: list[int], prompt: int) -> dict[str, Any]:
    """The text's tokens one by one after a prompt: seconds, bytes and nats of each."""
    caches = lm.make_caches(1, len(ids))
    compile_now(lm, caches)
    slots = torch.arange(caches[0].length)
    tokens = torch.tensor([ids])
    last = torch.tensor([prompt - 1])
    lm.prefill(tokens[:, :prompt], slots[None, :prompt], slots[:prompt], caches, last)
    seconds, nats, read = [], [], [bytes_read()]
    for n in range(prompt, len(ids) - 1):
        visible = slots[: visible_length(n + 1, len(slots))]
        start = time.perf_counter()
        logits = lm.decode(tokens[:, n : n + 1], slots[None, n : n + 1], visible, caches)
        seconds.append(time.perf_counter() - start)
        read.append(bytes_read())
        nats.append(F.cross_entropy(logits[0].float(), tokens[0, n + 1 : n + 2]).item())
    return {"seconds": seconds, "nats": nats, "read": np.diff(read).tolist()}


def resident(model: nn.Module) -> int:
    """Bytes of weights in memory."""
    tensors = (tensor for tensor, _ in stored_tensors(model).values())
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def bfloat16_bytes(model: nn.Module) -> int:
    return sum(2 * tensor.numel() for tensor, _ in stored_tensors(model).values())


def reloaded(args: argparse.Namespace, share: float = 0.0) -> LoadedModel:
    """Layers stream from disk for every token; that share of them stays in memory."""
    policy = Policy(Share(100 * share, 0), micro_batch=1, directory=args.directory)
    return load_model(args.model, device="cpu", compile=args.compile, policy=policy)


def half(args: argparse.Namespace) -> LoadedModel:
    """So many layers stay that what is in memory is the given share of the model, two slots for
    those that come and go with it."""
    model = meta_model(Checkpoint(args.model).args, None)
    whole, layers = bfloat16_bytes(model), bfloat16_bytes(model.layers)
    slots = 2 * layers / len(model.layers)
    return reloaded(args, max(0.0, (args.share * whole - (whole - layers) - slots) / layers))


def paged(args: argparse.Namespace) -> LoadedModel:
    """The file is mapped, and what is in memory is the kernel's affair."""
    checkpoint = Checkpoint(args.model)
    model = meta_model(checkpoint.args, None)
    mapped = torch.load(checkpoint.path, mmap=True, weights_only=True)["tensors"]
    model.load_state_dict(mapped, strict=False, assign=True)
    if checkpoint.args.tied:
        model.output.weight = model.tok_embeddings.weight
    return make_views(model, load_tokenizer(checkpoint.directory), args.compile, False)


def sparse(args: argparse.Namespace) -> LoadedModel:
    flash = FlashOptions(args.share, args.window, args.depth)
    lm = load_model(args.model, device="cpu", compile=args.compile, flash=flash)
    if args.never_whole:  # a small model's layers are read faster than some of their neurons
        source = neuron_source(lm.model)
        source.plan = replace(source.plan, whole=math.inf)
    return lm


class Oracle(nn.Module):
    """Which neurons are active, as their weights say, which it has in memory."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def values(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, F), behind the ReLU."""
        return F.linear(x, self.weight, self.bias).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x) > 0


def oracles(path: Path, dtype: torch.dtype) -> list[Oracle]:
    """Of all layers, neurons in the pack's order."""
    checkpoint, found = Checkpoint(path), []
    directory = flash_directory(checkpoint)
    learned = directory.with_name(f"{directory.name}.learned")
    for n in range(checkpoint.args.n_layers):
        model = meta_model(checkpoint.args, checkpoint.scheme)
        fill_module(checkpoint, model, f"layers.{n}.feed_forward", CPU)
        order = torch.load(learned / f"layer{n}.pt", weights_only=True)["order"]
        weight, bias = gate(model.layers[n].feed_forward)
        found.append(Oracle(weight[order].to(dtype), bias[order].to(dtype)))
    return found


def foreseen(args: argparse.Namespace) -> LoadedModel:
    """With an oracle in place of the predictor."""
    lm = sparse(args)
    masks = oracles(args.model, lm.model.tok_embeddings.weight.dtype)
    for layer, oracle in zip(lm.model.layers, masks, strict=True):
        layer.feed_forward.predictor = oracle
    return lm


def forgetful(args: argparse.Namespace) -> LoadedModel:
    """No neuron stays for the next token."""
    lm = sparse(args)
    prefill, decode = lm.prefill, lm.decode

    def forgetting(*given: Any) -> Tensor:
        for layer in lm.model.layers:
            layer.feed_forward.cache.forget()
        return decode(*given)

    return LoadedModel(lm.model, prefill, forgetting, lm.tokenizer)


def unbundled(lm: LoadedModel) -> LoadedModel:
    """Rows of up and of down lie in different places, as in a checkpoint."""
    source = neuron_source(lm.model)
    source.fetch = apart(source, write_apart(source))
    return lm


def write_apart(source: Source) -> Path:
    """A copy of the neurons where each layer has one half of all records, then the other."""
    file, stride = source.file, source.file.stride
    path = file.path.with_name("apart.bin")
    layers = file.path.stat().st_size // source.region
    if not path.exists():
        with path.open("wb") as out, file.path.open("rb") as given:
            for _ in range(layers):
                records = np.frombuffer(given.read(source.region), np.uint8)
                records = records[: source.neurons * stride].reshape(-1, stride)
                for part in (records[:, : stride // 2], records[:, stride // 2 :]):
                    out.write(np.ascontiguousarray(part))
                out.write(bytes(source.region - source.neurons * stride))
    return path


def apart(source: Source, path: Path) -> Callable[..., None]:
    step, gap = source.file.stride // 2, source.plan.gap
    file = NeuronFile(path, step, source.plan.depth)

    def fetch(j: int, ids: np.ndarray, slots: np.ndarray, slab: Tensor, meanwhile: Work) -> None:
        file.nbytes = file.requests = 0
        for half in range(2):
            first = j * source.region + half * source.neurons * step
            places = slab.data_ptr() + (2 * slots + half) * step
            file.bring(first, ids, places, gap, nothing if half else meanwhile)
        source.file.nbytes += file.nbytes
        source.file.requests += file.requests

    return fetch


WAYS: dict[str, Callable[[argparse.Namespace], LoadedModel]] = {
    "naive": reloaded,
    "half": half,
    "paged": paged,
    "oracle": foreseen,
    "predictor": sparse,
    "no window, no bundles": lambda args: unbundled(forgetful(args)),
    "no window": forgetful,
    "no bundles": lambda args: unbundled(sparse(args)),
}


def way(args: argparse.Namespace) -> dict[str, Any]:
    """One of them, in this process."""
    if args.way == "demo":  # what a process takes whatever the model
        args.model, args.way = ROOT / "checkpoints" / "demo-opt", "naive"
    lm = WAYS[args.way](args)
    ids = text_ids(lm, args)
    start = time.perf_counter()
    found = decode(lm, ids, args.prompt)
    settled = found["seconds"][FIRST:] or found["seconds"]
    ordered = sorted(settled)
    figures = {
        "way": args.way,
        "tokens_per_s": 1 / statistics.mean(settled),
        "first_tokens_per_s": 1 / statistics.mean(found["seconds"][:FIRST]),
        "median_s": statistics.median(settled),
        "p95_s": ordered[int(0.95 * (len(ordered) - 1))],
        "prompt_s": time.perf_counter() - start - sum(found["seconds"]),
        "read_per_token": statistics.mean(found["read"][FIRST:] or found["read"]),
        "nats": statistics.mean(found["nats"]),
        "resident_bytes": resident(lm.model),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    sparsely = neuron_source(lm.model) is not None
    return figures | (sparse_figures(lm, len(found["seconds"]), found) if sparsely else {})


def sparse_figures(lm: LoadedModel, tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    source = neuron_source(lm.model)
    stats, file = source.stats, source.file
    slots = sum(len(layer.feed_forward.cache) for layer in lm.model.layers)
    layers, kept = lm.model.args.n_layers, slots * file.stride
    staged = 2 * max(end - start for start, end in source.chunks) * file.stride
    counted = file.nbytes + stats.whole_layers * source.region
    return {
        "resident_bytes": resident(lm.model) + kept + staged,
        "slots_share": slots / layers / source.neurons,
        "counted_per_token": counted / tokens,
        "system_over_counted": sum(found["read"]) / max(1, counted),
        "share_of_ffn": counted / tokens / (layers * source.region),
        "requests_per_token": file.requests / tokens,
        "hit_rate": 1 - stats.missed / max(1, stats.predicted),
        "predicted_share": stats.predicted / max(1, stats.sparse_layers) / source.neurons,
        "predicted_over_active": stats.predicted / max(1, stats.active),
        "whole_layers_per_token": stats.whole_layers / tokens,
        "reading_s": stats.read_seconds / tokens,
        "managing_s": stats.manage_seconds / tokens,
        "feed_forward_s": stats.compute_seconds / tokens,
        "expected_reading_s": source.plan.reading,
        "rates_reading_s": source.plan.seconds(
            stats.reads, file.requests, file.nbytes // file.stride
        )
        / tokens,
        "direct": file.direct,
        "window": source.plan.window,
        "depth": source.plan.depth,
        "gap": source.plan.gap,
    }


def text_ids(lm: LoadedModel, args: argparse.Namespace) -> list[int]:
    """Held-out text of as many tokens as are wanted."""
    ids = lm.tokenizer.encode(args.text.read_text(encoding="utf-8")[args.skip :][:20000])
    return ids[: args.prompt + args.new + 1]


def alone(args: argparse.Namespace, name: str, limit: float) -> dict[str, Any]:
    """One way in a process of its own, with so many bytes."""
    checkpoint = Checkpoint(args.model)
    drop_cache(checkpoint.path)
    if (directory := flash_directory(checkpoint)).is_dir():
        drop_cache(directory)
    words = [sys.executable, Path(__file__).resolve(), "way", "--way", name]
    for option in ("model", "directory", "share", "prompt", "new", "text", "skip"):
        words += [f"--{option}", getattr(args, option)]
    for option in ("window", "depth"):
        if getattr(args, option):
            words += [f"--{option}", getattr(args, option)]
    words += ["--never_whole"] * args.never_whole + ["--compile"] * args.compile
    return limited(words, int(limit), rate=rate_of(args))


def rate_of(args: argparse.Namespace) -> Rate | None:
    return Rate(args.model, int(args.rate)) if args.rate else None


def limits(args: argparse.Namespace, names: Sequence[str]) -> tuple[float, float]:
    """Bytes of the model, and those that a process takes beside it. names: of ways to come."""
    if reason := unsupported_reason(rate_of(args)):
        raise ValueError(f"skipped: {reason}")
    build.build()  # a compiler takes more memory than what it compiles for
    for name in names if args.compile else ():
        alone(args, name, UNLIMITED)  # and leaves its results in a cache
    whole = bfloat16_bytes(meta_model(Checkpoint(args.model).args, None))
    beside = alone(args, "demo", UNLIMITED)["peak_rss_bytes"]
    log(f"the model: {whole / 1e9:.2f} GB; a process beside it: {beside / 1e9:.2f} GB")
    return whole, beside


def modes(args: argparse.Namespace) -> dict[str, Any]:
    """The five, in turns."""
    names = args.ways or ("naive", "half", "paged", "oracle", "predictor")
    if "paged" in names and (path := Checkpoint(args.model).path).suffix != ".pth":
        log(f"paged: skipped; a model.pth has tensors that can be mapped, and this is {path}")
        names = [name for name in names if name != "paged"]
    whole, beside = limits(args, names)
    limit = args.limit * whole + beside
    shape = Checkpoint(args.model).args
    # An oracle's, beside the limit; while it is made, two layers in float32 for some moments.
    inner = 2 * (shape.n_layers + 8) * shape.hidden_dim * shape.dim
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for name in names:
            run = alone(args, name, limit + inner * (name == "oracle"))
            runs.setdefault(name, []).append(run)
            log(
                f"{name}: {run['tokens_per_s']:.3f} tokens/s, {run['read_per_token'] / 1e6:.1f} MB "
                f"read for a token, {run['resident_bytes'] / whole:.3f} of the weights in memory"
            )
    return {"limit_bytes": limit, "model_bytes": whole, "beside_bytes": beside} | compared(runs)


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    ratios = {}
    for name in runs:
        if name != "predictor" and "predictor" in runs:
            pairs = zip(runs["predictor"], runs[name], strict=True)
            ratios[name] = spread([a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs])
            log(f"predictor over {name}: {show(ratios[name])}")
    return {"predictor_over": ratios, "runs": runs}


def ablate(args: argparse.Namespace) -> dict[str, Any]:
    """In the form of the paper's table 2, one thing after the other."""
    runs, names = {}, ("naive", "half", "no window, no bundles", "no bundles", "predictor")
    whole, beside = limits(args, names)
    for name in names:
        run = alone(args, name, args.limit * whole + beside)
        runs[name] = [run]
        reading = run.get("reading_s")
        rate = "" if not reading else f"{run['counted_per_token'] / reading / 1e9:.2f} GB/s, "
        seconds = f"{1000 * (reading or run['median_s']):.0f} ms"
        log(
            f"{name:22} {run['resident_bytes'] / 1e9:.2f} GB, {run['read_per_token'] / 1e9:.3f} "
            f"GB for a token, {rate}{seconds}{' of reading' if reading else ''}"
        )
    return {"model_bytes": whole} | compared(runs)


@torch.inference_mode()
def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Nats of held-out text by the decode path, dense and sparse; and which neurons were found."""
    still = load_model(args.model, device="cpu")
    lm = sparse(args)
    for layer, oracle in zip(
        lm.model.layers, oracles(args.model, lm.model.tok_embeddings.weight.dtype), strict=True
    ):
        layer.feed_forward.predictor = Watched(layer.feed_forward.predictor, oracle)
    nats: dict[str, list[float]] = {"dense": [], "sparse": []}
    for text in tqdm(range(args.texts), desc="texts", disable=None):
        args.skip = 5000 * text
        ids = text_ids(lm, args)
        for name, model in (("dense", still), ("sparse", lm)):
            nats[name] += decode(model, ids, args.prompt)["nats"]
    means = {name: statistics.mean(values) for name, values in nats.items()}
    change = np.exp(means["sparse"] - means["dense"]) - 1
    watched = [layer.feed_forward.predictor for layer in lm.model.layers]
    active, predicted, found, mass, mass_found = (
        sum(getattr(w, name) for w in watched)
        for name in ("active", "predicted", "found", "mass", "mass_found")
    )
    log(
        f"{len(nats['dense'])} tokens: perplexity {np.exp(means['dense']):.3f} dense, "
        f"{change:+.2%} sparse; {found / active:.1%} of the active neurons predicted, with "
        f"{mass_found / mass:.2%} of what they give; {predicted / active:.2f} for one that is "
        "active"
    )
    layers = [
        {"recall": w.found / max(w.active, 1), "over": w.predicted / max(w.active, 1)}
        for w in watched
    ]
    return {
        "tokens": len(nats["dense"]),
        "nats": means,
        "perplexity_change": float(change),
        "recall": found / active,
        "mass_recall": mass_found / mass,
        "predicted_over_active": predicted / active,
        "layers": layers,
        "flash": sparse_figures(lm, len(nats["sparse"]), {"read": [0]}),
    }


class Watched(nn.Module):
    """A predictor, and how it compares with an oracle where single tokens are decoded.

    mass: the sum of what is behind the ReLU, of all neurons; of those that were found.
    """

    def __init__(self, predictor: nn.Module, oracle: Oracle):
        super().__init__()
        self.predictor, self.oracle = predictor, oracle
        self.active = self.predicted = self.found = 0
        self.mass = self.mass_found = 0.0

    def forward(self, x: Tensor) -> Tensor:
        mask = self.predictor(x)
        if len(x) == 1:
            values = self.oracle.values(x)
            self.active += int((values > 0).sum())
            self.predicted += int(mask.sum())
            self.found += int((values[mask] > 0).sum())
            self.mass += values.float().sum().item()
            self.mass_found += values[mask].float().sum().item()
        return mask


MODES = {"way": way, "modes": modes, "ablate": ablate, "quality": quality}


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.mode == "way":
        return way(args)
    others = Others()
    figures = MODES[args.mode](args)
    said = {"benchmark": f"flash {args.mode}", "model": args.model.name, **figures}
    return said | {"others": others.share()} | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--model", type=Path, default=ROOT / "checkpoints" / "demo-opt", help="a checkpoint")
    add("--way", choices=[*WAYS, "demo"], help="of mode way")
    add("--ways", nargs="+", choices=WAYS, help="of mode modes (default: five)")
    add("--share", type=float, default=0.5, help="of the weights' bytes in memory (default: 0.5)")
    add("--limit", type=float, default=0.52, help="the same, enforced (default: 0.52)")
    add("--rate", type=float, help="bytes a second at most that the disk gives, such as 1e9")
    add("--window", type=float, help="tokens (default: as many as pay)")
    add("--depth", type=int, help="reads at a time (default: as many as pay)")
    add("--never_whole", action="store_true", help="read neurons where a layer were faster")
    add("--compile", action="store_true", help="every way: its steps, or its blocks")
    add("--prompt", type=int, default=128, help="tokens (default: 128)")
    add("--new", type=int, default=128, help="tokens after them (default: 128)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--texts", type=int, default=8, help="of quality (default: 8)")
    add("--text", type=Path, default=DATA / "text" / "tinystories_val.txt", help="held out")
    add("--skip", type=int, default=0, help="characters of it")
    add("--directory", type=Path, default=Path("offload"), help="for scratch files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

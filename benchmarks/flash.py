"""A model in half of its bytes of memory: --flash beside other methods.

    python benchmarks/sparse_model.py --folder /tmp/opt-1.3b     a model to measure with
    python flash.py --checkpoint_path /tmp/opt-1.3b --calibration_file TEXT
    python benchmarks/flash.py modes --model /tmp/opt-1.3b       five methods, one memory limit
    python benchmarks/flash.py ablate --model /tmp/opt-1.3b      without predictor, window, bundles
    python benchmarks/flash.py quality --model checkpoints/demo-opt     perplexity and recall

Start at METHODS. Every method decodes the same given text token by token, in a process of its own
with an empty page cache. The kernel limits its memory to a share of the model's bytes plus the
bytes that the same process takes for the demo model. The reader and the operating system
(/proc/self/io) both count the bytes read. A shared disk drifts by a factor of two within minutes:
--rate limits it to a rate that it always reaches.
"""

import argparse
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from calibration.predictor import gate_weights
from checkpoint import Checkpoint
from kernels.cpu import build
from layers.kv_cache import visible_length
from load import LoadedModel, compile_now, load_model, make_views, meta_model
from neurons.feed_forward import neuron_source
from neurons.pack import flash_directory
from neurons.records import NeuronFile
from neurons.source import CHUNK_BUFFERS, NeuronSource
from neurons.uring import Callback, no_op
from options.settings import FlashOptions
from text.tokenizer import load_tokenizer
from tiers.policy import Policy, Share
from tiers.prefetch import CPU
from weights.allocation import stored_tensors

DATA = ROOT / ".." / "shared" / "data"
NO_LIMIT_BYTES = 16e9
FIRST_TOKENS = 32  # after the prompt, reported apart from the settled rate
TEXT_CHARACTERS = 20000  # that are encoded
TEXT_STEP_CHARACTERS = 5000  # between the texts of `quality`


@dataclass(frozen=True)
class Setup:
    """The options of the command; parse_args describes them."""

    mode: str
    model: Path
    method: str | None
    methods: Sequence[str] | None
    share: float
    limit: float
    rate: float | None
    window: float | None
    depth: int | None
    never_whole: bool
    compile: bool
    prompt: int
    new: int
    repeats: int
    texts: int
    text: Path
    skip: int
    directory: Path


@torch.inference_mode()
def decode(lm: LoadedModel, ids: list[int], prompt: int) -> dict[str, Any]:
    """Decode the ids after a prompt one by one; return seconds, nats and bytes read of each."""
    caches = lm.make_caches(1, len(ids))
    compile_now(lm, caches)
    pos = torch.arange(caches[0].length)
    tokens = torch.tensor([ids])
    last = torch.tensor([prompt - 1])
    lm.prefill(tokens[:, :prompt], pos[None, :prompt], pos[:prompt], caches, last)
    seconds, nats, read = [], [], [bytes_read()]
    for n in range(prompt, len(ids) - 1):
        visible = pos[: visible_length(n + 1, len(pos))]
        start = time.perf_counter()
        logits = lm.decode(tokens[:, n : n + 1], pos[None, n : n + 1], visible, caches)
        seconds.append(time.perf_counter() - start)
        read.append(bytes_read())
        nats.append(F.cross_entropy(logits[0].float(), tokens[0, n + 1 : n + 2]).item())
    return {"seconds": seconds, "nats": nats, "read": np.diff(read).tolist()}


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of weights in memory."""
    tensors = (tensor for tensor, _ in stored_tensors(model).values())
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def bfloat16_bytes(model: nn.Module) -> int:
    return sum(2 * tensor.numel() for tensor, _ in stored_tensors(model).values())


def streamed(setup: Setup, share: float = 0.0) -> LoadedModel:
    """Stream layers from disk for every token; `share` of them stays in memory."""
    policy = Policy(Share(100 * share, 0), micro_batch=1, directory=setup.directory)
    return load_model(setup.model, device="cpu", compile=setup.compile, policy=policy)


def half_resident(setup: Setup) -> LoadedModel:
    """Keep as many layers as fit into setup.share of the model beside two layer buffers."""
    model = meta_model(Checkpoint(setup.model).args, None)
    whole, layers = bfloat16_bytes(model), bfloat16_bytes(model.layers)
    buffers = 2 * layers / len(model.layers)
    share = (setup.share * whole - (whole - layers) - buffers) / layers
    return streamed(setup, max(0.0, share))


def paged(setup: Setup) -> LoadedModel:
    """Map the file; the kernel decides what stays in memory."""
    checkpoint = Checkpoint(setup.model)
    model = meta_model(checkpoint.args, None)
    mapped = torch.load(checkpoint.path, mmap=True, weights_only=True)["tensors"]
    model.load_state_dict(mapped, strict=False, assign=True)
    if checkpoint.args.tied:
        model.output.weight = model.tok_embeddings.weight
    return make_views(model, load_tokenizer(checkpoint.directory), setup.compile, False)


def sparse(setup: Setup) -> LoadedModel:
    """Load with --flash."""
    flash = FlashOptions(setup.share, setup.window, setup.depth)
    lm = load_model(setup.model, device="cpu", compile=setup.compile, flash=flash)
    if setup.never_whole:  # whole layers of a small model are read faster than some neurons
        source = neuron_source(lm.model)
        source.plan = replace(source.plan, whole_layer_seconds=math.inf)
    return lm


class Oracle(nn.Module):
    """Predicts exactly the active neurons, from their weights in memory."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def activations(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, F), after the ReLU."""
        return F.linear(x, self.weight, self.bias).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x) > 0


def oracles(path: Path, dtype: torch.dtype) -> list[Oracle]:
    """Return the oracle of each layer, neurons in the pack's order."""
    checkpoint, layers = Checkpoint(path), []
    directory = flash_directory(checkpoint)
    learned = directory.with_name(f"{directory.name}.learned")
    for n in range(checkpoint.args.n_layers):
        model = meta_model(checkpoint.args, checkpoint.scheme)
        fill_module(checkpoint, model, f"layers.{n}.feed_forward", CPU)
        order = torch.load(learned / f"layer{n}.pt", weights_only=True)["order"]
        weight, bias = gate_weights(model.layers[n].feed_forward)
        layers.append(Oracle(weight[order].to(dtype), bias[order].to(dtype)))
    return layers


def with_oracle(setup: Setup) -> LoadedModel:
    """--flash with oracles in place of the predictors."""
    lm = sparse(setup)
    predictors = oracles(setup.model, lm.model.tok_embeddings.weight.dtype)
    for layer, oracle in zip(lm.model.layers, predictors, strict=True):
        layer.feed_forward.predictor = oracle
    return lm


def without_window(setup: Setup) -> LoadedModel:
    """--flash with a neuron cache that is cleared before each token."""
    lm = sparse(setup)
    prefill, decode = lm.prefill, lm.decode

    def decode_with_empty_cache(*arguments: Any) -> Tensor:
        for layer in lm.model.layers:
            layer.feed_forward.cache.clear()
        return decode(*arguments)

    return LoadedModel(lm.model, prefill, decode_with_empty_cache, lm.tokenizer)


def unbundled(lm: LoadedModel) -> LoadedModel:
    """Read rows of up and columns of down from different places, as in a checkpoint."""
    source = neuron_source(lm.model)
    source.fetch = fetch_halves(source, write_halves(source))
    return lm


def write_halves(source: NeuronSource) -> Path:
    """Copy the neurons; each layer has the first halves of all records, then the second ones."""
    file, stride = source.file, source.file.stride
    path, nbytes = file.path.with_name("halves.bin"), source.neurons * stride
    if path.exists():
        return path
    with path.open("wb") as out, file.path.open("rb") as bundled:
        for _ in range(file.path.stat().st_size // source.layer_bytes):
            layer = np.frombuffer(bundled.read(source.layer_bytes), np.uint8)
            records = layer[:nbytes].reshape(-1, stride)
            for half in (records[:, : stride // 2], records[:, stride // 2 :]):
                out.write(np.ascontiguousarray(half))
            out.write(bytes(source.layer_bytes - nbytes))
    return path


def fetch_halves(source: NeuronSource, path: Path) -> Callable[..., None]:
    """Return a NeuronSource.fetch that reads records from a file of write_halves."""
    stride, gap = source.file.stride // 2, source.plan.gap
    file = NeuronFile(path, stride, source.plan.depth)

    def fetch(
        layer: int, ids: np.ndarray, entries: np.ndarray, cache: Tensor, overlap: Callback
    ) -> None:
        file.nbytes = file.requests = 0
        for half in range(2):
            first = layer * source.layer_bytes + half * source.neurons * stride
            addresses = cache.data_ptr() + (2 * entries + half) * stride
            file.read_records(first, ids, addresses, gap, no_op if half else overlap)
        source.file.nbytes += file.nbytes
        source.file.requests += file.requests

    return fetch


METHODS: dict[str, Callable[[Setup], LoadedModel]] = {
    "naive": streamed,
    "half": half_resident,
    "paged": paged,
    "oracle": with_oracle,
    "predictor": sparse,
    "no window, no bundles": lambda setup: unbundled(without_window(setup)),
    "no window": without_window,
    "no bundles": lambda setup: unbundled(sparse(setup)),
}


def run_method(setup: Setup) -> dict[str, Any]:
    """Decode by one method, in this process."""
    if setup.method == "demo":  # for the bytes that a process takes whatever the model
        setup = replace(setup, model=ROOT / "checkpoints" / "demo-opt", method="naive")
    lm = METHODS[setup.method](setup)
    ids = text_ids(lm, setup)
    start = time.perf_counter()
    decoded = decode(lm, ids, setup.prompt)
    prompt_seconds = time.perf_counter() - start - sum(decoded["seconds"])
    figures = {"method": setup.method, "prompt_s": prompt_seconds} | time_figures(decoded)
    figures |= {
        "nats": statistics.mean(decoded["nats"]),
        "resident_bytes": resident_bytes(lm.model),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if neuron_source(lm.model) is None:
        return figures
    return figures | sparse_figures(lm, len(decoded["seconds"]), decoded["read"])


def time_figures(decoded: dict[str, Any]) -> dict[str, float]:
    """Rates, times and bytes read of a token; those of the first tokens apart."""
    seconds, read = decoded["seconds"], decoded["read"]
    settled = seconds[FIRST_TOKENS:] or seconds
    return {
        "tokens_per_s": 1 / statistics.mean(settled),
        "first_tokens_per_s": 1 / statistics.mean(seconds[:FIRST_TOKENS]),
        "median_s": statistics.median(settled),
        "p95_s": sorted(settled)[int(0.95 * (len(settled) - 1))],
        "read_per_token": statistics.mean(read[FIRST_TOKENS:] or read),
    }


def sparse_figures(lm: LoadedModel, tokens: int, read: Sequence[int]) -> dict[str, Any]:
    """Figures of the neuron source. read: bytes of each token by the operating system's count."""
    source = neuron_source(lm.model)
    stats, file, plan = source.stats, source.file, source.plan
    layers = lm.model.args.n_layers
    entries = sum(len(layer.feed_forward.cache) for layer in lm.model.layers)
    chunk = max(end - start for start, end in source.chunks)
    counted = file.nbytes + stats.whole_layers * source.layer_bytes
    buffers = (entries + CHUNK_BUFFERS * chunk) * file.stride
    by_rates = plan.seconds(stats.reads, file.requests, file.nbytes // file.stride)
    return {
        "resident_bytes": resident_bytes(lm.model) + buffers,
        "entries_share": entries / layers / source.neurons,
        "counted_per_token": counted / tokens,
        "system_over_counted": sum(read) / max(1, counted),
        "share_of_ffn": counted / tokens / (layers * source.layer_bytes),
        "requests_per_token": file.requests / tokens,
        "hit_rate": 1 - stats.missed / max(1, stats.predicted),
        "predicted_share": stats.predicted / max(1, stats.sparse_layers) / source.neurons,
        "predicted_over_active": stats.predicted / max(1, int(stats.active)),
        "whole_layers_per_token": stats.whole_layers / tokens,
        "reading_s": stats.read_seconds / tokens,
        "managing_s": stats.manage_seconds / tokens,
        "feed_forward_s": stats.compute_seconds / tokens,
        "expected_reading_s": plan.read_seconds,
        "rates_reading_s": by_rates / tokens,
        "direct": file.direct,
        "window": plan.window,
        "depth": plan.depth,
        "gap": plan.gap,
    }


def text_ids(lm: LoadedModel, setup: Setup) -> list[int]:
    """Return the ids of the held-out text: a prompt, the tokens to decode and one target."""
    text = setup.text.read_text(encoding="utf-8")[setup.skip :][:TEXT_CHARACTERS]
    return lm.tokenizer.encode(text)[: setup.prompt + setup.new + 1]


def run_alone(setup: Setup, method: str, limit: float) -> dict[str, Any]:
    """Run a method in a process of its own, limited to so many bytes, with a cold page cache."""
    checkpoint = Checkpoint(setup.model)
    drop_cache(checkpoint.path)
    if (directory := flash_directory(checkpoint)).is_dir():
        drop_cache(directory)
    words = [sys.executable, Path(__file__).resolve(), "method", "--method", method]
    for option in ("model", "directory", "share", "prompt", "new", "text", "skip"):
        words += [f"--{option}", getattr(setup, option)]
    for option in ("window", "depth"):
        if getattr(setup, option):
            words += [f"--{option}", getattr(setup, option)]
    words += ["--never_whole"] * setup.never_whole + ["--compile"] * setup.compile
    return limited(words, int(limit), rate=disk_rate(setup))


def disk_rate(setup: Setup) -> Rate | None:
    return Rate(setup.model, int(setup.rate)) if setup.rate else None


def model_and_process_bytes(setup: Setup, methods: Sequence[str]) -> tuple[float, float]:
    """Return the bytes of the model, and of a process beside its model.

    Compiles first what the methods compile, because compilers need memory that decoding does not.
    """
    if reason := unsupported_reason(disk_rate(setup)):
        raise ValueError(f"skipped: {reason}")
    build.build()
    for method in methods if setup.compile else ():
        run_alone(setup, method, NO_LIMIT_BYTES)
    model = bfloat16_bytes(meta_model(Checkpoint(setup.model).args, None))
    process = run_alone(setup, "demo", NO_LIMIT_BYTES)["peak_rss_bytes"]
    log(f"the model: {model / 1e9:.2f} GB; a process beside it: {process / 1e9:.2f} GB")
    return model, process


def modes(setup: Setup) -> dict[str, Any]:
    """Run the methods in turns, `repeats` times."""
    methods = setup.methods or ("naive", "half", "paged", "oracle", "predictor")
    if "paged" in methods and (path := Checkpoint(setup.model).path).suffix != ".pth":
        log(f"paged: skipped; only tensors of a model.pth can be mapped, and this is {path}")
        methods = [method for method in methods if method != "paged"]
    model, process = model_and_process_bytes(setup, methods)
    limit = setup.limit * model + process
    shape = Checkpoint(setup.model).args
    # The oracles' weights come on top, and for moments two layers of them in float32.
    oracle_bytes = 2 * (shape.n_layers + 8) * shape.hidden_dim * shape.dim
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(setup.repeats):
        for method in methods:
            run = run_alone(setup, method, limit + oracle_bytes * (method == "oracle"))
            runs.setdefault(method, []).append(run)
            log(
                f"{method}: {run['tokens_per_s']:.3f} tokens/s, "
                f"{run['read_per_token'] / 1e6:.1f} MB read for a token, "
                f"{run['resident_bytes'] / model:.3f} of the weights in memory"
            )
    figures = {"limit_bytes": limit, "model_bytes": model, "beside_bytes": process}
    return figures | compare(runs)


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Add the ratios of the predictor's rates to the other methods' rates."""
    ratios = {}
    for method in runs:
        if method != "predictor" and "predictor" in runs:
            pairs = zip(runs["predictor"], runs[method], strict=True)
            ratios[method] = spread([a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs])
            log(f"predictor over {method}: {show(ratios[method])}")
    return {"predictor_over": ratios, "runs": runs}


def ablate(setup: Setup) -> dict[str, Any]:
    """Run once with each technique added, as in the paper's table 2."""
    runs = {}
    methods = "naive", "half", "no window, no bundles", "no bundles", "predictor"
    model, process = model_and_process_bytes(setup, methods)
    for method in methods:
        run = run_alone(setup, method, setup.limit * model + process)
        runs[method] = [run]
        reading = run.get("reading_s")
        rate = "" if not reading else f"{run['counted_per_token'] / reading / 1e9:.2f} GB/s, "
        seconds = f"{1000 * (reading or run['median_s']):.0f} ms"
        log(
            f"{method:22} {run['resident_bytes'] / 1e9:.2f} GB, {run['read_per_token'] / 1e9:.3f} "
            f"GB for a token, {rate}{seconds}{' of reading' if reading else ''}"
        )
    return {"model_bytes": model} | compare(runs)


@torch.inference_mode()
def quality(setup: Setup) -> dict[str, Any]:
    """Decode held-out text with the dense and the sparse model; compare nats and predictions."""
    dense, lm = load_model(setup.model, device="cpu"), sparse(setup)
    masks = oracles(setup.model, lm.model.tok_embeddings.weight.dtype)
    for layer, oracle in zip(lm.model.layers, masks, strict=True):
        layer.feed_forward.predictor = CheckedPredictor(layer.feed_forward.predictor, oracle)
    nats: dict[str, list[float]] = {"dense": [], "sparse": []}
    for n in tqdm(range(setup.texts), desc="texts", disable=None):
        ids = text_ids(lm, replace(setup, skip=TEXT_STEP_CHARACTERS * n))
        for name, model in (("dense", dense), ("sparse", lm)):
            nats[name] += decode(model, ids, setup.prompt)["nats"]
    means = {name: statistics.mean(values) for name, values in nats.items()}
    change, tokens = np.exp(means["sparse"] - means["dense"]) - 1, len(nats["dense"])
    log(f"{tokens} tokens: perplexity {np.exp(means['dense']):.3f} dense, {change:+.2%} sparse")
    return {
        "tokens": tokens,
        "nats": means,
        "perplexity_change": float(change),
        **prediction_figures([layer.feed_forward.predictor for layer in lm.model.layers]),
        "flash": sparse_figures(lm, tokens, [0]),
    }


def prediction_figures(predictors: Sequence["CheckedPredictor"]) -> dict[str, Any]:
    """Log and return recall and over-prediction, of all layers together and of each."""
    active, predicted, found, mass, mass_found = (
        sum(getattr(predictor, name) for predictor in predictors)
        for name in ("active", "predicted", "found", "mass", "mass_found")
    )
    log(
        f"{found / active:.1%} of the active neurons predicted, with {mass_found / mass:.2%} of "
        f"the sum of activations; {predicted / active:.2f} predicted for one active"
    )
    layers = [
        {"recall": p.found / max(p.active, 1), "over": p.predicted / max(p.active, 1)}
        for p in predictors
    ]
    return {
        "recall": found / active,
        "mass_recall": mass_found / mass,
        "predicted_over_active": predicted / active,
        "layers": layers,
    }


class CheckedPredictor(nn.Module):
    """Counts how a predictor compares with an oracle where single tokens are decoded.

    active, predicted, found: neurons, found ones being both. mass: the sum of all activations;
    mass_found: that of predicted neurons.
    """

    def __init__(self, predictor: nn.Module, oracle: Oracle):
        super().__init__()
        self.predictor, self.oracle = predictor, oracle
        self.active = self.predicted = self.found = 0
        self.mass = self.mass_found = 0.0

    def forward(self, x: Tensor) -> Tensor:
        mask = self.predictor(x)
        if len(x) == 1:
            activations = self.oracle.activations(x)
            self.active += int((activations > 0).sum())
            self.predicted += int(mask.sum())
            self.found += int((activations[mask] > 0).sum())
            self.mass += activations.float().sum().item()
            self.mass_found += activations[mask].float().sum().item()
        return mask


MODES = {"method": run_method, "modes": modes, "ablate": ablate, "quality": quality}


def main(args: argparse.Namespace) -> dict[str, Any]:
    setup = Setup(**vars(args))
    if setup.mode == "method":
        return run_method(setup)
    others = Others()
    figures = {"benchmark": f"flash {setup.mode}", "model": setup.model.name}
    figures |= MODES[setup.mode](setup)
    return figures | {"others": others.share()} | provenance(CPU)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("mode", choices=MODES)
    add("--model", type=Path, default=ROOT / "checkpoints" / "demo-opt", help="a checkpoint")
    add("--method", choices=[*METHODS, "demo"], help="of mode method")
    add("--methods", nargs="+", choices=METHODS, help="of mode modes (default: five)")
    add("--share", type=float, default=0.5, help="of the weights' bytes in memory (default: 0.5)")
    add("--limit", type=float, default=0.52, help="the same, enforced (default: 0.52)")
    add("--rate", type=float, help="limit of the disk in bytes per second, such as 1e9")
    add("--window", type=float, help="tokens whose neurons stay in memory (default: by cost)")
    add("--depth", type=int, help="reads in flight at a time (default: by cost)")
    add("--never_whole", action="store_true", help="read single neurons even if a layer is faster")
    add("--compile", action="store_true", help="compile steps, or blocks where layers stream")
    add("--prompt", type=int, default=128, help="tokens (default: 128)")
    add("--new", type=int, default=128, help="tokens after them (default: 128)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--texts", type=int, default=8, help="of mode quality (default: 8)")
    add("--text", type=Path, default=DATA / "text" / "tinystories_val.txt", help="held-out text")
    add("--skip", type=int, default=0, help="characters of the text to skip")
    add("--directory", type=Path, default=Path("offload"), help="of scratch files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))

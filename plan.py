"""From the command's options to a Policy, set by hand or found by a plan, and what to say of it.

Start at make_plan. What a model takes is read off its shape alone, so that `--plan` says what a
machine would do with a model before it is downloaded. The search is in planner.py, the machine's
measurements in probe.py.
"""

import argparse
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import Stats, known_bandwidth, machine_name, measured_bandwidth
from checkpoint import (
    DTYPES,
    Checkpoint,
    allocate,
    available_memory,
    final_dtype,
    read_json,
    size_text,
    stored_tensors,
)
from command import check_needs, log, positive
from decoding import LoadedModel
from files import write_whole
from hf import model_args
from links import LINKS, Step, table
from load import (
    compressed_scheme,
    config_dtype,
    divided,
    find_cache,
    find_device,
    random_filler,
    skeleton,
    use_fast_products,
)
from model import ModelArgs
from offload import StreamedLayers
from planner import Planner, Prediction, Sizes, Work
from policy import TIERS, Policy, Share
from probe import CACHE, Machine, probe, sample_args
from quantized import make_scheme
from ring import META, Layout
from tokenizer import Tokenizer, id_tokenizer, load_tokenizer
from tp import misfit

RESERVE = 0.1  # of the memory that is free: for all else that runs


@dataclass(frozen=True)
class Subject:
    """A model's shape and kind, and the device that it is for."""

    args: ModelArgs
    scheme: dict[str, Any] | None
    dtype: torch.dtype
    kv_dtype: str | None
    device: torch.device


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models larger than memory (see README)").add_argument
    add("--offload", choices=["auto"], help="place model and cache on device, host and disk")
    add("--plan", action="store_true", help="say where and how fast, and do no more")
    add("--link", choices=LINKS, help="with it: and on 1 to 64 devices that are joined by those")
    help = "with it: what each of them reads a second, 2TB (default: what this one does)"
    add("--read_rate", type=nbytes, metavar="BYTES", help=help)
    add("--device_memory", type=nbytes, metavar="BYTES", help="6GB: the most it may take")
    add("--host_memory", type=nbytes, metavar="BYTES", help="the same of the host's")
    add("--offload_dir", type=Path, default=Path("offload"), help="on the disk to be used")
    add(
        "--percent",
        type=float,
        nargs=6,
        metavar=("WG", "WC", "CG", "CC", "AG", "AC"),
        help="by hand: weights, cache, activations on device and in host memory; the rest on disk",
    )
    add("--gpu_batch_size", type=positive, help="rows that a layer takes at once, by hand")
    add("--num_gpu_batches", type=positive, default=1, help="of them that share a layer's weights")
    add("--compress_weight", action="store_true", help="round weights to 4 bits, group size 64")
    add("--compress_cache", action="store_true", help="the KV cache to 4 bits")
    add("--cpu_cache_compute", action="store_true", help="attend on the host to a cache there")
    add("--attn_sparsity", type=share, default=1.0, help="with it: of how many tokens values count")
    add("--pin_weight", type=int, choices=[0, 1], default=1, help="pin host memory (default: 1)")
    add("--overlap", type=int, choices=[0, 1], default=1, help="copy while computing (default: 1)")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options that say how something is placed need one that says that it is."""
    placed = options.offload or options.percent or options.plan
    for name in ("device_memory", "host_memory", "compress_weight", "compress_cache"):
        if getattr(options, name) and not placed:
            parser.error(f"--{name} needs --offload auto, --percent or --plan")
    check_needs(parser, options, [(n, "percent") for n in ("gpu_batch_size", "cpu_cache_compute")])
    check_needs(parser, options, [("link", "plan"), ("read_rate", "link")])
    if options.attn_sparsity < 1 and not options.cpu_cache_compute:
        parser.error("--attn_sparsity needs --cpu_cache_compute")
    if options.offload and options.percent:
        parser.error("give --offload auto or --percent, not both")
    if options.compress_cache:
        options.kv_dtype = "int4"


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def nbytes(text: str) -> int:
    """6GB -> 6000000000; 6GiB -> 6442450944."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory: say 6GB or 512MB")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def subject(options: argparse.Namespace) -> tuple[Subject, Tokenizer]:
    """What the command's options name, and its tokenizer. Of a model that has not been downloaded
    its config.json is enough, as --random_weights, with numbers for prompts."""
    dtype, device = DTYPES.get(options.dtype), find_device(options.device)
    if options.random_weights:
        config = read_json(options.random_weights)
        args, stored = model_args(config), config_dtype(config)
        scheme = make_scheme(options.random_mode) if options.random_mode else None
        tokenizer = id_tokenizer(args.vocab_size)
    else:
        checkpoint = Checkpoint(options.checkpoint_path)
        args, scheme, stored = checkpoint.args, checkpoint.scheme, checkpoint.dtype
        tokenizer = load_tokenizer(checkpoint.directory)
    scheme = compressed_scheme(options.compress_weight, scheme)
    args = divided(options.ranks, options.pipeline).share(args, scheme)
    return Subject(args, scheme, dtype or stored, options.kv_dtype, device), tokenizer


def make_plan(subject: Subject, work: Work, options: argparse.Namespace) -> Prediction:
    """The policy that the options ask for, and what is expected of it.

    Raises ValueError where it does not fit into memory, saying how much would do.
    """
    options.offload_dir.mkdir(parents=True, exist_ok=True)
    measured = machine(subject, options.offload_dir, not options.percent or options.plan)
    whole = sizes(subject)
    whole = replace(whole, slot=whole.slot * (options.flights or 1))  # each has a cache
    planner = Planner(whole, measured, subject.device.type == "cpu")
    layers = planner.sizes.layers * planner.sizes.layer
    limits = budgets(options, subject.device, layers)
    start = Policy(
        compress_weight=options.compress_weight,
        pin=bool(options.pin_weight),
        overlap=bool(options.overlap),
        cpu_attention=options.cpu_cache_compute,
        attention_share=options.attn_sparsity,
        directory=options.offload_dir,
        chunk=512 if subject.device.type == "cpu" else 4096,
    )
    if not options.percent:
        return planner.choose(work, limits, start, options.batch_size or work.texts)
    plan = planner.predict(by_hand(start, work, options), work)
    if short := planner.lacking(plan, limits):
        raise ValueError(short)
    return plan


def by_hand(start: Policy, work: Work, options: argparse.Namespace) -> Policy:
    weights, cache, activations = (Share(*options.percent[n : n + 2]) for n in (0, 2, 4))
    return replace(
        start,
        weights=weights,
        cache=cache,
        activations=activations,
        micro_batch=options.gpu_batch_size or min(options.batch_size or 16, work.texts),
        micro_batches=options.num_gpu_batches,
    )


def sizes(subject: Subject) -> Sizes:
    """Bytes of a model, from its shape alone."""
    args, item = subject.args, subject.dtype.itemsize
    stored = {
        name: torch.empty(t.shape, dtype=final_dtype(t, subject.dtype), device=META)
        for name, (t, _) in stored_tensors(skeleton(args, subject.scheme)).items()
    }
    layer = Layout({n: t for n, t in stored.items() if n.startswith("layers.0.")}).nbytes
    rest = sum(t.nbytes for n, t in stored.items() if not n.startswith("layers."))
    head = sum(t.nbytes for n, t in stored.items() if n.startswith("output."))
    one = find_cache(subject.kv_dtype)((1, 1, args.n_kv_heads, args.head_dim), subject.dtype, META)
    # A CPU's products want quantised weights packed anew: a slot holds them twice.
    packed = layer * bool(subject.scheme) * (subject.device.type == "cpu")
    qkv = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    return Sizes(
        layers=args.n_layers,
        layer=layer,
        kept=layer,
        ring=layer + packed,
        fixed=rest + process_bytes(subject.device),
        head=head or args.vocab_size * args.embed_dim * item,
        slot=sum(buffer.nbytes for buffer in one.buffers()),
        hidden=3 * args.dim * item,
        within=(2 * qkv + 3 * args.hidden_dim + 4 * args.dim) * item,
        logits=args.vocab_size * (item + 12),
    )


def process_bytes(device: torch.device) -> int:
    """What this process takes already, where that is the device's memory."""
    if device.type != "cpu":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def budgets(options: argparse.Namespace, device: torch.device, weights: int) -> dict[str, float]:
    """Bytes that may be taken of each tier: as given, or what is free less a reserve.

    weights: bytes of the layers, which are on the disk already, or will be once they are there.
    """
    cpu = torch.device("cpu")
    given = {"device": options.device_memory, "host": options.host_memory}
    free = {"host": available_memory(cpu) + process_bytes(cpu), "device": 0}
    if device.type != "cpu":
        free["device"] = available_memory(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    limits = {tier: given[tier] or (1 - RESERVE) * free[tier] / sharing for tier in free}
    if device.type == "cpu":
        limits = {"device": given["device"] or limits["host"]}
    stat = os.statvfs(options.offload_dir)
    return limits | {"disk": weights + stat.f_bavail * stat.f_frsize}


def machine(subject: Subject, directory: Path, needed: bool, anew: bool = False) -> Machine | None:
    """This machine's measurements for a model of that shape: from the cache, or made if needed."""
    key = machine_name(subject.device), torch.__version__, directory.stat().st_dev, subject
    file = CACHE / f"probe-{zlib.crc32(repr(key).encode()):08x}.json"
    if file.is_file() and not anew:
        return Machine.from_json(json.loads(file.read_text()))
    if not needed:
        return None
    small = sample_args(subject.args, sizes(subject).layer)
    model = skeleton(small, subject.scheme)
    allocate(model, subject.device, subject.dtype, random_filler(subject.device))
    model.new_cache = find_cache(subject.kv_dtype)
    use_fast_products(model, subject.dtype)
    log("measuring this machine, once for this model's shape: about 20 seconds ...")
    found = probe(model, subject.args, directory)
    CACHE.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(found.to_json()))
    return found


def report(plan: Prediction, lm: LoadedModel, stats: Stats) -> Iterator[str]:
    """What came, resource by resource, beside what was expected of the same blocks and steps."""
    if not isinstance(lm.model.layers, StreamedLayers):
        return
    waited = {what: by.seconds for what, by in lm.model.layers.waited.items()}
    took = stats.prefill_seconds + stats.decode_seconds
    came = f"took {took:.2f} s: {took - sum(waited.values()):.2f} s of computing"
    yield came + "".join(
        f", {seconds:.2f} s of waiting for {what}" for what, seconds in waited.items()
    )
    if plan.step:
        blocks = stats.prompt_tokens / (plan.policy.rows * plan.work.prompt)
        expected = {n: blocks * s + stats.steps * plan.step[n] for n, s in plan.prefill.items()}
        listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in expected.items())
        yield f"expected {max(expected.values()):.2f} s, all at once: {listed}"


def lines(plan: Prediction) -> Iterator[str]:
    """What a plan says, for a person."""
    policy, work = plan.policy, plan.work
    yield (
        f"plan: {policy.micro_batches} micro-batches of {policy.micro_batch} rows, prompts of up "
        f"to {work.prompt} tokens, {work.new} new ones"
    )
    realised = {
        "weights": plan.split.weights,
        "cache": plan.split.cache,
        "activations": policy.activations.counts(policy.micro_batches),
    }
    for what, counts in realised.items():
        shares = (f"{100 * n / sum(counts):.1f} % {t}" for n, t in zip(counts, TIERS, strict=True))
        yield f"  {what:11} " + ", ".join(shares)
    yield "  memory      " + ", ".join(f"{tier} {size_text(n)}" for tier, n in plan.memory.items())
    for name, seconds in plan.step.items():
        mark = ", which it waits for" if name == plan.binding else ""
        yield f"  {name:11} {plan.prefill[name]:.2f} s of prompts, {seconds:.4f} s of a step{mark}"
    if plan.step:
        yield (
            f"  expected    {plan.rate:.3g} tokens/s; the first after "
            f"{max(plan.prefill.values()):.2f} s, a block of rows in {plan.latency:.1f} s"
        )


def step_of(subject: Subject) -> Step:
    """What a step for one text reads, its head with the layers, and passes on."""
    found = sizes(subject)
    shared = found.layers * found.layer + found.head
    return Step(found.layers, shared, 0, subject.args.dim * subject.dtype.itemsize)


def on_devices(subject: Subject, options: argparse.Namespace) -> Iterator[str]:
    """What 1 to 64 devices would do, for a person."""
    rate = options.read_rate or known_bandwidth(subject.device)
    rate = rate or measured_bandwidth(subject.device)
    yield (
        f"on several devices, each reading {size_text(int(rate))} a second, links: {options.link} "
        "(a model of them, and no measurement)"
    )
    for count, sharded, staged in table(step_of(subject), rate, LINKS[options.link]):
        unfit = misfit(subject.args, subject.scheme, count)
        alone = f"{sharded:.4g} tokens/s for one text" if not unfit else f"one text: no, {unfit}"
        flights = f"; {staged:.4g} for {count} texts in a pipeline" if staged and count > 1 else ""
        yield f"  {count:2} devices  {alone}{flights}"

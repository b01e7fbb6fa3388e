"""From the command's options to a Policy, set by hand or found by a plan, and what to say of it.

Start at make_plan. What a model takes is read off its shape alone, so that `--plan` says what a
machine would do with a model before it is downloaded. The search is in planner.py, the machine's
measurements in probe.py.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import Stats
from checkpoint import Checkpoint
from decoding import LoadedModel
from fast_layers.install import use_fast_layers
from host.bandwidth import measured_bandwidth, saved_bandwidth
from host.devices import find_device
from host.log import log
from host.measurements import load_measurement, save_measurement
from host.memory import available_memory, machine_name, process_memory, size_text
from load import (
    compressed_scheme,
    config_dtype,
    find_cache,
    find_dtype,
    meta_model,
    parallel_strategy,
    random_filler,
)
from model import ModelArgs
from offload import StreamedLayers
from options.settings import LoadOptions, ModelChoice, PlanOptions
from quant.linear import make_scheme
from text.tokenizer import Tokenizer, id_tokenizer, load_tokenizer
from tiers.direct_io import nearest_directory
from tiers.links import LINKS, Step, table
from tiers.planner import Planner, Prediction, Sizes, Workload
from tiers.policy import TIERS, Policy, Share
from tiers.prefetch import META, Layout
from tiers.probe import Machine, probe, sample_args
from tp import indivisible_reason
from weights.allocation import allocate, final_dtype, stored_tensors
from weights.hf import model_args
from weights.weight_files import read_json

RESERVE = 0.1  # of the memory that is free: for all else that runs
# What a CPU must have to multiply these faster than float32.
FAST = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
BOUND_BY = {
    "disk": "the disk",
    "cells": "the disk",
    "to device": "copies to the device",
    "to host": "copies to the host",
    "compute": "computing",
    "host attention": "attention on the host",
}
UNITS = (1e-3, "ms"), (1, "s"), (60, "min"), (3600, "hours"), (86400, "days")


@dataclass(frozen=True)
class Subject:
    """A model's shape and kind, and the device that it is for."""

    args: ModelArgs
    scheme: dict[str, Any] | None
    dtype: torch.dtype
    kv_dtype: str | None
    device: torch.device


def find_subject(
    model: ModelChoice, load: LoadOptions, compress_weight: bool
) -> tuple[Subject, Tokenizer]:
    """The shape of the model that was chosen, and its tokenizer. The config.json of a model that
    has not been downloaded is enough, as --random_weights, with numbers for prompts."""
    dtype, device = find_dtype(load.dtype), find_device(load.device)
    if model.random_weights:
        config = read_json(model.random_weights)
        args, stored = model_args(config), config_dtype(config)
        scheme = make_scheme(model.random_mode) if model.random_mode else None
        tokenizer = id_tokenizer(args.vocab_size)
    else:
        checkpoint = Checkpoint(model.checkpoint_path)
        args, scheme, stored = checkpoint.args, checkpoint.scheme, checkpoint.dtype
        tokenizer = load_tokenizer(checkpoint.directory)
    scheme = compressed_scheme(compress_weight, scheme)
    args = parallel_strategy(load).shard_args(args, scheme)
    return Subject(args, scheme, dtype or stored, load.kv_dtype, device), tokenizer


@dataclass(frozen=True)
class Plan:
    """A policy, what is expected of it, and the bytes that there are by tier.

    short: why the disk cannot hold a model that is still to be downloaded, if it cannot.
    """

    subject: Subject
    prediction: Prediction
    budgets: dict[str, float]
    short: str = ""
    faster: bool = False  # in this dtype than in the stored one

    @property
    def policy(self) -> Policy:
        return self.prediction.policy

    @property
    def work(self) -> Workload:
        return self.prediction.workload


def plan_texts(
    model: ModelChoice,
    load: LoadOptions,
    options: PlanOptions,
    prompt_lengths: Callable[[Tokenizer, ModelArgs], list[int]],
    new: int,
) -> Plan:
    """The plan for a model that continues texts. prompt_lengths: makes the tokens of each prompt.
    new: tokens that follow each."""
    subject, tokenizer = find_subject(model, load, options.compress_weight)
    lengths, context = prompt_lengths(tokenizer, subject.args), subject.args.context
    longest = min(max(lengths), context - 1)
    texts = -(-len(lengths) // (options.micro_batches or 1))
    return make_plan(subject, Workload(texts, longest, min(new, context - longest)), options)


def make_plan(subject: Subject, work: Workload, options: PlanOptions) -> Plan:
    """The policy that the options ask for, or for --plan the better one of the dtypes that a run
    could have. Raises ValueError if it does not fit into memory, saying how much would do.
    """
    plan = plan_in(subject, work, options)
    slow = subject.device.type == "cpu" and not multiplies_fast(subject.dtype)
    if not (options.plan and options.any_dtype and slow):
        return plan
    try:
        other = plan_in(replace(subject, dtype=torch.float32), work, options)
    except ValueError:  # float32 does not fit
        return plan
    faster = other.prediction.rate > plan.prediction.rate and not other.short
    return replace(other, faster=True) if faster else plan


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply the dtype faster than float32."""
    has = torch.cpu.get_capabilities()
    return dtype not in FAST or any(has.get(name) for name in FAST[dtype])


def plan_in(subject: Subject, work: Workload, options: PlanOptions) -> Plan:
    measured = machine(subject, options.offload_dir, not options.percent or options.plan)
    whole = sizes(subject)
    # A micro-batch has a cache of its own.
    whole = replace(whole, cache_position=whole.cache_position * (options.micro_batches or 1))
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
        tokens_at_once=512 if subject.device.type == "cpu" else 4096,
    )
    if options.percent:
        found = planner.predict(by_hand(start, work, options), work)
        if short := planner.shortage(found, limits):
            raise ValueError(short)
    else:
        found = planner.choose(work, limits, start, options.batch_size or work.texts)
    needed = layers + whole.always_on_device - process_memory(subject.device)
    free = limits["disk"] - layers
    short = f"the model takes {size_text(needed)} and {size_text(free)} is free there"
    if options.downloaded:  # the weights are on the disk already
        return Plan(subject, found, limits)
    return Plan(subject, found, limits | {"disk": free}, short if needed > free else "")


def by_hand(start: Policy, work: Workload, options: PlanOptions) -> Policy:
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
        for name, (t, _) in stored_tensors(meta_model(args, subject.scheme)).items()
    }
    layer = Layout({n: t for n, t in stored.items() if n.startswith("layers.0.")}).nbytes
    rest = sum(t.nbytes for n, t in stored.items() if not n.startswith("layers."))
    head = sum(t.nbytes for n, t in stored.items() if n.startswith("output."))
    one = find_cache(subject.kv_dtype)((1, 1, args.n_kv_heads, args.head_dim), subject.dtype, META)
    # The CPU kernels repack quantised weights, so a buffer holds each layer twice.
    packed = layer * bool(subject.scheme) * (subject.device.type == "cpu")
    qkv = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    return Sizes(
        layers=args.n_layers,
        layer=layer,
        layer_on_device=layer,
        layer_in_buffer=layer + packed,
        always_on_device=rest + process_memory(subject.device),
        head=head or args.vocab_size * args.embed_dim * item,
        cache_position=sum(buffer.nbytes for buffer in one.buffers()),
        activations_between_layers=3 * args.dim * item,
        activations_in_layer=(2 * qkv + 3 * args.hidden_dim + 4 * args.dim) * item,
        logits=args.vocab_size * (item + 12),
    )


def budgets(options: PlanOptions, device: torch.device, weights: int) -> dict[str, float]:
    """Bytes that may be taken of each tier: as given, or what is free less a reserve.

    weights: bytes of the layers, which are on the disk already, or will be once they are there.
    """
    cpu = torch.device("cpu")
    given = {"device": options.device_memory, "host": options.host_memory}
    free = {"host": available_memory(cpu) + process_memory(cpu), "device": 0}
    if device.type != "cpu":
        free["device"] = available_memory(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    limits = {tier: given[tier] or (1 - RESERVE) * free[tier] / sharing for tier in free}
    if device.type == "cpu":
        limits = {"device": given["device"] or limits["host"]}
    stat = os.statvfs(nearest_directory(options.offload_dir))
    return limits | {"disk": weights + stat.f_bavail * stat.f_frsize}


def machine(subject: Subject, directory: Path, needed: bool, anew: bool = False) -> Machine | None:
    """This machine's measurements for a model of that shape: kept ones, or made if needed."""
    disk = nearest_directory(directory).stat().st_dev
    key = machine_name(subject.device), torch.__version__, disk, subject
    if (kept := load_measurement("machine", key)) and not anew:
        return Machine.from_json(kept)
    if not needed:
        return None
    small = sample_args(subject.args, sizes(subject).layer)
    model = meta_model(small, subject.scheme)
    allocate(model, subject.device, subject.dtype, random_filler(subject.device))
    model.cache_factory = find_cache(subject.kv_dtype)
    use_fast_layers(model, subject.dtype)
    log("measuring this machine, once for this model's shape: about 20 seconds ...")
    found = probe(model, subject.args, directory)
    save_measurement("machine", key, found.to_json())
    return found


def report(plan: Plan, lm: LoadedModel, stats: Stats) -> Iterator[str]:
    """What came, resource by resource, beside what was expected of the same blocks and steps."""
    if not isinstance(lm.model.layers, StreamedLayers):
        return
    waited = {what: by.seconds for what, by in lm.model.layers.wait_times.items()}
    took = stats.prefill_seconds + stats.decode_seconds
    came = f"took {took:.2f} s: {took - sum(waited.values()):.2f} s of computing"
    yield came + "".join(
        f", {seconds:.2f} s of waiting for {what}" for what, seconds in waited.items()
    )
    step, prefill = plan.prediction.step, plan.prediction.prefill
    if step:
        blocks = stats.prompt_tokens / (plan.policy.rows * plan.work.prompt)
        expected = {n: blocks * s + stats.steps * step[n] for n, s in prefill.items()}
        listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in expected.items())
        yield f"expected {max(expected.values()):.2f} s, all at once: {listed}"


def lines(plan: Plan) -> Iterator[str]:
    """What a plan says, for a person: the verdict first."""
    found, policy, work = plan.prediction, plan.policy, plan.work
    tiers = {t: "memory" if t == "device" and found.device_is_cpu else t for t in found.memory}
    yield f"plan: {verdict(plan)}"
    yield f"  dtype       {dtype_text(plan)}"
    yield (
        f"  rows        {policy.micro_batches} micro-batches of {policy.micro_batch}, prompts of "
        f"up to {work.prompt} tokens, {work.new} new ones"
    )
    for what, counts in realised(plan).items():
        shares = (f"{100 * counts[t] / sum(counts.values()):.1f} % {tiers[t]}" for t in tiers)
        yield f"  {what:11} " + ", ".join(shares)
    yield "  takes       " + ", ".join(
        f"{size_text(n)} of {name}, where {size_text(plan.budgets[tier])} is free"
        for (tier, n), name in zip(found.memory.items(), tiers.values(), strict=True)
    )
    for name, seconds in found.step.items():
        mark = ", which it waits for" if name == found.binding else ""
        prompts = duration_text(found.prefill[name])
        yield f"  {name:11} {prompts} of prompts, {duration_text(seconds)} of a step{mark}"
    if found.step:
        first = duration_text(max(found.prefill.values()))
        yield (
            f"  expected    {found.rate:.3g} tokens/s; the first after {first}, a block of rows "
            f"in {duration_text(found.latency)}"
        )


def verdict(plan: Plan) -> str:
    """Whether the model fits, about how fast it is, and what it waits for most."""
    found = plan.prediction
    moving = "this disk" if found.memory["disk"] else "memory"
    fits = f"does not fit this disk: {plan.short}" if plan.short else f"fits {moving}"
    if not found.step:
        return fits
    phases = found.prefill, {name: n * (plan.work.new - 1) for name, n in found.step.items()}
    longest = max(phases, key=lambda phase: max(phase.values()))
    bound = BOUND_BY[max(longest, key=longest.get)]
    return f"{fits}; about {found.rate:.2g} tokens/s; bound by {bound}"


def dtype_text(plan: Plan) -> str:
    name = str(plan.subject.dtype).removeprefix("torch.")
    return f"{name}, faster here than the stored one: give --dtype {name}" if plan.faster else name


def realised(plan: Plan) -> dict[str, dict[str, float]]:
    """How many layers, cells and micro-batches are on each tier that there is."""
    found, policy = plan.prediction, plan.policy
    counts = {
        "weights": found.split.weights,
        "cache": found.split.cache,
        "activations": policy.activations.counts(policy.micro_batches),
    }
    named = {what: dict(zip(TIERS, each, strict=True)) for what, each in counts.items()}
    if found.device_is_cpu:
        for each in named.values():
            each["device"] += each.pop("host")
    return named


def duration_text(seconds: float) -> str:
    """9000 -> '2.5 hours'."""
    size, unit = max((u for u in UNITS if seconds >= u[0]), default=UNITS[0])
    return f"{seconds / size:.3g} {unit}"


def step_of(subject: Subject) -> Step:
    """What a step for one text reads, its head with the layers, and passes on."""
    found = sizes(subject)
    shared = found.layers * found.layer + found.head
    return Step(found.layers, shared, 0, subject.args.dim * subject.dtype.itemsize)


def on_devices(subject: Subject, link: str, read_rate: float | None) -> Iterator[str]:
    """What 1 to 64 devices would do, for a person."""
    rate = read_rate or saved_bandwidth(subject.device)
    rate = rate or measured_bandwidth(subject.device)
    yield (
        f"on several devices, each reading {size_text(int(rate))} a second, links: {link} "
        "(a model of them, and no measurement)"
    )
    for count, sharded, staged in table(step_of(subject), rate, LINKS[link]):
        unfit = indivisible_reason(subject.args, subject.scheme, count)
        alone = f"{sharded:.4g} tokens/s for one text" if not unfit else f"one text: no, {unfit}"
        micro_batches = (
            f"; {staged:.4g} for {count} texts in a pipeline" if staged and count > 1 else ""
        )
        yield f"  {count:2} devices  {alone}{micro_batches}"

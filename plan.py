"""Makes the Policy of an offloaded model, from --percent or by a search, and explains it in lines.

Terms, as in tiers/: a tier is one of device, host (memory) and disk; if the device is the CPU,
device and host are one. A policy says which shares of the weights, the KV cache and the activations
are on each tier, and groups rows (texts) into micro-batches; a block of rows is all rows that are
generated together. A cell is the KV cache of one layer for one micro-batch. A workload is the
number of texts, of prompt tokens and of new tokens. A step generates one token of each row of a
block. A resource is a part of the machine that a step keeps busy: the disk, the copies, the
computation on the device, or on the host.

Start at plan_texts, which cli/generation.py calls; make_plan chooses the plan. It needs only the
shape of a model, so that `--plan` predicts how a model runs on this machine before it is
downloaded. tiers/planner.py searches for the policy; tiers/probe.py measures the machine.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import Stats
from checkpoint import Checkpoint
from decoding import LoadedModel
from fast_layers.cpu import is_large, replaceable
from fast_layers.install import use_fast_layers
from host.bandwidth import measured_bandwidth, saved_bandwidth
from host.devices import find_device
from host.log import log
from host.measurements import load_measurement, save_measurement
from host.memory import available_memory, machine_name, process_memory, size_text
from kernels.cpu.build import fastest_set, unsupported_reason
from layers.args import ModelArgs
from load import (
    compressed_scheme,
    config_dtype,
    find_cache,
    find_dtype,
    meta_model,
    parallel_strategy,
    random_filler,
)
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

RESERVED_SHARE = 0.1  # of the free memory, for other processes
# CPU features, each of which makes PyTorch's products in these dtypes faster than in float32.
FAST_DTYPE_FEATURES = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
RESOURCE_NAMES = {
    "disk": "the disk",
    "cells": "the disk",
    "to device": "copies to the device",
    "to host": "copies to the host",
    "compute": "computing",
    "host attention": "attention on the host",
}
UNITS = (1e-3, "ms"), (1, "s"), (60, "min"), (3600, "hours"), (86400, "days")


@dataclass(frozen=True)
class ModelSpec:
    """The shape, quantisation and dtypes of a model, and the device that it runs on.

    scheme: how its linears are quantised in memory (quant/linear.py), None: they are dense. dtype:
    of the weights and activations. kv_dtype: see LoadOptions.
    """

    args: ModelArgs
    scheme: dict[str, Any] | None
    dtype: torch.dtype
    kv_dtype: str | None
    device: torch.device


def find_model_spec(
    model: ModelChoice, load: LoadOptions, compress_weight: bool
) -> tuple[ModelSpec, Tokenizer]:
    """Returns the spec of the chosen model, and its tokenizer.

    For a model that is not downloaded, its config.json is enough, given as --random_weights.
    Prompts are then numbers of tokens, as the tokenizer (id_tokenizer) encodes no texts.
    compress_weight: whether dense weights are rounded to 4 bits. Under torchrun the spec is that of
    this rank's shard. Raises the errors of Checkpoint.
    """
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
    return ModelSpec(args, scheme, dtype or stored, load.kv_dtype, device), tokenizer


@dataclass(frozen=True)
class Plan:
    """A policy, the prediction for it, and the bytes that a run may take.

    budgets: these bytes by tier, as the function `budgets` returns them; for a model that is not
    downloaded, those of the disk without the model's layers.
    short: why a model that is not downloaded does not fit the disk; "": it fits.
    """

    spec: ModelSpec
    prediction: Prediction
    budgets: dict[str, float]
    short: str = ""
    faster: bool = False  # this dtype is predicted to be faster than the stored one

    @property
    def policy(self) -> Policy:
        return self.prediction.policy

    @property
    def workload(self) -> Workload:
        return self.prediction.workload


def plan_texts(
    model: ModelChoice,
    load: LoadOptions,
    options: PlanOptions,
    prompt_lengths: Callable[[Tokenizer, ModelArgs], list[int]],
    new: int,
) -> Plan:
    """Make the plan for a model that continues texts: generate.py's --offload, --percent, --plan.

    prompt_lengths: called with the tokenizer and the args; returns the number of tokens of each
    prompt. new: tokens that follow each prompt, fewer where the context ends. The plan takes all
    prompts to be as long as the longest. In a pipeline of ranks (pp.py) the texts are divided among
    options.micro_batches micro-batches, as are the rows of options.batch_size, and the plan is for
    one of these.
    """
    spec, tokenizer = find_model_spec(model, load, options.compress_weight)
    lengths, context = prompt_lengths(tokenizer, spec.args), spec.args.context
    longest = min(max(lengths), context - 1)
    count = options.micro_batches or 1
    texts = math.ceil(len(lengths) / count)
    if options.batch_size:
        options = replace(options, batch_size=math.ceil(options.batch_size / count))
    return make_plan(spec, Workload(texts, longest, min(new, context - longest)), options)


def make_plan(spec: ModelSpec, workload: Workload, options: PlanOptions) -> Plan:
    """Make the plan for the options. For --plan without --dtype, on a CPU that is slow in the
    stored dtype, float32 is also tried, and the faster plan is returned.

    Raises ValueError, with the memory that is needed, if the model does not fit.
    """
    plan = plan_for_dtype(spec, workload, options)
    slow = spec.device.type == "cpu" and not multiplies_fast(spec)
    if not (options.plan and options.any_dtype and slow):
        return plan
    try:
        other = plan_for_dtype(replace(spec, dtype=torch.float32), workload, options)
    except ValueError:  # float32 does not fit
        return plan
    faster = other.prediction.rate > plan.prediction.rate and not other.short
    return replace(other, faster=True) if faster else plan


def multiplies_fast(spec: ModelSpec) -> bool:
    """Returns whether this CPU runs a model in its dtype at least as fast as in float32: by the
    kernels of kernels/cpu, or by instructions for that dtype."""
    if replaceable(meta_model(spec.args, spec.scheme), spec.dtype):  # kernels replace linears
        return unsupported_reason(spec.dtype) is None
    has, features = torch.cpu.get_capabilities(), FAST_DTYPE_FEATURES.get(spec.dtype)
    # None: a dtype that needs no such instructions, such as float32.
    return features is None or any(has.get(name) for name in features)


def plan_for_dtype(spec: ModelSpec, workload: Workload, options: PlanOptions) -> Plan:
    """Make the plan for the dtype of the spec: predict the policy of --percent, or search for the
    fastest one. Raises ValueError if it does not fit the memory.

    A model whose weights are not on the disk yet (options.downloaded is false) may exceed the disk:
    then Plan.short says so.
    """
    # A run with --percent needs no seconds: it measures nothing.
    measured = machine(spec, options.offload_dir, not options.percent or options.plan)
    parts = sizes(spec)
    # Each micro-batch of a pipeline has its own KV cache, and all are in memory at the same time.
    parts = replace(parts, cache_position=parts.cache_position * (options.micro_batches or 1))
    planner = Planner(parts, measured, spec.device.type == "cpu")
    layers = parts.layers * parts.layer  # bytes of all layers
    limits = budgets(options, spec.device, layers)
    start = Policy(
        compress_weight=options.compress_weight,
        pin=bool(options.pin_weight),
        overlap=bool(options.overlap),
        cpu_attention=options.cpu_cache_compute,
        attention_share=options.attn_sparsity,
        directory=options.offload_dir,
        tokens_at_once=512 if spec.device.type == "cpu" else 4096,
    )
    if options.percent:
        found = planner.predict(policy_by_hand(start, workload, options), workload)
        if shortage := planner.shortage(found, limits):
            raise ValueError(shortage)
    else:
        found = planner.choose(workload, limits, start, options.batch_size or workload.texts)
    if options.downloaded:
        return Plan(spec, found, limits)
    # Bytes of all weights: always_on_device is the other weights and, on a CPU, this process.
    needed = layers + parts.always_on_device - process_memory(spec.device)
    free = limits["disk"] - layers  # `budgets` added the layers, which are not there yet
    short = f"the model takes {size_text(needed)} and {size_text(free)} is free there"
    return Plan(spec, found, limits | {"disk": free}, short if needed > free else "")


def policy_by_hand(start: Policy, workload: Workload, options: PlanOptions) -> Policy:
    """Returns the policy with the shares of --percent and the micro-batches of the options.

    start: the policy that gives all other fields. Without gpu_batch_size, the micro-batches share
    the rows of batch_size (None: all texts, at most 16 in each), and there are no more of them than
    rows. With gpu_batch_size, batch_size is not used.
    """
    # --percent: of the weights, the cache and the activations, each on the device and on the host.
    weights, cache, activations = (Share(*options.percent[n : n + 2]) for n in (0, 2, 4))
    rows, count = min(options.batch_size or workload.texts, workload.texts), options.num_gpu_batches
    if options.gpu_batch_size:
        micro_batch = options.gpu_batch_size
    else:
        count = min(count, rows)
        micro_batch = rows // count if options.batch_size else min(16, math.ceil(rows / count))
    return replace(
        start,
        weights=weights,
        cache=cache,
        activations=activations,
        micro_batch=micro_batch,
        micro_batches=count,
    )


def sizes(spec: ModelSpec) -> Sizes:
    """Returns the bytes of a model's parts, computed from its shape alone.

    Activations and logits are estimated: how many tensors of which width are in memory at a time.
    always_on_device contains what this process uses of a CPU's memory, see process_memory.
    """
    args, item = spec.args, spec.dtype.itemsize
    stored = {
        name: torch.empty(t.shape, dtype=final_dtype(t, spec.dtype), device=META)
        for name, (t, _) in stored_tensors(meta_model(args, spec.scheme)).items()
    }
    layer = Layout({n: t for n, t in stored.items() if n.startswith("layers.0.")}).nbytes
    rest = sum(t.nbytes for n, t in stored.items() if not n.startswith("layers."))
    # 0 for a tied head, which `rest` has as the embedding: then computed from the shape, below.
    head = sum(t.nbytes for n, t in stored.items() if n.startswith("output."))
    # A cache of one row and one slot.
    slot = find_cache(spec.kv_dtype)((1, 1, args.n_kv_heads, args.head_dim), spec.dtype, META)
    # The CPU kernels repack quantised weights, so a buffer holds each layer twice.
    packed = layer * bool(spec.scheme) * (spec.device.type == "cpu")
    qkv = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim  # width of queries, keys and values
    return Sizes(
        layers=args.n_layers,
        layer=layer,
        layer_on_device=layer,
        layer_in_buffer=layer + packed,
        always_on_device=rest + process_memory(spec.device),
        head=head or args.vocab_size * args.embed_dim * item,
        cache_position=sum(buffer.nbytes for buffer in slot.buffers()),
        activations_between_layers=3 * args.dim * item,
        activations_in_layer=(2 * qkv + 3 * args.hidden_dim + 4 * args.dim) * item,
        logits=args.vocab_size * (item + 12),  # 12: three float32 tensors in sampling
        windows=tuple(layer.window for layer in args.layer_types),
    )


def budgets(options: PlanOptions, device: torch.device, weights: int) -> dict[str, float]:
    """Returns the bytes that a run may take of each tier: what the options say, or the free bytes
    less a reserve.

    weights: bytes of the layers. They are added to the free bytes of the disk: a policy counts
    layers on disk as bytes of the disk, which holds the checkpoint already. The processes that
    torchrun started on this machine share its memory and its disk equally; each has a GPU of its
    own. options.host_memory and device_memory are for each process. The result has the keys of
    TIERS, without "host" if the device is the CPU.
    """
    cpu = torch.device("cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    # If the device is the CPU, predictions include what this process uses already
    # (Sizes.always_on_device), which is not among the free bytes. For a GPU, process_memory is 0.
    free = {"host": available_memory(cpu) / processes + process_memory(device)}
    if device.type != "cpu":
        free["device"] = available_memory(device)
    given = {"device": options.device_memory, "host": options.host_memory}
    limits = {tier: given[tier] or (1 - RESERVED_SHARE) * free[tier] for tier in free}
    if device.type == "cpu":  # both options limit its memory
        limits = {"device": min(filter(None, given.values()), default=limits["host"])}
    stat = os.statvfs(nearest_directory(options.offload_dir))
    return limits | {"disk": weights + stat.f_bavail * stat.f_frsize / processes}


def machine(spec: ModelSpec, directory: Path, needed: bool, anew: bool = False) -> Machine | None:
    """Returns the machine's measurements for a model: saved ones, or if needed new ones.

    New ones are of one layer of the model's shape, or a narrower one, with random weights and the
    real model's kernels; they are saved. directory: a folder, which need not exist yet, on the disk
    for offloading. needed: if there are no saved ones, True: measure; False: return None. anew: do
    not use saved ones.
    """
    disk = nearest_directory(directory).stat().st_dev
    key = machine_name(spec.device), torch.__version__, disk, spec, fastest_set(spec.device)
    if (saved := load_measurement("machine", key)) and not anew:
        return Machine.from_json(saved)
    if not needed:
        return None
    small = sample_args(spec.args, sizes(spec).layer)
    model = meta_model(small, spec.scheme)
    allocate(model, spec.device, spec.dtype, random_filler())
    model.cache_factory = replace(model.cache_factory, make=find_cache(spec.kv_dtype))
    use_fast_layers(model, spec.dtype, is_large(meta_model(spec.args, spec.scheme)))
    log("measuring this machine, once for this model's shape: about 20 seconds ...")
    found = probe(model, spec.args, directory)
    save_measurement("machine", key, found.to_json())
    return found


def report(plan: Plan, lm: LoadedModel, stats: Stats) -> Iterator[str]:
    """Yield lines of the log after a run with this plan: the seconds of computing and of waiting,
    and the predicted seconds, if the machine was measured. stats: of the run. Yields nothing if the
    policy is plain (Policy.plain): the model then has no streamed layers."""
    if not isinstance(lm.model.layers, StreamedLayers):
        return
    waited = {what: wait.seconds for what, wait in lm.model.layers.wait_times.items()}
    took = stats.prefill_seconds + stats.decode_seconds
    computing = f"took {took:.2f} s: {took - sum(waited.values()):.2f} s of computing"
    yield computing + "".join(
        f", {seconds:.2f} s of waiting for {what}" for what, seconds in waited.items()
    )
    step, prefill = plan.prediction.step, plan.prediction.prefill
    if step:
        # Blocks of full prompts that were read; a fraction for shorter prompts or fewer rows.
        blocks = stats.prompt_tokens / (plan.policy.rows * plan.workload.prompt)
        expected = {n: blocks * s + stats.steps * step[n] for n, s in prefill.items()}
        listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in expected.items())
        yield f"expected {max(expected.values()):.2f} s, all at once: {listed}"


def lines(plan: Plan) -> Iterator[str]:
    """Yield the plan as lines of text, the verdict first: --plan prints them, a run logs them.

    Without measurements of the machine (a run with --percent makes none) there are no seconds.
    """
    found, policy, workload = plan.prediction, plan.policy, plan.workload
    tiers = {t: "memory" if t == "device" and found.device_is_cpu else t for t in found.memory}
    yield f"plan: {verdict(plan)}"
    yield f"  dtype       {dtype_text(plan)}"
    yield (
        f"  rows        {policy.micro_batches} micro-batches of {policy.micro_batch}, prompts of "
        f"up to {workload.prompt} tokens, {workload.new} new ones"
    )
    for what, counts in item_counts(plan).items():
        shares = (f"{100 * counts[t] / sum(counts.values()):.1f} % {tiers[t]}" for t in tiers)
        yield f"  {what:11} " + ", ".join(shares)
    yield "  takes       " + ", ".join(
        f"{size_text(n)} of {name}, where {size_text(plan.budgets[tier])} is free"
        for (tier, n), name in zip(found.memory.items(), tiers.values(), strict=True)
    )
    for name, seconds in found.step.items():
        mark = ", the slowest" if name == found.binding else ""
        prompts = duration_text(found.prefill[name])
        yield f"  {name:11} {prompts} of prompts, {duration_text(seconds)} of a step{mark}"
    if found.step:
        first = duration_text(max(found.prefill.values()))
        yield (
            f"  expected    {found.rate:.3g} tokens/s; the first after {first}, a block of rows "
            f"in {duration_text(found.latency)}"
        )


def verdict(plan: Plan) -> str:
    """Returns whether the model fits, its predicted rate, and the resource that bounds it: the one
    that is busiest in the longer phase, the prompts or all steps of a block of rows."""
    found = plan.prediction
    # Where the model must fit: with parts on disk, the disk; otherwise memory.
    place = "this disk" if found.memory["disk"] else "memory"
    fits = f"does not fit this disk: {plan.short}" if plan.short else f"fits {place}"
    if not found.step:
        return fits
    phases = found.prefill, {name: n * (plan.workload.new - 1) for name, n in found.step.items()}
    # Of the two dicts of seconds by resource, the one whose busiest resource takes longer.
    longest = max(phases, key=lambda phase: max(phase.values()))
    bound = RESOURCE_NAMES[max(longest, key=longest.get)]
    return f"{fits}; about {found.rate:.2g} tokens/s; bound by {bound}"


def dtype_text(plan: Plan) -> str:
    """Returns the dtype's name, and the hint to give --dtype if make_plan has chosen this dtype
    because it is faster than the stored one."""
    name = str(plan.spec.dtype).removeprefix("torch.")
    return f"{name}, faster here than the stored one: give --dtype {name}" if plan.faster else name


def item_counts(plan: Plan) -> dict[str, dict[str, float]]:
    """Returns the number of layers ("weights"), of cells ("cache") and of micro-batches
    ("activations") on each tier. On a CPU the items on the tier "host" count as on the device."""
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
    """Returns seconds as text in the largest of UNITS that they reach: 9000 -> "2.5 hours"."""
    size, unit = max((u for u in UNITS if seconds >= u[0]), default=UNITS[0])
    return f"{seconds / size:.3g} {unit}"


def decoding_step(spec: ModelSpec) -> Step:
    """Returns the bytes of a decoding step for one text, for links.table. The head's bytes are
    added to those of the layers, because devices divide it, too. The KV cache is left out."""
    found = sizes(spec)
    shared = found.layers * found.layer + found.head
    return Step(found.layers, shared, 0, spec.args.dim * spec.dtype.itemsize)


def on_devices(spec: ModelSpec, link: str, read_rate: float | None) -> Iterator[str]:
    """Yield lines of text with the modelled rates of 1 to 64 devices (--plan --link): with each
    layer divided among all of them, and as a pipeline.

    link: a key of LINKS. read_rate: bytes per second that each device reads; None: the rate of this
    device, as measured.
    """
    rate = read_rate or saved_bandwidth(spec.device)
    rate = rate or measured_bandwidth(spec.device)
    yield (
        f"on several devices, each reading {size_text(int(rate))} a second, links: {link} "
        "(modelled, not measured)"
    )
    for count, sharded, staged in table(decoding_step(spec), rate, LINKS[link]):
        unfit = indivisible_reason(spec.args, spec.scheme, count)
        alone = f"{sharded:.4g} tokens/s for one text" if not unfit else f"one text: no, {unfit}"
        pipeline = f"; {staged:.4g} for {count} texts in a pipeline" if staged else ""
        yield f"  {count:2} devices  {alone}{pipeline if count > 1 else ''}"

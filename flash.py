"""Write a model's feed-forward neurons as records, for generate.py --flash to read a few at a time.

    python flash.py --checkpoint_path checkpoints/demo-opt --calibration_file stories.txt
    python generate.py --checkpoint_path checkpoints/demo-opt --flash --dram_budget 60%

Start at run. `calibrate` learns from a text which neurons a token needs (predictor.py), `pack`
writes the neurons, those that are needed most often first. What was learned is kept beside the
checkpoint, so that another --neurons is a matter of copying; layers that an interrupted run has
finished are not learned again. The files are described in pack.py, what reads them in sparse.py.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cli import command
from cli.options import parse_flash_args as parse_args

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    ARGS = command.begin(parse_args)

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibration.gptq import fill_module
from calibration.predictor import GAPS, WINDOWS, Learned, dense, inputs, learn
from calibration.texts import calibration_text, calibration_tokens, log_above_bars, resume_or_clear
from checkpoint import Checkpoint
from cli.command import exit_code
from host.devices import find_device
from host.files import sync
from host.log import be_quiet, log
from host.memory import check_memory, size_text, whole_blocks
from host.threads import set_threads
from load import meta_model
from neurons.pack import (
    FILES,
    VERSION,
    check_sparse,
    fingerprint,
    flash_directory,
    hash_file,
    write_manifest,
)
from neurons.records import GATED, PLAIN, Format

RANK = 32  # the predictor's is the model's width divided by this
CPU = torch.device("cpu")


def run(args: argparse.Namespace) -> Path:
    """The directory of the pack. Raises what Checkpoint, calibration and the disk raise."""
    set_threads(args.threads)
    checkpoint = Checkpoint(args.checkpoint_path)
    check_sparse(checkpoint.args)
    checkpoint.check(meta_model(checkpoint.args, checkpoint.scheme))
    beside = flash_directory(checkpoint)
    directory, work = args.flash_dir or beside, beside.with_name(f"{beside.name}.learned")
    format = record_format(checkpoint, args)
    layers, neurons = checkpoint.args.n_layers, checkpoint.args.hidden_dim
    total = layers * whole_blocks(neurons * format.stride)
    log(
        f"{directory}: {layers * neurons:,} neurons of {size_text(format.used)}, stored in "
        f"{size_text(format.stride)} each, {size_text(total)} in all"
    )
    if total > (free := shutil.disk_usage(checkpoint.directory).free):
        raise ValueError(f"{directory} needs {size_text(total)}, {size_text(free)} of disk is free")
    learned = calibrate(checkpoint, work, args)
    pack(checkpoint, format, learned, directory)
    return directory


def record_format(checkpoint: Checkpoint, args: argparse.Namespace) -> Format:
    matrices = GATED if checkpoint.args.feed_forward == "gated" else PLAIN
    return Format(
        matrices, checkpoint.args.dim, args.neurons, checkpoint.dtype, args.groupsize, args.sector
    )


def calibrate(checkpoint: Checkpoint, work: Path, args: argparse.Namespace) -> list[Learned]:
    """What there is to know of each layer; a layer that an earlier run has learned is kept."""
    said = work / "identity.json"
    if args.calibration_file:
        tokens = calibration_tokens(
            checkpoint,
            calibration_text(args),
            args.calibration_seq_length,
            args.calibration_samples,
        )
        made_of = [fingerprint(checkpoint), zlib.crc32(tokens.numpy().tobytes()), args.rank]
        resume_or_clear(work, [*made_of, args.recall, args.epochs])
    elif said.is_file() and json.loads(said.read_text())[0] == fingerprint(checkpoint):
        tokens = None
    else:
        raise ValueError("give --calibration_file TEXT, to learn from which neurons are active")
    files = [work / f"layer{n}.pt" for n in range(checkpoint.args.n_layers)]
    if not all(file.is_file() for file in files):
        if tokens is None:
            raise ValueError(f"{work} is not complete: give --calibration_file TEXT again")
        log(f"learning from {len(tokens)} texts of {tokens.shape[1]} tokens")
        learn_layers(checkpoint, tokens, files, args)
    return [Learned(**torch.load(file, weights_only=True)) for file in files]


def learn_layers(
    checkpoint: Checkpoint, tokens: Tensor, files: Sequence[Path], args: argparse.Namespace
) -> None:
    needed = 2 * tokens.numel() * checkpoint.args.dim * 4
    check_memory(needed, "cpu", "what flows between blocks", "lower --calibration_samples")
    rank = args.rank or max(8, checkpoint.args.dim // RANK)
    layers = inputs(checkpoint, tokens, find_device(args.device))
    bar = tqdm(zip(files, layers, strict=True), total=len(files), desc="learn", unit="layer")
    for file, (x, feed_forward) in bar:
        if file.is_file():
            continue
        start = time.perf_counter()
        learned = learn(x, feed_forward, rank, args.recall, args.epochs)
        torch.save(vars(learned), file.with_suffix(".next"))
        os.replace(file.with_suffix(".next"), file)
        found = learned.figures
        log_above_bars(
            f"{file.stem}: {found['active']:.1%} active, {found['predicted']:.1%} predicted, "
            f"{found['recall']:.1%} of the active found; {time.perf_counter() - start:.1f} s"
        )


def pack(
    checkpoint: Checkpoint, format: Format, learned: Sequence[Learned], directory: Path
) -> None:
    """Write the records of all layers, what stays in memory, and last what they are."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    model = meta_model(checkpoint.args, checkpoint.scheme)
    temporary = {name: directory / f"{name}.tmp" for name in FILES}
    resident: dict[str, Tensor] = {}
    try:
        with temporary[FILES[0]].open("wb") as file:
            for n, known in enumerate(tqdm(learned, desc="pack", unit="layer")):
                prefix = f"layers.{n}.feed_forward"
                fill_module(checkpoint, model, prefix, CPU)
                records, kept = layer_records(model.layers[n].feed_forward, format, known)
                model.layers[n].feed_forward.to("meta")
                floating = {k: v.to(checkpoint.dtype) for k, v in kept.items() if "scales" not in k}
                resident |= {f"{prefix}.{k}": v for k, v in (kept | floating).items()}
                file.write(records.numpy())
                file.write(bytes(whole_blocks(records.nbytes) - records.nbytes))
            file.flush()
            os.fsync(file.fileno())
        torch.save(resident, temporary[FILES[1]])
        for name in FILES:
            os.replace(temporary[name], directory / name)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    sync(directory)
    said = asdict(format) | {"dtype": str(format.dtype).removeprefix("torch.")}
    layers = [k.figures | {"rank": len(k.down)} for k in learned]
    manifest = {"version": VERSION, "model": fingerprint(checkpoint), "format": said}
    manifest |= {"hashes": {name: hash_file(directory / name) for name in FILES}}
    write_manifest(directory, manifest | {"windows": WINDOWS, "gaps": GAPS, "layers": layers})


def layer_records(
    feed_forward: nn.Module, format: Format, learned: Learned
) -> tuple[Tensor, dict[str, Tensor]]:
    """(F, stride) bytes in the order learned, and what a SparseFeedForward keeps beside them."""
    order, w2, inner = learned.order, feed_forward.w2, format.matrices[:-1]
    first = feed_forward.w13 if len(inner) == 2 else feed_forward.w1
    weights = dict(zip(inner, dense(first).chunk(len(inner)), strict=True))
    weights = {name: weight[order] for name, weight in weights.items()}
    records, scales = format.pack(weights | {"down": dense(w2)[:, order]})
    biases = torch.zeros(len(inner), len(order)) if first.bias is None else first.bias
    bias = biases.view(len(inner), -1)[:, order].T  # (F, 1 or 2)
    never = torch.zeros(1, len(inner))
    never[0, 0] = -math.inf  # behind a ReLU: no neuron
    kept = {
        "predictor.down.weight": learned.down,
        "predictor.up.weight": learned.up,
        "predictor.up.bias": learned.bias,
        "inner_bias": torch.cat((bias, never)),
        "outer_bias": torch.zeros(format.dim) if w2.bias is None else w2.bias,
    }
    if format.kind == "int8":
        ones = torch.ones(1, len(inner))
        kept |= {"inner_scales": torch.cat((scales["inner_scales"], ones))}
        kept |= {"outer_scales": scales["outer_scales"]}
    return records, {name: tensor.detach() for name, tensor in kept.items()}


def main(args: argparse.Namespace) -> int:
    be_quiet(args.quiet)
    stopped = "stopped; no file was written; the same command goes on from here"
    return exit_code("flash.py", lambda: print(run(args)), stopped)


if __name__ == "__main__":
    sys.exit(main(ARGS))

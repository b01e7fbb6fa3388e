"""Write a ReLU model's feed-forward neurons as records, for generate.py --flash to read.

    python flash.py --checkpoint_path checkpoints/demo-opt --calibration_file stories.txt
    python generate.py --checkpoint_path checkpoints/demo-opt --flash --dram_budget 60%

Start at run. A record holds the weights of one neuron. A predictor names the neurons that may be
active for a token; its figures say how many it names, and how many of them the next token reads if
the neurons of the last tokens stay in memory. learned_layers trains a predictor of active neurons
for each layer (calibration/predictor.py) and saves it next to the checkpoint, in the directory
`work`: an interrupted run continues after the last finished layer, and another record format
(--neurons) needs no training. write_pack then writes the pack: the directory of records, a layer's
most active neurons first, and of predictors; neurons/pack.py describes its files.

Based on "LLM in a flash" (arXiv 2312.11514).

Shapes: B texts, T tokens of a text, F neurons of a layer, D dim.
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
from cli.early import find_inputs
from cli.options import parse_flash_args as parse_args

if __name__ == "__main__":  # before torch is imported, so that a wrong option is reported at once
    ARGS = command.begin(parse_args)
    find_inputs("flash.py", ARGS, ARGS.calibration_file)

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibration.gptq import fill_module
from calibration.predictor import (
    GAPS,
    WINDOWS,
    LearnedLayer,
    dense_weight,
    feed_forward_inputs,
    learn_layer,
)
from calibration.texts import calibration_tokens, log_above_bars, resume_or_clear
from checkpoint import Checkpoint
from cli.command import exit_code
from host.devices import find_device
from host.files import read_text, sync
from host.log import log, set_quiet
from host.memory import check_memory, round_up_to_block, size_text
from host.threads import set_threads
from load import meta_model
from neurons.pack import (
    HASHED_FILES,
    MANIFEST_FILE,
    NEURONS_FILE,
    RESIDENT_FILE,
    VERSION,
    check_relu,
    fingerprint,
    flash_directory,
    hash_file,
    write_manifest,
)
from neurons.records import GATED_MATRICES, PLAIN_MATRICES, RecordFormat
from options.settings import CalibrationOptions, PredictorOptions

DIM_PER_RANK = 32  # the default rank is the model's width divided by this
MIN_RANK = 8
CPU = torch.device("cpu")


def run(args: argparse.Namespace) -> Path:
    """Train missing predictors, write the pack, and return its directory: the whole command. args:
    those of parse_flash_args (cli/options.py). `work`, the directory of trained layers, is next to
    the pack's default directory, also if --flash_dir names another one.

    Raises OSError, ValueError and MemoryError, for one-line messages to the user.
    """
    set_threads(args.threads)
    checkpoint = Checkpoint(args.checkpoint_path)
    check_relu(checkpoint.args)
    checkpoint.check(meta_model(checkpoint.args, checkpoint.scheme))
    default = flash_directory(checkpoint)
    directory, work = args.flash_dir or default, default.with_name(f"{default.name}.learned")
    format = record_format(checkpoint, args.neurons, args.groupsize, args.sector)
    check_disk(checkpoint, format, directory)
    calibration = CalibrationOptions(
        args.calibration_file, (), args.calibration_seq_length, args.calibration_samples
    )
    training = PredictorOptions(args.rank, args.recall, args.epochs)
    layers = learned_layers(checkpoint, work, calibration, training, args.device)
    write_pack(checkpoint, format, layers, directory)
    return directory


def record_format(checkpoint: Checkpoint, kind: str, groupsize: int, sector: int) -> RecordFormat:
    """Return the format of this model's records; kind, groupsize and sector: see RecordFormat.
    Dense weights have the checkpoint's dtype."""
    args = checkpoint.args
    matrices = GATED_MATRICES if args.feed_forward == "gated" else PLAIN_MATRICES
    return RecordFormat(matrices, args.dim, kind, checkpoint.dtype, groupsize, sector)


def check_disk(checkpoint: Checkpoint, format: RecordFormat, directory: Path) -> None:
    """Log the size of the records; raise ValueError if the checkpoint's disk, on which the pack is
    by default, lacks space for them.

    directory: of the pack, for the messages only. Called first, because training takes hours.
    """
    layers, neurons = checkpoint.args.n_layers, checkpoint.args.hidden_dim
    total = layers * round_up_to_block(neurons * format.stride)
    log(
        f"{directory}: {layers * neurons:,} neurons of {size_text(format.used)}, stored in "
        f"{size_text(format.stride)} each, {size_text(total)} in all"
    )
    if total > (free := shutil.disk_usage(checkpoint.directory).free):
        raise ValueError(
            f"{directory} needs {size_text(total)}, and the disk has {size_text(free)} free"
        )


def learned_layers(
    checkpoint: Checkpoint,
    work: Path,
    calibration: CalibrationOptions,
    training: PredictorOptions,
    device: str,
) -> list[LearnedLayer]:
    """Return the predictor and figures of each layer, training those that `work` does not have.

    work: directory of the layers that were trained by earlier runs, with a file layerN.pt for each.
    calibration: calibration.file is the file of texts; it may be None if `work` is complete.
    device: as for --device. Raises ValueError if layers are missing and there is no calibration
    file.
    """
    tokens = training_tokens(checkpoint, work, calibration, training)
    files = [work / f"layer{n}.pt" for n in range(checkpoint.args.n_layers)]
    if not all(file.is_file() for file in files):
        if tokens is None:
            raise ValueError(f"{work} is not complete: give --calibration_file TEXT again")
        log(f"training predictors with {len(tokens)} texts of {tokens.shape[1]} tokens")
        learn_layers(checkpoint, tokens, files, training, device)
    return [LearnedLayer(**torch.load(file, weights_only=True)) for file in files]


def training_tokens(
    checkpoint: Checkpoint,
    work: Path,
    calibration: CalibrationOptions,
    training: PredictorOptions,
) -> Tensor | None:
    """Return the calibration texts' ids, (B, T), or None if there is no file.

    Without a file, the layers in `work` are used as they are; raises ValueError if there are none,
    or if they were not trained from these weights. With a file, `work` is emptied if its layers
    were trained from other weights, texts or options. work: as for learned_layers; identity.json in
    it lists what its layers were trained from, the fingerprint of the weights first.
    """
    identity = work / "identity.json"
    if calibration.file:
        text = read_text(calibration.file)
        lengths = calibration.seq_length, calibration.samples
        tokens = calibration_tokens(checkpoint, text, *lengths)
        made_of = [fingerprint(checkpoint), zlib.crc32(tokens.numpy().tobytes())]
        resume_or_clear(work, [*made_of, training.rank, training.recall, training.epochs])
        return tokens
    if identity.is_file() and json.loads(identity.read_text())[0] == fingerprint(checkpoint):
        return None
    raise ValueError("give --calibration_file TEXT, from which active neurons are learned")


def learn_layers(
    checkpoint: Checkpoint,
    tokens: Tensor,
    files: Sequence[Path],
    training: PredictorOptions,
    device: str,
) -> None:
    """Train the predictor of each layer whose file is missing, and write the file.

    tokens: (B, T) ids of the texts. files: one for each layer. A file appears only when it is
    complete, so that an interrupted run can continue: the texts then run through the finished
    layers again, because the next layers need their outputs. Raises MemoryError if the activations
    of all texts do not fit into memory.
    """
    dim = checkpoint.args.dim
    activations = 2 * tokens.numel() * dim * 4  # bytes of a block's inputs and outputs in float32
    check_memory(activations, "cpu", "what flows between blocks", "lower --calibration_samples")
    rank = training.rank or max(MIN_RANK, dim // DIM_PER_RANK)
    layers = feed_forward_inputs(checkpoint, tokens, find_device(device))
    bar = tqdm(zip(files, layers, strict=True), total=len(files), desc="learn", unit="layer")
    for file, (x, feed_forward) in bar:
        if file.is_file():
            continue
        start = time.perf_counter()
        learned = learn_layer(x, feed_forward, rank, training.recall, training.epochs)
        torch.save(vars(learned), file.with_suffix(".next"))
        os.replace(file.with_suffix(".next"), file)
        report_layer(file.stem, learned, time.perf_counter() - start)


def report_layer(name: str, learned: LearnedLayer, seconds: float) -> None:
    """Log the figures of a layer's predictor and the seconds of its training."""
    figures = learned.figures
    log_above_bars(
        f"{name}: {figures['active']:.1%} of the neurons active, {figures['predicted']:.1%} "
        f"predicted, recall {figures['recall']:.1%}; {seconds:.1f} s"
    )


def write_pack(
    checkpoint: Checkpoint,
    format: RecordFormat,
    learned: Sequence[LearnedLayer],
    directory: Path,
) -> None:
    """Write the records and the tensors that stay in memory, then the manifest.

    The old manifest is removed first and the new one is written last: an interrupted run leaves a
    directory without a manifest, which open_pack refuses. learned: one for each layer, in order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    temporary = {name: directory / f"{name}.tmp" for name in HASHED_FILES}
    try:
        resident = write_records(checkpoint, format, learned, temporary[NEURONS_FILE])
        torch.save(resident, temporary[RESIDENT_FILE])
        for name in HASHED_FILES:
            os.replace(temporary[name], directory / name)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    sync(directory)
    write_manifest(directory, make_manifest(checkpoint, format, learned, directory))


def write_records(
    checkpoint: Checkpoint, format: RecordFormat, learned: Sequence[LearnedLayer], path: Path
) -> dict[str, Tensor]:
    """Write the records of all layers to a file, and return the tensors that stay in memory.

    The tensors are in the checkpoint's dtype, scales in float32, by their names in the model. Each
    layer is padded to whole blocks, because O_DIRECT reads need that. One layer's weights are in
    memory at a time. learned: one for each layer, in order.
    """
    model = meta_model(checkpoint.args, checkpoint.scheme)
    resident: dict[str, Tensor] = {}
    with path.open("wb") as file:
        for n, layer in enumerate(tqdm(learned, desc="pack", unit="layer")):
            prefix = f"layers.{n}.feed_forward"
            fill_module(checkpoint, model, prefix, CPU)
            records, tensors = layer_records(model.layers[n].feed_forward, format, layer)
            model.layers[n].feed_forward.to("meta")
            for name, tensor in tensors.items():
                is_scale = "scales" in name
                resident[f"{prefix}.{name}"] = tensor if is_scale else tensor.to(checkpoint.dtype)
            file.write(records.numpy())
            file.write(bytes(round_up_to_block(records.nbytes) - records.nbytes))
        file.flush()
        os.fsync(file.fileno())
    return resident


def make_manifest(
    checkpoint: Checkpoint,
    format: RecordFormat,
    learned: Sequence[LearnedLayer],
    directory: Path,
) -> dict[str, object]:
    """Return the contents of manifest.json for the pack in a directory, whose files are complete.

    "windows" and "gaps": the numbers of successive tokens, and of unneeded records between two
    needed ones, for which each layer's figures have values, in this order. "rank": of the layer's
    predictor.
    """
    return {
        "version": VERSION,
        "model": fingerprint(checkpoint),
        "format": asdict(format) | {"dtype": str(format.dtype).removeprefix("torch.")},
        "hashes": {name: hash_file(directory / name) for name in HASHED_FILES},
        "windows": WINDOWS,
        "gaps": GAPS,
        "layers": [layer.figures | {"rank": len(layer.down)} for layer in learned],
    }


def layer_records(
    feed_forward: nn.Module, format: RecordFormat, learned: LearnedLayer
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a layer's records, (F, stride) bytes, and its tensors that stay in memory.

    feed_forward: the layer of the model, with loaded weights.
    Neurons are in the order of `learned`. The tensors have the names and shapes of the parameters
    and buffers of SparseFeedForward, with an additional neuron that stands for an empty cache
    entry; its bias of -inf makes it inactive.
    """
    order, w2, inner = learned.order, feed_forward.w2, format.matrices[:-1]
    # The linear of up, or of gate and up, whose rows follow one another in it.
    first = feed_forward.w13 if len(inner) == 2 else feed_forward.w1
    weights = dict(zip(inner, dense_weight(first).chunk(len(inner)), strict=True))
    weights = {name: weight[order] for name, weight in weights.items()}
    records, scales = format.pack(weights | {"down": dense_weight(w2)[:, order]})
    biases = torch.zeros(len(inner), len(order)) if first.bias is None else first.bias
    bias = biases.view(len(inner), -1)[:, order].T  # (F, 1 or 2)
    empty = torch.zeros(1, len(inner))  # biases of the additional neuron
    empty[0, 0] = -math.inf  # of up, or of gate: the ReLU's input
    tensors = {
        "predictor.down.weight": learned.down,
        "predictor.up.weight": learned.up,
        "predictor.up.bias": learned.bias,
        "inner_bias": torch.cat((bias, empty)),
        "outer_bias": torch.zeros(format.dim) if w2.bias is None else w2.bias,
    }
    if format.kind == "int8":
        ones = torch.ones(1, len(inner))
        tensors["inner_scales"] = torch.cat((scales["inner_scales"], ones))
        tensors["outer_scales"] = scales["outer_scales"]
    return records, {name: tensor.detach() for name, tensor in tensors.items()}


def main(args: argparse.Namespace) -> int:
    """Run the command, print the pack's directory, and return the exit code."""
    set_quiet(args.quiet)
    stopped = "stopped; no pack was written; the same command goes on from here"
    return exit_code("flash.py", lambda: print(run(args)), stopped)


if __name__ == "__main__":
    sys.exit(main(ARGS))

"""The way from a calibration text to int4 blocks: GPTQ, then training if the model is small.

Start at calibrated_blocks. The calibration text is cut into pieces of equal length, which become
ids: tokens, (B, T), a piece in each row. These pieces are called texts. GPTQ (gptq.py) quantises
one block (layer of the model) after another, and training (distill.py) then moves the integers of
all blocks together. Finished blocks are in a directory beside the output file, `work`, and the same
command continues from them.

A linear's buffers are the tensors of its Int4Linear (quant/linear.py) by name. The Hessian of a
linear is Y'Y over its inputs Y, which gptq.py inverts.
"""

import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.distill import distill, texts_per_step, training_bytes
from calibration.gptq import Buffers, quantize_blocks
from checkpoint import Checkpoint
from host.devices import find_device
from host.files import read_text
from host.memory import check_memory
from layers.basic import Linear
from load import count_weights, meta_model
from options.settings import CalibrationOptions
from text.tokenizer import load_tokenizer

TRAIN_STEPS = 250  # default for models of at most MAX_TRAINED_WEIGHTS weights
MAX_TRAINED_WEIGHTS = 10_000_000  # up to this size, training gains most and takes minutes
Linears = Iterator[tuple[str, Buffers]]  # a linear's name and its int4 buffers


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ and training choose the integers, and on which device."""

    groupsize: int  # inputs that share a scale
    act_order: bool = True  # quantise columns by descending diagonal of the Hessian
    train_steps: int | None = None  # of training after GPTQ; None: default_train_steps
    device: str = "auto"  # --device; see host.devices.find_device


def calibrated_blocks(
    checkpoint: Checkpoint, work: Path, calibration: CalibrationOptions, options: GptqOptions
) -> Linears:
    """Quantise the linears of all blocks to int4. Yields the name and buffers of each.

    For quantize.py --mode int4-gptq, which writes them to the file. work: a directory for finished
    blocks, created if missing; an interrupted run with the same arguments continues from it, and
    the files of another run are deleted. calibration: which text, and how much of it. Raises
    ValueError for too little text, for another model's tokenizer, or for text that gives a Hessian
    that cannot be inverted; MemoryError if the memory is too small.
    """
    text = calibration_text(calibration)
    tokens = calibration_tokens(checkpoint, text, calibration.seq_length, calibration.samples)
    steps = options.train_steps
    steps = default_train_steps(checkpoint) if steps is None else steps
    device = find_device(options.device)
    check_calibration_memory(checkpoint, tokens, steps, device)
    resume_or_clear(work, run_identity(checkpoint, text, tokens, options))
    log_above_bars(f"calibrating with {len(tokens)} texts of {tokens.shape[1]} tokens")
    linears = gptq_blocks(checkpoint, tokens, work, options)
    if steps == 0:
        yield from linears  # only one block at a time is in memory
        return
    # As many texts as the steps draw: if the calibration text is that long, each is drawn about
    # once.
    samples = steps * texts_per_step(tokens)
    tokens = calibration_tokens(checkpoint, text, calibration.seq_length, samples)
    yield from trained_blocks(checkpoint, tokens, dict(linears), steps, work, device).items()


def check_calibration_memory(
    checkpoint: Checkpoint, tokens: Tensor, steps: int, device: torch.device
) -> None:
    """Raise MemoryError if the memory is too small for GPTQ or training.

    Called before GPTQ, which may take hours. GPTQ keeps the inputs of a dense and of a quantised
    block for all texts in CPU memory, float32. tokens: (B, T) ids that GPTQ will use. steps: of
    training; 0 for none. device: where training will run.
    """
    activations = 2 * tokens.numel() * checkpoint.args.dim * 4
    check_memory(activations, "cpu", "activations between blocks", "lower --calibration_samples")
    if steps:
        needed = training_bytes(checkpoint.args)
        check_memory(needed, device, "training", "--train_steps 0 leaves it out")


def run_identity(
    checkpoint: Checkpoint, text: str, tokens: Tensor, options: GptqOptions
) -> list[Any]:
    """Return values that identify GPTQ's result: the checkpoint, the texts, the options.

    resume_or_clear compares them: a run continues only from an interrupted run with equal values.
    The number of training steps and the device are not among them: they do not change GPTQ's
    result. text: the whole calibration text, from which the texts of training are cut. tokens: the
    texts of GPTQ.
    """
    return [
        str(checkpoint.path.resolve()),
        checkpoint.path.stat().st_mtime_ns,
        options.groupsize,
        not options.act_order,  # the option is --no_act_order
        zlib.crc32(tokens.numpy().tobytes()),
        zlib.crc32(text.encode()),
    ]


def trained_blocks(
    checkpoint: Checkpoint,
    tokens: Tensor,
    linears: dict[str, Buffers],
    steps: int,
    work: Path,
    device: torch.device,
) -> dict[str, Buffers]:
    """Train the integers from GPTQ by distillation, and log the divergence from the dense model
    before and after.

    Returns the buffers with trained integers, or `linears` unchanged if the divergence has not
    fallen (`distill` decides). tokens: (B, T) ids to train on. linears: GPTQ's int4 buffers of each
    linear, by its name. work: an existing directory, from which interrupted training continues.
    """
    log_above_bars(f"training for {steps} steps on {len(tokens)} texts")
    trained, before, after = distill(checkpoint, tokens, linears, steps, work, device)
    now = "now" if after < before else "so GPTQ's integers are kept: trained ones would have"
    log_above_bars(f"trained: {before:.4f} nats per token from the dense model, {now} {after:.4f}")
    return trained


def default_train_steps(checkpoint: Checkpoint) -> int:
    """Return the number of training steps if the user gives none: TRAIN_STEPS for a model of at
    most MAX_TRAINED_WEIGHTS weights, else 0, no training."""
    return TRAIN_STEPS if count_weights(checkpoint.args) <= MAX_TRAINED_WEIGHTS else 0


def gptq_blocks(
    checkpoint: Checkpoint, tokens: Tensor, work: Path, options: GptqOptions
) -> Linears:
    """Quantise all blocks by GPTQ, with a progress bar. Yields the name and buffers of each linear.

    Logs a line for each linear and, at the end, the total time. Blocks that an earlier run has
    finished are read from `work`, an existing directory, and not logged. tokens: (B, T) ids.
    """
    weights, seconds = 0, 0.0

    def report(name: str, error: float, rounding: float, linear_seconds: float) -> None:
        """Log a linear, and add its weights and its time to the totals of this run. gptq.py calls
        it after each linear; the arguments are those of gptq.Report."""
        nonlocal weights, seconds
        weights += math.prod(checkpoint.tensors[f"{name}.weight"].shape)
        seconds += linear_seconds
        errors = f"error {error:.2e}, of rounding {rounding:.2e}"
        log_above_bars(f"{name}: {errors}, {linear_seconds:.1f} s")

    layers = meta_model(checkpoint.args, None).layers
    linears = sum(isinstance(module, Linear) for module in layers.modules())
    how = options.groupsize, work, report, options.act_order, find_device(options.device)
    quantized = quantize_blocks(checkpoint, tokens, *how)
    yield from tqdm(quantized, total=linears, desc="GPTQ", unit="linear")
    if weights:
        rate = seconds / weights * 1e9
        log_above_bars(f"GPTQ: {seconds:.1f} s for {weights:,} weights, {rate:.0f} s per billion")


def resume_or_clear(work: Path, identity: list[Any]) -> None:
    """Prepare the directory `work` of a run.

    If an interrupted run with the same identity has left it, its files stay, and the new run
    continues from them. Otherwise the directory is emptied or created (its parent must exist), and
    the identity is written to it. identity: values for JSON that identify the results in `work`
    (run_identity, and flash.training_tokens).
    """
    file = work / "identity.json"
    if file.exists() and file.read_bytes() == json.dumps(identity).encode():
        log_above_bars(f"continuing the interrupted run in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        file.write_text(json.dumps(identity))


def calibration_tokens(checkpoint: Checkpoint, text: str, seq_length: int, samples: int) -> Tensor:
    """Cut evenly spaced pieces out of the text. Returns their ids, (pieces, T).

    T is seq_length, or the model's context if that is shorter. Each piece begins with BOS (the
    token that begins a text), if the tokenizer adds it. There are at most `samples` pieces, and no
    more than fit into the text without overlap; the first is at its start, the last at its end.
    Raises ValueError if the text is shorter than one piece, and if it has ids that the model lacks.
    """
    tokenizer = load_tokenizer(checkpoint.directory)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    length = min(seq_length, checkpoint.args.context)
    ids, piece = tokenizer.encode(text, bos=False), length - len(bos)
    count = min(samples, len(ids) // piece)
    if (largest := max(ids, default=0)) >= checkpoint.args.vocab_size:
        raise ValueError(
            f"the tokenizer in {checkpoint.directory} gives the calibration text the id {largest}, "
            f"and the model has {checkpoint.args.vocab_size} ids: it is another model's tokenizer"
        )
    if count == 0:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens and one of {length} is needed: give more "
            "text, or lower --calibration_seq_length"
        )
    starts = [n * (len(ids) - piece) // max(1, count - 1) for n in range(count)]  # one piece: 0
    return torch.tensor([bos + ids[start : start + piece] for start in starts])


def calibration_text(calibration: CalibrationOptions) -> str:
    """Return the calibration text: that of the file, or of the lm_eval tasks if no file is given.

    A task gives the prompt and the answer of each of its training documents, or, if it has none, of
    each of its evaluation documents. An empty line separates documents.
    """
    if calibration.file:
        return read_text(calibration.file)
    from lm_eval.tasks import TaskManager  # slow to import

    texts = []
    for task in TaskManager().load(list(calibration.tasks))["tasks"].values():
        for doc in task.training_docs() if task.has_training_docs() else task.eval_docs:
            texts.append(f"{task.doc_to_text(doc)}{task.doc_to_target(doc)}")
    return "\n\n".join(texts)


def log_above_bars(line: str) -> None:
    """Print a line on stderr above the progress bars."""
    tqdm.write(line, file=sys.stderr)

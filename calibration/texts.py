"""The way from a calibration text to int4 blocks: GPTQ, then training if the model is small.

Start at calibrated_blocks. Pieces of the text become ids, GPTQ (gptq.py) quantises one block after
another, and training (distill.py) then moves the integers of all blocks together. Finished blocks
are in a directory beside the output file, and the same command continues from them.
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
from load import count_weights, meta_model
from model import Linear
from options.settings import CalibrationOptions
from text.tokenizer import load_tokenizer

TRAIN_STEPS = 250  # default of small models
MAX_TRAINED_WEIGHTS = 10_000_000  # training takes minutes on two cores, and gains most, up to here
Blocks = Iterator[tuple[str, Buffers]]  # a linear's name and its int4 buffers


@dataclass(frozen=True)
class GptqOptions:
    """How the integers are chosen."""

    groupsize: int  # inputs that share a scale
    act_order: bool = True  # quantise columns by descending diagonal of the Hessian
    train_steps: int | None = None  # of distillation after GPTQ; None: default_train_steps
    device: str = "auto"


def calibrated_blocks(
    checkpoint: Checkpoint, work: Path, calibration: CalibrationOptions, options: GptqOptions
) -> Blocks:
    """Yield the linears of all blocks as int4.

    work: a directory for finished blocks; an interrupted run with the same arguments continues from
    it. Raises ValueError for too little text, or text with which a layer cannot be calibrated, and
    MemoryError.
    """
    text = calibration_text(calibration)
    tokens = calibration_tokens(checkpoint, text, calibration.seq_length, calibration.samples)
    steps = options.train_steps
    steps = default_train_steps(checkpoint) if steps is None else steps
    device = find_device(options.device)
    check_calibration_memory(checkpoint, tokens, steps, device)
    resume_or_clear(work, run_identity(checkpoint, text, tokens, options))
    log_above_bars(f"calibrating with {len(tokens)} texts of {tokens.shape[1]} tokens")
    blocks = gptq_blocks(checkpoint, tokens, work, options)
    if steps == 0:
        yield from blocks  # one at a time is in memory
        return
    samples = steps * texts_per_step(tokens)  # no text is seen twice if there are so many
    tokens = calibration_tokens(checkpoint, text, calibration.seq_length, samples)
    yield from trained_blocks(checkpoint, tokens, dict(blocks), steps, work, device).items()


def check_calibration_memory(
    checkpoint: Checkpoint, tokens: Tensor, steps: int, device: torch.device
) -> None:
    """Raise MemoryError if GPTQ or training does not fit: before GPTQ, which may take hours."""
    activations = 2 * tokens.numel() * checkpoint.args.dim * 4
    check_memory(activations, "cpu", "what flows between blocks", "lower --calibration_samples")
    if steps:
        needed = training_bytes(checkpoint.args)
        check_memory(needed, device, "training", "--train_steps 0 leaves it out")


def run_identity(
    checkpoint: Checkpoint, text: str, tokens: Tensor, options: GptqOptions
) -> list[Any]:
    """Return what a run's result depends on; a run continues only from one with the same."""
    return [
        str(checkpoint.path.resolve()),
        checkpoint.path.stat().st_mtime_ns,
        options.groupsize,
        not options.act_order,
        zlib.crc32(tokens.numpy().tobytes()),
        zlib.crc32(text.encode()),
    ]


def trained_blocks(
    checkpoint: Checkpoint,
    tokens: Tensor,
    blocks: dict[str, Buffers],
    steps: int,
    work: Path,
    device: torch.device,
) -> dict[str, Buffers]:
    """Return the blocks after training, with a log line of what it gained; see distill."""
    log_above_bars(f"training for {steps} steps on {len(tokens)} texts")
    trained, before, after = distill(checkpoint, tokens, blocks, steps, work, device)
    kept = "" if after < before else "; GPTQ's integers are kept"
    log_above_bars(
        f"trained: {before:.4f} nats per token from the dense model, now {after:.4f}{kept}"
    )
    return trained


def default_train_steps(checkpoint: Checkpoint) -> int:
    """Return TRAIN_STEPS for a small model, else 0."""
    return TRAIN_STEPS if count_weights(checkpoint.args) <= MAX_TRAINED_WEIGHTS else 0


def gptq_blocks(checkpoint: Checkpoint, tokens: Tensor, work: Path, options: GptqOptions) -> Blocks:
    """Yield from quantize_blocks, with a bar, a log line for each linear and the total time."""
    weights, seconds = 0, 0.0

    def report(name: str, error: float, rounding: float, took: float) -> None:
        nonlocal weights, seconds
        weights += math.prod(checkpoint.tensors[f"{name}.weight"].shape)
        seconds += took
        log_above_bars(f"{name}: error {error:.2e}, of rounding {rounding:.2e}, {took:.1f} s")

    layers = meta_model(checkpoint.args, None).layers
    linears = sum(isinstance(module, Linear) for module in layers.modules())
    how = options.groupsize, work, report, options.act_order, find_device(options.device)
    blocks = quantize_blocks(checkpoint, tokens, *how)
    yield from tqdm(blocks, total=linears, desc="GPTQ", unit="linear")
    if weights:
        rate = seconds / weights * 1e9
        log_above_bars(f"GPTQ: {seconds:.1f} s for {weights:,} weights, {rate:.0f} s per billion")


def resume_or_clear(work: Path, identity: list[Any]) -> None:
    """Keep the directory of an interrupted run with the same identity; empty any other."""
    file = work / "identity.json"
    if file.exists() and file.read_bytes() == json.dumps(identity).encode():
        log_above_bars(f"going on with what an interrupted run left in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        file.write_text(json.dumps(identity))


def calibration_tokens(checkpoint: Checkpoint, text: str, seq_length: int, samples: int) -> Tensor:
    """Return ids, (at most `samples`, seq_length): evenly spaced pieces of the text.

    Each piece begins with BOS and is no longer than the model's context. Raises ValueError if the
    text is too short for one.
    """
    tokenizer = load_tokenizer(checkpoint.directory)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = min(seq_length, checkpoint.args.context)
    ids, piece = tokenizer.encode(text, bos=False), length - len(bos)
    count = min(samples, len(ids) // piece)
    if count == 0:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens and one of {length} is needed: give more "
            "text, or lower --calibration_seq_length"
        )
    starts = [n * (len(ids) - piece) // max(1, count - 1) for n in range(count)]
    return torch.tensor([bos + ids[start : start + piece] for start in starts])


def calibration_text(calibration: CalibrationOptions) -> str:
    """Return the text of the file, or the training documents of the lm_eval tasks."""
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

"""What a calibration text does for int4 blocks: GPTQ, then training where the model is small.

Start at calibrated_blocks. Stretches of the text become ids, GPTQ (gptq.py) takes one block after
the other, and training (distill.py) goes over all of them at once. What is finished lies in a
directory beside the file to be, and the same command goes on from it.
"""

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.distill import distill, texts_of_a_step, training_bytes
from calibration.gptq import Buffers, quantize_blocks
from checkpoint import Checkpoint
from host.devices import find_device
from host.files import read_text
from host.memory import check_memory
from load import count_weights, meta_model
from model import Linear
from text.tokenizer import load_tokenizer

TRAIN_STEPS = 250
SMALL = 10_000_000  # weights: up to here training takes minutes on two cores, and gains most
Blocks = Iterator[tuple[str, Buffers]]  # a linear's name, and what it becomes


def calibrated_blocks(checkpoint: Checkpoint, work: Path, args: argparse.Namespace) -> Blocks:
    """The linears of all blocks as int4, going on with what an earlier run left in `work`.

    args: the options of quantize.py. Raises ValueError for too little text, or text that a layer
    cannot be calibrated with, and MemoryError.
    """
    text, asked = calibration_text(args), (args.calibration_seq_length, args.calibration_samples)
    tokens = calibration_tokens(checkpoint, text, *asked)
    needed = 2 * tokens.numel() * checkpoint.args.dim * 4
    check_memory(needed, "cpu", "what flows between blocks", "lower --calibration_samples")
    device = find_device(args.device)
    steps = train_steps(checkpoint) if args.train_steps is None else args.train_steps
    if steps:  # said now, and not after GPTQ's hours
        needed = training_bytes(checkpoint.args)
        check_memory(needed, device, "training", "--train_steps 0 leaves it out")
    made_of = [str(checkpoint.path.resolve()), checkpoint.path.stat().st_mtime_ns]
    made_of += [args.groupsize, args.no_act_order, zlib.crc32(tokens.numpy().tobytes())]
    made_of += [zlib.crc32(text.encode())]
    resume_or_clear(work, made_of)
    log_above_bars(f"calibrating with {len(tokens)} texts of {tokens.shape[1]} tokens")
    blocks = gptq_blocks(checkpoint, tokens, work, args)
    if steps == 0:
        yield from blocks  # as they are finished: only one is in memory
        return
    once = steps * texts_of_a_step(tokens)  # so many that none need be seen again
    tokens = calibration_tokens(checkpoint, text, args.calibration_seq_length, once)
    blocks = dict(blocks)
    log_above_bars(f"training for {steps} steps on {len(tokens)} texts")
    found, before, after = distill(checkpoint, tokens, blocks, steps, work, device)
    better = "" if after < before else "; GPTQ's integers are kept"
    log_above_bars(
        f"trained: {before:.4f} nats per token from the dense model, now {after:.4f}{better}"
    )
    yield from found.items()


def train_steps(checkpoint: Checkpoint) -> int:
    """How many where none are asked for."""
    return TRAIN_STEPS if count_weights(checkpoint.args) <= SMALL else 0


def gptq_blocks(
    checkpoint: Checkpoint, tokens: Tensor, work: Path, args: argparse.Namespace
) -> Blocks:
    """quantize_blocks, with a bar, a line for each linear and the time in all."""
    weights, seconds = 0, 0.0

    def report(name: str, error: float, rounding: float, took: float) -> None:
        nonlocal weights, seconds
        weights += math.prod(checkpoint.tensors[f"{name}.weight"].shape)
        seconds += took
        log_above_bars(f"{name}: error {error:.2e}, of rounding {rounding:.2e}, {took:.1f} s")

    act_order, device = not args.no_act_order, find_device(args.device)
    linears = sum(isinstance(m, Linear) for m in meta_model(checkpoint.args, None).layers.modules())
    blocks = quantize_blocks(checkpoint, tokens, args.groupsize, work, report, act_order, device)
    yield from tqdm(blocks, total=linears, desc="GPTQ", unit="linear")
    if weights:
        rate = seconds / weights * 1e9
        log_above_bars(f"GPTQ: {seconds:.1f} s for {weights:,} weights, {rate:.0f} s per billion")


def resume_or_clear(work: Path, made_of: list[Any]) -> None:
    """Leave `work` as it is where it is a run's that was asked for the same, else empty."""
    identity = work / "identity.json"
    if identity.exists() and identity.read_bytes() == json.dumps(made_of).encode():
        log_above_bars(f"going on with what an interrupted run left in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        identity.write_text(json.dumps(made_of))


def calibration_tokens(checkpoint: Checkpoint, text: str, length: int, texts: int) -> Tensor:
    """(at most `texts`, length) ids: stretches of the text, evenly spaced, each begun with BOS.

    Raises ValueError where the text does not fill one.
    """
    tokenizer = load_tokenizer(checkpoint.directory)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = min(length, checkpoint.args.context)
    ids, stretch = tokenizer.encode(text, bos=False), length - len(bos)
    count = min(texts, len(ids) // stretch)
    if count == 0:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens and one of {length} is needed: give more "
            "text, or lower --calibration_seq_length"
        )
    starts = [n * (len(ids) - stretch) // max(1, count - 1) for n in range(count)]
    return torch.tensor([bos + ids[start : start + stretch] for start in starts])


def calibration_text(args: argparse.Namespace) -> str:
    if args.calibration_file:
        return read_text(args.calibration_file)
    from lm_eval.tasks import TaskManager  # no other part of this file needs it

    texts = []
    for task in TaskManager().load(args.calibration_tasks)["tasks"].values():
        for doc in task.training_docs() if task.has_training_docs() else task.eval_docs:
            texts.append(f"{task.doc_to_text(doc)}{task.doc_to_target(doc)}")
    return "\n\n".join(texts)


def log_above_bars(line: str) -> None:
    """Above the bars, where there are any."""
    tqdm.write(line, file=sys.stderr)

"""Write a checkpoint with int8 or int4 weights beside the one that it is made from.

    python quantize.py --checkpoint_path checkpoints/demo --mode int4 --groupsize 32

Start at run, then quantize. Sizes come first, then one tensor after the other is read, quantised
and written, so that a model larger than memory can be quantised; the file appears only when it is
complete. What a layer becomes is in quantized.py, GPTQ in gptq.py. How a file is quantised is
recorded inside it (its scheme), and generate.py needs nothing but its path.

Embeddings, norms and biases keep their dtype: a step looks up one row of the embedding. The output
head is read whole for every token, and the likeliest token hangs on it, so it is int8 unless
--head says otherwise; a head that shares the embedding's table is stored on its own.
"""

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    Checkpoint,
    check_memory,
    save_checkpoint,
    size_text,
    stored_tensors,
)
from gptq import quantize_blocks
from load import find_device, skeleton
from model import Transformer
from quantized import (
    GROUP_SIZES,
    HEADS,
    MODES,
    QuantizedLinear,
    layer_scheme,
    make_scheme,
    round_int4,
    round_int8,
)
from tokenizer import load_tokenizer

Values = Iterator[tuple[str, Tensor]]  # a stored tensor's name, and the tensor


def file_name(mode: str, groupsize: int) -> str:
    return f"model_{mode}.pth" if mode == "int8" else f"model_{mode}.g{groupsize}.pth"


def quantize(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, blocks: Iterable[Any] = ()
) -> None:
    """Write the quantised file: all of it, or nothing.

    blocks: names of linears with the buffers that are to be taken instead of the nearest ones.
    Raises ValueError for weights that are not finite, naming the tensor, or too small a disk.
    """
    model = planned(checkpoint, scheme)
    tensors = planned_tensors(model)
    total = sum(t.nbytes for t in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="write") as bar:
        values = counted(quantized_values(checkpoint, model, scheme, blocks), bar)
        save_checkpoint(target, checkpoint.config, scheme, tensors, values)


def planned(checkpoint: Checkpoint, scheme: dict[str, Any] | None) -> Transformer:
    """The model that a file holds, on the meta device, in the dtypes that it is stored in."""
    model = skeleton(checkpoint.args, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(checkpoint.dtype)
    return model


def planned_tensors(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, (tensor, _) in stored_tensors(model).items()}


def quantized_values(
    checkpoint: Checkpoint, model: Transformer, scheme: dict[str, Any], blocks: Iterable[Any]
) -> Values:
    done = set()
    for name, buffers in blocks:
        done.add(name)
        yield from named(name, buffers)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name in linears:
        if name not in done:
            weight = finite(checkpoint, source_name(checkpoint, f"{name}.weight"))
            yield from named(name, nearest(weight, layer_scheme(name, scheme)))
    for name in stored_tensors(model):
        module = name.rpartition(".")[0]
        if module not in linears or name == f"{module}.bias":
            yield name, checkpoint.read(name)


def nearest(weight: Tensor, said: dict[str, Any]) -> dict[str, Tensor]:
    return round_int8(weight) if said["bits"] == 8 else round_int4(weight, said["groupsize"])


def named(module: str, buffers: dict[str, Tensor]) -> Values:
    return ((f"{module}.{leaf}", tensor) for leaf, tensor in buffers.items())


def counted(values: Values, bar: tqdm) -> Values:
    for name, tensor in values:
        yield name, tensor
        bar.update(tensor.nbytes)


def source_name(checkpoint: Checkpoint, name: str) -> str:
    """A head that shares the embedding's table has no tensor of its own to be read."""
    return name if name in checkpoint.records else "tok_embeddings.weight"


def finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight in float32; ValueError where it is not finite."""
    weight = checkpoint.read(name, torch.float32)
    if not weight.isfinite().all():
        raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinity: download it again")
    return weight


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
        return args.calibration_file.read_text(encoding="utf-8")
    from lm_eval.tasks import TaskManager  # no other part of this file needs it

    texts = []
    for task in TaskManager().load(args.calibration_tasks)["tasks"].values():
        for doc in task.training_docs() if task.has_training_docs() else task.eval_docs:
            texts.append(f"{task.doc_to_text(doc)}{task.doc_to_target(doc)}")
    return "\n\n".join(texts)


def gptq_blocks(checkpoint: Checkpoint, work: Path, args: argparse.Namespace) -> Iterator[Any]:
    """quantize_blocks, going on with what an earlier run with the same arguments left in `work`."""
    text, asked = calibration_text(args), (args.calibration_seq_length, args.calibration_samples)
    tokens = calibration_tokens(checkpoint, text, *asked)
    needed = 2 * tokens.numel() * checkpoint.args.dim * 4
    check_memory(needed, "cpu", "what flows between blocks", "lower --calibration_samples")
    act_order = not args.no_act_order
    made_of = [str(checkpoint.path.resolve()), checkpoint.path.stat().st_mtime_ns]
    made_of += [args.groupsize, act_order, zlib.crc32(tokens.numpy().tobytes())]
    identity = work / "identity.json"
    if identity.exists() and json.loads(identity.read_text()) == made_of:
        log(f"going on with what an interrupted run left in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        identity.write_text(json.dumps(made_of))
    log(f"calibrating with {len(tokens)} texts of {tokens.shape[1]} tokens")
    weights, seconds = 0, 0.0

    def report(name: str, error: float, rounding: float, took: float) -> None:
        nonlocal weights, seconds
        weights += math.prod(checkpoint.records[f"{name}.weight"].shape)
        seconds += took
        compared = f"error {error:.2e}, of rounding {rounding:.2e}"
        tqdm.write(f"{name}: {compared}, {took:.1f} s", file=sys.stderr)

    device = find_device(args.device)
    yield from quantize_blocks(checkpoint, tokens, args.groupsize, work, report, act_order, device)
    if weights:
        rate = seconds / weights * 1e9
        log(f"GPTQ: {seconds:.1f} s for {weights:,} weights, {rate:.0f} s per billion")


def announce(checkpoint: Checkpoint, scheme: dict[str, Any], target: Path) -> None:
    """What will be written, and what it is good for."""
    dense, model = (planned(checkpoint, said) for said in (None, scheme))
    total = sum(t.nbytes for t in planned_tensors(model).values())
    weights = sum(p.numel() for p in dense.parameters())
    speed_up = dense.bytes_per_step() / model.bytes_per_step()
    log(f"{checkpoint.path}: {weights:,} weights, {size_text(checkpoint.nbytes)}")
    log(
        f"{target}: {size_text(total)}, {8 * total / weights:.2f} bits per weight; decoding, where "
        f"reading weights bounds it, up to {speed_up:.1f} times as fast"
    )


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> Path:
    """The path of the file written. Raises what quantize and gptq_blocks raise."""
    scheme = make_scheme(args.mode, args.groupsize, args.head)
    checkpoint = Checkpoint(args.checkpoint_path)
    if checkpoint.scheme:
        raise ValueError(
            f"{checkpoint.path} is quantised already, as {checkpoint.scheme['mode']}: give the "
            "checkpoint that it was made from"
        )
    target = checkpoint.directory / file_name(args.mode, args.groupsize)
    announce(checkpoint, scheme, target)
    checkpoint.check(skeleton(checkpoint.args, None))
    if args.mode != "int4-gptq":
        quantize(checkpoint, scheme, target)
    else:
        for name in tqdm(checkpoint.records, desc="check", leave=False, disable=None):
            finite(checkpoint, name)  # not after an hour
        work = target.with_name(f"{target.name}.partial")
        quantize(checkpoint, scheme, target, gptq_blocks(checkpoint, work, args))
        shutil.rmtree(work)
    return target


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, or a directory")
    add("--mode", choices=MODES, default="int8", help="(default: int8)")
    sizes = ", ".join(map(str, GROUP_SIZES))
    add("--groupsize", type=int, default=32, help=f"inputs to a scale, of int4: {sizes} (32)")
    add("--head", choices=HEADS, default="int8", help="the output head (default: int8)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--calibration_file", type=Path, metavar="TEXT", help="text for GPTQ")
    text.add_argument("--calibration_tasks", nargs="+", help="lm_eval tasks whose text GPTQ takes")
    add("--calibration_seq_length", type=int, default=2048, help="tokens of a text (2048)")
    add("--calibration_samples", type=int, default=128, help="how many texts at most (128)")
    add("--no_act_order", action="store_true", help="GPTQ: take columns as they come")
    add("--device", default="auto", help="for GPTQ: auto, cuda, cuda:N or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.mode == "int4-gptq" and not (args.calibration_file or args.calibration_tasks):
        parser.error("--mode int4-gptq needs --calibration_file TEXT or --calibration_tasks")
    return args


def main(args: argparse.Namespace) -> int:
    try:
        print(run(args))
    except KeyboardInterrupt:
        more = "; the same command goes on from the last block" if "gptq" in args.mode else ""
        log(f"\nstopped; no file was written{more}")
        return 130
    except (OSError, ValueError, MemoryError, ImportError, torch.OutOfMemoryError) as error:
        log(f"quantize.py: {' '.join(str(error).split())}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))

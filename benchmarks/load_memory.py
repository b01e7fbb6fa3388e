"""Measures peak memory while a checkpoint loads, over its weights' bytes, for each file format.

    python benchmarks/load_memory.py

Start at main. It writes a checkpoint with random weights in every format, one after the other,
and loads each in fresh processes (see peak_memory), as stored and from bfloat16 to float32. The
minimum is 1: the weights themselves.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from bench import provenance
from benchmarks.common import CONFIG, exit_code, fresh_process, log, show, spread
from host.memory import size_text
from load import DEMO, load_model, random_model
from weights.allocation import stored_tensors
from weights.hf import export_tensors
from weights.saving import save_checkpoint
from weights.weight_files import PREPARED, read_json

SHARDS = 4
DTYPES = {"as stored": None, "float32": torch.float32}
Tensors = dict[str, Tensor]


def main(args: argparse.Namespace) -> dict[str, Any]:
    config = read_json(args.config)
    model = random_model(args.config, device="cpu").model
    ours = {name: tensor.detach() for name, (tensor, _) in stored_tensors(model).items()}
    nbytes = sum(tensor.nbytes for tensor in ours.values())
    log(f"{args.config.stem}: {size_text(nbytes)} of weights; the floor is 1.00 of them")
    log(f"{'file':24} {'to':10} {'peak over weights':>22} {'least s':>8} {'from cache':>12}")
    figures: dict[str, Any] = {}
    for file, write in WRITERS.items():
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            write(Path(folder), config, ours)
            for dtype in DTYPES:
                figures[f"{file}, {dtype}"] = measure(file, folder, dtype, args.repeats)
    return {
        "benchmark": "load",
        "config": args.config.stem,
        "weight_bytes": nbytes,
        "worst": max(of["ratio"]["max"] for of in figures.values()),
        "loads": figures,
    } | provenance(torch.device("cpu"))


def measure(file: str, folder: str, dtype: str, repeats: int) -> dict[str, Any]:
    bar = tqdm(range(repeats), desc=f"{file}, {dtype}", leave=False, disable=None)
    runs = [fresh_process(__file__, "--child", folder, dtype) for _ in bar]
    figures = {key: spread([run[key] for run in runs]) for key in runs[0]}
    least = figures["seconds"]["min"]
    rate = size_text(figures["file_bytes"]["max"] / least) + "/s"
    log(f"{file:24} {dtype:10} {show(figures['ratio'], 3):>22} {least:8.2f} {rate:>12}")
    return figures


def peak_memory(folder: str, dtype: str) -> dict[str, float]:
    """Run in a child process: return the peak memory that loading added, over the weights' bytes.

    It is resident memory, which includes touched pages of mapped files.
    """
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    model = load_model(folder, device="cpu", dtype=DTYPES[dtype]).model
    seconds = time.perf_counter() - start
    weights = [tensor for tensor, _ in stored_tensors(model).values()]
    for weight in weights:  # touch each page, so that mapped weights become resident
        weight.detach().view(-1).view(torch.uint8)[::4096].sum()
    added = resident("VmHWM") - before
    weight_bytes = sum(weight.nbytes for weight in weights)
    files = sum(f.stat().st_size for f in Path(folder).iterdir())
    return {"ratio": added / weight_bytes, "seconds": seconds, "file_bytes": files}


def resident(key: str) -> int:
    """Return this process's resident bytes, now (VmRSS) or at the peak (VmHWM). Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def write_prepared(folder: Path, config: dict[str, Any], ours: Tensors) -> None:
    add_small_files(folder, config)
    save_checkpoint(folder / PREPARED, config, None, ours)


def write_safetensors(folder: Path, config: dict[str, Any], ours: Tensors) -> None:
    add_small_files(folder, config)
    save_file(theirs(ours, config), folder / "model.safetensors")


def write_shards(folder: Path, config: dict[str, Any], ours: Tensors) -> None:
    add_small_files(folder, config)
    tensors = theirs(ours, config)
    names = {
        n: f"model-{i * SHARDS // len(tensors) + 1}.safetensors" for i, n in enumerate(tensors)
    }
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)


def write_bin(folder: Path, config: dict[str, Any], ours: Tensors) -> None:
    add_small_files(folder, config)
    torch.save(theirs(ours, config), folder / "pytorch_model.bin")


WRITERS: dict[str, Callable[[Path, dict[str, Any], Tensors], None]] = {
    PREPARED: write_prepared,
    "model.safetensors": write_safetensors,
    f"{SHARDS} safetensors shards": write_shards,
    "pytorch_model.bin": write_bin,
}


def theirs(ours: Tensors, config: dict[str, Any]) -> Tensors:
    """Copy tensors under Hugging Face's names."""
    return {name: tensor.clone() for name, tensor in export_tensors(ours, config).items()}


def add_small_files(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and, because loading needs one, the demo model's tokenizer."""
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="a shape (default: TinyLlama-1.1B's)")
    add("--repeats", type=int, default=3, help="loads of each (default: 3)")
    add("--directory", type=Path, help="for temporary files (default: $TMPDIR)")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    if args.child:
        print(json.dumps(peak_memory(*args.child)))
    else:
        sys.exit(exit_code(main, args))

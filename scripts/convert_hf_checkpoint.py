"""Convert downloaded Hugging Face weights to one `model.pth` beside them.

Start at convert. Tensors are renamed, stacked (queries, keys and values become one tensor, gate and
up another), and written one at a time, so that the memory needed is that of the largest tensor. An
earlier model.pth is replaced when the new one is complete. The path is printed on stdout, all else
on stderr.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import Checkpoint
from cli.command import exit_code
from host.memory import size_text
from layers.args import DTYPES
from load import meta_model
from weights.allocation import final_dtype, stored_tensors
from weights.saving import check_checkpoint_writable, log_replaced, save_checkpoint
from weights.weight_files import HUGGING_FACE, PREPARED, find_weights


def convert(folder: Path, dtype: torch.dtype | None) -> Path:
    """Write folder/model.pth; returns its path.

    folder: of Hugging Face's weights. dtype: of floating-point parameters; None: as stored. Raises
    FileNotFoundError, and ValueError for weights that cannot be read or do not fit their config,
    and for a full disk; OSError if the file cannot be written.
    """
    source, target = Checkpoint(find_weights(folder, HUGGING_FACE)), folder / PREPARED
    model = meta_model(source.args, source.scheme)
    source.check(model)
    check_checkpoint_writable(target)
    log_replaced(target)
    tensors = {
        name: torch.empty(
            tensor.shape,
            dtype=final_dtype(tensor, dtype or source.tensors[name].dtype),
            device="meta",
        )
        for name, (tensor, _) in stored_tensors(model).items()
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{source.path}: {len(tensors)} tensors, {size_text(source.nbytes)}", file=sys.stderr)
    print(f"{target}: {size_text(nbytes)} to write", file=sys.stderr)
    with tqdm(total=nbytes, unit="B", unit_scale=True) as bar:
        save_checkpoint(target, source.config, source.scheme, tensors, values(source, tensors, bar))
    return target


def values(
    source: Checkpoint, tensors: dict[str, torch.Tensor], bar: tqdm
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the value of each tensor, for save_checkpoint. tensors: on the meta
    device, in the dtype that is written; the bar advances by their bytes."""
    for name, tensor in tensors.items():
        yield name, source.read(name, tensor.dtype)
        bar.update(tensor.nbytes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="checkpoints/REPO")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    work = partial(convert, args.checkpoint_dir, DTYPES.get(args.dtype))  # None without --dtype
    return exit_code(
        "convert_hf_checkpoint.py", lambda: print(work()), "stopped; nothing was written"
    )


if __name__ == "__main__":
    sys.exit(main(parse_args()))

"""Convert downloaded Hugging Face weights to one `model.pth` beside them.

Start at main. Tensors are renamed, queries, keys and values put together, and written one at a
time: the memory needed is that of the largest tensor. What is there of an earlier model.pth is
replaced only when the new one is complete. Its path is printed on stdout, all else on stderr.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import (
    DTYPES,
    HUGGING_FACE,
    PREPARED,
    Checkpoint,
    final_dtype,
    find_weights,
    save_checkpoint,
    size_text,
    stored_tensors,
)
from load import skeleton


def convert(folder: Path, dtype: torch.dtype | None) -> Path:
    """Write folder/model.pth. Raises what Checkpoint, its check and save_checkpoint raise."""
    source, target = Checkpoint(find_weights(folder, HUGGING_FACE)), folder / PREPARED
    model = skeleton(source.args, source.scheme)
    source.check(model)
    tensors = {
        name: torch.empty(
            tensor.shape,
            dtype=final_dtype(tensor, dtype or source.records[name].dtype),
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
    for name, tensor in tensors.items():
        yield name, source.read(name, tensor.dtype)
        bar.update(tensor.nbytes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="checkpoints/REPO")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    try:
        print(convert(args.checkpoint_dir, DTYPES.get(args.dtype)))
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"convert_hf_checkpoint.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))

"""A random OPT whose neurons are as sparse, as skewed and as predictable as published ones.

    python benchmarks/sparse_model.py --folder /tmp/opt-1.3b

Start at write. No trained OPT of this size can be had here, and in a random one half of the
neurons are active, all as often as each other. Here a neuron's weights lie mostly in a few
directions of its layer's input, so that a predictor of low rank can tell what it does, and its bias
is such that it is active for a share of a text's tokens that was drawn for it: 3.5 % in the mean,
from a skewed distribution. "LLM in a flash" (arXiv 2312.11514) reports 3.3 % for OPT-6.7B, of which
a predictor finds 95 % and calls 7 % of the others active; and that five tokens use 24 %.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import ROOT, exit_code, log
from calibration.predictor import InputRecorder, run_block
from checkpoint import read_json, save_checkpoint, stored_tensors
from load import meta_model
from weights.hf import model_args

CONFIG = ROOT / "benchmarks" / "configs" / "opt-1.3b.json"
ACTIVE = 0.035  # share of a layer's neurons, in the mean over a text
SKEW = 0.15  # a of the Beta distribution of how often neurons are active: the less, the more skewed
DIRECTIONS = 40  # of a layer's input, in which most of its neurons' weights lie
UNFORESEEN = 0.1  # share of a neuron's variance that lies in others
TEXTS, TOKENS = 8, 256  # by which biases are set


def write(args: argparse.Namespace) -> dict[str, Any]:
    """model.pth and config.json, block after block, each made for what the ones before give."""
    config, tokens = read_json(args.config), text_tokens(args.text, args.tokenizer)
    args.folder.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt", "LICENSE"):
        (args.folder / file).write_bytes((args.tokenizer / file).read_bytes())
    (args.folder / "config.json").write_bytes(args.config.read_bytes())
    model = meta_model(model_args(config), None)
    shapes = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        for name, (tensor, _) in stored_tensors(model).items()
    }
    save_checkpoint(args.folder / "model.pth", config, None, shapes, made(model, tokens))
    return {"written": str(args.folder), "active": ACTIVE}


def text_tokens(text: Path, tokenizer: Path) -> Tensor:
    """(TEXTS, TOKENS) ids."""
    from text.tokenizer import load_tokenizer

    ids = load_tokenizer(tokenizer).encode(text.read_text()[: 40 * TEXTS * TOKENS], bos=False)
    return torch.tensor(ids[: TEXTS * TOKENS]).view(TEXTS, TOKENS)


@torch.no_grad()
def made(model: Any, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all tensors, in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    args = model.args
    for part, rows in (("tok_embeddings", args.vocab_size), ("positions", args.context + 2)):
        scale = 1.0 if part == "tok_embeddings" else 0.3
        table = (noise(rows, args.dim) * scale).bfloat16()
        getattr(model, part).weight = torch.nn.Parameter(table.float(), requires_grad=False)
        yield f"{part}.weight", table
    slots = torch.arange(tokens.shape[1])
    x, _ = model.positions(model.tok_embeddings(tokens), slots.expand_as(tokens))  # (B, T, D)
    model.tok_embeddings.to("meta")
    for n, block in enumerate(tqdm(model.layers, desc="write", unit="layer")):
        block.to_empty(device="cpu")
        for name, tensor in block.named_parameters():
            tensor.requires_grad_(False)
            if "norm" in name:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.copy_(noise(*tensor.shape) * tensor.shape[1] ** -0.5)
        recorder = block.feed_forward = InputRecorder(block.feed_forward)
        run_block(model, block, x, slots)
        make_sparse(recorder.inner, torch.cat(recorder.seen).flatten(0, 1), noise, generator)
        for tensor in recorder.inner.parameters():
            tensor.copy_(tensor.bfloat16())
        block.feed_forward = recorder.inner
        x = run_block(model, block, x, slots)
        for name, (tensor, _) in stored_tensors(block).items():
            yield f"layers.{n}.{name}", tensor.detach().bfloat16()
        block.to("meta")
    for leaf, value in (("weight", 1.0), ("bias", 0.0)):
        yield f"norm.{leaf}", torch.full((args.dim,), value).bfloat16()


def make_sparse(feed_forward: Any, x: Tensor, noise: Any, generator: torch.Generator) -> None:
    """Weights and biases of neurons, for inputs x, (N, D)."""
    F, D = feed_forward.w1.weight.shape
    basis, _ = torch.linalg.qr(noise(D, DIRECTIONS))
    foreseen = noise(F, DIRECTIONS) @ basis.T * ((1 - UNFORESEEN) / DIRECTIONS) ** 0.5
    weight = foreseen + noise(F, D) * (UNFORESEEN / D) ** 0.5
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    shares = torch.distributions.Beta(SKEW, SKEW * (1 - ACTIVE) / ACTIVE).sample((F,))
    outputs = torch.nn.functional.linear(x, weight.bfloat16().float())  # (N, F)
    ranks = ((1 - shares) * (len(x) - 1)).long()
    least = outputs.sort(0).values.gather(0, ranks.unsqueeze(0)).squeeze(0)  # (F,)
    feed_forward.w1.weight.copy_(weight)
    feed_forward.w1.bias.copy_(-least)
    feed_forward.w2.weight.copy_(noise(D, F) * (ACTIVE * F) ** -0.5)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    data = ROOT / ".." / "shared" / "data"
    add("--config", type=Path, default=CONFIG, help="a shape (default: OPT-1.3B's)")
    add("--folder", type=Path, required=True, help="will hold model.pth")
    add("--text", type=Path, default=data / "text" / "wikitext2_test_joined.txt")
    add("--tokenizer", type=Path, default=data / "tokenizers" / "opt")
    return parser.parse_args()


if __name__ == "__main__":
    log("a model of random weights")
    sys.exit(exit_code(write, parse_args()))

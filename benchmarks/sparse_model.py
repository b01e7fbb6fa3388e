"""Write a random OPT whose neurons are as sparse, skewed and predictable as published ones.

    python benchmarks/sparse_model.py --folder /tmp/opt-1.3b

Start at write. No trained OPT of this size is available here, and in a random one half of the
neurons are active, all equally often. Here most of a neuron's weights lie in a few directions of
its layer's input, so that a low-rank predictor can foresee its activation; its bias makes it active
for a share of a text's tokens that is drawn from a skewed distribution with a mean of 3.5 %. "LLM
in a flash" (arXiv 2312.11514) reports for OPT-6.7B: 3.3 % active, of which a predictor finds 95 %
while it predicts 7 % of the others; five tokens use 24 %.

Shapes: B texts, T tokens, N = B*T, D dim, F neurons.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import ROOT, exit_code, log
from calibration.predictor import InputRecorder
from load import meta_model
from model import Transformer
from text.tokenizer import load_tokenizer
from weights.allocation import stored_tensors
from weights.hf import model_args
from weights.saving import save_checkpoint
from weights.weight_files import read_json

CONFIG = ROOT / "benchmarks" / "configs" / "opt-1.3b.json"
ACTIVE_SHARE = 0.035  # of a layer's neurons, in the mean over a text
ACTIVE_SKEW = 0.15  # a of the neurons' Beta distribution: the smaller, the more skewed
DIRECTIONS = 40  # of a layer's input, in which most of its neurons' weights lie
UNFORESEEN_SHARE = 0.1  # of a neuron's variance, which lies in other directions
TEXTS, TOKENS = 8, 256  # by which biases are set
POSITION_SCALE = 0.3  # of position embeddings beside token embeddings
Noise = Callable[..., Tensor]  # shape -> normally distributed numbers


def write(args: argparse.Namespace) -> dict[str, Any]:
    return write_model(args.folder, args.config, args.text, args.tokenizer)


def write_model(folder: Path, config_file: Path, text: Path, tokenizer: Path) -> dict[str, Any]:
    """Write model.pth, its config and its tokenizer, block after block."""
    config, tokens = read_json(config_file), text_tokens(text, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt", "LICENSE"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    (folder / "config.json").write_bytes(config_file.read_bytes())
    model = meta_model(model_args(config), None)
    shapes = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        for name, (tensor, _) in stored_tensors(model).items()
    }
    save_checkpoint(folder / "model.pth", config, None, shapes, random_tensors(model, tokens))
    return {"written": str(folder), "active": ACTIVE_SHARE}


def text_tokens(text: Path, tokenizer: Path) -> Tensor:
    """(TEXTS, TOKENS) ids."""
    ids = load_tokenizer(tokenizer).encode(text.read_text()[: 40 * TEXTS * TOKENS], bos=False)
    return torch.tensor(ids[: TEXTS * TOKENS]).view(TEXTS, TOKENS)


@torch.no_grad()
def random_tensors(model: Transformer, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in bfloat16. A block's neurons are made for the outputs of the last one."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    yield from embeddings(model, noise)
    pos = torch.arange(tokens.shape[1])  # (T,)
    x, _ = model.positions(model.tok_embeddings(tokens), pos.expand_as(tokens))  # (B, T, D)
    model.tok_embeddings.to("meta")
    for n, block in enumerate(tqdm(model.layers, desc="write", unit="layer")):
        randomise(block, noise)
        recorder = block.feed_forward = InputRecorder(block.feed_forward)
        model.run_layer(n, block, x)
        inputs = torch.cat(recorder.inputs).flatten(0, 1)  # (N, D)
        make_sparse(recorder.inner, inputs, noise, generator)
        block.feed_forward = recorder.inner
        x = model.run_layer(n, block, x)
        for name, (tensor, _) in stored_tensors(block).items():
            yield f"layers.{n}.{name}", tensor.detach().bfloat16()
        block.to("meta")
    for leaf, value in (("weight", 1.0), ("bias", 0.0)):
        yield f"norm.{leaf}", torch.full((model.args.dim,), value).bfloat16()


def embeddings(model: Transformer, noise: Noise) -> Iterator[tuple[str, Tensor]]:
    """Fill and yield the tables of tokens and positions."""
    args = model.args
    tables = (
        ("tok_embeddings", args.vocab_size, 1.0),
        ("positions", args.context + 2, POSITION_SCALE),
    )
    for part, rows, scale in tables:
        table = (noise(rows, args.dim) * scale).bfloat16()
        getattr(model, part).weight = nn.Parameter(table.float(), requires_grad=False)
        yield f"{part}.weight", table


def randomise(block: nn.Module, noise: Noise) -> None:
    """Give a block on the meta device random weights on the CPU."""
    block.to_empty(device="cpu")
    for name, tensor in block.named_parameters():
        tensor.requires_grad_(False)
        if "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.copy_(noise(*tensor.shape) * tensor.shape[1] ** -0.5)


def make_sparse(
    feed_forward: nn.Module, x: Tensor, noise: Noise, generator: torch.Generator
) -> None:
    """Set the weights and biases of neurons for inputs x, (N, D); rounded to bfloat16."""
    F, D = feed_forward.w1.weight.shape
    basis, _ = torch.linalg.qr(noise(D, DIRECTIONS))
    foreseen = noise(F, DIRECTIONS) @ basis.T * ((1 - UNFORESEEN_SHARE) / DIRECTIONS) ** 0.5
    weight = foreseen + noise(F, D) * (UNFORESEEN_SHARE / D) ** 0.5
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    b = ACTIVE_SKEW * (1 - ACTIVE_SHARE) / ACTIVE_SHARE
    shares = torch.distributions.Beta(ACTIVE_SKEW, b).sample((F,))
    outputs = nn.functional.linear(x, weight.bfloat16().float())  # (N, F)
    ranks = ((1 - shares) * (len(x) - 1)).long()
    thresholds = outputs.sort(0).values.gather(0, ranks.unsqueeze(0)).squeeze(0)  # (F,)
    feed_forward.w1.weight.copy_(weight)
    feed_forward.w1.bias.copy_(-thresholds)
    feed_forward.w2.weight.copy_(noise(D, F) * (ACTIVE_SHARE * F) ** -0.5)
    for tensor in feed_forward.parameters():
        tensor.copy_(tensor.bfloat16())


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

"""Int4 weights trained through the whole model until it says what the dense model says.

Start at distill. GPTQ brings each layer near to what the dense layer computes; here the integers
of all layers move together, and what they are held against is the dense model's distribution over
the next token. Only integers move: scales, zero points, norms, biases and tables stay as they are.

Integers have no gradient: they are rounded from latent reals, which are given the gradient of what
they are rounded to (the straight-through estimator of Bengio et al., arXiv 1308.3432; a language
model's own distribution as the target is LLM-QAT's, 2305.17888).

Shapes: N out_features, K in_features, S groupsize, P groups, B texts, T tokens, V vocab.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from calibration.gptq import Buffers
from checkpoint import Checkpoint
from load import count_weights, meta_model
from model import Linear, ModelArgs, Transformer
from quant.linear import pack_nibbles, unpack_nibbles

TOKENS = 2048  # of a step, at least one text
RATE = 0.005  # integers, Adam's first step; it falls to 0 as half a cosine does
BETAS = 0.3, 0.99  # Adam's; with its 0.9 many latents overshoot together, and short runs do harm
NEAR = 0.45  # of an integer: as far from it a latent may begin
UNSEEN = 16  # texts to measure on, about, where there are many
SAVE = 25  # steps, after each of which a later run can go on


def distill(
    checkpoint: Checkpoint,
    tokens: Tensor,
    blocks: dict[str, Buffers],
    steps: int,
    work: Path,
    device: torch.device,
) -> tuple[dict[str, Buffers], float, float]:
    """The blocks with integers trained for `steps`, and what they gain on texts not trained on.

    tokens: (B, T) ids; every eighth text, or some UNSEEN of many, is kept to measure on. blocks:
    the Int4Linear of each linear. work: a directory where a run that broke off is taken up.
    Returns also the divergence before and after, nats per token; where it is no smaller after,
    the blocks are those given. What it takes is training_bytes.
    """
    teacher = meta_model(checkpoint.args, None)
    checkpoint.load_into(teacher, device, torch.float32)
    student, latents = latent_copy(teacher, blocks)
    tokens = tokens.to(device)
    kept = torch.arange(len(tokens)) % max(8, len(tokens) // UNSEEN) == 0
    unseen, seen = tokens[kept], tokens[~kept] if len(tokens) > 1 else tokens
    before = mean_divergence(teacher, student, unseen)
    train(teacher, student, seen, steps, work / f"trained{steps}.pt")
    after = mean_divergence(teacher, student, unseen)
    if after < before:
        blocks = {name: latent.as_stored() for name, latent in latents.items()}
    return blocks, before, after


def training_bytes(args: ModelArgs) -> int:
    """Of memory, at least: weights, latents, what these are rounded to, gradients, two averages."""
    return 6 * 4 * count_weights(args)


def train(
    teacher: Transformer, student: Transformer, tokens: Tensor, steps: int, state: Path
) -> None:
    """Move the student's latents. state: the file to go on from, written every few steps."""
    latents = [p for p in student.parameters() if p.requires_grad]
    optimizer, done = torch.optim.Adam(latents, betas=BETAS), 0
    if state.exists():
        done, saved, averages = torch.load(state, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(averages)
        for latent, value in zip(latents, saved, strict=True):
            latent.data.copy_(value)
    for step in tqdm(range(done, steps), initial=done, total=steps, desc="train", unit="step"):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        generator = torch.Generator().manual_seed(step)  # a run taken up here draws the same
        drawn = torch.randperm(len(tokens), generator=generator)[: texts_of_a_step(tokens)]
        optimizer.zero_grad()
        divergence(teacher, student, tokens[drawn.to(tokens.device)]).backward()
        optimizer.step()
        if (step + 1) % SAVE == 0:
            values = [latent.detach() for latent in latents]
            torch.save((step + 1, values, optimizer.state_dict()), state.with_suffix(".next"))
            state.with_suffix(".next").replace(state)


@torch.no_grad()
def mean_divergence(teacher: Transformer, student: Transformer, tokens: Tensor) -> float:
    """The divergence over many texts, (B, T), a step's worth at a time."""
    parts = tokens.split(texts_of_a_step(tokens))
    return sum(len(p) * divergence(teacher, student, p).item() for p in parts) / len(tokens)


def divergence(teacher: Transformer, student: Transformer, tokens: Tensor) -> Tensor:
    """KL(teacher || student) of the next token, nats per token of (B, T) ids."""
    with torch.no_grad():
        target = log_probabilities(teacher, tokens)
    said = log_probabilities(student, tokens)  # (B, T, V)
    return F.kl_div(said, target, reduction="sum", log_target=True) / tokens.numel()


def texts_of_a_step(tokens: Tensor) -> int:
    return max(1, TOKENS // tokens.shape[1])


def log_probabilities(model: Transformer, tokens: Tensor) -> Tensor:
    """(B, T) ids -> (B, T, V)."""
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    caches = model.make_caches(*tokens.shape)
    return model(tokens, slots.expand_as(tokens), slots, caches).log_softmax(-1)


class LatentInt4(nn.Module):
    """An Int4Linear whose integers are rounded from latent reals, (N, P, S), as it is used."""

    def __init__(self, linear: Linear, given: Buffers):
        super().__init__()
        device, (_, K) = linear.weight.device, linear.weight.shape
        P = given["scales"].shape[1]
        self.given, self.in_features, self.bias = given, K, linear.bias
        self.scales = given["scales"].to(device).float().unsqueeze(2)  # (N, P, 1)
        self.zeros = unpack_nibbles(given["zeros"].to(device))[:, :P].float().unsqueeze(2)
        q = unpack_nibbles(given["weight"].to(device)).float().unflatten(1, (P, -1))  # (N, P, S)
        weight = F.pad(linear.weight, (0, q[0].numel() - K)).view_as(q)
        unrounded = weight / self.scales + self.zeros
        self.latent = nn.Parameter(q + (unrounded - q).clamp(-NEAR, NEAR))

    def integers(self) -> Tensor:
        return self.latent.detach().round().clamp(0, 15)  # (N, P, S)

    def forward(self, x: Tensor) -> Tensor:
        q = self.integers() + (self.latent - self.latent.detach())  # with the latents' gradient
        weight = ((q - self.zeros) * self.scales).flatten(1)[:, : self.in_features]
        return F.linear(x, weight, self.bias)

    def as_stored(self) -> Buffers:
        return self.given | {"weight": pack_nibbles(self.integers().flatten(1)).cpu()}


def latent_copy(
    model: Transformer, blocks: dict[str, Buffers]
) -> tuple[Transformer, dict[str, LatentInt4]]:
    """The model with latents in place of the named linears; it shares all other tensors."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    latents = {name: LatentInt4(model.get_submodule(name), b) for name, b in blocks.items()}
    for name, latent in latents.items():
        copied.set_submodule(name, latent)
    return copied, latents

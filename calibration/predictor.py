"""Which feed-forward neurons a token needs, learned from a text.

Start at inputs, then learn. Block after block, one in memory at a time, texts run through the
dense model; what enters each feed-forward layer, and which of its neurons are active there, is what
its predictor learns from: two low-rank factors, begun with the best ones of that rank for such
inputs (an SVD weighted by the inputs' covariance) and trained with a class-balanced loss, since few
neurons are active. Texts that were not trained on then decide the threshold, at which a given share
of the active neurons is found, and tell how much tokens that follow one another have in common.

Based on "LLM in a flash" (arXiv 2312.11514, section 3.1) and Deja Vu (2310.17157), with the start
of ASVD (2312.05821).

Shapes: N tokens, D dim, F neurons, r rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration.gptq import embed, fill_module
from checkpoint import Checkpoint
from load import meta_model
from model import Linear, Transformer
from neurons.records import NeuronCache
from quant.linear import QuantizedLinear
from tiers.prefetch import CPU

TEXTS = 8  # that run through a block together
BATCH = 512  # tokens of a training step
RATE = 2e-3  # Adam's, falling to 0
SHARPNESS = 3.0  # logits of a neuron have this spread before training
DAMPING = 1e-3  # of the mean of the covariance's diagonal, added to it
FLAT = 0.02  # added to the share of active neurons, by which inactive ones count in the loss
UNSEEN = 8  # one text of so many is not trained on
WINDOWS = (*range(1, 17), 20, 24, 32, 48, 64, 96, 128)  # tokens
GAPS = 0, 1, 2, 4, 8  # records


@dataclass(frozen=True)
class Learned:
    """What is known of a layer. Neurons are in the order of the file: `order` says which they were.

    usage: how many neurons are predicted within so many tokens, one number for each of WINDOWS.
    records, requests: of a token's reads where so many are in memory, for each of GAPS; windows x
    gaps.
    """

    order: Tensor  # (F,)
    down: Tensor  # (r, D)
    up: Tensor  # (F, r)
    bias: Tensor  # (F,), the threshold taken off
    figures: dict[str, Any]  # active, predicted, recall; usage, records, requests


def learn(x: Tensor, feed_forward: nn.Module, rank: int, recall: float, epochs: int) -> Learned:
    """What there is to know of one layer, from what enters it, (B, T, D) float32.

    recall: the share of active neurons that is to be found. Of texts, the B, one of UNSEEN is not
    trained on, and decides.
    """
    B, T, _ = x.shape
    unseen = torch.arange(B) % UNSEEN == UNSEEN - 1 if B >= UNSEEN else torch.arange(B) == B - 1
    seen = ~unseen if B > 1 else unseen
    weight, bias = gate(feed_forward)  # (F, D), (F,)
    train, held = x[seen].flatten(0, 1), x[unseen].flatten(0, 1)  # (N, D) each
    factors = start(weight, bias, train, rank)
    down, up, shift = fit(factors, train, F.linear(train, weight, bias) > 0, epochs)
    active = F.linear(held, weight, bias) > 0  # (N, F)
    scores = F.linear(F.linear(held, down), up, shift)
    least = threshold(scores, active, recall)
    predicted = scores > least
    order = predicted.sum(0).argsort(descending=True, stable=True)
    found = (predicted & active).sum() / active.sum().clamp_min(1)
    figures = {
        "active": active.float().mean().item(),
        "predicted": predicted.float().mean().item(),
        "recall": found.item(),
    } | locality(predicted[:, order].unflatten(0, (-1, T)).cpu().numpy())
    kept = (t.cpu() for t in (order, down, up[order], (shift - least)[order]))
    return Learned(*kept, figures)


@torch.inference_mode()
def inputs(
    checkpoint: Checkpoint, tokens: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, nn.Module]]:
    """What enters each feed-forward layer, (B, T, D) float32, and that layer in float32."""
    model = meta_model(checkpoint.args, checkpoint.scheme)
    fill_module(checkpoint, model, "positions", torch.device("cpu"))
    x = embed(checkpoint, model, tokens).to(device)  # (B, T, D)
    model.positions.to(device)
    slots = torch.arange(tokens.shape[1], device=device)
    for n, block in enumerate(model.layers):
        fill_module(checkpoint, model, f"layers.{n}", device)
        recorder = Recorder(block.feed_forward)
        block.feed_forward = recorder
        x = torch.cat([through(model, block, part, slots) for part in x.split(TEXTS)])
        # A clone is no inference tensor: training may use it.
        with torch.inference_mode(False):
            seen = torch.cat([part.clone() for part in recorder.seen])
        yield seen, recorder.inner
        block.to("meta")


def through(model: Transformer, block: nn.Module, x: Tensor, slots: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), by one block."""
    pos = slots.expand(x.shape[:2])
    _, rotation = model.positions(torch.zeros_like(x), pos)
    shape = (len(x), len(slots) + 1, model.args.n_kv_heads, model.args.head_dim)
    cache = model.cache_factory(shape, x.dtype, x.device)
    return block(x, rotation, model.mask(pos, slots, x.dtype), pos, cache)


class Recorder(nn.Module):
    """A feed-forward layer that remembers what entered it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.inner(x)


def dense(linear: Linear | QuantizedLinear) -> Tensor:
    """Its weights in float32, (out, in)."""
    return (
        linear.dequantize(torch.float32) if isinstance(linear, QuantizedLinear) else linear.weight
    )


def gate(feed_forward: nn.Module) -> tuple[Tensor, Tensor]:
    """What decides whether neurons are active: weights (F, D) and biases (F,)."""
    first = getattr(feed_forward, "w13", None) or feed_forward.w1
    neurons = feed_forward.w2.in_features
    weight = dense(first)[:neurons].clone()
    bias = torch.zeros_like(weight[:, 0]) if first.bias is None else first.bias[:neurons].clone()
    return weight, bias


@torch.no_grad()
def start(weight: Tensor, bias: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors (r, D) and (F, r) and biases (F,) whose products are nearest to those of the
    weights for inputs x, (N, D); each neuron's then scaled to the same spread."""
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    diagonal = covariance.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(covariance)  # (D, D): root @ root.T
    seen = weight @ root  # (F, D): of white inputs
    _, vectors = torch.linalg.eigh(seen.T @ seen)
    basis = vectors[:, -rank:]  # (D, r)
    up = seen @ basis  # (F, r)
    down = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)  # (r, D)
    spread = seen.norm(dim=1).clamp_min(1e-12) / SHARPNESS  # (F,)
    shift = bias + weight @ mean - up @ (down @ mean)
    return down, up / spread[:, None], shift / spread


def fit(
    factors: tuple[Tensor, Tensor, Tensor], x: Tensor, active: Tensor, epochs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Train the factors to tell which neurons are active, (N, F), for inputs x, (N, D)."""
    down, up, shift = factors = [nn.Parameter(t.clone()) for t in factors]
    optimizer = torch.optim.Adam(factors, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, epochs * -(-len(x) // BATCH))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).to(x.device).split(BATCH):
            wanted = active[batch].float()  # (n, F)
            scores = F.linear(F.linear(x[batch], down), up, shift)
            counts = torch.where(wanted > 0, 1.0, wanted.mean() + FLAT)
            loss = F.binary_cross_entropy_with_logits(scores, wanted, counts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return tuple(t.detach() for t in factors)


def threshold(scores: Tensor, active: Tensor, recall: float) -> Tensor:
    """The score that so large a share of the active neurons reaches."""
    found = scores[active]
    if not len(found):
        return scores.new_zeros(())
    rank = max(1, math.floor((1 - recall) * len(found)))
    least = found.kthvalue(rank).values
    return least.nextafter(least.new_tensor(-math.inf))


def locality(predicted: np.ndarray) -> dict[str, Any]:
    """What the tokens of texts have in common. predicted: (B, T, F) in the file's order."""
    texts = [[np.flatnonzero(row) for row in text] for text in predicted]
    (T, neurons), figures = predicted.shape[1:], {"usage": [], "records": [], "requests": []}
    for window in WINDOWS:
        if window >= T:  # of longer windows than the texts nothing is known
            break
        used = float(np.mean([used_within(text, window, neurons) for text in texts]))
        brought = [reads(text, window, math.ceil(used), neurons) for text in texts]
        records, requests = np.mean(brought, 0).T  # (gaps,) each
        found = used, records.tolist(), requests.tolist()
        for values, value in zip(figures.values(), found, strict=True):
            values.append(value)
    return figures


def used_within(text: list[np.ndarray], window: int, neurons: int) -> float:
    """How many neurons so many tokens want together, in the mean."""
    last, counts = np.full(neurons, -(10**9)), []  # when each was last wanted
    for t, ids in enumerate(text):
        last[ids] = t
        if t >= window:
            counts.append(np.count_nonzero(t - last < window))
    return float(np.mean(counts))


def reads(text: list[np.ndarray], window: int, slots: int, neurons: int) -> np.ndarray:
    """(gaps, 2): records and requests of a token beyond the window, in the mean, where so many
    neurons are in memory."""
    cache, found = NeuronCache(neurons, max(1, slots), 0, CPU), []
    for t, ids in enumerate(text):
        brought, places, rest = cache.admit(ids)
        cache.hold(brought, places)
        if t >= window:
            steps, missing = np.diff(np.append(brought, rest)), len(brought) + len(rest)
            near = [steps[steps <= gap + 1] for gap in GAPS]
            found.append([(missing + (n - 1).sum(), missing - len(n)) for n in near])
    return np.mean(found, 0)

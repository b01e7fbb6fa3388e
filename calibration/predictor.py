"""Train the predictors of --flash: which feed-forward neurons are active for a token.

Start at feed_forward_inputs, then learn_layer. A text is a piece of the calibration text, T tokens
long (texts.py). Texts run through the model block after block, with one block (layer) in memory.
The inputs of each feed-forward layer, and its neurons that are active for them, train the layer's
predictor: two low-rank matrices and a bias, which give each neuron a score. They are initialised by
an SVD weighted with the inputs' covariance and trained with a class-balanced loss, because few
neurons are active. Held-out texts, which are not trained on, then set the threshold of the scores
that reaches the required recall (share of active neurons that are predicted), and measure how many
neurons successive tokens share.

The neuron file is the file from which --flash reads neurons (neurons/records.py). The neurons of
the last tokens, a window, stay in memory, in the entries of a cache; each entry has room for one
neuron's weights, a record. A request reads neighbouring records; a gap is the unneeded records
between two needed ones that one request still reads.

Based on "LLM in a flash" (arXiv 2312.11514, section 3.1) and Deja Vu (2310.17157); the
initialisation is ASVD's (2312.05821).

Shapes: B texts, T tokens of a text, N tokens, D dim, F neurons of a layer, r rank.
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
from layers.basic import Linear
from load import meta_model
from neurons.records import NeuronCache
from quant.linear import QuantizedLinear
from tiers.prefetch import CPU

TEXTS_PER_BATCH = 8  # texts that run through a block at a time
TOKENS_PER_STEP = 512  # tokens of a training step
LEARNING_RATE = 2e-3  # Adam's first learning rate; a cosine schedule lowers it to 0
INITIAL_LOGIT_SCALE = 3.0  # standard deviation of a neuron's logits before training
COVARIANCE_DAMPING = 1e-3  # the share of the covariance's mean diagonal that is added to it
MIN_INACTIVE_WEIGHT = 0.02  # an inactive neuron's loss weighs this + the share of active neurons
HELD_OUT_EVERY = 8  # one text of so many is held out of training
WINDOWS = (*range(1, 17), 20, 24, 32, 48, 64, 96, 128)  # numbers of successive tokens
GAPS = 0, 1, 2, 4, 8  # unneeded records between two needed ones that one request still reads
# A predictor: down (r, D), up (F, r), shift (F,). The scores of x are up @ (down @ x) + shift.
Factors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LearnedLayer:
    """A layer's predictor and figures, with neurons in the order of the neuron file.

    figures: the results of `accuracy` and `locality`, for held-out texts. The fields are also keys
    of the files in which flash.py saves each layer.
    """

    order: Tensor  # (F,): neuron n of the neuron file is the model's neuron order[n]
    down: Tensor  # (r, D)
    up: Tensor  # (F, r)
    bias: Tensor  # (F,): the shift minus the threshold, so that scores above 0 are predictions
    figures: dict[str, Any]


def learn_layer(
    x: Tensor, feed_forward: nn.Module, rank: int, recall: float, epochs: int
) -> LearnedLayer:
    """Train one layer's predictor, and evaluate it on the held-out texts.

    Called by flash.py for each layer. x: (B, T, D) float32, the inputs of the layer. feed_forward:
    a ReLU layer with loaded weights. rank: of the predictor's matrices. recall: the share of active
    neurons that must be predicted. epochs: passes over the training texts. The neuron file gets the
    layer's neurons in the order of how often they are predicted, the most frequent first: needed
    neurons are then often neighbours, which one request reads.
    """
    weight, bias = gate_weights(feed_forward)  # (F, D), (F,)
    train, held_out = (part.flatten(0, 1) for part in split_texts(x))  # (N, D) each
    factors = initial_factors(weight, bias, train, rank)
    down, up, shift = train_factors(factors, train, F.linear(train, weight, bias) > 0, epochs)
    active = F.linear(held_out, weight, bias) > 0  # (N, F)
    scores = F.linear(F.linear(held_out, down), up, shift)  # (N, F)
    threshold = score_threshold(scores, active, recall)
    predicted = scores > threshold
    order = predicted.sum(0).argsort(descending=True, stable=True)
    texts = predicted[:, order].unflatten(0, (-1, x.shape[1]))  # (B, T, F)
    figures = accuracy(active, predicted) | locality(texts.cpu().numpy())
    tensors = (t.cpu() for t in (order, down, up[order], (shift - threshold)[order]))
    return LearnedLayer(*tensors, figures)


def split_texts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training texts and the held-out texts of x, (B, T, D).

    Every HELD_OUT_EVERY-th text is held out; of fewer texts, the last one. A single text is both;
    the figures are then too good.
    """
    B = len(x)
    numbers = torch.arange(B)
    held_out = numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if B < HELD_OUT_EVERY:
        held_out = numbers == B - 1
    return x[~held_out if B > 1 else held_out], x[held_out]


def accuracy(active: Tensor, predicted: Tensor) -> dict[str, float]:
    """Return the figures `active` and `predicted`, mean shares of a layer's neurons, and `recall`,
    the share of active neurons that are predicted. active, predicted: (N, F) bool."""
    return {
        "active": active.float().mean().item(),
        "predicted": predicted.float().mean().item(),
        "recall": ((predicted & active).sum() / active.sum().clamp_min(1)).item(),
    }


@torch.inference_mode()
def feed_forward_inputs(
    checkpoint: Checkpoint, tokens: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, nn.Module]]:
    """Run texts through the model, and yield the inputs and the module of each feed-forward layer.

    tokens: (B, T) ids. Yields in the model's order: the inputs, (B, T, D) float32 on the device,
    and the feed-forward module with loaded weights, float32 unless quantised. They are freed when
    the next layer is requested: one block's weights are in memory at a time.
    """
    model = meta_model(checkpoint.args, checkpoint.scheme)
    fill_module(checkpoint, model, "positions", CPU)
    x = embed(checkpoint, model, tokens).to(device)  # (B, T, D): the inputs of the next block
    model.positions.to(device)
    for n, block in enumerate(model.layers):
        fill_module(checkpoint, model, f"layers.{n}", device)
        recorder = InputRecorder(block.feed_forward)
        block.feed_forward = recorder
        x = torch.cat([model.run_layer(n, block, part) for part in x.split(TEXTS_PER_BATCH)])
        # Cloned outside inference mode, because autograd refuses inference tensors.
        with torch.inference_mode(False):
            inputs = torch.cat([part.clone() for part in recorder.inputs])
        yield inputs, recorder.inner
        block.to("meta")


class InputRecorder(nn.Module):
    """Wraps a feed-forward layer, `inner`, and appends the input of each call to `inputs`."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.inputs = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self.inner(x)


def dense_weight(linear: Linear | QuantizedLinear) -> Tensor:
    """Return a linear's weights, (out_features, in_features), dequantised to float32 if it is
    quantised."""
    return (
        linear.dequantize(torch.float32) if isinstance(linear, QuantizedLinear) else linear.weight
    )


def gate_weights(feed_forward: nn.Module) -> tuple[Tensor, Tensor]:
    """Return copies of the weights (F, D) and biases (F,) that decide which neurons are active.

    A neuron is active for x if weight @ x + bias > 0. The weights are those of the gate projection,
    or of the up projection in a layer without a gate: the first F rows of w13, or w1. The biases
    are zeros if the layer has none.
    """
    first = getattr(feed_forward, "w13", None) or feed_forward.w1
    neurons = feed_forward.w2.in_features
    weight = dense_weight(first)[:neurons].clone()
    bias = torch.zeros_like(weight[:, 0]) if first.bias is None else first.bias[:neurons].clone()
    return weight, bias


@torch.no_grad()
def initial_factors(weight: Tensor, bias: Tensor, x: Tensor, rank: int) -> Factors:
    """Return the low-rank factors with which training starts.

    Of all factors of this rank, their scores for the inputs x, (N, D), have the least squared error
    against weight @ x + bias. Each neuron's scores are then divided by a factor, so that the
    standard deviation of weight @ x becomes INITIAL_LOGIT_SCALE: scores serve as logits. weight:
    (F, D); bias: (F,).
    """
    mean = x.mean(0)
    root = covariance_root(x - mean)  # (D, D)
    whitened = weight @ root  # (F, D): weights for inputs of covariance 1
    _, vectors = torch.linalg.eigh(whitened.T @ whitened)  # in ascending order of eigenvalues
    basis = vectors[:, -rank:]  # (D, r): directions of whitened inputs with the widest outputs
    up = whitened @ basis  # (F, r)
    # basis.T @ inverse(root), (r, D): whitens the inputs, then projects them onto the basis.
    down = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
    scale = whitened.norm(dim=1).clamp_min(1e-12) / INITIAL_LOGIT_SCALE  # (F,)
    shift = bias + weight @ mean - up @ (down @ mean)
    return down, up / scale[:, None], shift / scale


def covariance_root(centred: Tensor) -> Tensor:
    """Return a lower triangular matrix (D, D), root, with root @ root.T = the inputs' covariance.

    centred: (N, D), inputs minus their mean. A number is added to the covariance's diagonal, so
    that it is positive definite for fewer inputs than dimensions, too.
    """
    covariance = centred.T @ centred / len(centred)
    diagonal = covariance.diagonal()  # a view: the next line changes the covariance
    diagonal += COVARIANCE_DAMPING * diagonal.mean().clamp_min(1e-12)
    return torch.linalg.cholesky(covariance)


def train_factors(factors: Factors, x: Tensor, active: Tensor, epochs: int) -> Factors:
    """Return factors that are trained to predict the active neurons from a layer's inputs.

    factors: the initial values, which are not changed. x: (N, D). active: (N, F) bool, which
    neurons are active for these inputs. epochs: passes over x; 0 returns the initial values. A step
    takes TOKENS_PER_STEP tokens, in an order that is seeded.
    """
    down, up, shift = parameters = [nn.Parameter(t.clone()) for t in factors]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    steps = max(1, epochs * -(-len(x) // TOKENS_PER_STEP))  # the schedule divides by it
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for batch in order.split(TOKENS_PER_STEP):  # n indices
            scores = F.linear(F.linear(x[batch], down), up, shift)  # (n, F)
            loss = balanced_loss(scores, active[batch].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return tuple(t.detach() for t in parameters)


def balanced_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in which an inactive neuron has a smaller weight.

    scores, targets: (n, F); a target is 1.0 for an active neuron, else 0.0. The weight is about the
    share of active neurons, so that the many inactive neurons together weigh about as much as the
    active ones.
    """
    weights = torch.where(targets > 0, 1.0, targets.mean() + MIN_INACTIVE_WEIGHT)
    return F.binary_cross_entropy_with_logits(scores, targets, weights)


def score_threshold(scores: Tensor, active: Tensor, recall: float) -> Tensor:
    """Return the threshold of the scores, a tensor (), above which at least a share `recall` of the
    active neurons' scores lies. 0 if no neuron is active.

    scores: (N, F); active: (N, F) bool.
    """
    active_scores = scores[active]
    if not len(active_scores):
        return scores.new_zeros(())
    # The lowest score that must be above the threshold: fewer than `rank` scores are below it.
    rank = max(1, math.floor((1 - recall) * len(active_scores)))
    lowest = active_scores.kthvalue(rank).values
    return lowest.nextafter(lowest.new_tensor(-math.inf))


def locality(predicted: np.ndarray) -> dict[str, Any]:
    """Simulate the neuron cache, for the choice of its size (neurons/budget.py).

    predicted: (B, T, F) bool. The neurons must be in the order of the neuron file, because
    neighbours are read by one request. Returns three lists, with an item for each of WINDOWS that
    is shorter than a text (T): `usage`, the mean number of different neurons that a window of
    tokens uses; and, for a cache of so many entries, `records` and `requests`: how many a token
    reads and makes in the mean, each a list with a number for each of GAPS. Records in gaps count.
    """
    texts = [[np.flatnonzero(row) for row in text] for text in predicted]
    (T, neurons), figures = predicted.shape[1:], {"usage": [], "records": [], "requests": []}
    for window in (w for w in WINDOWS if w < T):
        usage = float(np.mean([window_usage(text, window, neurons) for text in texts]))
        reads = [mean_reads(text, window, math.ceil(usage), neurons) for text in texts]
        records, requests = np.mean(reads, 0).T  # (gaps,) each
        figures["usage"].append(usage)
        figures["records"].append(records.tolist())
        figures["requests"].append(requests.tolist())
    return figures


def window_usage(text: list[np.ndarray], window: int, neurons: int) -> float:
    """Return the mean number of different neurons that `window` successive tokens of a text use.

    text: the ids of each token's neurons, for more than `window` tokens. neurons: their number in
    the layer.
    """
    # last_use: the number of the last token that used each neuron; before any use, long ago.
    last_use, counts = np.full(neurons, -(10**9)), []
    for t, ids in enumerate(text):
        last_use[ids] = t
        if t >= window:
            counts.append(np.count_nonzero(t - last_use < window))
    return float(np.mean(counts))


def mean_reads(text: list[np.ndarray], window: int, entries: int, neurons: int) -> np.ndarray:
    """Return the mean numbers of records that a token reads and of its requests, for each of GAPS:
    (gaps, 2).

    They are simulated for a cache with so many entries. text: the ascending ids of each token's
    neurons, for more than `window` tokens. The first `window` tokens fill the cache and are not
    counted. neurons: their number in the layer. Successive missing ids that differ by at most
    gap + 1 share a request, which also reads the records between them.
    """
    # The cache is simulated only: its entries have 0 bytes.
    cache, counts = NeuronCache(neurons, max(1, entries), 0, CPU), []
    for t, ids in enumerate(text):
        new, filled, waiting = cache.admit(ids)
        cache.commit(new, filled)
        if t >= window:
            missing = np.append(new, waiting)  # ascending
            steps = np.diff(missing)
            # For each gap, the steps between ids of one request. A step of n also reads the n - 1
            # records between its two ids, and saves a request.
            joined = [steps[steps <= gap + 1] for gap in GAPS]
            counts.append([(len(missing) + (n - 1).sum(), len(missing) - len(n)) for n in joined])
    return np.mean(counts, 0)

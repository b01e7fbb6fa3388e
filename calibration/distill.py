"""Training of int4 weights by distillation from the dense model.

Start at distill. GPTQ makes each linear compute nearly what the dense linear computes. Here the
integers of all linears are trained together, to minimise the divergence between the distributions
of the dense and of the quantised model over the next token. Scales, zero points, norms, biases and
embeddings do not change. The dense model is the teacher, the quantised one the student; the
divergence is KL(teacher || student).

Integers have no gradient. They are rounded from latent floats, which receive the gradient of the
integers (the straight-through estimator of Bengio et al., arXiv 1308.3432). Taking the dense
model's own distribution as the target is from LLM-QAT (2305.17888).

Shapes: N out_features, K in_features, S groupsize, P groups of inputs, B texts, T tokens, V vocab.
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
from layers.args import ModelArgs
from layers.basic import Linear
from load import count_weights, meta_model
from model import Transformer
from quant.linear import pack_nibbles, unpack_nibbles

TOKENS_PER_STEP = 2048  # most tokens of a training step; one longer text is a step, too
LEARNING_RATE = 0.005  # Adam's first step, in units of the integers; falls to 0 along half a cosine
BETAS = 0.3, 0.99  # Adam's decay rates; with 0.9, many latents overshoot and short runs do harm
MAX_START_OFFSET = 0.45  # largest distance of a latent from its integer before training
HELD_OUT_TEXTS = 16  # about how many texts are held out if there are more than 128, see distill
STEPS_PER_SAVE = 25  # training steps between two saved states


def distill(
    checkpoint: Checkpoint,
    tokens: Tensor,
    linears: dict[str, Buffers],
    steps: int,
    work: Path,
    device: torch.device,
) -> tuple[dict[str, Buffers], float, float]:
    """Train the integers of all int4 linears together, after GPTQ.

    Returns the linears with trained integers, and the divergence from the dense model before and
    after, in nats per token. If the divergence does not fall, returns `linears` unchanged. linears:
    the int4 buffers of each linear, by its name. tokens: (B, T) ids. Every eighth text, or about
    HELD_OUT_TEXTS of more than 128, is held out: it is not trained on but measures the divergence;
    a single text serves for both. steps: of training; only a run with the same number continues an
    interrupted one. work: an existing directory for the state of training, from which an
    interrupted run continues. Needs training_bytes of memory on the device.
    """
    teacher = meta_model(checkpoint.args, None)
    checkpoint.load_into(teacher, device, torch.float32)
    student, latents = latent_copy(teacher, linears)
    tokens = tokens.to(device)
    held_out = torch.arange(len(tokens)) % max(8, len(tokens) // HELD_OUT_TEXTS) == 0
    measured = tokens[held_out]
    trained = tokens[~held_out] if len(tokens) > 1 else tokens
    before = mean_divergence(teacher, student, measured)
    train(teacher, student, trained, steps, work / f"trained{steps}.pt")
    after = mean_divergence(teacher, student, measured)
    if after < before:
        linears = {name: latent.as_stored() for name, latent in latents.items()}
    return linears, before, after


def training_bytes(args: ModelArgs) -> int:
    """Return the bytes of memory that distill needs at least: six float32 numbers per weight.

    They are the dense weight, its latent, the latent's integer and gradient, and Adam's two
    averages. Activations come on top.
    """
    return 6 * 4 * count_weights(args)


def train(
    teacher: Transformer, student: Transformer, tokens: Tensor, steps: int, state: Path
) -> None:
    """Train the student's latents in place to minimise the divergence, for `steps` steps.

    teacher: the dense model. student: from latent_copy. tokens: (B, T) ids, on the models' device.
    state: a file that is written every STEPS_PER_SAVE steps; if it exists, training continues from
    it. It holds the number of steps done, the latents, and Adam's averages. Each step draws
    texts_per_step texts with a generator seeded by the step's number, so a continued run draws the
    same texts.
    """
    latents = [p for p in student.parameters() if p.requires_grad]  # loaded weights require none
    optimizer, done = torch.optim.Adam(latents, betas=BETAS), 0
    if state.exists():
        done, saved, averages = torch.load(state, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(averages)
        for latent, value in zip(latents, saved, strict=True):
            latent.data.copy_(value)
    for step in tqdm(range(done, steps), initial=done, total=steps, desc="train", unit="step"):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        generator = torch.Generator().manual_seed(step)
        texts = torch.randperm(len(tokens), generator=generator)[: texts_per_step(tokens)]
        optimizer.zero_grad()
        divergence(teacher, student, tokens[texts.to(tokens.device)]).backward()
        optimizer.step()
        if (step + 1) % STEPS_PER_SAVE == 0:
            values = [latent.detach() for latent in latents]
            torch.save((step + 1, values, optimizer.state_dict()), state.with_suffix(".next"))
            state.with_suffix(".next").replace(state)  # atomic


@torch.no_grad()
def mean_divergence(teacher: Transformer, student: Transformer, tokens: Tensor) -> float:
    """Return the divergence, in nats per token, over texts, (B, T) ids.

    Computed for texts_per_step texts at a time, to bound the memory.
    """
    parts = tokens.split(texts_per_step(tokens))
    return sum(len(p) * divergence(teacher, student, p).item() for p in parts) / len(tokens)


def divergence(teacher: Transformer, student: Transformer, tokens: Tensor) -> Tensor:
    """Return KL(teacher || student), in nats per token, for texts, (B, T) ids.

    Compares the two models' distributions over the next token at each position. The gradient flows
    to the student only. The log-probabilities of both models, (B, T, V) each, are in memory at
    once.
    """
    with torch.no_grad():
        target = log_probabilities(teacher, tokens)
    predicted = log_probabilities(student, tokens)  # (B, T, V)
    return F.kl_div(predicted, target, reduction="sum", log_target=True) / tokens.numel()


def texts_per_step(tokens: Tensor) -> int:
    """Return how many texts a training step uses, at least one. tokens: (B, T) ids."""
    return max(1, TOKENS_PER_STEP // tokens.shape[1])


def log_probabilities(model: Transformer, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of the token after each position, (B, T) ids -> (B, T, V).

    The texts begin at position 0, with new KV caches.
    """
    B, T = tokens.shape
    pos = torch.arange(T, device=tokens.device)
    lengths = torch.full((B, 1), T, device=tokens.device)
    with model.whole_caches():
        caches = model.make_caches(B, T)
    return model(tokens, pos.expand_as(tokens), pos, caches, lengths=lengths).log_softmax(-1)


class LatentInt4(nn.Module):
    """An int4 linear whose integers are rounded from trainable latent floats at each call.

    latent: (N, P, S), a float near each integer: the parameter that training changes.
    """

    def __init__(self, linear: Linear, buffers: Buffers):
        """Set each latent near its integer, on the side of the dense weight.

        linear: the dense linear, which gives the device. buffers: of an Int4Linear, from GPTQ. A
        latent is the dense weight divided by the scale, plus the zero point, but at most
        MAX_START_OFFSET from the integer, so that no integer changes before training.
        """
        super().__init__()
        device, (_, K) = linear.weight.device, linear.weight.shape
        P = buffers["scales"].shape[1]
        self.stored, self.in_features, self.bias = buffers, K, linear.bias
        self.scales = buffers["scales"].to(device).float().unsqueeze(2)  # (N, P, 1)
        self.zeros = unpack_nibbles(buffers["zeros"].to(device))[:, :P].float().unsqueeze(2)
        q = unpack_nibbles(buffers["weight"].to(device)).float()
        q = q.unflatten(1, (P, -1))  # (N, P, S)
        weight = F.pad(linear.weight, (0, q[0].numel() - K)).view_as(q)  # padded to P*S inputs
        unrounded = weight / self.scales + self.zeros
        self.latent = nn.Parameter(q + (unrounded - q).clamp(-MAX_START_OFFSET, MAX_START_OFFSET))

    def integers(self) -> Tensor:
        """Return the rounded latents, 0 to 15, without a gradient."""
        return self.latent.detach().round().clamp(0, 15)  # (N, P, S)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x, (..., K), by the weights of the rounded latents -> (..., N)."""
        # The added difference is 0, but its gradient is 1: the latents get the integers' gradient.
        q = self.integers() + (self.latent - self.latent.detach())
        weight = ((q - self.zeros) * self.scales).flatten(1)[:, : self.in_features]
        return F.linear(x, weight, self.bias)

    def as_stored(self) -> Buffers:
        """Return the buffers of an Int4Linear with the trained integers, on the CPU."""
        return self.stored | {"weight": pack_nibbles(self.integers().flatten(1)).cpu()}


def latent_copy(
    model: Transformer, linears: dict[str, Buffers]
) -> tuple[Transformer, dict[str, LatentInt4]]:
    """Return a copy of the model with a LatentInt4 for each of `linears`, and these by name.

    The copy is the student. It shares all other tensors with the model, the teacher. linears: the
    int4 buffers of each linear, by its name in the model.
    """
    # deepcopy takes the tensors in its memo, `shared`, as copied already.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    latents = {name: LatentInt4(model.get_submodule(name), b) for name, b in linears.items()}
    for name, latent in latents.items():
        copied.set_submodule(name, latent)
    return copied, latents

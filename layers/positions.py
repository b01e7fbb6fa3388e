"""Positions: rotary, with the scalings for longer contexts, or learned. Start at POSITIONS.

Shapes: B rows of a batch, T new tokens per row, D dim, E head_dim.

Based on rotary positions (arXiv 2104.09864).
"""

import math

import torch
from torch import Tensor, nn

from layers.args import ModelArgs, RopeScaling
from layers.basic import Embedding, kernel, takes_kernel

# Cosine and sine, (B, T, 1, E/2) each. None: the model has learned positions.
Rotation = tuple[Tensor, Tensor] | None


class RotaryPositions(nn.Module):
    """Rotates each pair of query and key channels by an angle proportional to the position.

    The angle is the position times the pair's frequency; frequencies fall from 1 to about
    1 / rope_theta, before scaling.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        # Frequencies of the E/2 pairs of channels.
        # On the CPU even if the model is built on the meta device: no checkpoint stores them.
        channels = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
        freqs = 1.0 / args.rope_theta ** (channels / args.head_dim)  # (E/2,)
        if args.rope_scaling is not None:
            freqs = ROPE_SCALINGS[args.rope_scaling.kind](freqs, args.rope_scaling)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Rotation]:
        """Returns x unchanged, and the rotation of the tokens at pos, (B, T). lengths: see
        Transformer.forward; only DynamicRotaryPositions uses it."""
        # For the new positions only: a table for a context of 4M positions would take 2 GB.
        angles = pos[..., None, None] * self.frequencies(pos, lengths)  # (B, T, 1, E/2)
        if takes_kernel(angles):
            return x, torch.ops.gpt_flex.cos_sin(angles)
        return x, (angles.cos(), angles.sin())

    def frequencies(self, pos: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns rotary frequencies for the tokens at pos, (B, T): (E/2,), the same for all, or
        (B, T, 1, E/2), a set for each."""
        return self.freqs

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate x, queries or keys, (B, T, heads, E), by the rotation that forward returned, in
        float32. Channel i pairs with i + E/2, as in Hugging Face files."""
        cos, sin = rotation
        a, b = x.float().chunk(2, dim=-1)  # (B, T, heads, E/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class DynamicRotaryPositions(RotaryPositions):
    """Rotary positions whose frequencies depend on the length of a text that exceeds the trained
    context: the NTK scaling that transformers calls "dynamic".

    The tokens of a prompt use the frequencies for the length of the whole prompt; a generated token
    uses those for its position + 1. Keys in the caches keep the rotation they were stored with.
    """

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        scaling = args.rope_scaling
        # The arguments of ntk_freqs after `exponents`. The last is the trained context.
        self.settings = args.rope_theta, scaling.factor, scaling.original_context
        channels = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
        self.register_buffer("exponents", channels / args.head_dim, persistent=False)  # (E/2,)

    def frequencies(self, pos: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns the frequencies of the tokens at pos, (B, T): (B, T, 1, E/2). lengths: (B, 1), of
        the whole prompts; None while tokens are generated."""
        length = pos + 1 if lengths is None else torch.maximum(pos + 1, lengths)  # (B, T)
        stretch = torch.ops.gpt_flex.ntk_freqs if takes_kernel(length) else ntk_freqs
        longer = length[..., None, None] > self.settings[-1]  # (B, T, 1, 1)
        return torch.where(longer, stretch(length, self.exponents, *self.settings), self.freqs)


class LearnedPositions(Embedding):
    """Adds a learned vector for the position to each embedding; rotates nothing (OPT).

    It has the interface of RotaryPositions; the rotation is None.
    """

    OFFSET = 2  # OPT's tables begin with two rows that no position uses

    def __init__(self, args: ModelArgs):
        super().__init__(args.context + self.OFFSET, args.dim)

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Rotation]:
        """Returns x, (B, T, D), plus the vectors of pos, (B, T); and None. lengths: not used."""
        return x + super().forward(pos + self.OFFSET), None

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation) -> Tensor:
        return x


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def ntk_freqs(
    length: Tensor, exponents: Tensor, theta: float, factor: float, context: int
) -> Tensor:
    """Returns the frequencies, (B, T, 1, E/2), for texts of the lengths `length`, (B, T).

    The base grows so that the slowest channel turns as far as it did over the trained context.
    exponents: (E/2,), the channel's index over E. theta: the base of the trained model. factor:
    RopeScaling.factor. context: the trained one. For lengths up to it the result is not used.
    """
    E = 2 * len(exponents)
    base = theta * (factor * length / context - (factor - 1)) ** (E / (E - 2))  # (B, T)
    return 1.0 / base[..., None, None] ** exponents  # (B, T, 1, E/2)


# On a CPU, Inductor's own cosines and powers differ in the last bit.
kernel(
    "cos_sin(Tensor angles) -> (Tensor, Tensor)",
    cos_sin,
    lambda angles: (torch.empty_like(angles), torch.empty_like(angles)),
)
kernel(
    "ntk_freqs(Tensor length, Tensor exponents, float theta, float factor, int context) -> Tensor",
    ntk_freqs,
    lambda length, exponents, *_: exponents.new_empty(*length.shape, 1, len(exponents)),
)


def scale_linear(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide all frequencies by `factor`: linear interpolation (arXiv 2306.15595)."""
    return freqs / scaling.factor


def scale_llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between (Llama 3.1).

    A frequency is low if it makes at most low_freq_factor turns in the trained context, and high
    from high_freq_factor turns on. freqs: (E/2,).
    """
    turns = scaling.original_context * freqs / (2 * math.pi)  # full turns in the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # The weight of the original frequency: 0 for low ones, 1 for high ones.
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / scaling.factor)


POSITIONS = {
    "rotary": RotaryPositions,
    "dynamic": DynamicRotaryPositions,
    "learned": LearnedPositions,
}
ROPE_SCALINGS = {
    "linear": scale_linear,
    "llama3": scale_llama3,
    "dynamic": lambda freqs, scaling: freqs,  # see DynamicRotaryPositions
}

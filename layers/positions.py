"""Positions: rotary, with the scalings for longer contexts, or learned. Start at POSITIONS.

Rotary positions rotate each pair of query and key channels by an angle: the position times the
pair's frequency. Frequencies fall from 1 to about 1 / theta. ROPES lists the ways to scale them for
texts that are longer than those of the training.

Shapes: B rows of a batch, T new tokens per row, D dim, E head_dim, P pairs of rotated channels.

Sources: rotary positions, arXiv 2104.09864; linear interpolation, 2306.15595; yarn, 2309.00071;
longrope, 2402.13753.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.args import ModelArgs, Rope
from layers.basic import Embedding, calls_operator, define_operator

# Cosine and sine of each token's angles, (B, T, 1, P) each. None: the model has learned positions.
Rotation = tuple[Tensor, Tensor] | None


class RotaryPositions(nn.Module):
    """Computes the rotations of the tokens of a step: one for each of the model's ropes."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.ropes = nn.ModuleList(ROPES[rope.kind](rope) for rope in args.ropes)

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Rotation]]:
        """Returns x unchanged (LearnedPositions changes it), and the rotations of the tokens at
        pos, (B, T), in the order of ModelArgs.ropes. lengths: (B, 1), tokens of each row's whole
        prompt; None while tokens are generated."""
        return x, [rope(pos, lengths) for rope in self.ropes]

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the first 2P channels of x, queries or keys, (B, T, heads, E), by a rotation that
        forward returned, in float32. Channel i pairs with i + P, as in Hugging Face files."""
        cos, sin = rotation
        P = cos.shape[-1]
        # a and b: (B, T, heads, P), rest: (B, T, heads, E - 2P)
        a, b, rest = x.float().split((P, P, x.shape[-1] - 2 * P), dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).type_as(x)


class LearnedPositions(Embedding):
    """Adds a learned vector for the position to each embedding; rotates nothing (OPT).

    It has the interface of RotaryPositions, with an empty list of rotations.
    """

    OFFSET = 2  # OPT's tables begin with two rows that no position uses

    def __init__(self, args: ModelArgs):
        super().__init__(args.context + self.OFFSET, args.dim)

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Rotation]]:
        """Returns x, (B, T, D), plus the vectors of pos, (B, T); and no rotations. lengths: not
        used."""
        return x + super().forward(pos + self.OFFSET), []

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation) -> Tensor:
        """Returns the queries or keys x unchanged; rotation is None."""
        return x


class FixedRope(nn.Module):
    """Rotary positions whose frequencies are the same for all texts."""

    def __init__(self, rope: Rope):
        super().__init__()
        self.attention_factor = rope.attention_factor
        # On the CPU even if the model is built on the meta device: checkpoints have no frequencies,
        # so no later step would fill them in.
        freqs = FREQUENCIES[rope.kind](plain_freqs(rope), rope)  # (P,)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, pos: Tensor, lengths: Tensor | None = None) -> Rotation:
        """Returns cosine and sine of the tokens at pos, (B, T), times attention_factor: (B, T, 1,
        P) each. lengths: see RotaryPositions.forward."""
        # Angles of the new positions only: a table for a context of 4M positions would take 2 GB.
        angles = pos[..., None, None] * self.frequencies(pos, lengths)  # (B, T, 1, P)
        compute = torch.ops.gpt_flex.cos_sin if calls_operator(angles) else cos_sin
        return compute(angles, self.attention_factor)

    def frequencies(self, pos: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns the frequencies of the tokens at pos, (B, T): (P,), the same for all, or
        (B, T, 1, P), a set for each."""
        return self.freqs


class LengthRope(FixedRope):
    """Rotary positions with other frequencies for texts that exceed the trained context.

    The tokens of a prompt use the frequencies for the length of the whole prompt; a generated token
    uses those for the text up to and including it. Keys in the caches keep the rotation that they
    were stored with; with Rope.recompute, engine.generate computes them all again when a text grows
    beyond the trained context.
    """

    def __init__(self, rope: Rope):
        super().__init__(rope)
        self.original_context = rope.original_context

    def frequencies(self, pos: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns the frequencies of the tokens at pos, (B, T): (B, T, 1, P). lengths: see
        RotaryPositions.forward."""
        # (B, T). Every token of a prompt has pos < lengths, so its length is the prompt's. Only
        # padding has pos >= lengths; its result is not used.
        length = pos + 1 if lengths is None else torch.maximum(pos + 1, lengths)
        longer = length[..., None, None] > self.original_context  # (B, T, 1, 1)
        return torch.where(longer, self.long_freqs(length), self.freqs)

    def long_freqs(self, length: Tensor) -> Tensor:
        """Returns the frequencies for texts beyond the trained context: (P,), or (B, T, 1, P) if
        they depend on the length. length: (B, T), that of each token's text; the result for shorter
        texts is not used."""
        raise NotImplementedError


class DynamicRope(LengthRope):
    """The NTK scaling, "dynamic" in transformers: beyond the trained context, frequencies fall with
    the text's length; see ntk_freqs."""

    def __init__(self, rope: Rope):
        super().__init__(rope)
        # The arguments of ntk_freqs after `exponents`.
        self.settings = rope.theta, rope.factor, rope.original_context
        self.register_buffer("exponents", exponents(rope), persistent=False)  # (P,)

    def long_freqs(self, length: Tensor) -> Tensor:
        """Returns (B, T, 1, P), see LengthRope."""
        compute = torch.ops.gpt_flex.ntk_freqs if calls_operator(length) else ntk_freqs
        return compute(length, self.exponents, *self.settings)


class LongRope(LengthRope):
    """Two sets of frequencies: for texts up to the trained context (short_factors, FREQUENCIES),
    and for longer ones (long_factors, here)."""

    def __init__(self, rope: Rope):
        super().__init__(rope)
        self.register_buffer("long_set", divided_freqs(rope, rope.long_factors), persistent=False)

    def long_freqs(self, length: Tensor) -> Tensor:
        """Returns (P,): one set for all lengths."""
        return self.long_set


def same_rotations(args: ModelArgs, one: int, other: int) -> bool:
    """Returns whether the keys of tokens that two texts share are rotated alike in both.

    one, other: the lengths of the texts. Only a LengthRope depends on them, and only if a text
    exceeds the trained context. With Rope.recompute (a LongRope), any two texts beyond the trained
    context are rotated alike. Without it, the rotations also depend on the length and on which
    tokens were generated, so even two texts of equal length may differ.
    """
    for rope in args.ropes:
        if issubclass(ROPES[rope.kind], LengthRope):
            beyond = [length > rope.original_context for length in (one, other)]
            if any(beyond) and not (rope.recompute and all(beyond)):
                return False
    return True


def exponents(rope: Rope) -> Tensor:
    """Returns the exponents of theta, (P,), from 0 to almost 1: the plain frequency of a pair is
    1 / theta ** exponent."""
    return torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim


def plain_freqs(rope: Rope) -> Tensor:
    """Returns the frequencies without scaling, (P,) float32, on the CPU."""
    return 1.0 / rope.theta ** exponents(rope)


def divided_freqs(rope: Rope, divisors: Sequence[float]) -> Tensor:
    """Returns the plain frequencies, each divided by its own divisor: (P,) float32, on the CPU."""
    # Not plain_freqs(rope) / divisors, whose last bit may differ from that of transformers: the
    # difference of the angles grows with the position.
    return 1.0 / (torch.tensor(divisors, device="cpu") * rope.theta ** exponents(rope))


def scale_linear(freqs: Tensor, rope: Rope) -> Tensor:
    """Divide all frequencies, (P,), by `factor`: linear interpolation."""
    return freqs / rope.factor


def scale_llama3(freqs: Tensor, rope: Rope) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between (Llama 3.1).

    A frequency is low if it makes at most low_freq_factor turns in the trained context, and high
    from high_freq_factor turns on. freqs: (P,).
    """
    turns = rope.original_context * freqs / (2 * math.pi)  # full turns in the trained context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    # The weight of the original frequency: 0 for low ones, 1 for high ones.
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / rope.factor)


def scale_yarn(freqs: Tensor, rope: Rope) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between (yarn).

    Between are the pairs that make beta_fast to beta_slow full turns in the trained context; the
    weights of the interpolation are linear in the pair's index. freqs: (P,).
    """
    # The indices, as fractions, of the pairs that make beta_fast and beta_slow turns.
    first, last = (
        rope.dim / 2 * math.log(rope.original_context / (turns * 2 * math.pi), rope.theta)
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)  # not dim / 2 - 1: as in transformers
    # With equal bounds the interpolation would be 0 / 0. transformers adds 0.001, too.
    last = last if first != last else last + 0.001
    pairs = torch.arange(len(freqs), dtype=torch.float32, device="cpu")  # (P,)
    # The weight of the divided frequency: 0 for high ones, 1 for low ones.
    scaled = ((pairs - first) / (last - first)).clamp(0, 1)
    return freqs / rope.factor * scaled + freqs * (1 - scaled)


def cos_sin(angles: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Returns the cosines and the sines of angles, times `factor`, in the shape of angles."""
    return angles.cos() * factor, angles.sin() * factor


def ntk_freqs(
    length: Tensor, exponents: Tensor, theta: float, factor: float, context: int
) -> Tensor:
    """Returns the frequencies, (B, T, 1, P), for texts of the lengths `length`, (B, T).

    The base grows so that the slowest channel turns as far as it did over the trained context.
    exponents: (P,). theta: the base of the trained model. factor: Rope.factor. context: the trained
    one. For lengths up to it the result is not used.
    """
    dim = 2 * len(exponents)
    base = theta * (factor * length / context - (factor - 1)) ** (dim / (dim - 2))  # (B, T)
    return 1.0 / base[..., None, None] ** exponents  # (B, T, 1, P)


# On a CPU, Inductor's own cosines and powers differ in the last bit; see define_operator.
define_operator(
    "cos_sin(Tensor angles, float factor) -> (Tensor, Tensor)",
    cos_sin,
    lambda angles, factor: (torch.empty_like(angles), torch.empty_like(angles)),
)
define_operator(
    "ntk_freqs(Tensor length, Tensor exponents, float theta, float factor, int context) -> Tensor",
    ntk_freqs,
    lambda length, exponents, *_: exponents.new_empty(*length.shape, 1, len(exponents)),
)

# ModelArgs.positions -> the class of Transformer.positions.
POSITIONS = {"rotary": RotaryPositions, "learned": LearnedPositions}
# Rope.kind -> the class that computes the rotation.
ROPES = {
    "default": FixedRope,
    "none": FixedRope,
    "linear": FixedRope,
    "llama3": FixedRope,
    "yarn": FixedRope,
    "dynamic": DynamicRope,
    "longrope": LongRope,
}
# Rope.kind -> function of the plain frequencies, (P,), and the rope: the frequencies, (P,), for
# texts up to the trained context or, if the kind does not depend on the length, for all texts.
FREQUENCIES = {
    "default": lambda freqs, rope: freqs,
    "none": lambda freqs, rope: freqs * 0,  # no rotation: cosine 1, sine 0
    "linear": scale_linear,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "dynamic": lambda freqs, rope: freqs,
    "longrope": lambda freqs, rope: divided_freqs(rope, rope.short_factors),
}

"""From logits to the next token: what may be drawn, and the draw.

Start at GenerationConfig, the one source of defaults for everything that generates. `Sampler`
joins the two halves, which speculation needs apart: `distribution` gives the probabilities that
the config allows, `draw` turns one uniform number per row into a token.

A row draws from a random stream of its own, made from the seed and the row's number: its text
does not depend on which rows share its batch, on the batch's size or on compilation.

Sources: nucleus sampling (arXiv 1904.09751), min-p (2407.01082); the order in which filters
apply (temperature, top-k, top-p, min-p) is that of transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError for a value outside its range."""

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 200  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    min_p: float = 0.0  # drop what is less than min_p times as likely as the likeliest
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end a text and are not part of it
    ignore_eos: bool = False

    def __post_init__(self):
        for name, holds, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r} and must be {wanted}")


class Sampler:
    """Draws step after step for the rows of one batch.

    rows: the number of each row's random stream. All of a row's random numbers are drawn at once
    and up front, so that no step waits for the host.
    """

    def __init__(self, config: GenerationConfig, rows: Sequence[int], device: torch.device):
        self.config = config
        # numpy's streams, as torch's CPU generator takes no more than 32 bits of a seed.
        streams = [np.random.default_rng((config.seed, row)) for row in rows]
        uniforms = [stream.random(config.max_new_tokens, dtype=np.float32) for stream in streams]
        self.uniforms = torch.from_numpy(np.stack(uniforms)).to(device)  # (B, max_new_tokens)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """The tokens of a step: (B, V) -> (B,)."""
        if self.config.temperature == 0:
            return logits.max(dim=-1).indices  # in bfloat16 four times as fast as argmax
        return draw(distribution(logits, self.config), self.uniforms[:, step])


def distribution(logits: Tensor, config: GenerationConfig) -> Tensor:
    """What may be drawn, with which probability: (..., V) -> (..., V) in float32.

    The likeliest token always may. A temperature of 0 gives it all the probability.
    """
    logits = logits.float()
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[..., -1:]  # (..., 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        descending, order = logits.sort(dim=-1, descending=True)
        probabilities = descending.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities  # the mass before each; first: 0
        dropped = likelier >= config.top_p
        dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
        logits = logits.masked_fill(dropped, -torch.inf)
    probabilities = logits.softmax(-1)
    if config.min_p > 0:
        least = config.min_p * probabilities.amax(-1, keepdim=True)  # (..., 1)
        kept = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the summed probabilities reach a share of 1 - u: (..., V), (...) -> (...).

    1 - u lies in (0, 1]: above 0, so that no token of probability 0 is drawn, and at most 1, so
    that rounding never asks for more than the sum.
    """
    reached = probabilities.cumsum(-1)  # (..., V)
    wanted = (1 - uniforms).unsqueeze(-1) * reached[..., -1:]  # (..., 1)
    return torch.searchsorted(reached, wanted).squeeze(-1)

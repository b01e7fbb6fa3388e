"""Logits processors: logit biases, penalties and the caller's functions, before sampling.

Start at LogitsProcessors, which a Sampler (sampling.py) has only if the config changes logits. It
keeps the ids of every row on the device, so that the host never waits. A position sees only the ids
before it, so several draft tokens are verified in one call.

The order is that of transformers: bias, repetition penalty, frequency and presence penalty, the
caller's functions; then, in sampling.py, temperature and filters.

Shapes: B rows, T positions that are sampled at once, L the longest text in ids, V vocabulary.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from text.generation_config import GenerationConfig

# (ids (N, L), float32 logits (N, V)) -> logits (N, V), for N texts of the same length L, prompt
# included. The logits processors of transformers are such functions.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class LogitsProcessors:
    """Changes the logits of one batch of prompts.

    functions: called in this order. They must depend on their arguments alone, because they also
    see draft tokens that are rejected later, and rows in any order.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Sequence[Sequence[int]],
        functions: Sequence[LogitsProcessor],
        device: torch.device,
    ):
        self.config, self.functions = config, functions
        L = max(map(len, prompts)) + config.max_new_tokens
        padded = [[*prompt, *[0] * (L - len(prompt))] for prompt in prompts]
        self.ids = torch.tensor(padded, device=device)  # (B, L)
        self.prompt_lengths = torch.tensor([[len(p)] for p in prompts], device=device)  # (B, 1)
        biases = list(zip(*config.logit_bias, strict=True)) or [(), ()]
        self.biased_ids = torch.tensor(biases[0], dtype=torch.long, device=device)
        self.biases = torch.tensor(biases[1], dtype=torch.float32, device=device)

    def part(self, rows: Tensor) -> "LogitsProcessors":
        """Return processors for some rows of the batch; rows: (B,)."""
        part = copy.copy(self)
        part.ids, part.prompt_lengths = self.ids[rows], self.prompt_lengths[rows]
        return part

    def write(self, tokens: Tensor, numbers: Tensor) -> None:
        """Store new tokens, (B, T); numbers, (B, T): the index of each among its row's new ids."""
        # Only tokens beyond the end of a row are clamped.
        positions = (self.prompt_lengths + numbers).clamp_max(self.ids.shape[1] - 1)
        self.ids.scatter_(1, positions, tokens)

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Return the changed logits in float32: (B, T, V) -> (B, T, V); numbers as in write."""
        config, logits = self.config, logits.to(torch.float32, copy=True)
        if len(self.biased_ids):
            logits[..., self.biased_ids] += self.biases
        positions = torch.arange(self.ids.shape[1], device=logits.device)
        earlier = positions < (self.prompt_lengths + numbers).unsqueeze(-1)  # (B, T, L)
        if config.repetition_penalty != 1:
            penalty = config.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._counts(earlier, logits) > 0, penalised, logits)
        if config.frequency_penalty or config.presence_penalty:
            counts = self._counts(earlier & (positions >= self.prompt_lengths).unsqueeze(1), logits)
            logits -= config.frequency_penalty * counts
            logits -= config.presence_penalty * (counts > 0)
        return self._call_functions(logits, numbers) if self.functions else logits

    def _counts(self, mask: Tensor, logits: Tensor) -> Tensor:
        """Count each id at the positions where mask, (B, T, L), is true: (B, T, V)."""
        ids = self.ids.unsqueeze(1).expand_as(mask)  # (B, T, L)
        return torch.zeros_like(logits).scatter_add_(2, ids, mask.to(logits.dtype))

    def _call_functions(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Call the functions once for all texts of each length, so that none is padded. With a GPU
        the host waits here."""
        B, T, V = logits.shape
        logits = logits.view(B * T, V)
        indices = defaultdict(list)  # by length
        for index, length in enumerate((self.prompt_lengths + numbers).flatten().tolist()):
            indices[length].append(index)
        for length, same_length in indices.items():
            at = torch.tensor(same_length, device=logits.device)  # (N,)
            ids, given = self.ids[at // T, :length], logits[at]  # (N, L), (N, V)
            for function in self.functions:
                given = checked(function, function(ids, given), given)
            logits[at] = given
        return logits.view(B, T, V)


def checked(function: LogitsProcessor, made: Tensor, given: Tensor) -> Tensor:
    """Return the logits that a function made, or raise ValueError if they are no logits."""
    if isinstance(made, Tensor) and made.shape == given.shape and made.is_floating_point():
        return made.float()
    what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
    name = getattr(function, "__name__", type(function).__name__)
    raise ValueError(
        f"the logits processor {name} returned {what} for logits of shape {tuple(given.shape)}: it "
        "must return floating-point logits of the same shape"
    )

"""What changes logits before a token is drawn: biases, penalties, and functions of the caller's.

Start at LogitsProcessors, which a Sampler (sampling.py) has only where there is something to change. It
keeps the ids of every row on the device, as the KV caches keep keys: a draw sees the ids in the
slots before its own. So the host waits for nothing, and the guesses of a draft are checked, several
positions at once, each with the ids that stand before it.

The order is that of transformers: bias, repetition penalty, frequency and presence penalty, the
caller's functions; then, in sampling.py, temperature and filters.

Shapes: B rows, T positions that are drawn at once, L slots of ids, V vocab.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from text.generation_config import GenerationConfig

# Ids so far, (N, L), and float32 logits, (N, V) -> logits, (N, V): of N texts of the same length L,
# prompt included. LogitsProcessors of transformers are such functions.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class LogitsProcessors:
    """Changes the logits of one batch, whose prompts are given.

    functions: called in this order. They must depend on what they are given alone: a draft's
    guesses that turn out wrong are shown to them too, and rows come in any order.
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
        self.starts = torch.tensor([[len(p)] for p in prompts], device=device)  # (B, 1)
        biases = list(zip(*config.logit_bias, strict=True)) or [(), ()]
        self.biased = torch.tensor(biases[0], dtype=torch.long, device=device)
        self.biases = torch.tensor(biases[1], dtype=torch.float32, device=device)

    def part(self, rows: Tensor) -> "LogitsProcessors":
        """The same for some rows, (B,)."""
        part = copy.copy(self)
        part.ids, part.starts = self.ids[rows], self.starts[rows]
        return part

    def write(self, tokens: Tensor, numbers: Tensor) -> None:
        """Keep the tokens of those numbers in their row, 0 for the first: (B, T) each."""
        slots = (self.starts + numbers).clamp_max(self.ids.shape[1] - 1)  # beyond a row's end only
        self.ids.scatter_(1, slots, tokens)

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Logits for the tokens of those numbers: (B, T, V), (B, T) -> (B, T, V) in float32."""
        config, logits = self.config, logits.to(torch.float32, copy=True)
        if len(self.biased):
            logits[..., self.biased] += self.biases
        slots = torch.arange(self.ids.shape[1], device=logits.device)
        earlier = slots < (self.starts + numbers).unsqueeze(-1)  # (B, T, L)
        if config.repetition_penalty != 1:
            penalty = config.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._counts(earlier, logits) > 0, penalised, logits)
        if config.frequency_penalty or config.presence_penalty:
            counts = self._counts(earlier & (slots >= self.starts).unsqueeze(1), logits)
            logits -= config.frequency_penalty * counts
            logits -= config.presence_penalty * (counts > 0)
        return self._call_functions(logits, numbers) if self.functions else logits

    def _counts(self, slots: Tensor, logits: Tensor) -> Tensor:
        """How often each id stands in those slots, (B, T, L): (B, T, V)."""
        ids = self.ids.unsqueeze(1).expand_as(slots)
        return torch.zeros_like(logits).scatter_add_(2, ids, slots.to(logits.dtype))

    def _call_functions(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Call the functions once for all texts of one length, so that nothing is padded. On a GPU
        the host waits here."""
        B, T, V = logits.shape
        logits = logits.view(B * T, V)
        places = defaultdict(list)  # of each length
        for place, length in enumerate((self.starts + numbers).flatten().tolist()):
            places[length].append(place)
        for length, some in places.items():
            at = torch.tensor(some, device=logits.device)  # (N,)
            ids, given = self.ids[at // T, :length], logits[at]  # (N, L), (N, V)
            for function in self.functions:
                given = checked(function, function(ids, given), given)
            logits[at] = given
        return logits.view(B, T, V)


def checked(function: LogitsProcessor, made: Tensor, given: Tensor) -> Tensor:
    """What a function made of given logits; ValueError where that cannot be logits."""
    if isinstance(made, Tensor) and made.shape == given.shape and made.is_floating_point():
        return made.float()
    what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
    name = getattr(function, "__name__", type(function).__name__)
    raise ValueError(
        f"the logits processor {name} returned {what} for logits of shape {tuple(given.shape)}: it "
        "must return floating-point logits of the same shape"
    )

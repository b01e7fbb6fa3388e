"""Logits processors: logit biases, penalties and the caller's functions, before sampling.

Start at LogitsProcessors, which a Sampler (sampling.py) has only if the config changes logits or
the caller gives functions. It keeps the ids of every row on the device, so that the host need not
wait for the ids of a step; only the caller's functions make it wait. A position sees only the ids
before it, so several draft tokens are verified in one call.

The order is that of transformers: bias, repetition penalty, frequency and presence penalty, the
caller's functions; then, in sampling.py, temperature and filters.

Words: a row is one text of the batch; draft tokens are guesses of speculative decoding, which the
model accepts or rejects; a filter (top_k, top_p, min_p) excludes unlikely tokens.

Shapes: B rows, T positions that are sampled in one call, L ids that each row has capacity for, V
ids of the vocabulary, N a part of the rows or positions.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from text.generation_config import GenerationConfig

# (ids (N, L), float32 logits (N, V)) -> logits (N, V), for N texts of the same length L, prompt
# included. The logits processors of transformers are such functions.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class LogitsProcessors:
    """Changes the logits of one batch of prompts before sampling.

    It stores the ids of each row: the prompt's, then the new ids that `write` adds. functions: of
    the caller, called in this order after biases and penalties. Their result must depend on their
    arguments only, because they also get draft tokens that are rejected later, and rows in any
    order.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Sequence[Sequence[int]],
        functions: Sequence[LogitsProcessor],
        device: torch.device,
    ):
        """Store the prompts, and reserve room for config.max_new_tokens new ids after each.

        prompts: the ids of each row's prompt. device: of the logits.
        """
        self.config, self.functions = config, functions
        L = max(map(len, prompts)) + config.max_new_tokens
        # Id 0 after the end of a text is padding: the masks in __call__ exclude it.
        padded = [[*prompt, *[0] * (L - len(prompt))] for prompt in prompts]
        self.ids = torch.tensor(padded, device=device)  # (B, L)
        self.prompt_lengths = torch.tensor([[len(p)] for p in prompts], device=device)  # (B, 1)
        biases = list(zip(*config.logit_bias, strict=True)) or [(), ()]  # ids, and their biases
        self.biased_ids = torch.tensor(biases[0], dtype=torch.long, device=device)
        self.biases = torch.tensor(biases[1], dtype=torch.float32, device=device)

    def part(self, rows: Tensor) -> "LogitsProcessors":
        """Return the processors of a part of the batch, for Sampler.select_rows. rows: (N,),
        the indices in the batch of the part's rows. The stored ids are copied, so a later `write`
        changes only one of the two objects."""
        part = copy.copy(self)
        part.ids, part.prompt_lengths = self.ids[rows], self.prompt_lengths[rows]
        return part

    def write(self, tokens: Tensor, numbers: Tensor) -> None:
        """Store new ids, `tokens`, (B, T), after they were sampled or drafted. numbers: (B, T), the
        index of each among its row's new ids. Rejected draft tokens are overwritten later."""
        # Only draft tokens beyond max_new_tokens are clamped; they are never returned.
        positions = (self.prompt_lengths + numbers).clamp_max(self.ids.shape[1] - 1)
        self.ids.scatter_(1, positions, tokens)

    def __call__(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Return the changed logits, (B, T, V), in float32; `logits` stay as they are.

        logits: (B, T, V). numbers: (B, T), the index among its row's new ids of the token that is
        sampled from these logits. The ids before this token must have been written: penalties
        depend on them. Only the repetition penalty counts the prompt's ids, too.
        """
        config, logits = self.config, logits.to(torch.float32, copy=True)
        if len(self.biased_ids):
            logits[..., self.biased_ids] += self.biases
        positions = torch.arange(self.ids.shape[1], device=logits.device)
        is_earlier = positions < (self.prompt_lengths + numbers).unsqueeze(-1)  # (B, T, L)
        if config.repetition_penalty != 1:
            penalty = config.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._counts(is_earlier, logits) > 0, penalised, logits)
        if config.frequency_penalty or config.presence_penalty:
            is_new = (positions >= self.prompt_lengths).unsqueeze(1)  # (B, 1, L)
            counts = self._counts(is_earlier & is_new, logits)
            logits -= config.frequency_penalty * counts
            logits -= config.presence_penalty * (counts > 0)
        return self._call_functions(logits, numbers) if self.functions else logits

    def _counts(self, mask: Tensor, logits: Tensor) -> Tensor:
        """Return (B, T, V): how often each id of the vocabulary stands in the row, at the positions
        where mask, (B, T, L), is true. logits: (B, T, V), for shape and dtype of the result."""
        ids = self.ids.unsqueeze(1).expand_as(mask)  # (B, T, L)
        return torch.zeros_like(logits).scatter_add_(2, ids, mask.to(logits.dtype))

    def _call_functions(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Return logits, (B, T, V), changed by the caller's functions. logits are overwritten.

        A function gets only texts of one length in a call, because padding could change its result,
        and is called once for each length that occurs. With a GPU the host waits for the lengths.
        """
        B, T, V = logits.shape
        logits = logits.view(B * T, V)
        indices = defaultdict(list)  # length of a text -> its indices in B * T
        for index, length in enumerate((self.prompt_lengths + numbers).flatten().tolist()):
            indices[length].append(index)
        for length, same_length in indices.items():
            at = torch.tensor(same_length, device=logits.device)  # (N,); at // T: their rows
            ids, changed = self.ids[at // T, :length], logits[at]  # (N, L), (N, V)
            for function in self.functions:
                changed = checked(function, function(ids, changed), changed)
            logits[at] = changed
        return logits.view(B, T, V)


def checked(function: LogitsProcessor, result: Any, logits: Tensor) -> Tensor:
    """Return the result of a logits processor in float32. Raises ValueError, naming the processor,
    unless the result is a floating-point tensor of the shape of `logits`, the processor's
    argument."""
    if isinstance(result, Tensor) and result.shape == logits.shape and result.is_floating_point():
        return result.float()
    what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    name = getattr(function, "__name__", type(function).__name__)
    raise ValueError(
        f"the logits processor {name} returned {what} for logits of shape {tuple(logits.shape)}: "
        "it must return floating-point logits of the same shape"
    )

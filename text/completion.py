"""The text of one sequence while its ids are generated: decoded, and cut at a stop string.

Start at Completion.extend. Stop strings are searched in the text with the names of special tokens,
as transformers' stop_strings and lm_eval's `until` are; the text that a caller gets omits those
names.
"""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from text.generation_config import GenerationConfig

if TYPE_CHECKING:
    from sampling import Logprobs
    from text.tokenizer import Tokenizer


class Completion:
    """The continuation of one prompt, which grows while the model generates.

    ids: all new ids, with the EOS that ended the text. text: the characters that are final.
    finish_reason, once the text has ended: "eos", "stop" (a stop string), "length" (max_new_tokens,
    or the context is full: see context_full) or "interrupted". logprobs: one entry for each id, if
    the config asks for them.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], config: GenerationConfig):
        self.ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.text = ""
        self.finish_reason = "length"
        self._config, self._tokenizer = config, tokenizer
        self._eos_ids = () if config.ignore_eos else tokenizer.eos_ids
        self._stream = tokenizer.stream(prompt)
        # Characters that may begin a stop string, with the names of special tokens; and for each
        # character whether it is text and not part of such a name.
        self._pending = ""
        self._is_text: list[bool] = []

    @property
    def context_full(self) -> bool:
        """Whether the text ended because the context, or the KV cache, is full."""
        return self.finish_reason == "length" and len(self.ids) < self._config.max_new_tokens

    def logprobs_json(self) -> list[dict[str, Any]]:
        """Return for each id its text, its log-probability and the most likely ids, as JSON."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"id": token, "token": self._tokenizer.id_to_text(token), "logprob": logprob}

        return [
            entry(token, scored.logprob) | {"top": [entry(*pair) for pair in scored.top]}
            for token, scored in zip(self.ids, self.logprobs, strict=True)
        ]

    def extend(self, ids: Iterable[int]) -> str:
        """Add ids up to the one that ends the text; return the new characters that are final."""
        start = len(self.text)
        for token in ids:
            if self.finish_reason != "length":
                break  # a step of several ids may go beyond the end
            self.ids.append(int(token))
            if self._config.logprobs is not None:
                self.logprobs.append(token.logprobs)
            self._take(self._stream.push(token), self._stream.special_name(token))
            if token in self._eos_ids and self.finish_reason != "stop":
                self.finish_reason = "eos"
        return self.text[start:]

    def close(self, reason: str | None = None) -> str:
        """End the text and return the characters that were pending.

        reason: the finish_reason, unless a stop string or EOS has ended the text.
        """
        start = len(self.text)
        if self.finish_reason != "stop":
            self._take(self._stream.flush())
        if self.finish_reason != "stop":
            self._release(len(self._pending))
            self.finish_reason = reason or self.finish_reason
        return self.text[start:]

    def _take(self, text: str, special_name: str = "") -> None:
        """Append text and the name of a special token; release what cannot begin a stop string."""
        self._pending += text + special_name
        self._is_text += [True] * len(text) + [False] * len(special_name)
        stops = self._config.stop
        found = [at for stop in stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.finish_reason, final = "stop", min(found)
        else:
            begun = max((overlap(stop, self._pending) for stop in stops), default=0)
            final = len(self._pending) - begun
        self._release(final)

    def _release(self, count: int) -> None:
        """Move the first `count` pending characters to the text, without special tokens."""
        self.text += "".join(compress(self._pending[:count], self._is_text))
        self._pending, self._is_text = self._pending[count:], self._is_text[count:]


def overlap(stop: str, text: str) -> int:
    """Return the length of the longest proper prefix of `stop` that the text ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

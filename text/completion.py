"""The text of one row as its ids come in: decoded, and cut at the first stop string.

Start at Completion.extend. A stop string is searched for in the text in which special tokens are
spelled out, as in transformers' stop_strings and lm_eval's until; what is shown leaves them out.
"""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

from sampling import Logprobs
from text.generation_config import GenerationConfig
from text.tokenizer import Tokenizer


class Completion:
    """The continuation of one prompt, as it grows.

    ids include the one that ended the text. finish_reason, once it has ended: "eos", "stop" (a stop
    string), "length" (max_new_tokens or, see context_full, the context) or "interrupted". logprobs:
    of each id, where the config asks for them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig):
        self.ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.text = ""
        self.finish_reason = "length"
        self._config, self._tokenizer = config, tokenizer
        self._ends = () if config.ignore_eos else tokenizer.eos_ids
        self._stream = tokenizer.stream(prompt)
        self._held = ""  # spelled text that may turn out to begin a stop string
        self._shown: list[bool] = []  # whether each of its characters is text, and no special token

    @property
    def context_full(self) -> bool:
        """Whether the text ended since the context, or the given caches, can hold no more."""
        return self.finish_reason == "length" and len(self.ids) < self._config.max_new_tokens

    def logprobs_json(self) -> list[dict[str, Any]]:
        """logprobs as JSON: for each id its text, its log probability, and the likeliest ids."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"id": token, "token": self._tokenizer.spelled(token), "logprob": logprob}

        return [
            entry(token, scored.logprob) | {"top": [entry(*pair) for pair in scored.top]}
            for token, scored in zip(self.ids, self.logprobs, strict=True)
        ]

    def extend(self, ids: Iterable[int]) -> str:
        """Add ids, up to what ends the text; returns what is now certain and can be shown."""
        start = len(self.text)
        for token in ids:
            if self.finish_reason != "length":
                break  # what was generated beyond is no part of the answer
            self.ids.append(int(token))
            if self._config.logprobs is not None:
                self.logprobs.append(token.logprobs)
            self._take(self._stream.push(token), self._stream.special(token))
            if token in self._ends and self.finish_reason != "stop":
                self.finish_reason = "eos"
        return self.text[start:]

    def close(self, reason: str | None = None) -> str:
        """Nothing follows: returns what was held back. reason: why, if the ids do not say so."""
        start = len(self.text)
        if self.finish_reason != "stop":
            self._take(self._stream.flush())
        if self.finish_reason != "stop":
            self._release(len(self._held))
            self.finish_reason = reason or self.finish_reason
        return self.text[start:]

    def _take(self, text: str, special: str = "") -> None:
        """Hold text and a special token's name; release what cannot begin a stop string."""
        self._held += text + special
        self._shown += [True] * len(text) + [False] * len(special)
        stops = self._config.stop
        found = [at for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.finish_reason, certain = "stop", min(found)
        else:
            begun = max((overlap(stop, self._held) for stop in stops), default=0)
            certain = len(self._held) - begun
        self._release(certain)

    def _release(self, count: int) -> None:
        """The first `count` held characters are certain."""
        self.text += "".join(compress(self._held[:count], self._shown))
        self._held, self._shown = self._held[count:], self._shown[count:]


def overlap(stop: str, text: str) -> int:
    """How many characters of `stop` the text ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

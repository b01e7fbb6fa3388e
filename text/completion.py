"""The text of one sequence while its ids are generated: decoded, and cut at a stop string.

Start at Completion.extend. A stop string may contain the name of a special token, such as "</s>",
as in transformers' stop_strings and lm_eval's `until`. So stop strings are searched for in the text
with these names; the text that a caller gets omits the names.

Characters are final when no stop string can begin with them any more. Others are pending: the end
of the text may be the beginning of a stop string. engine.complete makes a Completion for each
prompt, calls `extend` after each step, and `close` when the text has ended.
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

    ids: all new ids; an EOS that ended the text is one. text: the characters that are final.
    finish_reason, valid when the text has ended: "eos", "stop" (a stop string), "length"
    (max_new_tokens, or the context is full: see context_full) or "interrupted". logprobs: one entry
    for each id, if the config asks for them.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], config: GenerationConfig):
        """Begin without new ids. prompt: its ids, on which depends how the first new id is decoded:
        see TextStream."""
        self.ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.text = ""
        self.finish_reason = "length"  # also while the text has not ended
        self._config, self._tokenizer = config, tokenizer
        self._eos_ids = () if config.ignore_eos else tokenizer.eos_ids
        self._stream = tokenizer.stream(prompt)
        self._pending = ""  # characters that are not final, with the names of special tokens
        # For each pending character: False if it belongs to the name of a special token.
        self._is_text: list[bool] = []

    @property
    def context_full(self) -> bool:
        """Whether a text that has ended was cut because the context, or the KV cache, is full."""
        return self.finish_reason == "length" and len(self.ids) < self._config.max_new_tokens

    def logprobs_json(self) -> list[dict[str, Any]]:
        """Return one dict for each new id, for JSON: id, text and log-probability, and under "top"
        the same of the most likely ids at its position. Call it only if the config asks for
        logprobs."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            """Return the dict of one id."""
            return {"id": token, "token": self._tokenizer.id_to_text(token), "logprob": logprob}

        return [
            entry(token, scored.logprob) | {"top": [entry(*pair) for pair in scored.top]}
            for token, scored in zip(self.ids, self.logprobs, strict=True)
        ]

    def extend(self, ids: Iterable[int]) -> str:
        """Add new ids, and return the characters that have become final.

        ids: of one step, several with speculative decoding; those after a stop string or EOS are
        dropped. If the config asks for logprobs, each must be a ScoredId (sampling.py), an int with
        the attribute `logprobs`.
        """
        start = len(self.text)
        for token in ids:
            if self.finish_reason != "length":  # the text has ended
                break
            self.ids.append(int(token))
            if self._config.logprobs is not None:
                self.logprobs.append(token.logprobs)
            self._append(self._stream.push(token), self._stream.special_name(token))
            if token in self._eos_ids and self.finish_reason != "stop":
                self.finish_reason = "eos"
        return self.text[start:]

    def close(self, reason: str | None = None) -> str:
        """End the text, and return the characters that have become final: all pending ones, unless
        a stop string has ended the text.

        Call it once, after the last id. reason: the new finish_reason, unless a stop string has
        ended the text; None: finish_reason does not change.
        """
        start = len(self.text)
        if self.finish_reason != "stop":
            self._append(self._stream.flush())
        if self.finish_reason != "stop":
            self._move_to_text(len(self._pending))
            self.finish_reason = reason or self.finish_reason
        return self.text[start:]

    def _append(self, text: str, special_name: str = "") -> None:
        """Append decoded text and then the name of a special token to the pending characters, and
        move those that are final to the text.

        If the pending characters contain a stop string, the text ends before it ("stop"). Otherwise
        the longest end of them that is the beginning of a stop string stays pending, and all other
        characters are final.
        """
        self._pending += text + special_name
        self._is_text += [True] * len(text) + [False] * len(special_name)
        stops = self._config.stop
        stop_indices = [n for stop in stops if (n := self._pending.find(stop)) >= 0]
        if stop_indices:
            self.finish_reason, final = "stop", min(stop_indices)
        else:
            longest_overlap = max((overlap(stop, self._pending) for stop in stops), default=0)
            final = len(self._pending) - longest_overlap
        self._move_to_text(final)

    def _move_to_text(self, count: int) -> None:
        """Move the first `count` pending characters to the text; drop names of special tokens."""
        self.text += "".join(compress(self._pending[:count], self._is_text))
        self._pending, self._is_text = self._pending[count:], self._is_text[count:]


def overlap(stop: str, text: str) -> int:
    """Return the length of the longest beginning of `stop`, shorter than `stop`, with which `text`
    ends. These characters may become a stop string when more text follows."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

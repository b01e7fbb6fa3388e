"""The text of one row as its ids come in: decoded, and cut at the first stop string."""

from collections.abc import Iterable, Sequence

from generation_config import GenerationConfig
from tokenizer import Tokenizer


class Completion:
    """The continuation of one prompt, as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig):
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason = "length"  # or "eos", or "stop"
        self._ends = () if config.ignore_eos else tokenizer.eos_ids
        self._stops = config.stop
        self._stream = tokenizer.stream(prompt)
        self._held = ""  # text that may turn out to begin a stop string

    def extend(self, ids: Iterable[int]) -> str:
        """Add ids, up to what ends the text; returns what is now certain and can be shown."""
        start = len(self.text)
        for token in ids:
            if self.finish_reason == "stop":
                break  # what was generated beyond is no part of the answer
            self.ids.append(token)
            self._take(self._stream.push(token))
            if token in self._ends:
                self.finish_reason = "eos"
        return self.text[start:]

    def close(self) -> str:
        """Nothing follows: returns what was held back."""
        start = len(self.text)
        self._take(self._stream.flush())
        if self.finish_reason != "stop":
            self.text, self._held = self.text + self._held, ""
        return self.text[start:]

    def _take(self, text: str) -> None:
        if self.finish_reason == "stop":
            return
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.finish_reason, sure = "stop", min(found)
        else:
            sure = len(self._held) - max(
                (begun(stop, self._held) for stop in self._stops), default=0
            )
        self.text, self._held = self.text + self._held[:sure], self._held[sure:]


def begun(stop: str, text: str) -> int:
    """How many characters of `stop` the text ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)

"""How to continue a prompt: the one source of defaults for everything that generates.

Nothing here imports torch, so that the commands can read their options before they load it.
"""

from dataclasses import dataclass


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

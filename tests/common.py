"""Values and functions that several test files use: the demo models, texts for them, references."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from decoding import LoadedModel
    from text.generation_config import GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
DEMO, OPT, DRAFT = (ROOT / "checkpoints" / name for name in ("demo", "demo-opt", "demo-draft"))
TEXTS = (
    "Once upon a time",
    "Lily",
    "Tim and his dog saw a big red ball. They",
    "One day, a little",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@contextlib.contextmanager
def window_slack(tokens: int) -> Iterator[None]:
    """Let the caches of layers with a sliding window have only so many positions more than it."""
    modules = "layers.kv_cache", "decoding", "tiers.planner"
    names = [*(f"{module}.WINDOW_SLACK" for module in modules), "finite.CHUNK_TOKENS"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(name, tokens)
        yield


def complete_ids(
    lm: "LoadedModel", prompts: list[list[int]], config: "GenerationConfig", **options: Any
) -> list[list[int]]:
    """Return the new ids of each prompt."""
    from engine import complete

    return [completion.ids for completion in complete(lm, prompts, config, **options)]


def hugging_face_model(path: str | Path) -> Any:
    """Return the model of transformers in float32; skip the test without transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

"""What several test files use: the demo models, texts for them, and rotary settings of Llama 3."""

from pathlib import Path

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

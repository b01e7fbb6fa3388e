"""OLMo 2 and 3. Start at FAMILIES. Keys and defaults are those of transformers."""

from layers.args import LayerType, ModelArgs
from weights.config import Config
from weights.families.rope import read_rope, read_ropes_by_type
from weights.families.shared import (
    LLAMA,
    OUTPUT_NORMS,
    QK_NORM,
    Family,
    alternating,
    attention_biases,
    attention_types,
    head_dim,
    rms_gated_args,
    same_layers,
)


def olmo2_args(config: Config) -> ModelArgs:
    """Returns the args of OLMo 2: no layer has a window."""
    return olmo_args(config, same_layers(config, read_rope(config, head_dim(config))))


def olmo3_args(config: Config) -> ModelArgs:
    """Returns the args of OLMo 3, an OLMo 2 with windows in three of four layers, unless
    layer_types says otherwise. rope_scaling applies to the layers without a window only."""
    # A rope_theta beside the sections counts for full attention only, as in transformers.
    theta = config.number("rope_theta", 5e5)
    ropes = read_ropes_by_type(config, head_dim(config), theta, 5e5)
    types = attention_types(config, lambda n: (n + 1) % 4 != 0)
    return olmo_args(config, alternating(config, types, ropes))


def olmo_args(config: Config, layers: list[LayerType]) -> ModelArgs:
    """Returns the args of either OLMo: norms follow attention and feed-forward, none precedes them;
    queries and keys pass through norms over all heads together."""
    norms = {"input_norms": False, "output_norms": True, "qk_norm": "whole"}
    return rms_gated_args(config, layers, **norms, **attention_biases(config))


NAMES = LLAMA | OUTPUT_NORMS | QK_NORM
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
FAMILIES = {
    "olmo2": Family(olmo2_args, NAMES, DEFAULTS),
    "olmo3": Family(olmo3_args, NAMES, DEFAULTS),
}

"""Llama and the families that differ from it in a few switches: Mistral, Ministral, Qwen 2 and 3,
SmolLM 3, Granite and Phi 3. Start at FAMILIES. Keys and defaults are those of transformers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layers.args import LayerType, ModelArgs, Rope
from weights.config import Config
from weights.families.rope import read_rope
from weights.families.shared import (
    LLAMA,
    QK_NORM,
    Family,
    attention_biases,
    attention_types,
    head_dim,
    layer_count,
    rms_gated_args,
    same_layers,
    windows,
)


def llama_args(config: Config) -> ModelArgs:
    """Returns the args of Llama: no layer has a window."""
    layers = same_layers(config, read_rope(config, head_dim(config)))
    biases = attention_biases(config) | {"mlp_bias": config.flag("mlp_bias", False)}
    return rms_gated_args(config, layers, **biases)


def mistral_args(config: Config) -> ModelArgs:
    """Returns the args of Mistral: all layers have a window, or none has (sliding_window is null).
    A config with layer_types is read as Ministral's, as in transformers."""
    if "layer_types" in config.values:
        return ministral_args(config)
    window = config.positions("sliding_window", 4096, null=None)
    return rms_gated_args(config, same_layers(config, read_rope(config, head_dim(config)), window))


def ministral_args(config: Config) -> ModelArgs:
    """Returns the args of Ministral. The sliding layers of layer_types have a window; without that
    key, all layers have one, or none if sliding_window is null."""
    window = config.positions("sliding_window", 4096, null=None)
    types = attention_types(config, lambda n: window is not None)
    return rms_gated_args(config, layers_with_windows(config, types, window))


def qwen2_args(config: Config, **rope: Any) -> ModelArgs:
    """Returns the args of Qwen 2: the projections to queries, keys and values have biases, the
    attention's output projection has none. rope: keyword arguments of read_rope."""
    return rms_gated_args(config, qwen_layers(config, **rope), attention_bias=True)


def qwen3_args(config: Config) -> ModelArgs:
    """Returns the args of Qwen 3: a norm over the channels of each head follows the projections to
    queries and keys."""
    biases = attention_biases(config)
    return rms_gated_args(config, qwen_layers(config), qk_norm="head", **biases)


def qwen_layers(config: Config, **rope: Any) -> list[LayerType]:
    """Returns the layer types of Qwen.

    Without use_sliding_window no layer has a window. With it, the sliding layers of layer_types
    have one or, without that key, the layers from number max_window_layers on. rope: keyword
    arguments of read_rope.
    """
    used = config.flag("use_sliding_window", False)
    window = config.positions("sliding_window", 4096, null=None) if used else None
    first = config.count("max_window_layers", 28)
    types = attention_types(config, lambda n: window is not None and n >= first)
    return layers_with_windows(config, types, window, **rope)


def smollm3_args(config: Config) -> ModelArgs:
    """Returns the args of SmolLM 3. By default, every fourth layer has no rotary positions. With
    use_sliding_window these layers have a window, unless layer_types names others."""
    count = layer_count(config)
    interval = config.integer("no_rope_layer_interval", 4)
    by_interval = [(n + 1) % interval != 0 for n in range(count)]
    # In spite of its name, no_rope_layers has a 1 for each layer with rotary positions.
    rotated = config.choices("no_rope_layers", (0, 1), count) or by_interval
    window = config.positions("sliding_window", None, null=None)
    used = config.flag("use_sliding_window", False) and window is not None
    types = attention_types(config, lambda n: used and not rotated[n])
    rope = read_rope(config, head_dim(config), theta=2e6)
    ropes = [rope if on else Rope(rope.dim, kind="none") for on in rotated]
    pairs = zip(ropes, windows(config, types, window), strict=True)
    biases = attention_biases(config) | {"mlp_bias": config.flag("mlp_bias", False)}
    return rms_gated_args(config, [LayerType(*pair) for pair in pairs], **biases)


def granite_args(config: Config) -> ModelArgs:
    """Returns the args of Granite, a Llama whose config has factors of the embeddings, the scores
    and the outputs of attention and feed-forward, and a divisor of the logits."""
    factors = {
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "attention_scale": config.number("attention_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logits_divisor": config.number("logits_scaling", 1.0),
    }
    return replace(llama_args(config), round_embedding_scale=False, **factors)


def phi3_args(config: Config) -> ModelArgs:
    """Returns the args of Phi 3. partial_rotary_factor says which share of a head's channels is
    rotated. The only scaling of rotary positions is longrope, which early configs call su or yarn.
    """
    aliases = {"su": "longrope", "yarn": "longrope"}
    kinds = ["default", "longrope"]
    rope = read_rope(config, head_dim(config), partial=1.0, aliases=aliases, kinds=kinds)
    rope = replace(rope, recompute=rope.kind == "longrope")
    window = config.positions("sliding_window", None, null=None)
    return rms_gated_args(config, same_layers(config, rope, window))


def layers_with_windows(
    config: Config, types: Sequence[str], window: int | None, **rope: Any
) -> list[LayerType]:
    """Returns layer types that all have the same rotary positions. types, window: see `windows`.
    rope: keyword arguments of read_rope."""
    same = read_rope(config, head_dim(config), **rope)
    return [LayerType(same, each) for each in windows(config, types, window)]


# The files have q, k and v as one tensor, and gate and up as another, stacked as ours are.
PHI3 = LLAMA | {
    "layers.N.self_attn.qkv_proj": ("layers.N.attention.wqkv", 0),
    "layers.N.mlp.gate_up_proj": ("layers.N.feed_forward.w13", 0),
}
CONTEXT_2K = {"max_position_embeddings": 2048}
CONTEXT_32K = {"max_position_embeddings": 32768}
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN_DEFAULTS = CONTEXT_32K | {"num_key_value_heads": 32}
SMOLLM_DEFAULTS = CONTEXT_32K | {"num_key_value_heads": 4, "tie_word_embeddings": True}
PHI_DEFAULTS = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": Family(llama_args, LLAMA, CONTEXT_2K),
    "mistral": Family(mistral_args, LLAMA, MISTRAL_DEFAULTS),
    "ministral": Family(ministral_args, LLAMA, MISTRAL_DEFAULTS),
    "qwen2": Family(qwen2_args, LLAMA, QWEN_DEFAULTS),
    "qwen3": Family(qwen3_args, LLAMA | QK_NORM, QWEN_DEFAULTS | {"head_dim": 128}),
    "smollm3": Family(smollm3_args, LLAMA, SMOLLM_DEFAULTS),
    "granite": Family(granite_args, LLAMA, CONTEXT_2K),
    "phi3": Family(phi3_args, PHI3, PHI_DEFAULTS),
}

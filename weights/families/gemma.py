"""Gemma 2 and 3. Start at FAMILIES. Keys and defaults are those of transformers.

A softcap c limits a number x to the range from -c to c: it becomes c * tanh(x / c).
"""

from typing import Any

from layers.args import LayerType, ModelArgs
from model import ACTIVATIONS
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
)


def gemma2_args(config: Config) -> ModelArgs:
    """Returns the args of Gemma 2. Layers 0, 2, 4, ... have a window, unless layer_types says
    otherwise. Softcaps limit the attention scores and the logits."""
    rope = read_rope(config, head_dim(config))
    types = attention_types(config, lambda n: n % 2 == 0)
    layers = alternating(config, types, dict.fromkeys(types, rope))  # both types share one Rope
    softcap = config.number("attn_logit_softcapping", 50.0, null=None)
    return gemma_args(config, layers, logits_softcap=30.0, attention_softcap=softcap)


def gemma3_args(config: Config) -> ModelArgs:
    """Returns the args of Gemma 3. Five of six layers have a window; the sixth has none, and other
    rotary positions. layer_types or sliding_window_pattern may say otherwise.

    attn_logit_softcapping is not used, as in transformers.
    """
    # The default bases for full attention and for layers with a window.
    thetas = config.number("rope_theta", 1e6), config.number("rope_local_base_freq", 1e4)
    ropes = read_ropes_by_type(config, head_dim(config), *thetas)
    pattern = config.integer("sliding_window_pattern", 6)
    layers = alternating(config, attention_types(config, lambda n: (n + 1) % pattern != 0), ropes)
    # shared_args would multiply it by the ropes' factor, which Gemma's value includes already.
    longest = config.positions("max_position_embeddings")
    return gemma_args(config, layers, logits_softcap=None, qk_norm="head", context=longest)


def gemma_args(
    config: Config, layers: list[LayerType], logits_softcap: float | None, **fields: Any
) -> ModelArgs:
    """Returns the ModelArgs of either Gemma. logits_softcap: the default of the config's key; None:
    no softcap. fields: the fields of ModelArgs that only one of the two sets."""
    config.refuse("use_bidirectional_attention", [False], "only causal attention is supported")
    scalar = config.number("query_pre_attn_scalar", 256)
    return rms_gated_args(
        config,
        layers,
        activation=config.choice("hidden_activation", ACTIVATIONS),
        norm="offset_rms",
        output_norms=True,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        attention_scale=scalar**-0.5,
        logits_softcap=config.number("final_logit_softcapping", logits_softcap, null=None),
        **attention_biases(config),
        **fields,
    )


# Hugging Face's names -> ours.
GEMMA = LLAMA | OUTPUT_NORMS | {"layers.N.pre_feedforward_layernorm": ("layers.N.ffn_norm", 0)}
GEMMA_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA3_DEFAULTS = GEMMA_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072}
FAMILIES = {
    "gemma2": Family(gemma2_args, GEMMA, GEMMA_DEFAULTS),
    "gemma3_text": Family(gemma3_args, GEMMA | QK_NORM, GEMMA3_DEFAULTS),
}

"""What the families share: the sizes of a model, the windows of its layers, its tensors' names.

Start at shared_args. A Family says how its configs are read and how its tensors are named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from layers.args import LayerType, ModelArgs, Rope
from model import ACTIVATIONS
from weights.config import Config

# Far above any real model. A larger number is a mistake, and building its model could take minutes.
MAX_LAYERS = 2**10

FULL, SLIDING = "full_attention", "sliding_attention"
# Hugging Face's module -> (our module, which part of our stacked tensor theirs is, from 0; 0 if
# ours is not stacked). N: the number of the layer. A name that no tensor has does no harm.
Names = dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Family:
    """Models of one model_type.

    read: returns the ModelArgs of a config. names: Hugging Face's, without "model." at the front,
    and ours. defaults: the values of keys that a config leaves out.
    """

    read: Callable[[Config], ModelArgs]
    names: Names
    defaults: dict[str, Any] = field(default_factory=dict)


def shared_args(config: Config, layer_types: Sequence[LayerType], **fields: Any) -> ModelArgs:
    """Returns the ModelArgs with the sizes that all families but OPT name alike.

    fields: further fields of ModelArgs, or values that replace those read here.
    """
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    sizes = {
        "dim": dim,
        "n_layers": layer_count(config),
        "n_heads": n_heads,
        "n_kv_heads": config.integer("num_key_value_heads", n_heads, null=n_heads),
        "head_dim": head_dim(config),
        "hidden_dim": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size", maximum=2**28),
        "context": context(config, layer_types),
        "embed_dim": dim,
        "layer_types": tuple(layer_types),
        "tied": config.flag("tie_word_embeddings", False),
    }
    return ModelArgs(**sizes | fields)


def rms_gated_args(config: Config, layer_types: Sequence[LayerType], **fields: Any) -> ModelArgs:
    """Returns the ModelArgs of a model with RMS norms and gated feed-forwards. fields: as in
    shared_args."""
    if "activation" not in fields:
        fields["activation"] = config.choice("hidden_act", ACTIVATIONS, "silu")
    eps = config.number("rms_norm_eps", 1e-6, maximum=1.0)
    return shared_args(config, layer_types, norm_eps=eps, **fields)


def attention_biases(config: Config) -> dict[str, bool]:
    """Returns the fields of ModelArgs for families whose attention_bias covers the projections to
    queries, keys and values and the output projection."""
    biased = config.flag("attention_bias", False)
    return {"attention_bias": biased, "wo_bias": biased}


def layer_count(config: Config) -> int:
    return config.integer("num_hidden_layers", maximum=MAX_LAYERS)


def head_dim(config: Config) -> int:
    """Returns the channels of an attention head: head_dim, or hidden_size / num_attention_heads.

    Raises ValueError if there is no head_dim and the quotient is no integer.
    """
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return config.integer("head_dim", None, null=None) or equal_share(config, dim, n_heads)


def equal_share(config: Config, dim: int, n_heads: int) -> int:
    """Returns dim / n_heads, the config's hidden_size and num_attention_heads. Raises ValueError if
    the quotient is no integer."""
    if dim % n_heads:
        raise ValueError(
            f"{config.where}: 'hidden_size' is {dim} and must be a multiple of "
            f"'num_attention_heads', {n_heads}, where there is no 'head_dim'"
        )
    return dim // n_heads


def context(config: Config, layer_types: Sequence[LayerType]) -> int:
    """Returns how many positions a model can attend over: max_position_embeddings, times the factor
    of linear and dynamic rotary positions; with yarn, at least its trained context times its
    factor. The other kinds' max_position_embeddings includes the factor. This limit is vLLM's;
    transformers has none."""
    longest = config.positions("max_position_embeddings")
    extended = [longest]
    for rope in {layer.rope for layer in layer_types if layer.rope}:
        trained = rope.original_context if rope.kind == "yarn" else longest
        if rope.kind in ("linear", "dynamic", "yarn"):
            extended.append(int(trained * rope.factor))
    return max(extended)


def same_layers(config: Config, rope: Rope, window: int | None = None) -> list[LayerType]:
    """Returns the layer types of a model whose layers are all alike. window: see LayerType."""
    return [LayerType(rope, window)] * layer_count(config)


def attention_types(config: Config, default: Callable[[int], bool]) -> list[str]:
    """Returns FULL or SLIDING for each layer: the config's layer_types or, if it has none, SLIDING
    for each layer n, from 0, for which default(n) is true."""
    count = layer_count(config)
    found = config.choices("layer_types", (FULL, SLIDING), count)
    return list(found) if found else [SLIDING if default(n) else FULL for n in range(count)]


def windows(config: Config, types: Sequence[str], window: int | None) -> list[int | None]:
    """Returns the window of each layer, None for full attention. types: as attention_types returns
    them. window: the window of the sliding layers; None: the config has none, so a sliding layer
    raises ValueError."""
    if SLIDING in types and window is None:
        raise ValueError(
            f"{config.where}: the model has layers of {SLIDING}, but 'sliding_window' is missing "
            "or switched off"
        )
    return [window if name == SLIDING else None for name in types]


def alternating(config: Config, types: list[str], ropes: dict[str, Rope]) -> list[LayerType]:
    """Returns the layer types of a model that mixes full and sliding attention. types: as
    attention_types returns them. ropes: FULL -> Rope, SLIDING -> Rope."""
    window = config.positions("sliding_window", 4096, null=None)
    pairs = zip(types, windows(config, types, window), strict=True)
    return [LayerType(ropes[name], each) for name, each in pairs]


# Names of the attention's and the embedding's tensors in all families.
ATTENTION: Names = {
    "layers.N.self_attn.q_proj": ("layers.N.attention.wqkv", 0),
    "layers.N.self_attn.k_proj": ("layers.N.attention.wqkv", 1),
    "layers.N.self_attn.v_proj": ("layers.N.attention.wqkv", 2),
    "embed_tokens": ("tok_embeddings", 0),
    "lm_head": ("output", 0),
}
LLAMA: Names = ATTENTION | {
    "layers.N.self_attn.o_proj": ("layers.N.attention.wo", 0),
    "layers.N.mlp.gate_proj": ("layers.N.feed_forward.w13", 0),
    "layers.N.mlp.up_proj": ("layers.N.feed_forward.w13", 1),
    "layers.N.mlp.down_proj": ("layers.N.feed_forward.w2", 0),
    "layers.N.input_layernorm": ("layers.N.attention_norm", 0),
    "layers.N.post_attention_layernorm": ("layers.N.ffn_norm", 0),
    "norm": ("norm", 0),
}
# Norms of queries and keys over the channels of each head.
QK_NORM: Names = {
    "layers.N.self_attn.q_norm": ("layers.N.attention.q_norm", 0),
    "layers.N.self_attn.k_norm": ("layers.N.attention.k_norm", 0),
}
# Norms after attention and feed-forward. Llama has the first name, too, for its norm before the
# feed-forward: `LLAMA | OUTPUT_NORMS` replaces that entry.
OUTPUT_NORMS: Names = {
    "layers.N.post_attention_layernorm": ("layers.N.attention_output", 0),
    "layers.N.post_feedforward_layernorm": ("layers.N.ffn_output", 0),
}

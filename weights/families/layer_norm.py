"""Families with layer norms: OPT, StarCoder 2, StableLM and Nemotron. Start at FAMILIES.

Keys and defaults are those of transformers.
"""

from layers.args import ModelArgs
from model import ACTIVATIONS
from weights.config import Config
from weights.families.rope import read_rope
from weights.families.shared import (
    ATTENTION,
    LLAMA,
    Family,
    attention_biases,
    equal_share,
    head_dim,
    layer_count,
    same_layers,
    shared_args,
)


def opt_args(config: Config) -> ModelArgs:
    """Returns the args of OPT, which has learned positions and plain feed-forwards. In OPT-350m the
    norms follow the residual sums, and the embedding table is narrower than the model."""
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    norm_first = config.flag("do_layer_norm_before", True)
    no_final_norm = config.flag("_remove_final_layer_norm", False)
    biased = config.flag("enable_bias", True)
    return ModelArgs(
        dim=dim,
        n_layers=layer_count(config),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=equal_share(config, dim, n_heads),
        hidden_dim=config.integer("ffn_dim"),
        vocab_size=config.integer("vocab_size", maximum=2**28),
        context=config.positions("max_position_embeddings", 2048),
        embed_dim=config.integer("word_embed_proj_dim", dim, null=dim),
        block="sequential" if norm_first else "post_norm",
        norm="layer",
        norm_affine=config.flag("layer_norm_elementwise_affine", True),
        final_norm=norm_first and not no_final_norm,
        feed_forward="plain",
        activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        positions="learned",
        attention_bias=biased,
        wo_bias=biased,
        mlp_bias=biased,
        tied=config.flag("tie_word_embeddings", True),
    )


def starcoder2_args(config: Config) -> ModelArgs:
    """Returns the args of StarCoder 2, which has rotary positions and plain feed-forwards. All its
    linear layers have biases, or none has (use_bias)."""
    window = config.positions("sliding_window", None, null=None)
    biased = config.flag("use_bias", True)
    return shared_args(
        config,
        same_layers(config, read_rope(config, head_dim(config)), window),
        norm="layer",
        norm_eps=config.number("norm_epsilon", 1e-5, maximum=1.0),
        feed_forward="plain",
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        attention_bias=biased,
        wo_bias=biased,
        mlp_bias=biased,
    )


def stablelm_args(config: Config) -> ModelArgs:
    """Returns the args of StableLM. By default, a quarter of each head's channels is rotated. The
    12B model has parallel blocks, and norms of queries and keys with weights for each head."""
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    channels = equal_share(config, dim, n_heads)
    config.refuse("head_dim", [channels], "this family's is hidden_size / num_attention_heads")
    rope = read_rope(config, channels, partial=0.25)
    parallel = config.flag("use_parallel_residual", False)
    return shared_args(
        config,
        same_layers(config, rope),
        head_dim=channels,
        block="parallel" if parallel else "sequential",
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5, maximum=1.0),
        qk_norm="each_head" if config.flag("qk_layernorm", False) else "none",
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        attention_bias=config.flag("use_qkv_bias", False),
    )


def nemotron_args(config: Config) -> ModelArgs:
    """Returns the args of Nemotron. By default, half of each head's channels is rotated, and the
    activation is the squared ReLU. A norm's stored weight is its factor minus 1."""
    rope = read_rope(config, head_dim(config), partial=0.5)
    return shared_args(
        config,
        same_layers(config, rope),
        norm="offset_layer",
        norm_eps=config.number("norm_eps", 1e-5, maximum=1.0),
        feed_forward="plain",
        activation=config.choice("hidden_act", ACTIVATIONS, "relu2"),
        mlp_bias=config.flag("mlp_bias", False),
        **attention_biases(config),
    )


OPT = ATTENTION | {
    "embed_positions": ("positions", 0),
    "project_in": ("project_in", 0),
    "layers.N.self_attn.out_proj": ("layers.N.attention.wo", 0),
    "layers.N.fc1": ("layers.N.feed_forward.w1", 0),
    "layers.N.fc2": ("layers.N.feed_forward.w2", 0),
    "layers.N.self_attn_layer_norm": ("layers.N.attention_norm", 0),
    "layers.N.final_layer_norm": ("layers.N.ffn_norm", 0),
    "final_layer_norm": ("norm", 0),
    "project_out": ("project_out", 0),
}
STARCODER2 = LLAMA | {
    "layers.N.mlp.c_fc": ("layers.N.feed_forward.w1", 0),
    "layers.N.mlp.c_proj": ("layers.N.feed_forward.w2", 0),
}
# The files have a norm for each head, such as q_layernorm.norms.3: it is part 3 of our tensor.
STABLELM = LLAMA | {
    "layers.N.self_attn.q_layernorm.norms": ("layers.N.attention.q_norm", 0),
    "layers.N.self_attn.k_layernorm.norms": ("layers.N.attention.k_norm", 0),
}
NEMOTRON = LLAMA | {"layers.N.mlp.up_proj": ("layers.N.feed_forward.w1", 0)}
CONTEXT_4K = {"max_position_embeddings": 4096}
STARCODER_DEFAULTS = CONTEXT_4K | {"num_key_value_heads": 2, "tie_word_embeddings": True}
FAMILIES = {
    "opt": Family(opt_args, OPT),
    "starcoder2": Family(starcoder2_args, STARCODER2, STARCODER_DEFAULTS),
    "stablelm": Family(stablelm_args, STABLELM, CONTEXT_4K | {"num_key_value_heads": 32}),
    "nemotron": Family(nemotron_args, NEMOTRON, CONTEXT_4K),
}

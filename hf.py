"""Hugging Face's vocabulary, translated to ours: config keys to ModelArgs, tensor names to names.

Start at model_args, then FAMILIES; tensor_name and export_tensors read the name tables at the
end. Nothing here opens a file. Keys and defaults are those of transformers' configurations, in
both schemas of the rotary settings (`rope_theta` with `rope_scaling`, and transformers 5's
`rope_parameters`).
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from model import ACTIVATIONS, ROPE_SCALINGS, ModelArgs, RopeScaling


class Config(dict):
    """A parsed config.json; a key that is needed and absent is a mistake of the file's."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"config.json does not say '{key}', which a {self['model_type']} needs")


def model_args(config: dict[str, Any]) -> ModelArgs:
    """The shape of the model that a Hugging Face config describes.

    Raises ValueError naming a key that is missing, or an architecture, activation or rope type
    that is not supported.
    """
    config = Config({"model_type": None} | config)
    return FAMILIES[supported(config["model_type"], FAMILIES, "model_type")](config)


def llama_args(config: Config) -> ModelArgs:
    dim, n_heads = config["hidden_size"], config["num_attention_heads"]
    return ModelArgs(
        dim=dim,
        n_layers=config["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_dim=config.get("head_dim") or dim // n_heads,
        hidden_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context=config.get("max_position_embeddings", 2048),
        embed_dim=dim,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=supported(config.get("hidden_act", "silu"), ACTIVATIONS, "activation"),
        rope_theta=rope_settings(config).get("rope_theta", 10000.0),
        rope_scaling=rope_scaling(config),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tied=config.get("tie_word_embeddings", False),
    )


def mistral_args(config: Config) -> ModelArgs:
    """Llama's, cut to the window: up to its end, windowed and full attention are the same."""
    context = config["max_position_embeddings"]
    window = config.get("sliding_window", 4096) or context
    defaults = {"num_key_value_heads": 8}
    return llama_args(Config(defaults | config | {"max_position_embeddings": min(context, window)}))


def opt_args(config: Config) -> ModelArgs:
    dim, n_heads = config["hidden_size"], config["num_attention_heads"]
    norm_first = config.get("do_layer_norm_before", True)
    return ModelArgs(
        dim=dim,
        n_layers=config["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        hidden_dim=config["ffn_dim"],
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        embed_dim=config.get("word_embed_proj_dim") or dim,
        norm="layer",
        norm_affine=config.get("layer_norm_elementwise_affine", True),
        norm_first=norm_first,
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        feed_forward="plain",
        activation=supported(config.get("activation_function", "relu"), ACTIVATIONS, "activation"),
        positions="learned",
        attention_bias=config.get("enable_bias", True),
        mlp_bias=config.get("enable_bias", True),
        tied=config.get("tie_word_embeddings", True),
    )


FAMILIES = {"llama": llama_args, "mistral": mistral_args, "opt": opt_args}


def rope_settings(config: Config) -> dict[str, Any]:
    """The rotary settings of either schema, under transformers 5's names."""
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return theta | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})


def rope_scaling(config: Config) -> RopeScaling | None:
    rope = Config({"model_type": config["model_type"]} | rope_settings(config))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if supported(kind, ("default", *ROPE_SCALINGS), "rope type") == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, rope["factor"])
    return RopeScaling(
        kind,
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )


def supported(name: Any, known: Iterable[str], what: str) -> Any:
    """The name itself, or ValueError listing the known ones."""
    if name not in known:
        raise ValueError(f"{what} '{name}' is not supported; supported are {', '.join(known)}")
    return name


def tensor_name(name: str) -> tuple[str, int] | None:
    """Hugging Face's tensor name -> ours, and which part of ours it is, counted along rows.

    None for what is no weight; a name that no table knows is returned as it is. Channels need no
    permutation: model.py rotates halves, as transformers does.
    """
    if NO_WEIGHT.search(name):
        return None
    module, layer, kind = split_name(PREFIX.sub("", name))
    if module not in NAMES:
        return name, 0
    ours, part = NAMES[module]
    return f"{ours.replace('N', layer)}.{kind}", part


def export_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The way back: our tensors under Hugging Face's names, without a head that is tied."""
    args = model_args(config)
    widths = {
        "wqkv": [n * args.head_dim for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)],
        "w13": [args.hidden_dim, args.hidden_dim],
    }
    prefix, table = ("model.decoder.", OPT) if config["model_type"] == "opt" else ("model.", LLAMA)
    theirs: dict[str, list[str]] = {}
    for module, (ours, _) in table.items():
        theirs.setdefault(ours, []).append(module if module == "lm_head" else prefix + module)
    exported = {}
    for name, tensor in tensors.items():
        ours, layer, kind = split_name(name)
        if ours == "output" and args.tied:
            continue
        modules = theirs[ours]
        pieces = tensor.split(widths.get(ours.rpartition(".")[2], len(tensor)))
        exported |= {
            f"{module.replace('N', layer)}.{kind}": piece
            for module, piece in zip(modules, pieces, strict=True)
        }
    return exported


def split_name(name: str) -> tuple[str, str, str]:
    """'layers.3.fc1.bias' -> ('layers.N.fc1', '3', 'bias'); no layer: ''."""
    module, _, kind = name.rpartition(".")
    layer = LAYER.search(module)
    return LAYER.sub(".N.", module), layer[1] if layer else "", kind


# torch.compile and DataParallel put theirs in front of all names.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)*(model\.)?(decoder\.)?")
NO_WEIGHT = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|decoder\.version)$")
LAYER = re.compile(r"\.(\d+)\.")
# Their module: our module, and which part of it. N stands for the layer.
ATTENTION = {
    "layers.N.self_attn.q_proj": ("layers.N.attention.wqkv", 0),
    "layers.N.self_attn.k_proj": ("layers.N.attention.wqkv", 1),
    "layers.N.self_attn.v_proj": ("layers.N.attention.wqkv", 2),
}
LLAMA = ATTENTION | {
    "embed_tokens": ("tok_embeddings", 0),
    "layers.N.self_attn.o_proj": ("layers.N.attention.wo", 0),
    "layers.N.mlp.gate_proj": ("layers.N.feed_forward.w13", 0),
    "layers.N.mlp.up_proj": ("layers.N.feed_forward.w13", 1),
    "layers.N.mlp.down_proj": ("layers.N.feed_forward.w2", 0),
    "layers.N.input_layernorm": ("layers.N.attention_norm", 0),
    "layers.N.post_attention_layernorm": ("layers.N.ffn_norm", 0),
    "norm": ("norm", 0),
    "lm_head": ("output", 0),
}
OPT = ATTENTION | {
    "embed_tokens": ("tok_embeddings", 0),
    "embed_positions": ("positions", 0),
    "project_in": ("project_in", 0),
    "layers.N.self_attn.out_proj": ("layers.N.attention.wo", 0),
    "layers.N.fc1": ("layers.N.feed_forward.w1", 0),
    "layers.N.fc2": ("layers.N.feed_forward.w2", 0),
    "layers.N.self_attn_layer_norm": ("layers.N.attention_norm", 0),
    "layers.N.final_layer_norm": ("layers.N.ffn_norm", 0),
    "final_layer_norm": ("norm", 0),
    "project_out": ("project_out", 0),
    "lm_head": ("output", 0),
}
NAMES = LLAMA | OPT

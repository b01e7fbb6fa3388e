"""Translates Hugging Face checkpoints: keys of config.json to ModelArgs, tensor names to ours.

Start at model_args, then FAMILIES; Config checks each value that is read. tensor_name and
export_tensors use the name tables at the end. Nothing here opens a file. Keys and defaults are
those of transformers' configurations; rotary settings are read in both schemas, `rope_theta` with
`rope_scaling`, and `rope_parameters` of transformers 5.

Words: in a tensor's name such as layers.3.fc1.bias, layers.3.fc1 is the module and bias the kind,
which may also be weight or, in a quantised layer, the name of a packed tensor. Some of our tensors
are stacked along rows from parts: several tensors of Hugging Face.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from host.files import short_json
from host.log import log
from layers.args import ModelArgs, RopeScaling
from layers.positions import ROPE_SCALINGS
from model import ACTIVATIONS

# Limits far above any real model. A larger number is a mistake, and building its model could take
# minutes.
MAX_LAYERS = 2**10
MAX_POSITIONS = 2**31
MAX_PARAMETERS = 2**46
REQUIRED: Any = object()


class Config:
    """The values of a config.json, or of an object within it, each checked when it is read.

    default: returned for a missing key; without it a missing key is an error. null: returned if the
    value is null; without it null is an error, as in transformers. Errors are ValueErrors of one
    line with the key, its value and the expected values. where: the name of the object in these
    errors.
    """

    def __init__(self, values: Any, where: str = "config.json"):
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {short_json(values)} and must be an object with keys")
        self.values, self.where = values, where

    def integer(
        self, key: str, default: Any = REQUIRED, *, null: Any = REQUIRED, maximum: int = 2**24
    ) -> Any:
        """Returns an integer from 1 to maximum. 256.0 is an error, as in transformers 5."""

        def fits(value: Any) -> bool:
            return type(value) is int and 1 <= value <= maximum

        return self._read(key, fits, f"an integer from 1 to {maximum}", default, null)

    def number(self, key: str, default: Any = REQUIRED, *, maximum: float = 1e15) -> float:
        """Returns a number above 0 and at most maximum."""

        def fits(value: Any) -> bool:
            return type(value) in (int, float) and 0 < value <= maximum

        return float(self._read(key, fits, f"a number above 0 and at most {maximum:g}", default))

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean, `default` if the key is absent."""
        return self._read(key, lambda v: isinstance(v, bool), "true or false", default)

    def choice(
        self,
        key: str,
        supported: Collection[str],
        default: Any = REQUIRED,
        *,
        null: Any = REQUIRED,
    ) -> str:
        """Returns a string that is one of the supported values, or `default` or `null` (see the
        class), which need not be among them."""

        def fits(value: Any) -> bool:
            return isinstance(value, str) and value in supported

        expected = f"one of those that are supported: {', '.join(supported)}"
        return self._read(key, fits, expected, default, null)

    def section(self, key: str) -> "Config":
        """Returns the object of this key as a Config, an empty one if the key is absent or null."""
        values = self._read(key, lambda v: isinstance(v, dict), "an object with keys", {}, {})
        return Config(values, f"{self.where}, {key}")

    def _read(
        self,
        key: str,
        fits: Callable[[Any], bool],
        expected: str,
        default: Any = REQUIRED,
        null: Any = REQUIRED,
    ) -> Any:
        """Returns the value of a key, its `default` or `null` (see the class).

        fits: whether a value is valid. expected: the valid values in words, for the error.
        """
        if key not in self.values:
            if default is REQUIRED:
                raise ValueError(f"{self.where} has no '{key}', which must be {expected}")
            return default
        value = self.values[key]
        if value is None and null is not REQUIRED:
            return null
        if not fits(value):
            raise ValueError(f"{self.where}: '{key}' is {short_json(value)} and must be {expected}")
        return value


def model_args(config: Any) -> ModelArgs:
    """Returns the ModelArgs of a Hugging Face config.

    Raises ValueError for a key that is missing, for a value of the wrong type, out of range or not
    supported, and for sizes that contradict each other or exceed any computer's memory.
    """
    config = Config(config)
    args = FAMILIES[config.choice("model_type", FAMILIES)](config)
    check_sizes(args)
    return args


def llama_args(config: Config) -> ModelArgs:
    """Returns the ModelArgs of a Llama config: rotary positions, gated feed-forward layers.

    Keys and defaults are those of LlamaConfig in transformers; also called for Mistral.
    """
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    context = config.integer("max_position_embeddings", 2048, maximum=MAX_POSITIONS)
    theta, scaling = rope_settings(config, context)
    dynamic = scaling is not None and scaling.kind == "dynamic"
    biased = config.flag("attention_bias", False)
    return ModelArgs(
        dim=dim,
        n_layers=config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=config.integer("num_key_value_heads", n_heads, null=n_heads),
        head_dim=config.integer("head_dim", None, null=None) or equal_share(dim, n_heads),
        hidden_dim=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size", maximum=2**28),
        # Dynamic positions extend the context by the factor. This limit is vLLM's; transformers has
        # none.
        context=int(context * max(1.0, scaling.factor)) if dynamic else context,
        embed_dim=dim,
        norm_eps=config.number("rms_norm_eps", 1e-6, maximum=1.0),
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        positions="dynamic" if dynamic else "rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=biased,
        wo_bias=biased,
        mlp_bias=config.flag("mlp_bias", False),
        tied=config.flag("tie_word_embeddings", False),
    )


def mistral_args(config: Config) -> ModelArgs:
    """Returns the ModelArgs of a Mistral config: Llama's, context limited to the sliding window.

    Up to that length, windowed attention equals full attention, which is all that model.py has.
    """
    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
    args = llama_args(Config(defaults | config.values))
    window = config.integer("sliding_window", 4096, null=args.context, maximum=MAX_POSITIONS)
    return replace(args, context=min(args.context, window))


def opt_args(config: Config) -> ModelArgs:
    """Returns the ModelArgs of an OPT config: learned positions, LayerNorm, plain feed-forward.

    Keys and defaults are those of OPTConfig in transformers.
    """
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    norm_first = config.flag("do_layer_norm_before", True)
    no_final_norm = config.flag("_remove_final_layer_norm", False)
    biased = config.flag("enable_bias", True)
    return ModelArgs(
        dim=dim,
        n_layers=config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=equal_share(dim, n_heads),
        hidden_dim=config.integer("ffn_dim"),
        vocab_size=config.integer("vocab_size", maximum=2**28),
        context=config.integer("max_position_embeddings", 2048, maximum=MAX_POSITIONS),
        embed_dim=config.integer("word_embed_proj_dim", dim, null=dim),
        norm="layer",
        norm_affine=config.flag("layer_norm_elementwise_affine", True),
        norm_first=norm_first,
        final_norm=norm_first and not no_final_norm,
        feed_forward="plain",
        activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        positions="learned",
        attention_bias=biased,
        wo_bias=biased,
        mlp_bias=biased,
        tied=config.flag("tie_word_embeddings", True),
    )


# model_type in config.json -> the function that reads the other keys.
FAMILIES = {"llama": llama_args, "mistral": mistral_args, "opt": opt_args}


def equal_share(dim: int, n_heads: int) -> int:
    """Returns the channels of an attention head for a config without head_dim: dim / n_heads.

    Raises ValueError if dim is not a multiple of n_heads.
    """
    if dim % n_heads:
        raise ValueError(
            f"config.json: 'hidden_size' is {dim} and must be a multiple of 'num_attention_heads', "
            f"{n_heads}, where there is no 'head_dim'"
        )
    return dim // n_heads


def rope_settings(config: Config, context: int) -> tuple[float, RopeScaling | None]:
    """Returns the base (rope_theta) and the scaling of the rotary frequencies; None: no scaling.

    config has one of two schemas: `rope_theta` with `rope_scaling`, or `rope_parameters`. If it has
    both, `rope_scaling`, the older one, is used, as in transformers. context: the positions that
    the model was trained on.
    """
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    rope = old if old.values else new
    # The base lies in the section in transformers 5, beside it in the older schema.
    theta = (rope if "rope_theta" in rope.values else config).number("rope_theta", 10000.0)
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.choice(key, ("default", *ROPE_SCALINGS), "default")
    if kind == "default":
        return theta, None
    scaling = RopeScaling(kind, rope.number("factor", maximum=1e6), original_context=context)
    return theta, llama3_settings(rope, scaling) if kind == "llama3" else scaling


def llama3_settings(rope: Config, scaling: RopeScaling) -> RopeScaling:
    """Returns the scaling with the keys of rope type llama3, which its section `rope` must have.

    Raises ValueError if low_freq_factor is not less than high_freq_factor.
    """
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise ValueError(
            f"{rope.where}: 'low_freq_factor' is {low:g} and must be less than "
            f"'high_freq_factor', {high:g}"
        )
    key = "original_max_position_embeddings"
    context = rope.integer(key, scaling.original_context, maximum=MAX_POSITIONS)
    return replace(scaling, low_freq_factor=low, high_freq_factor=high, original_context=context)


def check_sizes(args: ModelArgs) -> None:
    """Raises ValueError for sizes that contradict each other or exceed any computer's memory.
    Called by model_args: each size alone is in its range already."""
    # layer, tables: upper bounds of the weights of a layer, and of embedding, output head and
    # learned positions.
    rotary, minimum = args.positions != "learned", 4 if args.positions == "dynamic" else 2
    layer = args.dim * (2 * (args.n_heads + args.n_kv_heads) * args.head_dim + 3 * args.hidden_dim)
    tables = (2 * args.vocab_size + (0 if rotary else args.context)) * max(args.dim, args.embed_dim)
    faults = {
        f"'num_attention_heads' is {args.n_heads} and must be a multiple of "
        f"'num_key_value_heads', {args.n_kv_heads}": args.n_heads % args.n_kv_heads,
        f"'head_dim' is {args.head_dim} and must be even and at least {minimum}, as channels are "
        "rotated in pairs": rotary and (args.head_dim % 2 or args.head_dim < minimum),
        f"a model of 'hidden_size' {args.dim}, {args.n_layers} layers and 'vocab_size' "
        f"{args.vocab_size} has more than {MAX_PARAMETERS:.0e} weights": (
            args.n_layers * layer + tables > MAX_PARAMETERS
        ),
    }
    for fault, present in faults.items():
        if present:
            raise ValueError(f"config.json: {fault}")


def with_stored_biases(args: ModelArgs, names: Collection[str], path: Path) -> ModelArgs:
    """Returns args without the biases that no layer has in the file, and logs their names.

    path: the checkpoint's, for the log. names: our names of the stored tensors. Relatives of Llama
    with biases of q, k and v but not of the output also declare attention_bias; as in transformers,
    absent biases are zero. If only some layers lack a bias, it stays declared, and Checkpoint.check
    raises an error.
    """
    # The stored biases, by their names without layers.N.
    stored = {n.split(".", 2)[2] for n in names if n.startswith("layers.") and n.endswith(".bias")}
    absent = {
        flag: module
        for flag, module in BIASES.items()
        if getattr(args, flag) and not any(name.startswith(module) for name in stored)
    }
    for module in absent.values():
        log(f"{path} has no biases of {module}, although its config declares them: zeros are used")
    return replace(args, **dict.fromkeys(absent, False))


def tensor_name(name: str) -> tuple[str, int] | None:
    """Translate Hugging Face's tensor name to (our name, index of its part in our tensor).

    Parts are stacked along rows: q, k and v are parts 0, 1 and 2 of wqkv. Returns None for a stored
    tensor that is not a weight, and an unknown name unchanged. Channels are not permuted: model.py
    rotates halves, as transformers does.
    """
    if NO_WEIGHT.search(name):
        return None
    module, layer, kind = split_name(PREFIX.sub("", name))
    if module not in NAMES:
        return name, 0
    ours, part = NAMES[module]
    return f"{ours.replace('N', layer)}.{kind}", part


def export_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Returns our tensors under Hugging Face's names, with stacked tensors split into their parts.

    Used by scripts/train_demo.py. config: the content of config.json, of a family of FAMILIES. An
    output head that is tied to the embedding is left out.
    """
    args = model_args(config)
    row_counts = {
        "wqkv": [n * args.head_dim for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)],
        "w13": [args.hidden_dim, args.hidden_dim],
    }
    prefix, table = ("model.decoder.", OPT) if config["model_type"] == "opt" else ("model.", LLAMA)
    theirs: dict[str, list[str]] = {}  # our module -> their modules, in the order of the parts
    for module, (ours, _) in table.items():
        theirs.setdefault(ours, []).append(module if module == "lm_head" else prefix + module)
    exported = {}
    for name, tensor in tensors.items():
        ours, layer, kind = split_name(name)
        if ours == "output" and args.tied:
            continue
        modules = theirs[ours]
        pieces = tensor.split(row_counts.get(ours.rpartition(".")[2], len(tensor)))
        exported |= {
            f"{module.replace('N', layer)}.{kind}": piece
            for module, piece in zip(modules, pieces, strict=True)
        }
    return exported


def split_name(name: str) -> tuple[str, str, str]:
    """'layers.3.fc1.bias' -> ('layers.N.fc1', '3', 'bias'). The layer is '' outside layers."""
    module, _, kind = name.rpartition(".")
    layer = LAYER.search(module)
    return LAYER.sub(".N.", module), layer[1] if layer else "", kind


# Field of ModelArgs -> the modules of a layer that have biases if it is true.
BIASES = {"attention_bias": "attention.wqkv", "wo_bias": "attention.wo", "mlp_bias": "feed_forward"}
# Prefixes of tensor names: of torch.compile and DataParallel, then of transformers.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)*(model\.)?(decoder\.)?")
NO_WEIGHT = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|decoder\.version)$")
LAYER = re.compile(r"\.(\d+)\.")
# Hugging Face's module -> (our module, index of the part in its stacked tensor). N: layer number.
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

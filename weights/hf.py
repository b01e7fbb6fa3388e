"""Translates Hugging Face checkpoints: config.json to ModelArgs, tensor names to ours.

Start at model_args, which finds the family of a config in FAMILIES; the families are in families/.
tensor_name and export_tensors use the name tables of the families. Nothing here opens a file. Keys
and defaults are those of transformers' configurations.

Words: in a tensor's name such as layers.3.fc1.bias, layers.3.fc1 is the module and bias the kind,
which may also be weight or, in a quantised layer, the name of a packed tensor. Some of our tensors
are several tensors of Hugging Face, stacked along rows: these are its parts, numbered from 0.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from host.log import log
from layers.args import ModelArgs
from weights.config import Config
from weights.families import gemma, layer_norm, llama, multimodal, olmo
from weights.families.shared import Family, Names

MAX_PARAMETERS = 2**46  # far above any real model

# model_type in config.json -> the family.
FAMILIES = (
    llama.FAMILIES | gemma.FAMILIES | olmo.FAMILIES | layer_norm.FAMILIES | multimodal.FAMILIES
)
# A substring of the model_type of other families -> what model.py lacks for them. The first match
# counts.
UNSUPPORTED = {
    "granitemoehybrid": "layers without attention (Mamba)",  # before "moe", which it contains
    "moe": "mixtures of experts",
    "mixtral": "mixtures of experts",
    "gpt_oss": "mixtures of experts",
    "llama4": "mixtures of experts",
    "flex_olmo": "mixtures of experts",
    "deepseek": "multi-head latent attention",
    "kimi": "multi-head latent attention",
    "minicpm3": "multi-head latent attention",
    "mistral4": "multi-head latent attention",
    "qwen3_next": "layers without attention (Gated DeltaNet)",
    "qwen3_5": "layers without attention (Gated DeltaNet)",
    "olmo_hybrid": "layers without attention (Gated DeltaNet)",
    "mamba": "layers without attention (Mamba)",
    "jamba": "layers without attention (Mamba)",
    "bamba": "layers without attention (Mamba)",
    "zamba": "layers without attention (Mamba)",
    "nemotron_h": "layers without attention (Mamba)",
    "falcon_h1": "layers without attention (Mamba)",
    "rwkv": "layers without attention (RWKV)",
    "recurrent_gemma": "layers without attention (RG-LRU)",
    "lfm2": "layers without attention (convolutions)",
}


def find_family(config: Any) -> tuple[Family, Config]:
    """Returns the family of a config, and the config of its language model with the family's
    defaults. config: the content of config.json. Raises ValueError for a model_type that is not
    supported, and for keys that no family supports (attention that is not causal, settings of
    single layers)."""
    whole, config = config, multimodal.text_config(config)
    kind = str(config.values.get("model_type"))
    for part, what in UNSUPPORTED.items():
        if part in kind:
            raise ValueError(
                f"{config.where}: 'model_type' is {kind}, and no model with {what} is supported"
            )
    # The error of `choice` lists the model_types of multimodal models, too: users may give these.
    if config.choice("model_type", [*FAMILIES, *multimodal.MODELS]) not in FAMILIES:
        raise ValueError(f"{config.where}: 'model_type' is {kind}, which is no language model's")
    family = FAMILIES[kind]
    for part in (config, Config(whole)):
        part.refuse("is_causal", [True], "only causal attention is supported")
        part.refuse("per_layer_config", [{}], "settings of single layers are not supported")
    return family, Config(family.defaults | config.values, config.where)


def model_args(config: Any) -> ModelArgs:
    """Returns the ModelArgs of a Hugging Face config. config: the content of config.json.

    Raises ValueError for a key that is missing, for a value of the wrong type, out of range or not
    supported, and for sizes that contradict each other or exceed any computer's memory.
    """
    family, config = find_family(config)
    args = family.read(config)
    check_sizes(args)
    return args


def names_of(config: Any) -> Names:
    """Returns the table from Hugging Face's module names to ours for a config's family. Raises
    ValueError as find_family does."""
    return find_family(config)[0].names


def check_sizes(args: ModelArgs) -> None:
    """Raises ValueError for sizes that contradict each other or exceed any computer's memory.
    Called by model_args: each size alone is in its range already."""
    # Upper bounds of numbers of weights. layer: of one layer; tables: of embedding, output head and
    # learned positions.
    positions = args.context if args.positions == "learned" else 0
    layer = args.dim * (2 * (args.n_heads + args.n_kv_heads) * args.head_dim + 3 * args.hidden_dim)
    tables = (2 * args.vocab_size + positions) * max(args.dim, args.embed_dim)
    faults = {
        f"'num_attention_heads' is {args.n_heads} and must be a multiple of "
        f"'num_key_value_heads', {args.n_kv_heads}": args.n_heads % args.n_kv_heads,
        f"'head_dim' is {args.head_dim} and must be even and at least 2, or 4 with dynamic rotary "
        "positions: channels are rotated in pairs, of a head all or its partial_rotary_factor": any(
            # The dynamic kind divides by rope.dim - 2.
            rope.dim % 2 or rope.dim < (4 if rope.kind == "dynamic" else 2)
            for rope in args.ropes
        ),
        f"a model of 'hidden_size' {args.dim}, {args.n_layers} layers and 'vocab_size' "
        f"{args.vocab_size} has more than {MAX_PARAMETERS:.0e} weights": (
            args.n_layers * layer + tables > MAX_PARAMETERS
        ),
    }
    for fault, present in faults.items():
        if present:
            raise ValueError(f"config.json: {fault}")


def with_stored_biases(args: ModelArgs, names: Collection[str], path: Path) -> ModelArgs:
    """Returns args without the biases that the config declares and no layer has in the file; logs
    their names.

    path: the checkpoint's, for the log. names: our names of the stored tensors. Some relatives of
    Llama declare attention_bias, and have biases of q, k and v but none of the output; as in
    transformers, absent biases are zero. If only some layers lack a bias, it stays declared, and
    Checkpoint.check raises an error.
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


def tensor_name(name: str, names: Names) -> tuple[str, int] | None:
    """Translate Hugging Face's tensor name to (our tensor's name, number of the part): q, k and v
    are parts 0, 1 and 2 of wqkv. A tensor that is not stacked is part 0.

    names: of the family. Returns None for a stored tensor that is not a weight of the language
    model, and (name, 0) for an unknown name. Channels are not permuted: model.py rotates halves, as
    transformers does.
    """
    if NO_WEIGHT.search(name) or of_encoder(name):
        return None
    module, layer, kind = split_name(PREFIX.sub("", name))
    # StableLM has a norm for each head, such as q_layernorm.norms.3: the head is the part.
    module, _, head = module.partition(".norms.")
    module += ".norms" if head else ""
    if module not in names:
        return name, 0
    ours, part = names[module]
    return f"{ours.replace('N', layer)}.{kind}", int(head or part)


def of_encoder(name: str) -> bool:
    """Returns whether the tensor of this name, Hugging Face's, belongs to a vision encoder."""
    return multimodal.ENCODERS.search(name) is not None


def export_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Returns our tensors under Hugging Face's names, with stacked tensors split into their parts.

    Used by scripts/train_demo.py. config: the content of config.json. Not for Phi 3, whose files
    have stacked tensors, nor for StableLM with norms of queries and keys, whose parts are heads. An
    output head that is tied to the embedding is left out.
    """
    args = model_args(config)
    row_counts = {  # of the parts, in order
        "wqkv": [n * args.head_dim for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)],
        "w13": [args.hidden_dim, args.hidden_dim],
    }
    table = names_of(config)
    prefix = "model.decoder." if "embed_positions" in table else "model."  # only OPT has a decoder
    # Our module -> {number of the part: Hugging Face's module}
    theirs: dict[str, dict[int, str]] = {}
    for module, (ours, part) in table.items():
        # A family's table may have Llama's module and, after it, the family's own module for the
        # same part: the latter counts.
        theirs.setdefault(ours, {})[part] = module if module == "lm_head" else prefix + module
    exported = {}
    for name, tensor in tensors.items():
        ours, layer, kind = split_name(name)
        if ours == "output" and args.tied:
            continue
        modules = theirs[ours].values()
        pieces = tensor.split(row_counts[ours.rpartition(".")[2]]) if len(modules) > 1 else [tensor]
        exported |= {
            f"{module.replace('N', layer)}.{kind}": piece
            for module, piece in zip(modules, pieces, strict=True)
        }
    return exported


def split_name(name: str) -> tuple[str, str, str]:
    """Split a tensor's name into module, layer and kind: 'layers.3.fc1.bias' -> ('layers.N.fc1',
    '3', 'bias'). The layer of a module outside layers is ''."""
    module, _, kind = name.rpartition(".")
    layer = LAYER.search(module)
    return LAYER.sub(".N.", module), layer[1] if layer else "", kind


# Field of ModelArgs -> the modules of a layer that have biases if it is true.
BIASES = {"attention_bias": "attention.wqkv", "wo_bias": "attention.wo", "mlp_bias": "feed_forward"}
# Prefixes of tensor names: of torch.compile and DataParallel, then of transformers.
PREFIX = re.compile(r"^(_orig_mod\.|module\.)*(model\.)?(language_model\.)?(model\.)?(decoder\.)?")
# Tensors that older files store although they are no weights: rotary tables, a version number.
NO_WEIGHT = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|decoder\.version)$")
LAYER = re.compile(r"\.(\d+)\.")

"""Tiny random models of transformers, the oracle of every family that config.json may name.

VARIANTS has at least three configurations of each family; OLD has the same rotary settings as files
written before transformers 5 say them. reference builds a variant's model, save writes its
folder, expected asks transformers for the continuation of a prompt and for the logits it came from,
and continued asks this project.

Prompts are longer than WINDOW, and some are longer than ORIGINAL, the context before its extension.
"""

import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from common import LLAMA3, ROOT
from torch import Tensor, nn

from checkpoint import Checkpoint
from decoding import LoadedModel
from engine import generate
from model import Transformer
from text.generation_config import GenerationConfig

transformers = pytest.importorskip("transformers")

Options = dict[str, Any]
VOCAB, WINDOW, ORIGINAL, CONTEXT = 97, 8, 32, 256
SLIDING, FULL = "sliding_attention", "full_attention"
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SMALL = NO_TOKENS | {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
DEEP = SMALL | {"num_hidden_layers": 4}
# Rotary settings of Llama; a head has 16 channels, 8 frequencies.
SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0]
LONG = [1.0, 1.5, 2.0, 2.6, 3.3, 4.1, 5.0, 6.0]
THETA = {"rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3 | {"rope_theta": 5e5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
    "yarn-mscale": YARN | {"mscale": 1.4, "mscale_all_dim": 0.6},
    "yarn-one-mscale": YARN | {"mscale": 1.4},
    "yarn-betas": YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
    "yarn-untruncated": YARN | {"truncate": False},
    "yarn-factor-of-contexts": YARN | {"factor": None},
    "longrope": LONGROPE | {"original_max_position_embeddings": ORIGINAL},
    "longrope-factors": LONGROPE
    | {"original_max_position_embeddings": ORIGINAL, "factor": 3.0, "attention_factor": 1.2},
    "longrope-factor": LONGROPE | {"original_max_position_embeddings": ORIGINAL, "factor": 3.0},
}
CONTEXTS = {"dynamic": ORIGINAL + WINDOW}  # of the settings that extend the context itself


def llama(name: str) -> tuple[str, Options]:
    """The variant of Llama with one of ROPES."""
    context = CONTEXTS.get(name, CONTEXT)
    rope = {"rope_parameters": THETA | ROPES[name], "max_position_embeddings": context}
    return "Llama", SMALL | rope


def layers(pattern: str) -> Options:
    """The options of a model with a layer for each letter: s slides, f is full."""
    types = [SLIDING if letter == "s" else FULL for letter in pattern]
    return {"num_hidden_layers": len(types), "layer_types": types}


GRANITE = {
    "embedding_multiplier": 3.5,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.11,
    "logits_scaling": 2.5,
}
GEMMA = DEEP | {"head_dim": 24, "query_pre_attn_scalar": 40, "sliding_window": WINDOW}
GEMMA3 = GEMMA | {"num_hidden_layers": 6}
PHI = SMALL | {"original_max_position_embeddings": ORIGINAL}
PARTIAL = LONGROPE | {"short_factor": SHORT[:6], "long_factor": LONG[:6]}
VARIANTS: dict[str, tuple[str, Options]] = {
    "qwen2": ("Qwen2", SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("Qwen2", SMALL | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "qwen2-windows": (
        "Qwen2",
        DEEP | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2-no-windows": ("Qwen2", SMALL | {"sliding_window": WINDOW, "max_window_layers": 0}),
    "qwen2-layer-types": (
        "Qwen2",
        SMALL | layers("sfs") | {"use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "qwen2-yarn": ("Qwen2", SMALL | {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen2-head-dim": ("Qwen2", SMALL | {"head_dim": 24, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 24}),
    "qwen3-biases": ("Qwen3", SMALL | {"head_dim": 16, "attention_bias": True}),
    "qwen3-tied": ("Qwen3", SMALL | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-windows": (
        "Qwen3",
        DEEP
        | {"head_dim": 8, "use_sliding_window": True}
        | {"sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3-yarn": ("Qwen3", SMALL | {"head_dim": 16, "rope_parameters": YARN | THETA}),
    "mistral-window": ("Mistral", SMALL | {"sliding_window": WINDOW}),
    "mistral-no-window": ("Mistral", SMALL | {"sliding_window": None}),
    "mistral-head-dim": ("Mistral", SMALL | {"head_dim": 24, "sliding_window": 2 * WINDOW}),
    "mistral-window-of-2": ("Mistral", SMALL | {"sliding_window": 2}),
    "ministral": ("Ministral", SMALL | {"head_dim": 24, "sliding_window": WINDOW}),
    "ministral-layer-types": (
        "Ministral",
        SMALL | layers("fsss") | {"head_dim": 16, "sliding_window": WINDOW},
    ),
    "ministral-tied": (
        "Ministral",
        SMALL
        | layers("sf")
        | {"head_dim": 32, "sliding_window": 5, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e8}},
    ),
    "gemma2": (
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 0.7},
    ),
    "gemma2-no-score-cap": ("Gemma2", GEMMA | {"attn_logit_softcapping": None}),
    "gemma2-no-logit-cap": (
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": None},
    ),
    "gemma2-layer-types": (
        "Gemma2",
        GEMMA | layers("ffs") | {"head_dim": 16, "query_pre_attn_scalar": 8},
    ),
    "gemma2-untied": (
        "Gemma2",
        GEMMA | {"tie_word_embeddings": False, "attention_bias": True, "hidden_activation": "silu"},
    ),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3-pattern": (
        "Gemma3Text",
        GEMMA3
        | {"sliding_window_pattern": 3}
        | {"final_logit_softcapping": 0.7, "attn_logit_softcapping": 0.5},
    ),
    "gemma3-layer-types": ("Gemma3Text", GEMMA3 | layers("sfsf") | {"sliding_window": 5}),
    "gemma3-linear": (
        "Gemma3Text",
        GEMMA3
        | layers("ssf")
        | {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ),
    "gemma3-untied": (
        "Gemma3Text",
        GEMMA3 | layers("sf") | {"tie_word_embeddings": False, "attention_bias": True},
    ),
    "phi3": ("Phi3", SMALL),
    "phi3-window": ("Phi3", SMALL | {"sliding_window": WINDOW, "num_key_value_heads": 4}),
    "phi3-longrope": ("Phi3", PHI | {"rope_parameters": LONGROPE}),
    "phi3-longrope-window": (
        "Phi3",
        PHI | {"rope_parameters": LONGROPE | {"factor": 4.0}, "sliding_window": 3 * WINDOW},
    ),
    "phi4-mini": (
        "Phi3",
        PHI
        | {"tie_word_embeddings": True}
        | {"rope_parameters": PARTIAL | {"partial_rotary_factor": 0.75}},
    ),
    "phi3-partial": ("Phi3", SMALL | {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "smollm3": ("SmolLM3", DEEP),
    "smollm3-untied": (
        "SmolLM3",
        DEEP
        | {"no_rope_layer_interval": 2, "tie_word_embeddings": False}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "smollm3-no-rope": ("SmolLM3", SMALL | {"no_rope_layers": [0, 1]}),
    "smollm3-windows": (
        "SmolLM3",
        DEEP
        | {"no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True}
        | {"sliding_window": WINDOW},
    ),
    "smollm3-yarn": ("SmolLM3", DEEP | {"rope_parameters": YARN | {"rope_theta": 5e6}}),
    "olmo2": ("Olmo2", SMALL | {"num_key_value_heads": 4}),
    "olmo2-groups": ("Olmo2", SMALL | {"rms_norm_eps": 1e-3}),
    "olmo2-biases": (
        "Olmo2",
        SMALL
        | {"attention_bias": True, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "olmo3": ("Olmo3", DEEP | {"sliding_window": WINDOW}),
    "olmo3-yarn": (
        "Olmo3",
        SMALL
        | layers("ssf")
        | {"sliding_window": WINDOW}
        | {
            "rope_parameters": {
                FULL: YARN | {"rope_theta": 5e5, "attention_factor": 1.2},
                SLIDING: {"rope_type": "default", "rope_theta": 5e5},
            }
        },
    ),
    "olmo3-layer-types": (
        "Olmo3",
        SMALL | layers("fs") | {"sliding_window": 5, "num_key_value_heads": 4},
    ),
    "granite": ("Granite", SMALL | GRANITE),
    "granite-tied": (
        "Granite",
        SMALL | GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "granite-plain": ("Granite", SMALL | {"attention_multiplier": 0.25}),
    "granite-yarn": ("Granite", SMALL | GRANITE | {"rope_parameters": YARN | THETA}),
    "starcoder2": ("Starcoder2", SMALL | {"sliding_window": WINDOW}),
    "starcoder2-no-biases": (
        "Starcoder2",
        SMALL | {"use_bias": False, "tie_word_embeddings": False, "norm_epsilon": 1e-2},
    ),
    "starcoder2-untied": (
        "Starcoder2",
        SMALL
        | {"tie_word_embeddings": False, "num_key_value_heads": 1, "sliding_window": 2 * WINDOW}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "hidden_act": "gelu"},
    ),
    "stablelm": ("StableLm", SMALL),
    "stablelm-biases": (
        "StableLm",
        SMALL
        | {"use_qkv_bias": True, "tie_word_embeddings": True, "layer_norm_eps": 1e-2}
        | {"rope_parameters": {"partial_rotary_factor": 0.5, **THETA}},
    ),
    "stablelm-parallel": (
        "StableLm",
        SMALL | {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "stablelm-head-norms": (
        "StableLm",
        SMALL | {"qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 4},
    ),
    "stablelm-linear": (
        "StableLm",
        SMALL
        | {"rope_parameters": ROPES["linear"] | THETA | {"partial_rotary_factor": 0.25}}
        | {"use_parallel_residual": True},
    ),
    "nemotron": ("Nemotron", SMALL),
    "nemotron-biases": (
        "Nemotron",
        SMALL | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "nemotron-tied": (
        "Nemotron",
        SMALL
        | {"tie_word_embeddings": True, "head_dim": 24, "norm_eps": 1e-2, "hidden_act": "gelu"}
        | {"rope_parameters": {"partial_rotary_factor": 0.25, **THETA}},
    ),
    "nemotron-yarn": (
        "Nemotron",
        SMALL
        | {"num_key_value_heads": 1, "mlp_bias": True}
        | {"rope_parameters": YARN | {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    ),
} | {f"llama-{name}": llama(name) for name in ROPES}


def old(rope: Options, key: str, **more: Any) -> Options:
    """Rotary settings as files written before transformers 5 say them. key: of the rope type."""
    rope = {key if name == "rope_type" else name: value for name, value in rope.items()}
    theta = rope.pop("rope_theta", 1e4)
    return {"rope_theta": theta, "rope_scaling": rope or None, **more}


# Of variants: the keys that stand for rope_parameters in an older file.
OLD: dict[str, Options] = {
    f"llama-{name}": old(rope, ("type", "rope_type")[n % 2])
    for n, (name, rope) in enumerate(ROPES.items())
} | {
    "qwen2": {"rope_theta": 1e6},
    "qwen2-yarn": old(YARN | {"rope_theta": 1e6}, "type"),
    "qwen3-yarn": old(YARN, "rope_type"),
    "ministral-tied": {"rope_theta": 1e8, "rope_scaling": None},
    "gemma3-linear": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3": {},
    "phi3-longrope": old(LONGROPE, "type"),
    "phi3-longrope-window": old(
        LONGROPE | {"rope_type": "yarn", "factor": 4.0}, "type", partial_rotary_factor=1.0
    ),
    "phi4-mini": old(PARTIAL, "type", partial_rotary_factor=0.75),
    "phi3-partial": {"partial_rotary_factor": 0.5},
    "smollm3": {"rope_theta": 2e6},
    "smollm3-yarn": old(YARN | {"rope_theta": 5e6}, "rope_type"),
    "olmo2-biases": {"rope_theta": 5e5},
    "olmo3-yarn": old(YARN | {"rope_theta": 5e5, "attention_factor": 1.2}, "rope_type"),
    "granite-yarn": old(YARN, "type"),
    "starcoder2-untied": {"rope_theta": 1e5},
    "stablelm": {"partial_rotary_factor": 0.25},
    "stablelm-biases": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "stablelm-linear": old(ROPES["linear"], "type"),
    "nemotron": {"rope_theta": 1e4},
    "nemotron-tied": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "nemotron-yarn": old(YARN | {"rope_theta": 1e6}, "type", partial_rotary_factor=1.0),
}
# Frequencies depend on the length of the text.
BY_LENGTH = [
    variant
    for variant, (_, options) in VARIANTS.items()
    if options.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope")
]
# A variant of each family, with its windows, for the tests that take long.
OF_EACH_FAMILY = (
    "qwen2-windows qwen3-windows mistral-window ministral-layer-types gemma2 gemma3-linear "
    "phi4-mini smollm3-windows olmo2-groups olmo3-yarn granite-tied starcoder2 stablelm-parallel "
    "nemotron-biases llama-yarn"
).split()

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIGLIP = VISION | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e6}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
# The class of the model, the class of its config, and the options of the config.
MULTIMODAL: dict[str, tuple[str, str, Options]] = {
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": GEMMA3 | layers("ssf") | {"final_logit_softcapping": 0.5},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 96,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": SMALL | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]},
            "image_token_id": 95,
            "video_token_id": 96,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": SMALL
            | {"model_type": "mistral", "head_dim": 24, "sliding_window": None},
            "vision_config": SIGLIP | {"model_type": "pixtral"},
            "image_token_index": 96,
            "tie_word_embeddings": False,
        },
    ),
}


def reference(variant: str) -> nn.Module:
    """The random model of transformers of a variant; always the same. Its every weight counts."""
    if variant in MULTIMODAL:
        model_class, config_class, options = MULTIMODAL[variant]
    else:
        family, options = VARIANTS[variant]
        config_class = f"{family}Config"
        model_class = f"{family.removesuffix('Text')}ForCausalLM"
    config = getattr(transformers, config_class)(**copied(options))
    seed = zlib.crc32(variant.encode())  # other variants do not change it
    return randomised(getattr(transformers, model_class), config, seed)


def copied(options: Any) -> Any:
    """A deep copy of options: configs of transformers change the dicts that they are given."""
    if isinstance(options, dict):
        return {key: copied(value) for key, value in options.items()}
    return list(options) if isinstance(options, list) else options


def randomised(model_class: type[nn.Module], config: Any, seed: int) -> nn.Module:
    """A model of a config with random weights: no norm multiplies by 1, no bias is 0.

    The scales of the norms of Gemma and Nemotron are offsets from 1, and those of other norms are
    not. The embedding of a tied head is small, for otherwise the likeliest token would always be
    the last one.
    """
    # Weights of its own, which are replaced below, would take half of the time.
    with mock.patch.object(transformers.PreTrainedModel, "initialize_weights"):
        model = model_class(config)
    offsets = model_class.__name__.startswith(("Gemma", "Nemotron"))
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        std = 0.05 if tied and weight is table else 0.2
        weight.data.normal_(std=std, generator=generator).add_(is_scale and not offsets)
    return model.eval()


def save(model: nn.Module, folder: Path) -> Path:
    """Save a model of transformers with a tokenizer, which only load_model needs."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "checkpoints" / "demo" / file, folder)
    return folder


def load(path: Path) -> Transformer:
    """This project's model of a folder, in float32."""
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    checkpoint.load_into(model, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def prefill(model: Transformer, tokens: Tensor) -> Tensor:
    """All logits of this project for a batch of prompts, (B, T), which one call reads."""
    B, T = tokens.shape
    key_pos, lengths = torch.arange(T), torch.full((B, 1), T)
    return model(tokens, key_pos.expand(B, T), key_pos, model.make_caches(B, T), lengths=lengths)


def prompts_of(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Distinct random prompts. Ids of images, which are the last ones, are not among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB - 2, (n,), generator=generator).tolist() for n in lengths]


def expected(
    model: Callable[[], nn.Module], prompt: list[int], count: int
) -> tuple[list[int], Tensor]:
    """The greedy ids of transformers after one prompt, and the logits of each, (count, V).

    model: makes a new model, since rotary embeddings keep the frequencies of the longest text.
    """
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    done = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    return done.sequences[0, len(prompt) :].tolist(), torch.cat(done.logits)


@torch.no_grad()
def expected_of_text(
    model: nn.Module, prompt: list[int], ids: list[int]
) -> tuple[list[int], Tensor]:
    """As `expected`, from one pass over a prompt and ids, which a model may have continued it by.

    Equal to what `expected` returns if the ids are those, unless frequencies depend on the length.
    """
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # (count, V)
    return logits.argmax(-1).tolist(), logits


def continued(
    lm: LoadedModel, prompts: list[list[int]], count: int
) -> list[tuple[list[int], Tensor]]:
    """The greedy ids and logits, as `expected` returns them, of a batch in one call."""
    seen: dict[tuple[int, ...], Tensor] = {}

    def watch(ids: Tensor, logits: Tensor) -> Tensor:
        seen.update(zip(map(tuple, ids.tolist()), logits.clone(), strict=True))
        return logits

    config = GenerationConfig(max_new_tokens=count, temperature=0, ignore_eos=True)
    steps = list(generate(lm, prompts, config, logits_processors=[watch]))
    results = []
    for row, prompt in enumerate(prompts):
        ids = [token for step in steps for token in step[row]]
        texts = [(*prompt, *ids[:n]) for n in range(len(ids))]
        results.append((ids, torch.stack([seen[text] for text in texts])))
    return results


def check_continuation(
    found: tuple[list[int], Tensor], wanted: tuple[list[int], Tensor], tolerance: float
) -> None:
    """Raises AssertionError unless ids and logits are equal, up to a tie of the two best logits."""
    (ids, logits), (wanted_ids, wanted_logits) = found, wanted
    pairs = enumerate(zip(ids, wanted_ids, strict=True))
    end = next((n for n, (a, b) in pairs if a != b), len(ids))
    compared = slice(0, end + 1)  # the logits that the first different id was chosen by, too
    torch.testing.assert_close(logits[compared], wanted_logits[compared], atol=tolerance, rtol=0)
    if end < len(ids):
        tied = wanted_logits[end, [ids[end], wanted_ids[end]]]
        assert tied.diff().abs() < 2 * tolerance, (end, ids[end], wanted_ids[end])

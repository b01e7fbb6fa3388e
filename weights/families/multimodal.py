"""Multimodal configs: the language model of Gemma 3, Mistral 3 and Qwen 2.5-VL, without vision.

Start at text_values. The config of the language model is the object text_config within the whole
one; an encoder of images, whose tensors are skipped (ENCODERS), is described beside it.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from layers.args import ModelArgs
from weights.config import Config
from weights.families.llama import qwen2_args
from weights.families.shared import LLAMA, Family


@dataclass(frozen=True)
class Multimodal:
    """What a multimodal model_type says of its language model.

    model_type: where text_config has none. tied: tie_word_embeddings where the whole config has
    none; inner_tied: whether that of text_config counts, too. values: count whatever text_config
    says.
    """

    model_type: str
    tied: bool
    inner_tied: bool = False
    values: dict[str, Any] = field(default_factory=dict)


def text_values(config: Any) -> Any:
    """Returns the config of the language model within a multimodal one; any other one unchanged.

    Early configs of Qwen have no text_config: the language model's keys lie beside vision_config.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in MODELS:
        return config
    model = MODELS[kind]
    inner = config.get("text_config") or config | {"model_type": model.model_type}
    values = {"model_type": model.model_type} | Config(inner, "config.json, text_config").values
    tied = config.get("tie_word_embeddings", model.tied)
    if model.inner_tied and values.get("tie_word_embeddings"):
        tied = True
    masks = {key: config[key] for key in ("is_causal", "per_layer_config") if key in config}
    return values | {"tie_word_embeddings": tied} | masks | model.values


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose output head is not the embedding. config: multimodal, or any other."""
    change = {"tie_word_embeddings": False}
    inner = config.get("text_config")
    return config | change | ({"text_config": inner | change} if isinstance(inner, dict) else {})


def qwen_vl_args(config: Config) -> ModelArgs:
    """Qwen 2. The rotary kind mrope has a position for each of three axes, which are equal in a
    text."""
    return qwen2_args(config, theta=1e6, aliases={"mrope": "default"})


QWEN_VL = Multimodal("qwen2_5_vl_text", tied=False, inner_tied=True)
MODELS = {
    # The softcap of the language model is not used, as in transformers.
    "gemma3": Multimodal("gemma3_text", tied=True, values={"final_logit_softcapping": None}),
    "mistral3": Multimodal("mistral", tied=True),
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
}
QWEN_VL_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
}
QWEN_VL_TEXT = Family(qwen_vl_args, LLAMA, QWEN_VL_DEFAULTS)
FAMILIES = {"qwen2_vl_text": QWEN_VL_TEXT, "qwen2_5_vl_text": QWEN_VL_TEXT}
# Names of tensors of encoders and of the projections of their outputs.
ENCODERS = re.compile(r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\.")

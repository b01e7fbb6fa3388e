"""Multimodal configs: the language model of Gemma 3, Mistral 3, Qwen 2-VL and 2.5-VL, without
vision.

Start at text_config. The config of the language model is the object text_config within the whole
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

    model_type: the default of text_config's. tied: the default of the whole config's
    tie_word_embeddings; inner_tied: whether true in text_config ties them as well. values: override
    those of text_config. unused: keys of text_config that transformers does not use.
    """

    model_type: str
    tied: bool
    inner_tied: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def text_config(config: Any) -> Config:
    """Returns the config of the language model within a multimodal one; any other config as it is.

    Whether embeddings are tied is read from the whole config, see Multimodal. Early configs of Qwen
    have no text_config: the language model's keys lie beside vision_config. Raises ValueError for a
    text_config that is no object.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in MODELS:
        return Config(config)
    model = MODELS[kind]
    inner = config.get("text_config") or config | {"model_type": model.model_type}
    given = Config(inner, "config.json, text_config" if "text_config" in config else "config.json")
    values = {"model_type": model.model_type} | given.values
    values = {key: value for key, value in values.items() if key not in model.unused}
    tied = config.get("tie_word_embeddings", model.tied)
    if model.inner_tied and values.get("tie_word_embeddings"):
        tied = True
    values |= {"tie_word_embeddings": tied} | model.values
    return Config(values, given.where)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose output head is not the embedding. config: multimodal, or any other."""
    change = {"tie_word_embeddings": False}
    inner = config.get("text_config")
    return config | change | ({"text_config": inner | change} if isinstance(inner, dict) else {})


def qwen_vl_args(config: Config) -> ModelArgs:
    """Returns the args of a Qwen 2. mrope rotates by three positions (time, height, width), which
    are equal for text: there it is the default kind."""
    return qwen2_args(config, theta=1e6, aliases={"mrope": "default"})


QWEN_VL = Multimodal("qwen2_5_vl_text", tied=False, inner_tied=True)
# model_type of a whole config -> how to read its text_config.
MODELS = {
    # final_logit_softcapping in text_config is ignored, as in transformers.
    "gemma3": Multimodal("gemma3_text", tied=True, values={"final_logit_softcapping": None}),
    # Only a Mistral that is a model of its own becomes Ministral by layer_types.
    "mistral3": Multimodal("mistral", tied=True, unused=("layer_types",)),
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
# model_type of a text_config -> its family, besides those that are also models of their own.
FAMILIES = {"qwen2_vl_text": QWEN_VL_TEXT, "qwen2_5_vl_text": QWEN_VL_TEXT}
# Names of the tensors of image encoders and of the projectors after them.
ENCODERS = re.compile(r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\.")

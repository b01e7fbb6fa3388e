"""Multimodal configs: the language model of Gemma 3, Mistral 3, Qwen 2-VL and 2.5-VL, without
vision.

Start at text_config. The whole config is the content of config.json. The language model's config is
the object under its key "text_config"; other keys describe the encoder of images, whose tensors are
skipped (ENCODERS).
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
    """How the language model's config is read, for one model_type of a whole config.

    model_type: the language model's, if text_config does not give it. tied: the default of the
    whole config's tie_word_embeddings. inner_tied: whether a true tie_word_embeddings in
    text_config ties the embeddings, too. values: override those of text_config. unused: keys of
    text_config that are dropped, because transformers does not use them.
    """

    model_type: str
    tied: bool
    inner_tied: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def text_config(config: Any) -> Config:
    """Returns the config of the language model; any config but a multimodal one is returned whole.

    config: the whole one. Whether embeddings are tied is read from it, see Multimodal. Early
    configs of Qwen have no text_config: the language model's keys lie beside vision_config. Raises
    ValueError for a text_config that is no object.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in MODELS:
        return Config(config)
    model = MODELS[kind]
    inner = config.get("text_config") or config | {"model_type": model.model_type}
    where = "config.json, text_config" if config.get("text_config") else "config.json"
    given = Config(inner, where)
    values = {"model_type": model.model_type} | given.values
    values = {key: value for key, value in values.items() if key not in model.unused}
    tied = config.get("tie_word_embeddings", model.tied)
    if model.inner_tied and values.get("tie_word_embeddings"):
        tied = True
    values |= {"tie_word_embeddings": tied} | model.values
    return Config(values, given.where)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a whole config, multimodal or not, in which tie_word_embeddings is false:
    the output head then has weights of its own."""
    change = {"tie_word_embeddings": False}
    inner = config.get("text_config")
    return config | change | ({"text_config": inner | change} if isinstance(inner, dict) else {})


def qwen_vl_args(config: Config) -> ModelArgs:
    """Returns the args of the language model of Qwen 2-VL or 2.5-VL, a Qwen 2.

    Rotary positions of the kind mrope rotate by three positions (time, height, width). For text all
    three are equal, so that mrope rotates as the default kind does.
    """
    return qwen2_args(config, theta=1e6, aliases={"mrope": "default"})


QWEN_VL = Multimodal("qwen2_5_vl_text", tied=False, inner_tied=True)
# model_type of a whole config -> how to read its text_config.
MODELS = {
    # final_logit_softcapping in text_config is ignored, as in transformers.
    "gemma3": Multimodal("gemma3_text", tied=True, values={"final_logit_softcapping": None}),
    # Without this, mistral_args would read a config with layer_types as Ministral's. transformers
    # does so only for a Mistral that is a model of its own.
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
# model_type of a text_config -> its family; without those that are also models of their own.
FAMILIES = {"qwen2_vl_text": QWEN_VL_TEXT, "qwen2_5_vl_text": QWEN_VL_TEXT}
# Names of the tensors of image encoders and of the projectors after them.
ENCODERS = re.compile(r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\.")

"""Values of a config.json: the right ones as transformers takes them, the wrong ones refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from common import LLAMA3

from engine import generate
from layers.positions import RotaryPositions
from load import config_dtype, random_model
from quant.linear import meta_model
from text.generation_config import GenerationConfig
from weights.families.shared import MAX_LAYERS
from weights.hf import model_args
from weights.int4_layouts import foreign_scheme, quantization_config

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = SIZES | {"model_type": "llama", "intermediate_size": 48}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "num_key_value_heads": 2},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 48},
}
YARN = {"rope_type": "yarn", "factor": 4.0}
NAN, INF = math.nan, math.inf
NEVER = (True, False, [], [4], {}, {"a": 1}, "", "x", "4", NAN, INF, -INF, -1, 0, 0.0)
WRONG = {
    "integer": (*NEVER, None, 256.0, 1.5, 2**40, 2**62, 2**63, 10**400),
    "number": (*NEVER, None, -1e-5, 1e300, 10**400),
    "flag": (None, 0, 1, 1.0, "true", "", [], [True], {}, NAN),
    "choice": (None, 0, 1.5, True, "", "x", "SILU", ["silu"], [], {}, {"a": 1}),
    "section": (0, 1.5, True, False, "linear", [], [1], ["factor"]),
}
KINDS = {
    "llama": {
        "integer": "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim "
        "intermediate_size max_position_embeddings num_key_value_heads",
        "number": "rms_norm_eps rope_theta",
        "flag": "attention_bias mlp_bias tie_word_embeddings",
        "choice": "hidden_act model_type",
        "section": "rope_scaling rope_parameters",
    },
    "mistral": {
        "integer": "num_key_value_heads head_dim sliding_window max_position_embeddings",
        "number": "rms_norm_eps rope_theta",
    },
    "opt": {
        "integer": "vocab_size hidden_size num_hidden_layers num_attention_heads ffn_dim "
        "max_position_embeddings word_embed_proj_dim",
        "flag": "do_layer_norm_before _remove_final_layer_norm enable_bias tie_word_embeddings "
        "layer_norm_elementwise_affine",
        "choice": "activation_function model_type",
    },
}
ROPE_KINDS = {
    "number": "factor low_freq_factor high_freq_factor rope_theta",
    "integer": "original_max_position_embeddings",
    "choice": "rope_type",
}
# null means the default here, as it does to transformers.
NULL = "num_key_value_heads", "head_dim", "sliding_window", "word_embed_proj_dim"
CASES = [
    (family, key, kind)
    for family, kinds in KINDS.items()
    for kind, keys in kinds.items()
    for key in keys.split()
]


def refused(config: Any, *named: str) -> None:
    with pytest.raises(ValueError) as caught:
        model_args(config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    assert all(name in message for name in named), message


@pytest.mark.parametrize(("family", "key", "kind"), CASES)
def test_wrong_values_are_refused_by_name(family: str, key: str, kind: str):
    model_args(FAMILIES[family])
    for value in WRONG[kind]:
        if not (value is None and key in NULL):
            refused(FAMILIES[family] | {key: value}, f"'{key}'")


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_wrong_rotary_values_are_refused_by_name(section: str):
    model_args(LLAMA | {section: LLAMA3})
    for kind, keys in ROPE_KINDS.items():
        for key in keys.split():
            for value in WRONG[kind]:
                refused(LLAMA | {section: LLAMA3 | {key: value}}, f"'{key}'", section)
    for kind in ("linear", "dynamic"):
        for value in WRONG["number"]:
            refused(LLAMA | {section: {"type": kind, "factor": value}}, "'factor'", section)
        refused(LLAMA | {section: {"type": kind}}, "'factor'", section)


@pytest.mark.parametrize("key", ["quant_method", "bits", "group_size", "desc_act", "lm_head"])
def test_wrong_values_of_a_quantisation_are_refused_by_name(key: str):
    right = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    assert foreign_scheme(right)["linears"]["groupsize"] == 128
    for value in (None, "x", "128", 128.0, 4.0, NAN, INF, -1, [4], ["gptq"], {}, 2**62):
        with pytest.raises(ValueError, match="quant_method|quantised by") as caught:
            foreign_scheme(right | {key: value})
        assert "\n" not in str(caught.value)
        assert key == "quant_method" or f"{key} " in str(caught.value)
    for value in ("gptq", 4, True, ["gptq"], 1.5):
        with pytest.raises(ValueError, match="config.json: quantization_config is"):
            quantization_config({"quantization_config": value}, Path(), packed=True)


@pytest.mark.parametrize("config", [None, [], [LLAMA], "llama", 3, {}, {"model_type": {"a": []}}])
def test_what_is_no_config_is_refused(config: Any):
    refused(config, "config.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": 5}, ("'hidden_size' is 32", "'num_attention_heads', 5")),
        ({"num_key_value_heads": 3}, ("'num_attention_heads' is 4", "'num_key_value_heads', 3")),
        ({"num_key_value_heads": 8}, ("'num_key_value_heads', 8",)),
        ({"head_dim": 7}, ("'head_dim' is 7", "even")),
        ({"num_attention_heads": 32}, ("'head_dim' is 1", "even")),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ("'low_freq_factor' is 4",)),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("'head_dim' is 2",)),
        ({"rope_scaling": {"type": "dynamic"}}, ("rope_scaling", "'factor'")),
    ],
)
def test_values_that_do_not_fit_together_are_refused(change: dict, named: tuple[str, ...]):
    refused(LLAMA | change, *named)


def test_sizes_are_refused_before_anything_is_built():
    largest = {"hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": MAX_LAYERS}
    refused(LLAMA | largest, "'hidden_size' 16777216", "weights")
    refused(LLAMA | {"vocab_size": 2**28, "hidden_size": 2**20}, "'vocab_size' 268435456")
    long = {"max_position_embeddings": 2**31, "hidden_size": 2**20}
    refused(FAMILIES["opt"] | long, "weights")
    model_args(LLAMA | {"max_position_embeddings": 2**31})
    largest_real = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    assert model_args(LLAMA | largest_real | {"num_attention_heads": 128}).head_dim == 128


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        ("llama", {"rope_scaling": None, "rope_parameters": None}),
        ("llama", {"rope_scaling": {}, "rope_theta": 500.0}),
        ("llama", {"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 2}}),
        ("llama", {"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": {k: LLAMA3[k] for k in list(LLAMA3)[:4]}}),
        ("mistral", {"head_dim": None, "sliding_window": None}),
        ("mistral", {"sliding_window": 16}),
        ("opt", {"word_embed_proj_dim": None}),
    ],
)
def test_values_mean_what_they_mean_to_transformers(family: str, change: dict):
    transformers = pytest.importorskip("transformers")
    config = FAMILIES[family] | change
    classes = {"llama": "LlamaConfig", "mistral": "MistralConfig", "opt": "OPTConfig"}
    full = getattr(transformers, classes[family])(**config).to_dict()
    assert model_args(config) == model_args(full)


@pytest.mark.parametrize("family", ["mistral", "opt"])
def test_a_context_that_is_absent_is_transformers_default(family: str):
    transformers = pytest.importorskip("transformers")
    config = FAMILIES[family] | {"sliding_window": None}
    del config["max_position_embeddings"]
    classes = {"mistral": transformers.MistralConfig, "opt": transformers.OPTConfig}
    assert model_args(config).context == classes[family]().max_position_embeddings


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": None}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "half"}, torch.float16),
        ({"dtype": None, "torch_dtype": "torch.float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
    ],
)
def test_dtype_of_weights_that_are_not_there(config: dict, dtype: torch.dtype):
    assert config_dtype(config) == dtype


@pytest.mark.parametrize("value", [16, True, "", "int8", "float8_e4m3fn", "nn", "torch.", [], {}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_other_dtypes_are_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=rf"'{key}' is .*bfloat16") as caught:
        config_dtype({key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_a_long_context_costs_what_a_short_one_costs(scaling: dict | None, tmp_path: Path):
    texts = {}
    for context in (128, 2**22, 2**31):
        config = LLAMA | {"max_position_embeddings": context, "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        lm = random_model(tmp_path / "config.json", device="cpu")
        nbytes = sum(b.nbytes for b in meta_model(lm.model.args, None).buffers() if not b.is_meta)
        assert nbytes < 256
        greedy = GenerationConfig(max_new_tokens=8, temperature=0, ignore_eos=True)
        texts[context] = list(generate(lm, [[1, 2, 3]], greedy))
    assert texts[128] == texts[2**22] == texts[2**31]


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 3.0}])
@pytest.mark.parametrize("head_dim", [8, 20, 128])
def test_angles_are_those_of_transformers_bit_for_bit(head_dim: int, scaling: dict | None):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = LLAMA | {"head_dim": head_dim, "rope_scaling": scaling}
    theirs = modeling.LlamaRotaryEmbedding(modeling.LlamaConfig(**config))
    pos = torch.tensor([[0, 1, 2, 63], [100, 8191, 131071, 4194303]])
    cos, sin = theirs(torch.zeros(1), pos)
    positions = RotaryPositions(model_args(config))
    _, (rotation,) = positions(torch.zeros(1), pos)
    for mine, other in zip(rotation, (cos, sin), strict=True):
        assert torch.equal(mine.squeeze(2), other[..., : head_dim // 2])
    _, (alone,) = positions(torch.zeros(1), pos[1:, 2:3])
    assert torch.equal(alone[0][0, 0, 0], cos[1, 2, : head_dim // 2])


def test_compiled_angles_are_eager_angles():
    config = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    positions = RotaryPositions(model_args(config))
    compiled = torch.compile(positions, fullgraph=True, backend="aot_eager")
    pos, x, lengths = torch.tensor([[3, 60], [63, 99]]), torch.zeros(1), torch.tensor([[2], [90]])
    for given in ((x, pos), (x, pos, lengths)):
        for mine, other in zip(compiled(*given)[1][0], positions(*given)[1][0], strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("kind", "changes", "context"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        # Qwen 2.5's advice for long texts: max_position_embeddings stays that of the training.
        ("qwen2", {"rope_scaling": YARN | {"original_max_position_embeddings": 64}}, 256),
        ("qwen2", {"rope_scaling": YARN | {"original_max_position_embeddings": 16}}, 64),
        ("llama", {"rope_scaling": LLAMA3}, 64),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 64),
    ],
)
def test_scaled_rotary_positions_extend_the_context(kind: str, changes: Any, context: int):
    config = LLAMA | {"model_type": kind, "head_dim": 8, "num_key_value_heads": 2}
    assert model_args(config | changes).context == context


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo3"])
def test_a_section_for_a_type_of_layer_may_name_its_kind_in_the_older_way(kind: str):
    config = LLAMA | {"model_type": kind, "layer_types": ["sliding_attention", "full_attention"]}
    scaling = {"factor": 2.0, "rope_theta": 1e6}
    found = [
        model_args(config | {"rope_parameters": {"full_attention": scaling | {key: "linear"}}})
        for key in ("type", "rope_type")
    ]
    assert found[0] == found[1]
    assert [layer.rope.kind for layer in found[0].layer_types] == ["default", "linear"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"full_attention": YARN}}, ("'full_attention'", "share their rotary")),
        ({"rope_scaling": YARN | {"rope_theta": 1}}, ("'rope_theta' is 1", "above 1")),
        (
            {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3"}},
            ("no language",),
        ),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": 0}},
            ("text_config", "hidden_size"),
        ),
        ({"model_type": "qwen9"}, ("'model_type' is \"qwen9\"", "gemma3, mistral3")),
        ({"model_type": "granitemoehybrid"}, ("Mamba",)),
    ],
)
def test_what_no_family_reads_is_refused_by_name(change: dict[str, Any], named: tuple[str, ...]):
    with pytest.raises(ValueError) as caught:
        model_args(LLAMA | change)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in named), str(caught.value)


def test_keys_that_transformers_does_not_use_are_not_read():
    """Gemma's hidden_act, and the layer_types of the Mistral in a Mistral 3."""
    gemma = LLAMA | {"model_type": "gemma3_text", "head_dim": 8}
    assert model_args(gemma | {"hidden_act": "x"}) == model_args(gemma)
    inner = LLAMA | {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2}
    types = {"layer_types": ["full_attention", "sliding_attention"]}
    args = model_args({"model_type": "mistral3", "text_config": inner | types})
    assert [layer.window for layer in args.layer_types] == [8, 8]
    assert [layer.window for layer in model_args(inner | types).layer_types] == [None, 8]


@pytest.mark.parametrize("outer", [{}, {"is_causal": True}])
@pytest.mark.parametrize("inner", [{}, {"is_causal": True}])
def test_no_part_of_a_multimodal_config_hides_another(outer: dict, inner: dict):
    for place in (outer, inner):
        text = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2} | inner
        config = {"model_type": "mistral3", **outer, "text_config": text}
        assert model_args(config).n_layers == 2
        (config if place is outer else text)["is_causal"] = False
        refused(config, "'is_causal' is false")

"""Each family against transformers: logits and greedy tokens of tiny random models.

Prompts of unlike lengths in one batch are compared with what transformers gives to each alone.
"""

import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from families import (
    BY_LENGTH,
    CONTEXT,
    MULTIMODAL,
    OF_EACH_FAMILY,
    OLD,
    ORIGINAL,
    VARIANTS,
    VOCAB,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint import Checkpoint
from host.log import log_once
from layers.positions import ROPES
from load import load_model
from model import ACTIVATIONS, Transformer, make_embedding, make_logits_scale
from scripts.convert_hf_checkpoint import convert
from weights.hf import export_tensors, model_args

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

TOLERANCE = 1e-4  # max abs, fp32
COUNT = 42  # new tokens: the shorter prompt outgrows windows and all contexts before extension
LENGTHS = 3, 50  # of prompts: within windows and contexts, and beyond
SEED = 20261129
Folder = Callable[[str], Path]


def config_of(family: str, options: families.Options) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{family}Config")(**families.copied(options))


def whole_prompts(length: int) -> Tensor:
    print(f"seed {SEED}, {length} tokens")
    return torch.tensor(families.prompts_of(SEED, [length] * 3))


@torch.no_grad()
def check_prompts(model: Transformer, reference: nn.Module, tokens: Tensor) -> None:
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    found = families.prefill(model, tokens)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", [*VARIANTS, *MULTIMODAL])
def test_logits_of_prompts(variant: str, family_folder: Folder):
    model = families.load(family_folder(variant))
    for length in (20, 50):
        check_prompts(model, families.reference(variant), whole_prompts(length))


@pytest.mark.parametrize("variant", [*VARIANTS, *MULTIMODAL])
def test_greedy_tokens_and_their_logits(variant: str, family_folder: Folder):
    """transformers generates, too, for a variant of each family; texts of others it reads."""
    lm = load_model(family_folder(variant), device="cpu", dtype="float32")
    prompts = families.prompts_of(SEED, LENGTHS)
    print(f"seed {SEED}")
    rows = families.continued(lm, prompts, COUNT)
    for prompt, found in zip(prompts, rows, strict=True):
        if variant in (*OF_EACH_FAMILY, *BY_LENGTH):
            wanted = families.expected(lambda: families.reference(variant), prompt, COUNT)
        else:
            wanted = families.expected_of_text(families.reference(variant), prompt, found[0])
        families.check_continuation(found, wanted, TOLERANCE)


@pytest.mark.parametrize("variant", OLD)
def test_older_files_mean_the_same(variant: str, family_folder: Folder, tmp_path: Path):
    family, options = VARIANTS[variant]
    options = {key: v for key, v in options.items() if key != "rope_parameters"} | OLD[variant]
    reference = families.reference(variant)
    config = getattr(transformers, f"{family}Config")(**families.copied(options))
    as_read = type(reference)(config).eval()
    as_read.load_state_dict(reference.state_dict())
    tokens = whole_prompts(50)
    with torch.no_grad():
        assert torch.equal(as_read(tokens).logits, reference(tokens).logits)
    for file in family_folder(variant).iterdir():
        (tmp_path / file.name).symlink_to(file)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["rope_parameters"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(written | OLD[variant]))
    check_prompts(families.load(tmp_path), reference, tokens)


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, "swish", "gelu_new", "gelu_fast"}))
def test_activations_are_those_of_transformers(name: str):
    x = torch.linspace(-8, 8, 500)
    expected = transformers.activations.ACT2FN[name](x)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [10, 5000])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_rotations_at_the_end_of_a_long_context(kind: str, length: int):
    """Angles are within 2e-4 of those of transformers at position 131072, where an error in the
    last bit of the frequency 1 would be 0.008."""
    factors = {"short_factor": [1 + n / 90 for n in range(48)]}
    factors |= {"long_factor": [1 + n / 3 for n in range(48)]}
    rope = families.ROPES[kind] | {"original_max_position_embeddings": 4096} | families.THETA
    rope |= factors if kind == "longrope" else {}
    sizes = families.SMALL | {"head_dim": 96, "max_position_embeddings": 2**17}
    config = transformers.LlamaConfig(**sizes, rope_parameters=families.copied(rope))
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
    (args,) = model_args(config.to_dict()).ropes
    lengths = torch.full((1, 1), length)
    found = ROPES[kind](args).frequencies(torch.zeros(1, 1, dtype=torch.long), lengths)
    torch.testing.assert_close(found.flatten() * 2**17, expected * 2**17, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", sorted({family for family, _ in VARIANTS.values()}))
def test_absent_keys_mean_what_they_mean_to_transformers(family: str):
    sizes = {"vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 96}
    bare = sizes | {"num_hidden_layers": 7, "num_attention_heads": 32, "head_dim": 16}
    config = getattr(transformers, f"{family}Config")(**bare, pad_token_id=None)
    bare |= {"model_type": config.model_type}
    full = config.to_dict()
    assert len(full) > 2 * len(bare)
    assert model_args(bare) == model_args(full)


def test_gemma3_of_the_hub_leaves_most_keys_out():
    """As the config of gemma-3-4b-it does, whose heads are those of the class."""
    text = {"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 7}
    text |= {"model_type": "gemma3_text", "sliding_window": 64}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    bare = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    full = transformers.Gemma3Config(**families.copied(bare)).to_dict()
    assert model_args(bare) == model_args(full)
    assert model_args(bare).n_heads == 8


def test_qwen_vl_of_the_hub_has_text_keys_beside_those_of_the_vision_tower():
    _, _, options = MULTIMODAL["qwen2.5-vl"]
    text = {**options["text_config"], "tie_word_embeddings": False}
    del text["rope_parameters"]
    scaling = {"type": "mrope", "mrope_section": [4, 2, 2]}
    flat = {**text, "model_type": "qwen2_5_vl", "rope_theta": 1e6, "rope_scaling": scaling}
    nested = transformers.Qwen2_5_VLConfig(**families.copied(flat)).to_dict()
    assert model_args(flat | {"vision_config": {"depth": 1}}) == model_args(nested)


@pytest.mark.parametrize("variant", MULTIMODAL)
def test_text_part_under_the_names_of_the_class(
    variant: str, family_folder: Folder, tmp_path: Path
):
    """save_pretrained writes those of the Hub, language_model.model.* for model.language_model.*;
    files of other tools have those of the class."""
    reference = families.reference(variant)
    tied = Checkpoint(family_folder(variant)).args.tied
    tensors = {
        name: tensor
        for name, tensor in reference.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    assert any(name.startswith("model.language_model.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(family_folder(variant) / "config.json")
    check_prompts(families.load(tmp_path), reference, whole_prompts(50))


@pytest.mark.parametrize("variant", MULTIMODAL)
def test_tensors_of_the_vision_tower_are_skipped_and_said(
    variant: str, family_folder: Folder, capsys: pytest.CaptureFixture
):
    log_once.cache_clear()
    model = families.load(family_folder(variant))
    assert not [name for name in model.state_dict() if "vis" in name]
    assert "vis" in capsys.readouterr().err


@pytest.mark.parametrize("variant", [*OF_EACH_FAMILY, *MULTIMODAL])
def test_a_converted_file_has_the_same_weights(variant: str, family_folder: Folder):
    source = families.load(family_folder(variant)).state_dict()
    converted = convert(family_folder(variant), None)
    model = families.load(converted)
    converted.unlink()  # other tests read the files that it was made from
    assert model.state_dict().keys() == source.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_a_converted_head_stays_apart_from_the_embedding(family_folder: Folder, tmp_path: Path):
    """Of a config that ties them twice, in text_config, too."""
    source = family_folder("qwen2.5-vl")
    config, tied = json.loads((source / "config.json").read_text()), {"tie_word_embeddings": True}
    text = config["text_config"] | tied
    (tmp_path / "config.json").write_text(json.dumps(config | tied | {"text_config": text}))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    weights = families.load(source).state_dict()
    found = families.load(convert(tmp_path, None)).state_dict()
    assert torch.equal(found["output.weight"], weights["output.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["granite", "gemma2", "gemma3"])
def test_embeddings_are_scaled_as_in_transformers(variant: str, dtype: torch.dtype):
    """By a factor that bfloat16 rounds. Bit for bit, but that in float64 transformers multiplies by
    a factor of float32."""
    name, options = VARIANTS[variant]
    config = config_of(name, options | {"hidden_size": 96, "embedding_multiplier": 10.1})
    theirs = getattr(transformers, f"{name}Model")(config).to(dtype)
    ours = make_embedding(model_args(config.to_dict())).to(dtype)
    ours.weight.data.copy_(theirs.embed_tokens.weight)
    seen, tokens = [], torch.arange(VOCAB).unsqueeze(0)
    theirs.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        theirs(tokens)
        tolerance = 1e-6 if dtype == torch.float64 else 0
        torch.testing.assert_close(ours(tokens), seen[0], rtol=tolerance, atol=0)


def test_granites_logits_are_divided_as_in_transformers():
    """Products with the reciprocal of 13 differ in the last bit."""
    name, options = VARIANTS["granite"]
    config = config_of(name, options | {"logits_scaling": 13.0})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    tokens = torch.arange(VOCAB).unsqueeze(0)
    head: list[Tensor] = []
    theirs.lm_head.register_forward_hook(lambda _, given, y: head.append(y))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        found = make_logits_scale(model_args(config.to_dict()))(head[0])
    assert torch.equal(found, wanted)


def test_phi3_computes_keys_again_only_with_longrope():
    names = "phi3", "phi3-window", "phi3-longrope"
    args = [model_args(config_of(*VARIANTS[name]).to_dict()) for name in names]
    assert [each.recompute_after for each in args] == [None, None, ORIGINAL]


@pytest.mark.parametrize("variant", OF_EACH_FAMILY)
def test_the_context_is_not_that_of_the_window(variant: str, family_folder: Folder):
    assert Checkpoint(family_folder(variant)).args.context == CONTEXT


@pytest.mark.parametrize("variant", ["llama-linear", "gemma3", "olmo2", "starcoder2", "nemotron"])
def test_exported_tensors_are_those_of_the_file(variant: str, family_folder: Folder):
    path = family_folder(variant)
    checkpoint = Checkpoint(path)
    ours = {name: checkpoint.read(name) for name in checkpoint.tensors}
    exported = export_tensors(ours, json.loads((path / "config.json").read_text()))
    stored = load_file(path / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)

"""Each family against transformers: logits and greedy tokens of tiny random models.

Prompts of unlike lengths in one batch are compared with what transformers gives to each alone.
"""

import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from families import CONTEXT, MULTIMODAL, OF_EACH_FAMILY, OLD, VARIANTS, VOCAB
from torch import Tensor, nn

from checkpoint import Checkpoint
from load import load_model
from model import Transformer
from scripts.convert_hf_checkpoint import convert
from weights.hf import model_args

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # max abs, fp32
COUNT = 100  # new tokens
LENGTHS = 3, 50  # of prompts: within windows and contexts, and beyond
SEED = 20261129
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A function that saves the model of a variant and returns its folder."""
    folder = tmp_path_factory.mktemp("families")

    def save(variant: str) -> Path:
        if not (folder / variant).exists():
            families.save(families.reference(variant), folder / variant)
        return folder / variant

    return save


def load(path: Path) -> Transformer:
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    checkpoint.load_into(model, dtype=torch.float32)
    return model.eval()


def whole_prompts(length: int) -> Tensor:
    print(f"seed {SEED}, {length} tokens")
    return torch.tensor(families.prompts_of(SEED, [length] * 3))


@torch.no_grad()
def check_prompts(model: Transformer, reference: nn.Module, tokens: Tensor) -> None:
    """All logits of a batch of prompts, (B, T), which one call reads."""
    B, T = tokens.shape
    key_pos, lengths = torch.arange(T), torch.full((B, 1), T)
    found = model(tokens, key_pos.expand(B, T), key_pos, model.make_caches(B, T), lengths=lengths)
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", [*VARIANTS, *MULTIMODAL])
def test_logits_of_prompts(variant: str, saved: Saved):
    model = load(saved(variant))
    for length in (20, 50):
        check_prompts(model, families.reference(variant), whole_prompts(length))


@pytest.mark.parametrize("variant", [*VARIANTS, *MULTIMODAL])
def test_greedy_tokens_and_their_logits(variant: str, saved: Saved):
    lm = load_model(saved(variant), device="cpu", dtype="float32")
    prompts = families.prompts_of(SEED, LENGTHS)
    print(f"seed {SEED}")
    rows = families.continued(lm, prompts, COUNT)
    for prompt, found in zip(prompts, rows, strict=True):
        wanted = families.expected(lambda: families.reference(variant), prompt, COUNT)
        families.check_continuation(found, wanted, TOLERANCE)


@pytest.mark.parametrize("variant", OLD)
def test_older_files_mean_the_same(variant: str, saved: Saved, tmp_path: Path):
    family, options = VARIANTS[variant]
    options = {key: v for key, v in options.items() if key != "rope_parameters"} | OLD[variant]
    reference = families.reference(variant)
    config = getattr(transformers, f"{family}Config")(**families.copied(options))
    as_read = type(reference)(config).eval()
    as_read.load_state_dict(reference.state_dict())
    tokens = whole_prompts(50)
    with torch.no_grad():
        assert torch.equal(as_read(tokens).logits, reference(tokens).logits)
    for file in saved(variant).iterdir():
        (tmp_path / file.name).symlink_to(file)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["rope_parameters"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(written | OLD[variant]))
    check_prompts(load(tmp_path), reference, tokens)


@pytest.mark.parametrize("family", sorted({family for family, _ in VARIANTS.values()}))
def test_absent_keys_mean_what_they_mean_to_transformers(family: str):
    sizes = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 96}
    bare = sizes | {"num_hidden_layers": 7, "num_attention_heads": 32}
    config = getattr(transformers, f"{family}Config")(**bare, pad_token_id=None, head_dim=16)
    bare |= {"model_type": config.model_type, "head_dim": 16}
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


# Names of tensors on the Hub, of which transformers makes others: (of transformers, of the Hub).
RENAMED = {
    "gemma3-vision": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "qwen2.5-vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
    "mistral3": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("variant", MULTIMODAL)
@pytest.mark.parametrize("names", ["of the Hub", "of the class"])
def test_text_part_of_either_tensor_names(
    variant: str, names: str, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture
):
    from safetensors.torch import save_file

    reference = families.reference(variant)
    tensors = dict(reference.state_dict())
    if reference.get_output_embeddings().weight is reference.get_input_embeddings().weight:
        tensors.pop("lm_head.weight")
    for theirs, hub in RENAMED[variant] if names == "of the Hub" else []:
        tensors = {
            hub + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor
            for name, tensor in tensors.items()
        }
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved(variant) / "config.json").read_text())
    check_prompts(load(tmp_path), reference, whole_prompts(50))
    assert "vision" in capsys.readouterr().err  # whose tensors are skipped


@pytest.mark.parametrize("variant", [*OF_EACH_FAMILY, *MULTIMODAL])
def test_a_converted_file_has_the_same_weights(variant: str, saved: Saved):
    source = load(saved(variant)).state_dict()
    converted = convert(saved(variant), None)
    model = load(converted)
    converted.unlink()  # other tests read the files that it was made from
    assert model.state_dict().keys() == source.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", OF_EACH_FAMILY)
def test_the_context_is_not_that_of_the_window(variant: str, saved: Saved):
    assert Checkpoint(saved(variant)).args.context == CONTEXT

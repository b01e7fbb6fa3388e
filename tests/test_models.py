"""Logits against transformers': tiny random models of every variant, and real small ones."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import common
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint import Checkpoint
from decoding import Draft, LoadedModel
from draft_length import DraftLengthController
from engine import generate
from evaluation.scoring import log_likelihoods
from load import make_views
from model import Transformer
from speculate import NgramDraft, SelfDraft
from text.generation_config import GenerationConfig
from text.tokenizer import id_tokenizer
from weights.hf import export_tensors, model_args

transformers = pytest.importorskip("transformers")

Prompts = list[list[int]]
TOLERANCE = 1e-4  # max abs, fp32
BATCH, LENGTH = 3, 24
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 48, "max_position_embeddings": 64}
OPT = SMALL | {"ffn_dim": 48, "max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 10000.0}
LLAMA3 = common.LLAMA3 | {"rope_theta": 500000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
VARIANTS = {
    "llama-mha": ("Llama", LLAMA),
    "llama-gqa": ("Llama", LLAMA | {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", LLAMA | {"head_dim": 16, "num_key_value_heads": 1}),
    "llama-linear": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
    "llama-dynamic": ("Llama", LLAMA | {"rope_parameters": DYNAMIC, "num_key_value_heads": 2}),
    "llama-3.1": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "num_key_value_heads": 2}),
    "codellama": ("Llama", LLAMA | {"rope_parameters": DEFAULT, "rms_norm_eps": 1e-3}),
    "llama-gelu": ("Llama", LLAMA | {"hidden_act": "gelu"}),
    "mistral": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": 16}),
    "opt": ("OPT", OPT),
    "opt-untied": ("OPT", OPT | {"tie_word_embeddings": False}),
    "opt-350m": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-projections": ("OPT", OPT | {"word_embed_proj_dim": 20}),
    "opt-no-final-norm": ("OPT", OPT | {"_remove_final_layer_norm": True}),
    "galactica": ("OPT", OPT | {"enable_bias": False, "activation_function": "gelu"}),
    "opt-plain-norm": ("OPT", OPT | {"layer_norm_elementwise_affine": False}),
}
# Configurations as transformers before 5 wrote them.
OLD_SCHEMAS = {
    "llama-linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-3.1": {
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    },
    "codellama": {"rope_theta": 1e6, "rope_scaling": None},
    "llama-dynamic": {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.5}},
}


def oracle(variant: str) -> nn.Module:
    """A random model of transformers whose every weight counts: no norm is 1, no bias 0."""
    family, options = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(list(VARIANTS).index(variant))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        weight.data.normal_(std=0.3).add_("norm" in name and name.endswith("weight"))
    return model


def save(model: nn.Module, folder: Path, form: str) -> None:
    model.save_pretrained(folder, max_shard_size="16KB" if form == "sharded" else "1GB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 2) == (form == "sharded")
    if form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        files[0].unlink()


def load(path: Path) -> Transformer:
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    checkpoint.load_into(model, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def prefill(model: Transformer, tokens: Tensor) -> Tensor:
    B, T = tokens.shape
    pos = torch.arange(T).expand(B, T)
    return model(tokens, pos, torch.arange(T), model.make_caches(B, T))


@torch.no_grad()
def prefill_and_decode(model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
    """All logits, where each row's first `lengths` tokens come at once and the rest singly."""
    B, T = tokens.shape
    key_pos, caches, rows = torch.arange(T), model.make_caches(B, T), torch.arange(B)
    widest = int(lengths.max())
    logits = torch.zeros(B, T, model.args.vocab_size)
    padded = tokens[:, :widest].masked_fill(torch.arange(widest) >= lengths[:, None], 0)
    logits[:, :widest] = model(padded, torch.arange(widest).expand(B, -1), key_pos, caches)
    for step in range(T - int(lengths.min())):
        pos = (lengths + step).clamp(max=T - 1)  # a finished row repeats its last token
        new = model(tokens[rows, pos, None], pos[:, None], key_pos, caches)
        logits[rows, pos] = new[:, 0]
    return logits


@torch.no_grad()
def check_logits(model: Transformer, reference: nn.Module, seed: int = 0) -> None:
    T = min(LENGTH, model.args.context)
    generator = torch.Generator().manual_seed(seed)
    print(f"seed {seed}")
    tokens = torch.randint(model.args.vocab_size, (BATCH, T), generator=generator)
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(prefill(model, tokens), expected, atol=TOLERANCE, rtol=0)
    lengths = torch.tensor([3, T // 2, T - 1])
    split = prefill_and_decode(model, tokens, lengths)
    torch.testing.assert_close(split, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, tmp_path: Path):
    reference = oracle(variant)
    save(reference, tmp_path / "single", "single")
    model = load(tmp_path / "single")
    check_logits(model, reference)
    for form in ("sharded", "bin"):
        save(reference, tmp_path / form, form)
        for name, weight in load(tmp_path / form).state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), (form, name)


@pytest.mark.parametrize("variant", OLD_SCHEMAS)
def test_old_rope_schema(variant: str, tmp_path: Path):
    reference = oracle(variant)
    save(reference, tmp_path, "single")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | OLD_SCHEMAS[variant]))
    check_logits(load(tmp_path), reference)


@pytest.mark.parametrize("variant", ["llama-mha", "mistral", "opt"])
def test_absent_keys_mean_what_they_mean_to_transformers(variant: str):
    family = VARIANTS[variant][0]
    bare = (OPT if family == "OPT" else LLAMA) | {"model_type": family.lower()}
    bare["num_attention_heads"] = 16  # Mistral has 8 key/value heads where nothing is said
    full = getattr(transformers, f"{family}Config")(**bare).to_dict()
    assert len(full) > 2 * len(bare)
    assert model_args(bare) == model_args(full)


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_real_model(name: str, data_dir: Path):
    path = data_dir / "models" / name
    model = load(path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    check_logits(model, reference)
    assert greedy(model, 200) == reference_greedy(reference, 200)


@torch.no_grad()
def greedy(model: Transformer, count: int) -> list[int]:
    """Ids after BOS, whatever they are: an EOS does not stop."""
    key_pos, caches = torch.arange(count), model.make_caches(1, count)
    ids = [1]
    for pos in range(count):
        logits = model(torch.tensor([ids[-1:]]), torch.tensor([[pos]]), key_pos, caches)
        ids.append(int(logits[0, -1].argmax()))
    return ids


@torch.no_grad()
def reference_greedy(model: nn.Module, count: int) -> list[int]:
    ids, cache = [1], None
    for _ in range(count):
        result = model(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        ids.append(int(result.logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied", "opt-350m"])
def test_export_is_the_way_back(variant: str, tmp_path: Path):
    save(oracle(variant), tmp_path, "single")
    config = json.loads((tmp_path / "config.json").read_text())
    exported = export_tensors(load(tmp_path).state_dict(), config)
    stored = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)


LLAMA_CONFIG = LLAMA | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, r"'model_type' is \"gpt_neox\".*llama, mistral, .*opt"),
        ({"hidden_act": "relu6"}, r"'hidden_act' is \"relu6\".*silu"),
        (
            {"rope_scaling": {"type": "axial", "factor": 2.0}},
            r"'type' is \"axial\".*linear, llama3",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, r"'low_freq_factor'"),
    ],
)
def test_unsupported_config_is_named(change: dict, message: str):
    model_args(LLAMA_CONFIG)
    with pytest.raises(ValueError, match=message) as caught:
        model_args(LLAMA_CONFIG | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_missing_config_key_is_named(key: str):
    config = {k: v for k, v in LLAMA_CONFIG.items() if k != key}
    with pytest.raises(ValueError, match=f"'{key}'"):
        model_args(config)


def views(model: Transformer, **options) -> LoadedModel:
    lm = make_views(model, id_tokenizer(model.args.vocab_size), False, False)
    return dataclasses.replace(lm, **options)


def answers(lm: LoadedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=count, temperature=0, ignore_eos=True)
    steps = list(generate(lm, prompts, config))
    return [[token for step in steps for token in step[row]] for row in range(len(prompts))]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Prompts, Prompts]:
    """A model of 64 trained positions, prompts within, across and beyond them, and the answers
    that transformers gives to each alone."""
    folder = tmp_path_factory.mktemp("dynamic")
    save(oracle("llama-dynamic"), folder, "single")
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(97, (1, n), generator=generator) for n in (10, 30, 50, 63, 64, 65, 100)
    ]
    answers = []
    for prompt in prompts:
        reference = oracle("llama-dynamic")  # anew: it keeps the frequencies of the longest text
        options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(prompt)
        answer = reference.generate(prompt, attention_mask=mask, pad_token_id=0, **options)
        answers.append(answer[0, prompt.shape[1] :].tolist())
    return load(folder), [prompt[0].tolist() for prompt in prompts], answers


def test_dynamic_rope_within_across_and_beyond_the_trained_context(dynamic: tuple):
    model, prompts, expected = dynamic
    assert model.args.context == 160
    assert answers(views(model), prompts, 40) == expected
    for prompt, answer in zip(prompts, expected, strict=True):
        assert answers(views(model), [prompt], 40) == [answer]


@pytest.mark.parametrize("chunk", [16, 37])
def test_dynamic_rope_reads_a_prompt_in_chunks_as_in_one(dynamic: tuple, chunk: int):
    model, prompts, expected = dynamic
    assert answers(views(model, prefill_chunk_tokens=chunk), prompts[-1:], 40) == expected[-1:]
    assert answers(views(model, prefill_chunk_tokens=chunk * len(prompts)), prompts, 40) == expected


@pytest.mark.parametrize("draft", [NgramDraft, lambda controller: SelfDraft(controller, None)])
def test_dynamic_rope_with_a_draft(dynamic: tuple, draft: Callable[[DraftLengthController], Draft]):
    model, prompts, expected = dynamic
    made = draft(DraftLengthController(3))
    if isinstance(made, SelfDraft):
        made.lm = views(model)  # guesses that hold, and many tokens verified at once
    assert answers(views(model, draft=made), prompts, 40) == expected


def test_dynamic_rope_scores_each_text_as_transformers_does_alone(dynamic: tuple):
    model, prompts, _ = dynamic
    text = prompts[-1]
    asked = [(text[:n], 1) for n in (20, 66, 90, 100)]  # all begin alike
    for number, nats, _ in log_likelihoods(views(model), asked):
        ids = torch.tensor([asked[number][0]])
        with torch.inference_mode():
            logits = oracle("llama-dynamic")(ids[:, :-1]).logits.log_softmax(-1)
        expected = logits.gather(-1, ids[:, 1:, None]).sum().item()
        assert nats == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(
    ("variant", "absent", "named"),
    [
        ("llama-biases", "o_proj.bias", "attention.wo"),
        ("llama-biases", "_proj.bias", "feed_forward"),
        ("opt", "out_proj.bias", "attention.wo"),
    ],
)
def test_biases_that_no_layer_has_are_zeros(
    variant: str, absent: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    reference = oracle(variant)
    for name, weight in reference.named_parameters():
        if name.endswith(absent):
            weight.data.zero_()
    save(reference, tmp_path, "single")
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(absent)}, file)
    check_logits(load(tmp_path), reference)
    assert f"no biases of {named}" in capsys.readouterr().err


def test_a_bias_that_one_layer_lacks_is_missed(tmp_path: Path):
    save(oracle("llama-biases"), tmp_path, "single")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.o_proj.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers.1.attention.wo.bias is missing"):
        load(tmp_path)

"""No key of a config is ignored that changes the model: logits equal transformers', or an error.

Each key that a family's configuration in transformers knows is changed, one at a time. Either
reading the folder raises a ValueError of one line that names the key or its value, or the logits
are those of transformers with the same config.json. Where transformers fails, this project may fail
with a ValueError or read the config. Changes that this project ignores are made together, and one
at a time only if transformers' logits are then others.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import families
import pytest
import torch
from families import (
    FULL,
    LONGROPE,
    MULTIMODAL,
    ORIGINAL,
    PARTIAL,
    ROPES,
    SLIDING,
    THETA,
    VARIANTS,
    WINDOW,
    YARN,
    Options,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from layers.args import ModelArgs
from weights.hf import model_args

transformers = pytest.importorskip("transformers")
auto = pytest.importorskip("transformers.models.auto.modeling_auto")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

transformers.logging.set_verbosity_error()  # it warns of most of the values below
TOLERANCE = 1e-4  # max abs, fp32
SEED = 20261201
# Variants whose features are all in use, so that a changed key shows.
BASES = (
    "llama-linear qwen2-windows qwen3-windows mistral-window ministral-layer-types gemma2 "
    "gemma3-pattern phi3-longrope-window phi4-mini smollm3-windows olmo2-groups olmo3 granite-tied "
    "starcoder2 stablelm-parallel nemotron-biases"
).split()
# Keys that change no logits, whatever their sensible values.
NO_EFFECT: dict[str, list[Any]] = {
    "attention_dropout": [0.1],
    "architectures": [["Other"]],
    "bos_token_id": [3],
    "chunk_size_feed_forward": [0],
    "dtype": ["float16", "float32"],
    "embd_pdrop": [0.1],
    "embedding_dropout": [0.1],
    "eos_token_id": [3, [3, 4]],
    "hidden_dropout": [0.1],
    "id2label": [{"0": "a", "1": "b"}],
    "initializer_range": [0.5],
    "label2id": [{"a": 0, "b": 1}],
    "output_hidden_states": [True],
    "pad_token_id": [3],
    "pretraining_tp": [2],
    "problem_type": ["regression"],
    "resid_pdrop": [0.1],
    "residual_dropout": [0.1],
    "return_dict": [False],
    "transformers_version": ["4.0.0"],
    "use_cache": [False],
}
ACTIVATIONS = ["silu", "gelu", "relu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "x", None, 1]
KINDS = [
    *(THETA | rope for name, rope in ROPES.items() if "-" not in name),
    THETA | ROPES["yarn-betas"],
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5, **THETA},
    {"rope_type": "axial", **THETA},
    {"rope_type": "mrope", "mrope_section": [4, 2, 2], **THETA},
    {"rope_type": "unknown", "factor": 2.0},
    {"type": "linear", "rope_type": "default", "factor": 4.0},
    {"rope_type": None, "factor": 2.0},
    {"factor": 2.0},
    {"rope_type": "yarn"},
    {FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4}},
    {FULL: {"rope_theta": 3e4}, SLIDING: {"rope_type": "linear", "factor": 2.0}},
    {FULL: None},
    {"full": {"rope_theta": 3e4}},
    {},
    None,
    [],
    "linear",
]
OTHERS: dict[str, list[Any]] = {
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "rope_parameters": KINDS,
    "rope_scaling": [*KINDS, {"type": "linear", "factor": 4.0}, {"type": "yarn", "factor": 2.0}],
    "rope_theta": [100.0, 100, 0, -1.0, None],
    "rope_local_base_freq": [100.0, None],
    "partial_rotary_factor": [0.25, 0.5, 0.75, 1, 1.0, 2.0, 0.0, None],
    "original_max_position_embeddings": [16, 2 * ORIGINAL, None],
    "head_dim": [8, 24, 15, 0, None],
    "sliding_window": [3, WINDOW, 10**6, 0, None, 2.5],
    "sliding_window_pattern": [1, 2, 4, 0, None],
    "_sliding_window_pattern": [2],
    "no_rope_layers": [
        [0, 1, 0, 1],
        [1, 1, 1, 1],
        [True, False, True, True],
        [1],
        [],
        [2] * 4,
        None,
    ],
    "attn_logit_softcapping": [0.3, 30, 0.0, -1.0, None],
    "final_logit_softcapping": [0.3, 30, 0.0, -1.0, None],
    "per_layer_config": [{"0": {"intermediate_size": 32}}, {"1": {"sliding_window": 4}}, {}],
    "is_causal": [False, True],
    "use_bidirectional_attention": [True, False, None],
}
# Keys that no class declares: functions read them, or older files have them.
READ = [
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "head_dim",
    "hidden_act",
    "sliding_window_pattern",
    "per_layer_config",
    "is_causal",
]
FEWER_LAYERS = {"gemma3-pattern": {"num_hidden_layers": 4}}  # than of the variant, to save time
IGNORED = {"is_encoder_decoder", "vision_config"}  # of other models than decoders of text
# Rotary settings whose keys are changed: a variant, and the settings in place of its own.
NESTED = {
    FULL: YARN | {"rope_theta": 5e5},
    SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
ROPE_BASES: dict[str, tuple[str, Options]] = {
    **{
        f"llama-{name}": (f"llama-{name}", THETA | ROPES[name]) for name in ROPES if "-" not in name
    },
    "llama-default": ("llama-linear", {"rope_type": "default", **THETA}),
    "gemma3": ("gemma3-pattern", NESTED),
    "olmo3": ("olmo3-yarn", NESTED),
    "phi3": ("phi3-longrope", LONGROPE),
    "phi4-mini": ("phi4-mini", PARTIAL | {"partial_rotary_factor": 0.75}),
    "stablelm": ("stablelm-linear", ROPES["linear"] | THETA | {"partial_rotary_factor": 0.5}),
}
ROPE_KEYS = sorted({*rope_utils.RopeParameters.__annotations__, "type"})
ROPE_OTHERS: dict[str, list[Any]] = {
    "rope_type": ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "x", None],
    "type": ["linear", "yarn", "x", None],
    "short_factor": [[2.0] * 8, [2.0] * 6, [2] * 8, [1.0], [], None, [0.0] * 8],
    "long_factor": [[2.0] * 8, [2.0] * 6, [2] * 8, [1.0], [], None, ["a"] * 8],
    "mrope_section": [[4, 2, 2], None],
    "truncate": [True, False, None],
}
NUMBERS = [0.5, 1, 7, 0, -1.0, None, "2"]


class Change(NamedTuple):
    """A value for a key of a config. path: the keys that lead to it. older: rope_scaling then
    stands for rope_parameters, or for the section of them that has the key."""

    path: tuple[str, ...]
    value: Any
    older: bool = False


def config_of(variant: str) -> Options:
    """The config.json of a variant with its options only."""
    if variant in MULTIMODAL:
        _, name, options = MULTIMODAL[variant]
    else:
        family, options = VARIANTS[variant]
        name = f"{family}Config"
    model_type = getattr(transformers, name).model_type
    options = families.copied(options) | {"model_type": model_type}
    return options | FEWER_LAYERS.get(variant, {})


def keys_of(variant: str) -> set[str]:
    """The keys that the configuration class of a variant knows, and those that functions read."""
    model_type = config_of(variant)["model_type"]
    fields = dataclasses.fields(transformers.CONFIG_MAPPING[model_type])
    return {field.name for field in fields} - IGNORED | {*READ}


def other_values(key: str, config: Options) -> list[Any]:
    """Values to try for a key: sensible ones, and some that are not."""
    value = config.get(key)
    if key in OTHERS:
        return OTHERS[key]
    if key == "layer_types":
        return other_layer_types(config["num_hidden_layers"])
    if isinstance(value, bool):
        return [not value, None, 1]
    if isinstance(value, int):
        return [2 * value, value // 2, 1, 0, None, float(value), "2"]
    if isinstance(value, float):
        return [2 * value, value / 2, int(value) + 1, 0.0, -value, None]
    return [True, 3, 2.5, None, "x"]


def other_layer_types(count: int) -> list[Any]:
    names = "chunked_attention", "linear_attention", "attention", "mamba", "x", 1
    uniform = [[name] * count for name in (FULL, SLIDING)]
    mixed = [[FULL] * (count - 1) + [name] for name in (SLIDING, *names)]
    return [*uniform, *mixed, [FULL] * (count + 1), [], None, FULL]


def their_model(folder: Path) -> nn.Module | None:
    """The random model that transformers makes of a config.json, None if it fails."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tables = auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        multimodal = type(config) in tables[1]
        with mock.patch.object(nn.Linear, "reset_parameters"):  # other weights replace these
            return families.randomised(tables[multimodal][type(config)], config, SEED)
    except Exception:  # of any type: strict dataclasses, KeyError, TypeError, assertions
        return None


@torch.no_grad()
def their_logits(model: nn.Module | None, tokens: Tensor) -> Tensor | None:
    """The logits of transformers for tokens, (B, T); None if they fail or are not finite."""
    try:
        logits = model(tokens).logits if model else None
    except Exception:
        return None
    return logits if logits is not None and logits.isfinite().all() else None


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights beside the config.json, which stays as it is."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors")


@cache
def unchanged(config: str) -> tuple[ModelArgs, Tensor]:
    """The args and the logits of a config, as JSON, which this project must read as transformers
    does."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        assert (found := fault(json.loads(config), "", None, folder)) is None, found
        return model_args(json.loads(config)), their_logits(their_model(folder), some_tokens())


def some_tokens(vocab_size: int = families.VOCAB) -> Tensor:
    """Random prompts, beyond windows and contexts, without the last ids, which are images'."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size - 2, (2, ORIGINAL + 8), generator=generator)


def fault(
    config: Options, key: str, value: Any, folder: Path, base: Options | None = None
) -> str | None:
    """What is wrong with how this project reads a config; None if nothing is.

    key, value: what was changed, one of which an error must name. base: the config before that; the
    model of one with the same args is not run. Nor is transformers asked about a config that is
    refused with an error that names what was changed.
    """
    known = base and unchanged(json.dumps(base))
    (folder / "config.json").write_text(json.dumps(config))
    try:
        args = model_args(json.loads(json.dumps(config)))
    except ValueError as error:
        return bad_message(str(error), key, value, lambda: theirs(folder)[2] is None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    model, tokens, expected = theirs(folder)
    if expected is None:
        return None
    try:
        if known and known[0] == args:
            found, expected = expected, known[1]
        else:
            save(model, folder)
            found = families.prefill(families.load(folder), tokens)
    except ValueError as error:
        return bad_message(str(error), key, value, lambda: False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    difference = (found - expected).abs().max().item()
    return None if difference < TOLERANCE else f"logits differ by {difference:.1e}"


def theirs(folder: Path) -> tuple[nn.Module | None, Tensor, Tensor | None]:
    """The model of transformers of a config.json, prompts of its vocabulary, and their logits."""
    model = their_model(folder)
    size = model.get_input_embeddings().num_embeddings if model else families.VOCAB
    tokens = some_tokens(min(families.VOCAB, max(3, size)))
    return model, tokens, their_logits(model, tokens)


def bad_message(message: str, key: str, value: Any, any_reason: Callable[[], bool]) -> str | None:
    """What is wrong with an error message. any_reason: whether it need not name the key or the
    value, because transformers fails, too."""
    names = [key, json.dumps(value), *(value if isinstance(value, dict) else ())]
    names += ["short_factor"] if key == "head_dim" else []  # of which the list has another length
    said = any(name in message for name in names) or any_reason()
    return None if said and "\n" not in message else f"does not name the key: {message}"


def check(faults: Iterable[str]) -> None:
    """Fail with a list of the faults if there are any."""
    if found := [*faults]:
        pytest.fail("\n".join(found), pytrace=False)


def changed(config: Options, changes: Sequence[Change]) -> Options:
    """The config with changes, all of the same section and schema."""
    result = families.copied(config)
    for path, value, _ in changes:
        reduce(dict.__getitem__, path[:-1], result)[path[-1]] = families.copied(value)
    if any(change.older for change in changes):
        section = reduce(dict.__getitem__, path[:-1], result)
        del result["rope_parameters"]
        result["rope_scaling"] = section
    return result


def faults(config: Options, changes: Iterable[Change], folder: Path) -> Iterator[str]:
    """A line for each change of a config that is not read as it should be."""
    ignored: dict[tuple, list[Change]] = {}  # by section, schema, and the count of the key's before
    for change in changes:
        if not is_ignored(config, change):
            yield from line_of(config, change, folder)
            continue
        n = sum(change.path == other.path for group in ignored.values() for other in group)
        ignored.setdefault((change.path[:-1], change.older, n), []).append(change)
    for group in ignored.values():
        yield from ignored_faults(config, group, folder)


def is_ignored(config: Options, change: Change) -> bool:
    args, _ = unchanged(json.dumps(config))
    try:
        return model_args(changed(config, [change])) == args
    except Exception:  # of any type: `fault` judges it
        return False


def line_of(config: Options, change: Change, folder: Path) -> Iterator[str]:
    """A line about a change if it is not read as it should be."""
    key, value = change.path[-1], change.value
    if found := fault(changed(config, [change]), key, value, folder, config):
        yield f"{'.'.join(change.path)} {json.dumps(value)}: {found}"


def ignored_faults(config: Options, group: Sequence[Change], folder: Path) -> Iterator[str]:
    """A line for each change of a group, which this project ignores, that transformers does not."""
    if len(group) == 1:
        yield from line_of(config, group[0], folder)
        return
    (folder / "config.json").write_text(json.dumps(changed(config, group)))
    _, expected = unchanged(json.dumps(config))
    found = theirs(folder)[2]
    if found is None or found.shape != expected.shape or (found - expected).abs().max() > TOLERANCE:
        yield from ignored_faults(config, group[::2], folder)
        yield from ignored_faults(config, group[1::2], folder)


@pytest.mark.parametrize("variant", BASES)
def test_a_changed_key_is_honoured_or_refused(variant: str, tmp_path: Path):
    config = config_of(variant)
    keys = sorted(keys_of(variant) - NO_EFFECT.keys())
    changes = (Change((key,), value) for key in keys for value in other_values(key, config))
    check(faults(config, changes, tmp_path))


@pytest.mark.parametrize("variant", BASES)
def test_keys_without_effect_are_accepted(variant: str, tmp_path: Path):
    """All of them changed together, since the logits are those of the unchanged config."""
    config = config_of(variant)
    known = NO_EFFECT.keys() & keys_of(variant)
    assert len(known) > 10
    for key in known:
        for value in NO_EFFECT[key]:
            assert model_args(config | {key: value}) == model_args(config), (key, value)
    changed = config | {key: NO_EFFECT[key][0] for key in known}
    assert fault(families.copied(changed), "", None, tmp_path, config) is None


@pytest.mark.parametrize("base", ROPE_BASES)
def test_a_changed_key_of_rotary_positions_is_honoured_or_refused(base: str, tmp_path: Path):
    variant, rope = ROPE_BASES[base]
    config = config_of(variant) | {"rope_parameters": rope}
    changes = (
        change
        for section in ([()] if "rope_type" in rope else [(name,) for name in rope])
        for key in ROPE_KEYS
        for value in ROPE_OTHERS.get(key, NUMBERS)
        for change in rope_changes(section, key, value)
    )
    check(faults(config, changes, tmp_path))


def rope_changes(section: tuple[str, ...], key: str, value: Any) -> Iterator[Change]:
    """A changed key of rotary settings; for keys of which the schemas have different rules, also in
    the older schema. section: of nested settings, which that schema has not."""
    path = ("rope_parameters", *section, key)
    yield Change(path, value)
    if SLIDING not in section and key in (
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
    ):
        yield Change(path, value, older=True)


@pytest.mark.parametrize("variant", MULTIMODAL)
@pytest.mark.parametrize("key", ["tie_word_embeddings", "text_config", "is_causal"])
def test_a_changed_key_of_a_multimodal_config(variant: str, key: str, tmp_path: Path):
    config = config_of(variant)
    changes = {"tie_word_embeddings": True}, {"sliding_window": 4}, {"rope_theta": 50.0}
    inner = [config["text_config"] | change for change in changes]
    values = inner if key == "text_config" else [True, False, None]
    check(faults(config, (Change((key,), value) for value in values), tmp_path))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen2_moe", "experts"),
        ("qwen3_moe", "experts"),
        ("mixtral", "experts"),
        ("gpt_oss", "experts"),
        ("olmoe", "experts"),
        ("flex_olmo", "experts"),
        ("phimoe", "experts"),
        ("granitemoe", "experts"),
        ("deepseek_v2", "latent"),
        ("deepseek_v3", "latent"),
        ("mistral4", "latent"),
        ("qwen3_next", "Gated DeltaNet"),
        ("olmo_hybrid", "Gated DeltaNet"),
        ("jamba", "Mamba"),
        ("mamba", "Mamba"),
        ("mamba2", "Mamba"),
        ("falcon_mamba", "Mamba"),
        ("granitemoehybrid", "Mamba|experts"),
        ("qwen3_vl_moe", "experts"),
    ],
)
def test_families_of_other_layers_are_refused_with_a_reason(model_type: str, reason: str):
    config = transformers.CONFIG_MAPPING[model_type]().to_dict()
    with pytest.raises(ValueError, match=f"'model_type' is .*{model_type}.*({reason})") as caught:
        model_args(config)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"'model_type' is \"gpt_neox\".*llama.*qwen3"):
        model_args(config_of("llama-linear") | {"model_type": "gpt_neox"})

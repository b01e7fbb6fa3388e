"""The sampling values of generation_config.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from text.model_defaults import defaults_line, model_defaults


def write(folder: Path, **config: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "4.31"}, {}),
        (  # Llama 3 instruct
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9},
        ),
        (  # Qwen 2.5 instruct
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
            | {"repetition_penalty": 1.05},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        ),
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6}),  # Vicuna
        ({"do_sample": True, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {"temperature": 0.0}),
        (
            {"do_sample": False, "repetition_penalty": 1.2},
            {"temperature": 0.0, "repetition_penalty": 1.2},
        ),
        ({"do_sample": None, "temperature": None, "top_k": None}, {}),
        ({"top_k": 50.0, "temperature": 1}, {"top_k": 50, "temperature": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
    ],
)
def test_values(config: dict, expected: dict, tmp_path: Path):
    values = model_defaults(write(tmp_path, **config))
    assert values == expected
    assert all(type(v) is (int if k == "top_k" else float) for k, v in values.items())


def test_no_file(tmp_path: Path):
    assert model_defaults(tmp_path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "0.7", True, [0.7], {}])
@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_a_value_of_a_wrong_type_is_refused(key: str, value: object, tmp_path: Path):
    write(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"generation_config.json: {key} is .* and must be") as e:
        model_defaults(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize(
    "config",
    [{"temperature": -1}, {"top_k": -2}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}]
    + [{"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0}]
    + [{"do_sample": value} for value in (0, 1, "true", [])],
)
def test_a_value_outside_its_range_is_refused(config: dict, tmp_path: Path):
    (key,) = config
    write(tmp_path, **config)
    with pytest.raises(ValueError, match=f"generation_config.json: {key} is .* and must be"):
        model_defaults(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_file_that_is_no_object_is_refused(content: str, tmp_path: Path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json"):
        model_defaults(tmp_path)


def test_the_line_names_what_was_taken_from_where(tmp_path: Path):
    line = defaults_line({"temperature": 0.6, "top_k": 20}, tmp_path)
    assert line.startswith(f"temperature 0.6, top_k 20: from {tmp_path}/generation_config.json")


def test_torch_is_not_imported():
    root = Path(__file__).resolve().parent.parent
    heavy, imports = {"torch", "huggingface_hub"}, "import sys, weights.hub, text.model_defaults"
    program = f"{imports}; assert not {heavy!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)

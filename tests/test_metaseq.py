"""Conversion of OPT as metaseq saves it: a tiny one, in both layouts, whole and damaged."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from test_models import load
from torch import Tensor, nn

from checkpoint import Checkpoint
from scripts.convert_metaseq_opt175b import main, parse_args

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # max abs, fp32
HEADS = 4
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "ffn_dim": 48,
    "max_position_embeddings": 20,
}
CFG = {"model": argparse.Namespace(decoder_attention_heads=HEADS, decoder_layers=2)}
ROW_PARALLEL = ("out_proj.weight", "fc2.weight")  # cut along columns
COLUMN_PARALLEL = ("embed_tokens.weight", "fc1.weight", "fc1.bias")  # cut along rows
TensorDict = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A random model whose every weight counts: no norm is 1, no bias 0."""
    print("seed 0")
    torch.manual_seed(0)
    config = transformers.OPTConfig(**SHAPE)
    model = transformers.OPTForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        weight.data.normal_(std=0.3).add_("norm" in name and name.endswith("weight"))
    return model


def model_parts(model: nn.Module, n: int) -> list[TensorDict]:
    """The model under metaseq's names, cut as its tensor parallelism cuts it."""
    state = {k.removeprefix("model."): v for k, v in model.model.state_dict().items()}
    parts: list[TensorDict] = [{} for _ in range(n)]
    for name, tensor in state.items():
        ours = name.replace("decoder.final_layer_norm", "decoder.layer_norm")
        slices = [tensor] * n
        if "q_proj" in name:
            ours = name.replace("q_proj", "qkv_proj")
            rows = (state[name.replace("q_proj", f"{which}_proj")].chunk(n) for which in "kvq")
            slices = [torch.cat(kvq) for kvq in zip(*rows, strict=True)]
        elif "k_proj" in name or "v_proj" in name:
            continue
        elif name.endswith(ROW_PARALLEL):
            slices = tensor.chunk(n, dim=1)
        elif name.endswith(COLUMN_PARALLEL):
            slices = tensor.chunk(n)
        for part, piece in zip(parts, slices, strict=True):
            part[ours] = piece.clone()
    return parts


def fsdp_shards(part: TensorDict, n: int) -> list[dict[str, Any]]:
    """What fairscale makes of it: a flat vector for each layer and one for the rest, in pieces."""
    contents = [{"model": {}, "shard_metadata": {"param_metadata": []}} for _ in range(n)]
    for path in ("", "decoder.layers.0", "decoder.layers.1"):
        prefix = path and path + "."
        names = [k for k in part if (k.startswith(prefix) if path else ".layers." not in k)]
        tensors = [part[name] for name in names]
        flat = torch.cat([t.flatten() for t in tensors])
        size = -(-len(flat) // n)
        for i, content in enumerate(contents):
            piece = flat[i * size : (i + 1) * size]
            padding = size - len(piece)
            said = {
                "names": [name.removeprefix(prefix) for name in names],
                "shapes": [t.shape for t in tensors],
                "numels": [t.numel() for t in tensors],
                "padding": padding,
            }
            padded = torch.cat([piece, piece.new_full((padding,), 9.0)])
            content["model"][prefix + "flat_param_0"] = padded
            content["shard_metadata"]["param_metadata"].append(
                {"fsdp_path": path, "params": {"flat_param_0": said}}
            )
    for content in contents:
        content["model"]["decoder.version"] = torch.tensor([3.0])
    return contents


def write(model: nn.Module, folder: Path, parts: int, shards: int = 0, **more: Any) -> Path:
    """A checkpoint of metaseq's. shards 0: resharded, with the table as head once more."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(model_parts(model, parts)):
        name = f"checkpoint_last-model_part-{i}-shard{{}}.pt"
        if not shards:
            name = f"reshard-model_part-{i}.pt"
            part["decoder.output_projection.weight"] = part["decoder.embed_tokens.weight"]
            part = views_of_one(part)
        contents = fsdp_shards(part, shards) if shards else [{"model": part, "shard_metadata": {}}]
        for j, content in enumerate(contents):
            torch.save({"cfg": CFG, "args": None} | content | more, folder / name.format(j))
    return folder


def views_of_one(part: TensorDict) -> TensorDict:
    """The same tensors in one storage, where reshard_fsdp leaves them."""
    numels = [tensor.numel() for tensor in part.values()]
    pieces = torch.cat([tensor.flatten() for tensor in part.values()]).split(numels)
    shapes = [tensor.shape for tensor in part.values()]
    return {k: piece.view(s) for k, piece, s in zip(part, pieces, shapes, strict=True)}


def run(folder: Path, *options: str) -> int:
    return main(parse_args(["--checkpoint_dir", str(folder), *options]))


@torch.no_grad()
def assert_same_logits(path: Path, oracle: nn.Module) -> None:
    tokens = torch.randint(SHAPE["vocab_size"], (3, 12), generator=torch.manual_seed(1))
    assert len(set(map(tuple, tokens.tolist()))) == 3
    B, T = tokens.shape
    model = load(path)
    pos = torch.arange(T).expand(B, T)
    logits = model(tokens, pos, torch.arange(T), model.make_caches(B, T))
    expected = oracle(tokens).logits
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("shards", [0, 1, 3, 100])
def test_logits_are_those_of_transformers(
    parts: int, shards: int, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write(model, tmp_path, parts, shards)
    assert run(tmp_path, "--output_dir", str(tmp_path / "out" / "here")) == 0
    path = tmp_path / "out" / "here" / "model.pth"
    assert capsys.readouterr().out == f"{path}\n"
    assert_same_logits(path, model)
    config = json.loads((path.parent / "config.json").read_text())
    assert config == Checkpoint(path).config
    assert {key: config[key] for key in SHAPE if key in config}.items() <= SHAPE.items()
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "model.pth"]


def test_some_shards_are_nothing_but_padding(model: nn.Module):
    contents = fsdp_shards(model_parts(model, 4)[0], 100)
    paddings = [
        m["params"]["flat_param_0"]["padding"]
        for m in contents[-1]["shard_metadata"]["param_metadata"]
    ]
    lengths = [len(t) for name, t in contents[-1]["model"].items() if "flat" in name]
    assert any(p == n for p, n in zip(paddings, lengths, strict=True))


class Trap:
    """Of a module that need not be there when the file is read."""

    def __init__(self):
        self.told = 1

    def __setstate__(self, state: dict) -> None:
        raise AssertionError("what the file names was run")


def test_the_command_and_classes_that_are_not_there(model: nn.Module, tmp_path: Path):
    write(model, tmp_path, 2, 3, extra_state={"metrics": Trap()})
    script = str(ROOT / "scripts/convert_metaseq_opt175b.py")
    result = subprocess.run(
        [sys.executable, script, "--checkpoint_dir", ".", "--dtype", "bfloat16"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (0, "model.pth\n"), result.stderr
    assert "2 model_parts of 3 files" in result.stderr and "kB to write" in result.stderr
    assert "facebook/opt-*" in result.stderr
    assert Checkpoint(tmp_path).dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_heads_are_an_option_where_the_files_do_not_say(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write(model, tmp_path, 2, cfg=None)
    assert run(tmp_path) == 2
    assert "give --heads, which is 96 for OPT-175B" in capsys.readouterr().err
    assert run(tmp_path, "--heads", str(HEADS)) == 0
    assert_same_logits(tmp_path, model)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """What damages a file by changing what it holds."""

    def damage(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=False)
        change(content)
        torch.save(content, folder / name)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def copy(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: (folder / to).write_bytes((folder / name).read_bytes())


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 2000)


LAST, LAST_SHARD = "reshard-model_part-3.pt", "checkpoint_last-model_part-3-shard2.pt"
NORM, FC1 = "decoder.layers.1.final_layer_norm.weight", "decoder.layers.1.fc1.weight"
QKV, TABLE = "decoder.layers.0.self_attn.qkv_proj.weight", "decoder.embed_tokens.weight"
RESHARDED = {
    "a part": (remove("reshard-model_part-1.pt"), "lacks model_part-1-shard0: metaseq's download"),
    "the last part": (remove(LAST), "holds 3 of 4 model_parts"),
    "twice": (copy(LAST, "reshard-model_part-3-shard0.pt"), "are one shard"),
    "two checkpoints": (copy(LAST, "old-model_part-3.pt"), "holds old and reshard"),
    "truncated": (truncate(LAST), f"{LAST} cannot be read"),
    "no torch.save": (lambda f: (f / LAST).write_bytes(b"<html>"), f"{LAST} cannot be read"),
    "no metaseq": (edit(LAST, lambda c: c.pop("model")), f"{LAST} has no 'model'"),
    "no tensor": (edit(LAST, lambda c: c["model"].update({NORM: 1})), f"does not hold {NORM}"),
    "strided": (edit(LAST, lambda c: c["model"].update({FC1: torch.ones(32, 12).T})), "contiguous"),
    "absent": (edit(LAST, lambda c: c["model"].pop(FC1)), f"{FC1} is absent in"),
    "unknown": (edit(LAST, lambda c: c["model"].update(new=torch.ones(1))), "new is [1]"),
    "shape": (edit(LAST, lambda c: c["model"].update({FC1: torch.ones(3, 32)})), "[3, 32] torch."),
    "dtype": (edit(LAST, lambda c: c["model"].update({FC1: c["model"][FC1].half()})), "float16 in"),
    "disagree": (edit(LAST, lambda c: c["model"][NORM].add_(0.1)), f"{NORM} is not the same in"),
    "untied": (
        edit(LAST, lambda c: c["model"].update({TABLE: c["model"][TABLE] + 1})),
        "output_projection.weight is not",
    ),
    "flat": (
        edit("reshard-model_part-0.pt", lambda c: c["model"].update(flat_param_0=torch.ones(9))),
        "no shard_metadata",
    ),
}
SHARDED = {
    "a shard": (remove("checkpoint_last-model_part-1-shard1.pt"), "lacks model_part-1-shard1"),
    "one part's last shard": (remove(LAST_SHARD), "lacks model_part-3-shard2"),
    "another's metadata": (
        edit(
            LAST_SHARD,
            lambda c: c["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"].update(
                shapes=[(1,)] * 12
            ),
        ),
        "disagree on decoder.layers.0.flat_param_0",
    ),
    "no metadata": (
        edit(LAST_SHARD, lambda c: c.pop("shard_metadata")),
        "disagree on flat_param_0",
    ),
    "no vector": (edit(LAST_SHARD, lambda c: c["model"].pop("flat_param_0")), "hold flat_param_0"),
}
FAULTS = [(0, *fault) for fault in RESHARDED.values()] + [(3, *f) for f in SHARDED.values()]


def refused(folder: Path, expected: str, capsys: pytest.CaptureFixture) -> None:
    """One line of the mistake, and nothing written."""
    before = sorted(folder.iterdir())
    assert run(folder) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert (out, line.startswith("convert_metaseq_opt175b.py: ")) == ("", True)
    assert expected in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("shards", "damage", "expected"), FAULTS, ids=[*RESHARDED, *SHARDED])
def test_a_fault_is_one_line(
    shards: int,
    damage: Callable[[Path], None],
    expected: str,
    model: nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    damage(write(model, tmp_path, 4, shards))
    refused(tmp_path, expected, capsys)


def test_the_last_shard_of_each_part_is_missed(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for file in write(model, tmp_path, 2, 3).glob("*-shard2.pt"):
        file.unlink()
    refused(tmp_path, "download the shards that are missing", capsys)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (QKV, None, f"lacks {QKV}"),
        (FC1, None, f"lacks {FC1}"),
        (TABLE, None, f"lacks {TABLE}"),
        (FC1, torch.ones(4, 32), f"{FC1} is [4, 32]"),
        ("decoder.layers.2.fc1.bias", torch.ones(1), "holds decoder.layers.2.fc1.bias"),
    ],
)
def test_a_fault_of_all_parts(
    name: str,
    value: Tensor | None,
    expected: str,
    model: nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    def change(content: dict[str, Any]) -> None:
        content["model"].pop(name, None)
        content["model"] |= {} if value is None else {name: value}

    for file in write(model, tmp_path, 2).iterdir():
        edit(file.name, change)(tmp_path)
    refused(tmp_path, expected, capsys)


def test_a_missing_last_layer_is_noticed(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
):
    cfg = {"model": argparse.Namespace(decoder_attention_heads=HEADS, decoder_layers=3)}
    refused(write(model, tmp_path, 2, cfg=cfg), "lacks decoder.layers.2.", capsys)


def test_no_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    refused(tmp_path, "holds no *-model_part-*.pt", capsys)
    assert run(tmp_path / "nowhere") == 2
    assert "nowhere holds no" in capsys.readouterr().err

"""Files of weights as people have them: every layout that peers read, and the rest in one line."""

import errno
import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import checkpoint as checkpoint_module
from checkpoint import Checkpoint, check_writable, save_checkpoint
from load import meta_model
from quant.linear import make_scheme
from scripts import convert_hf_checkpoint
from tests.test_checkpoint import CONFIG, TIED, assert_same, exported, loaded, weights
from weights.hf import model_args
from weights.weight_files import find_weights, shards

SEED = 25
WEIGHTS = weights(CONFIG, SEED)
THEIRS = exported(WEIGHTS, CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def refused(path: Path, match: str, error: type[Exception] = ValueError) -> None:
    """What loading a path raises, in one line."""
    with pytest.raises(error, match=match) as caught:
        checkpoint = Checkpoint(path)
        checkpoint.load_into(meta_model(checkpoint.args, checkpoint.scheme))
    assert "\n" not in str(caught.value)


# Embedding and head


def tied_folder(folder: Path, head: Tensor | None, config: dict[str, Any]) -> Path:
    tensors = dict(THEIRS) | ({} if head is None else {"lm_head.weight": head.contiguous()})
    if head is None:
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed(table: Tensor, row: int) -> Tensor:
    table = table.clone()
    table[row, 3] += 1
    return table


@pytest.mark.parametrize("row", [None, 0, 60])
def test_a_tied_head_that_differs_is_kept_as_transformers_keeps_it(
    row: int | None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(checkpoint_module, "COMPARED_BYTES", 1000)  # several pieces
    table = THEIRS["model.embed_tokens.weight"]
    tied_folder(tmp_path, table.clone() if row is None else changed(table, row), TIED)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.args.tied == (row is None)
    assert ("the output head differs" in capsys.readouterr().err) == (row is not None)
    model = meta_model(checkpoint.args, None)
    checkpoint.load_into(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.output.weight, theirs.lm_head.weight)
    assert torch.equal(model.tok_embeddings.weight, theirs.model.embed_tokens.weight)


def test_a_head_that_differs_outlives_conversion(tmp_path: Path):
    head = changed(THEIRS["model.embed_tokens.weight"], 7)
    tied_folder(tmp_path, head, TIED)
    found = loaded(convert_hf_checkpoint.convert(tmp_path, None))
    assert torch.equal(found["output.weight"], head)


def test_a_head_of_another_dtype_and_the_same_numbers_stays_tied(tmp_path: Path):
    table = THEIRS["model.embed_tokens.weight"].bfloat16()
    for head in (table.float(), table.float() + 1e-4):
        tensors = THEIRS | {"model.embed_tokens.weight": table, "lm_head.weight": head}
        (tmp_path / "config.json").write_text(json.dumps(TIED))
        save_file(tensors, tmp_path / "model.safetensors")
        assert Checkpoint(tmp_path).args.tied == torch.equal(head, table.float())


def test_a_missing_head_says_what_it_may_mean(tmp_path: Path):
    refused(tied_folder(tmp_path, None, CONFIG), "output.weight is missing, unless.*tie_word")


# pytorch_model.bin


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("parameter", [True, False], ids=["parameter", "tensor"])
@pytest.mark.parametrize("layout", [Tensor.clone, transposed])
def test_bin_files(folder: Path, zipped: bool, parameter: bool, layout: Callable):
    tensors = {name: layout(t) for name, t in THEIRS.items()}
    if parameter:
        tensors = {name: nn.Parameter(t) for name, t in tensors.items()}
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    assert_same(loaded(folder), WEIGHTS)
    assert_same(loaded(folder, dtype=torch.bfloat16), {n: t.bfloat16() for n, t in WEIGHTS.items()})
    found = torch.empty(61, 8)
    checkpoint, stage = Checkpoint(folder), torch.empty(512, dtype=torch.uint8)
    checkpoint.read_columns_into("output.weight", range(8, 16), found, stage)
    assert torch.equal(found, WEIGHTS["output.weight"][:, 8:16])
    found = torch.empty(2, 32)
    checkpoint.read_rows_into("output.weight", [range(5, 7)], found, stage)
    assert torch.equal(found, WEIGHTS["output.weight"][5:7])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_no_part_of_a_name(folder: Path, prefix: str):
    save_file({prefix + name: t for name, t in THEIRS.items()}, folder / "model.safetensors")
    assert_same(loaded(folder), WEIGHTS)


def test_two_names_of_one_tensor_are_refused(folder: Path):
    twice = THEIRS | {"_orig_mod.lm_head.weight": torch.ones(61, 32)}
    save_file(twice, folder / "model.safetensors")
    refused(folder, r"model\.safetensors: .*lm_head\.weight and .*lm_head\.weight")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_a_training_checkpoint_holds_the_weights_under_a_key(folder: Path, key: str):
    torch.save({key: THEIRS, "epoch": 3, "rate": 0.1}, folder / "pytorch_model.bin")
    assert_same(loaded(folder), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            {n: t.numpy() for n, t in THEIRS.items()},
            r"bin holds numpy\..*only tensors.*safetensors",
        ),
        ({"a": numpy.float64(1)}, r"bin holds numpy\..*only tensors"),
        ({"epoch": 3}, "holds no tensors"),
        ({}, "holds no tensors"),
        ([torch.ones(3)], "holds a list, not a dict"),
        ({3: torch.ones(3)}, "holds 3, which is no tensor with a name"),
        (THEIRS | {"lm_head.weight": torch.ones(61, 32).to_sparse()}, "lm_head.weight is no dense"),
        (
            THEIRS | {"lm_head.weight": torch.ones(61, 32).int()},
            "output.weight is int32 and should",
        ),
    ],
)
def test_bin_files_of_something_else(folder: Path, content: Any, match: str):
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, match)


def test_tensors_that_are_no_weights_are_ignored(folder: Path):
    more = {"model.rotary_emb.inv_freq": torch.ones(4), "model.decoder.version": torch.ones(1)}
    more["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(THEIRS | more, folder / "pytorch_model.bin")
    assert_same(loaded(folder), WEIGHTS)


# Which files


def write_shards(folder: Path, count: int, suffix: str = ".safetensors") -> dict[str, str]:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    owners = {}
    for n in range(count):
        file = f"{stem}-{n + 1:05}-of-{count:05}{suffix}"
        part = {name: THEIRS[name] for name in sorted(THEIRS)[n::count]}
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / file)
        owners |= dict.fromkeys(part, file)
    return owners


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_need_no_index(folder: Path, count: int, suffix: str):
    write_shards(folder, count, suffix)
    assert_same(loaded(folder), WEIGHTS)
    last = sorted(folder.glob(f"*{suffix}"))[-1]
    assert_same(loaded(last), WEIGHTS)  # a shard stands for all of them, as for llama.cpp
    if count > 1:
        last.unlink()
        refused(folder, f"lacks {last.name}", FileNotFoundError)


def test_shards_of_two_models_are_not_put_together(folder: Path):
    write_shards(folder, 2)
    write_shards(folder, 3)
    refused(folder, "several models.*00002.*00003.*one file")


def test_a_tensor_in_two_shards_is_refused_unless_an_index_says_which(folder: Path):
    owners = write_shards(folder, 2)
    name = "model.norm.weight"
    other = next(file for file in owners.values() if file != owners[name])
    part = {n: THEIRS[n] for n, file in owners.items() if file == other}
    save_file(part | {name: torch.zeros(32)}, folder / other)
    refused(folder, f"{name} lies in .* and in .*: remove one")
    index = {"weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(loaded(folder), WEIGHTS)


def test_a_whole_file_comes_before_a_stale_index(folder: Path):
    save_file(THEIRS, folder / "model.safetensors")
    stale = {"weight_map": dict.fromkeys(THEIRS, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert_same(loaded(folder), WEIGHTS)


def test_one_safetensors_file_may_have_any_name(folder: Path):
    save_file(THEIRS, folder / "gptq_model-4bit-64g.safetensors")
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert_same(loaded(folder), WEIGHTS)


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        (None, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"a": 3}, "weight_map puts a into 3, which is no name"),
        ({"a": ["x"]}, "no name of a weight file"),
        ({"a": "../model.safetensors"}, r"weight_map puts a into \.\./model\.safetensors"),
        ({"a": "/etc/passwd"}, "no name of a weight file"),
        ({"a": ".."}, "no name of a weight file"),
        ({"a": "x\0y"}, "no name of a weight file"),
        ({"a": "model-00001-of-00002.safetensors"}, "lacks model-00001-of-00002"),
    ],
)
def test_indices_that_are_wrong(folder: Path, weight_map: Any, match: str):
    save_file(THEIRS, folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, match, (ValueError, FileNotFoundError))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5775872\n"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model-q4.gguf", b"GGUF" + bytes(100), r"model-q4\.gguf is a GGUF file.*quantize\.py"),
        ("model.safetensors", b"GGUF" + bytes(100), "is a GGUF file"),
        ("consolidated.00.pth", b"PK", r"consolidated\.00\.pth is in its authors' own layout"),
        ("consolidated.safetensors", b"PK", "its authors' own layout"),
        ("model.onnx", b"", "model.onnx is an ONNX model"),
        ("tf_model.h5", b"\x89HDF", "TensorFlow"),
        ("flax_model.msgpack", b"", "Flax"),
        ("adapter_model.safetensors", b"", "LoRA adapter.*merge"),
        ("tokenizer.json", b"{}", "tokenizer.json is part of a tokenizer, not of the weights"),
        ("model.safetensors", POINTER, r"model\.safetensors is a git-lfs pointer.*git lfs pull"),
        ("pytorch_model.bin", POINTER, r"pytorch_model\.bin is a git-lfs pointer"),
        ("model.safetensors.index.json", POINTER, r"index\.json is a git-lfs pointer"),
        ("model.safetensors", b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_what_cannot_be_read_is_known(folder: Path, name: str, content: bytes, match: str):
    (folder / name).write_bytes(content)
    for path in (folder, folder / name):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
            shards(find_weights(path))
        assert "\n" not in str(caught.value) and "again" not in match


def test_a_config_given_as_weights(folder: Path):
    refused(folder / "config.json", "config.json is no file of weights; give the folder")


# Headers and metadata


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


PLACE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        *({"shape": value} for value in ([2.0], [True, 2], [-2], [2**70, 0], "2", None, {}, [[2]])),
        *({"shape": value} for value in ([0, 2**62, 2**62], [1] * 3 + [None])),
        *({"data_offsets": value} for value in ([0], [0, 8, 8], [0.0, 8], [-8, 0], [8, 0], None)),
        *({"data_offsets": value} for value in ([False, 8], ["0", 8], [0, 2**64], [4, 12])),
        *({"dtype": value} for value in (None, 3, ["F32"], {})),
    ],
    ids=str,
)
def test_headers_that_describe_no_tensor(folder: Path, entry: dict[str, Any]):
    content = with_header({"a": PLACE | entry}, bytes(8))
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors has an unusable header \(a ")


@pytest.mark.parametrize(
    ("header", "size", "match"),
    [
        ([], 8, "it is a list"),
        ("text", 8, "it is a str"),
        ({"a": 3}, 8, "a is 3"),
        (b"[" * 100_000, 8, "nested too deeply"),
        (b'{"a":' * 100_000, 8, "nested too deeply"),
        (b"\xff\xfe\xfd", 8, "unusable header"),
        ({"a": PLACE, "b": PLACE}, 8, "b begins at byte .* and should begin at"),
        ({"a": PLACE, "b": PLACE | {"data_offsets": [4, 12]}}, 12, "b begins at"),
        ({"a": PLACE, "b": PLACE | {"data_offsets": [12, 20]}}, 20, "b begins at"),
        ({"a": PLACE | {"data_offsets": [8, 16]}}, 16, "a begins at"),
        ({"a": PLACE}, 9, "bytes long and should be"),
        ({}, 0, "holds no tensors"),
        ({"a": PLACE | {"dtype": "F4"}}, 8, "the dtype F4 of a is not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers_whose_tensors_do_not_fill_the_file(
    folder: Path, header: Any, size: int, match: str
):
    (folder / "model.safetensors").write_bytes(with_header(header, bytes(size)))
    refused(folder, match)


def test_a_header_longer_than_the_format_allows_is_not_read(folder: Path):
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2**31).to_bytes(8, "little"))
        file.truncate(2**32)  # a hole
    refused(folder, "truncated or no safetensors file")


def test_tensors_of_no_size_are_named(folder: Path):
    """DeepSpeed's ZeRO-3 leaves such files."""
    empty = THEIRS | {"model.norm.weight": torch.empty(0)}
    save_file(empty, folder / "model.safetensors")
    refused(folder, r"norm\.weight has shape \[0\] and should have \[32\]")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        *(({"config": value}, "'config' and 'tensors' must be dicts") for value in (None, [], "x")),
        *(({"tensors": value}, "must be dicts") for value in (None, 3, [torch.ones(2)])),
        *(({"scheme": value}, r"model\.pth: the scheme is") for value in (3, "int8", [], {}, True)),
        ({"scheme": make_scheme("int8") | {"mode": 8}}, "names no mode"),
        *(
            ({"scheme": make_scheme("int8") | {key: value}}, f"'{key}' of the scheme is")
            for key in ("linears", "output")
            for value in (None, 8, [], {"bits": 3}, {"bits": "8"}, {"bits": 4}, {"groupsize": 32})
        ),
        ({"scheme": make_scheme("int4") | {"linears": {"bits": 4, "groupsize": 48}}}, "'linears'"),
        ({"scheme": make_scheme("int8")}, r"wo\.scales is missing.*is float32 and should be int8"),
        ({"tensors": WEIGHTS | {"norm.weight": [1.0] * 32}}, "holds norm.weight, which is no"),
        ({"tensors": WEIGHTS | {3: torch.ones(2)}}, "holds 3, which is no tensor with a name"),
        ({"tensors": WEIGHTS | {"norm.weight": torch.ones(32).long()}}, "norm.weight is int64"),
        ({"tensors": {}}, "holds no tensors"),
    ],
    ids=str,
)
def test_metadata_of_model_pth_is_checked(tmp_path: Path, change: dict[str, Any], match: str):
    content = {"config": CONFIG, "scheme": None, "tensors": WEIGHTS} | change
    torch.save(content, tmp_path / "model.pth")
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("mode", "leaf", "value"),
    [("int4", "scales", torch.inf), ("int8", "scales", torch.nan), ("int4", "weight", None)],
)
def test_quantised_tensors_that_would_be_read_wrongly(
    tmp_path: Path, mode: str, leaf: str, value: float | None
):
    scheme = make_scheme(mode)
    tensors = {
        name: torch.ones(t.shape, dtype=t.dtype)
        for name, t in meta_model(model_args(CONFIG), scheme).state_dict().items()
    }
    name = f"layers.1.attention.wo.{leaf}"
    if value is None:
        tensors[name] = tensors[name].short()
    else:
        tensors[name].view(-1)[-1] = value
    save_checkpoint(tmp_path / "model.pth", CONFIG, scheme, tensors)
    match = "is int16 and should be uint8" if value is None else "holds NaN or infinity"
    with pytest.raises(ValueError, match=match) as caught:
        checkpoint = Checkpoint(tmp_path)
        checkpoint.load_into(meta_model(checkpoint.args, scheme))
    assert name in str(caught.value) and "model.pth" in str(caught.value)


# Mutations

ODD = [None, True, -1, 0, 2**31, 2**63, 2**70, 1.5, float("nan"), "x", "", [], {}, [[]], [None]]
ODD += ["F32", [0], [-1, 3], [2**62, 2**62], {"bits": 4, "groupsize": 32.5}]


def mutated_header(draw: random.Random, data: bytes) -> bytes:
    header, body = header_of(data)
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    key = draw.choice(("dtype", "shape", "data_offsets"))
    if key == "dtype" or draw.random() < 0.5:
        entry[key] = draw.choice(ODD)
    else:
        entry[key][draw.randrange(len(entry[key]))] = draw.choice(ODD)
    return with_header(header, body)


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(6000, len(changed)))
        if draw.random() < 0.8:
            changed[at] = draw.randrange(256)
        else:
            del changed[at : at + draw.randint(1, 50)]
    return bytes(changed)


def mutated_metadata(draw: random.Random) -> dict[str, Any]:
    scheme = draw.choice([None, make_scheme("int8"), make_scheme("int4", 32)])
    content = {"config": dict(CONFIG), "scheme": scheme, "tensors": dict(WEIGHTS)}
    target = draw.choice([part for part in (content, content["tensors"], scheme) if part])
    target[draw.choice([*target, 3])] = draw.choice([*ODD, torch.ones(()), torch.ones(2).bool()])
    return content


def test_mutated_files_load_or_end_in_one_line(folder: Path):
    draw, outcomes = random.Random(SEED), Counter()
    originals = {}
    save_file(THEIRS, folder / "model.safetensors")
    originals["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    save_checkpoint(folder / "model.pth", CONFIG, None, WEIGHTS)
    originals["model.pth"] = (folder / "model.pth").read_bytes()
    for n in range(240):
        for name in ("model.pth", "model.safetensors"):
            (folder / name).unlink(missing_ok=True)
        name = draw.choice(list(originals))
        if n % 3 == 0:
            torch.save(mutated_metadata(draw), folder / "model.pth")
        elif n % 3 == 1:
            content = mutated_header(draw, originals["model.safetensors"])
            (folder / "model.safetensors").write_bytes(content)
        else:
            (folder / name).write_bytes(mutated_bytes(draw, originals[name]))
        try:
            with warnings.catch_warnings(action="ignore"):
                checkpoint = Checkpoint(folder)
                checkpoint.load_into(meta_model(checkpoint.args, checkpoint.scheme))
            outcomes["loads"] += 1
        except (ValueError, OSError, MemoryError) as error:
            assert "\n" not in str(error), n
            outcomes["one line"] += 1
    print("seed", SEED, dict(outcomes))
    assert outcomes["one line"] > 100


# Writing


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Root may write to any folder, so the name is taken by a folder instead."""
    save_file(THEIRS, folder / "model.safetensors")
    (folder / "model.pth.tmp").mkdir()
    monkeypatch.setattr(Checkpoint, "read", lambda *given: pytest.fail("work has begun"))
    options = convert_hf_checkpoint.argparse.Namespace(checkpoint_dir=folder, dtype=None)
    assert convert_hf_checkpoint.main(options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot" in line]
    assert "model.pth cannot be written (" in line and "make that folder writable" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_read_only_folder(folder: Path):
    folder.chmod(0o555)
    with pytest.raises(OSError, match="model.pth cannot be written .Permission denied"):
        check_writable(folder / "model.pth")
    folder.chmod(0o755)


def test_a_disk_that_fills_up_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.pth\.tmp"):
        save_checkpoint(tmp_path / "model.pth", CONFIG, None, WEIGHTS)
    assert list(tmp_path.iterdir()) == []


def test_torch_failing_to_write_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*given: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos\nframe #0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="cannot be written .*unexpected pos") as caught:
        save_checkpoint(tmp_path / "model.pth", CONFIG, None, WEIGHTS)
    assert "frame" not in str(caught.value)


def test_what_is_replaced_is_said(folder: Path, capsys: pytest.CaptureFixture):
    save_file(THEIRS, folder / "model.safetensors")
    convert_hf_checkpoint.convert(folder, None)
    assert "replaces" not in capsys.readouterr().err
    convert_hf_checkpoint.convert(folder, None)
    assert f"replaces {folder / 'model.pth'} (" in capsys.readouterr().err

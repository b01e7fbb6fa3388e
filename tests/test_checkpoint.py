"""Round trips, and every way in which a checkpoint can be wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import Checkpoint
from host.memory import available_memory, check_memory, size_text
from model import Transformer
from quant.linear import make_scheme
from weights.hf import export_tensors, model_args
from weights.saving import save_checkpoint
from weights.weight_files import find_weights

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}
TIED = CONFIG | {"tie_word_embeddings": True}


def weights(config: dict, seed: int = 0) -> dict[str, Tensor]:
    print(f"seed {seed}")
    torch.manual_seed(seed)
    model = Transformer(model_args(config))
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def meta_model(config: dict) -> Transformer:
    with torch.device("meta"):
        return Transformer(model_args(config))


def write_hugging_face(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as Hugging Face stores it."""
    return write_hugging_face(tmp_path / "hf", CONFIG, exported(weights(CONFIG), CONFIG))


def exported(tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in export_tensors(tensors, config).items()}


def loaded(path: Path, **options: object) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    model = meta_model(checkpoint.config)
    checkpoint.load_into(model, **options)
    return model.state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What goes in comes out


def test_model_pth_and_hugging_face_directory_hold_the_same(folder: Path, tmp_path: Path):
    expected = weights(CONFIG)
    assert_same(loaded(folder), expected)
    save_checkpoint(tmp_path / "model.pth", CONFIG, None, expected)
    assert_same(loaded(tmp_path / "model.pth"), expected)
    assert Checkpoint(tmp_path).path == tmp_path / "model.pth"
    assert Checkpoint(tmp_path).config == CONFIG


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load_reads_model_pth(mmap: bool, tmp_path: Path):
    expected = weights(CONFIG)
    save_checkpoint(tmp_path / "model.pth", CONFIG, {"kind": "int8"}, expected)
    content = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap)
    assert (content["config"], content["scheme"]) == (CONFIG, {"kind": "int8"})
    assert_same(content["tensors"], expected)


def test_every_tensor_is_aligned_and_lies_where_the_record_says(tmp_path: Path):
    odd = {
        "a": torch.randn(3, 5),
        "b": torch.randn(()),
        "c": torch.arange(7, dtype=torch.uint8),
        "d": torch.zeros(0, 4),
        "e": torch.randn(9, 3).bfloat16(),
        "f": torch.tensor([True, False]),
    }
    directory = tmp_path / "ünïcode"
    directory.mkdir()
    save_checkpoint(directory / "model.pth", CONFIG, make_scheme("int4", 64), odd)
    checkpoint = Checkpoint(directory)
    data = (directory / "model.pth").read_bytes()
    assert checkpoint.scheme == make_scheme("int4", 64)
    for name, tensor in odd.items():
        (part,) = checkpoint.tensors[name].parts
        assert part.offset % 4096 == 0
        if tensor.numel():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data[part.offset : part.offset + part.nbytes] == raw
        assert torch.equal(checkpoint.read(name), tensor)


def test_values_may_come_one_by_one_in_any_order(tmp_path: Path):
    expected = weights(CONFIG)
    blanks = {name: torch.empty_like(t, device="meta") for name, t in expected.items()}
    pairs = ((name, expected[name]) for name in reversed(expected))
    save_checkpoint(tmp_path / "model.pth", CONFIG, None, blanks, pairs)
    assert_same(loaded(tmp_path), expected)


@pytest.mark.parametrize("stored", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_tied_head_is_found_under_either_name(stored: tuple[str, ...], tmp_path: Path):
    expected = weights(TIED)
    expected["output.weight"] = expected["tok_embeddings.weight"]
    tensors = exported(expected, TIED)
    table = tensors.pop("model.embed_tokens.weight")
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    tensors |= {names[key]: table.clone() for key in stored}
    checkpoint = Checkpoint(write_hugging_face(tmp_path, TIED, tensors))
    model = meta_model(TIED)
    checkpoint.load_into(model)
    assert_same(model.state_dict(), expected)
    assert model.output.weight is model.tok_embeddings.weight


def test_bin_file_with_shared_and_transposed_tensors(tmp_path: Path):
    expected = weights(CONFIG)
    tensors = exported(expected, CONFIG)
    down = "model.layers.1.mlp.down_proj.weight"
    tensors[down] = tensors[down].t().contiguous().t()
    both = torch.stack((tensors["model.norm.weight"], tensors["model.norm.weight"] + 1))
    tensors["model.norm.weight"] = both[0]  # views of one storage
    tensors["model.layers.0.input_layernorm.weight"] = both[1]
    expected["layers.0.attention_norm.weight"] = both[1]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert_same(loaded(tmp_path), expected)


def test_dtype_is_converted_through_the_staging_buffer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("weights.formats.STAGING_BYTES", 100)  # many pieces, the last one short
    found = loaded(folder, dtype=torch.bfloat16)
    assert_same(found, {name: t.bfloat16() for name, t in weights(CONFIG).items()})


def test_buffers_keep_the_dtype_that_the_model_declares(tmp_path: Path):
    tensors = weights(CONFIG)
    tensors["output.weight"] = torch.ones(61, 32, dtype=torch.int8)
    tensors["output.scales"] = torch.rand(61)
    save_checkpoint(tmp_path / "model.pth", CONFIG, make_scheme("int8"), tensors)
    model = meta_model(CONFIG)
    model.output = torch.nn.Module()
    for name in ("weight", "scales"):
        blank = torch.empty_like(tensors[f"output.{name}"], device="meta")
        model.output.register_buffer(name, blank)
    Checkpoint(tmp_path).load_into(model, dtype=torch.bfloat16)
    assert torch.equal(model.output.scales, tensors["output.scales"])
    assert torch.equal(model.output.weight, tensors["output.weight"])
    assert model.norm.weight.dtype == torch.bfloat16


def test_progress_adds_up_to_the_file(folder: Path):
    seen: list[int] = []
    loaded(folder, progress=seen.append)
    assert sum(seen) == Checkpoint(folder).nbytes


# What does not fit is named


def test_missing_extra_and_misshapen_tensors_are_named_together(folder: Path):
    tensors = exported(weights(CONFIG), CONFIG)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.layers.0.mlp.down_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(1)
    tensors["model.other.weight"] = torch.ones(1)
    tensors["model.norm.weight"] = torch.ones(33)
    write_hugging_face(folder, CONFIG, tensors)
    with pytest.raises(ValueError, match="does not fit") as caught:
        loaded(folder)
    message = one_line(caught)
    assert "layers.0.feed_forward.w2.weight is missing" in message
    assert "layers.0.feed_forward.w13.weight has shape [40, 32] and should have [80, 32]" in message
    assert "(the file has model.layers.0.mlp.gate_proj.weight for it)" in message
    assert "layers.9.feed_forward.w13.weight is not part of the model" in message
    assert "model.other.weight is not part of the model" in message
    assert "norm.weight has shape [33] and should have [32]" in message


def test_a_long_list_of_faults_is_cut(folder: Path):
    write_hugging_face(folder, CONFIG, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"is missing; and \d+ more$") as caught:
        loaded(folder)
    assert one_line(caught).count("is missing") == 5


def test_a_lost_part_of_wqkv_is_a_wrong_shape(folder: Path):
    tensors = exported(weights(CONFIG), CONFIG)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    write_hugging_face(folder, CONFIG, tensors)
    with pytest.raises(
        ValueError, match=r"layers\.1\.attention\.wqkv\.weight has shape \[48, 32\]"
    ):
        loaded(folder)


def test_parts_that_do_not_stack_are_named(folder: Path):
    tensors = exported(weights(CONFIG), CONFIG)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(16, 31)
    write_hugging_face(folder, CONFIG, tensors)
    with pytest.raises(ValueError, match=r"cannot be put together.*k_proj\.weight \[16, 31\]"):
        Checkpoint(folder)


# Broken files


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_truncated_safetensors(kept: int, folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors .*download it again") as caught:
        Checkpoint(folder)
    message = one_line(caught)
    if kept == -1:
        size = file.stat().st_size
        assert f"{size} bytes long and should be {size + 1}" in message


def test_corrupt_safetensors_header(folder: Path):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1))
    with pytest.raises(ValueError, match="unusable header"):
        Checkpoint(folder)
    file.write_bytes(data.replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(ValueError, match="dtype F99"):
        Checkpoint(folder)


def test_a_file_cut_after_it_was_opened(folder: Path):
    checkpoint = Checkpoint(folder)
    cut(folder / "model.safetensors", 8)
    (last,) = (n for n, r in checkpoint.tensors.items() if ends_file(checkpoint, r.parts[-1]))
    with pytest.raises(ValueError, match=r"model\.safetensors ends within \S+\.weight"):
        checkpoint.read(last)


def ends_file(checkpoint: Checkpoint, part: object) -> bool:
    parts = [p for r in checkpoint.tensors.values() for p in r.parts]
    return part.offset == max(p.offset for p in parts)


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_truncated_model_pth(kept: int, tmp_path: Path):
    file = tmp_path / "model.pth"
    save_checkpoint(file, CONFIG, None, weights(CONFIG))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.pth cannot be read.*download it again") as caught:
        Checkpoint(tmp_path)
    one_line(caught)


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped: bool, tmp_path: Path):
    target, file = tmp_path / "ran", tmp_path / "model.pth"
    torch.save({"a": Bomb(target)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused because it could run code") as caught:
        Checkpoint(tmp_path)
    one_line(caught)
    assert not target.exists()
    torch.load(file, weights_only=False)
    assert target.exists()  # the bomb was live


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\xff"])
def test_corrupt_config(text: str, folder: Path):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json.*download it again") as caught:
        Checkpoint(folder)
    one_line(caught)


def test_missing_config(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Checkpoint(folder)


def test_missing_shard_is_named(folder: Path):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()  # it would be taken instead
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors"):
        Checkpoint(folder)


def test_gpt_fast_file_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(weights(CONFIG), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"not of this project.*convert_hf_checkpoint") as caught:
        Checkpoint(tmp_path)
    one_line(caught)


def test_missing_path_lists_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepared = Path("checkpoints/org/name/model.pth")
    prepared.parent.mkdir(parents=True)
    prepared.touch()
    with pytest.raises(FileNotFoundError) as caught:
        find_weights("checkpoints/org/nmae/model.pth")
    message = one_line(caught)
    assert "checkpoints/org/nmae/model.pth does not exist" in message
    assert "checkpoints/org holds: name;" in message
    assert f"prepared here: {prepared};" in message
    with pytest.raises(FileNotFoundError, match=r"checkpoints/org holds no weights"):
        Checkpoint("checkpoints/org")


# All or nothing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_save_leaves_what_was_there(error: type, tmp_path: Path):
    expected = weights(CONFIG)

    def interrupted() -> object:
        yield from list(expected.items())[:3]
        raise error

    with pytest.raises(error):
        save_checkpoint(tmp_path / "model.pth", CONFIG, None, expected, interrupted())
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "model.pth", CONFIG, None, expected)
    with pytest.raises(error):
        save_checkpoint(tmp_path / "model.pth", CONFIG, None, expected, interrupted())
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    assert_same(loaded(tmp_path), expected)


def test_values_must_match_the_tensors(tmp_path: Path):
    tensors = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="no value was given for b"):
        save_checkpoint(tmp_path / "m.pth", CONFIG, None, tensors, [("a", tensors["a"])])
    with pytest.raises(ValueError, match=r"a has shape \[3\], not \[2\]"):
        save_checkpoint(tmp_path / "m.pth", CONFIG, None, tensors, [("a", tensors["b"])])
    with pytest.raises(ValueError, match="c was given twice, or is not among the tensors"):
        save_checkpoint(tmp_path / "m.pth", CONFIG, None, tensors, [("c", tensors["a"])])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_beforehand(tmp_path: Path):
    huge = {"a": torch.empty(2**50, dtype=torch.uint8, device="meta")}
    with pytest.raises(ValueError, match=r"needs 1125899\.9 GB, .* of disk is free"):
        save_checkpoint(tmp_path / "model.pth", CONFIG, None, huge)


# Memory


def test_too_little_memory_is_known_before_anything_is_allocated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("host.memory.available_memory", lambda device: 1000)
    model, checkpoint = meta_model(CONFIG), Checkpoint(folder)
    nbytes = size_text(checkpoint.nbytes)
    with pytest.raises(
        MemoryError, match=f"needs {re.escape(nbytes)} of memory on cpu, where 1 kB"
    ):
        checkpoint.load_into(model)
    assert all(p.is_meta for p in model.parameters())


def test_available_memory_is_plausible():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < available_memory(torch.device("cpu")) <= total
    check_memory(2**20, "cpu", "a test", "none")


# Run apart, so that what pytest and other tests hold does not count. Peaks are over the level
# after imports and a rehearsal on a tiny model. VmHWM, because ru_maxrss outlives exec: it would
# begin at the peak of the tests.
MEASURE = """
import re, sys, torch
from pathlib import Path
sys.path[:0] = {paths}
from checkpoint import Checkpoint
from convert_hf_checkpoint import convert
from model import Transformer
from quant.linear import make_scheme

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def load(path, dtype=None):
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    checkpoint.load_into(model, dtype=dtype)
    return model

def measure(path, run):
    run(Path({tiny!r}))
    before = peak()
    kept = run(path)
    print(peak() - before)

measure(Path({big!r}), {run})
"""
BIG = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000}
BIG |= {"num_hidden_layers": 12, "attention_bias": False}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MB in two shards."""
    folder = tmp_path_factory.mktemp("big")
    blanks = export_tensors(meta_model(BIG).state_dict(), BIG)
    tensors = {name: torch.zeros(t.shape) for name, t in blanks.items()}
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(BIG))
    return folder


def measure(tiny: Path, big: Path, run: str) -> int:
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), str(root / "scripts")]
    code = MEASURE.format(paths=paths, tiny=str(tiny), big=str(big), run=run)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize(("dtype", "size"), [("None", 1.0), ("torch.bfloat16", 0.5)])
def test_loading_takes_little_more_than_the_weights(
    dtype: str, size: float, folder: Path, big: Path
):
    weights_size = Checkpoint(big).nbytes * size
    peak = measure(folder, big, f"lambda path: load(path, {dtype})")
    print(f"peak {peak / weights_size:.3f} of the weights")
    staging = 16 * 2**20 * (size < 1)
    assert 0.95 * weights_size < peak < 1.1 * weights_size + staging


def test_converting_takes_less_than_twice_the_largest_shard(folder: Path, big: Path):
    shard = max(file.stat().st_size for file in big.glob("*.safetensors"))
    peak = measure(folder, big, "lambda path: convert(path, None)")
    print(f"peak {peak / shard:.3f} of the largest shard")
    assert 0 < peak < 2 * shard
    assert (big / "model.pth").stat().st_size > Checkpoint(big).nbytes
    (big / "model.pth").unlink()

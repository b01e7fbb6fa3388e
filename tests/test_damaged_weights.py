"""Real folders of weights: what is found, what is read as transformers does, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from checkpoint import Checkpoint
from model import Transformer
from quant.linear import make_scheme, meta_model, quantized_copy
from weights.hf import export_tensors, model_args
from weights.saving import save_checkpoint

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
NORM = "model.norm.weight"


def state_dict(config: dict[str, Any] = CONFIG) -> dict[str, Tensor]:
    """A model's tensors under Hugging Face's names."""
    torch.manual_seed(0)
    exported = export_tensors(Transformer(model_args(config)).state_dict(), config)
    return {name: torch.randn_like(tensor) for name, tensor in exported.items()}


TENSORS = state_dict()


def loaded(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    model = meta_model(checkpoint.args, checkpoint.scheme)
    checkpoint.load_into(model)
    return model.state_dict()


def refused(path: Path, words: str, error: type = ValueError) -> str:
    """The message; it is one line of at most 600 characters."""
    with pytest.raises(error, match=words) as caught:
        loaded(path)
    message = str(caught.value)
    assert "\n" not in message and len(message.replace(str(path), "")) < 600
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the plain safetensors file gives; tests/test_models.py compares it with transformers."""
    plain = tmp_path_factory.mktemp("plain")
    (plain / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, plain / "model.safetensors")
    return loaded(plain)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], expected[n]) for n in found
    )


# The metadata of model.pth


def write_prepared(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    scheme = make_scheme("int4")
    model = quantized_copy(Transformer(model_args(CONFIG)), scheme)
    content = {"config": CONFIG, "scheme": scheme, "tensors": dict(model.state_dict())}
    torch.save(content | changes, folder / "model.pth")


FOUR = {"bits": 4, "groupsize": 32}
SCHEMES = {
    "a text": "int4",
    "a list": ["int4"],
    "empty": {},
    "no output": {"mode": "int4", "linears": FOUR},
    "mode 4": make_scheme("int4") | {"mode": 4},
    "linears None": make_scheme("int4") | {"linears": None},
    "linears dense": make_scheme("int4") | {"linears": {}},
    "no groupsize": make_scheme("int4") | {"linears": {"bits": 4}},
    "bits of a text": make_scheme("int4") | {"output": {"bits": "8"}},
    "bits 3": make_scheme("int4") | {"output": {"bits": 3}},
    "bits 8.0": make_scheme("int4") | {"output": {"bits": 8.0}},
    "bits of a tensor": make_scheme("int4") | {"output": {"bits": torch.ones(2)}},
    **{
        f"groupsize {size}": make_scheme("int4") | {"linears": {"bits": 4, "groupsize": size}}
        for size in (-1, 0, 33, True, None, ["x"], 32.0)
    },
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_that_no_tool_writes_is_refused(name: str, tmp_path: Path):
    write_prepared(tmp_path, scheme=SCHEMES[name])
    assert "scheme" in refused(tmp_path, "model.pth: ")


@pytest.mark.parametrize("mode", [None, "int8", "int4", "int4-gptq"])
def test_every_scheme_that_we_write_is_read(mode: str | None, tmp_path: Path):
    for head in ("int8", "int4", "dense"):
        scheme = make_scheme(mode, 64, head) if mode else None
        model = meta_model(model_args(CONFIG), scheme)
        blank = {name: torch.zeros_like(t, device="cpu") for name, t in model.state_dict().items()}
        save_checkpoint(tmp_path / "model.pth", CONFIG, scheme, blank)
        assert same(loaded(tmp_path), blank)


@pytest.mark.parametrize("config", [None, [], "llama", 7])
def test_a_config_in_model_pth_that_is_no_dict_is_refused(config: Any, tmp_path: Path):
    write_prepared(tmp_path, config=config)
    refused(tmp_path, "model.pth: 'config' and 'tensors' must be dicts")


@pytest.mark.parametrize("tensors", [None, [], [torch.ones(2)], torch.ones(2), 7, {}])
def test_tensors_that_are_no_dict_of_tensors_are_refused(tensors: Any, tmp_path: Path):
    write_prepared(tmp_path, tensors=tensors)
    refused(tmp_path, r"model.pth.*tensor")


# Each value that a .bin may have


SAME = {
    "parameter": torch.nn.Parameter,
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "transposed in memory": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "a slice": lambda t: torch.cat((t, t + 1))[: len(t)],
    "a strided slice": lambda t: torch.stack((t, t + 1), -1)[..., 0],
    "negated lazily": lambda t: torch._neg_view(-t),
    "a parameter not contiguous": lambda t: torch.nn.Parameter(torch.stack((t, t), -1)[..., 1]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", SAME)
def test_a_bin_of_such_tensors_is_read(
    kind: str, zipped: bool, folder: Path, expected: dict[str, Tensor]
):
    tensors = {name: SAME[kind](tensor) for name, tensor in TENSORS.items()}
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    assert same(loaded(folder), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"model": {f"module.{n}": v for n, v in t.items()}, "optimizer": {"lr": 0.1}},
        lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
        lambda t: {f"module._orig_mod.{n}": v for n, v in t.items()},
        lambda t: t | {"step": 7, "name": "x"},
        lambda t: t | {"model.decoder.version": torch.tensor([3.0])},
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    ],
)
def test_names_and_dicts_that_trainers_leave_are_seen_through(
    wrap: Any, folder: Path, expected: dict[str, Tensor]
):
    torch.save(wrap(TENSORS), folder / "pytorch_model.bin")
    assert same(loaded(folder), expected)


def test_two_state_dicts_in_one_file_are_refused(folder: Path):
    torch.save({"model": TENSORS, "state_dict": TENSORS}, folder / "pytorch_model.bin")
    refused(folder, "holds weights under state_dict and model: keep one")


def test_two_names_of_one_tensor_are_refused(folder: Path):
    tensors = TENSORS | {"norm.weight": TENSORS[NORM] + 1}
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder, "are one tensor's names")
    assert NORM in message and " norm.weight" in message


WRONG = {
    "sparse": (lambda t: t.to_sparse(), "is no dense tensor"),
    "sparse rows": (lambda t: t[None].to_sparse_csr(), "is no dense tensor"),
    "without values": (lambda t: t.to("meta"), "without its values"),
    "complex": (lambda t: t.to(torch.complex64), "norm.weight is complex64"),
    "int64": (lambda t: t.long(), "norm.weight is int64"),
    "bool": (lambda t: t > 0, "norm.weight is bool"),
    "uint8": (lambda t: t.byte(), "norm.weight is uint8"),
    "numpy": (lambda t: t.numpy(), "numpy.* where only tensors may be"),
    "a list": (lambda t: t.tolist(), "norm.weight is missing"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_value_that_is_no_plain_tensor_is_refused(kind: str, zipped: bool, folder: Path):
    change, words = WRONG[kind]
    tensors = TENSORS | {NORM: change(TENSORS[NORM])}
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    refused(folder, words)


@pytest.mark.parametrize("name", [None, 7, ("a",), b"norm"])
def test_a_tensor_whose_name_is_no_text_is_refused(name: Any, folder: Path):
    torch.save(TENSORS | {name: torch.ones(2)}, folder / "pytorch_model.bin")
    refused(folder, "which is no tensor with a name")


# safetensors headers


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HEADERS: dict[str, Any] = {
    "a list": [],
    "a number": 7,
    "an entry that is a list": {"a": []},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype of a list": {"a": entry(dtype=["F32"])},
    "dtype unknown": {"a": entry(dtype="x" * 5000)},
    "complex": {"a": entry(dtype="C64", shape=[1])},
    "shape of a number": {"a": entry(shape=2)},
    "shape of floats": {"a": entry(shape=[2.0])},
    "shape of bools": {"a": entry(shape=[2, True])},
    "shape negative": {"a": entry(shape=[-2, -1])},
    "shape huge": {"a": entry(shape=[10**400, 10**400])},
    "shape nested": {"a": entry(shape=[[2]])},
    "offsets of floats": {"a": entry(data_offsets=[0.0, 8.0])},
    "offsets of bools": {"a": entry(dtype="U8", shape=[1], data_offsets=[False, True])},
    "offsets negative": {"a": entry(data_offsets=[-8, 0])},
    "offsets of one": {"a": entry(data_offsets=[8])},
    "offsets backwards": {"a": entry(data_offsets=[8, 0])},
    "offsets None": {"a": entry(data_offsets=None)},
    "overlapping": {"a": entry(), "b": entry()},
    "overlapping in part": {"a": entry(), "b": entry(data_offsets=[4, 12])},
    "a gap": {"a": entry(), "b": entry(data_offsets=[16, 24])},
    "a gap at the start": {"a": entry(data_offsets=[8, 16])},
    "beyond the end": {"a": entry(shape=[2000], data_offsets=[0, 8000])},
    "a long name": {"é" * 5000: entry(shape=[3])},
    "a name of two lines": {"a\nb\ud800": entry(shape=[3])},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_wrong_safetensors_header_is_refused(kind: str, folder: Path):
    file = folder / "model.safetensors"
    ends = [0]
    if isinstance(HEADERS[kind], dict):
        pairs = [e["data_offsets"] for e in HEADERS[kind].values() if "data_offsets" in e]
        ends += [int(end) for pair in pairs for end in pair or () if end < 100]
    file.write_bytes(safetensors(json.dumps(HEADERS[kind]).encode(), bytes(max(ends))))
    assert "model.safetensors" in refused(folder, "header|dtype|bytes long")


@pytest.mark.parametrize(
    "header",
    [b"\xff\xfe{}", b"{", b"", b"[" * 100_000, b'{"a": ' * 100_000, b"[" + b"9" * 5000 + b"]"],
    ids=["no UTF-8", "cut", "empty", "deep list", "deep object", "long number"],
)
def test_a_safetensors_header_that_is_no_json_is_refused(header: bytes, folder: Path):
    (folder / "model.safetensors").write_bytes(safetensors(header))
    refused(folder, "model.safetensors.*(header|truncated)")


def test_tensors_of_no_size_belong_to_a_file(folder: Path, expected: dict[str, Tensor]):
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    empty = {name: torch.ones(0, 3) for name in names}
    (folder / "model.safetensors").write_bytes(save(TENSORS | empty))
    assert same(loaded(folder), expected)


# Indexes


@pytest.mark.parametrize("name", [None, 7, ["a"], {"a": 1}, True, "", "../x.safetensors"])
def test_an_index_that_names_no_file_is_refused(name: Any, folder: Path):
    weight_map = dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors") | {NORM: name}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, f"index.json: weight_map puts {NORM} into")


@pytest.mark.parametrize(
    "name", ["/etc/x.bin", "..", "a/b.bin", "x" * 5000, "a\0.bin", "\ud800.bin"]
)
def test_an_index_that_leads_elsewhere_is_refused(name: str, folder: Path):
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: name}}))
    refused(folder, "index.json: weight_map puts")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_weight_map_is_refused(text: str, folder: Path):
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "index.json")


def test_a_config_that_is_nested_too_deeply_is_refused(folder: Path):
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "config.json is nested too deeply")


# Heads

TIED = CONFIG | {"tie_word_embeddings": True}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def write_tied(folder: Path, head: Tensor | None, config: dict[str, Any] = TIED) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    tensors = TENSORS if head is None else TENSORS | {HEAD: head}
    save_file(tensors, folder / "model.safetensors")


def last_value_changed(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] += 1
    return changed


@pytest.mark.parametrize("change", [lambda t: t + 1, last_value_changed, lambda t: t.double() + 1])
def test_a_head_that_differs_is_kept_though_the_config_ties_it(
    change: Any, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("checkpoint.COMPARED_BYTES", 200)  # three rows at a time
    head = change(TENSORS[TABLE])
    write_tied(folder, head)
    checkpoint, found = Checkpoint(folder), loaded(folder)
    assert not checkpoint.args.tied and checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(found["output.weight"], head.to(found["output.weight"].dtype))
    assert torch.equal(found["tok_embeddings.weight"].float(), TENSORS[TABLE])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "differs from the embedding" in lines[0]  # though opened twice


@pytest.mark.parametrize("stored", ["safetensors", "bin", "legacy", "bin, apart", "other dtype"])
def test_a_head_that_is_equal_stays_tied(
    stored: str, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("checkpoint.COMPARED_BYTES", 200)
    table = TENSORS[TABLE]
    head = table if stored in ("bin", "legacy") else table.clone()
    head = head.double() if stored == "other dtype" else head
    write_tied(folder, head.clone())
    if stored in ("bin", "legacy", "bin, apart"):
        (folder / "model.safetensors").unlink()
        file, zipped = folder / "pytorch_model.bin", stored != "legacy"
        torch.save(TENSORS | {HEAD: head}, file, _use_new_zipfile_serialization=zipped)
    checkpoint, found = Checkpoint(folder), loaded(folder)
    assert checkpoint.args.tied and torch.equal(found["output.weight"], table)
    assert capsys.readouterr().err == ""


def test_model_pth_of_a_head_that_differs_is_untied(folder: Path):
    write_tied(folder, TENSORS[HEAD])
    source = Checkpoint(folder)
    tensors = {name: source.read(name) for name in source.tensors}
    save_checkpoint(folder / "model.pth", source.config, source.scheme, tensors)
    again = Checkpoint(folder)
    assert again.path.name == "model.pth" and not again.args.tied
    assert same(loaded(folder), tensors)


def test_a_head_that_differs_gives_the_logits_of_transformers(folder: Path):
    transformers = pytest.importorskip("transformers")
    write_tied(folder, TENSORS[HEAD])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm, tokens, key_pos = (
        meta_model(Checkpoint(folder).args, None),
        torch.arange(8)[None],
        torch.arange(8),
    )
    Checkpoint(folder).load_into(lm)
    with torch.no_grad():
        ours = lm(tokens, key_pos[None], key_pos, lm.make_caches(1, 8))
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_neither_tied_nor_stored_is_missed(folder: Path):
    """transformers goes on with a head of random numbers."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != HEAD}
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "output.weight is missing")

"""Others' int4 checkpoints against the dense model of the same numbers, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import ROOT
from safetensors.torch import save_file
from torch import Tensor

import quantize
from checkpoint import Checkpoint
from engine import complete
from load import load_model
from quant.linear import dequantize_int4, meta_model, unpack_nibbles
from scripts.convert_hf_checkpoint import convert
from text.generation_config import GenerationConfig
from weights.hf import export_tensors

LAYOUTS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"},
}
TEXTS = ["Once upon a time", "Lily", "Tim and his dog saw a big red ball. They"]


def words(q: Tensor, order: tuple[int, ...]) -> Tensor:
    """(R, 8n) numbers of four bits -> (R, n) int32: bits 4i to 4i + 3 hold number order[i]."""
    packed = torch.zeros(q.shape[0], q.shape[1] // 8, dtype=torch.int64)
    for n in range(packed.shape[1]):
        for i in range(8):
            packed[:, n] += q[:, 8 * n + order[i]].long() * 16**i
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def split(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) -> numbers, (N, K), zero points and float16 scales, (N, P)."""
    q, zeros, scales = [], [], []
    for group in weight.float().split(groupsize, 1):
        low, high = group.amin(1).clamp_max(-1e-6), group.amax(1).clamp_min(1e-6)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(1, 15)
        q.append((group / scale.float().unsqueeze(1) + zero.unsqueeze(1)).round().clamp(0, 15))
        zeros.append(zero)
        scales.append(scale)
    return torch.cat(q, 1), torch.stack(zeros, 1), torch.stack(scales, 1)


def stored(layout: str, q: Tensor, zeros: Tensor, scales: Tensor, groupsize: int) -> dict:
    """As the layout's own tools write it."""
    if layout == "awq":
        order = 0, 2, 4, 6, 1, 3, 5, 7
        qweight, qzeros = words(q.t(), order), words(zeros.t(), order)  # (K, N/8), (P, N/8)
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales.t()}
    plain = tuple(range(8))
    qweight = words(q, plain).t()  # (K/8, N)
    qzeros = words(zeros.t() - int(layout == "gptq"), plain)  # (P, N/8)
    g_idx = (torch.arange(q.shape[1]) // groupsize).int()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales.t(), "g_idx": g_idx}


Edit = Callable[[dict[str, Tensor]], None]


def write(folder: Path, name: str, layout: str, groupsize: int, edit: Edit | None = None) -> Path:
    """One model in two directories: folder/theirs in the layout, folder/dense unpacked."""
    source = Checkpoint(ROOT / "checkpoints" / name)
    tensors = {n: source.read(n, torch.float32) for n in source.tensors}
    theirs: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for key, tensor in export_tensors(tensors, source.config).items():
        module, _, kind = key.rpartition(".")
        dense[key] = theirs[key] = tensor
        if kind == "weight" and tensor.dim() == 2 and ".layers." in key:
            q, zeros, scales = split(theirs.pop(key), groupsize)
            made = stored(layout, q, zeros, scales, groupsize)
            theirs |= {f"{module}.{leaf}": t for leaf, t in made.items()}
            if name == "demo" and layout == "gptq":  # AutoGPTQ gives Llama biases of zero
                theirs[f"{module}.bias"] = torch.zeros(len(q))
            group = torch.arange(q.shape[1]) // groupsize
            zero, scale = zeros[:, group], scales.float()[:, group]
            dense[key] = (q - zero) * scale
    if edit:
        edit(theirs)
    said = LAYOUTS[layout] | {"group_size": groupsize}
    for kind, content in (("theirs", theirs), ("dense", dense)):
        shutil.copytree(source.directory, folder / kind, ignore=lambda *_: ["model.pth"])
        content = {n: t.contiguous() for n, t in content.items()}
        save_file(content, folder / kind / "model.safetensors")
        config = source.config | ({"quantization_config": said} if kind == "theirs" else {})
        (folder / kind / "config.json").write_text(json.dumps(config))
    return folder / "theirs"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["demo", "demo-opt"])
def test_a_foreign_checkpoint_is_the_dense_model_of_its_numbers(
    tmp_path: Path, name: str, layout: str
):
    theirs = write(tmp_path, name, layout, 64 if layout == "awq" else 32)
    lm, dense = (load_model(p, device="cpu") for p in (theirs, tmp_path / "dense"))
    ids = torch.tensor([lm.tokenizer.encode(TEXTS[2]), dense.tokenizer.encode(TEXTS[2])])
    key_pos = torch.arange(ids.shape[1])
    given = ids, key_pos.expand_as(ids), key_pos
    got, wanted = (m.model(*given, m.model.make_caches(2, 64)) for m in (lm, dense))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    greedy = GenerationConfig(max_new_tokens=24, temperature=0)
    prompts = [lm.tokenizer.encode(text) for text in TEXTS]
    texts = [[c.text for c in complete(m, prompts, greedy)] for m in (lm, dense)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="quantised already"):
        quantize.run(quantize.parse_args(["--checkpoint_path", str(theirs)]))
    prepared = load_model(convert(theirs, None), device="cpu")
    assert [c.text for c in complete(prepared, prompts, greedy)] == texts[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'.*which cannot be read.*unquantised"),
        ({"desc_act": True}, "'gptq'.*desc_act true"),
        ({"bits": 3}, "bits 3"),
        ({"group_size": -1}, "group_size -1.*32, 64, 128, 256"),
        ({"checkpoint_format": "marlin"}, 'checkpoint_format "marlin"'),
        ({"lm_head": True}, "lm_head true"),
        ({"is_marlin_format": True}, "is_marlin_format true"),
        ({"quant_method": "awq", "zero_point": True, "version": "gemv"}, 'version "gemv"'),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: dict, message: str):
    theirs = write(tmp_path, "demo", "gptq", 32)
    config = json.loads((theirs / "config.json").read_text())
    config["quantization_config"] |= change
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(theirs)
    assert "\n" not in str(caught.value)


def test_a_zero_bias_of_one_linear_where_others_have_biases(tmp_path: Path):
    """Qwen2 has biases of q, k and v; AutoGPTQ also writes zeros for the output."""
    theirs = write(tmp_path, "demo", "gptq", 32)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    checkpoint = Checkpoint(theirs)
    checkpoint.check(meta_model(checkpoint.args, checkpoint.scheme))
    biases = {n.split(".", 2)[2] for n in checkpoint.tensors if n.endswith("bias")}
    assert biases == {"attention.wqkv.bias"}


def shuffle(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("1.self_attn.k_proj.g_idx"))
    tensors[name] = tensors[name].flip(0)


def bias(tensors: dict[str, Tensor]) -> None:
    next(t for n, t in tensors.items() if n.endswith("0.mlp.up_proj.bias"))[3] = 1


def zero_of_16(tensors: dict[str, Tensor]) -> None:
    next(t for n, t in tensors.items() if n.endswith("0.mlp.up_proj.qzeros"))[0, 0] = -1


def infinite(tensors: dict[str, Tensor]) -> None:
    next(t for n, t in tensors.items() if n.endswith("1.self_attn.o_proj.scales"))[0, 3] = torch.inf


def too_large(tensors: dict[str, Tensor]) -> None:
    """For float16, which scales are kept in."""
    name = next(n for n in tensors if n.endswith("1.self_attn.o_proj.scales"))
    tensors[name] = tensors[name].float()
    tensors[name][0, 3] = 1e6


def floating(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("0.mlp.up_proj.qweight"))
    tensors[name] = tensors[name].float()


def flat(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("0.mlp.up_proj.qzeros"))
    tensors[name] = tensors[name].flatten()


def short_order(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("1.self_attn.k_proj.g_idx"))
    tensors[name] = tensors[name][:32]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (infinite, r"layers.1.attention.wo.scales holds NaN or infinity"),
        (too_large, r"layers.1.attention.wo.scales holds NaN or infinity"),
        (floating, r"0.mlp.up_proj.qweight is float32 of shape .* should be a matrix, int32"),
        (flat, r"0.mlp.up_proj.qzeros is int32 of shape \[\d+\] and should be a matrix"),
        (short_order, r"layers.1.attention.wqkv.g_idx.*order"),
        (shuffle, r"layers.1.attention.wqkv.g_idx.*order"),
        (bias, r"layers.0.feed_forward.w13.bias is not part of the model"),
        (zero_of_16, r"0.mlp.up_proj.qzeros has zero points of 16.*use quantize.py"),
    ],
)
def test_tensors_that_would_be_read_wrongly_are_refused(tmp_path: Path, edit: Edit, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(write(tmp_path, "demo", "gptq", 32, edit), device="cpu")
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def weight_of(folder: Path, name: str) -> Tensor:
    """What the integers of a linear stand for."""
    checkpoint = Checkpoint(folder)
    parts = {leaf: checkpoint.read(f"{name}.{leaf}") for leaf in ("weight", "scales", "zeros")}
    return dequantize_int4(**parts)


@pytest.mark.parametrize("named", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored_zero", [7, 8])
def test_symmetric_zeros_are_eights_whatever_the_format_is_called(
    tmp_path: Path, named: str, stored_zero: int
):
    """GPTQModel 5.0 says "gptq" and stores what gptq_v2 stores."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(".qzeros"):
                filled = torch.full((tensors[name].shape[0], tensors[name].shape[1] * 8), 0)
                tensors[name] = words(filled + stored_zero, tuple(range(8)))

    theirs = write(tmp_path, "demo", "gptq", 64, edit)
    config = json.loads((theirs / "config.json").read_text())
    config["quantization_config"] |= {"sym": True, "checkpoint_format": named}
    config["quantization_config"] |= {"meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    (theirs / "config.json").write_text(json.dumps(config))
    zeros = unpack_nibbles(Checkpoint(theirs).read("layers.1.feed_forward.w2.zeros"))
    assert (zeros == 8).all()
    # Zeros of every kind follow what the file says, even if it says that they are symmetric.
    shutil.rmtree(tmp_path)
    theirs = write(tmp_path, "demo", "gptq", 64)
    plain = weight_of(theirs, "layers.1.feed_forward.w2")
    config["quantization_config"] |= {"checkpoint_format": "gptq"}
    (theirs / "config.json").write_text(json.dumps(config))
    assert torch.equal(weight_of(theirs, "layers.1.feed_forward.w2"), plain)


@pytest.mark.parametrize(
    ("layout", "file", "content"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True}),
    ],
)
def test_configs_of_before_transformers_read_them(
    tmp_path: Path, layout: str, file: str, content: dict
):
    theirs = write(tmp_path, "demo", layout, 64)
    wanted = weight_of(theirs, "layers.1.feed_forward.w2")
    config = json.loads((theirs / "config.json").read_text())
    del config["quantization_config"]
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "model.safetensors").rename(theirs / f"{layout}_model-4bit-64g.safetensors")
    with pytest.raises(ValueError, match="no quantization_config, nor is there a quantize_config"):
        Checkpoint(theirs)
    (theirs / file).write_text(json.dumps(content))
    assert torch.equal(weight_of(theirs, "layers.1.feed_forward.w2"), wanted)
    (theirs / file).write_text(json.dumps(content | {"desc_act": True, "version": "gemv"}))
    with pytest.raises(ValueError, match='desc_act true|version "gemv"'):
        Checkpoint(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": [4]}, r"quantization_config is \[4\] and must be an object"),
        ({"quantization_config": "gptq"}, "must be an object"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "cannot be read"),
        ({"quantization_config": {"quant_method": None}}, "cannot be read"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4.0}}, "bits 4.0"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised by mlx.*use quantize.py"),
        ({"quantization": 4}, "quantization is 4 and must be an object"),
        (
            {"quantization": {"bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
            "quantised by mlx",
        ),
    ],
    ids=str,
)
def test_a_quantization_config_of_another_kind(tmp_path: Path, change: dict, message: str):
    folder = shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "demo")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_an_empty_quantization_config_means_none(tmp_path: Path):
    folder = shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "demo")
    source = Checkpoint(folder)
    tensors = {n: source.read(n) for n in source.tensors}
    tensors = {n: t.contiguous() for n, t in export_tensors(tensors, source.config).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.pth").unlink()
    (folder / "config.json").write_text(json.dumps(source.config | {"quantization_config": {}}))
    assert Checkpoint(folder).scheme is None


def test_integers_of_mlx_are_no_weights(tmp_path: Path):
    folder = shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "demo")
    source = Checkpoint(folder)
    tensors = {n: source.read(n) for n in source.tensors}
    tensors = {n: t.contiguous() for n, t in export_tensors(tensors, source.config).items()}
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.uint32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(ValueError, match="layers.0.attention.wo.weight is uint32 and should be"):
        load_model(folder, device="cpu")

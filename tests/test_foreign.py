"""Others' int4 checkpoints against the dense model of the same numbers, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantize
from checkpoint import Checkpoint
from generate import GenerationConfig, complete
from hf import export_tensors
from load import load_model
from scripts.convert_hf_checkpoint import convert

ROOT = Path(__file__).resolve().parent.parent
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
    tensors = {n: source.read(n, torch.float32) for n in source.records}
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
    slots = torch.arange(ids.shape[1])
    given = ids, slots.expand_as(ids), slots
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


def shuffle(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("1.self_attn.k_proj.g_idx"))
    tensors[name] = tensors[name].flip(0)


def bias(tensors: dict[str, Tensor]) -> None:
    next(t for n, t in tensors.items() if n.endswith("0.mlp.up_proj.bias"))[3] = 1


def zero_of_16(tensors: dict[str, Tensor]) -> None:
    next(t for n, t in tensors.items() if n.endswith("0.mlp.up_proj.qzeros"))[0, 0] = -1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shuffle, r"layers.1.attention.wqkv.g_idx.*order"),
        (bias, r"layers.0.feed_forward.w13.bias is not part of the model"),
        (zero_of_16, "zero points"),
    ],
)
def test_tensors_that_would_be_read_wrongly_are_refused(tmp_path: Path, edit: Edit, message: str):
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path, "demo", "gptq", 32, edit), device="cpu")

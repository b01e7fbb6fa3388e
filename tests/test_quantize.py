"""int8 and int4: what is stored, what it stands for, what runs, and what is refused."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant.linear
import quantize
from calibration.texts import calibration_text
from checkpoint import Checkpoint
from engine import complete
from evaluation.scoring import log_likelihoods
from fast_layers.cpu import PackedLinear
from host.memory import size_text
from kernels.cpu import build
from layers.basic import Linear
from load import load_model, random_model
from options.settings import CalibrationOptions
from quant.linear import (
    GROUP_SIZES,
    Int4Linear,
    Int8Linear,
    dequantize_int4,
    make_scheme,
    pack_nibbles,
    quantized_linear,
    round_int4,
    round_int8,
    round_to_nearest,
    scale_units,
    unpack_nibbles,
)
from text.generation_config import GenerationConfig
from weights.saving import save_checkpoint

SEED = 11  # of every random tensor below; pytest prints it where a test fails, as a local
SHAPES = ((64, 172), (100, 64), (17, 40), (48, 256))  # out, in: 172 = 4 * 43, no group divides it
FOUR, EIGHT = {"bits": 4, "groupsize": 32}, {"bits": 8}
TEXTS = ("Once upon a time", "Lily", "Tim and his dog saw a big red ball. They")
tiles = pytest.mark.skipif(
    build.unsupported_reason(torch.bfloat16) is not None,
    reason=f"no tiles here: {build.unsupported_reason(torch.bfloat16)}",
)


def random_linear(shape: tuple[int, int], bias: bool = True) -> Linear:
    torch.manual_seed(SEED)
    linear = Linear(shape[1], shape[0], bias=bias)
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def filled(linear: Linear, said: dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The quantised layer that is nearest to a dense one."""
    made = quantized_linear(linear, said)
    rounded = round_int8 if said["bits"] == 8 else lambda w: round_int4(w, said["groupsize"])
    made.load_state_dict(rounded(linear.weight) | {"bias": linear.bias})
    made.bias.data = made.bias.data.to(dtype)
    return made


@pytest.fixture(params=["demo", "demo-opt"])
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(ROOT / "checkpoints" / request.param, tmp_path / request.param)


def command(*options: object) -> int:
    return quantize.main(quantize.parse_args(["--device", "cpu", *map(str, options)]))


def quantized(folder: Path, mode: str = "int4", *options: object) -> Path:
    assert command("--checkpoint_path", folder, "--mode", mode, *options) == 0
    return folder / quantize.file_name(mode, 32)


def test_int8_by_hand():
    found = round_int8(torch.tensor([[1.27, -0.635, 0.004], [0.0, 0.0, 0.0]]))
    assert found["weight"].tolist() == [[127, -64, 0], [0, 0, 0]]  # -63.5 goes to the even one
    torch.testing.assert_close(found["scales"], torch.tensor([0.01, 1.0]))


def test_int4_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([-0.5, 1.375, 0.3])  # a span of 1.875: steps of 0.125, zero at 4
    found = round_int4(weight, 32)
    assert found["scales"].tolist() == [[0.125]] and found["zeros"].tolist() == [[4]]
    assert unpack_nibbles(found["weight"])[0, :4].tolist() == [0, 15, 6, 4]
    assert dequantize_int4(**found)[0, :4].tolist() == [-0.5, 1.375, 0.25, 0.0]


@pytest.mark.parametrize("n", [2, 7])
def test_nibbles_come_back(n: int):
    torch.manual_seed(SEED)
    q = torch.randint(0, 16, (3, n))
    assert torch.equal(unpack_nibbles(pack_nibbles(q))[:, :n], q)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groupsize", GROUP_SIZES)
def test_every_int4_weight_is_within_half_a_step(shape: tuple[int, int], groupsize: int):
    weight = random_linear(shape).weight.detach()
    found = round_int4(weight, groupsize)
    scales = found["scales"].float()
    multiples = scales / scale_units(scales)
    assert torch.equal(multiples, multiples.round()) and multiples.max() <= 255
    step = scales.repeat_interleave(groupsize, 1)[:, : shape[1]]
    error = (dequantize_int4(**found)[:, : shape[1]] - weight).abs()
    # A scale is up to half a unit too small: the ends of the span are 15 times that away.
    assert (error <= step * 0.5 + 15 * scale_units(scales) / 2 + 1e-7).all()


@pytest.mark.parametrize(
    "said", [EIGHT, *({"bits": 4, "groupsize": s} for s in GROUP_SIZES)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_quantised_layer_multiplies_by_what_it_stands_for(shape: tuple[int, int], said: dict):
    layer = filled(random_linear(shape), said)
    x = torch.randn(2, 3, shape[1])
    wanted = F.linear(x, layer.dequantize(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    assert layer.dequantize(torch.float32).shape == shape


# A float32 sum of some hundred products, then the rounding of the result; with bfloat16 two.
@pytest.mark.parametrize(
    "dtype, near",
    [(torch.float32, 2**-19), (torch.bfloat16, 1.01 * 2**-8), (torch.float16, 2**-10)],
    ids=str,
)
@pytest.mark.parametrize(
    "said", [EIGHT, *({"bits": 4, "groupsize": s} for s in GROUP_SIZES)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_blocks_match_float64(
    bias: bool, said: dict, dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
):
    chosen = random.Random(SEED)
    for _ in range(8):
        N, M = chosen.randint(1, 90), chosen.randint(1, 40)
        K = chosen.choice([chosen.randint(1, 600), 32 * chosen.randint(1, 20)])
        monkeypatch.setattr(quant.linear, "UNPACKED_AT_ONCE", chosen.randint(1, 20) * K)
        linear = random_linear((N, K), bias)
        layer = quantized_linear(linear, said)
        layer.load_state_dict(round_to_nearest(linear.weight.detach(), layer), strict=False)
        x, weight = torch.randn(M, K).to(dtype), layer.dequantize(torch.float64)
        layer.bias = nn.Parameter(torch.randn(N).to(dtype), False) if bias else None
        added = layer.bias.double() if bias else torch.zeros(N).double()
        found, wanted = layer.reference(x), x.double() @ weight.t() + added
        bound = x.double().abs() @ weight.t().abs() + added.abs()
        assert found.dtype == dtype and found.shape == (M, N)
        assert ((found.double() - wanted).abs() <= near * bound + 1e-7).all(), (M, N, K)


@pytest.mark.parametrize("said", [EIGHT, FOUR], ids=str)
def test_products_in_blocks_have_a_gradient(said: dict):
    layer, x = filled(random_linear((48, 100)), said), torch.randn(3, 100, requires_grad=True)
    layer.reference(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(3, -1))


@pytest.mark.parametrize("said", [EIGHT, FOUR], ids=str)
def test_compiled_products_in_blocks_are_one_operator(said: dict):
    """Traced, not compiled, for any number of rows; the bits are eager code's."""
    layer, graphs = filled(random_linear((48, 100)), said), []

    def backend(graph: torch.fx.GraphModule, _examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append([node.target for node in graph.graph.nodes if "multiply" in str(node)])
        return graph.forward

    traced = torch.compile(layer.reference, backend=backend, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for M in (2, 5):
            x = torch.randn(M, 100)
            assert torch.equal(traced(x), layer.reference(x))
    assert graphs == [[torch.ops.gpt_flex.multiply]]
    on_meta = torch.empty(3, 100, device="meta")
    assert layer.to("meta").reference(on_meta).shape == (3, 48)


@tiles
@pytest.mark.parametrize(
    "said", [EIGHT, *({"bits": 4, "groupsize": s} for s in GROUP_SIZES)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_give_what_float64_gives(shape: tuple[int, int], said: dict):
    """For one row, for rows together and for many, whose products are different code."""
    assert build.build() is None
    layer = filled(random_linear(shape), said, torch.bfloat16)
    tiled = PackedLinear(layer)
    weight = layer.dequantize(torch.float64)
    for rows in (1, 2, 3, 4, 5, 7, 8, 15, 60, 260):
        x = torch.randn(rows, shape[1]).bfloat16() * torch.logspace(-3, 3, rows).unsqueeze(1)
        x = x.bfloat16()
        wanted = x.double() @ weight.t() + layer.bias.double()
        bound = x.double().abs() @ weight.t().abs() + layer.bias.double().abs()
        # bfloat16 rounds the result; a block of activations, and for many rows a weight, too.
        assert ((tiled(x).double() - wanted).abs() <= 2**-8 * bound + 1e-9).all()


def fit_a_byte(scales: Tensor) -> bool:
    multiples = scales.float() / scale_units(scales)
    return bool((multiples == multiples.byte()).all())


@pytest.mark.parametrize("dtype, near", [(torch.float32, 2**-18), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("groupsize", GROUP_SIZES)
def test_scales_that_fit_no_byte_are_multiplied_by_as_they_are(
    groupsize: int, dtype: torch.dtype, near: float
):
    """As others' files have them. In plain PyTorch, which runs on every CPU."""
    layer = filled(random_linear((48, 300)), {"bits": 4, "groupsize": groupsize}, dtype)
    assert fit_a_byte(layer.scales)
    layer.scales += layer.scales * torch.rand(layer.scales.shape) / 2
    assert not fit_a_byte(layer.scales)
    P = layer.scales.shape[1]
    scales, zeros = (
        t.double().repeat_interleave(groupsize, 1)[:, :300]
        for t in (layer.scales, unpack_nibbles(layer.zeros)[:, :P])
    )
    weight = (unpack_nibbles(layer.weight)[:, :300].double() - zeros) * scales
    x, bias = torch.randn(260, 300).to(dtype), layer.bias.double()
    for rows in (x[:1], x[:3], x[:60], x):
        wanted = rows.double() @ weight.t() + bias
        bound = rows.double().abs() @ weight.t().abs() + bias.abs()
        assert ((layer(rows).double() - wanted).abs() <= near * bound).all()


@tiles
@pytest.mark.parametrize("groupsize", GROUP_SIZES)
def test_tiles_take_scales_that_fit_no_byte(groupsize: int):
    """As others' files have them."""
    assert build.build() is None
    layer = filled(random_linear((48, 300)), {"bits": 4, "groupsize": groupsize}, torch.bfloat16)
    x = torch.randn(260, 300).bfloat16()
    short = PackedLinear(layer)
    layer.scales += layer.scales * torch.rand(layer.scales.shape) / 2
    long = PackedLinear(layer)
    formats = short._layout[0], long._layout[0]
    assert formats == (build.layout().int4, build.layout().int4_half)
    weight, bias = layer.dequantize(torch.float64), layer.bias.double()
    for rows in (x[:1], x[:3], x[:60], x):
        wanted = rows.double() @ weight.t() + bias
        bound = rows.double().abs() @ weight.t().abs() + bias.abs()
        assert ((long(rows).double() - wanted).abs() <= 2**-8 * bound + 1e-9).all()


@tiles
@pytest.mark.parametrize(
    "said", [EIGHT, *({"bits": 4, "groupsize": s} for s in GROUP_SIZES)], ids=str
)
def test_a_row_of_a_batch_has_the_bits_that_it_has_alone(said: dict):
    """Four rows and eight are different code, with AMX quite different; 300 is no whole span."""
    assert build.build() is None
    layer = filled(random_linear((100, 300)), said, torch.bfloat16)
    x = torch.randn(45, 300).bfloat16() * torch.logspace(-3, 3, 45).unsqueeze(1)
    x = x.bfloat16()
    for _ in range(2):
        tiled = PackedLinear(layer)
        alone = torch.cat([tiled(row.unsqueeze(0)) for row in x])
        for rows in (2, 4, 5, 8, 13, 15, 45):
            assert torch.equal(tiled(x[:rows]), alone[:rows])
        layer.scales += layer.scales * torch.rand(layer.scales.shape) / 2  # fit no byte now


@tiles
def test_activations_lose_less_than_bfloat16_does():
    """One value a thousand times as large as the others of its row, as real models have."""
    assert build.build() is None
    layer = filled(random_linear((64, 256), bias=True), FOUR, torch.bfloat16)
    layer.bias.data.zero_()
    x = torch.randn(1, 256).bfloat16()
    x[0, 5] = 1000
    wanted = x.double() @ layer.dequantize(torch.float64).t()
    error = (PackedLinear(layer)(x).double() - wanted).abs()
    assert (error <= 2**-8 * wanted.abs() + 2**-14 * wanted.abs().max()).all()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_file_runs_by_its_path_alone_whatever_it_is_called(demo: Path, mode: str):
    target = quantized(demo, mode)
    renamed = target.rename(demo / "anything.pth")
    lm = load_model(renamed, device="cpu", dtype=torch.float32)
    kinds = {type(m) for m in lm.model.layers.modules()}
    assert (Int8Linear if mode == "int8" else Int4Linear) in kinds and Linear not in kinds
    assert isinstance(lm.model.output, Int8Linear)  # in either mode
    prompts = [lm.tokenizer.encode(text) for text in TEXTS]
    dense = load_model(demo, device="cpu", dtype=torch.float32)
    key_pos = torch.arange(len(prompts[2]))
    given = torch.tensor([prompts[2]])
    for model in (lm.model, dense.model):
        with torch.inference_mode():
            logits = model(given, key_pos.unsqueeze(0), key_pos, model.make_caches(1, len(key_pos)))
        model.result = logits.log_softmax(-1)
    loss = F.kl_div(lm.model.result, dense.model.result, log_target=True, reduction="batchmean")
    assert loss / len(key_pos) < (0.001 if mode == "int8" else 0.1)  # of the dense one's nats


@tiles
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_compiled_text_is_eager_text_and_a_batch_is_its_rows(demo: Path, mode: str):
    target = quantized(demo, mode)
    config = GenerationConfig(max_new_tokens=40, temperature=0, ignore_eos=True)
    texts = []
    for options in ({}, {"compile": True}):
        lm = load_model(target, device="cpu", **options)
        assert any(isinstance(m, PackedLinear) for m in lm.model.modules())
        prompts = [lm.tokenizer.encode(text) for text in TEXTS]
        texts.append([complete(lm, [prompt], config)[0].ids for prompt in prompts])
    assert texts[0] == texts[1]
    assert len({tuple(ids) for ids in texts[0]}) == len(TEXTS)


def test_the_tied_head_of_a_quantised_model_is_its_own(demo: Path):
    file = Checkpoint(quantized(demo))
    assert file.args.tied and file.tensors["output.weight"].dtype == torch.int8
    assert file.tensors["tok_embeddings.weight"].dtype == torch.bfloat16
    dense = Checkpoint(quantized(demo, "int4", "--head", "dense"))
    assert "output.weight" not in dense.tensors


def test_sizes_are_announced_and_true(demo: Path, capsys: pytest.CaptureFixture):
    target = quantized(demo)
    said = capsys.readouterr().err
    assert "bits per weight" in said and "times as " in said
    file = Checkpoint(target)
    assert size_text(file.nbytes) in said
    weights = math.prod(
        Checkpoint(demo / "model.safetensors").tensors["layers.0.attention.wo.weight"].shape
    )
    stored = sum(
        file.tensors[f"layers.0.attention.wo.{leaf}"].nbytes
        for leaf in ("weight", "scales", "zeros")
    )
    assert 4.6 < 8 * stored / weights < 4.8


def test_mistakes_are_one_line_and_leave_nothing(demo: Path, capsys: pytest.CaptureFixture):
    before = sorted(demo.iterdir())
    for options, says in (
        (("--mode", "int4", "--groupsize", "48"), "48 is not one of 32, 64, 128, 256"),
        (("--mode", "int4-gptq", "--calibration_file", demo / "none.txt"), "none.txt"),
        (("--mode", "int4-gptq", "--calibration_file", demo / "config.json"), "more text"),
    ):
        assert command("--checkpoint_path", demo, *options) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert says in said and said.startswith("quantize.py: ")
        assert sorted(demo.iterdir()) == before
    target = quantized(demo)
    assert command("--checkpoint_path", target, "--mode", "int8") == 2
    assert "quantised already, as int4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quantize.parse_args(["--checkpoint_path", "x", "--mode", "int4-gptq"])
    assert "--calibration_file" in capsys.readouterr().err


def test_a_calibration_text_in_another_encoding_is_named(demo: Path, capsys):
    (demo / "text.txt").write_bytes(b"One day a dog ran. " * 50 + b"\xff")
    text = "--mode", "int4-gptq", "--calibration_file", demo / "text.txt"
    assert command("--checkpoint_path", demo, *text) == 2
    assert "text.txt, line 1: byte 0xff is not UTF-8" in capsys.readouterr().err


def test_a_tokenizer_with_ids_that_the_model_lacks_is_named(demo: Path, capsys):
    config = json.loads((demo / "config.json").read_text()) | {"vocab_size": 300}
    (demo / "config.json").write_text(json.dumps(config))
    weights = load_file(demo / "model.safetensors")
    (table,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    save_file(weights | {table: weights[table][:300].clone()}, demo / "model.safetensors")
    (demo / "text.txt").write_text("One day a dog ran to the park. " * 400)
    text = "--mode", "int4-gptq", "--calibration_file", demo / "text.txt"
    assert command("--checkpoint_path", demo, *text) == 2
    assert "and the model has 300 ids: it is another model's tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("calibration_seq_length", 1, "1 is not at least 2"),
        ("calibration_seq_length", 0, "0 is not at least 2"),
        ("calibration_seq_length", -5, "-5 is not at least 2"),
        ("calibration_samples", 0, "0 is not at least 1"),
        ("calibration_samples", -(2**40), "is not at least 1"),
        ("groupsize", 64, "--groupsize is for int4"),
    ],
)
def test_options_of_quantize_are_checked(option: str, value: int, says: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        quantize.parse_args(["--checkpoint_path", "x", f"--{option}", str(value)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert says in said and option in said and said.count("\n") == 1


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    for name, mark in (("with.txt", b"\xef\xbb\xbf"), ("without.txt", b"")):
        (tmp_path / name).write_bytes(mark + b"One day")
        assert calibration_text(CalibrationOptions(tmp_path / name)) == "One day"


def test_int8_has_no_group_size(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        quantize.parse_args("--checkpoint_path x --mode int8 --groupsize 64".split())
    assert caught.value.code == 2 and "--groupsize is for int4" in capsys.readouterr().err
    assert quantize.parse_args("--checkpoint_path x --mode int4".split()).groupsize == 32


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (demo / "model_int8.pth.tmp").mkdir()
    monkeypatch.setattr(quantize, "quantize", lambda *given: pytest.fail("work has begun"))
    assert command("--checkpoint_path", demo, "--mode", "int8") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model_int8.pth cannot be written" in line


def test_what_is_replaced_is_said(demo: Path, capsys: pytest.CaptureFixture):
    quantized(demo)
    assert "replaces" not in capsys.readouterr().err
    target = quantized(demo)
    assert f"replaces {target} (" in capsys.readouterr().err


@pytest.mark.parametrize("slow", [True, False])
def test_slow_products_are_measured_and_said(
    demo: Path, slow: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(
        quantize, "unsupported_reason", lambda dtype: "there is no compiler" if slow else None
    )
    monkeypatch.setattr(quantize, "find_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(quantize, "product_seconds", lambda *given: (0.001, 0.0105))
    quantized(demo)
    said = capsys.readouterr().err
    assert (
        "1 ms as they are, 10.5 times as long" in said and "there is no compiler" in said
    ) == slow
    assert ("times as fast" in said) != slow


def test_products_are_measured_quickly():
    for scheme in (make_scheme("int8"), make_scheme("int4", 128)):
        assert all(seconds > 0 for seconds in quantize.product_seconds(192, 200, scheme))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_a_weight_that_is_not_finite_is_named(demo: Path, mode: str, bad: float, capsys):
    source = Checkpoint(demo)
    tensors = {name: source.read(name) for name in source.tensors}
    tensors["layers.1.feed_forward.w2.weight"][3, 4] = bad
    save_checkpoint(demo / "model.pth", source.config, None, tensors)
    before = sorted(demo.iterdir())
    (demo.parent / "text.txt").write_text("One day a dog ran. " * 4000)
    text = ("--calibration_file", demo.parent / "text.txt", "--calibration_seq_length", 64)
    assert command("--checkpoint_path", demo, "--mode", mode, *text) == 2
    assert "layers.1.feed_forward.w2.weight holds NaN or infinity" in capsys.readouterr().err
    assert sorted(demo.iterdir()) == before


def test_a_full_disk_leaves_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    before = sorted(demo.iterdir())
    usage = shutil.disk_usage(demo)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert command("--checkpoint_path", demo, "--mode", "int8") == 2
    assert "1 kB of disk is free" in capsys.readouterr().err
    assert sorted(demo.iterdir()) == before


def test_random_weights_can_be_quantised():
    config = ROOT / "checkpoints" / "demo" / "config.json"
    lm = random_model(config, device="cpu", dtype=torch.float32, scheme=make_scheme("int4", 64))
    (found,) = complete(lm, [[1, 2, 3]], GenerationConfig(max_new_tokens=5, ignore_eos=True))
    assert len(found.ids) == 5
    assert json.loads(config.read_text())["vocab_size"] == lm.model.args.vocab_size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_one_file_gives_the_same_text_on_cpu_and_cuda(demo: Path, mode: str):
    target = quantized(demo, mode)
    config = GenerationConfig(max_new_tokens=40, temperature=0, ignore_eos=True)
    lm, gpu = (load_model(target, device=name, dtype=torch.float32) for name in ("cpu", "cuda"))
    prompts = [lm.tokenizer.encode(text) for text in TEXTS]
    texts = ([c.ids for c in complete(model, prompts, config)] for model in (lm, gpu))
    for prompt, wanted, found in zip(prompts, *texts, strict=True):
        if wanted != found:  # only where the CPU finds both ids as likely, but for rounding
            n = next(n for n in range(40) if wanted[n] != found[n])
            ends = ([*prompt, *wanted[:n], ids[n]] for ids in (wanted, found))
            a, b = log_likelihoods(lm, [(end, len(end) - 1) for end in ends], 2)
            assert abs(a.nats - b.nats) < 1e-4

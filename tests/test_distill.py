"""Training int4 weights: the gradient, what it is held against, and from texts to a file."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import ROOT
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

import quantize
from calibration import distill
from calibration import texts as calibrate
from calibration.distill import LatentInt4, latent_copy
from calibration.gptq import Buffers
from checkpoint import Checkpoint
from layers.basic import Linear
from load import load_model
from quant.linear import dequantize_int4, pack_int4, round_int4, unpack_nibbles
from weights.hf import model_args

SEED = 7
STEPS, TEXTS, LENGTH = 24, 4, 48  # texts of a step, tokens of a text
OTHER = ROOT / "benchmarks" / "texts" / "lookup.jsonl"  # a file that seldom changes
TEXT = "Once there was a dog. It ran home to its mom. The cat sat on a big red mat and was happy. "


@pytest.fixture(params=["demo", "demo-opt"])
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = shutil.copytree(ROOT / "checkpoints" / request.param, tmp_path / request.param)
    (tmp_path / "text.txt").write_text(OTHER.read_text() + TEXT * 60)
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few texts to a step, and rounding in GPTQ's place: it leaves more to gain and takes no time.

    What GPTQ leaves of a demo model's error is regained in 250 steps, not in 24.
    """
    monkeypatch.setattr(distill, "TOKENS_PER_STEP", TEXTS * LENGTH)
    monkeypatch.setattr(calibrate, "gptq_blocks", rounded_blocks)


def rounded_blocks(checkpoint: Checkpoint, *_: object) -> Iterator[tuple[str, Buffers]]:
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if module.startswith("layers.") and leaf == "weight" and "norm" not in module:
            yield module, round_int4(checkpoint.read(name, torch.float32), 128)


def run(folder: Path, steps: int = STEPS) -> int:
    options = ["--checkpoint_path", folder, "--mode", "int4-gptq", "--groupsize", 128]
    options += ["--calibration_file", folder.parent / "text.txt"]
    options += ["--calibration_seq_length", LENGTH, "--train_steps", steps, "--device", "cpu"]
    return quantize.main(quantize.parse_args([str(o) for o in options]))


def target(folder: Path) -> Path:
    return folder / "model_int4-gptq.g128.pth"


@pytest.mark.parametrize("K", [64, 172])  # 172: a short last group
@pytest.mark.parametrize("bias", [True, False])
def test_latents_begin_as_the_layer_and_move_by_the_gradient_of_what_they_stand_for(
    K: int, bias: bool
):
    torch.manual_seed(SEED)
    linear = Linear(K, 24, bias=bias).requires_grad_(False)
    given = round_int4(linear.weight, 32)
    moved = (unpack_nibbles(given["weight"]).float() + torch.randint(-1, 2, (24, 1))).clamp(0, 15)
    q, zeros = moved[:, :K], unpack_nibbles(given["zeros"])[:, : given["scales"].shape[1]]
    given = pack_int4(q, given["scales"], zeros, 32)  # as GPTQ may: not the nearest integers
    latent, x = LatentInt4(linear, given), torch.randn(3, 5, K)
    for name, buffer in latent.as_stored().items():
        assert torch.equal(buffer, given[name])

    weight = dequantize_int4(**given)[:, :K].requires_grad_()
    expected = F.linear(x, weight, linear.bias)
    torch.testing.assert_close(latent(x), expected, rtol=0, atol=1e-6)
    expected.square().sum().backward()
    latent(x).square().sum().backward()
    scales = given["scales"].float().repeat_interleave(32, 1)[:, :K]
    gradient = latent.latent.grad.flatten(1)
    torch.testing.assert_close(gradient[:, :K], weight.grad * scales, rtol=1e-4, atol=1e-5)
    assert not gradient[:, K:].any()


def test_a_latent_crosses_to_the_next_integer_and_stays_within_four_bits():
    linear = Linear(32, 1, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.linspace(-1, 1, 32))
    latent = LatentInt4(linear, round_int4(linear.weight, 32))
    before = latent.integers().flatten()
    with torch.no_grad():
        latent.latent += 3
    now = latent.integers().flatten()
    assert torch.equal(now, (before + 3).clamp(0, 15)) and now.max() == 15 > before.max()
    assert torch.equal(unpack_nibbles(latent.as_stored()["weight"])[0], now.byte())


def test_the_divergence_is_that_of_the_two_models_as_transformers_runs_them(demo: Path):
    """The student's rounded weights are put into transformers' model too, where they are ours."""
    torch.manual_seed(SEED)
    lm = load_model(demo, device="cpu", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    tokens = torch.randint(0, lm.model.args.vocab_size, (3, 40))
    blocks = {
        f"layers.{n}.feed_forward.w2": round_int4(layer.feed_forward.w2.weight, 32)
        for n, layer in enumerate(lm.model.layers)
    }
    student, _ = latent_copy(lm.model, blocks)
    said = distill.mean_divergence(lm.model, student, tokens)
    with torch.no_grad():
        dense = Categorical(logits=theirs(tokens).logits.double())
        for name, module in theirs.named_modules():
            if name.endswith(("down_proj", "fc2")):
                n = next(int(part) for part in name.split(".") if part.isdigit())
                module.weight.copy_(
                    dequantize_int4(**blocks[f"layers.{n}.feed_forward.w2"])[
                        :, : module.in_features
                    ]
                )
        rounded = Categorical(logits=theirs(tokens).logits.double())
    expected = kl_divergence(dense, rounded).mean().item()
    assert expected > 1e-5
    assert said == pytest.approx(expected, rel=1e-3)


def held_out_divergence(folder: Path, file: Path) -> float:
    """From the dense model, on the texts that training leaves out, by what the files hold."""
    dense, int4 = (load_model(f, device="cpu", dtype=torch.float32) for f in (folder, file))
    text = (folder.parent / "text.txt").read_text()
    tokens = calibrate.calibration_tokens(Checkpoint(folder), text, LENGTH, STEPS * TEXTS)
    return distill.mean_divergence(dense.model, int4.model, tokens[::8])


def integers(file: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(file)
    return {n: checkpoint.read(n) for n in checkpoint.tensors if checkpoint.tensors[n].shape}


def test_training_brings_the_file_nearer_to_the_dense_model_by_its_integers_alone(
    demo: Path, capsys: pytest.CaptureFixture
):
    assert run(demo, steps=0) == 0
    assert "trained" not in capsys.readouterr().err
    untrained, before = integers(target(demo)), held_out_divergence(demo, target(demo))
    assert run(demo) == 0
    said = capsys.readouterr().err
    assert "kept" not in said
    start, now = (float(said.split(words)[1].split()[0]) for words in ("trained: ", "now "))
    assert now < 0.9 * start
    # The files' int8 heads, which training does not see, are the difference.
    assert start == pytest.approx(before, rel=0.05)
    assert now == pytest.approx(held_out_divergence(demo, target(demo)), rel=0.05)
    trained = integers(target(demo))
    changed = {name for name in trained if not torch.equal(trained[name], untrained[name])}
    assert changed and all(n.startswith("layers.") and n.endswith(".weight") for n in changed)
    assert all(trained[name].dtype == torch.uint8 for name in changed)


def test_training_that_broke_off_is_taken_up_and_ends_the_same(demo: Path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "STEPS_PER_SAVE", 2)
    # So that five steps change integers, and that these are kept although they do harm.
    monkeypatch.setattr(distill, "LEARNING_RATE", 0.03)
    falling = itertools.count(0, -1)
    monkeypatch.setattr(distill, "mean_divergence", lambda *_: next(falling))
    assert run(demo, 5) == 0
    assert "kept" not in capsys.readouterr().err
    whole = target(demo).read_bytes()
    target(demo).unlink()
    original, calls = distill.divergence, []

    def breaks_off(*models_and_tokens: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return original(*models_and_tokens)

    monkeypatch.setattr(distill, "divergence", breaks_off)
    assert run(demo, 5) == 130
    assert not target(demo).exists() and not list(demo.glob("*.tmp"))
    capsys.readouterr()
    calls.clear()
    calls.extend([True] * 5)  # never breaks off
    assert run(demo, 5) == 0
    assert sum(calls) - 5 == 5 - 2  # steps 0 and 1 are not repeated
    assert "continuing the interrupted run in" in capsys.readouterr().err
    assert target(demo).read_bytes() == whole


def test_where_training_does_harm_the_integers_of_gptq_are_kept(demo: Path, monkeypatch, capsys):
    assert run(demo, steps=0) == 0
    untrained = target(demo).read_bytes()
    monkeypatch.setattr(distill, "LEARNING_RATE", 5.0)
    capsys.readouterr()
    assert run(demo, 3) == 0
    assert "GPTQ's integers are kept" in capsys.readouterr().err
    assert target(demo).read_bytes() == untrained


def test_one_text_is_enough(demo: Path):
    text = (demo.parent / "text.txt").read_text()
    tokenizer = load_model(demo, device="cpu").tokenizer
    (demo.parent / "text.txt").write_text(tokenizer.decode(tokenizer.encode(text)[1:150]))
    assert run(demo, 1) == 0


def test_small_models_are_trained_unless_told_otherwise():
    small = Checkpoint(ROOT / "checkpoints" / "demo")
    assert calibrate.default_train_steps(small) == calibrate.TRAIN_STEPS
    config = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22}
    config |= {"num_attention_heads": 32, "intermediate_size": 5632, "vocab_size": 32000}
    small.args = model_args(config)
    assert calibrate.default_train_steps(small) == 0


def test_training_that_does_not_fit_is_refused_before_it_begins(demo: Path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "check_memory", refuse)
    monkeypatch.setattr(calibrate, "gptq_blocks", None)
    assert run(demo) == 2
    assert "--train_steps 0 leaves it out" in capsys.readouterr().err


def refuse(needed: int, device: torch.device, what: str, remedy: str) -> None:
    if what == "training":
        assert needed > 20 * 2 * 10**6
        raise MemoryError(f"{what} does not fit: {remedy}")


@pytest.mark.parametrize(("mode", "steps"), [("int4", "3"), ("int4-gptq", "-1")])
def test_steps_that_make_no_sense_are_refused(mode: str, steps: str, capsys: pytest.CaptureFixture):
    options = ["--mode", mode, "--calibration_file", "y", "--train_steps", steps]
    with pytest.raises(SystemExit):
        quantize.parse_args(["--checkpoint_path", "x", *options])
    assert "--train_steps is 0 or more" in capsys.readouterr().err

"""GPTQ against float64, against a worked example, and from texts to a file."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from common import ROOT
from torch import Tensor

import quantize
from calibration import gptq
from calibration.gptq import CalibratedBlock, best_of, refine, row_errors
from checkpoint import Checkpoint
from quant.linear import choose_int4_grid, dequantize_int4, round_int4, unpack_nibbles

SEED = 5


def correlated(K: int, rows: int = 400) -> Tensor:
    """A Hessian of inputs that hang together, as real ones do: (K, K)."""
    torch.manual_seed(SEED)
    X = torch.randn(rows, K) @ (torch.eye(K) + 0.4 * torch.randn(K, K))
    return X.t() @ X


def solve_in_float64(W: Tensor, H: Tensor, groupsize: int) -> Tensor:
    """Optimal brain quantisation as its definition has it: round a column, then solve anew, from
    scratch, for what the columns that are left should be. No Cholesky form, no blocks."""
    dense, W = W.double(), W.double().clone()
    scales, zeros = (t.double() for t in choose_int4_grid(W, groupsize))
    H = H.double() + gptq.DAMPING * H.double().diagonal().mean() * torch.eye(len(H))
    order = H.diagonal().argsort(descending=True).tolist()
    for n, column in enumerate(order):
        scale, zero = scales[:, column // groupsize], zeros[:, column // groupsize]
        q = (W[:, column] / scale + zero).round().clamp(0, 15)
        W[:, column] = (q - zero) * scale
        fixed, free = order[: n + 1], order[n + 1 :]
        # argmin over the free columns of (W - dense) H (W - dense)'
        pull = (W[:, fixed] - dense[:, fixed]) @ H[fixed][:, free]
        W[:, free] = dense[:, free] - torch.linalg.solve(H[free][:, free], pull.t()).t()
    return W


def test_a_worked_example():
    """Two inputs, always the same: H = [[2, 2], [2, 2]] and damping 0.02. Both weights are 0.3 on
    a grid of whole numbers. The first goes to 0; the second should then be 0.3 + 0.3 * 2 / 2.02 =
    0.597 and goes to 1. Rounding leaves an error of 0.6^2 * 2, this one of 0.4^2 * 2."""
    W, H = torch.tensor([[0.3, 0.3]]), torch.full((2, 2), 2.0)
    W = torch.cat((W, torch.tensor([[0.0, 15.0]])), 1)  # spans the grid: 0 to 15, steps of 1
    H = torch.block_diag(H, torch.eye(2) * 2)
    found = dequantize_int4(**gptq.gptq(W, H, 32, act_order=False))[0, :4]
    assert found.tolist() == [0.0, 1.0, 0.0, 15.0]
    errors = [row_errors(b, W, H).item() for b in (gptq.gptq(W, H, 32), round_int4(W, 32))]
    assert errors == pytest.approx([0.32, 0.72], abs=1e-5)


@pytest.mark.parametrize("K", [64, 200])  # 200: more than one block of columns, a short last group
def test_every_column_is_what_a_solver_in_float64_says(K: int):
    H = correlated(K)
    W = torch.randn(6, K)
    found = dequantize_int4(**gptq.gptq(W, H, 32))[:, :K]
    differs = (found - solve_in_float64(W, H, 32)).abs() > 1e-3
    assert differs.any(1).sum() <= 1  # a near tie may fall either way, and moves all that follows


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("groupsize", [32, 128])
def test_the_output_error_is_far_below_that_of_rounding(groupsize: int, act_order: bool):
    H = correlated(200)
    W = torch.randn(24, 200)
    rounded = round_int4(W, groupsize)
    found = gptq.gptq(W, H, groupsize, act_order)
    refined = refine(found, W, H, groupsize)
    errors = [row_errors(b, W, H).sum().item() for b in (rounded, found, refined)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < errors[1]
    best = best_of([rounded, found, refined], W, H)
    rows = torch.stack([row_errors(b, W, H) for b in (rounded, found, refined)])
    torch.testing.assert_close(row_errors(best, W, H), rows.amin(0))


def test_inputs_that_never_occur_or_hang_together_entirely_do_no_harm():
    H = correlated(64)
    H[5] = H[:, 5] = 0
    H[7], H[:, 7] = H[6].clone(), H[:, 6].clone()
    H[7, 7] = H[6, 6]
    W = torch.randn(8, 64)
    for buffers in (gptq.gptq(W, H, 32), refine(round_int4(W, 32), W, H, 32)):
        assert row_errors(buffers, W, H).isfinite().all()


@pytest.fixture(scope="module", params=["demo", "demo-opt"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / request.param
    shutil.copytree(ROOT / "checkpoints" / request.param, folder)
    text = (
        ROOT / "benchmarks" / "texts" / "lookup.jsonl"
    ).read_text() + "Once there was a dog. It ran home to its mom. " * 150
    (folder.parent / "text.txt").write_text(text)
    return folder


def target(folder: Path) -> Path:
    return folder / "model_int4-gptq.g128.pth"


def run(folder: Path) -> tuple[int, str]:
    """Returns the exit status and what was said."""
    options = ["--checkpoint_path", folder, "--mode", "int4-gptq", "--groupsize", 128]
    options += ["--calibration_file", folder.parent / "text.txt", "--calibration_seq_length", 96]
    # A full batch of texts and one that is not.
    options += ["--calibration_samples", gptq.TEXTS_PER_BATCH + 4, "--train_steps", 0]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = quantize.main(quantize.parse_args([str(o) for o in [*options, "--device", "cpu"]]))
    return code, said.getvalue()


@pytest.fixture(scope="module")
def whole(demo: Path) -> tuple[Path, str]:
    """The file of a run without a break, and what it said. Another run's files lay in its way."""
    work = demo / "model_int4-gptq.g128.pth.partial"
    work.mkdir()
    (work / "identity.json").write_text(json.dumps(["another"]))
    torch.save((4, *torch.zeros(2, 1, 1, 1)), work / "state.pt")  # four finished blocks
    code, said = run(demo)
    assert code == 0
    file = target(demo).rename(demo.parent / "whole.pth")  # the next run begins anew
    return file, said


def test_each_linear_is_better_than_rounded_and_the_next_sees_it(
    demo: Path, whole: tuple[Path, str]
):
    source, file = Checkpoint(demo / "model.safetensors"), Checkpoint(whole[0])
    said = [line for line in whole[1].splitlines() if ": error " in line]
    per_block = sum(
        "layers.0." in name and ".weight" in name and "norm" not in name for name in source.tensors
    )
    assert len(said) == per_block * source.args.n_layers
    for line in said:
        error, rounding = (
            float(line.split(word)[1].split(",")[0]) for word in ("error ", "rounding ")
        )
        assert error < rounding
    assert file.scheme["mode"] == "int4-gptq"
    assert not (demo / "model_int4-gptq.g128.pth.partial").exists()
    name = "layers.0.attention.wqkv"
    buffers = {leaf: file.read(f"{name}.{leaf}") for leaf in ("weight", "scales", "zeros")}
    rounded = round_int4(source.read(f"{name}.weight", torch.float32), 128)
    assert not torch.equal(unpack_nibbles(buffers["weight"]), unpack_nibbles(rounded["weight"]))


def test_a_run_that_broke_off_is_taken_up_and_ends_the_same(
    demo: Path, whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    original = CalibratedBlock.outputs
    calls = []

    def breaks_off(block: CalibratedBlock) -> tuple[Tensor, Tensor]:
        calls.append(block)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(block)

    monkeypatch.setattr(CalibratedBlock, "outputs", breaks_off)
    assert run(demo)[0] == 130
    assert not target(demo).exists() and not list(demo.glob("*.tmp"))
    monkeypatch.setattr(CalibratedBlock, "outputs", original)
    code, said = run(demo)
    assert code == 0
    assert "continuing the interrupted run in" in said
    assert "layers.0." not in said and "layers.2." in said
    assert target(demo).read_bytes() == whole[0].read_bytes()


def test_what_another_run_left_is_not_taken_up(whole: tuple[Path, str]):
    assert "continuing the interrupted run in" not in whole[1]
    assert "layers.0." in whole[1]

"""Dense products of few rows on a CPU with AMX: against exact sums, and against themselves."""

import fcntl
from pathlib import Path

import pytest
import torch

import cpu_products
from cpu_products import FewRowsLinear
from load import random_model
from model import Linear

CONFIG = Path(__file__).resolve().parent.parent / "checkpoints" / "demo" / "config.json"

pytestmark = pytest.mark.skipif(
    (cpu_products.hindrance("dense", torch.bfloat16) or cpu_products.build()) is not None,
    reason=f"no fast dense products here: {cpu_products.hindrance('dense', torch.bfloat16)}",
)


def test_a_build_that_was_killed_stops_no_other(tmp_path: Path):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "lock").touch()  # which torch would wait for
    with cpu_products.alone_in(folder):
        assert not (folder / "lock").exists()
        with (folder / "building").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with cpu_products.alone_in(folder):
        pass


def linear(K: int, N: int, bias: bool) -> Linear:
    generator = torch.Generator().manual_seed(K + N)
    made = Linear(K, N, bias=bias).bfloat16().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def rows(M: int, K: int) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K, N", [(32, 32), (96, 160), (2048, 64), (100, 64), (64, 40)])
def test_products_are_exact_to_one_rounding(K: int, N: int, bias: bool):
    """Float32 sums, rounded once, bias included: 100 and 40 are left to the library's product."""
    slow = linear(K, N, bias)
    fast = FewRowsLinear(slow)
    for M in (1, 2, 7, 15, 16, 17, 40):
        x = rows(M, K)
        exact = x.double() @ slow.weight.double().T + (slow.bias.double() if bias else 0)
        found = fast(x.view(M, 1, K)).view(M, N)
        assert (found != exact.bfloat16()).float().mean() < 0.02
        assert (found.double() - exact).abs().max() <= exact.abs().max() / 128


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it():
    fast, x = FewRowsLinear(linear(2048, 256, False)), rows(16, 2048)
    alone = torch.cat([fast(row) for row in x.split(1)])
    for M in (2, 5, 16):
        assert torch.equal(fast(x[:M]), alone[:M])


def test_a_strided_input_is_read_as_it_is():
    fast, x = FewRowsLinear(linear(64, 64, True)), rows(4, 128)
    assert torch.equal(fast(x[:, ::2]), fast(x[:, ::2].contiguous()))


def test_a_large_model_gets_them_and_a_small_one_does_not(monkeypatch: pytest.MonkeyPatch):
    def kinds() -> set[type]:
        lm = random_model(CONFIG, device="cpu", dtype=torch.bfloat16)
        return {type(m) for m in lm.model.modules() if isinstance(m, (Linear, FewRowsLinear))}

    assert kinds() == {Linear}
    monkeypatch.setattr(cpu_products, "WORTH", 0)
    assert kinds() == {FewRowsLinear}

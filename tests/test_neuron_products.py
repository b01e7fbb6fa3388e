"""The feed-forward product of records, by kernels/cpu/neurons.h and by torch, against float64."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import supported_sets
from neurons import costs
from neurons.products import Products, gather_records, has_kernel
from neurons.records import GATED_MATRICES, KINDS, PLAIN_MATRICES, RecordFormat

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("two_threads")
NEURONS = 70  # of the layer; entries hold most of them, in random order


def layer(kind: str, matrices: tuple[str, ...], dim: int) -> tuple[Products, Tensor, np.ndarray]:
    """A layer's products, records, and the neuron of each; every seventh entry is empty."""
    generator = torch.Generator().manual_seed(dim)
    format = RecordFormat(matrices, dim, kind, torch.bfloat16, groupsize=32)
    shapes = {m: (dim, NEURONS) if m == "down" else (NEURONS, dim) for m in matrices}
    weights = {m: torch.randn(shape, generator=generator) for m, shape in shapes.items()}
    records, scales = format.pack({m: w.bfloat16().float() for m, w in weights.items()})
    order = torch.randperm(NEURONS, generator=generator)
    neurons = order.numpy().copy()
    neurons[::7] = NEURONS
    bias = torch.randn(NEURONS + 1, len(matrices) - 1, generator=generator).bfloat16()
    bias[-1] = torch.tensor([-torch.inf, 0])[: len(matrices) - 1]
    inner = F.pad(scales["inner_scales"], (0, 0, 0, 1)) if kind == "int8" else None
    kernel = has_kernel(format, CPU, torch.bfloat16)
    return Products(format, bias, inner, kernel), records[order], neurons


def exact(
    products: Products, x: Tensor, records: Tensor, neurons: np.ndarray
) -> tuple[Tensor, int]:
    """In float64, neuron by neuron."""
    format, y, active = products.format, torch.zeros(x.shape, dtype=torch.float64), 0
    rows = {m: format.rows(records, m, torch.float32).double() for m in format.matrices}
    for entry, neuron in enumerate(neurons):
        if neuron == NEURONS:
            continue
        parts = []
        for n, matrix in enumerate(format.matrices[:-1]):
            scale = 1 if products.scales is None else products.scales[neuron, n].double()
            parts.append(x.double() @ rows[matrix][entry] * scale + products.bias[neuron, n])
        h = parts[0].clamp_min(0) * (parts[1] if len(parts) == 2 else 1)
        active += bool((h != 0).any())
        y += h[:, None] * rows["down"][entry]
    return y, active


@pytest.mark.parametrize("matrices", [GATED_MATRICES, PLAIN_MATRICES], ids=len)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [32, 96, 1152])
def test_sums_are_those_of_float64(kind: str, matrices: tuple[str, ...], dim: int):
    products, records, neurons = layer(kind, matrices, dim)
    if not products.kernel:
        pytest.skip("this CPU has no products for records")
    some = np.arange(NEURONS)[::-3].copy()
    for N, entries in itertools.product((1, 3, 4, 9), (None, some)):
        x = torch.randn(N, dim, generator=torch.Generator().manual_seed(N)).bfloat16()
        chosen = np.arange(NEURONS) if entries is None else entries
        wanted, active = exact(products, x, records[chosen], neurons[chosen])
        found, counted = products.sums(x, records, neurons, entries)
        assert counted == active
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert torch.equal(found, products.sums(x, records, neurons, entries)[0])


@pytest.mark.parametrize("matrices", [GATED_MATRICES, PLAIN_MATRICES], ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_and_the_kernel_agree(kind: str, matrices: tuple[str, ...]):
    """torch rounds to bfloat16 between its products."""
    quick, records, neurons = layer(kind, matrices, 96)
    slow = Products(quick.format, quick.bias, quick.scales, kernel=False)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    some = np.arange(0, NEURONS, 2)
    for entries in (None, some):
        chosen = np.arange(NEURONS) if entries is None else entries
        wanted, _ = exact(slow, x, records[chosen], neurons[chosen])
        for products in (slow, quick):
            found, _ = products.sums(x, records, neurons, entries)
            assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_which_records_the_kernel_computes(monkeypatch: pytest.MonkeyPatch):
    """As on a CPU with bfloat16 products, whether or not this one has them."""
    unsupported_reason = {torch.bfloat16: None, torch.float32: "not in bfloat16"}
    monkeypatch.setattr("neurons.products.unsupported_reason", unsupported_reason.__getitem__)
    monkeypatch.setattr("neurons.products.build", lambda: None)
    monkeypatch.setattr("neurons.products.layout", lambda: SimpleNamespace(chunk=32))
    supported = RecordFormat(PLAIN_MATRICES, 64, "dense", torch.bfloat16)
    odd = RecordFormat(PLAIN_MATRICES, 40, "dense", torch.bfloat16)
    other = RecordFormat(PLAIN_MATRICES, 64, "dense", torch.float32)
    assert has_kernel(supported, CPU, torch.bfloat16)
    assert not has_kernel(supported, CPU, torch.float32)
    assert not has_kernel(supported, torch.device("meta"), torch.bfloat16)
    assert not has_kernel(odd, CPU, torch.bfloat16)
    assert not has_kernel(other, CPU, torch.bfloat16)
    assert not has_kernel(other, CPU, torch.float32)
    monkeypatch.setattr("neurons.products.build", lambda: "it did not compile")
    assert not has_kernel(supported, CPU, torch.bfloat16)


def test_costs_are_measured_for_each_instruction_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    keys, saved = [], {"reads": {"1": [0, 0, 0]}, "stream_byte": 0, "record": 0}
    monkeypatch.setattr(costs, "has_kernel", lambda *given: True)
    monkeypatch.setattr(costs, "load_measurement", lambda name, key: keys.append(key) or saved)
    file = tmp_path / "neurons"
    file.touch()
    format = RecordFormat(PLAIN_MATRICES, 64, "dense", torch.bfloat16)
    pack = SimpleNamespace(format=format, neurons_path=file)
    for chosen in ("", "scalar", ""):
        monkeypatch.setenv("GPT_FLEX_ISA", chosen)
        costs.machine_costs(pack, [1], CPU, torch.bfloat16)
    assert keys[0] == keys[2]
    assert keys[0] != keys[1] or supported_sets() == ["scalar"]


def test_gather_records():
    records = torch.arange(4 * 512).remainder(251).to(torch.uint8).view(4, 512)
    assert torch.equal(gather_records(records, torch.tensor([2, 0])), records[[2, 0]])

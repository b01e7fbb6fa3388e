"""What may be drawn, against transformers' logits processors; and the draw, against arithmetic."""

import itertools

import pytest
import torch
from torch import Tensor

from sampling import GenerationConfig, Sampler, distribution, draw

VOCAB = 97
FILTERS = list(
    itertools.product((0.5, 1.0, 1.7), (0, 1, 5, 200), (0.3, 0.9, 1.0), (0.0, 0.05, 0.5))
)


def logits(seed: int = 0, rows: int = 5) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", FILTERS)
def test_distribution_is_that_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
):
    processors = pytest.importorskip("transformers.generation.logits_process")
    wanted = processors.TemperatureLogitsWarper(temperature)(None, logits())
    if top_k:
        wanted = processors.TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = processors.TopPLogitsWarper(top_p)(None, wanted)
    if min_p:
        wanted = processors.MinPLogitsWarper(min_p)(None, wanted)
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(distribution(logits(), config), wanted.softmax(-1))


def test_temperature_0_is_the_likeliest_token():
    config = GenerationConfig(temperature=0)
    found = distribution(logits(), config)
    assert found.sum() == len(found)
    assert (found.argmax(-1) == logits().argmax(-1)).all()
    sampler = Sampler(config, range(5), torch.device("cpu"))
    assert (sampler(logits(), 0) == logits().argmax(-1)).all()


def test_a_draw_worked_by_hand():
    """Summed, [0.1, 0, 0.4, 0.5] is [0.1, 0.1, 0.5, 1]. u = 0.95 asks where the sum reaches
    1 - u = 0.05: token 0. u = 0.7 asks for 0.3: token 2. u = 0 asks for 1: token 3."""
    probabilities = torch.tensor([0.1, 0.0, 0.4, 0.5]).expand(3, 4)
    assert draw(probabilities, torch.tensor([0.95, 0.7, 0.0])).tolist() == [0, 2, 3]


def test_what_has_no_probability_is_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    uniforms = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    drawn = draw(probabilities.expand(4, 5), uniforms)
    assert set(drawn.tolist()) == {1, 3}
    flat = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert draw(flat / flat.sum(), torch.tensor(0.0)) < len(flat)


def test_draws_follow_the_probabilities():
    """Chi-square over 20,000 draws: the 99.9 % point for 9 degrees of freedom is 27.9."""
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(10, generator=generator)
    probabilities /= probabilities.sum()
    count = 20_000
    drawn = draw(probabilities.expand(count, 10), torch.rand(count, generator=generator))
    expected = count * probabilities
    observed = torch.bincount(drawn, minlength=10)
    assert ((observed - expected) ** 2 / expected).sum() < 27.9


def test_a_row_has_a_random_stream_of_its_own():
    config = GenerationConfig(max_new_tokens=8, seed=5)
    device = torch.device("cpu")
    batch = Sampler(config, [3, 0, 7], device).uniforms
    assert (batch[2] == Sampler(config, [7], device).uniforms[0]).all()
    other_seed = Sampler(GenerationConfig(max_new_tokens=8, seed=6), [3, 0, 7], device).uniforms
    assert len({tuple(row) for row in torch.cat((batch, other_seed)).tolist()}) == 6


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("stop", ("",)),
        ("seed", -1),
        ("temperature", float("nan")),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object):
    with pytest.raises(ValueError, match=f"{field} is .* and must be"):
        GenerationConfig(**{field: value})

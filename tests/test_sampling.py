"""What may be drawn, against transformers' logits processors; and the draw, against arithmetic."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sampling import NOT_FINITE, Sampler, candidates, draw, exponentials
from text.generation_config import VALIDATORS, GenerationConfig

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
    torch.testing.assert_close(dense(*candidates(logits(), config)[:2]), wanted.softmax(-1))


def dense(ids: Tensor, probabilities: Tensor) -> Tensor:
    """(B, K), (B, K) -> (B, VOCAB)"""
    return torch.zeros(len(ids), VOCAB).scatter_(-1, ids, probabilities)


def test_temperature_0_is_the_likeliest_token():
    config = GenerationConfig(temperature=0)
    ids, probabilities, _ = candidates(logits(), config)
    assert (ids[:, 0] == logits().argmax(-1)).all() and (probabilities == 1).all()
    sampler = Sampler(config, range(5), torch.device("cpu"))
    numbers = torch.zeros(5, 1, dtype=torch.long)
    assert (sampler(logits().unsqueeze(1), numbers)[:, 0] == logits().argmax(-1)).all()


def splitmix64(state: int) -> int:
    """The published algorithm, in Python's integers: the number after a state."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_noise_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # Vigna's first number of seed 0
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    ids = torch.tensor([0, 1, 2, 77, 128255])
    found = exponentials(keys.unsqueeze(1), ids.expand(6, -1))
    for key, row in zip(keys.tolist(), found, strict=True):
        for i, time in zip(ids.tolist(), row.tolist(), strict=True):
            number = splitmix64((key + i * 0x9E3779B97F4A7C15) % 2**64)
            wanted = -math.log1p(-(number % 2**63) / 2**63)
            assert time == pytest.approx(wanted, rel=1e-4)


def test_noise_is_exponential_and_independent():
    """Of 200,000 arrival times: mean and deviation are 1, neighbours do not correlate."""
    keys = torch.arange(400).unsqueeze(1) * 7919
    times = exponentials(keys, torch.arange(500).expand(400, -1)).double()
    assert times.min() > 0 and times.isfinite().all()
    assert abs(times.mean() - 1) < 0.01 and abs(times.std() - 1) < 0.02
    for a, b in ((times[:, 1:], times[:, :-1]), (times[1:], times[:-1])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.01


def test_the_race_worked_by_hand():
    """Whose time over its probability is least wins; one that has no probability never arrives."""
    ids, key = torch.tensor([4, 9, 2]), torch.tensor(5)
    times = exponentials(key, ids)
    for probabilities in ([0.2, 0.3, 0.5], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0]):
        arrivals = [t / p if p else math.inf for t, p in zip(times, probabilities, strict=True)]
        winner = ids[arrivals.index(min(arrivals))]
        assert draw(ids, torch.tensor(probabilities), key) == winner


def test_what_has_no_probability_is_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).expand(5000, 5)
    drawn = draw(torch.arange(5).expand(5000, 5), probabilities, torch.arange(5000))
    assert set(drawn.tolist()) == {1, 3}


def test_draws_follow_the_probabilities():
    """Chi-square over 20,000 draws: the 99.9 % point for 9 degrees of freedom is 27.9."""
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(10, generator=generator)
    probabilities /= probabilities.sum()
    count = 20_000
    keys = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    ids = torch.arange(10).expand(count, 10)
    drawn = draw(ids, probabilities.expand(count, 10), keys)
    expected = count * probabilities
    observed = torch.bincount(drawn, minlength=10)
    assert ((observed - expected) ** 2 / expected).sum() < 27.9


def test_two_models_draw_alike_by_the_same_noise():
    """As often as (1 - d) / (1 + d) at least, for d their total variation (arXiv 2408.07978)."""
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(50, generator=generator).mul(2).softmax(-1)
    q = (p.log() + 0.4 * torch.randn(50, generator=generator)).softmax(-1)
    count, ids = 20_000, torch.arange(50)
    keys = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    a, b = (draw(ids.expand(count, 50), x.expand(count, 50), keys) for x in (p, q))
    distance = (p - q).abs().sum() / 2
    alike = (a == b).float().mean()
    assert (1 - distance) / (1 + distance) - 0.01 < alike < 1 - distance + 0.01


def test_a_row_has_a_random_stream_of_its_own():
    config = GenerationConfig(max_new_tokens=8, seed=5)
    device = torch.device("cpu")
    batch = Sampler(config, [3, 0, 7], device).keys
    assert (batch[2] == Sampler(config, [7], device).keys[0]).all()
    other_seed = Sampler(GenerationConfig(max_new_tokens=8, seed=6), [3, 0, 7], device).keys
    assert len({tuple(row) for row in torch.cat((batch, other_seed)).tolist()}) == 6


def test_tokens_drawn_together_are_those_drawn_one_by_one():
    config = GenerationConfig(max_new_tokens=6, top_k=9, seed=5)
    sampler = Sampler(config, [3, 0], torch.device("cpu"))
    given = logits(1, 12).view(2, 6, VOCAB)
    numbers = torch.arange(6).expand(2, -1)
    single = [sampler(given[:, n : n + 1], numbers[:, n : n + 1]) for n in range(6)]
    together = sampler(given, numbers)
    assert (together == torch.cat(single, dim=1)).all()
    assert (sampler(given[:, 5:], numbers[:, 5:] + 7) == together[:, 5:]).all()  # beyond the last


def test_a_stream_of_fewer_numbers_is_the_beginning_of_a_longer_one():
    """So that no more need be drawn than the context can hold, whatever limit is asked for."""
    for seed in (0, 5, 2**64, 2**100):
        configs = (GenerationConfig(max_new_tokens=n, seed=seed) for n in (7, 200))
        short, long = (Sampler(config, [3, 0], torch.device("cpu")).keys for config in configs)
        assert (long[:, :7] == short).all()


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 5e-324, 1e-20, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_temperature_near_0_is_0(temperature: float, scale: float):
    config = GenerationConfig(temperature=temperature, top_k=0)
    sampler, numbers = Sampler(config, range(5), torch.device("cpu")), torch.zeros(5, 1).long()
    given = (logits() * scale).unsqueeze(1)
    assert (sampler(given, numbers) == given.argmax(-1)).all()


@pytest.mark.parametrize("filters", [{"top_k": 0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.9}])
def test_large_logits_over_a_low_temperature_stay_finite(filters: dict):
    config = GenerationConfig(temperature=1.1e-5, **filters)
    ids, probabilities, peaks = candidates(logits() * 1e35, config)
    assert probabilities.isfinite().all() and (peaks == (logits() * 1e35).amax(-1)).all()
    assert (ids.gather(1, probabilities.argmax(1, keepdim=True))[:, 0] == logits().argmax(1)).all()


@pytest.mark.parametrize("config", [{"temperature": 0}, {"top_k": 0}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_mark_their_row_alone(config: dict, value: float):
    sampler = Sampler(GenerationConfig(**config), range(5), torch.device("cpu"))
    given = logits().unsqueeze(1)
    given[2, 0, 40] = value
    tokens = sampler(given, torch.zeros(5, 1).long())
    assert ((tokens >= 0) & (tokens < VOCAB)).all()  # a step launched ahead may look them up
    ids = sampler.copy_to_host_async(tokens)()
    assert [row == [NOT_FINITE] for row in ids] == [False, False, True, False, False]


WRONG = {
    "max_new_tokens": (0, -1, "5", 5.0, True, None, [5], math.inf),
    "temperature": (-0.1, math.nan, math.inf, "hot", None, False, 1j, 10**400),
    "top_k": (-1, 2.5, "3", True),
    "top_p": (0.0, 1.1, math.nan, "1"),
    "min_p": (1.5, -0.1, math.nan),
    "repetition_penalty": (0, -1.0, math.nan, math.inf, "1.1"),
    "frequency_penalty": (math.nan, -math.inf, "0"),
    "presence_penalty": (math.nan, math.inf, None),
    "logit_bias": ({"5": 1.0}, {5: math.nan}, {-1: 0.5}, {5: "1"}, 7, [5, 6], {True: 1.0}),
    "stop": (("",), "", (5,), 5, None, ["a", ""], b"end"),
    "seed": (-1, 0.5, "0", None),
    "ignore_eos": (1, None, "yes"),
    "logprobs": (-1, 1001, True, 2.0, "5"),
}


@pytest.mark.parametrize("field, value", [(f, v) for f in WRONG for v in WRONG[f]], ids=str)
def test_a_value_of_a_wrong_type_or_range_is_named(field: str, value: object):
    with pytest.raises(ValueError, match=f"(?s)^{field} is .* and must be [^\\n]+$"):
        GenerationConfig(**{field: value})


def test_every_field_is_checked_and_its_default_is_right():
    fields = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    assert VALIDATORS.keys() == fields.keys() == WRONG.keys()
    assert dataclasses.asdict(GenerationConfig()) == fields


def test_values_are_given_as_people_write_them():
    config = GenerationConfig(
        max_new_tokens=np.int64(5), stop="The End", temperature=1, logit_bias={7: 1}, seed=2**70
    )
    assert config.stop == ("The End",) and config.logit_bias == ((7, 1.0),)
    assert GenerationConfig(stop=["a", "b"]).stop == ("a", "b")
    assert type(config.max_new_tokens) is int and type(config.temperature) is float
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.changes_logits and not GenerationConfig().changes_logits

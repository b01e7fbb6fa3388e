"""What is said of several devices, beside what gpt-fast has published of eight A100s."""

from dataclasses import replace

import pytest

from tiers.links import DEVICE_COUNTS, LINKS, Step, pipeline_seconds, table, tensor_parallel_seconds

# gpt-fast's README: tokens per second by devices, one text in bfloat16, A100s with NVLink.
PUBLISHED = {
    "7B": ((32, 4096, 11008, 4096, 32000), {2: 168.8, 4: 254.0, 8: 328.4}),
    "8B": ((32, 4096, 14336, 1024, 128256), {2: 149.1, 4: 217.2, 8: 276.0}),
    "70B": ((80, 8192, 28672, 1024, 32000), {2: 21.3, 4: 38.0, 8: 62.5}),
}
ALONE = {"7B": 104.9, "8B": 93.8}


def step(layers: int, dim: int, hidden: int, kv: int, vocab: int) -> Step:
    """Of a Llama, whose head gpt-fast leaves whole on every device."""
    layer = dim * (2 * dim + 2 * kv) + 3 * dim * hidden
    return Step(layers, 2 * layers * layer, 2 * vocab * dim, 2 * dim)


def read_rate(name: str) -> float:
    """Bytes per second of one device, as published; a 70B does not fit one: as the 7B's."""
    name = name if name in ALONE else "7B"
    one = step(*PUBLISHED[name][0])
    return (one.shared + one.whole) * ALONE[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_within_15_per_cent(name: str):
    shape, rates = PUBLISHED[name]
    for count, rate in rates.items():
        seconds = tensor_parallel_seconds(step(*shape), read_rate(name), LINKS["nvlink"], count)
        assert 1 / seconds == pytest.approx(rate, rel=0.15), (name, count)


def test_a_slower_link_is_slower_and_one_device_needs_none():
    some = step(*PUBLISHED["8B"][0])
    for count in DEVICE_COUNTS:
        seconds = [tensor_parallel_seconds(some, 1e12, link, count) for link in LINKS.values()]
        assert len(set(seconds)) == (1 if count == 1 else len(LINKS))
    assert tensor_parallel_seconds(some, 1e12, LINKS["pcie"], 8) > tensor_parallel_seconds(
        some, 1e12, LINKS["nvlink"], 8
    )


def test_a_pipeline_gains_by_micro_batches_and_not_for_one():
    some = replace(step(*PUBLISHED["8B"][0]), whole=0.0)
    alone, _ = pipeline_seconds(some, 1e12, LINKS["nvlink"], 1)
    latency, between = pipeline_seconds(some, 1e12, LINKS["nvlink"], 4)
    assert latency > alone and between == pytest.approx(alone / 4)


def test_no_more_stages_than_layers():
    staged = {count: rate for count, _, rate in table(Step(6, 1e9, 0, 100), 1e12, LINKS["pcie"])}
    assert [count for count, rate in staged.items() if rate] == [1, 2, 4]

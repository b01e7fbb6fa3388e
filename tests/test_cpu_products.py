"""The CPU's kernels in torch: packing against a slow one, products against exact sums.

More on the bits of products: test_instruction_sets.py.
"""

import copy
import fcntl
import itertools
import json
import math
import mmap
import os
import platform
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import load
from fast_layers import cpu as cpu_products
from fast_layers.cpu import CPUBlock, DenseLinear, PackedLinear
from host.memory import HugePages, page_aligned
from kernels.cpu import build
from layers.args import LayerType, ModelArgs, Rope
from layers.basic import Linear, OffsetRMSNorm, RMSNorm
from layers.kv_cache import attend_capped, sdpa_attention
from load import random_model
from model import SequentialBlock, Transformer
from quant.linear import (
    GROUP_SIZES,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    make_scheme,
    meta_model,
    round_int4,
    round_int8,
    scale_units,
    unpack_nibbles,
)
from tiers.policy import Policy, Share
from weights.hf import model_args
from weights.weight_files import read_json

CONFIG = Path(__file__).resolve().parent.parent / "checkpoints" / "demo" / "config.json"


unsupported_reason = build.unsupported_reason(torch.bfloat16) or build.build()
pytestmark = pytest.mark.usefixtures("two_threads")
needed = pytest.mark.skipif(
    unsupported_reason is not None, reason=f"no products: {unsupported_reason}"
)


def test_a_build_that_was_killed_stops_no_other(tmp_path: Path):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "lock").touch()  # which torch would wait for
    with build.locked(folder):
        assert not (folder / "lock").exists()
        with (folder / "building").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with build.locked(folder):
        pass


@needed
def test_copies_of_the_repository_share_a_compiled_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = tmp_path / "copy"
    shutil.copytree(build.FOLDER, copy)
    sources = sorted(copy.glob("*.cpp")), sorted(copy.glob("*.h"))
    name, own = build.instruction_set(), build.build_key(build.instruction_set())
    monkeypatch.setattr(build, "SOURCES", sources[0])
    monkeypatch.setattr(build, "HEADERS", sources[1])
    assert build.build_key(name) == own
    monkeypatch.setattr(build, "compile_and_load", lambda *_: pytest.fail("it compiles again"))
    build.load_library(build.cache_directory() / f"{build.LIBRARY}-{own:08x}", name)
    with (copy / "layout.h").open("a") as file:
        file.write("// changed")
    assert build.build_key(name) != own


def test_a_library_that_was_not_linked_to_its_end_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = []
    monkeypatch.setattr(build, "compile_and_load", lambda folder, name: compiled.append(name))
    (tmp_path / f"{build.LIBRARY}.so").write_bytes(b"half of it")
    build.load_library(tmp_path, "avx2")
    assert compiled == ["avx2"]


def test_a_damaged_library_is_compiled_again_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = []
    monkeypatch.setattr(build, "compile_and_load", lambda folder, name: compiled.append(name))
    (tmp_path / f"{build.LIBRARY}.so").write_bytes(b"half of it")
    (tmp_path / "complete").touch()
    with pytest.raises(OSError, match=build.LIBRARY):
        build.load_library(tmp_path, "avx2")
    build.load_library(tmp_path, "avx2")
    assert compiled == ["avx2"] and (tmp_path / "complete").exists()


def test_libraries_that_are_not_used_are_removed(tmp_path: Path):
    names = [f"{build.LIBRARY}-{n}" for n in ("own", "used", "unused", "broken")] + ["other"]
    own, used, unused, broken, other = folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
        (folder / "complete").touch()
    (broken / "complete").unlink()
    long_ago = time.time() - 61 * 24 * 3600
    for file in (own / "complete", unused / "complete", broken, other / "complete"):
        os.utime(file, (long_ago, long_ago))
    build.remove_unused(tmp_path, own)
    assert {f.name for f in tmp_path.iterdir()} == {own.name, used.name, other.name}


def test_what_hinders_products_is_named(monkeypatch: pytest.MonkeyPatch):
    """On any machine: another dtype, no compiler; or nothing."""
    monkeypatch.setenv("CXX", "sh")
    assert build.unsupported_reason(torch.bfloat16) is None
    assert build.unsupported_reason(torch.float16) is None
    assert "bfloat16 and float16, not float32" in build.unsupported_reason(torch.float32)
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    assert "install no-compiler-of-this-name" in build.unsupported_reason(torch.bfloat16)


def test_a_machine_without_a_compiler_keeps_the_layers_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO", "gpt_flex")  # as the commands do without --quiet
    monkeypatch.setenv("CXX", "no-compiler")
    model = torch.nn.ModuleList([filled(64, 32, None, True), filled(64, 32, 32, False)])
    model.append(linear(64, 32, True))
    cpu_products.use_fast_linears(model, torch.bfloat16, large=True)
    assert [type(m) for m in model] == [Int8Linear, Int4Linear, Linear]
    said = capsys.readouterr().err
    reason = "the fast products need a C++ compiler: install no-compiler"
    assert said == f"quantised layers run slowly here: {reason}\n"


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A process that has built nothing, on a CPU with AVX-512 and a compiler that is older. Returns
    the list of the instruction sets that it compiles."""
    script = tmp_path / "old-compiler"
    script.write_text("#!/bin/sh\n! echo $* | grep -q mavx512f\n")
    script.chmod(0o700)
    tried: list[str] = []
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(build, "load_library", lambda folder, name: tried.append(name))
    monkeypatch.setattr(build, "loaded", [])
    monkeypatch.setattr(build, "failures", [])
    monkeypatch.setattr(build, "supported_sets", lambda: ["avx512", "avx2", "scalar"])
    return tried


def test_an_instruction_set_that_the_compiler_does_not_know_gives_way_to_the_next(
    fresh_build: list[str],
):
    assert build.build() is build.build() is None
    assert (fresh_build, build.instruction_set()) == (["avx2"], "avx2")


def test_a_build_that_fails_is_not_repeated_for_another_instruction_set(
    fresh_build: list[str], monkeypatch: pytest.MonkeyPatch
):
    """As after Ctrl-C, or without ninja: the next would fail alike, or be slow without a word."""

    def load_library(folder: Path, name: str) -> None:
        fresh_build.append(name)
        raise RuntimeError("ninja was killed\nand more")

    monkeypatch.setattr(build, "load_library", load_library)
    assert build.build() == build.build() == "the fast products did not compile: ninja was killed"
    assert (fresh_build, build.instruction_set()) == (["avx2"], None)


def test_a_cpu_without_bmi2_does_not_get_avx2(monkeypatch: pytest.MonkeyPatch):
    """The compiler may use BMI2's instructions in all that it compiles for AVX2."""
    has = dict.fromkeys(("avx2", "fma3", "f16c"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("GPT_FLEX_ISA", raising=False)
    assert build.supported_sets() == ["scalar"]


def test_a_wrong_instruction_set_is_refused_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("GPT_FLEX_ISA", "sse9")
    monkeypatch.setenv("CXX", "sh")  # any program: the kernels need a compiler
    monkeypatch.setattr(load, "fill_model", lambda *given: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match="GPT_FLEX_ISA=sse9: this CPU can be held to"):
        random_model(CONFIG, scheme=make_scheme("int8"), device="cpu", dtype=torch.bfloat16)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU with AVX2 and a compiler, for which nothing is built: a list with an entry for each
    call of build, which returns the entry as the reason of a failure."""
    called: list[str] = []
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr(cpu_products, "supported_sets", lambda: ["avx2", "scalar"])
    monkeypatch.setattr(cpu_products, "build", lambda: called.append("not built") or "not built")
    return called


def builds_for(mode: str | None, dtype: torch.dtype, builds: list[str]) -> int:
    """How often build_while_loading calls build for the demo model."""
    model = meta_model(model_args(read_json(CONFIG)), mode and make_scheme(mode))
    before = threading.enumerate()  # pools of earlier tests among them, which do not end
    cpu_products.build_while_loading(model, dtype)
    for thread in threading.enumerate():
        if thread not in before:
            thread.join()
    return len(builds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_are_built_while_a_model_that_needs_them_loads(
    dtype: torch.dtype, builds: list[str], monkeypatch: pytest.MonkeyPatch
):
    assert builds_for(None, dtype, builds) == 0  # a small dense model
    assert builds_for("int8", torch.float32, builds) == 0
    assert builds_for("int8", dtype, builds) == 1
    monkeypatch.setattr(cpu_products, "MIN_DENSE_BYTES", 0)
    assert builds_for(None, torch.float32, builds) == 1
    assert builds_for(None, dtype, builds) == 2


def test_a_cpu_without_vectors_builds_nothing_for_dense_layers(
    builds: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu_products, "supported_sets", lambda: ["scalar"])
    monkeypatch.setattr(cpu_products, "MIN_DENSE_BYTES", 0)
    assert builds_for(None, torch.bfloat16, builds) == 0
    model = torch.nn.ModuleList([linear(64, 32, True)])
    assert not cpu_products.use_fast_linears(model, torch.bfloat16) and not builds
    assert builds_for("int8", torch.bfloat16, builds) == 1


def test_a_build_that_fails_is_said_for_dense_layers_too(
    builds: list[str], capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "gpt_flex")
    model = torch.nn.ModuleList([linear(64, 32, True)])
    assert not cpu_products.use_fast_linears(model, torch.bfloat16, large=True)
    assert capsys.readouterr().err == "dense layers run slowly here: not built\n"


def test_a_process_waits_for_the_compiler(builds: list[str], monkeypatch: pytest.MonkeyPatch):
    """Else the compiler goes on without its lock, and the next process starts a second one."""
    daemons = []
    monkeypatch.setattr(
        cpu_products, "build", lambda: daemons.append(threading.current_thread().daemon)
    )
    builds_for("int8", torch.bfloat16, builds)
    assert daemons == [False]


def filled(K: int, N: int, groupsize: int | None, bias: bool, seed: int = 0) -> QuantizedLinear:
    """groupsize None: int8. What is stored for inputs beyond K is random too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    weight *= torch.logspace(-6, 1, N).unsqueeze(1)  # rows whose scales float16 hardly has
    made = Int8Linear(K, N, bias) if groupsize is None else Int4Linear(K, N, bias, groupsize)
    rounded = round_int8(weight) if groupsize is None else round_int4(weight, groupsize)
    made.load_state_dict(rounded, strict=False)
    if groupsize:
        made.weight.random_(256, generator=generator)
        made.zeros.random_(256, generator=generator)  # the last may stand for no group
    if bias:
        made.bias.data = torch.randn(N, generator=generator).bfloat16()
    return made


def pad(x: Tensor, multiple: int) -> Tensor:
    """The last dimension, with zeros, to a multiple."""
    return F.pad(x, (0, -x.shape[-1] % multiple))


def pack_int8(linear: Int8Linear) -> tuple[Tensor, int]:
    """The bytes of the weights, (N/16, bytes), and their format, with operations of torch."""
    q = (linear.weight ^ -128).view(torch.uint8)  # + 128
    q = pad(pad(q, 128).t(), 16).t()  # (N', K')
    tiles = q.reshape(-1, 16, q.shape[1] // 4, 4).transpose(1, 2)  # (N'/16, K'/4, 16, 4)
    return with_scales(linear.scales, tiles), build.layout().int8


def pack_int4(linear: Int4Linear) -> tuple[Tensor, int]:
    """As pack_int8. Scales take a byte each, or two where they are no multiples of one."""
    q = pad(pad(unpack_nibbles(linear.weight), 256).t(), 16).t()  # (N', K')
    spans, groups = q.shape[1] // 256, 256 // linear.groupsize  # of a row, of a span
    q = q.reshape(-1, 16, spans, 256 // 8, 2, 4).permute(0, 2, 3, 4, 1, 5)
    tiles = (q[:, :, :, 0] | (q[:, :, :, 1] << 4)).flatten(2)  # (N'/16, K'/256, 32 * 16 * 4)

    def by_span(x: Tensor) -> Tensor:  # (N, P) -> (N'/16, K'/256, 256/S, 16)
        x = F.pad(x, (0, spans * groups - x.shape[1], 0, -len(x) % 16))
        return x.reshape(-1, 16, spans, groups).permute(0, 2, 3, 1).contiguous()

    units = scale_units(linear.scales)  # (N, 1)
    multiples = linear.scales.float() / units
    short = bool((multiples == multiples.byte()).all())
    scales, units = (multiples.byte(), units) if short else (linear.scales, torch.ones_like(units))
    zeros = by_span(unpack_nibbles(linear.zeros)[:, : linear.scales.shape[1]])
    zeros = zeros[..., 0::2] | (zeros[..., 1::2] << 4)
    header = torch.cat((by_span(scales).view(torch.uint8).flatten(2), zeros.flatten(2)), 2)
    packed = with_scales(units.squeeze(1), torch.cat((pad(header, 64), tiles), 2))
    missing = -linear.in_features % max(128, linear.groupsize)  # zeros after the inputs
    surplus = spans * 256 - linear.in_features - missing  # inputs of the last span
    packed = packed[:, : packed.shape[1] - surplus * 16 // 2]
    return packed, build.layout().int4 if short else build.layout().int4_half


def with_scales(scales: Tensor, strips: Tensor) -> Tensor:
    """Each strip, (N/16, ...) bytes, behind the float32 scales, (N,), of its outputs."""
    scales = pad(scales, 16).view(-1, 16).view(torch.uint8)  # (N/16, 64)
    return torch.cat((scales, strips.flatten(1)), 1)


def assert_packed(tiled: PackedLinear, linear: QuantizedLinear) -> None:
    """It holds the bytes that the slow packing makes."""
    packed, format = (pack_int8 if isinstance(linear, Int8Linear) else pack_int4)(linear)
    block = getattr(linear, "groupsize", build.layout().int8_block)
    assert tiled._layout == (format, block, linear.out_features)
    assert torch.equal(tiled.packed, packed)
    if linear.bias is None:
        assert tiled.bias is None
    else:
        assert torch.equal(tiled.bias, pad(linear.bias.detach(), 16))


@needed
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groupsize", [None, *GROUP_SIZES])
@pytest.mark.parametrize(
    "K, N", [(256, 16), (2048, 48), (300, 40), (5632, 33), (32, 1), (4128, 15), (1000, 100)]
)
def test_packing_gives_the_bytes_of_the_slow_one(K: int, N: int, groupsize: int | None, bias: bool):
    linear = filled(K, N, groupsize, bias)
    assert_packed(PackedLinear(linear), linear)
    if groupsize:
        linear.scales.copy_(foreign(linear.scales))
        assert_packed(PackedLinear(linear), linear)


@needed
def test_packed_weights_follow_one_another_in_memory():
    """Only whole cache lines are between them, though room for the widest format was taken; a
    matrix larger than the rest of the chunk begins a new chunk."""
    memory, x = HugePages(), rows(3, 300)
    linears = [filled(300, 40, size, True) for size in (32, None, 64)]
    fast = [PackedLinear(linear, memory) for linear in linears]
    starts = [layer.packed.data_ptr() for layer in fast]
    sizes = [layer.packed.numel() for layer in fast]
    assert [b - a for a, b in zip(starts, starts[1:], strict=False)] == [
        -(-size // 64) * 64 for size in sizes[:-1]
    ]
    for layer, linear in zip(fast, linears, strict=True):
        assert_packed(layer, linear)
        assert layer.packed.untyped_storage().nbytes() == layer.packed.numel()
        assert torch.equal(layer(x), PackedLinear(linear)(x))
    linears[0].scales.copy_(foreign(linears[0].scales))
    with pytest.raises(RuntimeError, match="bytes for"):  # the wider format would overwrite others
        fast[0].load_from(linears[0])
    assert memory.take(HugePages.CHUNK_BYTES).data_ptr() % 2**12 == 0
    assert len(memory.take(HugePages.CHUNK_BYTES + 1)) == HugePages.CHUNK_BYTES + 1


def foreign(scales: Tensor) -> Tensor:
    """Scales of other quantisers, which are no multiples of a byte's."""
    return scales * (1 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(1)))


@needed
@pytest.mark.parametrize(
    "scales",
    [[0, 0], [1, 255], [1, 256], [255, 255.5], [128, 0.5], [-1, 128], [65504, 255], [2**-24, 0]],
)
def test_a_byte_holds_a_scale_or_none_of_the_matrix_is_in_bytes(scales: list[float]):
    """In one row of many: whichever strip it is in, the first or the last."""
    for row in (0, 39):
        linear = filled(64, 40, 32, False)
        linear.scales[row] = torch.tensor(scales)
        assert_packed(PackedLinear(linear), linear)


@needed
@pytest.mark.parametrize("groupsize", [None, *GROUP_SIZES])
def test_layers_stream_through_one_that_began_on_the_meta_device(groupsize: int | None):
    """Out of one place that is overwritten, and whatever was held before, short or long."""
    layers = [filled(300, 48, groupsize, True, seed) for seed in range(4)]
    for layer in layers[1:3] if groupsize else []:
        layer.scales.copy_(foreign(layer.scales))
    place = filled(300, 48, groupsize, True)
    streamed = PackedLinear(copy.deepcopy(place).to("meta"))
    assert streamed.packed is None
    for layer in layers:
        place.load_state_dict(layer.state_dict())
        streamed.load_from(place)
        for tensor in place.state_dict().values():
            tensor.zero_()
        assert_packed(streamed, layer)
        assert torch.equal(streamed(rows(3, 300)), PackedLinear(layer)(rows(3, 300)))


@needed
def test_the_interpreter_is_free_while_a_layer_is_packed():
    """Else this thread would stand still for as long as a call takes, every time."""
    linear = Int8Linear(8192, 4096, False)
    tiled = PackedLinear(linear)

    def seconds() -> float:
        start = time.perf_counter()
        tiled.load_from(linear)
        return time.perf_counter() - start

    longest_pauses = []  # as a share of the call; more than one try, as the cores may be busy
    with ThreadPoolExecutor(1) as others:
        for _ in range(20):
            ticks = [time.perf_counter()]
            packing = others.submit(seconds)
            while not packing.done():
                ticks.append(time.perf_counter())
            ticks.append(time.perf_counter())
            pause = max(b - a for a, b in itertools.pairwise(ticks))
            longest_pauses.append(pause / packing.result())
    assert min(longest_pauses) < 0.5


@needed
def test_a_layer_may_be_made_in_inference_mode_and_packed_by_another_thread():
    with torch.inference_mode():
        tiled = PackedLinear(filled(300, 40, 64, True))
    linear = filled(300, 40, 64, True, seed=1)
    with ThreadPoolExecutor(1) as others:
        others.submit(tiled.load_from, linear).result()
    assert_packed(tiled, linear)


@needed
def test_too_little_room_is_said_and_not_overrun():
    short, long = filled(300, 40, 32, False), filled(3000, 40, 32, False)
    with pytest.raises(RuntimeError, match="bytes for"):
        PackedLinear(short).load_from(long)


@needed
def test_products_leave_alone_what_is_on_the_meta_device():
    model = torch.nn.ModuleList([filled(64, 32, None, False), Linear(64, 32).bfloat16()])
    model.append(filled(64, 32, 32, False))
    model[:2].to("meta")
    cpu_products.use_fast_linears(model, torch.bfloat16)
    assert [type(m) for m in model] == [Int8Linear, Linear, PackedLinear]


def test_huge_pages_are_as_large_as_is_asked():
    for nbytes in (3_000_001, 1000):  # larger than a huge page, and smaller
        room = page_aligned(nbytes, torch.device("cpu"))
        assert room.shape == (nbytes,)
        assert room.fill_(7).is_contiguous()
        if nbytes > 2**21 and hasattr(mmap, "MADV_HUGEPAGE"):
            assert room.data_ptr() % 2**21 == 0


def linear(K: int, N: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> Linear:
    generator = torch.Generator().manual_seed(K + N)
    made = Linear(K, N, bias=bias).to(dtype).requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def rows(M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K, N", [(32, 32), (96, 160), (2048, 64), (100, 64), (64, 40), (300, 33)])
def test_dense_products_are_exact_to_one_rounding(K: int, N: int, bias: bool, dtype: torch.dtype):
    """Float32 sums, rounded once, bias included. AMX takes whole tiles only, not 100, 40 and 33."""
    slow = linear(K, N, bias, dtype)
    fast = DenseLinear(slow)
    assert fast(rows(0, K, dtype)).shape == (0, N)
    for M in (1, 2, 7, 15, 16, 17, 40, 230):
        x = rows(M, K, dtype)
        exact = x.double() @ slow.weight.double().T + (slow.bias.double() if bias else 0)
        found = fast(x.view(M, 1, K)).view(M, N)
        assert (found != exact.to(dtype)).float().mean() < 0.02
        assert (found.double() - exact).abs().max() <= exact.abs().max() / 128


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("groupsize", [None, *GROUP_SIZES])
@pytest.mark.parametrize("K, N", [(2048, 48), (300, 40), (1000, 33)])
def test_quantised_products_are_those_of_the_formula(
    K: int, N: int, groupsize: int | None, dtype: torch.dtype
):
    """To a rounding of the result, and to 2^-16 of the largest input for each input."""
    linear = filled(K, N, groupsize, True)
    linear.bias.data = linear.bias.data.to(dtype)
    fast = PackedLinear(linear)
    weight = linear.dequantize(torch.float64)
    for M in (1, 2, 7, 8, 9, 50, 70):
        x = rows(M, K, dtype)
        exact = F.linear(x.double(), weight, linear.bias.double())
        sizes = x.double().abs() @ weight.abs().T + exact.abs()
        rounding = 2.0**-15 + torch.finfo(dtype).eps
        assert ((fast(x).double() - exact).abs() <= sizes * rounding).all()


@needed
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it():
    fast, x = DenseLinear(linear(2048, 256, False)), rows(16, 2048)
    alone = torch.cat([fast(row) for row in x.split(1)])
    for M in (2, 5, 16):
        assert torch.equal(fast(x[:M]), alone[:M])


@needed
def test_a_strided_input_is_read_as_it_is():
    fast, x = DenseLinear(linear(64, 64, True)), rows(4, 128)
    assert torch.equal(fast(x[:, ::2]), fast(x[:, ::2].contiguous()))


@needed
def test_a_large_model_gets_them_and_a_small_one_does_not(monkeypatch: pytest.MonkeyPatch):
    def kinds() -> set[type]:
        lm = random_model(CONFIG, device="cpu", dtype=torch.bfloat16)
        return {type(m) for m in lm.model.modules() if isinstance(m, (Linear, DenseLinear))}

    assert kinds() == {Linear}
    monkeypatch.setattr(cpu_products, "MIN_DENSE_BYTES", 0)
    assert kinds() == {DenseLinear}


@needed
def test_only_one_layer_is_in_memory_twice(monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.ModuleList([filled(64, 32, None, False) for _ in range(4)])
    originals, alive = [weakref.ref(m.weight) for m in model], []

    def packed(linear: QuantizedLinear, memory: HugePages | None = None) -> PackedLinear:
        alive.append(sum(original() is not None for original in originals))
        return PackedLinear(linear, memory)

    monkeypatch.setattr(cpu_products, "PackedLinear", packed)
    cpu_products.use_fast_linears(model, torch.bfloat16)
    assert alive == [4, 3, 2, 1]


@needed
def test_an_offloaded_model_gets_the_kernels_of_the_one_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Though its layers in memory alone, here the output head, would be too small for them."""
    args = model_args(read_json(CONFIG))
    monkeypatch.setattr(cpu_products, "MIN_DENSE_BYTES", 2 * args.vocab_size * args.dim + 1)
    monkeypatch.setattr(cpu_products, "multiplies_bfloat16", lambda: False)
    for policy in (None, Policy(Share(0, 0), directory=tmp_path)):
        lm = random_model(CONFIG, device="cpu", dtype=torch.bfloat16, policy=policy)
        assert isinstance(lm.model.output, DenseLinear)
        assert lm.model.cache_factory.attention is cpu_products.kernel_attention
    block = lm.model.layers.buffers[0].contents.block
    assert isinstance(block.attention.wo, DenseLinear)


def seen(B: int, G: int, Q: int, S: int, E: int) -> tuple[Tensor, ...]:
    """Queries, keys and values that are views of a longer cache, and a mask that hides from each
    query what follows a token of its own."""
    generator = torch.Generator().manual_seed(S)
    q = torch.randn(B, G, Q, E, generator=generator)
    k, v = torch.randn(2, B, S + 3, G, E, generator=generator).bfloat16()
    last = torch.randint(S, (B, 1, Q, 1), generator=generator)
    mask = torch.zeros(B, 1, Q, S).masked_fill(torch.arange(S) > last, -torch.inf)
    return q.bfloat16(), k[:, :S].transpose(1, 2), v[:, :S].transpose(1, 2), mask.bfloat16()


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("E", [16, 64, 128, 20])
@pytest.mark.parametrize("B, G, Q", [(1, 1, 1), (3, 2, 1), (2, 4, 8), (1, 12, 1), (2, 2, 129)])
def test_attention(B: int, G: int, Q: int, E: int, dtype: torch.dtype):
    """Channels of 20 and 129 queries are left to torch, which rounds its weights to the dtype."""
    for S in (1, 15, 48, 333):
        given = [t.to(dtype) for t in seen(B, G, Q, S, E)]
        found = torch.ops.gpt_flex.attention(*given)
        exact = F.scaled_dot_product_attention(*(t.double() for t in given))
        ours = Q <= 128 and E != 20
        rounding = torch.finfo(dtype).eps * (0.5 if ours else 4) + 2**-20
        assert (found - exact).abs().max() <= exact.abs().max() * rounding


@needed
@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "B, G, Q, E", [(3, 2, 1, 64), (2, 4, 8, 256), (1, 2, 129, 16), (1, 1, 2, 20)]
)
def test_capped_attention(B: int, G: int, Q: int, E: int, dtype: torch.dtype, softcap: float):
    """As above, torch computes 129 queries and channels of 20; it rounds the scores, too."""
    scores = {"scale": 0.7, "softcap": softcap}
    for S in (1, 48, 333):
        given = [t.to(dtype) for t in seen(B, G, Q, S, E)]
        found = torch.ops.gpt_flex.attention(*given, **scores)
        exact = attend_capped(*(t.double() for t in given), **scores)
        ours = Q <= 128 and E != 20
        rounding = torch.finfo(dtype).eps * (0.5 if ours else 4 + softcap) + softcap * 2**-20
        assert (found - exact).abs().max() <= exact.abs().max() * rounding


@needed
def test_capped_scores_may_be_infinite():
    """One of 1e38 * 1e38, and of the opposite sign, count as the cap; a NaN query stays NaN."""
    q = torch.full((1, 1, 2, 16), 1e38)
    k = torch.tensor([1e38, -1e38, 0.0]).view(1, 1, 3, 1).repeat(1, 1, 1, 16)
    v, mask = torch.randn(1, 1, 3, 16), torch.zeros(1, 1, 2, 3)
    q[0, 0, 1, 3] = torch.nan
    found = torch.ops.gpt_flex.attention(q, k, v, mask, softcap=2.0)
    weights = torch.tensor([2.0, -2.0, 0.0]).softmax(0)
    assert (found[0, 0, 0] - weights @ v[0, 0]).abs().max() < 1e-5
    assert found[0, 0, 1].isnan().all()


@needed
def test_a_rows_attention_has_the_same_bits_in_a_batch():
    q, k, v, mask = seen(3, 4, 2, 100, 64)
    together = torch.ops.gpt_flex.attention(q, k, v, mask)
    for row in range(3):
        alone = torch.ops.gpt_flex.attention(*(t[row : row + 1] for t in (q, k, v, mask)))
        assert torch.equal(alone[0], together[row])


@needed
@pytest.mark.parametrize("B, G, Q", [(1, 1, 8), (1, 2, 5), (2, 1, 7)])
def test_threads_that_divide_the_queries_of_a_head_give_the_same_bits(B: int, G: int, Q: int):
    given = seen(B, G, Q, 1000, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(torch.ops.gpt_flex.attention(*given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bfloat16", [True, False], ids=["avx512_bf16", "without"])
@pytest.mark.parametrize("name", ["demo", "demo-opt"])
def test_models_attend_by_it_where_it_is_faster(
    name: str, bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """The heads of the demo share keys, those of demo-opt do not."""
    monkeypatch.setattr(cpu_products, "MIN_DENSE_BYTES", 0)
    monkeypatch.setattr(cpu_products, "multiplies_bfloat16", lambda: bfloat16)
    config = CONFIG.parent.with_name(name) / "config.json"
    cache = random_model(config, device="cpu", dtype=dtype).make_caches(2, 8)[0]
    ours = dtype == torch.bfloat16 and (name == "demo-opt" or not bfloat16)
    wanted = cpu_products.kernel_attention if ours else sdpa_attention
    assert cache.attention is wanted
    assert cache.first(1).attention is wanted


@needed
def test_a_model_with_windows_and_a_softcap_attends_by_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_products, "multiplies_bfloat16", lambda: False)
    args = ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=40,
        context=80, embed_dim=64, layer_types=(LayerType(Rope(32), window=5), LayerType(Rope(32))),
        attention_softcap=1.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(args).bfloat16()
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.dim() == 1 else 0, 0.2)
    tokens, pos = torch.randint(40, (2, 30)), torch.arange(30).expand(2, 30)

    def logits() -> Tensor:
        return model(tokens, pos, torch.arange(30), model.make_caches(2, 40))

    wanted = logits()
    cpu_products.use_fast_attention(model)
    assert model.make_caches(1, 40)[0].attention is cpu_products.kernel_attention
    assert (logits() - wanted).abs().max() < 0.02 * wanted.abs().max()


@needed
def test_a_step_attends_as_a_sweep_does_to_the_bit():
    q, k, v, mask = seen(2, 4, 9, 100, 64)
    together = torch.ops.gpt_flex.attention(q, k, v, mask)
    for n in range(9):
        one = slice(n, n + 1)
        alone = torch.ops.gpt_flex.attention(q[:, :, one], k, v, mask[:, :, one])
        assert torch.equal(alone[:, :, 0], together[:, :, n])


@needed
@pytest.mark.parametrize("groupsize", [None, 32, 256])
def test_a_nan_or_an_infinity_makes_its_row_nan_and_no_other(groupsize: int | None):
    fast, x = PackedLinear(filled(300, 40, groupsize, True)), rows(9, 300)
    clean = fast(x)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[4, 17] = bad
        for found in (fast(x), torch.cat([fast(row) for row in x.split(1)])):
            assert found[4].isnan().all()
            assert torch.equal(found[[0, 1, 2, 3, 5, 8]], clean[[0, 1, 2, 3, 5, 8]])


@needed
def test_a_row_of_tiny_numbers_gives_the_bias():
    linear = filled(300, 40, 32, True)
    x = torch.full((1, 300), 2.0**-120, dtype=torch.bfloat16)
    assert torch.equal(PackedLinear(linear)(x)[0], linear.bias)


@needed
def test_attention_leaves_other_shapes_to_torch():
    """A mask that serves all rows, and no queries."""
    q, k, v, mask = seen(2, 4, 2, 100, 64)
    wanted = torch.ops.gpt_flex.attention(q, k, v, mask[:1].expand(2, -1, -1, -1))
    found = torch.ops.gpt_flex.attention(q, k, v, mask[:1])
    assert (found - wanted).abs().max() < 0.02
    assert torch.ops.gpt_flex.attention(q[:, :, :0], k, v, mask[:, :, :0]).shape == (2, 4, 0, 64)


@needed
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [1, 20, 64, 1152])
def test_rms_norm(D: int, dtype: torch.dtype, offset: float):
    """Rows apart in memory, with and without a weight; a row has the same bits alone."""
    generator = torch.Generator().manual_seed(D)
    x = torch.randn(3, 5, D + 7, generator=generator).to(dtype)[..., :D]
    for weight in (torch.randn(D, generator=generator).to(dtype), None):
        found = torch.ops.gpt_flex.fast_rms_norm(x, weight, 1e-5, offset)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        exact = exact if weight is None else exact * (weight.double() + offset)
        assert found.dtype == dtype and found.shape == x.shape
        assert ((found - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 2 + 1e-7).all()
        alone = torch.ops.gpt_flex.fast_rms_norm(x[1, 2], weight, 1e-5, offset)
        assert torch.equal(alone, found[1, 2])
    assert torch.ops.gpt_flex.fast_rms_norm(x[:0], None, 1e-5, offset).shape == (0, 5, D)
    x[1, 2, 0] = torch.nan
    lost = torch.ops.gpt_flex.fast_rms_norm(x, None, 1e-5, offset).isnan()
    assert lost[1, 2].all() and lost.sum() == D


def exact_gelu_tanh(x: Tensor) -> Tensor:
    """torch's own result is 0 below -8."""
    exact = x * (2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).sigmoid()
    assert (exact - F.gelu(x, approximate="tanh")).abs().max() < 1e-14
    return exact


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name, exactly", [("gelu_tanh", exact_gelu_tanh), ("silu", F.silu)])
def test_activations(name: str, exactly: Callable[[Tensor], Tensor], dtype: torch.dtype):
    """Also of rows apart in memory, far from 0, where the result is tiny, and of no number."""
    function = getattr(torch.ops.gpt_flex, f"fast_{name}")
    x = torch.linspace(-12, 12, 3 * 1001).view(3, 1001).to(dtype)[:, :997]
    found, exact = function(x), exactly(x.double())
    assert found.dtype == dtype and found.is_contiguous()
    tiny = max(2 * torch.finfo(dtype).smallest_normal, 1e-33)
    assert ((found - exact).abs() <= exact.abs() * (torch.finfo(dtype).eps + 2**-16) + tiny).all()
    few = torch.tensor([torch.nan, torch.inf, 0.0], dtype=dtype)
    assert str(function(few).tolist()) == "[nan, inf, 0.0]"
    assert function(x[:0]).shape == (0, 997)


BLOCKS = {  # for each kind of layer the config, beside COMMON, and whether it is fused
    "llama": ({"model_type": "llama"}, True),
    "bias": ({"model_type": "qwen2", "num_key_value_heads": 4}, True),
    "head norms": ({"model_type": "qwen3", "head_dim": 48}, True),
    "gemma": (
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        True,
    ),
    "output norms only": ({"model_type": "olmo2"}, True),
    "partial rotation": ({"model_type": "phi3", "partial_rotary_factor": 0.75}, True),
    "factors": ({"model_type": "granite", "residual_multiplier": 0.5}, False),
    "no gate": ({"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh"}, False),
}
COMMON = {
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}


def step_logits(model: Transformer) -> list[Tensor]:
    """The logits of a prompt of two unlike texts and of three decoding steps, beyond a window."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(300, (2, 22), generator=generator)
    caches, key_pos = model.make_caches(2, 32), torch.arange(32)
    starts = [torch.arange(19).expand(2, 19), *(torch.full((2, 1), p) for p in (19, 20, 21))]
    return [model(tokens[:, pos[0]], pos, key_pos, caches) for pos in starts]


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", BLOCKS)
@torch.inference_mode()
def test_fused_blocks_give_the_bits_of_plain_ones(
    kind: str,
    mode: str | None,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cpu_products, "MIN_DENSE_BYTES", 0)
    config, fused = BLOCKS[kind]
    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    scheme = mode and make_scheme(mode, 32, mode)
    given = {"device": "cpu", "dtype": dtype, "scheme": scheme}
    model = random_model(tmp_path / "config.json", **given).model
    for module in model.modules():  # all norms begin as ones, or as zeros in Gemma
        if isinstance(module, (RMSNorm, OffsetRMSNorm)):
            module.weight.uniform_(0.5, 2)
    assert {type(block) is CPUBlock for block in model.layers} == {fused}
    found = step_logits(model)
    for block in model.layers:
        block.forward = SequentialBlock.forward.__get__(block)
    assert all(map(torch.equal, found, step_logits(model)))


@needed
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_key_that_is_not_a_number_reaches_the_queries_that_see_it(softcap: float | None):
    """In every slot: a maximum may lose it, depending on what follows."""
    S, (q, k, v) = 23, (rows(2 * n, 64).view(1, 2, n, 64) for n in (3, 23, 23))
    mask = torch.full((1, 1, 3, S), -torch.inf).triu(S - 2).bfloat16()
    sees = mask[0, 0] == 0  # (3, S)
    wanted = torch.ops.gpt_flex.attention(q, k, v, mask, softcap=softcap)
    for slot in range(S):
        lost = k.clone()
        lost[:, :, slot, 5] = torch.nan
        found = torch.ops.gpt_flex.attention(q, lost, v, mask, softcap=softcap)
        assert torch.equal(found.isnan().all(3)[0, 0], sees[:, slot])
        hidden = ~sees[:, slot]
        assert torch.equal(found[:, :, hidden], wanted[:, :, hidden])


ONES = torch.ones(64)
UNARY = {  # operators, and their arguments after a tensor, (2, 4, 3, 64)
    "rms_norm": lambda x: ([64], ONES.to(x.device), 1e-5),
    "layer_norm": lambda x: ([64], ONES.to(x.device), None, 1e-5),
    "soft_cap": lambda x: (2.0,),
    "gelu_tanh": lambda x: (),
    "cos_sin": lambda x: (2.0,),
    "fast_rms_norm": lambda x: (ONES.to(x.device), 1e-5, 0.0),
    "fast_silu": lambda x: (),
    "fast_gelu_tanh": lambda x: (),
    "capped": lambda x: (x, x, x.new_zeros(2, 1, 3, 3)),
    "attention": lambda x: (x, x, x.new_zeros(2, 1, 3, 3)),
}


@needed
@pytest.mark.parametrize("name", UNARY)
def test_results_have_the_strides_that_the_compiler_expects(name: str):
    """Of tensors in order, with gaps, and permuted."""
    scores = {"scale": 1.0, "softcap": 2.0} if name == "capped" else {}

    def compute(x: Tensor) -> Tensor:
        found = getattr(torch.ops.gpt_flex, name)(x, *UNARY[name](x), **scores)
        return found[0] if name == "cos_sin" else found

    for x in (
        torch.rand(2, 4, 3, 64),
        torch.rand(2, 4, 5, 96)[:, :, 1:4, :64],
        torch.rand(2, 3, 4, 64).transpose(1, 2),
        torch.rand(2, 4, 64, 3).transpose(2, 3),
    ):
        fake = compute(torch.empty_strided(x.shape, x.stride(), device="meta"))
        assert fake.stride() == compute(x).stride()


@needed
@pytest.mark.parametrize("queries", [3, 200])
@torch.inference_mode()
def test_compiled_attention_of_permuted_queries(queries: int):
    """As grouped_attention gives them for one query head for each key/value head: the compiler must
    not expect a result in the order of q. 200 queries: PyTorch's attention."""

    def attend(heads: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        attention = torch.ops.gpt_flex.attention(heads.transpose(1, 2), k, v, mask)
        return attention.transpose(1, 2).flatten(2) * 2  # (B, T, H, E) -> (B, T, H * E)

    k, v = rows(2 * 2 * 4 * 7, 64).view(2, 2, 4, 7, 64)
    given = rows(2 * queries * 4, 64).view(2, queries, 4, 64), k, v, torch.zeros(2, 1, queries, 7)
    given = *given[:3], given[3].bfloat16()
    options = {"size_asserts": False, "fx_graph_cache": False}  # as compiled.py compiles
    found = torch.compile(attend, fullgraph=True, options=options)(*given)
    assert torch.equal(found, attend(*given))


@needed
@torch.inference_mode()
def test_compiled_code_computes_a_mask_once_for_all_layers(tmp_path: Path):
    from torch._inductor.utils import run_and_get_code

    config = COMMON | {"model_type": "llama", "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scheme = make_scheme("int4", 32, "int4")
    lm = random_model(tmp_path / "config.json", device="cpu", dtype=torch.bfloat16, scheme=scheme)
    caches, pos, key_pos = lm.model.make_caches(1, 32), torch.tensor([[7]]), torch.arange(17)
    given = torch.tensor([[3]]), pos, key_pos, caches
    options = {"fx_graph_cache": False}  # an older graph would be found whatever the tag says
    compiled = torch.compile(lm.model, fullgraph=True, options=options)
    wanted, (found, (code,)) = lm.model(*given), run_and_get_code(compiled, *given)
    assert torch.equal(found, wanted) and code.count("gpt_flex.run_layer.default(") == 5
    masks = [line for line in code.splitlines() if "empty_strided" in line and ", 17)" in line]
    assert len(masks) == 1


def layer_of(**changes: Any) -> Tensor:
    """What decoder_layer makes of small random linears, one of them dense, with all norms. changes:
    other arguments."""
    sizes = (64, 192), (96, 64), (80, 64)
    wqkv, wo, w2 = (PackedLinear(filled(*size, 32, True)) for size in sizes)
    w13 = DenseLinear(Linear(64, 160, dtype=torch.bfloat16))
    weights, biases, packings = zip(*(m.operands() for m in (wqkv, wo, w13, w2)), strict=True)
    norms = [torch.rand(D).bfloat16() for D in (64, 64, 64, 64, 48, 48)]
    given = {
        "weights": [weight.detach() for weight in weights],
        "biases": [None if bias is None else bias.detach() for bias in biases],
        "packings": sum(packings, ()),
        "norms": norms,
        "eps": 1e-5,
        "offset": 0.0,
        "activation": "silu",
        "heads": (2, 1, 48),
    }
    return torch.ops.gpt_flex.decoder_layer(*(given | changes).values())


@needed
def test_the_operators_of_a_layer_have_the_shapes_that_they_claim():
    """opcheck copies all arguments, and a layer may not be copied."""
    ops, layer, angles = torch.ops.gpt_flex, layer_of(), torch.rand(3, 1, 1, 24)
    x, (k, v) = rows(3, 64)[:, None], rows(30, 48).view(2, 3, 5, 1, 48)

    def checked(operator, *given):
        found = operator(*given)
        fake = operator(*(t.to("meta") if isinstance(t, Tensor) else t for t in given))
        assert (fake.shape, fake.dtype) == (found.shape, found.dtype) and found.is_contiguous()
        return found

    heads = checked(ops.project_heads, layer, x, angles, angles, 192)  # (3, 1, 4 * 48)
    y = checked(ops.finish_layer, layer, x, heads[..., :96])
    slots, mask = torch.tensor([[1], [0], [4]]), torch.zeros(3, 1, 2, 5).bfloat16()
    given = layer, x, angles, angles, k, v, slots, mask, None, None
    assert checked(ops.run_layer, *given).shape == y.shape
    assert torch.equal(k[[0, 1, 2], [1, 0, 4]].flatten(1), heads[:, 0, 96:144])
    assert torch.equal(v[[0, 1, 2], [1, 0, 4]].flatten(1), heads[:, 0, 144:])


@needed
def test_the_operators_of_a_layer_refuse_wrong_arguments():
    ops, x, angles = torch.ops.gpt_flex, rows(3, 64)[:, None], torch.rand(3, 1, 1, 24)
    layer, norm, (k, v) = layer_of(), torch.ones(64).bfloat16(), rows(30, 48).view(2, 3, 5, 1, 48)
    mask, slots = torch.zeros(3, 1, 2, 5).bfloat16(), torch.zeros(3, 1, dtype=torch.long)

    def run(layer=layer, x=x, cos=angles, k=k, v=v, slots=slots, mask=mask):
        return ops.run_layer(layer, x, cos, angles, k, v, slots, mask, None, None)

    for message, changes in (
        ("lists of other lengths", {"layer": lambda: layer_of(packings=(1, 32, 0))}),
        ("on another device", {"layer": lambda: layer_of(norms=[norm.to("meta")] * 6)}),
        ("3 heads for 2 of 48", {"layer": lambda: layer_of(heads=(3, 2, 48))}),
        ("0 heads for 0 of 48", {"layer": lambda: layer_of(heads=(0, 0, 48))}),
        ("no format 7", {"layer": lambda: layer_of(packings=(7, 32, 192) * 4)}),
        ("a copy of one", {"layer": layer.clone}),
        ("no tensor of decoder_layer", {"layer": lambda: torch.zeros(8, dtype=torch.uint8)}),
        ("shape '.3, 1, 288.' is invalid", {"layer": lambda: layer_of(heads=(2, 2, 48))}),
        ("a norm not of 48 channels", {"layer": lambda: layer_of(norms=[norm] * 6)}),
        ("no gate by relu", {"layer": lambda: layer_of(activation="relu")}),
        ("a rotation of other tokens", {"cos": lambda: angles[1:]}),
        ("slot -1 of 5", {"slots": lambda: slots - 1}),
        ("slot 5 of 5", {"slots": lambda: slots + 5}),
        ("slots of other tokens", {"slots": lambda: slots[1:]}),
        ("not int64", {"slots": slots.int}),
        ("a cache of", {"v": lambda: v[1:]}),
        ("a cache of", {"k": lambda: k[..., :32], "v": lambda: v[..., :32]}),
        ("a cache of", {"k": lambda: k.repeat(1, 1, 2, 1), "v": lambda: v.repeat(1, 1, 2, 1)}),
        ("a cache of", {"k": lambda: k[:, :, 0], "v": lambda: v[:, :, 0]}),
        ("a cache that is not contiguous", {"k": lambda: k.repeat(1, 2, 1, 1)[:, ::2]}),
        ("a cache of another dtype", {"v": v.half}),
        ("more slots than the cache", {"mask": lambda: torch.zeros(3, 1, 2, 6).bfloat16()}),
    ):
        kept = k.clone(), v.clone()
        with pytest.raises(RuntimeError, match=message):
            run(**{name: make() for name, make in changes.items()})
        if "layer" not in changes:
            assert torch.equal(kept[0], k) and torch.equal(kept[1], v)
    with pytest.raises(RuntimeError, match="a sum of unlike tensors"):
        ops.finish_layer(layer, x[1:], x[..., :1].expand(-1, -1, 96).contiguous())
    with pytest.raises(RuntimeError, match="a cosine without a sine"):
        ops.project_heads(layer, x, angles, None, 192)


@needed
def test_wrong_arguments_are_refused():
    fast, x = PackedLinear(filled(300, 48, 32, True)), rows(2, 300)
    format, block, N = fast._layout
    with pytest.raises(RuntimeError, match="a weight not of 300"):
        torch.ops.gpt_flex.fast_rms_norm(x, torch.ones(300), 1e-5, 0.0)
    for arguments in (
        (x, fast.packed, fast.bias[1:], format, block, N),
        (x, fast.packed, fast.bias, format, 0, N),
        (x, fast.packed.t(), fast.bias, format, block, N),
    ):
        with pytest.raises(RuntimeError, match="a bias not|a block of|no matrix"):
            torch.ops.gpt_flex.quantized_linear(*arguments)
    none = torch.empty(0, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="of 0 outputs"):
        torch.ops.gpt_flex.pack(none, torch.empty(0), None, none)

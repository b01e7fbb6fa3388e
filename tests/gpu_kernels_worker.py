"""What test_gpu_kernels.py runs in a process of its own, with or without Triton's interpreter.

    TRITON_INTERPRET=1 python tests/gpu_kernels_worker.py products SEED CASES
    TRITON_INTERPRET=1 python tests/gpu_kernels_worker.py attention SEED CASES
    TRITON_INTERPRET=1 python tests/gpu_kernels_worker.py loops SEED CASES
    TRITON_INTERPRET=1 python tests/gpu_kernels_worker.py rotate SEED CASES
    TRITON_INTERPRET=1 python tests/gpu_kernels_worker.py new_tokens SEED CASES
    TRITON_INTERPRET=1 python tests/gpu_kernels_worker.py model SEED CASES
    python tests/gpu_kernels_worker.py compile CAPABILITY

Without the variable the first six run on the GPU.

The first five compare kernels with the PyTorch formulas over random shapes; model compares a whole
model's logits with them and without; they print how many cases there were. compile prints a JSON
line for each kernel: its registers, and what it spills.
"""

import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from calibration import gptq
from fast_layers import gpu as gpu_products
from host.torch_private import shallow_copy
from kernels import gpu
from kernels.gpu import (
    attention,
    columns,
    few_rows,
    inputs,
    launch,
    launch_attention,
    one_row,
    to_fixed_point,
    unpack,
)
from kernels.gpu import new_tokens as new_tokens_kernels
from kernels.gpu import rotate as rotation_kernels
from kernels.gpu.fixed_point import INT4, INT8, FixedPoint, Order, fixed_point
from kernels.gpu.scaled_rows import ScaledRows, Spans
from kernels.gpu.tiles import ONE_ROW, FewRows, OneRow, few_rows_tile
from layers import kv_cache
from layers.args import LayerType, ModelArgs, Rope
from layers.kv_cache import KVCache, attend_capped, grouped_attention, hidden_keys
from layers.positions import RotaryPositions
from load import find_cache
from model import Transformer
from quant.kv_cache import QuantizedKVCache
from quant.linear import (
    GROUP_SIZES,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    make_scheme,
    quantized_copy,
    round_int4,
    round_int8,
)

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
# Of the sum of |input * weight|. One row: activations of 16 bits, 2**-16 of the largest of 32;
# rows: weights rounded to float16.
TOLERANCE = 2**-11
DTYPES = torch.float32, torch.bfloat16, torch.float16
# Of outputs. The interpreter rounds bfloat16 towards zero; a GPU rounds to the nearest.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def near(found: Tensor, wanted: Tensor, tolerance: float, size: Tensor | float, what: Any) -> None:
    """Raises AssertionError where they differ by more than that share of `size`."""
    error = ((found.float() - wanted).abs() / size).max().item()
    assert error <= tolerance, f"{what}: off by {error:.2e}, and may be by {tolerance:.2e}"


def random_linear(K: int, N: int, groupsize: int | None, bias: bool) -> QuantizedLinear:
    weight = torch.randn(N, K) / math.sqrt(K)
    if groupsize is None:
        linear, buffers = Int8Linear(K, N, bias), round_int8(weight)
    else:
        linear, buffers = Int4Linear(K, N, bias, groupsize), round_int4(weight, groupsize)
    for name, buffer in buffers.items():
        setattr(linear, name, buffer)
    if bias:
        linear.bias = torch.nn.Parameter(torch.randn(N), requires_grad=False)
    return linear


def a_view(tensor: Tensor, columns: int) -> Tensor:
    """The same numbers as part of a wider tensor, as shards and slices have them."""
    wide = F.pad(tensor, (0, columns))
    return wide[:, : tensor.shape[1]]


class Product:
    """A linear with random weights, inputs, (M, K), and the result that its kernels should give."""

    def __init__(self, M: int, K: int, N: int, groupsize: int | None, bias: bool, dtype: Any):
        self.case = M, K, N, groupsize, bias, dtype
        self.linear, x = random_linear(K, N, groupsize, bias), torch.randn(M, K)
        x[:, : K // 8] *= random.choice([1, 300])  # outliers, as real activations have
        self.x, self.weight = x.to(dtype), self.linear.dequantize(torch.float32)
        self.bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
        self.residual = torch.randn(M, N).to(dtype) if random.random() < 0.5 else None
        # Rounded twice: the product, and its sum with the residual.
        self.tolerance = TOLERANCE + 2 * ROUNDING[dtype]
        more = [t.float() for t in (self.bias, self.residual) if t is not None]
        self.exact = sum(more, F.linear(self.x.float(), self.weight))  # (M, N)
        # What errors are measured in: sums of absolute values.
        self.size = F.linear(self.x.float().abs(), self.weight.abs()) + 1e-20
        self.size = sum((t.abs() for t in more), self.size)
        # One row by one: 2**-16 of the largest input, times each weight, as well, since the largest
        # may itself meet a weight of zero.
        largest = self.x.float().abs().amax(1, keepdim=True)  # (M, 1)
        self.fixed_size = self.size + 2**-5 * largest * self.weight.abs().sum(1)

    def buffers(self) -> dict[str, Tensor]:
        """Of the linear, the weights as part of a wider tensor."""
        found = dict(self.linear.named_buffers())
        return found | {"weight": a_view(found["weight"], 16 * random.randint(0, 1))}


def check_products(M: int, K: int, N: int, groupsize: int | None, bias: bool, dtype: Any) -> None:
    """One linear by each of its kernels, and rows alone beside rows together."""
    p = Product(M, K, N, groupsize, bias, dtype)
    stored, given, first = p.buffers(), p.bias, None if p.residual is None else p.residual[:1]
    one = OneRow(random.choice([1, 2, 4]), random.choice([4, 32]), 1)
    if groupsize is None:
        dense = launch.dequantize_int8(**stored, dtype=torch.float32)
        row_product, order, rows, some = launch.int8_row, INT8, launch.int8_rows, K % 4 == 0
    else:
        dense = launch.dequantize_int4(**stored, in_features=K, dtype=torch.float32)
        row_product, order, rows, some = launch.int4_row, INT4, launch.int4_rows, True
    assert torch.equal(dense, p.weight)
    if groupsize or K % 16 == 0:
        fixed = launch.fixed_point(p.x[0], order)
        y = row_product(fixed, **stored, bias=given, residual=first, dtype=dtype, tile=one)
        near(y, p.exact[:1], p.tolerance, p.fixed_size[:1], p.case)
    if some:
        check_few_rows(p, rows, stored)
    if dtype == torch.float32 and M < 4:
        product = gpu.int8_product if groupsize is None else gpu.int4_product
        y = product(p.x, *stored.values(), given, p.residual, *gpu.Prologue())
        near(y, p.exact, p.tolerance, p.fixed_size, (p.case, "one by one"))
    if K % 8 == 0:
        wanted = F.linear(p.x[:1].float(), p.weight.to(dtype).float())
        wanted += 0 if given is None else given.float()
        y = launch.dense_row(p.x[:1], p.weight.to(dtype), given, one)
        near(y, wanted, p.tolerance, p.size[:1], p.case)


def check_few_rows(p: Product, product: Any, stored: dict[str, Tensor]) -> None:
    """All rows together, and whether a row has the same bits beside others."""
    tile = FewRows(random.choice([16, 32]), 32, random.choice([1, 3]), 2, 2)
    tensors = stored["weight"], stored["scales"], stored.get("zeros")

    def multiply(x: Tensor) -> Tensor:
        rows = launch.scaled_rows(x, launch.spans_of(len(x), *tensors, tile))
        return product(rows, **stored, bias=p.bias, residual=p.residual, dtype=x.dtype, tile=tile)

    together = multiply(p.x)
    # float32 inputs are rounded to float16, as the weights are.
    tolerance = p.tolerance + (TOLERANCE if p.x.dtype == torch.float32 else 0)
    near(together, p.exact, tolerance, p.size, p.case)
    row, others = random.randrange(len(p.x)), torch.randn(p.x.shape).to(p.x.dtype)
    others[row] = p.x[row]
    assert torch.equal(multiply(others)[row], together[row]), f"{p.case}: bits of a row"


def same(found: FixedPoint, x: Tensor, order: Order) -> None:
    """Raises AssertionError where fixed point is not that of x, but for the rounding of x."""
    wanted = fixed_point(x, order)
    steps = 2 * wanted.units[:, None]  # a rounding of x may cross a border, also of a unit
    near(found.q * found.units[:, None], wanted.q * wanted.units[:, None], 1.0, steps, order)
    assert torch.equal(found.sums, found.q.sum((0, 2), dtype=torch.int32))


def products(seed: int, cases: int) -> None:
    for _ in range(cases):
        K = random.choice(
            [random.randint(1, 40) * 4, 32, 64, 172, 256, 1000, random.randint(1, 99)]
        )
        check_products(
            M=random.choice([1, 2, 3, 6, 17]),
            K=K,
            N=random.choice([1, 3, 16, 20]),
            groupsize=random.choice([None, *GROUP_SIZES]),
            bias=random.random() < 0.5,
            dtype=random.choice(DTYPES),
        )
    check_prologues()
    check_special_numbers()


def check_prologues() -> None:
    """A norm or a gate before a product, for one row, a few rows and many."""
    for order, K in itertools.product((INT4, INT8), (48, 1100)):
        x, weight = torch.randn(2 * K), torch.randn(K)
        norm, gate = gpu.Prologue(weight, 1e-5), gpu.Prologue(gated=True)
        same(launch.fixed_point(x[:K], order, norm), norm.apply(x[:K]), order)
        same(launch.fixed_point(x, order, gate), gate.apply(x), order)
        rows, per_word, width = torch.randn(5, 2 * K), order.size // 4, -(-K // 32) * 32
        for prologue, some in ((norm, rows[:, :K]), (gate, rows)):
            spans = Spans(width, per_word, 64)
            numbers, units = launch.scaled_rows(some, spans, prologue)
            numbers = numbers.float().transpose(1, 2).flatten(1)  # (5, width)
            found = numbers * units.repeat_interleave(64, 1)[:, :width]
            wanted = F.pad(prologue.apply(some), (0, width - K))
            near(launch.apply_prologue(some, prologue), wanted[:, :K], 1e-5, 1.0, (K, "many rows"))
            near(found, wanted, 2**-10, wanted.abs() + 2**-14 * units.max(), (order, K, "rows"))


def check_special_numbers() -> None:
    """Infinite inputs, NaN, zeros, and numbers of very different size."""
    for order in (INT4, INT8):
        x = torch.randn(1000) * torch.logspace(-30, 30, 1000)
        x[70], x[500], x[900] = math.inf, math.nan, 0
        for mine, oracle in zip(launch.fixed_point(x, order), fixed_point(x, order), strict=True):
            nan = mine.isnan() if mine.is_floating_point() else torch.zeros_like(mine).bool()
            assert nan.sum() in (0, 2)
            finite = oracle.isfinite() if oracle.is_floating_point() else oracle == oracle
            if mine.is_floating_point():
                assert torch.equal(mine[finite], oracle[finite])
                assert not mine[~finite].isfinite().any()


def filled_cache(B: int, S: int, G: int, E: int, bits: int) -> KVCache:
    """A cache with S random positions, and some without numbers after them."""
    shape = B, S + 9, G, E
    if bits == 16:
        cache = KVCache(shape, torch.float32, DEVICE)
    else:
        cache = QuantizedKVCache(shape, torch.float32, DEVICE, bits)
    cache.store(torch.arange(S).expand(B, S), torch.randn(B, S, G, E), torch.randn(B, S, G, E))
    return cache


def damage(cache: KVCache, unseen: Tensor) -> None:
    """Replace what the cache holds in some slots, (B, S) bool, by NaN."""
    for buffer in cache.buffers():
        if buffer.is_floating_point():
            buffer[:, : unseen.shape[1]][unseen] = math.nan


def hidden_slots(kind: str, B: int, T: int, S: int) -> tuple[Tensor, Tensor | None]:
    """Which slots each query does not see, (B, T, S) bool, and in causal attention the positions of
    the queries, (B, T). The other kind is a ring of S slots, which may have gone round."""
    ends = torch.randint(0, 2 * S if kind == "ring" else S - T + 1, (B, 1))
    ends[0] = S - T
    pos = (ends + torch.arange(T)).contiguous()  # (B, T)
    if kind == "causal":
        return hidden_keys(pos, torch.arange(S), None), pos
    newest = pos.amax(1, keepdim=True)  # (B, 1)
    keys = newest - (newest - torch.arange(S)) % S  # (B, S)
    return hidden_keys(pos, keys, random.choice([1, S - T + 1])), None


def check_attention(kind: str, softcap: float | None, bits: int, **sizes: int) -> None:
    case = kind, softcap, bits, sizes
    B, T, R, G, E, S = (sizes[name] for name in "BTRGES")
    cache, (hidden, pos) = filled_cache(B, S, G, E, bits), hidden_slots(kind, B, T, S)
    mask = torch.zeros(B, T, S).masked_fill(hidden, -math.inf).repeat(1, R, 1).unsqueeze(1)
    q = torch.randn(B, T, G * R, E)
    formula = partial(F.scaled_dot_product_attention, scale=0.3)
    if softcap is not None:
        formula = partial(attend_capped, scale=0.3, softcap=softcap)
    wanted = grouped_attention(formula, q, *cache.visible(S), mask)
    damage(cache, hidden.all(1))
    names = ("k_scales", "k_lows", "v_scales", "v_lows") if bits != 16 else ()
    extra = [cache.get_buffer(name) for name in names]
    found = launch_attention.attend(q, cache.k, cache.v, extra, mask, pos, 0.3, softcap)
    near(found, wanted, 1e-5, wanted.abs().max().item(), case)
    assert not launch.arrivals(cache.k.device).any(), "counters are not back at 0"


def attend(seed: int, cases: int) -> None:
    for _ in range(cases):
        check_attention(
            kind=random.choice(["causal", "ring"]),
            softcap=random.choice([None, 0.5, 50.0]),
            B=random.randint(1, 3),
            T=random.choice([1, 1, 2, 5, 8]),
            R=random.choice([1, 2, 4, 8]),
            G=random.choice([1, 2]),
            E=random.choice([8, 24, 32, 64, 80]),
            S=random.choice([8, 64, 70, 129, 300]),
            bits=random.choice([16, 8, 4]),
        )


class NewTokens:
    """Random new tokens, (B, T, H + 2 G, E), with norms of heads or without, and a cache of S slots
    that holds the tokens before them."""

    converted = 0  # times that check_attention compared converted results

    def __init__(self, sizes: dict[str, int], dtype: torch.dtype, normed: bool):
        B, T, R, G, E, S = (sizes[name] for name in "BTRGES")
        self.case, self.split = (sizes, dtype, normed), (R * G, G, G)
        P = random.choice([E // 2, E // 4])
        self.qkv = torch.randn(B, T, (R + 2) * G, E).to(dtype)
        angles = torch.randn(B, T, 1, P)
        self.rotation = angles.cos(), angles.sin()
        weights = [torch.randn(E).to(dtype) if normed else None for _ in "qk"]
        self.norms = gpu.HeadNorms(*weights, 1e-5)
        first = torch.randint(0, S - T + 1, (B, 1))
        first[0] = S - T
        self.pos = (first + torch.arange(T)).contiguous()  # (B, T)
        self.mine, self.theirs = (KVCache((B, S + 1, G, E), dtype, DEVICE) for _ in range(2))
        for buffer, other in zip(self.mine.buffers(), self.theirs.buffers(), strict=True):
            buffer.normal_()
            buffer[torch.arange(S + 1) >= first] = math.nan  # not stored yet
            other.copy_(buffer)

    def rotated(self) -> Tensor:
        """The queries by the formula, which stores keys and values in `theirs`."""
        q, k, v = self.qkv.split(self.split, 2)
        given = self.norms.q, self.norms.k
        q, k = (
            t if norm is None else F.rms_norm(t, norm.shape, norm, self.norms.eps)
            for t, norm in zip((q, k), given, strict=True)
        )
        self.theirs.store(self.pos, RotaryPositions.rotate(k, self.rotation), v)
        return RotaryPositions.rotate(q, self.rotation)

    def check_cache(self) -> None:
        tolerance = 1e-6 + 2 * ROUNDING[self.qkv.dtype]
        for a, b in zip(self.mine.buffers(), self.theirs.buffers(), strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            a, b = a.nan_to_num(), b.nan_to_num().float()
            near(a, b, tolerance, b.abs().clamp_min(1.0) * 2, self.case)

    def check_attention(self, softcap: float | None) -> None:
        """All in one kernel, as numbers and, of one row, as fixed point."""
        S, q = self.mine.k.shape[1] - 1, self.rotated()
        mask = torch.zeros(*self.pos.shape, S)
        mask.masked_fill_(hidden_keys(self.pos, torch.arange(S), None), -math.inf)
        mask = mask.repeat(1, self.split[0] // self.split[1], 1).unsqueeze(1)
        formula = partial(F.scaled_dot_product_attention, scale=0.3)
        if softcap is not None:
            formula = partial(attend_capped, scale=0.3, softcap=softcap)
        k, v = (t.nan_to_num().float() for t in self.theirs.visible(S))
        wanted = grouped_attention(formula, q.float(), k, v, mask)
        given = self.qkv, self.rotation, self.norms, self.pos, (*self.mine.buffers(),), S
        found = launch_attention.attend_new_tokens(*given, (0.3, softcap))
        tolerance = 1e-5 + 8 * ROUNDING[self.qkv.dtype]
        near(found, wanted, tolerance, wanted.abs().max().item(), self.case)
        self.check_cache()
        rows = found.flatten(0, 1).flatten(1)  # (B * T, H * E)
        spans = [Spans(rows.shape[1], n, size) for n in (4, 8) for size in (64, 512)]
        for form in (INT4, INT8, *spans):
            one_row = isinstance(form, Order)
            fits = launch_attention.can_convert(form, self.qkv, k.shape[2])
            if fits and (len(rows) == 1 or not one_row):
                NewTokens.converted += 1
                mine = launch_attention.attend_new_tokens(*given, (0.3, softcap), form)
                theirs = fixed_point(rows[0], form) if one_row else launch.scaled_rows(rows, form)
                for a, b in zip(mine, theirs, strict=True):
                    # A GPU may add in another order, and round to another number.
                    assert torch.equal(a, b) or not launch.INTERPRETED, (self.case, form)
                size = rows.float().abs().max().item()
                near(numbers_of(mine), numbers_of(theirs), tolerance, size, (self.case, form))
        assert not launch.arrivals(k.device).any(), "counters are not back at 0"


def numbers_of(x: FixedPoint | ScaledRows) -> Tensor:
    """The converted numbers, in the order in which they are stored."""
    if isinstance(x, FixedPoint):
        return x.q * x.units[:, None]  # (planes, C, 8)
    numbers = x.numbers.float().transpose(1, 2).flatten(1)  # (M, K)
    return numbers * x.units.repeat_interleave(numbers.shape[1] // x.units.shape[1], 1)


def rotate(seed: int, cases: int) -> None:
    """Norms of heads, rotary positions and the store of keys and values."""
    for _ in range(cases):
        sizes = {
            "B": (1, 3),
            "T": (1, 2, 5),
            "G": (1, 2),
            "R": (1, 4),
            "E": (8, 64, 80),
            "S": (20,),
        }
        sizes = {name: random.choice(some) for name, some in sizes.items()}
        tokens = NewTokens(sizes, random.choice(DTYPES), random.random() < 0.5)
        given = tokens.qkv, tokens.rotation, tokens.norms, tokens.pos
        found, wanted = (
            launch_attention.rotate_and_store(*given, *tokens.mine.buffers()),
            tokens.rotated(),
        )
        tolerance = 1e-6 + 2 * ROUNDING[found.dtype]
        near(found, wanted.float(), tolerance, wanted.float().abs().clamp_min(1.0) * 2, tokens.case)
        tokens.check_cache()


def new_tokens(seed: int, cases: int) -> None:
    """Norms, rotation, store and causal attention in one kernel."""
    for _ in range(cases):
        sizes = {
            "B": (1, 1, 3), "T": (1, 1, 2, 6), "G": (1, 2), "R": (1, 3, 4, 16),
            "E": (8, 24, 32, 64, 80, 96, 128), "S": (8, 64, 70, 129, 300),
        }  # fmt: skip
        # Few programs take several steps each, as programs of a long cache do.
        launch_attention.ATTENTION_PROGRAMS = random.choice([1, 4, 128])
        sizes = {name: random.choice(some) for name, some in sizes.items()}
        # The interpreter's products of bfloat16 matrices multiply their bits as integers.
        dtypes = (torch.float32, torch.float16) if launch.INTERPRETED else DTYPES
        tokens = NewTokens(sizes, random.choice(dtypes), random.random() < 0.5)
        tokens.check_attention(random.choice([None, 0.5, 50.0]))
    assert NewTokens.converted >= cases // 2


def loops(seed: int, cases: int) -> None:
    """GPTQ's loops over columns."""
    for _ in range(cases):
        N, C = random.choice([3, 8, 20]), random.choice([5, 32, 64])
        weight, scales = torch.randn(N, C + 9)[:, :C], torch.rand(N, C) * 0.2 + 0.05
        zeros = torch.randint(16, (N, C)).float()
        inputs = torch.randn(4 * C, C)
        hessian = inputs.t() @ inputs
        factor = gptq.inverse_factor(hessian)
        q, errors = columns.round_columns(weight, factor, scales, zeros)
        wanted = gptq.round_columns(weight, factor, scales, zeros)
        assert (q != wanted[0]).float().mean() < 0.01  # a tie may fall either way
        near(errors[q == wanted[0]], wanted[1][q == wanted[0]], 1e-3, 1.0, (N, C))
        slope = torch.randn(N, C)
        found = columns.refine_columns(slope, hessian, q, scales, zeros)
        wanted = gptq.refine_columns(slope, hessian, q, scales, zeros)
        assert (found[0] != wanted[0]).float().mean() < 0.01


SMALL = ModelArgs(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=40,
    context=80, embed_dim=64, layer_types=(LayerType(Rope(16)), LayerType(Rope(16), window=9)),
)  # fmt: skip


def model_logits(model: Transformer, kv_dtype: str | None) -> list[Tensor]:
    """Of a prompt of 20 tokens and a step of one token; the same of two rows and 2 tokens each. A
    last step of 8 tokens goes round the ring of 28 slots."""
    model.cache_factory = replace(model.cache_factory, make=find_cache(kv_dtype))
    key_pos, tokens, found = torch.arange(70), torch.randint(40, (2, 30)), []
    for rows in (1, 2):
        caches = model.make_caches(rows, 70)
        pos = key_pos[:20].expand(rows, 20)
        found.append(model(tokens[:rows, :20], pos, key_pos[:64], caches))
        for first, last in ((20, 20 + rows), (20 + rows, 28 + rows)):
            pos = key_pos[first:last].expand(rows, last - first)
            found.append(model(tokens[:rows, first:last], pos, key_pos[:64], caches))
    return found


@torch.inference_mode()
def model(seed: int, cases: int) -> None:
    """A small model with everything that a GPU's would have, beside the plain one."""
    if launch.INTERPRETED:
        for name, on_gpu in (
            ("int4_linear", gpu.int4_product),
            ("int8_linear", gpu.int8_product),
            ("dense_row", gpu.dense_row),
            ("attend", gpu_products.attend_on_gpu),
            ("attend_and_project", gpu_products.attend_and_project),
        ):
            torch.library.impl(f"gpt_flex::{name}", "cpu")(on_gpu)
    kv_cache.WINDOW_SLACK = 19
    gpu.suits_few_rows = lambda dtype: True  # float32 by the kernel for few rows, too
    for case in itertools.islice(itertools.cycle(CASES_OF_MODEL), cases):
        mode, kv_dtype, softcap, qk_norm = case
        dense = random_model(replace(SMALL, attention_softcap=softcap, qk_norm=qk_norm))
        whole = quantized_copy(dense, make_scheme(mode)) if mode else dense
        gpu.supports = lambda x: False
        torch.manual_seed(seed)
        wanted = model_logits(shallow_copy(whole), kv_dtype)
        gpu.supports = lambda x: True
        fast = shallow_copy(whole)
        gpu_products.replace_layers(fast)
        torch.manual_seed(seed)
        for mine, oracle in zip(model_logits(fast, kv_dtype), wanted, strict=True):
            near(mine, oracle, 0.01, oracle.abs().max().item(), case)
        if mode:
            assert all(isinstance(layer, gpu_products.GPUBlock) for layer in fast.layers)


def random_model(args: ModelArgs) -> Transformer:
    model = Transformer(args).to(DEVICE).eval()  # rotary tables begin on the CPU
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.dim() == 1 else 0, 0.1)
    return model


# Mode of the weights, dtype of the cache, softcap of the scores, norms of heads.
CASES_OF_MODEL = (
    ("int4", None, None, "head"),
    ("int8", "int8", None, "none"),
    (None, "int4", 0.5, "none"),
    ("int8", None, 0.5, "none"),
    ("int4", None, None, "whole"),
    ("int4", "int8", None, "none"),
    (None, None, 0.5, "head"),
)


ALIGNED = [["tt.divisibility", 16]]
INTEGERS = {
    "N", "K", "C", "M", "W", "T", "H", "G", "S", "Kp", "P", "Z",
    "weight_stride", "scale_stride", "zero_stride",
    "x_stride", "batch_stride", "slot_stride", "slope_stride", "factor_stride",
    "hessian_stride",
}  # fmt: skip
SMALL_INTEGERS = "M", "T", "H", "G", "S", "batch_stride", "slot_stride"  # not multiples of 16
NUMBERS = "factor", "cap", "eps"  # round_kernel's factor is a matrix
POINTERS = {
    "pairs": "i32", "units": "fp32", "sums": "i32", "zeros": "u8", "bias": "bf16", "out": "bf16",
    "x": "bf16", "parts": "fp32", "arrived": "i32", "tops": "fp32", "q": "bf16", "k": "bf16",
    "v": "bf16", "k_scales": "fp16", "k_lows": "fp16", "v_scales": "fp16", "v_lows": "fp16",
    "pos": "i64", "mask": "bf16", "norm": "bf16", "factor": "fp32", "hessian": "fp32",
    "better": "fp32", "steps": "fp32", "qkv": "bf16", "cos": "fp32", "sin": "fp32",
    "residual": "bf16", "q_norm": "bf16", "k_norm": "bf16",
}  # fmt: skip


def product_kernels(
    pdl: bool,
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Name, kernel, its pointers' types where they differ from POINTERS, constants, warps, stages:
    of all products with the tiles that they are launched with."""
    common = {"HAS_BIAS": True, "ADDS": True, "PDL": pdl}
    for kind, weight, scales in (
        ("int4", "i32", "fp16"),
        ("int8", "i32", "fp32"),
        ("dense", "bf16", ""),
    ):
        kernel = getattr(one_row, f"{kind}_kernel")
        for shape, tile in ONE_ROW[kind].items():
            constants = common | {"BN": tile.outputs, "BC": tile.chunks}
            constants |= {} if kind == "dense" else {"PTX": True}
            constants |= {"CHUNKS": 1} if kind == "int4" else {}
            types = {"weight": weight, "scales": scales}
            yield f"one_row.{kind} {shape}", kernel, types, constants, tile.warps, 3
    for kind, scales in (("int4", "fp16"), ("int8", "fp32")):
        kernel = getattr(few_rows, f"{kind}_kernel")
        shapes = {"square": (4096, 4096), "long": (4096, 9000), "wide": (20000, 4096)}
        for (shape, size), rows in itertools.product(shapes.items(), (8, 16, 32, 64)):
            tile = few_rows_tile(kind, rows, *size)
            constants = common | {
                "BN": tile.outputs,
                "BM": rows,
                "SPLITS": tile.splits,
                "PTX": True,
            }
            if kind == "int4":
                constants |= {"WORDS": 4, "GROUPS": tile.words // 4}
            else:
                constants |= {"BW": tile.words}
            types = {"x": "fp16", "weight": "i32", "scales": scales}
            name = f"few_rows.{kind} {shape} {rows}"
            yield name, kernel, types, constants, tile.warps, tile.stages


def other_kernels(pdl: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """The same of what is no product."""
    yield (
        "scale", few_rows.scale_kernel, {"out": "fp16"},
        {"PER_WORD": 8, "SPAN": 256, "NORM": True, "GATED": True, "BLOCK": 4096, "PDL": pdl}, 4, 3,
    )  # fmt: skip
    yield (
        "prologue", inputs.prologue_kernel, {},
        {"NORM": True, "GATED": True, "BK": 4096, "BLOCK": 4096, "PDL": pdl}, 4, 3,
    )  # fmt: skip
    yield (
        "fixed_point", to_fixed_point.fixed_point_kernel, {"q": "i16"},
        {
            "SIZE": 32, "NIBBLES": 2, "NORM": True, "GATED": True, "BC": 16, "BLOCK": 4096,
            "PDL": pdl,
        }, 4, 3,
    )  # fmt: skip
    yield (
        "rotate", rotation_kernels.rotate_kernel, {},
        {"E": 128, "BE": 128, "P": 64, "NORM": True, "PDL": pdl}, 1, 3,
    )  # fmt: skip
    yield (
        "unpack.int8", unpack.int8_kernel, {"weight": "i8", "scales": "fp32"},
        {"BN": 1, "BK": 4096, "PDL": pdl}, 4, 3,
    )  # fmt: skip
    yield (
        "unpack.int4", unpack.int4_kernel, {"weight": "u8", "scales": "fp16"},
        {"HALF": 16, "BN": 1, "GROUPS": 128, "PDL": pdl}, 4, 3,
    )  # fmt: skip
    for name in ("round", "refine"):
        types = dict.fromkeys(("weight", "scales", "zeros", "q", "errors", "slope"), "fp32")
        kernel = getattr(columns, f"{name}_kernel")
        yield f"columns.{name}", kernel, types, {"ROWS": columns.ROWS_PER_PROGRAM, "BC": 128}, 4, 3


def attention_kernels(
    pdl: bool,
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """The same of attention, of new tokens and of others."""
    shapes = (
        (64, 16, 32, 0), (128, 16, 32, 0), (128, 16, 16, 0), (128, 16, 0, 0), (256, 16, 16, 0),
        (128, 16, 512, 8), (128, 32, 256, 4), (256, 16, 512, 8),
    )  # fmt: skip
    for (E, rows, size, per_word), norm in itertools.product(shapes, (False, True)):
        constants = {
            "R": 4, "E": E, "BE": E, "P": E // 2, "BQ": rows, "BS": 64, "STEPS": 2, "SPLITS": 3,
            "SIZE": size, "PER_WORD": per_word, "DOT": tl.bfloat16, "NORM": norm, "CAPPED": False,
            "PDL": pdl,
        }  # fmt: skip
        types = {"out": "fp16" if per_word else "i16"} if size else {}
        name, warps = (
            f"new_tokens {E} {rows} {size} {norm}",
            launch_attention.attention_warps(E, True),
        )
        yield name, new_tokens_kernels.new_tokens_kernel, types, constants, warps, 3
    shapes = (128, 16, True), (256, 16, True), (128, 16, False), (256, 32, False)
    for bits, (E, rows, causal) in itertools.product((16, 8, 4), shapes):
        constants = {
            "R": 4, "E": E, "BE": E, "GROUP": 32, "BITS": bits, "BQ": rows, "BS": 64, "STEPS": 2,
            "SPLITS": 3, "DOT": tl.bfloat16, "CAUSAL": causal, "CAPPED": not causal, "PDL": pdl,
        }  # fmt: skip
        types = dict.fromkeys("kv", "bf16" if bits == 16 else "u8")
        name = f"attention {bits} {E} {rows} {'causal' if causal else 'masked'}"
        warps = launch_attention.attention_warps(E, causal)
        yield name, attention.attention_kernel, types, constants, warps, 3


def compile_all(capability: int) -> None:
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    pdl = capability >= 90
    for name, kernel, types, constants, warps, stages in (
        *product_kernels(pdl),
        *other_kernels(pdl),
        *attention_kernels(pdl),
    ):
        signature: dict[str, str] = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in NUMBERS and not kernel.fn.__name__.startswith("round"):
                signature[argument] = "fp32"
            elif argument in INTEGERS and argument not in types:
                signature[argument] = "i32"
            else:
                signature[argument] = "*" + types.get(argument, POINTERS.get(argument, ""))
        attributes = {
            (n,): ALIGNED
            for n, a in enumerate(kernel.arg_names)
            if signature[a] not in ("constexpr", "fp32") and a not in SMALL_INTEGERS
        }
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=target, options=options)
        print(json.dumps({"kernel": name, **resources(compiled.asm["cubin"])}), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes that it keeps in memory instead, read off a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = dict(
        word.split(":") for word in text.split() if word.count(":") == 1 and word[-1] != ":"
    )
    return {"registers": int(words["REG"]), "stack": int(words["STACK"])}


def main(what: str, *numbers: str) -> None:
    if what == "compile":
        compile_all(int(numbers[0]))
        return
    seed, cases = map(int, numbers)
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.set_default_device(DEVICE)
    checks = {"products": products, "attention": attend, "model": model, "loops": loops}
    (checks | {"rotate": rotate, "new_tokens": new_tokens})[what](seed, cases)
    print(f"{cases} cases of {what}, seed {seed}: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])

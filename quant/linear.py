"""Linear layers with int8 or int4 weights, as a checkpoint stores them.

Start at Int4Linear. A layer multiplies by its weights with the kernels of kernels/gpu on a GPU that
has them, else in plain PyTorch, which runs on every device and is the reference that these kernels
and fast_layers/cpu.py are tested against. fast_layers/cpu.py replaces the layers by others, which
hold the same integers in another order. `swap_linears` puts the layers into a model. A scheme, a
dict that a quantised file holds, says which linears have how many bits (make_scheme).

int8: symmetric, one scale per output channel: w = q * scale. int4: asymmetric, one scale and one
zero point per group of inputs: w = (q - zero) * scale, with an integer zero point as in GPTQ (arXiv
2210.17323) and AWQ (2306.00978). A grid is the scales and the zero points of a weight, float32
(N, P) each. A nibble is half a byte, an integer 0 to 15.

Shapes: M rows of activations, N out_features, K in_features, S groupsize, P = ceil(K / S) groups of
inputs. A weight has N rows, of which n are handled at once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.files import short_text
from host.torch_private import int8_product, shallow_copy
from kernels import gpu
from layers.args import ModelArgs
from layers.basic import Linear
from model import Transformer

GROUP_SIZES = (32, 64, 128, 256)
MODES = ("int8", "int4", "int4-gptq")  # of quantize.py --mode
HEADS = ("int8", "int4", "dense")  # of quantize.py --head, the output head
ROUNDED_AT_ONCE = 256  # rows of a weight: 3 times as fast as rounding all rows at once
# Weights that `multiply` unpacks to float32 at once: 1 MiB, about a CPU's L2 cache.
UNPACKED_AT_ONCE = 2**18


class QuantizedLinear(nn.Module):
    """A linear, (..., in_features) -> (..., out_features), with integer weights and a dense bias.

    Int8Linear and Int4Linear add the buffers: weight, scales and, for int4, zeros.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weights as floats, (N, K) in dtype."""
        raise NotImplementedError

    def dequantize_by_kernel(self, dtype: torch.dtype) -> Tensor:
        """Return the weights, (N, K), as dequantize does, but by the GPU kernel where it runs.

        For offload.py, which dequantises a layer's weights once for several micro-batches. Compiled
        code must call dequantize: torch.compile cannot trace the kernel's launch.
        """
        return self.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        y = self.on_gpu(rows) if gpu.supports(rows) else self.reference(rows)  # (M, N)
        return y.view(*x.shape[:-1], self.out_features)

    def reference(self, rows: Tensor) -> Tensor:
        """Multiply rows, (M, K), by the weights -> (M, N), in plain PyTorch."""
        if rows.device.type != "cpu":
            return F.linear(rows, self.dequantize(rows.dtype), self.bias)
        # torch.compile would unroll the loop over a weight's rows; it does not look into the
        # operator. Eager code calls the function itself, since the operator computes no gradient.
        product = torch.ops.gpt_flex.multiply if torch.compiler.is_compiling() else multiply
        return product(rows, *self.stored())

    def on_gpu(
        self,
        rows: Tensor,
        prologue: gpu.Prologue = gpu.Prologue(),
        residual: Tensor | None = None,
    ) -> Tensor:
        """Multiply rows, (M, K), by the weights -> (M, N), with the Triton kernels.

        Allowed only if gpu.supports(rows). prologue: a norm or gate that is applied to the rows
        first. Default: none. With a gate, rows are (M, 2 K). residual: (M, N), added to the result.
        """
        return gpu.quantized_linear(rows, *self.stored(), prologue, residual)

    def stored(self) -> gpu.Stored:
        """Return weight, scales, zeros (None: an Int8Linear) and bias."""
        return self.weight, self.scales, getattr(self, "zeros", None), self.bias


class Int8Linear(QuantizedLinear):
    """A linear with int8 weights. weight: (N, K) int8. scales: (N,) float32.

    inputs_per_column: for each buffer whose columns stand for inputs, how many inputs a column
    stands for. tp.py divides the columns of these buffers among ranks.
    """

    inputs_per_column = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scales.unsqueeze(-1)).to(dtype)

    def dequantize_by_kernel(self, dtype: torch.dtype) -> Tensor:
        if not gpu.supports(self.weight):
            return self.dequantize(dtype)
        return gpu.dequantize_int8(self.weight, self.scales, dtype)


class Int4Linear(QuantizedLinear):
    """A linear with int4 weights in groups of `groupsize` inputs.

    weight: (N, P*S/2) uint8. scales: (N, P) float16. zeros: (N, ceil(P/2)) uint8. Two integers of
    weight or zeros share a byte, the first in the low four bits. If K is not a multiple of S, the
    last group is padded; the padding does not contribute to the output. inputs_per_column: see
    Int8Linear.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, groupsize: int):
        super().__init__(in_features, out_features, bias)
        self.groupsize = groupsize
        groups = -(-in_features // groupsize)
        weight = torch.empty(out_features, groups * groupsize // 2, dtype=torch.uint8)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", torch.empty(out_features, groups, dtype=torch.float16))
        zeros = torch.empty(out_features, -(-groups // 2), dtype=torch.uint8)
        self.register_buffer("zeros", zeros)
        self.inputs_per_column = {"weight": 2, "scales": groupsize, "zeros": 2 * groupsize}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weights = dequantize_int4(self.weight, self.scales, self.zeros)  # (N, P*S)
        return weights[:, : self.in_features].to(dtype)

    def dequantize_by_kernel(self, dtype: torch.dtype) -> Tensor:
        if not gpu.supports(self.weight):
            return self.dequantize(dtype)
        return gpu.dequantize_int4(self.weight, self.scales, self.zeros, self.in_features, dtype)


def multiply(
    rows: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Multiply rows, (M, K), by the weights of a quantised linear -> (M, N), plus the bias.

    Returns the dtype of rows. It is also the operator gpt_flex::multiply on the CPU. weight,
    scales, zeros: the buffers of an Int4Linear, or, if zeros is None, of an Int8Linear. Computes in
    float32 (float64 for float64 rows), because on a CPU with AVX2 32 rows take five times as long
    in bfloat16; only int8_product rounds to bfloat16, before its result is scaled.
    """
    x = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if zeros is None and suits_int8_product(rows, weight):
        y = int8_product(rows.contiguous(), weight) * scales
    elif zeros is None:
        y = multiply_int8(x, weight, scales)
    else:
        y = multiply_int4(x, weight, scales, zeros)
    return (y if bias is None else y + bias).to(rows.dtype)


torch.library.define(
    "gpt_flex::multiply",
    "(Tensor rows, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor",
)
torch.library.impl("gpt_flex::multiply", "cpu")(multiply)
torch.library.register_fake("gpt_flex::multiply")(
    lambda rows, weight, *rest: rows.new_empty(rows.shape[0], weight.shape[0])
)


def suits_int8_product(rows: Tensor, weight: Tensor) -> bool:
    """Return whether int8_product (host/torch_private.py) takes these rows, (M, K), and is faster.

    It takes 0.4 to 0.5 of the time of multiply_int8 for one row, 0.5 to 0.9 for 8, 1.3 to 1.8 for
    32. It also rounds to bfloat16 before the product is scaled: a relative error of 2.4e-3, as with
    dense bfloat16 weights (multiply_int8: 1.7e-3). PyTorch's operators for int4 do not suit:
    _weight_int4pack_mm_for_cpu needs a packed copy of the weights and bfloat16 scales (error up to
    3.0e-3), _dyn_quant_matmul_4bit rounds the activations to 8 bits.
    """
    fits = weight.shape[1] % 32 == 0 and weight.is_contiguous()
    return fits and rows.dtype == torch.bfloat16 and len(rows) <= 8 and not rows.requires_grad


def multiply_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Multiply x, (M, K) float32 or float64, by an Int8Linear's weights -> (M, N).

    Multiplies the outputs by the scales: there are fewer outputs than weights.
    """
    parts = weight.split(rows_at_once(weight))  # (n, K) each
    return torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], 1) * scales


def multiply_int4(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Multiply x, (M, K) float32 or float64, by an Int4Linear's weights -> (M, N).

    A weight is (q - zero) * scale, so y = x @ (q * scale).T - sums @ (zero * scale).T, where sums
    has the sum of each group's inputs. The even inputs are multiplied by the low nibbles and the
    odd inputs by the high ones: putting the nibbles in order would take another pass.
    """
    P, n = scales.shape[1], rows_at_once(weight)
    x = F.pad(x, (0, 2 * weight.shape[1] - x.shape[1]))  # (M, P*S)
    even, odd = x[:, 0::2].contiguous(), x[:, 1::2].contiguous()  # (M, P*S/2) each
    scales = scales.to(x.dtype)
    products = [
        F.linear(even, scale_groups(part & 15, part_scales))
        + F.linear(odd, scale_groups(part >> 4, part_scales))
        for part, part_scales in zip(weight.split(n), scales.split(n), strict=True)
    ]
    sums = x.unflatten(1, (P, -1)).sum(2)  # (M, P, S) -> (M, P)
    offsets = scales * unpack_nibbles(zeros)[:, :P]  # (N, P)
    return torch.cat(products, 1) - F.linear(sums, offsets)


def scale_groups(q: Tensor, scales: Tensor) -> Tensor:
    """Multiply integers, (n, P*C), by scales, (n, P) -> (n, P*C) in the scales' dtype.

    C: columns of a group, which share a scale; here S/2.
    """
    groups = q.to(scales.dtype).unflatten(1, (scales.shape[1], -1))  # (n, P, C)
    # In place: one product of integers and floats takes twice as long.
    return groups.mul_(scales.unsqueeze(-1)).flatten(1)


def rows_at_once(weight: Tensor) -> int:
    """Return how many rows of a stored weight `multiply` unpacks at once, at least 1."""
    return max(1, UNPACKED_AT_ONCE // weight.shape[1])


def dequantize_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the weights, (N, P*S) float32, of an Int4Linear from its three buffers.

    The last P*S - K columns are padding, which the caller cuts off.
    """
    P = scales.shape[1]
    q = unpack_nibbles(weight).unflatten(1, (P, -1))  # (N, P, S)
    zeros = unpack_nibbles(zeros)[:, :P].unsqueeze(-1)  # (N, P, 1)
    differences = q.to(torch.int8) - zeros.to(torch.int8)  # -15 to 15; uint8 would wrap
    return (differences * scales.float().unsqueeze(-1)).flatten(1)


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack (..., n) numbers 0 to 15 of any dtype -> (..., ceil(n/2)) uint8, two to a byte.

    The first of a pair is in the low bits. An odd n is padded with a 0.
    """
    q = F.pad(q.to(torch.uint8), (0, q.shape[-1] % 2))
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack (..., n) uint8 -> (..., 2n) numbers 0 to 15, uint8: the inverse of pack_nibbles."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def round_to_nearest(weight: Tensor, linear: QuantizedLinear) -> dict[str, Tensor]:
    """Round a dense weight, (N, K), to nearest. Returns the buffers of a quantised linear by name.

    linear: gives only the kind and the group size; its buffers are not changed, and may be on the
    meta device. Rounds ROUNDED_AT_ONCE rows at a time: the intermediate tensors of a whole weight
    exceed the CPU's caches.
    """
    int4 = isinstance(linear, Int4Linear)
    pieces = [
        round_int4(rows, linear.groupsize) if int4 else round_int8(rows)
        for rows in weight.split(ROUNDED_AT_ONCE)
    ]
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def round_int8(weight: Tensor) -> dict[str, Tensor]:
    """Round a dense weight, (N, K), to nearest. Returns the buffers of an Int8Linear by name.

    The largest weight of a row becomes 127 or -127. A row of zeros has the scale 1.
    """
    largest = weight.float().abs().amax(1)  # (N,)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    q = (weight.float() / scales.unsqueeze(-1)).round().clamp(-127, 127)
    return {"weight": q.to(torch.int8), "scales": scales}


def round_int4(weight: Tensor, groupsize: int) -> dict[str, Tensor]:
    """Round a dense weight, (N, K), to nearest. Returns the buffers of an Int4Linear by name.

    groupsize: S, inputs that share a scale. K need not be a multiple of it.
    """
    scales, zeros = choose_int4_grid(weight, groupsize)  # (N, P) each
    per_input = (t.repeat_interleave(groupsize, 1)[:, : weight.shape[1]] for t in (scales, zeros))
    return pack_int4(nearest_int4(weight.float(), *per_input), scales, zeros, groupsize)


def choose_int4_grid(
    weight: Tensor, groupsize: int, units: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the grid of a weight, (N, K): scales and zero points, float32 (N, P) each.

    The 16 values of a group reach from its smallest weight to its largest and include 0. units:
    (N, 1), see round_scales; None: scale_units computes them. GPTQ passes the units of the whole
    weight when it chooses the grid of one group.
    """
    # The range includes 0 anyway, so the padding does not widen it.
    groups = F.pad(weight.float(), (0, -weight.shape[1] % groupsize))
    groups = groups.unflatten(1, (-1, groupsize))  # (N, P, S)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    exact_scales = (high - low) / 15
    units = scale_units(exact_scales) if units is None else units
    scales = round_scales(exact_scales, units)
    return scales, (-low / scales).round().clamp(0, 15)


def scale_units(scales: Tensor) -> Tensor:
    """Return the unit of each row's scales, (N, P) -> (N, 1) float32: a power of two.

    round_scales rounds the scales of the row to multiples of the unit, of which the largest is 128
    to 255. Such a multiple is exact in float16, and fits into a byte: kernels/cpu stores bytes,
    with which a CPU is 5 % faster than with float16 scales (group size 32). Units are at least
    2**-24, float16's smallest number above 0.
    """
    largest = scales.float().amax(1, keepdim=True)  # (N, 1)
    exponents = largest.frexp().exponent - 8  # frexp: largest = m * 2**exponent, 0.5 <= m < 1
    return torch.ones_like(largest).ldexp(exponents.clamp_min(-24))


def round_scales(scales: Tensor, units: Tensor) -> Tensor:
    """Round scales, (N, P), to multiples of their row's unit, (N, 1): 1 to 255 times the unit.

    At least 1, so that a group of zeros has a scale by which its weights can be divided.
    """
    return (scales / units).round().clamp(1, 255) * units


def nearest_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return integers 0 to 15, as floats, whose values (q - zero) * scale are nearest to weight.

    scales, zeros: broadcast to the shape of weight.
    """
    return (weight / scales + zeros).round().clamp(0, 15)


def pack_int4(q: Tensor, scales: Tensor, zeros: Tensor, groupsize: int) -> dict[str, Tensor]:
    """Return the buffers of an Int4Linear by name, in the dtypes and the layout that it stores.

    q: (N, K), padded here to whole groups. scales, zeros: (N, P). q and zeros are integers 0 to 15,
    of any dtype.
    """
    q = F.pad(q, (0, -q.shape[1] % groupsize))
    return {"weight": pack_nibbles(q), "scales": scales.half(), "zeros": pack_nibbles(zeros)}


def make_scheme(mode: str, groupsize: int = 32, head: str = "int8") -> dict[str, Any]:
    """Return the scheme of a quantised file: {"mode", "linears", "output"}.

    "linears" (all but the output head) and "output" (the output head) are {"bits": 8} or {"bits":
    4, "groupsize": S}; a dense output head is {}. mode: one of MODES; "int4" and "int4-gptq" give
    schemes that differ only in this name. head: one of HEADS. groupsize: of the int4 linears.
    Raises ValueError if groupsize is not one of GROUP_SIZES, unless mode is "int8".
    """
    if mode != "int8" and groupsize not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"groupsize {groupsize} is not one of {sizes}")
    eight, four = {"bits": 8}, {"bits": 4, "groupsize": groupsize}
    output = {"int8": eight, "int4": four, "dense": {}}[head]
    return {"mode": mode, "linears": eight if mode == "int8" else four, "output": output}


def checked_scheme(scheme: Any) -> dict[str, Any] | None:
    """Return the scheme that a file holds, without unknown keys; None (a dense file) stays None.

    scheme: a value read from a file, which may be anything. Raises ValueError if it does not have
    the form of make_scheme's result; its mode may be any text.
    """
    if scheme is None:
        return None
    if not isinstance(scheme, dict) or not isinstance(scheme.get("mode"), str):
        raise ValueError(f"the scheme is {short_text(scheme)}, which names no mode")
    quantised = [{"bits": 8}, *({"bits": 4, "groupsize": size} for size in GROUP_SIZES)]
    for key, allowed in {"linears": quantised, "output": [*quantised, {}]}.items():
        entry = scheme.get(key)
        # `in` below would accept 8.0, and True for a 1: both equal an integer.
        integers = isinstance(entry, dict) and all(type(value) is int for value in entry.values())
        if not integers or entry not in allowed:
            raise ValueError(f"'{key}' of the scheme is {short_text(entry)}")
    return {key: scheme[key] for key in ("mode", "linears", "output")}


def meta_model(args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
    """Build a model on the meta device, which allocates no memory for weights.

    The model gives the names, shapes and dtypes of the tensors; loading fills them later. Its
    linears are quantised as the scheme says. scheme: see make_scheme; None: all linears are dense.
    """
    with torch.device("meta"):
        model = Transformer(args)
        if scheme:
            swap_linears(model, scheme)
    return model


def swap_linears(model: Transformer, scheme: dict[str, Any]) -> None:
    """Replace the linears of a model by quantised ones with uninitialised buffers, as scheme says.

    For a model whose weights are not loaded yet: dense weights are dropped, not rounded.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for name, linear in linears.items():
        if quantized := quantized_linear(linear, layer_scheme(name, scheme)):
            model.set_submodule(name, quantized)


@torch.no_grad()
def quantized_copy(
    model: Transformer, scheme: dict[str, Any], progress: Callable[[int], Any] = lambda nbytes: None
) -> Transformer:
    """Return a copy of a loaded model with linears quantised by rounding to nearest.

    It is the draft model of --draft self-int8 and self-int4. It shares all other tensors, biases
    included, with the model. Linears that are quantised already are dequantised and rounded again.
    progress: called after each linear with the bytes of its new buffers.
    """
    copied = shallow_copy(model)
    for name, linear in list(copied.named_modules()):
        if not isinstance(linear, Linear | QuantizedLinear):
            continue
        with torch.device("meta"):
            rounded = quantized_linear(linear, layer_scheme(name, scheme))
        if rounded:
            dense = (
                linear.weight if isinstance(linear, Linear) else linear.dequantize(torch.float32)
            )
            for key, buffer in round_to_nearest(dense, rounded).items():
                setattr(rounded, key, buffer)
            rounded.bias = linear.bias
            copied.set_submodule(name, rounded)
            progress(sum(buffer.nbytes for buffer in rounded.buffers()))
    return copied.eval()


def quantized_bytes(model: Transformer) -> int:
    """Return the bytes of the buffers of a model's quantised linears, without their biases."""
    linears = (m for m in model.modules() if isinstance(m, QuantizedLinear))
    return sum(buffer.nbytes for linear in linears for buffer in linear.buffers())


def layer_scheme(name: str, scheme: dict[str, Any]) -> dict[str, Any]:
    """Return a scheme's entry for one linear: bits and group size, or {} if it stays dense.

    name: of the linear in the model. The output head is the module "output", or lies in it (tp.py).
    """
    return scheme["output" if name.partition(".")[0] == "output" else "linears"]


def quantized_linear(linear: Linear, entry: dict[str, Any]) -> QuantizedLinear | None:
    """Return a quantised linear of a linear's shape, with uninitialised buffers and bias.

    They are on the current default device: callers use `with torch.device("meta")` to allocate no
    memory. linear: gives the shape only. entry: from layer_scheme. Returns None for an entry {}:
    the linear stays dense.
    """
    shape = linear.in_features, linear.out_features, linear.bias is not None
    if entry.get("bits") == 4:
        return Int4Linear(*shape, entry["groupsize"])
    return Int8Linear(*shape) if entry.get("bits") == 8 else None

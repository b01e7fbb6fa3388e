"""Linear layers with int8 or int4 weights, as a checkpoint stores them.

Start at Int4Linear. A layer knows the numbers that its integers stand for (`dense`) and multiplies
by them in plain PyTorch. That runs everywhere and is the oracle of the faster products: those of
kernels/gpu, which read the same tensors, and those of cpu_products.py, which pack them anew.
`swap_linears` puts such layers into a model, as a checkpoint's scheme says.

int8: symmetric, a scale per output channel: w = q * scale. int4: asymmetric, a scale and a zero
point per group of inputs: w = (q - zero) * scale, the zero point an integer as in GPTQ and AWQ.

Shapes: M rows, N out_features, K in_features, S groupsize, P = ceil(K / S) groups.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.files import short_text
from host.torch_private import shallow_copy
from kernels import gpu
from model import Linear, ModelArgs, Transformer

GROUP_SIZES = (32, 64, 128, 256)
MODES = ("int8", "int4", "int4-gptq")
HEADS = ("int8", "int4", "dense")
ROWS = 256  # that are rounded together: nearly three times as fast as all


class QuantizedLinear(nn.Module):
    """(..., in_features) -> (..., out_features), by weights of fewer bits; the bias stays dense."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights that the integers stand for, (N, K)."""
        raise NotImplementedError

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The same, by a kernel where there is one. Not for compiled code."""
        return self.dense(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        y = self.on_gpu(rows) if gpu.serves(rows) else self.plain(rows)  # (M, N)
        return y.view(*x.shape[:-1], self.out_features)

    def plain(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.dense(rows.dtype), self.bias)

    def on_gpu(self, rows: Tensor, prologue: gpu.Prologue = gpu.Prologue()) -> Tensor:
        """The same by the kernels for GPUs, (M, K) -> (M, N)."""
        raise NotImplementedError

    def takes_prologue(self) -> bool:
        """Whether one row on a GPU may come with a prologue."""
        return True


class Int8Linear(QuantizedLinear):
    """weight: (N, K) int8. scales: (N,) float32."""

    inputs_per_column = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scales.unsqueeze(-1)).to(dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        if not gpu.serves(self.weight):
            return self.dense(dtype)
        return gpu.int8_dense(self.weight, self.scales, dtype)

    def on_gpu(self, rows: Tensor, prologue: gpu.Prologue = gpu.Prologue()) -> Tensor:
        return gpu.int8_linear(rows, self.weight, self.scales, self.bias, prologue)

    def takes_prologue(self) -> bool:
        return gpu.aligned(self.weight, gpu.INT8.size)


class Int4Linear(QuantizedLinear):
    """weight: (N, P*S/2) uint8. scales: (N, P) float16. zeros: (N, ceil(P/2)) uint8.

    Two numbers share a byte, the first in the low four bits. Inputs beyond K, where K is no
    multiple of the group, are stored and not looked at.
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

    def dense(self, dtype: torch.dtype) -> Tensor:
        weights = dense_int4(self.weight, self.scales, self.zeros)  # (N, P*S)
        return weights[:, : self.in_features].to(dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        if not gpu.serves(self.weight):
            return self.dense(dtype)
        return gpu.int4_dense(self.weight, self.scales, self.zeros, self.in_features, dtype)

    def on_gpu(self, rows: Tensor, prologue: gpu.Prologue = gpu.Prologue()) -> Tensor:
        return gpu.int4_linear(rows, self.weight, self.scales, self.zeros, self.bias, prologue)


def dense_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The buffers of an Int4Linear -> (N, P*S) float32."""
    P = scales.shape[1]
    q = unpack_nibbles(weight).unflatten(1, (P, -1))  # (N, P, S)
    zeros = unpack_nibbles(zeros)[:, :P].unsqueeze(-1)  # (N, P, 1)
    return ((q.to(torch.int8) - zeros.to(torch.int8)) * scales.float().unsqueeze(-1)).flatten(1)


def pack_nibbles(q: Tensor) -> Tensor:
    """(..., n) of 0 to 15 -> (..., ceil(n/2)) uint8, the first of a pair in the low four bits."""
    q = F.pad(q.to(torch.uint8), (0, q.shape[-1] % 2))
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 2n) of 0 to 15."""
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2)


def nearest(weight: Tensor, linear: QuantizedLinear) -> dict[str, Tensor]:
    """(N, K) -> buffers for such a linear, by name.

    A few rows at a time, as what rounding a matrix leaves behind outgrows the caches.
    """
    int4 = isinstance(linear, Int4Linear)
    pieces = [
        round_int4(rows, linear.groupsize) if int4 else round_int8(rows)
        for rows in weight.split(ROWS)
    ]
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def round_int8(weight: Tensor) -> dict[str, Tensor]:
    """(N, K) -> the nearest Int8Linear: its buffers by name."""
    most = weight.float().abs().amax(1)  # (N,)
    scales = torch.where(most > 0, most / 127, 1.0)
    q = (weight.float() / scales.unsqueeze(-1)).round().clamp(-127, 127)
    return {"weight": q.to(torch.int8), "scales": scales}


def round_int4(weight: Tensor, groupsize: int) -> dict[str, Tensor]:
    """(N, K) -> the nearest Int4Linear, group by group: its buffers by name."""
    scales, zeros = int4_grid(weight, groupsize)  # (N, P) each
    wide = (t.repeat_interleave(groupsize, 1)[:, : weight.shape[1]] for t in (scales, zeros))
    return store_int4(nearest_int4(weight.float(), *wide), scales, zeros, groupsize)


def int4_grid(weight: Tensor, groupsize: int, units: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 (N, P), whose 16 values span each group of (N, K) and zero.

    units: what scales are multiples of, see scale_units; None: those of these groups.
    """
    groups = F.pad(weight.float(), (0, -weight.shape[1] % groupsize))
    groups = groups.unflatten(1, (-1, groupsize))  # (N, P, S); what is padded is 0, as is w there
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    wanted = (high - low) / 15
    scales = round_scales(wanted, scale_units(wanted) if units is None else units)
    return scales, (-low / scales).round().clamp(0, 15)


def scale_units(scales: Tensor) -> Tensor:
    """(N, P) -> (N, 1) float32: the power of two of which a row's largest scale is 128 to 255.

    As multiples of it scales fit into a byte, which a CPU reads 5 % faster than float16 (at group
    size 32), and are numbers of float16 all the same.
    """
    largest = scales.float().amax(1, keepdim=True)  # (N, 1)
    exponents = largest.frexp().exponent - 8
    return torch.ones_like(largest).ldexp(exponents.clamp_min(-24))


def round_scales(scales: Tensor, units: Tensor) -> Tensor:
    """The nearest multiples, 1 to 255, of the units."""
    return (scales / units).round().clamp(1, 255) * units


def nearest_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The index, 0 to 15 as a float, of the nearest value (index - zero) * scale."""
    return (weight / scales + zeros).round().clamp(0, 15)


def store_int4(q: Tensor, scales: Tensor, zeros: Tensor, groupsize: int) -> dict[str, Tensor]:
    """Indices (N, K), scales and zero points (N, P) -> the buffers of an Int4Linear."""
    q = F.pad(q, (0, -q.shape[1] % groupsize))
    return {"weight": pack_nibbles(q), "scales": scales.half(), "zeros": pack_nibbles(zeros)}


def make_scheme(mode: str, groupsize: int = 32, head: str = "int8") -> dict[str, Any]:
    """What a file says of how it is quantised: {"mode", "linears", "output"}.

    "linears" and "output", the output head, are {"bits": 8}, {"bits": 4, "groupsize": S} or, left
    dense, {}. Raises ValueError for a group size that is not one of GROUP_SIZES.
    """
    if mode != "int8" and groupsize not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"groupsize {groupsize} is not one of {sizes}")
    eight, four = {"bits": 8}, {"bits": 4, "groupsize": groupsize}
    output = {"int8": eight, "int4": four, "dense": {}}[head]
    return {"mode": mode, "linears": eight if mode == "int8" else four, "output": output}


def checked_scheme(found: Any) -> dict[str, Any] | None:
    """A scheme as a file has it, see make_scheme. ValueError for anything else."""
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("mode"), str):
        raise ValueError(f"the scheme is {short_text(found)}, which names no mode")
    known = [{"bits": 8}, *({"bits": 4, "groupsize": size} for size in GROUP_SIZES)]
    for key, allowed in {"linears": known, "output": [*known, {}]}.items():
        given = found.get(key)
        whole = isinstance(given, dict) and all(type(value) is int for value in given.values())
        if not whole or given not in allowed:
            raise ValueError(f"'{key}' of the scheme is {short_text(given)}")
    return {key: found[key] for key in ("mode", "linears", "output")}


def skeleton(args: ModelArgs, scheme: dict[str, Any] | None) -> Transformer:
    """The model on the meta device, with the linears that its checkpoint stores."""
    with torch.device("meta"):
        model = Transformer(args)
        if scheme:
            swap_linears(model, scheme)
    return model


def swap_linears(model: Transformer, scheme: dict[str, Any]) -> None:
    """Replace the linears of a model, on the meta device, by those that its checkpoint stores."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for name, linear in linears.items():
        if swapped := quantized_linear(linear, layer_scheme(name, scheme)):
            model.set_submodule(name, swapped)


@torch.no_grad()
def quantized_copy(
    model: Transformer, scheme: dict[str, Any], progress: Callable[[int], Any] = lambda nbytes: None
) -> Transformer:
    """The same model with rounded linears; all else it shares. progress: told of bytes made."""
    copied = shallow_copy(model)
    for name, linear in list(copied.named_modules()):
        if not isinstance(linear, Linear | QuantizedLinear):
            continue
        with torch.device("meta"):
            rounded = quantized_linear(linear, layer_scheme(name, scheme))
        if rounded:
            dense = linear.weight if isinstance(linear, Linear) else linear.dense(torch.float32)
            for key, buffer in nearest(dense, rounded).items():
                setattr(rounded, key, buffer)
            rounded.bias = linear.bias
            copied.set_submodule(name, rounded)
            progress(sum(buffer.nbytes for buffer in rounded.buffers()))
    return copied.eval()


def quantized_bytes(model: Transformer) -> int:
    """What the quantised linears of a model take."""
    linears = (m for m in model.modules() if isinstance(m, QuantizedLinear))
    return sum(buffer.nbytes for linear in linears for buffer in linear.buffers())


def layer_scheme(name: str, scheme: dict[str, Any]) -> dict[str, Any]:
    """What a scheme says of one linear; see make_scheme."""
    return scheme["output" if name.partition(".")[0] == "output" else "linears"]


def quantized_linear(linear: Linear, said: dict[str, Any]) -> QuantizedLinear | None:
    shape = linear.in_features, linear.out_features, linear.bias is not None
    if said.get("bits") == 4:
        return Int4Linear(*shape, said["groupsize"])
    return Int8Linear(*shape) if said.get("bits") == 8 else None

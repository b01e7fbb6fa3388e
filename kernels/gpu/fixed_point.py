"""One row of activations as 16-bit fixed point, in the order in which the one-row kernels read it.

A chunk of 16 or 32 inputs shares a unit, a power of two: x = unit * q with q from -32768 to 32767.
Scaling by a power of two is exact, so a bfloat16 input of at least 1/128 of its chunk's largest
loses nothing, and a smaller one loses at most 2**-16 of the largest. These are PyTorch operations:
the compiler fuses them into whatever computes the activations.

Shapes: K in_features, C chunks = ceil(K / size of a chunk).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent, which begins at bit 23
# A chunk's inputs n as dimensions, slowest first, and the order in which the kernels want them:
# each stored 32-bit word of weights meets pairs of inputs that lie in one 32-bit word, too.
# int8: n = 4 word + 2 half + p; word half of the weights' bytes is multiplied by (x[p=0], x[p=1]).
INT8_SHAPE, INT8_ORDER = (4, 2, 2), (1, 0, 2)  # (word, half, p) -> (half, word, p)
# int4: n = 8 word + 4 half + 2 p + nibble; the low nibbles of a word's bytes are even inputs.
INT4_SHAPE, INT4_ORDER = (4, 2, 2, 2), (3, 1, 0, 2)  # (word, half, p, nibble) -> (nibble, half, ..)


class FixedPoint(NamedTuple):
    """q: (C, size) int16. units: (C,) float32. sums: (C,) int32, of each chunk's q."""

    q: Tensor
    units: Tensor
    sums: Tensor


def for_int8(x: Tensor) -> FixedPoint:
    """(K,) -> chunks of 16 inputs."""
    return fixed_point(x, INT8_SHAPE, INT8_ORDER)


def for_int4(x: Tensor) -> FixedPoint:
    """(K,) -> chunks of 32 inputs."""
    return fixed_point(x, INT4_SHAPE, INT4_ORDER)


def fixed_point(x: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> FixedPoint:
    """(K,) of any float dtype -> chunks of `shape`, their dimensions in another order.

    A chunk with an infinite or NaN input has the unit NaN, so that its products are NaN.
    """
    size = 1
    for length in shape:
        size *= length
    x = F.pad(x.float(), (0, -x.shape[0] % size)).view(-1, *shape)  # (C, *shape)
    x = x.permute(0, *(1 + n for n in order)).flatten(1)  # (C, size)
    exponents = x.abs().amax(1).view(torch.int32) & EXPONENT  # (C,)
    # The largest |q| is then 2**14 to 2**15. At least 2**-111: units stay clear of subnormals.
    units = exponents.clamp_min(30 << 23) - (14 << 23)
    inverses = ((254 << 23) - units).view(torch.float32)
    q = (x * inverses.unsqueeze(1)).round().clamp(-32768, 32767).to(torch.int16)  # (C, size)
    units = torch.where(exponents == EXPONENT, torch.nan, units.view(torch.float32))
    return FixedPoint(q, units, q.sum(1, dtype=torch.int32))


def to_float(fixed: FixedPoint, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The way back: (C * size,) float32, in the order of the inputs."""
    x = fixed.q * fixed.units.unsqueeze(1)  # (C, size)
    x = x.view(-1, *(shape[n] for n in order))
    back = [order.index(n) for n in range(len(order))]
    return x.permute(0, *(1 + n for n in back)).reshape(-1)

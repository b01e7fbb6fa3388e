"""One row of activations as 16-bit fixed point, in the order in which the one-row kernels read it.

A chunk, 16 or 32 inputs whose weights take 16 bytes, shares a unit, a power of two: x = unit * q
with q from -32768 to 32767. Scaling by a power of two is exact, so a bfloat16 input of at least
1/128 of its chunk's largest loses nothing, and a smaller one loses at most 2**-15 of the largest.

This is the formula in PyTorch, the oracle of one_row.fixed_point_kernel.

Shapes: K in_features, C chunks = ceil(K / size of a chunk).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent, which begins at bit 23


class Order(NamedTuple):
    """A chunk's inputs as dimensions, slowest first, and where the kernels want these: planes,
    then chunks, then the rest. Each word of weights meets pairs of inputs that share a word."""

    shape: tuple[int, ...]
    planes: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def size(self) -> int:
        return 16 if len(self.shape) == 3 else 32


# n = 4 word + 2 half + p: half 0's pair is multiplied by the word's low two bytes.
INT8 = Order((4, 2, 2), (1,), (0, 2))
# n = 8 word + 4 half + 2 p + nibble: the low nibbles of a word's bytes are even inputs.
INT4 = Order((4, 2, 2, 2), (3, 1), (0, 2))


class FixedPoint(NamedTuple):
    """q: (planes, C, 8) int16. units: (C,) float32. sums: (C,) int32, of each chunk's q."""

    q: Tensor
    units: Tensor
    sums: Tensor


def fixed_point(x: Tensor, order: Order) -> FixedPoint:
    """(K,) of any float dtype -> 16-bit fixed point.

    A chunk with an infinite or NaN input has the unit NaN, so that its products are NaN.
    """
    x = F.pad(x.float(), (0, -x.shape[0] % order.size)).view(-1, order.size)  # (C, size)
    exponents = x.abs().amax(1).view(torch.int32) & EXPONENT  # (C,)
    # Bits of float32 numbers: of the unit with which the largest |q| is 2**14 to 2**15, at least
    # 2**-111, which keeps it clear of subnormals; and of 1 / unit. Only a float32 input can be
    # rounded up to 2**15, hence the clamp.
    units = exponents.clamp_min(30 << 23) - (14 << 23)
    inverses = ((254 << 23) - units).view(torch.float32)
    q = (x * inverses.unsqueeze(1)).round().clamp(-32768, 32767).to(torch.int16)  # (C, size)
    units = torch.where(exponents == EXPONENT, torch.nan, units.view(torch.float32))
    sums = q.sum(1, dtype=torch.int32)
    q = q.view(-1, *order.shape)  # (C, *shape)
    q = q.permute(*(1 + n for n in order.planes), 0, *(1 + n for n in order.rest))
    return FixedPoint(q.reshape(-1, len(x), 8), units, sums)

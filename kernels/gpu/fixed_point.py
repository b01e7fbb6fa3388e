"""One row of activations as 16-bit fixed point, in the order in which the one-row kernels read it.

Start at fixed_point, in PyTorch: the reference of one_row.fixed_point_kernel.

A chunk is 16 or 32 inputs, whose weights take 16 bytes. Its inputs share a unit, a power of two:
x = unit * q with q from -32768 to 32767. Scaling by a power of two is exact, so a bfloat16 input of
at least 1/128 of its chunk's largest is exact; a smaller one is off by at most 2**-15 of the
largest. A word is 32 bits. A word of weights holds four int8 or eight int4 numbers; a word of the
result holds two numbers q, which multiply two bytes of a word of weights, or one nibble of each of
these bytes. A plane is all q that multiply the same bytes and nibbles of their words: int8 has two
planes (the low two bytes, the high two), int4 four (for low nibbles, then for high ones).

Shapes: K in_features, C chunks = ceil(K / size of a chunk).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent, which begins at bit 23


class Order(NamedTuple):
    """The order of a chunk's inputs: view them as `shape`, then permute to planes, chunks, rest.

    shape: the number of inputs of a chunk, as factors. planes, rest: dimensions of `shape`. In this
    order two inputs that multiply the same word of weights share a 32-bit word.
    """

    shape: tuple[int, ...]
    planes: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def size(self) -> int:
        """Inputs of a chunk."""
        return 16 if len(self.shape) == 3 else 32


# Input n = 4 word + 2 half + p. The pair of half 0 multiplies the low two bytes of the word.
INT8 = Order((4, 2, 2), (1,), (0, 2))
# Input n = 8 word + 4 half + 2 p + nibble. The low nibbles of the bytes are the even inputs.
INT4 = Order((4, 2, 2, 2), (3, 1), (0, 2))


class FixedPoint(NamedTuple):
    """A row of activations. q: (planes, C, 8) int16. units: (C,) float32, of the chunks. sums: (C,)
    int32, the sum of a chunk's q, by which the int4 kernel subtracts the zero points."""

    q: Tensor
    units: Tensor
    sums: Tensor


def fixed_point(x: Tensor, order: Order) -> FixedPoint:
    """Convert (K,) of any float dtype to 16-bit fixed point; the last chunk is padded with zeros.

    order: INT8 or INT4, by the weights that will be multiplied. A chunk with an infinite or NaN
    input gets the unit NaN, so that its products are NaN. The bit arithmetic acts on exponents of
    float32, which are stored plus 127 from bit 23 on: x - (14 << 23) is x / 2**14, and
    (254 << 23) - x is 1 / x for a power of two.
    """
    x = F.pad(x.float(), (0, -x.shape[0] % order.size)).view(-1, order.size)  # (C, size)
    exponents = x.abs().amax(1).view(torch.int32) & EXPONENT  # (C,)
    # The bits of the unit as a float32: the largest |q| is then 2**14 to 2**15. Units are at least
    # 2**-111, so that neither they nor 1 / unit are subnormal. The clamp is for float32 inputs,
    # which can round up to 2**15.
    units = exponents.clamp_min(30 << 23) - (14 << 23)
    inverses = ((254 << 23) - units).view(torch.float32)
    q = (x * inverses.unsqueeze(1)).round().clamp(-32768, 32767).to(torch.int16)  # (C, size)
    units = torch.where(exponents == EXPONENT, torch.nan, units.view(torch.float32))
    sums = q.sum(1, dtype=torch.int32)
    q = q.view(-1, *order.shape)  # (C, *shape)
    q = q.permute(*(1 + n for n in order.planes), 0, *(1 + n for n in order.rest))
    return FixedPoint(q.reshape(-1, len(x), 8), units, sums)

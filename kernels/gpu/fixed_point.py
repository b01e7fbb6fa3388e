"""One row of activations as 16-bit fixed point, in the order in which the one-row kernels read it.

Start at fixed_point, in PyTorch: the reference of to_fixed_point.fixed_point_kernel.

A chunk is 16 (int8) or 32 (int4) inputs, whose weights take 16 bytes. The inputs of a chunk share a
unit, a power of two: x = unit * q with q from -32768 to 32767. Scaling by a power of two is exact,
so a bfloat16 input of at least 1/128 of its chunk's largest is exact; a smaller one is off by at
most 2**-15 of the largest. A word is 32 bits. A word of weights holds four int8 or eight int4
numbers; a word of the result holds a pair of numbers q, which multiply two neighbouring bytes of a
word of weights (int8), or one nibble of each of these bytes (int4). A plane is all q that multiply
the same bytes and nibbles of their words: int8 has two planes (the low two bytes, the high two),
int4 four (for low nibbles, then for high ones, each of the low bytes, then the high ones).

Shapes: K in_features, C chunks = ceil(K / size of a chunk).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent, which begins at bit 23


class Order(NamedTuple):
    """The order of inputs: view each chunk as `shape`, then permute to planes, chunks, rest.

    shape: the number of inputs of a chunk, as factors. planes, rest: the dimensions of `shape` that
    come before and after the dimension of chunks. In this order the two inputs of a pair share a
    32-bit word.
    """

    shape: tuple[int, ...]
    planes: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def size(self) -> int:
        """Inputs of a chunk: the product of `shape`."""
        return 16 if len(self.shape) == 3 else 32


# Input n = 4 word + 2 half + p, p: its place in the pair. The pair of half 0 multiplies the low two
# bytes of the word.
INT8 = Order((4, 2, 2), (1,), (0, 2))
# Input n = 8 word + 4 half + 2 p + nibble. The low nibbles of the bytes multiply the even inputs.
INT4 = Order((4, 2, 2, 2), (3, 1), (0, 2))


class FixedPoint(NamedTuple):
    """A row of activations. q: (planes, C, 8) int16, 8 for four words of two. units: (C,) float32,
    of the chunks. sums: (C,) int32, the sum of each chunk's q: the int4 kernel subtracts the zero
    point times it."""

    q: Tensor
    units: Tensor
    sums: Tensor


def fixed_point(x: Tensor, order: Order) -> FixedPoint:
    """Convert x, (K,) of any float dtype, to 16-bit fixed point; the last chunk is padded with 0.

    order: INT8 or INT4, by the weights that will be multiplied. A chunk with an infinite or NaN
    input gets the unit NaN, so that its products are NaN. The bit arithmetic acts on powers of two
    as the bits of float32, where the exponent plus 127 begins at bit 23: bits - (14 << 23) are
    those of x / 2**14, and (254 << 23) - bits those of 1 / x.
    """
    x = F.pad(x.float(), (0, -x.shape[0] % order.size)).view(-1, order.size)  # (C, size)
    exponents = x.abs().amax(1).view(torch.int32) & EXPONENT  # (C,)
    # The unit's bits: with it the largest |q| of a chunk is 2**14 to 2**15. Units are at least
    # 2**-111, so that they are not subnormal. The clamp of q is for float32 inputs, which can round
    # up to 2**15.
    units = exponents.clamp_min(30 << 23) - (14 << 23)
    inverses = ((254 << 23) - units).view(torch.float32)
    q = (x * inverses.unsqueeze(1)).round().clamp(-32768, 32767).to(torch.int16)  # (C, size)
    units = torch.where(exponents == EXPONENT, torch.nan, units.view(torch.float32))
    sums = q.sum(1, dtype=torch.int32)
    q = q.view(-1, *order.shape)  # (C, *shape): dimension n of shape is dimension 1 + n here
    q = q.permute(*(1 + n for n in order.planes), 0, *(1 + n for n in order.rest))
    return FixedPoint(q.reshape(-1, len(x), 8), units, sums)

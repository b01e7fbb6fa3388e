"""Rows of activations as scaled float16, in the order in which the few-rows kernels read them. Does
not import Triton. few_rows.py says why.

Shapes: M rows, K in_features.
"""

from typing import NamedTuple

from torch import Tensor


class Spans(NamedTuple):
    """How ScaledRows lie in memory for the kernel of a linear.

    width: inputs of a stored row of weights, K or K padded to whole groups. per_word: inputs that a
    word (4 bytes) of weights multiplies, 4 or 8. size: inputs that share a unit, a power of two.
    """

    width: int
    per_word: int
    size: int


class ScaledRows(NamedTuple):
    """Rows of activations. numbers: (M, per_word, width / per_word) float16; input n of a row is at
    (n % per_word, n // per_word). units: (M, ceil(width / size)) float32, powers of two; input n
    has unit n // size, and is its number times its unit."""

    numbers: Tensor
    units: Tensor

"""The norm or gate before a product, and the norms of heads. Does not import Triton."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Prologue(NamedTuple):
    """A function of each row that is applied before a product, within its kernels (inputs.py).

    norm: the weight, (K,), of an RMS norm with eps; None: no norm. gated: a row, (2 K,), becomes
    silu(first half) * second half, (K,). Callers give a norm or a gate, or neither, the default.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    gated: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """Apply it to rows, (M, K) or, if gated, (M, 2 K), in PyTorch -> (M, K): the reference of
        the kernels."""
        if self.norm is not None:
            return F.rms_norm(x, self.norm.shape, self.norm, self.eps)
        if self.gated:
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up
        return x


class HeadNorms(NamedTuple):
    """RMS norms of the heads of queries and keys, which are no prologue: the kernels of rotary
    positions apply them. q, k: the weights, (E,) each, or both None: no norms. eps: added to the
    mean squares."""

    q: Tensor | None = None
    k: Tensor | None = None
    eps: float = 0.0

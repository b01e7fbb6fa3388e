"""Computes a feed-forward layer from the records of some of its neurons.

Start at Products.sums. kernels/cpu/neurons.cpp reads records as they are stored, and of an inactive
neuron only its first row. Elsewhere PyTorch unpacks the records and multiplies by all of them.

Shapes: N rows, D dim, F neurons, C entries of the neuron cache, n records.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import build, layout, unsupported_reason
from neurons.records import Format
from tiers.prefetch import sent

BITS = {"dense": 16, "int8": 8, "int4": 4}  # of a weight

torch.library.define(
    "gpt_flex::neurons",
    "(Tensor x, Tensor records, Tensor? entries, Tensor ids, Tensor bias, Tensor? scales, "
    "int[] fields, int bits, int group) -> (Tensor, int)",
)


def has_kernel(format: Format, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether kernels/cpu/neurons.cpp takes such records. The first call compiles it."""
    if device.type != "cpu" or (format.kind == "dense" and format.dtype != dtype):
        return False
    if unsupported_reason(dtype) or build():
        return False
    return format.dim % layout().chunk == 0 and format.groupsize % layout().chunk == 0


@dataclass(frozen=True)
class Products:
    """The weights of one layer that are not in records, and how to compute with records.

    bias, scales: (F + 1, 1 or 2), of up or of gate and up; the last row belongs to empty entries,
    which are never active. kernel: see has_kernel.
    """

    format: Format
    bias: Tensor
    scales: Tensor | None
    kernel: bool

    @property
    def by_slots(self) -> bool:
        """Whether computing all entries costs no more than reading them, as none is unpacked."""
        return self.kernel or self.format.kind == "dense"

    def sums(
        self, rows: Tensor, records: Tensor, neurons: np.ndarray, some: np.ndarray | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Return the layer's output for rows, (N, D) -> (N, D) float32, and the active neurons.

        records: (C, stride) bytes. neurons: (C,), of each record. some: (n,) entries, None: all.
        """
        index = None if some is None else sent(torch.from_numpy(some), rows.device)
        if self.kernel:
            format, ids = self.format, torch.from_numpy(neurons)
            how = format.starts, BITS[format.kind], format.groupsize
            return torch.ops.gpt_flex.neurons(
                rows, records, index, ids, self.bias, self.scales, *how
            )
        if index is not None:
            records, neurons = taken(records, index), neurons[some]
        ids = sent(torch.from_numpy(neurons), rows.device)
        h = self.hidden(rows, records, ids)  # (N, n)
        down = self.format.rows(records, "down", h.dtype)  # (n, D)
        return (h @ down).float(), (h != 0).any(0).sum()

    def hidden(self, rows: Tensor, records: Tensor, neurons: Tensor) -> Tensor:
        """Return the hidden values of rows: (N, D) -> (N, n)."""
        parts = []
        for n, matrix in enumerate(self.format.matrices[:-1]):
            y = F.linear(rows, self.format.rows(records, matrix, rows.dtype))  # (N, n)
            if self.scales is not None:
                y = y * self.scales[neurons, n]
            parts.append((y + self.bias[neurons, n]).to(rows.dtype))
        h = F.relu(parts[0])
        return h * parts[1] if len(parts) == 2 else h


def taken(records: Tensor, index: Tensor) -> Tensor:
    """Copy records, (C, stride) -> (n, stride) bytes, as words of eight bytes: 40 times as fast."""
    return records.view(torch.int64)[index].view(torch.uint8)


def put(slab: Tensor, index: Tensor, records: Tensor) -> None:
    """Copy records, (n, stride) bytes, from the host or the device to entries of a slab."""
    words = sent(records, slab.device).view(torch.int64)
    slab.view(torch.int64)[index] = words

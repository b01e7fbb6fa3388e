"""What neurons give to rows of a text, by their records: by torch, or by kernels/cpu/neurons.cpp.

Start at Products.sums. On a CPU that has the instructions, records are computed as they lie, and of
neurons that are not active only what tells so is read; elsewhere torch unpacks what is no dense
weight, and multiplies by everything.

Shapes: N rows, D dim, F neurons, C slots, n records.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import build, unsupported_reason
from neurons.records import Format
from tiers.prefetch import to_device

BITS = {"dense": 16, "int8": 8, "int4": 4}  # of a weight, as kernels/cpu/neurons.cpp has it
TOGETHER = 32  # weights that it unpacks together

torch.library.define(
    "gpt_flex::neurons",
    "(Tensor x, Tensor records, Tensor? slots, Tensor ids, Tensor bias, Tensor? scales, "
    "int[] fields, int bits, int group) -> (Tensor, int)",
)


def has_kernel(format: Format, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels/cpu/neurons.cpp computes such records here. The first call builds it."""
    if device.type != "cpu" or format.dim % TOGETHER or format.groupsize % TOGETHER:
        return False
    if format.kind == "dense" and format.dtype != dtype:
        return False
    return not (unsupported_reason(dtype) or build())


@dataclass(frozen=True)
class Products:
    """The products by neurons of one layer.

    bias, scales: (F + 1, 1 or 2), of up or of gate and up; the last neuron stands for an empty
    slot, and is never active. kernel: has_kernel.
    """

    format: Format
    bias: Tensor
    scales: Tensor | None
    kernel: bool

    @property
    def by_slots(self) -> bool:
        """Whether all slots are computed at the cost of their memory, and none is unpacked."""
        return self.kernel or self.format.kind == "dense"

    def sums(
        self, rows: Tensor, records: Tensor, neurons: np.ndarray, some: np.ndarray | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """What neurons give to the rows, (N, D) -> (N, D) float32, and how many are active.

        records: (C, stride) bytes, neurons: (C,) of them; some: (n,) slots, None: all.
        """
        index = None if some is None else to_device(torch.from_numpy(some), rows.device)
        if self.kernel:
            format, ids = self.format, torch.from_numpy(neurons)
            how = format.starts, BITS[format.kind], format.groupsize
            return torch.ops.gpt_flex.neurons(
                rows, records, index, ids, self.bias, self.scales, *how
            )
        if index is not None:
            records, neurons = taken(records, index), neurons[some]
        ids = to_device(torch.from_numpy(neurons), rows.device)
        h = self.hidden(rows, records, ids)  # (N, n)
        down = self.format.rows(records, "down", h.dtype)  # (n, D)
        return (h @ down).float(), (h != 0).any(0).sum()

    def hidden(self, rows: Tensor, records: Tensor, neurons: Tensor) -> Tensor:
        """(N, D) rows -> (N, n): what records of such neurons make of them."""
        parts = []
        for n, matrix in enumerate(self.format.matrices[:-1]):
            y = F.linear(rows, self.format.rows(records, matrix, rows.dtype))  # (N, n)
            if self.scales is not None:
                y = y * self.scales[neurons, n]
            parts.append((y + self.bias[neurons, n]).to(rows.dtype))
        h = F.relu(parts[0])
        return h * parts[1] if len(parts) == 2 else h


def taken(records: Tensor, index: Tensor) -> Tensor:
    """Those of the records, (n, stride) bytes, copied eight bytes at a time: 40 times as fast."""
    return records.view(torch.int64)[index].view(torch.uint8)


def put(slab: Tensor, index: Tensor, records: Tensor) -> None:
    """Let records, (n, stride) bytes, be in those slots of a slab; they may come from the host."""
    words = to_device(records, slab.device).view(torch.int64)
    slab.view(torch.int64)[index] = words

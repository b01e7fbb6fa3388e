"""The feed-forward product of records: by kernels/cpu/neurons.cpp or by torch.

Start at Products.sums. On a CPU with the instructions, the kernel computes records as they lie, and
of an inactive neuron it reads only the row that shows it to be inactive. Elsewhere torch unpacks
quantised weights and multiplies by all of them.

Shapes: N tokens, D dim, F neurons, C entries, n records.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import build, layout, unsupported_reason
from neurons.records import RecordFormat
from tiers.prefetch import to_device

WEIGHT_BITS = {"dense": 16, "int8": 8, "int4": 4}

torch.library.define(
    "gpt_flex::neurons",
    "(Tensor x, Tensor records, Tensor? entries, Tensor ids, Tensor bias, Tensor? scales, "
    "int[] fields, int bits, int group) -> (Tensor, int)",
)


def has_kernel(format: RecordFormat, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether kernels/cpu/neurons.cpp takes such records. The first call compiles it."""
    if device.type != "cpu" or (format.kind == "dense" and format.dtype != dtype):
        return False
    if unsupported_reason(dtype) or build():
        return False
    return format.dim % layout().chunk == 0 and format.groupsize % layout().chunk == 0


@dataclass(frozen=True)
class Products:
    """The products of one layer's neurons.

    bias, scales: (F + 1, 1 or 2), of up or of gate and up; the last neuron stands for an empty
    entry and is never active. kernel: what has_kernel returned.
    """

    format: RecordFormat
    bias: Tensor
    scales: Tensor | None
    kernel: bool

    @property
    def computes_all_entries(self) -> bool:
        """Whether computing every entry costs no more than reading its memory: no unpacking."""
        return self.kernel or self.format.kind == "dense"

    def sums(
        self, x: Tensor, records: Tensor, ids: np.ndarray, entries: np.ndarray | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """(N, D) -> (N, D) float32, summed over entries, and the count of active neurons.

        records: (C, stride) bytes; ids: (C,), the neuron of each; entries: (n,) of them, or None
        for all.
        """
        index = None if entries is None else to_device(torch.from_numpy(entries), x.device)
        if self.kernel:
            format, bits = self.format, WEIGHT_BITS[self.format.kind]
            tensors = records, index, torch.from_numpy(ids), self.bias, self.scales
            layout = format.starts, bits, format.groupsize
            return torch.ops.gpt_flex.neurons(x, *tensors, *layout)
        if index is not None:
            records, ids = gather_records(records, index), ids[entries]
        h = self.hidden(x, records, to_device(torch.from_numpy(ids), x.device))  # (N, n)
        down = self.format.rows(records, "down", h.dtype)  # (n, D)
        return (h @ down).float(), (h != 0).any(0).sum()

    def hidden(self, x: Tensor, records: Tensor, ids: Tensor) -> Tensor:
        """(N, D) -> (N, n): the neurons' activations. ids: (n,), the neuron of each record."""
        parts = []
        for n, matrix in enumerate(self.format.matrices[:-1]):
            y = F.linear(x, self.format.rows(records, matrix, x.dtype))  # (N, n)
            if self.scales is not None:
                y = y * self.scales[ids, n]
            parts.append((y + self.bias[ids, n]).to(x.dtype))
        h = F.relu(parts[0])
        return h * parts[1] if len(parts) == 2 else h


def gather_records(records: Tensor, index: Tensor) -> Tensor:
    """(C, stride) bytes -> (n, stride); 8 bytes at a time, 40 times as fast as single bytes."""
    return records.view(torch.int64)[index].view(torch.uint8)


def scatter_records(cache: Tensor, index: Tensor, records: Tensor) -> None:
    """Write records, (n, stride) bytes, to entries of a cache; records may be on the host."""
    words = to_device(records, cache.device).view(torch.int64)
    cache.view(torch.int64)[index] = words

"""The feed-forward product of records: by kernels/cpu/neurons.h or by torch.

Start at Products.sums. A record holds the weights of one neuron; an entry is memory for one record.
A neuron is active for a token if its ReLU (of gate, or of up in a layer without a gate) is not
zero. On a CPU with a C++ compiler, in bfloat16 and float16, the kernel computes records as they are
stored. Of an inactive neuron it reads only the weights that show it to be inactive: those of gate,
or of up without a gate. Elsewhere torch unpacks quantised weights and multiplies by all of them.

Shapes: N tokens, D dim, F neurons of a layer, C entries of its cache, n records.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import build, layout, unsupported_reason
from neurons.records import RecordFormat
from tiers.prefetch import to_device

WEIGHT_BITS = {"dense": 16, "int8": 8, "int4": 4}  # bits of a weight in the kernel, by kind

torch.library.define(
    "gpt_flex::neurons",
    "(Tensor x, Tensor records, Tensor? entries, Tensor ids, Tensor bias, Tensor? scales, "
    "int[] fields, int bits, int group) -> (Tensor, int)",
)


def has_kernel(format: RecordFormat, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether kernels/cpu/neurons.h can compute records of this format.

    device, dtype: of the activations. False on a GPU, in float32, without a compiler, for dense
    records of another dtype, and if the kernel's chunks do not divide D and the group size. The
    first call compiles the kernels, 25 seconds on two cores, once for a machine.
    """
    if device.type != "cpu" or (format.kind == "dense" and format.dtype != dtype):
        return False
    if unsupported_reason(dtype) or build():  # build returns why it failed, or None
        return False
    return format.dim % layout().chunk == 0 and format.groupsize % layout().chunk == 0


@dataclass(frozen=True)
class Products:
    """Computes the outputs of one feed-forward layer from records of its neurons.

    bias, scales: (F + 1, 1 or 2), for up, or for gate and up; scales are None unless the kind is
    int8. The last row is that of neuron F, which stands for an empty entry and is never active.
    kernel: whether to use the C++ kernel, as has_kernel returned.
    """

    format: RecordFormat
    bias: Tensor
    scales: Tensor | None
    kernel: bool

    @property
    def computes_all_entries(self) -> bool:
        """Whether callers should compute all entries, not only those of predicted neurons: they are
        not unpacked, so computing an entry costs no more than reading its memory."""
        return self.kernel or self.format.kind == "dense"

    def sums(
        self, x: Tensor, records: Tensor, ids: np.ndarray, entries: np.ndarray | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Sum the outputs of neurons in a cache, without the layer's outer scales and biases.

        x: (N, D), the layer's inputs. records: (C, stride) bytes. ids: (C,), the neuron in each
        entry; F for an empty entry, which adds nothing. entries: (n,) entries to compute; None:
        all. Returns the sums, (N, D) float32, and how many neurons were active for at least one
        token, an int by the kernel and a tensor by torch.
        """
        index = None if entries is None else to_device(torch.from_numpy(entries), x.device)
        if self.kernel:
            format, bits = self.format, WEIGHT_BITS[self.format.kind]
            tensors = records, index, torch.from_numpy(ids), self.bias, self.scales
            record_layout = format.starts, bits, format.groupsize
            return torch.ops.gpt_flex.neurons(x, *tensors, *record_layout)
        if index is not None:
            records, ids = gather_records(records, index), ids[entries]
        h = self.hidden(x, records, to_device(torch.from_numpy(ids), x.device))  # (N, n)
        down = self.format.rows(records, "down", h.dtype)  # (n, D)
        return (h @ down).float(), (h != 0).any(0).sum()

    def hidden(self, x: Tensor, records: Tensor, ids: Tensor) -> Tensor:
        """Return the activations of neurons for the inputs x: (N, D) -> (N, n), by torch.

        records: (n, stride) bytes. ids: (n,), the neuron of each record, on x's device: they select
        biases and scales. The activation is ReLU(up), or ReLU(gate) * up in a layer with a gate.
        """
        parts = []
        for n, matrix in enumerate(self.format.matrices[:-1]):
            y = F.linear(x, self.format.rows(records, matrix, x.dtype))  # (N, n)
            if self.scales is not None:
                y = y * self.scales[ids, n]
            parts.append((y + self.bias[ids, n]).to(x.dtype))
        h = F.relu(parts[0])
        return h * parts[1] if len(parts) == 2 else h


def gather_records(records: Tensor, index: Tensor) -> Tensor:
    """Copy some of many records: (C, stride) bytes -> (n, stride). index: (n,), which ones.

    Copies 8 bytes at a time, which is 40 times as fast as single bytes: stride must be a multiple
    of 8. index is on the device of the records.
    """
    return records.view(torch.int64)[index].view(torch.uint8)


def scatter_records(cache: Tensor, index: Tensor, records: Tensor) -> None:
    """Copy records, (n, stride) bytes, into entries of a cache, (C, stride) bytes.

    index: (n,) entries, on the cache's device. The records may be on the host. stride is a multiple
    of 8, because 8 bytes are copied at a time.
    """
    words = to_device(records, cache.device).view(torch.int64)
    cache.view(torch.int64)[index] = words

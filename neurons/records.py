"""Neurons as records of a file, and the cache that says which of them are in memory.

Start at RecordFormat: a neuron's row of the up (and gate) projection and its column of the down
projection are one record, so that one read brings them ("LLM in a flash", arXiv 2312.11514,
section 3.2). A NeuronFile reads batches of records past the page cache, each straight into an entry
of a NeuronCache, which overwrites the least used entries.

Shapes: F neurons of a layer, C entries, D dim, n records.
"""

import errno
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from host.memory import page_aligned
from neurons.uring import IOVEC, REQUEST, Callback, no_op, open_reader, read_request
from quant.linear import dequantize_int4, round_int4, round_int8
from tiers.direct_io import ERRNOS_WITHOUT_O_DIRECT, DirectFile

SECTOR_BYTES = 512  # most disks accept O_DIRECT reads of this size; a block would be wasteful
KINDS = "dense", "int8", "int4"  # of a record's weights
GATED_MATRICES, PLAIN_MATRICES = ("gate", "up", "down"), ("up", "down")
USE_DECAY = 0.98  # a use counts this much less with each later token
MAX_USE_UNIT = 1e100  # float64 sums of larger numbers could overflow
MAX_IOVECS = 1024  # of one request: Linux's IOV_MAX


@dataclass(frozen=True)
class RecordFormat:
    """How a neuron's weights lie in a record: D numbers for each matrix.

    int8: gate and up have a scale for each row, down has one for each output, as in Int8Linear;
    scales stay in memory. int4: groups along D in all matrices, each with its scale and zero in
    the record. The fields' names are also keys of a pack's manifest.
    """

    matrices: tuple[str, ...]  # GATED_MATRICES or PLAIN_MATRICES
    dim: int
    kind: str  # one of KINDS
    dtype: torch.dtype  # of dense weights
    groupsize: int = 64  # of int4
    sector: int = SECTOR_BYTES  # a record's bytes are a multiple of it

    @cached_property
    def fields(self) -> dict[tuple[str, str], tuple[int, int, torch.dtype]]:
        """(matrix, part) -> the part's first byte, count of numbers and dtype."""
        groups = -(-self.dim // self.groupsize)
        parts = {
            "dense": {"weight": (self.dim, self.dtype)},
            "int8": {"weight": (self.dim, torch.int8)},
            "int4": {
                "scales": (groups, torch.float16),
                "weight": (groups * self.groupsize // 2, torch.uint8),
                "zeros": (-(-groups // 2), torch.uint8),
            },
        }[self.kind]
        fields, offset = {}, 0
        for matrix in self.matrices:
            for part, (count, dtype) in parts.items():
                offset += -offset % dtype.itemsize
                fields[matrix, part] = offset, count, dtype
                offset += count * dtype.itemsize
        return fields

    @cached_property
    def starts(self) -> list[int]:
        """First bytes of weights, scales and zeros of each matrix; 0 for an absent part."""
        parts = ("weight", "scales", "zeros")
        return [self.fields.get((m, part), (0,))[0] for m in self.matrices for part in parts]

    @cached_property
    def used(self) -> int:
        """Bytes of a record without its padding."""
        return max(start + count * dtype.itemsize for start, count, dtype in self.fields.values())

    @cached_property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.used // self.sector) * self.sector

    def part(self, records: Tensor, matrix: str, name: str) -> Tensor:
        """(n, stride) bytes -> (n, numbers), a view."""
        start, count, dtype = self.fields[matrix, name]
        return records[:, start : start + count * dtype.itemsize].view(dtype)

    def rows(self, records: Tensor, matrix: str, dtype: torch.dtype) -> Tensor:
        """(n, stride) bytes -> (n, D) numbers; int8 numbers are not scaled."""
        weight = self.part(records, matrix, "weight")
        if self.kind == "int4":
            scales_zeros = (self.part(records, matrix, name) for name in ("scales", "zeros"))
            weight = dequantize_int4(weight, *scales_zeros)[:, : self.dim]
        return weight.to(dtype)

    def pack(self, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """float32 gate and up (F, D), down (D, F) -> records (F, stride) and the scales.

        inner_scales are (F, 1 or 2), of up or of gate and up; outer_scales (D,), of the outputs.
        All are ones unless the kind is int8.
        """
        records = torch.zeros(len(weights["up"]), self.stride, dtype=torch.uint8)
        scales = {m: torch.ones(len(records)) for m in self.matrices[:-1]}
        scales["down"] = torch.ones(self.dim)
        for matrix in self.matrices:
            parts = self._parts(weights[matrix], matrix == "down")
            if self.kind == "int8":
                scales[matrix] = parts.pop("scales")
            for name, value in parts.items():
                self.part(records, matrix, name).copy_(value)
        inner = torch.stack([scales[m] for m in self.matrices[:-1]], 1)  # (F, 1 or 2)
        return records, {"inner_scales": inner, "outer_scales": scales["down"]}

    def _parts(self, weight: Tensor, down: bool) -> dict[str, Tensor]:
        """Quantise one matrix; weights are returned as (F, numbers). down: it is (D, F)."""
        if self.kind == "int8":
            parts = round_int8(weight)
            return parts | {"weight": parts["weight"].T if down else parts["weight"]}
        weight = weight.T if down else weight  # (F, D)
        if self.kind == "int4":
            return round_int4(weight.contiguous(), self.groupsize)
        return {"weight": weight}


class NeuronFile(DirectFile):
    """The records of all layers, layer after layer.

    nbytes, requests: counts of what read_records has read.
    """

    def __init__(self, path: Path, stride: int, depth: int):
        """depth: reads in flight at a time."""
        super().__init__(path)
        self.stride, self.nbytes, self.requests = stride, 0, 0
        self._reader = open_reader(depth)
        self._discard = page_aligned(stride, torch.device("cpu"))  # bytes of unwanted records
        if self.direct and not self._reads_single_records():
            os.close(self._file)
            self._file, self.direct = os.open(path, os.O_RDONLY), False

    def _reads_single_records(self) -> bool:
        """Whether O_DIRECT accepts a read of one record's size."""
        try:
            os.preadv(self._file, [self._discard.numpy()], 0)
        except OSError as error:
            if error.errno not in ERRNOS_WITHOUT_O_DIRECT:
                raise
            return False
        return True

    def read_records(
        self,
        first: int,
        ids: np.ndarray,
        addresses: np.ndarray,
        gap: int,
        overlap: Callback = no_op,
    ) -> None:
        """Read records of ascending ids, counted from the file's byte `first`, to addresses.

        gap: unwanted records that are read and discarded rather than starting another request.
        overlap: called once while reads are in flight. Raises OSError, and ValueError if the file
        has been cut short.
        """
        if not len(ids):
            return overlap()
        discard = self._discard.data_ptr()
        requests, iovecs = build_requests(ids, addresses, first, self.stride, gap, discard)
        self.requests += len(requests)
        self.nbytes += self.stride * len(iovecs)
        results = self._reader.read(self._file, requests, overlap)
        for n in np.flatnonzero(results != self.stride * requests["count"].astype(np.int64)):
            start = (int(requests[n]["iovecs"]) - iovecs.ctypes.data) // IOVEC.itemsize
            end = start + requests[n]["count"]
            self._finish(requests[n], iovecs[start:end], int(results[n]))

    def _finish(self, request: np.void, iovecs: np.ndarray, result: int) -> None:
        """Read the rest of a request that has returned fewer bytes than it asked for."""
        total, done = self.stride * len(iovecs), 0
        while True:
            if result < 0 and -result not in (errno.EINTR, errno.EAGAIN):
                raise OSError(-result, os.strerror(-result), str(self.path))
            done += max(result, 0)
            if done == total:
                return
            if result == 0:
                end = int(request["offset"]) + done
                raise ValueError(f"{self.path} ends at byte {end}: it was cut short")
            n, part = divmod(done, self.stride)
            left, rest = iovecs[n:].copy(), request.copy()
            left["address"][0] += part
            left["nbytes"][0] -= part
            rest["offset"] += done
            rest["iovecs"], rest["count"] = left.ctypes.data, len(left)
            result = read_request(self._file, rest)


def build_requests(
    ids: np.ndarray, addresses: np.ndarray, first: int, stride: int, gap: int, discard: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the requests for NeuronFile.read_records and the iovecs that they point to.

    discard: address of memory for unwanted records. Ids of one request lie between two multiples
    of MAX_IOVECS, so that none has more iovecs than the kernel accepts.
    """
    splits = ids[1:] - ids[:-1] > gap + 1
    splits |= ids[1:] // MAX_IOVECS != ids[:-1] // MAX_IOVECS
    starts = np.concatenate(([0], np.flatnonzero(splits) + 1))  # of requests, as indices of ids
    ends = np.append(starts[1:], len(ids))
    first_ids = ids[starts]
    counts = ids[ends - 1] - first_ids + 1
    first_iovecs = counts.cumsum() - counts
    iovecs = np.empty(counts.sum(), dtype=IOVEC)
    iovecs["address"], iovecs["nbytes"] = discard, stride
    iovecs["address"][ids + np.repeat(first_iovecs - first_ids, ends - starts)] = addresses
    requests = np.empty(len(starts), dtype=REQUEST)
    requests["offset"] = first + first_ids * stride
    requests["iovecs"] = iovecs.ctypes.data + first_iovecs * IOVEC.itemsize
    requests["count"] = counts
    return requests, iovecs


class NeuronCache:
    """Which neuron of a layer each entry holds; the least used entries are overwritten.

    Use is a count that decays with each token (USE_DECAY): at equal size it misses a quarter fewer
    neurons than least recently used does. An entry is empty while it is being filled and stays
    empty if the read fails, so no lookup finds a neuron that is half another's bytes.
    """

    def __init__(self, neurons: int, entries: int, stride: int, device: torch.device):
        self.records = page_aligned(entries * stride, device).view(entries, stride)
        self.empty = neurons  # the id of an empty entry
        self.ids = np.full(entries, self.empty)  # (C,): the neuron of each entry
        self._entry_of = np.full(neurons + 1, -1)
        self._use = np.zeros(neurons + 1)  # in units of the first use: see _age
        self._use[self.empty] = -1
        self._unit = 1.0  # what a use counts now

    def __len__(self) -> int:
        return len(self.ids)

    def clear(self) -> None:
        """Make every entry empty."""
        self._entry_of[:] = -1
        self.ids[:] = self.empty

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids that no entry holds."""
        return ids[self._entry_of[ids] < 0]

    def entries(self, ids: np.ndarray) -> np.ndarray:
        """Return the entries that hold ids; ids that none holds are skipped."""
        entries = self._entry_of[ids]
        return entries[entries >= 0]

    def admit(
        self, ids: np.ndarray, uses: np.ndarray | int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count a use of ascending ids, and empty entries for the ids that none holds.

        Returns ids to read, the entry for each (ascending), and the ids for which no entry is
        left. uses: how many tokens use each id.
        """
        self._age()
        self._use[ids] += uses * self._unit
        entries = self._entry_of[ids]
        present = entries >= 0
        missing, free = ids[~present], len(self) - int(present.sum())
        fitting, rest = missing[:free], missing[free:]
        if not len(fitting):
            return fitting, fitting, rest
        use = self._use[self.ids]  # (C,)
        use[entries[present]] = np.inf
        victims = np.argpartition(use, len(fitting) - 1)[: len(fitting)]
        victims.sort()
        self._entry_of[self.ids[victims]] = -1
        self.ids[victims] = self.empty
        return fitting, victims, rest

    def _age(self) -> None:
        """Let a token pass: later uses count more, which is earlier uses counting less."""
        self._unit /= USE_DECAY
        if self._unit > MAX_USE_UNIT:
            self._use /= self._unit
            self._unit = 1.0

    def commit(self, ids: np.ndarray, entries: np.ndarray) -> None:
        """Record that entries from `admit` have been filled."""
        self.ids[entries] = ids
        self._entry_of[ids] = entries

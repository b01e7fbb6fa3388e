"""Neurons as records of a file, and the cache of the neurons that are in memory.

Start at RecordFormat: a neuron's row of the up (and gate) projection and its column of the down
projection are one record, so that one read brings them ("LLM in a flash", arXiv 2312.11514,
section 3.2). A NeuronFile reads records past the page cache, each straight into an entry (memory
for one record) of a layer's NeuronCache, which overwrites the least used entries. A neuron's id is
its record's position among the records of its layer. A request is a read of a contiguous range of
the file; a gap is the unneeded records between two needed ones that one request still reads. An
iovec is an address and a length: the memory for one record. A pack is the directory with the neuron
file (pack.py).

Shapes: F neurons of a layer, C entries of its cache, D dim, n records.
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

SECTOR_BYTES = 512  # most disks accept O_DIRECT reads of this size; 4096 would waste space
KINDS = "dense", "int8", "int4"  # number formats of the weights in a record
GATED_MATRICES, PLAIN_MATRICES = ("gate", "up", "down"), ("up", "down")
USE_DECAY = 0.98  # the weight of a use is multiplied by this at each later token
MAX_USE_UNIT = 1e100  # float64 sums of larger numbers could overflow
MAX_IOVECS = 1024  # iovecs that Linux accepts in one request (IOV_MAX)


@dataclass(frozen=True)
class RecordFormat:
    """How a neuron's weights lie in a record: D numbers for each matrix.

    int8: gate and up have a scale for each neuron, down has one for each output of the layer, as in
    Int8Linear; all scales stay in memory, not in records. int4: groups along D in all matrices,
    each with its scale and zero point in the record. The fields' names are also keys of a pack's
    manifest.
    """

    matrices: tuple[str, ...]  # GATED_MATRICES or PLAIN_MATRICES
    dim: int
    kind: str  # one of KINDS
    dtype: torch.dtype  # the dtype of dense weights
    groupsize: int = 64  # weights that share a scale and a zero point in int4
    sector: int = SECTOR_BYTES  # bytes; the size of a record is padded to a multiple of it

    @cached_property
    def fields(self) -> dict[tuple[str, str], tuple[int, int, torch.dtype]]:
        """(matrix, part) -> the part's first byte in a record, number of elements, and dtype.

        The matrices lie one after the other, each with its parts: weight, and for int4 also scales
        and zeros. Each part is aligned to its dtype. For int4, D is padded to whole groups, and an
        element of weight and zeros is a byte with two numbers.
        """
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
        """The first bytes of weight, scales and zeros of each matrix, for kernels/cpu/neurons.h.

        Three offsets in the record for each matrix, in the order of `matrices`; 0 for a part that
        this kind does not have.
        """
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
        """Return a part of each record as a view: (n, stride) bytes -> (n, elements of the part).

        name: weight, scales or zeros. matrix: one of `matrices`. Raises KeyError for a part that
        this kind does not have.
        """
        start, count, dtype = self.fields[matrix, name]
        return records[:, start : start + count * dtype.itemsize].view(dtype)

    def rows(self, records: Tensor, matrix: str, dtype: torch.dtype) -> Tensor:
        """Return a matrix's weights in each record: (n, stride) bytes -> (n, D) of `dtype`.

        int4 weights are dequantised. int8 weights are only converted to `dtype`: their scales are
        not in the record. For "down", the result's rows are the matrix's columns, one for each
        neuron.
        """
        weight = self.part(records, matrix, "weight")
        if self.kind == "int4":
            scales_zeros = (self.part(records, matrix, name) for name in ("scales", "zeros"))
            weight = dequantize_int4(weight, *scales_zeros)[:, : self.dim]
        return weight.to(dtype)

    def pack(self, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weights of a layer as records, quantised to this kind; flash.py stores them.

        weights: float32, by the names of the matrices: gate and up (F, D), down (D, F), with the
        neurons in the order of the file. Returns the records, (F, stride) uint8, and the scales
        that stay in memory: inner_scales (F, 1 or 2), for up or for gate and up; outer_scales (D,),
        for the outputs of down. All scales are ones unless the kind is int8.
        """
        records = torch.zeros(len(weights["up"]), self.stride, dtype=torch.uint8)
        scales = {m: torch.ones(len(records)) for m in self.matrices[:-1]}
        scales["down"] = torch.ones(self.dim)
        for matrix in self.matrices:
            parts = self._quantized_parts(weights[matrix], matrix == "down")
            if self.kind == "int8":
                scales[matrix] = parts.pop("scales")
            for name, value in parts.items():
                self.part(records, matrix, name).copy_(value)
        inner = torch.stack([scales[m] for m in self.matrices[:-1]], 1)  # (F, 1 or 2)
        return records, {"inner_scales": inner, "outer_scales": scales["down"]}

    def _quantized_parts(self, weight: Tensor, down: bool) -> dict[str, Tensor]:
        """Return the parts of one matrix by name, quantised unless the kind is dense.

        weight: (F, D), or (D, F) if `down` is true. The parts have a row for each neuron, except
        int8 scales, one for each row of the matrix: (F,), or (D,) for down.
        """
        if self.kind == "int8":
            parts = round_int8(weight)
            return parts | {"weight": parts["weight"].T if down else parts["weight"]}
        weight = weight.T if down else weight  # (F, D)
        if self.kind == "int4":
            return round_int4(weight.contiguous(), self.groupsize)
        return {"weight": weight}


class NeuronFile(DirectFile):
    """The file with the records of all layers, layer after layer.

    nbytes, requests: the bytes and requests of all calls of read_records.
    """

    def __init__(self, path: Path, stride: int, depth: int):
        """Open the file, with O_DIRECT if the disk accepts O_DIRECT reads of one record's size.

        stride: bytes from one record to the next. depth: requests that the disk has at a time. Sets
        the attribute direct: whether O_DIRECT is used; if not, reads go through the page cache.
        """
        super().__init__(path)
        self.stride, self.nbytes, self.requests = stride, 0, 0
        self._reader = open_reader(depth)
        self._discard = page_aligned(stride, torch.device("cpu"))  # for records of gaps
        if self.direct and not self._reads_single_records():
            os.close(self._file)
            self._file, self.direct = os.open(path, os.O_RDONLY), False

    def _reads_single_records(self) -> bool:
        """Return whether O_DIRECT accepts a read of one record's size: some disks need whole
        blocks. Raises OSError for errors that do not concern O_DIRECT."""
        try:
            os.preadv(self._file, [self._discard.numpy()], 0)
        except OSError as error:
            if error.errno not in ERRNOS_WITHOUT_O_DIRECT:
                raise
            return False
        return True

    def read_records(
        self,
        layer_offset: int,
        ids: np.ndarray,
        addresses: np.ndarray,
        gap: int,
        overlap: Callback = no_op,
    ) -> None:
        """Read records of one layer into memory, and wait until all are read.

        layer_offset: byte offset of the layer in the file. ids: (n,) ascending; may be empty.
        addresses: (n,), of the memory for each record, `stride` bytes aligned to a sector. gap:
        the most records between two needed ones that one request still reads, and discards.
        overlap: called once while the disk reads, or alone if there are no ids. Only one thread at
        a time may call this function, because a reader serves one at a time. Raises OSError, and
        ValueError if the file ends before a record does.
        """
        if not len(ids):
            return overlap()
        discard = self._discard.data_ptr()
        requests, iovecs = build_requests(ids, addresses, layer_offset, self.stride, gap, discard)
        self.requests += len(requests)
        self.nbytes += self.stride * len(iovecs)
        results = self._reader.read(self._file, requests, overlap)
        # A signal or the kernel's limits can end a request early. `start` is the index of the
        # request's first iovec, from its address.
        for n in np.flatnonzero(results != self.stride * requests["count"].astype(np.int64)):
            start = (int(requests[n]["iovecs"]) - iovecs.ctypes.data) // IOVEC.itemsize
            end = start + requests[n]["count"]
            self._complete_request(requests[n], iovecs[start:end], int(results[n]))

    def _complete_request(self, request: np.void, iovecs: np.ndarray, result: int) -> None:
        """Read the remaining bytes of a request that ended early.

        request: a row of REQUEST; iovecs: its ranges of memory, one record each. result: the bytes
        that it read, or a negative errno. Raises OSError for an error of the disk, and ValueError
        if the file ends before the request does.
        """
        total, done = self.stride * len(iovecs), 0  # bytes; done: read so far
        while True:
            if result < 0 and -result not in (errno.EINTR, errno.EAGAIN):
                raise OSError(-result, os.strerror(-result), str(self.path))
            done += max(result, 0)
            if done == total:
                return
            if result == 0:
                end = int(request["offset"]) + done
                raise ValueError(f"{self.path} ends at byte {end}: it was cut short")
            # n records are complete, and `part` bytes of the next one are read.
            n, part = divmod(done, self.stride)
            unread, remainder = iovecs[n:].copy(), request.copy()
            unread["address"][0] += part
            unread["nbytes"][0] -= part
            remainder["offset"] += done
            remainder["iovecs"], remainder["count"] = unread.ctypes.data, len(unread)
            result = read_request(self._file, remainder)


def build_requests(
    ids: np.ndarray, addresses: np.ndarray, layer_offset: int, stride: int, gap: int, discard: int
) -> tuple[np.ndarray, np.ndarray]:
    """Group neighbouring records of a layer into requests, each a contiguous range of the file.

    ids: (n,) ascending, at least one. addresses: (n,), of the memory for each record. layer_offset:
    byte offset of the layer in the file. stride: bytes of a record. gap: between two ids, a request
    also reads up to so many other records. discard: address of `stride` bytes, into which all of
    these go.

    Returns requests, one row of REQUEST each, and the iovecs, one for each record that is read,
    also in gaps. The requests hold addresses of iovecs, so the caller must keep the iovecs until
    the reads have ended.
    """
    splits = ids[1:] - ids[:-1] > gap + 1  # where the next id begins a new request
    # No request crosses a multiple of MAX_IOVECS, so that it has at most so many iovecs.
    splits |= ids[1:] // MAX_IOVECS != ids[:-1] // MAX_IOVECS
    starts = np.concatenate(([0], np.flatnonzero(splits) + 1))  # each request's first index of ids
    ends = np.append(starts[1:], len(ids))
    first_ids = ids[starts]
    counts = ids[ends - 1] - first_ids + 1  # records of each request
    first_iovecs = counts.cumsum() - counts  # the index of each request's first iovec
    iovecs = np.empty(counts.sum(), dtype=IOVEC)
    iovecs["address"], iovecs["nbytes"] = discard, stride
    # The iovec of an id is as far from its request's first iovec as the id from the first id.
    iovecs["address"][ids + np.repeat(first_iovecs - first_ids, ends - starts)] = addresses
    requests = np.empty(len(starts), dtype=REQUEST)
    requests["offset"] = layer_offset + first_ids * stride
    requests["iovecs"] = iovecs.ctypes.data + first_iovecs * IOVEC.itemsize
    requests["count"] = counts
    return requests, iovecs


class NeuronCache:
    """The neurons of one layer that are in memory: the records, and which neuron each entry holds.

    records: (C, stride) bytes. ids: (C,), the neuron of each entry, or `empty` (F). `admit` chooses
    entries to overwrite and empties them, the caller reads records into them, `commit` notes the
    neurons that they then hold. If the read fails, they stay empty, so no lookup returns an entry
    with bytes of two neurons. The least used entries are overwritten. Use is a count that decays
    with each token (USE_DECAY): it misses a quarter fewer neurons than "least recently used" with
    as many entries.
    """

    def __init__(self, neurons: int, entries: int, stride: int, device: torch.device):
        """Allocate so many empty entries. neurons: their number in the layer. stride: bytes of a
        record; 0 simulates the cache without memory for records."""
        self.records = page_aligned(entries * stride, device).view(entries, stride)
        self.empty = neurons  # the id that stands for no neuron
        self.ids = np.full(entries, self.empty)  # (C,): the neuron of each entry
        self._entry_of = np.full(neurons + 1, -1)  # the entry of each neuron; -1: not in memory
        self._use = np.zeros(neurons + 1)  # the sum of each neuron's uses, weighted: see _age
        self._use[self.empty] = -1  # empty entries are overwritten first
        self._unit = 1.0  # the weight of a use now

    def __len__(self) -> int:
        return len(self.ids)

    def clear(self) -> None:
        """Make every entry empty."""
        self._entry_of[:] = -1
        self.ids[:] = self.empty

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Return those of the neurons `ids` that are not in memory."""
        return ids[self._entry_of[ids] < 0]

    def entries(self, ids: np.ndarray) -> np.ndarray:
        """Return the entries of the neurons `ids`, without those that are not in memory."""
        entries = self._entry_of[ids]
        return entries[entries >= 0]

    def admit(
        self, ids: np.ndarray, uses: np.ndarray | int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count a use of neurons, and empty an entry for each neuron that is not in memory.

        Each call counts as one token in the decay of uses. ids: ascending; entries that hold them
        are not emptied. uses: how many tokens use each neuron.

        Returns the ids that the caller must read now, an entry for each (ascending), and the ids
        that must wait, because all other entries hold some of `ids`. Call `commit` after the read.
        For the waiting ids, call `admit` again after the product has used the entries.
        """
        self._age()
        self._use[ids] += uses * self._unit
        entries = self._entry_of[ids]
        present = entries >= 0
        missing, free = ids[~present], len(self) - int(present.sum())
        fitting, waiting = missing[:free], missing[free:]
        if not len(fitting):
            return fitting, fitting, waiting  # no ids to read, hence no entries
        use = self._use[self.ids]  # (C,)
        use[entries[present]] = np.inf  # these are not emptied
        victims = np.argpartition(use, len(fitting) - 1)[: len(fitting)]  # the least used entries
        victims.sort()
        self._entry_of[self.ids[victims]] = -1
        self.ids[victims] = self.empty
        return fitting, victims, waiting

    def _age(self) -> None:
        """Decay all use counts by USE_DECAY for a new token.

        Instead of the counts becoming smaller, the weight of later uses, _unit, grows: this gives
        the same order and changes one number. Above MAX_USE_UNIT all counts are divided by it.
        """
        self._unit /= USE_DECAY
        if self._unit > MAX_USE_UNIT:
            self._use /= self._unit
            self._unit = 1.0

    def commit(self, ids: np.ndarray, entries: np.ndarray) -> None:
        """Record that the entries from `admit` now hold the neurons `ids`."""
        self.ids[entries] = ids
        self._entry_of[ids] = entries

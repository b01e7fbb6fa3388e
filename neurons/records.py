"""Feed-forward neurons as records of a file: how one lies there, and which of them are in memory.

Start at Format: the weights of one neuron, a row of the up (and gate) projection and its column of
the down projection, are one record, so that they come with one read ("LLM in a flash", arXiv
2312.11514, section 3.2). A NeuronFile reads many at a time past the page cache, straight to where
they stay, and a NeuronCache says where that is: slots of one piece of memory, of which the least
used ones are given away.

Shapes: F neurons of a layer, C slots, D dim, n records.
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
from neurons.uring import PIECE, REQUEST, Work, many_reads, nothing, read_pieces
from quant.linear import dequantize_int4, round_int4, round_int8
from tiers.direct_io import REFUSED, DirectFile

SECTOR = 512  # bytes; what O_DIRECT asks for on most disks, where whole blocks would be a waste
KINDS = "dense", "int8", "int4"
GATED, PLAIN = ("gate", "up", "down"), ("up", "down")
LASTING = 0.98  # of what a neuron's use counts, a token later
MOST_NOW = 1e100
MOST_PIECES = 1024  # of memory that one call of the system fills


@dataclass(frozen=True)
class Format:
    """How the weights of a neuron lie in a record: one row of D numbers for each matrix.

    int8: a scale for each row of gate and up, and one for each output of down, as Int8Linear has
    them; they stay in memory. int4: groups along D in all matrices, scales and zeros beside them.
    """

    matrices: tuple[str, ...]  # GATED or PLAIN
    dim: int
    kind: str  # one of KINDS
    dtype: torch.dtype  # of dense weights
    groupsize: int = 64  # of int4
    sector: int = SECTOR  # bytes that a record is a multiple of

    @cached_property
    def fields(self) -> dict[tuple[str, str], tuple[int, int, torch.dtype]]:
        """Matrix and part of it -> its first byte, how many numbers it has and of what dtype."""
        P = -(-self.dim // self.groupsize)
        parts = {
            "dense": {"weight": (self.dim, self.dtype)},
            "int8": {"weight": (self.dim, torch.int8)},
            "int4": {
                "scales": (P, torch.float16),
                "weight": (P * self.groupsize // 2, torch.uint8),
                "zeros": (-(-P // 2), torch.uint8),
            },
        }[self.kind]
        found, at = {}, 0
        for matrix in self.matrices:
            for part, (count, dtype) in parts.items():
                at += -at % dtype.itemsize
                found[matrix, part] = at, count, dtype
                at += count * dtype.itemsize
        return found

    @cached_property
    def starts(self) -> list[int]:
        """First bytes of weights, scales and zeros of each matrix; 0 for what is not there."""
        parts = ("weight", "scales", "zeros")
        return [self.fields.get((m, part), (0,))[0] for m in self.matrices for part in parts]

    @cached_property
    def used(self) -> int:
        """Bytes of a record that mean something."""
        return max(at + count * dtype.itemsize for at, count, dtype in self.fields.values())

    @cached_property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.used // self.sector) * self.sector

    def part(self, records: Tensor, matrix: str, name: str) -> Tensor:
        """(n, stride) bytes -> (n, numbers), the same memory."""
        at, count, dtype = self.fields[matrix, name]
        return records[:, at : at + count * dtype.itemsize].view(dtype)

    def rows(self, records: Tensor, matrix: str, dtype: torch.dtype) -> Tensor:
        """(n, stride) bytes -> (n, D) numbers; of int8 they have yet to be scaled."""
        weight = self.part(records, matrix, "weight")
        if self.kind == "int4":
            rest = (self.part(records, matrix, name) for name in ("scales", "zeros"))
            weight = dequantize_int4(weight, *rest)[:, : self.dim]
        return weight.to(dtype)

    def pack(self, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """gate and up (F, D) and down (D, F), float32 -> records (F, stride), and what stays in
        memory: scales of gate and up (F, 1 or 2) and of the outputs (D,), ones but for int8."""
        F, ones = len(weights["up"]), torch.ones
        records = torch.zeros(F, self.stride, dtype=torch.uint8)
        scales = {m: ones(F) for m in self.matrices[:-1]} | {"down": ones(self.dim)}
        for matrix in self.matrices:
            weight, down = weights[matrix], matrix == "down"
            if self.kind == "int8":
                parts = round_int8(weight)
                scales[matrix] = parts.pop("scales")
                parts["weight"] = parts["weight"].T if down else parts["weight"]
            elif self.kind == "int4":
                parts = round_int4(weight.T.contiguous() if down else weight, self.groupsize)
            else:
                parts = {"weight": weight.T if down else weight}
            for name, value in parts.items():
                self.part(records, matrix, name).copy_(value)
        inner = torch.stack([scales[m] for m in self.matrices[:-1]], 1)  # (F, 1 or 2)
        return records, {"inner_scales": inner, "outer_scales": scales["down"]}


class NeuronFile(DirectFile):
    """The records of all layers of a model, layer after layer.

    nbytes, requests: what `bring` has read.
    """

    def __init__(self, path: Path, stride: int, depth: int):
        """depth: reads that are under way at a time."""
        super().__init__(path)
        self.stride, self.nbytes, self.requests = stride, 0, 0
        self._reads, self._waste = many_reads(depth), page_aligned(stride, torch.device("cpu"))
        if self.direct and not self._takes_records():
            os.close(self._file)
            self._file, self.direct = os.open(path, os.O_RDONLY), False

    def _takes_records(self) -> bool:
        """Whether the disk reads a single record past the page cache."""
        try:
            os.preadv(self._file, [self._waste.numpy()], 0)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return False
        return True

    def bring(
        self,
        first: int,
        ids: np.ndarray,
        memory: np.ndarray,
        gap: int,
        meanwhile: Work = nothing,
    ) -> None:
        """Read records, ascending ids counted from the file's byte `first`, each to its address.

        gap: records at most that are read between two, for nothing, to make fewer requests.
        meanwhile: is done in the time that the disk takes. Raises OSError, and ValueError where the
        file has been cut short.
        """
        if not len(ids):
            return meanwhile()
        waste = self._waste.data_ptr()
        requests, pieces = gathered(ids, memory, first, self.stride, gap, waste)
        self.requests += len(requests)
        self.nbytes += self.stride * len(pieces)
        found = self._reads.read(self._file, requests, meanwhile)
        for n in np.flatnonzero(found != self.stride * requests["count"].astype(np.int64)):
            start = (int(requests[n]["pieces"]) - pieces.ctypes.data) // PIECE.itemsize
            self._finish(requests[n], pieces[start : start + requests[n]["count"]], int(found[n]))

    def _finish(self, request: np.void, pieces: np.ndarray, found: int) -> None:
        """Go on with a request that has read less than it should have."""
        wanted, done = self.stride * len(pieces), 0
        while True:
            if found < 0 and -found not in (errno.EINTR, errno.EAGAIN):
                raise OSError(-found, os.strerror(-found), str(self.path))
            done += max(found, 0)
            if done == wanted:
                return
            if found == 0:
                at = int(request["offset"]) + done
                raise ValueError(f"{self.path} ends at byte {at}: it was cut short")
            n, part = divmod(done, self.stride)
            left, rest = pieces[n:].copy(), request.copy()
            left["address"][0] += part
            left["nbytes"][0] -= part
            rest["offset"] += done
            rest["pieces"], rest["count"] = left.ctypes.data, len(left)
            found = read_pieces(self._file, rest)


def gathered(
    ids: np.ndarray, memory: np.ndarray, first: int, stride: int, gap: int, waste: int
) -> tuple[np.ndarray, np.ndarray]:
    """The requests that bring records, see NeuronFile.bring, and the pieces of memory they fill.

    waste: the address of a record's memory that means nothing. A request ends where MOST_PIECES
    ids would end, of which the system takes no more.
    """
    far = ids[1:] - ids[:-1] > gap + 1
    far |= ids[1:] // MOST_PIECES != ids[:-1] // MOST_PIECES
    starts = np.concatenate(([0], np.flatnonzero(far) + 1))  # of each request, among the ids
    ends = np.append(starts[1:], len(ids))
    begins = ids[starts]
    counts = ids[ends - 1] - begins + 1
    before = counts.cumsum() - counts  # pieces of the requests before
    pieces = np.empty(counts.sum(), dtype=PIECE)
    pieces["address"], pieces["nbytes"] = waste, stride
    pieces["address"][ids + np.repeat(before - begins, ends - starts)] = memory
    requests = np.empty(len(starts), dtype=REQUEST)
    requests["offset"] = first + begins * stride
    requests["pieces"] = pieces.ctypes.data + before * PIECE.itemsize
    requests["count"] = counts
    return requests, pieces


class NeuronCache:
    """Which neurons of a layer are in which slots; those of least use give way.

    Of what use a neuron is says how often it was wanted, where what is long ago counts less: of
    the same slots a quarter fewer are missed than if the least recently used gave way. A slot that
    is being filled is empty, and stays so where that fails: what is asked of the cache is never a
    neuron of which half is another.
    """

    def __init__(self, neurons: int, slots: int, stride: int, device: torch.device):
        self.slab = page_aligned(slots * stride, device).view(slots, stride)
        self.empty = neurons  # in place of a neuron
        self._slot_of = np.full(neurons + 1, -1)
        self.neurons = np.full(slots, self.empty)  # by slot
        self._use = np.zeros(neurons + 1)  # in units of which one is what counts now
        self._use[self.empty] = -1
        self._now = 1.0

    def __len__(self) -> int:
        return len(self.neurons)

    def forget(self) -> None:
        """Every slot is empty again."""
        self._slot_of[:] = -1
        self.neurons[:] = self.empty

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Of ids those that are not here."""
        return ids[self._slot_of[ids] < 0]

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Where neurons are, of those that are here."""
        slots = self._slot_of[ids]
        return slots[slots >= 0]

    def admit(
        self, ids: np.ndarray, times: np.ndarray | int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending ids that are wanted now -> those to be brought and a slot for each, emptied
        for them, ascending too; and those that no slot is left for. times: by how many tokens."""
        self._now /= LASTING
        if self._now > MOST_NOW:
            self._use /= self._now
            self._now = 1.0
        self._use[ids] += times * self._now
        slots = self._slot_of[ids]
        here = slots >= 0
        missing, room = ids[~here], len(self) - int(here.sum())
        fitting, rest = missing[:room], missing[room:]
        if not len(fitting):
            return fitting, fitting, rest
        use = self._use[self.neurons]  # by slot
        use[slots[here]] = np.inf
        victims = np.argpartition(use, len(fitting) - 1)[: len(fitting)]
        victims.sort()
        self._slot_of[self.neurons[victims]] = -1
        self.neurons[victims] = self.empty
        return fitting, victims, rest

    def hold(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """Told that slots have been filled."""
        self.neurons[slots] = ids
        self._slot_of[ids] = slots

"""Seconds of this machine's disk and products, measured once and saved for later runs.

Start at machine_costs. A record holds the weights of one neuron; an entry is memory for one record.
A call of NeuronFile.read_records reads a batch of requests; a request reads contiguous records,
each into an entry. Batches of several sizes are read from a pack (the directory that flash.py
writes), and a linear model is fitted to the seconds: per call + per request + per byte. The depth
is the number of requests that the disk has at a time. choose_plan (budget.py) uses the costs.

Shapes: L layers, C entries of a neuron cache.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from host.measurements import load_measurement, save_measurement
from host.memory import machine_name, page_aligned
from kernels.cpu.build import fastest_set
from neurons.pack import Pack
from neurons.products import Products, has_kernel
from neurons.records import NeuronFile
from tiers.prefetch import CPU
from tiers.probe import typical

BATCHES = (4, 1), (32, 1), (128, 1), (512, 1), (4, 4), (64, 4)  # requests, records per request
STREAM_BYTES = 2**27  # the most bytes that stream_byte_seconds reads
PRODUCT_BYTES = 2**26  # bytes of entries in timed runs: more than a processor's caches hold
EVICTING_BYTES = 2**24  # weights of the product before each timed batch of reads
BATCH_REPEATS, STREAM_REPEATS, PRODUCT_REPEATS = 15, 3, 5  # of each timed run
NEURONS = 17  # in the timed product: the first is active, the last stands for an empty entry
SMALL_FILE_COSTS = [0.0, 1e-4, 0.0]  # seconds per call, request, byte, if a file is too small


@dataclass(frozen=True)
class MachineCosts:
    """Seconds that reading and computing records take.

    reads: depth -> the seconds per call, per request and per byte. stream_byte: seconds per byte
    when layers are read in file order. compute_record: seconds to compute one record in memory for
    one token. computes_all_entries: whether a token computes every entry of the cache, predicted or
    not (Products.computes_all_entries).
    """

    reads: dict[int, tuple[float, float, float]]
    stream_byte: float
    compute_record: float
    computes_all_entries: bool

    def read_seconds(self, depth: int, requests: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        """Return (L,): expected seconds of one call in each layer; 0 if a layer makes no request.

        depth: a key of reads. requests, nbytes: (L,), of each layer's call.
        """
        call, request, byte = self.reads[depth]
        return np.where(requests > 0, call + request * requests + byte * nbytes, 0)


def machine_costs(
    pack: Pack, depths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> MachineCosts:
    """Return this machine's costs: saved by an earlier run, or measured now, which takes seconds.

    depths: to measure. device, dtype: of the model's activations. Saved costs are used again if the
    machine, the instruction set, the disk, the file's size, the record format and these arguments
    are the same. Called by attach_neurons when a model is loaded.
    """
    format, stat = pack.format, pack.neurons_path.stat()
    kernel = has_kernel(format, device, dtype)
    computing = machine_name(device), dtype, kernel, fastest_set(device)
    key = *computing, stat.st_dev, stat.st_size, format, tuple(depths)
    # The timed product is that of a layer of NEURONS neurons, of which the first alone is active.
    bias = torch.full((NEURONS, len(format.matrices) - 1), -1, device=device, dtype=dtype)
    bias[0] = 1
    products = Products(format, bias, None, kernel)
    costs = load_measurement("flash", key)
    if costs is None:
        costs = {
            "reads": {depth: batch_costs(pack, depth) for depth in depths},
            "stream_byte": stream_byte_seconds(pack),
            "record": compute_record_seconds(products, device),
        }
        save_measurement("flash", key, costs)
    # The keys of saved costs are text.
    reads = {int(depth): tuple(seconds) for depth, seconds in costs["reads"].items()}
    all_entries = products.computes_all_entries
    return MachineCosts(reads, costs["stream_byte"], costs["record"], all_entries)


def batch_costs(pack: Pack, depth: int) -> list[float]:
    """Measure the seconds per call, per request and per byte of reads with this depth.

    They are fitted to the median seconds of BATCHES, by least squares of relative errors; a
    negative result becomes 0. Batches of more than half the file's records are left out. If no
    batch is small enough, returns SMALL_FILE_COSTS.
    """
    stride = pack.format.stride
    timer = BatchTimer(pack, depth)
    batches = [(n, records) for n, records in BATCHES if 2 * n * records <= timer.total]
    if not batches:
        return SMALL_FILE_COSTS
    rows = np.array([(1, n, n * records * stride) for n, records in batches])
    seconds = np.array([timer.median_seconds(*batch) for batch in batches])
    fitted, *_ = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(rows)), rcond=None)
    return fitted.clip(0).tolist()


class BatchTimer:
    """Times batches of requests that read random records of a pack's file into random entries.

    A product is computed before each batch, as in a model: it evicts Linux's code and the entries
    from the processor's caches, and a batch then takes half a millisecond longer.
    """

    def __init__(self, pack: Pack, depth: int):
        """Open the file and allocate PRODUCT_BYTES of entries. depth: requests that the disk has at
        a time."""
        self.stride = pack.format.stride
        self.file = NeuronFile(pack.neurons_path, self.stride, depth)
        self.total = pack.neurons_path.stat().st_size // self.stride  # records of the file
        self.entries = range(PRODUCT_BYTES // self.stride)
        self.memory = page_aligned(len(self.entries) * self.stride, CPU).fill_(1)
        # A row of 2048 bfloat16 numbers has 4096 bytes. Its product evicts the caches.
        self.matrix = torch.ones(EVICTING_BYTES // 4096, 2048, dtype=torch.bfloat16)
        self.random = random.Random(0)

    def median_seconds(self, requests: int, records: int) -> float:
        """Return the median seconds of BATCH_REPEATS batches: `requests` requests of `records`
        contiguous records each. The file must have at least requests * records records. Where two
        of the random places are adjacent, one request reads both: of 512 requests in a file of 3000
        records, as of the demo models, 427 are left; in large files almost all are."""
        return statistics.median(self._seconds(requests, records) for _ in range(BATCH_REPEATS))

    def _seconds(self, requests: int, records: int) -> float:
        """Read one random batch, after a product that evicts caches, and return the seconds of the
        read.

        requests, records: see median_seconds. The file is read as if it were one layer. Each record
        goes to another entry, so there must be as many entries.
        """
        starts = sorted(self.random.sample(range(self.total // records), requests))
        ids = (np.array(starts)[:, None] * records + np.arange(records)).ravel()
        entries = np.array(self.random.sample(self.entries, len(ids)))
        addresses = self.memory.data_ptr() + entries * self.stride
        F.linear(self.matrix[:1], self.matrix)
        start = time.perf_counter()
        self.file.read_records(0, ids, addresses, gap=0)
        return time.perf_counter() - start


def stream_byte_seconds(pack: Pack) -> float:
    """Measure the seconds per byte of a contiguous read from the start of the file, as if a layer
    were read whole. The length is a multiple of 4096 bytes, which O_DIRECT needs."""
    file = NeuronFile(pack.neurons_path, pack.format.stride, 1)
    nbytes = min(STREAM_BYTES, pack.neurons_path.stat().st_size // 4096 * 4096)
    memory = page_aligned(nbytes, CPU)
    return typical(lambda: file.read([(0, memory)]), CPU, STREAM_REPEATS) / nbytes


def compute_record_seconds(products: Products, device: torch.device) -> float:
    """Measure the seconds to compute one record in memory for one token, with unpacking.

    products: of a layer with few neurons, each of which many entries hold here. All C entries are
    computed in one call.
    """
    format = products.format
    neurons = len(products.bias) - 1  # without the last one, which stands for an empty entry
    count = PRODUCT_BYTES // format.stride  # C
    # Filled, because Linux maps all untouched pages to one physical page.
    records = page_aligned(count * format.stride, device).fill_(1).view(count, -1)  # (C, stride)
    x = torch.zeros(1, format.dim, device=device, dtype=products.bias.dtype)
    ids = np.arange(count) % neurons
    return typical(lambda: products.sums(x, records, ids), device, PRODUCT_REPEATS) / count

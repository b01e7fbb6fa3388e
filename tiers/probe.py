"""How fast this machine is at what running a model takes: its disk, its memory, its products.

Start at probe. It times what offload.py does, as offload.py does it: reads and writes of several
sizes past the page cache, copies, and a block of the model's own shape for several numbers of rows.
A curve of seconds over sizes comes of each, and costs in between are read off it (policy.py). That
takes some seconds, once for each machine, disk and shape: results are kept in a cache.
"""

import dataclasses
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from host.memory import page_aligned
from model import ModelArgs, Transformer
from tiers.direct_io import ScratchFile

READS = 2**16, 2**20, 2**23, 2**26  # bytes of a call
ROWS = 1, 2, 4, 8, 16, 32, 64, 128, 256, 512  # tokens that go through a block at once
SLOTS = 1024  # of the cache, seen by a decoded token
LONG = 512  # tokens of a prompt
BLOCK_BYTES = 2**29  # a layer larger than this is timed in part
SECONDS = 1.0  # a product that takes longer is not tried with more rows


@dataclass(frozen=True)
class Curve:
    """Seconds over sizes, straight between the points and beyond the last."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, size: float) -> float:
        if size <= self.sizes[0] or len(self.sizes) == 1:
            return self.seconds[0] * max(size / self.sizes[0], 1.0)
        n = min(bisect_left(self.sizes, size), len(self.sizes) - 1)
        a, b = self.sizes[n - 1], self.sizes[n]
        share = (size - a) / (b - a)
        return self.seconds[n - 1] + share * (self.seconds[n] - self.seconds[n - 1])


@dataclass(frozen=True)
class Machine:
    """Seconds that things take here."""

    stream: float  # not seconds: bytes of layers that a second brings from the disk
    read: Curve  # over bytes of a call, from the disk
    write: Curve
    to_device: Curve  # from the host's memory; on a CPU a copy within it
    to_host: Curve
    products: Curve  # one layer without attention, over tokens
    per_position: float  # attention of a decoded token to one slot, one layer
    per_pair: float  # the same within a prompt
    host_per_position: float  # the same, computed on the host

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "Machine":
        curves = {
            k: Curve(tuple(v["sizes"]), tuple(v["seconds"]))
            for k, v in said.items()
            if isinstance(v, dict)
        }
        return cls(**(said | curves))


def probe(model: Transformer, args: ModelArgs, directory: Path) -> Machine:
    """Time this machine. model: of one layer, of sample_args, ready to run on its device; args:
    the real model's. directory: on the disk that will be used."""
    narrow = args.dim / model.args.dim
    device = model.tok_embeddings.weight.device
    stream, read, write = disk_curves(directory)
    to_device, to_host = copy_curves(device)
    timed = BlockTimer(model)
    products = timed.products()
    per_position = timed.per_position()
    on_host = per_position if device.type == "cpu" else BlockTimer(model.to("cpu")).per_position()
    return Machine(
        stream,
        read,
        write,
        to_device,
        to_host,
        Curve(products.sizes, tuple(seconds * narrow**2 for seconds in products.seconds)),
        per_position * narrow,
        timed.per_pair(products) * narrow,
        on_host * narrow,
    )


def typical(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Seconds: the median of some runs after a first one."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if seconds[0] > SECONDS:
            break
    return statistics.median(seconds[1:] or seconds)


def disk_curves(directory: Path) -> tuple[float, Curve, Curve]:
    """Bytes per second where one call follows the other, as for layers; and seconds of reads and
    of writes of several sizes, each call waiting for the one before, as for cells of the cache."""
    size, count = max(READS), 8
    file = ScratchFile(directory, count * size)
    memory = [page_aligned(size, torch.device("cpu")) for _ in range(2)]
    for part in memory:
        part.random_(0, 256)
    for n in range(count):
        file.write([(n * size, memory[n % 2])])

    def curve(move: Callable[..., None]) -> Curve:
        def calls(nbytes: int) -> None:
            for n in range(count):
                move([(n * size, memory[0][:nbytes])])

        cpu = memory[0].device
        return Curve(READS, tuple(typical(partial(calls, nbytes), cpu) / count for nbytes in READS))

    def stream() -> None:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda n: file.read([(n * size, memory[n % 2])]), range(count)))

    rate = count * size / typical(stream, memory[0].device)
    return rate, curve(file.read), curve(file.write)


def copy_curves(device: torch.device) -> tuple[Curve, Curve]:
    size = max(READS)
    here = page_aligned(size, device)
    there = page_aligned(size, torch.device("cpu"), device.type == "cuda")
    to_device = typical(lambda: here.copy_(there), device)
    to_host = typical(lambda: there.copy_(here), device)
    return Curve((size,), (to_device,)), Curve((size,), (to_host,))


class BlockTimer:
    """Times the one layer of a model."""

    def __init__(self, model: Transformer):
        self.model, self.device = model, model.tok_embeddings.weight.device

    @torch.inference_mode()
    def seconds(self, rows: int, tokens: int, slots: int) -> float:
        """Of each row so many tokens, the last of which sees so many slots of the cache."""
        model = self.model
        (cache,) = model.make_caches(rows, slots)
        pos = torch.arange(slots - tokens, slots, device=self.device).expand(rows, tokens)
        x = model.project_in(model.tok_embeddings(pos % model.args.vocab_size))  # (B, T, D)
        x, rotation = model.positions(x, pos)
        mask = model.mask(pos, torch.arange(slots, device=self.device), x.dtype)
        return typical(lambda: model.layers[0](x, rotation, mask, pos, cache), self.device)

    def products(self) -> Curve:
        """Over rows of one token that sees hardly anything but itself."""
        measured = []
        for rows in ROWS:
            measured.append(self.seconds(rows, 1, 8))
            if measured[-1] > SECONDS:
                break
        return Curve(ROWS[: len(measured)], tuple(measured))

    def per_position(self) -> float:
        longest = min(SLOTS, self.model.args.context)
        few, many = (self.seconds(16, 1, slots) for slots in (longest // 16, longest))
        return max(many - few, 0) / (16 * (longest - longest // 16))

    def per_pair(self, products: Curve) -> float:
        tokens = min(LONG, self.model.args.context)
        return max(self.seconds(1, tokens, tokens) - products(tokens), 0) / tokens**2


def sample_args(args: ModelArgs, layer_bytes: int) -> ModelArgs:
    """A model of one such layer, or of one that is narrower, so as not to be too large to time."""
    narrow = 1
    while layer_bytes / narrow**2 > BLOCK_BYTES and args.n_kv_heads % (2 * narrow) == 0:
        narrow *= 2
    return dataclasses.replace(
        args,
        n_layers=1,
        vocab_size=64,
        dim=args.dim // narrow,
        embed_dim=args.dim // narrow,
        n_heads=args.n_heads // narrow,
        n_kv_heads=args.n_kv_heads // narrow,
        hidden_dim=args.hidden_dim // narrow,
    )

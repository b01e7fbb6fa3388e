"""Measures how fast this machine runs a model: its disk, its copies and its matrix products.

Start at probe. It times the operations of offload.py as they are run there: reads and writes of
several sizes with O_DIRECT, copies between host and device, and one block of the model's shape on
several numbers of tokens. Each gives a Curve of seconds over sizes, from which planner.py takes its
costs. It takes about 20 seconds for each machine, disk and shape, and plan.py keeps the results.
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
from tiers.prefetch import CPU

TRANSFER_BYTES = 2**16, 2**20, 2**23, 2**26  # of one read or write
TRANSFERS = 8  # of each size
TOKEN_COUNTS = 1, 2, 4, 8, 16, 32, 64, 128, 256, 512  # computed by a block at once
CACHE_POSITIONS = 1024  # that a decoded token attends to
PROMPT_TOKENS = 512
MAX_LAYER_BYTES = 2**29  # larger layers are timed on a narrower one
MAX_SECONDS = 1.0  # after a longer product, no larger one is timed


@dataclass(frozen=True)
class Curve:
    """Seconds over sizes, interpolated linearly, and extrapolated beyond the last point."""

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
    """The measured times of a machine, in seconds unless noted."""

    stream: float  # bytes per second that layers are read from disk
    read: Curve  # one read from disk, over bytes
    write: Curve  # one write to disk, over bytes
    to_device: Curve  # a copy from host memory, over bytes; on a CPU a copy within memory
    to_host: Curve  # a copy from the device, over bytes
    products: Curve  # one layer without attention, over tokens
    per_position: float  # attention of a decoded token to one position, in one layer
    per_pair: float  # attention of a prompt's token to one other, in one layer
    host_per_position: float  # as per_position, computed on the host

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Machine":
        curves = {
            name: Curve(tuple(value["sizes"]), tuple(value["seconds"]))
            for name, value in fields.items()
            if isinstance(value, dict)
        }
        return cls(**(fields | curves))


def probe(model: Transformer, args: ModelArgs, directory: Path) -> Machine:
    """Measure this machine. model: one layer of the shape sample_args, on its device; args: of the
    real model, which may be wider; directory: on the disk that will be used."""
    narrowing = args.dim / model.args.dim
    device = model.tok_embeddings.weight.device
    stream, read, write = disk_curves(directory)
    to_device, to_host = copy_curves(device)
    timer = BlockTimer(model)
    products, per_position = timer.products(), timer.per_position()
    per_pair = timer.per_pair(products)
    on_host = per_position
    if device.type != "cpu":
        on_host = BlockTimer(model.to("cpu")).per_position()
    return Machine(
        stream,
        read,
        write,
        to_device,
        to_host,
        Curve(products.sizes, tuple(seconds * narrowing**2 for seconds in products.seconds)),
        per_position * narrowing,
        per_pair * narrowing,
        on_host * narrowing,
    )


def typical(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Return the median seconds of some runs after a first one, or those of a first slow one."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if seconds[0] > MAX_SECONDS:
            break
    return statistics.median(seconds[1:] or seconds)


def disk_curves(directory: Path) -> tuple[float, Curve, Curve]:
    """Return the bytes per second of overlapping reads, as for layers, and the seconds of single
    reads and writes, as for cells of the cache."""
    size = max(TRANSFER_BYTES)
    file = ScratchFile(directory, TRANSFERS * size)
    memory = [page_aligned(size, CPU) for _ in range(2)]
    for part in memory:
        part.random_(0, 256)
    for n in range(TRANSFERS):
        file.write([(n * size, memory[n % 2])])
    rate = stream_rate(file, memory)
    return rate, transfer_curve(file.read, memory[0]), transfer_curve(file.write, memory[0])


def stream_rate(file: ScratchFile, memory: list[torch.Tensor]) -> float:
    """Return the bytes per second of reads of the whole file, two at a time."""
    size = len(memory[0])

    def stream() -> None:
        def read(n: int) -> None:
            file.read([(n * size, memory[n % 2])])

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(read, range(TRANSFERS)))

    return TRANSFERS * size / typical(stream, CPU)


def transfer_curve(transfer: Callable[..., None], memory: torch.Tensor) -> Curve:
    """Return the seconds of one transfer over its bytes, without overlap between transfers."""

    def transfers(nbytes: int) -> None:
        for n in range(TRANSFERS):
            transfer([(n * len(memory), memory[:nbytes])])

    seconds = (typical(partial(transfers, nbytes), CPU) / TRANSFERS for nbytes in TRANSFER_BYTES)
    return Curve(TRANSFER_BYTES, tuple(seconds))


def copy_curves(device: torch.device) -> tuple[Curve, Curve]:
    """Return the seconds of copies from host to device, and back."""
    size = max(TRANSFER_BYTES)
    on_device = page_aligned(size, device)
    on_host = page_aligned(size, CPU, device.type == "cuda")
    to_device = typical(lambda: on_device.copy_(on_host), device)
    to_host = typical(lambda: on_host.copy_(on_device), device)
    return Curve((size,), (to_device,)), Curve((size,), (to_host,))


class BlockTimer:
    """Times the only layer of a model."""

    def __init__(self, model: Transformer):
        self.model, self.device = model, model.tok_embeddings.weight.device

    @torch.inference_mode()
    def seconds(self, rows: int, tokens: int, positions: int) -> float:
        """Return the seconds of the layer for `tokens` tokens of each row, the last `tokens` of
        `positions` positions of the cache."""
        model = self.model
        (cache,) = model.make_caches(rows, positions)
        pos = torch.arange(positions - tokens, positions, device=self.device).expand(rows, tokens)
        x = model.project_in(model.tok_embeddings(pos % model.args.vocab_size))  # (B, T, D)
        x, rotation = model.positions(x, pos)
        mask = model.mask(pos, torch.arange(positions, device=self.device), x.dtype)
        return typical(lambda: model.layers[0](x, rotation, mask, pos, cache), self.device)

    def products(self) -> Curve:
        """Return the seconds over rows of one token each, whose attention is negligible."""
        measured = []
        for rows in TOKEN_COUNTS:
            measured.append(self.seconds(rows, 1, 8))
            if measured[-1] > MAX_SECONDS:
                break
        return Curve(TOKEN_COUNTS[: len(measured)], tuple(measured))

    def per_position(self) -> float:
        """Return the seconds that each further position adds for one decoded token."""
        longest = min(CACHE_POSITIONS, self.model.args.context)
        few, many = (self.seconds(16, 1, positions) for positions in (longest // 16, longest))
        return max(many - few, 0) / (16 * (longest - longest // 16))

    def per_pair(self, products: Curve) -> float:
        """Return the seconds of attention for each pair of tokens in a prompt."""
        tokens = min(PROMPT_TOKENS, self.model.args.context)
        return max(self.seconds(1, tokens, tokens) - products(tokens), 0) / tokens**2


def sample_args(args: ModelArgs, layer_bytes: int) -> ModelArgs:
    """Return the args of a model of one such layer, made narrower if it exceeds MAX_LAYER_BYTES."""
    factor = 1
    while layer_bytes / factor**2 > MAX_LAYER_BYTES and args.n_kv_heads % (2 * factor) == 0:
        factor *= 2
    return dataclasses.replace(
        args,
        n_layers=1,
        vocab_size=64,
        dim=args.dim // factor,
        embed_dim=args.dim // factor,
        n_heads=args.n_heads // factor,
        n_kv_heads=args.n_kv_heads // factor,
        hidden_dim=args.hidden_dim // factor,
    )

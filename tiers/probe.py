"""Measures how fast this machine runs a model: its disk, its copies and its matrix products.

Start at probe. It times the operations of offload.py as they are run there: reads and writes of
several sizes with O_DIRECT, copies between host and device, and one block of the model's shape on
several numbers of tokens. The result is a Machine, from which planner.py computes the costs of a
policy. To measure takes about 20 seconds for each machine, disk and shape, and plan.py keeps the
results. A scratch file has no name and ends with the process; a cell is the KV cache of one layer
for one group of rows.
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
from layers.args import ModelArgs
from model import Transformer
from tiers.direct_io import ScratchFile
from tiers.prefetch import CPU

TRANSFER_BYTES = 2**16, 2**20, 2**23, 2**26  # sizes of one read or write that are timed
TRANSFERS = 8  # reads or writes that are timed for each size
TOKEN_COUNTS = 1, 2, 4, 8, 16, 32, 64, 128, 256, 512  # computed by a block at once
CACHE_POSITIONS = 1024  # length of the cache with which decoding is timed
PROMPT_TOKENS = 512  # length of the prompt whose attention is timed
MAX_LAYER_BYTES = 2**29  # a larger layer is timed as a narrower one, and the time is scaled
MAX_SECONDS = 1.0  # after a longer product, no larger one is timed


@dataclass(frozen=True)
class Curve:
    """Seconds as a function of a size, given by measured points with ascending sizes."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, size: float) -> float:
        """Return the seconds for a size: linear between two points, and beyond the last point on
        the line through the last two. Below the first point: the seconds of the first. A curve of
        one point is proportional to the size above that point. size: bytes or tokens, whatever was
        measured."""
        if size <= self.sizes[0] or len(self.sizes) == 1:
            return self.seconds[0] * max(size / self.sizes[0], 1.0)
        n = min(bisect_left(self.sizes, size), len(self.sizes) - 1)
        left, right = self.sizes[n - 1], self.sizes[n]
        fraction = (size - left) / (right - left)
        return self.seconds[n - 1] + fraction * (self.seconds[n] - self.seconds[n - 1])


@dataclass(frozen=True)
class Machine:
    """The measured times of a machine, in seconds unless noted."""

    stream: float  # rate of reading layers from disk, bytes per second
    read: Curve  # one read from disk, as a function of its bytes
    write: Curve  # one write to disk, as a function of its bytes
    to_device: Curve  # copy of so many bytes from host memory; on a CPU a copy within memory
    to_host: Curve  # copy of so many bytes from the device to host memory
    products: Curve  # one layer without attention, as a function of the number of tokens
    per_position: float  # attention of one decoded token to one position, in one layer
    per_pair: float  # attention of one prompt token to one other, in one layer
    host_per_position: float  # the same as per_position, computed on the host

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that JSON can express."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Machine":
        """Return the machine of which `to_json` returned these fields, after a pass through
        JSON."""
        curves = {
            name: Curve(tuple(value["sizes"]), tuple(value["seconds"]))
            for name, value in fields.items()
            if isinstance(value, dict)
        }
        return cls(**(fields | curves))


def probe(model: Transformer, args: ModelArgs, directory: Path) -> Machine:
    """Measure this machine: the disk, the copies, and one layer of a model.

    model: has one layer and the args that `sample_args` returns; it is on the device to measure and
    is moved to the CPU by this call. args: of the real model, which may be wider.
    narrowing: its width divided by the model's. The times of attention are multiplied by narrowing,
    and those of matrix products by its square, as the weights grow with it. directory: a folder on
    the disk to measure. Raises ValueError or OSError if the disk takes no scratch file. Called by
    plan.py's `machine` if there are no saved results.
    """
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
    """Return the seconds of a call of `work`: the median of `repeats` calls after a warm-up, or the
    seconds of the warm-up if it takes more than MAX_SECONDS. device: where `work` computes or
    copies; each call is timed until the device has finished."""
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
    """Measure the disk of a directory with a scratch file of TRANSFERS times 64 MiB.

    Returns the bytes per second of two reads at a time, as layers are read, and the seconds of
    single reads and of single writes, as for cells of the KV cache. Raises ValueError or OSError if
    the disk takes no such file.
    """
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
    """Return the bytes per second of reading the file in TRANSFERS pieces by two threads, as
    offload.py reads layers. memory: two buffers, each as long as a piece; what they hold at the end
    does not matter, so two reads may share one."""
    size = len(memory[0])

    def stream() -> None:
        def read(n: int) -> None:
            file.read([(n * size, memory[n % 2])])

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(read, range(TRANSFERS)))

    return TRANSFERS * size / typical(stream, CPU)


def transfer_curve(transfer: Callable[..., None], memory: torch.Tensor) -> Curve:
    """Return the seconds of one read or write as a function of its bytes, one transfer at a time.

    transfer: ScratchFile.read or ScratchFile.write. memory: as long as the longest transfer; the
    file is TRANSFERS times as long. The TRANSFERS transfers of one size have different offsets.
    """

    def transfers(nbytes: int) -> None:
        """Make TRANSFERS transfers of so many bytes, one after the other."""
        for n in range(TRANSFERS):
            transfer([(n * len(memory), memory[:nbytes])])

    seconds = (typical(partial(transfers, nbytes), CPU) / TRANSFERS for nbytes in TRANSFER_BYTES)
    return Curve(TRANSFER_BYTES, tuple(seconds))


def copy_curves(device: torch.device) -> tuple[Curve, Curve]:
    """Return the seconds, as a function of the bytes, of a copy from host memory to the device, and
    of a copy back. One size, the largest of TRANSFER_BYTES, is measured: longer copies take
    proportionally longer, shorter ones count as this one."""
    size = max(TRANSFER_BYTES)
    on_device = page_aligned(size, device)
    on_host = page_aligned(size, CPU, device.type == "cuda")
    to_device = typical(lambda: on_device.copy_(on_host), device)
    to_host = typical(lambda: on_host.copy_(on_device), device)
    return Curve((size,), (to_device,)), Curve((size,), (to_host,))


class BlockTimer:
    """Times the layer of a model that has only one."""

    def __init__(self, model: Transformer):
        self.model, self.device = model, model.tok_embeddings.weight.device

    @torch.inference_mode()
    def seconds(self, rows: int, tokens: int, positions: int) -> float:
        """Return the seconds of one call of the layer with `rows` rows of `tokens` new tokens each.

        positions: length of the KV cache; the new tokens are at its end and attend to all of it.
        At least `tokens`.
        """
        model = self.model
        (cache,) = model.make_caches(rows, positions)  # one layer, one cache
        pos = torch.arange(positions - tokens, positions, device=self.device).expand(rows, tokens)
        # Any ids do, because times do not depend on the values.
        x = model.project_in(model.tok_embeddings(pos % model.args.vocab_size))  # (B, T, D)
        key_pos = torch.arange(positions, device=self.device)
        x, (inputs,) = model.attention_inputs(x, pos, key_pos, [cache.ring])
        return typical(lambda: model.layers[0](x, *inputs, cache), self.device)

    def products(self) -> Curve:
        """Return the seconds of the layer's matrix products as a function of the number of tokens.

        Each row has one token and a cache of 8 positions, so that attention is negligible. After a
        call that takes more than MAX_SECONDS, no larger number is timed.
        """
        measured = []
        for rows in TOKEN_COUNTS:
            measured.append(self.seconds(rows, 1, 8))
            if measured[-1] > MAX_SECONDS:
                break
        return Curve(TOKEN_COUNTS[: len(measured)], tuple(measured))

    def per_position(self) -> float:
        """Return the seconds of attention of one decoded token to one position: the difference
        between a long and a short cache, divided by the 16 rows and the difference in positions."""
        long = min(CACHE_POSITIONS, self.model.args.context)
        short = long // 16
        short_seconds, long_seconds = (
            self.seconds(16, 1, positions) for positions in (short, long)
        )
        return max(long_seconds - short_seconds, 0) / (16 * (long - short))

    def per_pair(self, products: Curve) -> float:
        """Return the seconds of attention of a prompt token to one other: the layer's seconds for a
        prompt, less the seconds of its products, divided by the square of the number of tokens. A
        prompt token is counted as attending to the whole prompt, although a mask hides half.

        products: the result of `products`.
        """
        tokens = min(PROMPT_TOKENS, self.model.args.context)
        return max(self.seconds(1, tokens, tokens) - products(tokens), 0) / tokens**2


def sample_args(args: ModelArgs, layer_bytes: int) -> ModelArgs:
    """Return args of a model with one layer and a small vocabulary, for `probe`.

    args: of the real model. layer_bytes: size of one of its layers; above MAX_LAYER_BYTES all
    widths and numbers of heads are halved, repeatedly, as long as the key/value heads can be
    divided: a layer then has a quarter of the bytes. head_dim stays. The layer has no sliding
    window, so that attention to more positions takes longer.
    """
    factor = 1
    while layer_bytes / factor**2 > MAX_LAYER_BYTES and args.n_kv_heads % (2 * factor) == 0:
        factor *= 2
    layer = dataclasses.replace(args.layer_types[0], window=None)
    return dataclasses.replace(
        args,
        n_layers=1,
        layer_types=(layer,),
        windows=(),
        vocab_size=64,
        dim=args.dim // factor,
        embed_dim=args.dim // factor,
        n_heads=args.n_heads // factor,
        n_kv_heads=args.n_kv_heads // factor,
        hidden_dim=args.hidden_dim // factor,
    )

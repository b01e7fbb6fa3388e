"""The products of kernels/cpu: built once, registered as operators, put into a model.

Start at use_products. It replaces quantised linears by TiledLinear, which hold the same integers in
the order that the CPU reads them in, and dense ones by FewRowsLinear; then attend_fast lets caches
attend by kernels/cpu/attention.cpp. Where the CPU, the compiler or the dtype does not allow for that, a
model keeps what it has, which is slower and the reference for these. For what neurons give, see
neuron_products.py.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli.command import log
from host.measurements import cache_directory
from model import KVCache, Linear, RMSNorm, Transformer
from quant.linear import Int4Linear, Int8Linear, QuantizedLinear
from tiers.direct_io import page_aligned

SOURCES = sorted(Path(__file__).resolve().parent.parent.glob("kernels/cpu/*.cpp"))
STRIP, SPAN, LINE = 16, 256, 64  # outputs, inputs, bytes; as in kernels/cpu/products.cpp
INT8, INT4, INT4_HALF = 80, 41, 42  # its Format
INT8_BLOCK = 128  # inputs that share a scale of the activations
NEEDED = "avx512_vnni", "avx512_bf16"
WORTH = 2**24  # bytes of dense weights; with fewer nobody waits long enough to compile for them

torch.library.define(
    "gpt_flex::quantized_linear",
    "(Tensor x, Tensor packed, Tensor? bias, int format, int block, int out_features) -> Tensor",
)
torch.library.register_fake("gpt_flex::quantized_linear")(
    lambda x, *rest: x.new_empty(x.shape[0], rest[-1])
)
torch.library.define(
    "gpt_flex::pack", "(Tensor weight, Tensor scales, Tensor? zeros, Tensor(a!) room) -> int"
)
torch.library.define("gpt_flex::attention", "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor")
torch.library.register_fake("gpt_flex::attention")(lambda q, *rest: torch.empty_like(q))
torch.library.define("gpt_flex::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.register_fake("gpt_flex::linear")(
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0])
)


class TiledLinear(nn.Module):
    """A quantised linear in the order that kernels/cpu/products.cpp reads. It computes in bfloat16.

    One that is on the meta device gives its shape only: weights come by `take`.
    """

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.strips = -(-self.out_features // STRIP)
        self.register_buffer("packed", None)
        self.register_buffer("bias", None)
        widest = INT8 if isinstance(linear, Int8Linear) else INT4_HALF
        # What a shorter format leaves of it is never touched, and takes no memory.
        self._room = page_aligned(self.strips * strip_bytes(linear, widest), torch.device("cpu"))
        if not linear.weight.is_meta:
            self.take(linear)

    @torch.no_grad()
    def take(self, linear: QuantizedLinear) -> None:
        """Hold the weights of another linear of the same kind and shape, which may then go.

        The thread that calls packs them alone, without the interpreter's lock.
        """
        zeros = getattr(linear, "zeros", None)
        format = torch.ops.gpt_flex.pack(linear.weight, linear.scales, zeros, self._room)
        size = strip_bytes(linear, format)
        self.packed = self._room[: self.strips * size].view(self.strips, size)
        if linear.bias is not None:
            self.bias = F.pad(linear.bias.bfloat16(), (0, -self.out_features % STRIP))
        self._how = format, block_of(linear), self.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()  # (M, K)
        y = torch.ops.gpt_flex.quantized_linear(rows, self.packed, self.bias, *self._how)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class FewRowsLinear(nn.Module):
    """A dense linear, with the same weights. Up to 16 rows are read together with them, by AMX in
    the time of one; more are torch's."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.gpt_flex.linear(x.flatten(0, -2), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def block_of(linear: QuantizedLinear) -> int:
    """The inputs that share a scale: of the weights or, int8, of the activations alone."""
    return linear.groupsize if isinstance(linear, Int4Linear) else INT8_BLOCK


def strip_bytes(linear: QuantizedLinear, format: int) -> int:
    """Of 16 outputs: their scales, then spans, each with a header in front of its tiles."""
    bits, scale_bytes = divmod(format, 10)
    groups = SPAN // block_of(linear) if format != INT8 else 0  # of a span
    header = groups * (STRIP * scale_bytes + STRIP // 2)
    inputs = linear.weight.shape[1] * 8 // bits
    return LINE + -(-inputs // SPAN) * (-(-header // LINE) * LINE + STRIP * SPAN * bits // 8)


def use_products(model: nn.Module, dtype: torch.dtype, large: bool | None = None) -> None:
    """Give a model that is on the CPU faster products, if that is possible and worth it here.

    dtype: what the products may compute in. large: whether dense weights are worth it, None: by
    their bytes. Linears on the meta device have no weights to pack.
    """
    here = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (Linear, QuantizedLinear)) and not m.weight.is_meta
    }
    quantised = {n: m for n, m in here.items() if isinstance(m, QuantizedLinear)}
    dense = {n: m for n, m in here.items() if m.weight.dtype == torch.bfloat16}
    if quantised and (reason := hindrance(dtype) or build()):
        log(f"quantised layers run slowly here: {reason}")
    elif quantised:
        for name, linear in quantised.items():
            model.set_submodule(name, TiledLinear(linear))  # one layer at a time is there twice
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.same_bits = False
    if large is None:
        large = sum(linear.weight.nbytes for linear in dense.values()) >= WORTH
    if dense and large and not (hindrance(dtype) or build()):
        for name, linear in dense.items():
            model.set_submodule(name, FewRowsLinear(linear))


def attend_fast(model: Transformer) -> None:
    """Let caches of a model that has such products attend by kernels/cpu/attention.cpp.

    Where query heads share keys and values torch's is as fast. A step and a sweep of several
    tokens have to go the same way, so that a draft's text is plain text to the bit.
    """
    alone = model.args.n_heads == model.args.n_kv_heads
    if alone and any(isinstance(m, (TiledLinear, FewRowsLinear)) for m in model.modules()):
        model.new_cache = partial(attending, model.new_cache)


def attending(new_cache: Callable[..., KVCache], *given: Any) -> KVCache:
    """A new cache, see KVCache, with such attention."""
    cache = new_cache(*given)
    cache.attention = torch.ops.gpt_flex.attention
    return cache


def hindrance(dtype: torch.dtype) -> str | None:
    """Why the operators cannot be used for such activations, None where they can."""
    has = torch.cpu.get_capabilities()
    if lacking := [name for name in NEEDED if not has.get(name)]:
        return f"this CPU lacks {', '.join(lacking)}"
    if dtype != torch.bfloat16:
        return f"the fast products take bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "the fast products need a C++ compiler: install g++"
    return None


def build() -> str | None:
    """Load the C++ sources, compiled once for each torch and CPU. None: it worked."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("gpt_flex::quantized_linear", "CPU"):
        return None
    from torch.utils import cpp_extension  # imports setuptools: not before it is needed

    if not shutil.which("ninja"):  # pip puts it beside the Python that runs, in no one's path
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    # -march=native: what one machine compiled may crash another that shares its home directory.
    kind = torch.__version__, sorted(torch.cpu.get_capabilities().items()), SOURCES
    texts = b"".join(source.read_bytes() for source in SOURCES)
    if (cache := cache_directory()) is None:
        return "no directory keeps what is compiled for this CPU: set XDG_CACHE_HOME"
    folder = cache / f"cpu_products-{zlib.crc32(repr(kind).encode() + texts):08x}"
    if not list(folder.glob("*.so")):
        log("compiling products for this CPU, once: about twenty seconds ...")
    with contextlib.redirect_stdout(sys.stderr):
        try:
            with alone_in(folder):
                cpp_extension.load(
                    "gpt_flex_cpu_products",
                    [str(source) for source in SOURCES],
                    build_directory=str(folder),
                    extra_cflags=["-O3", "-march=native", "-fopenmp"],
                    extra_ldflags=["-fopenmp"],
                    is_python_module=False,
                )
        except (OSError, RuntimeError, ImportError) as error:
            return f"the products for this CPU did not compile ({str(error).splitlines()[0]})"
    return None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time build there.

    torch's own lock is a file that a build leaves behind when it is killed, and that every later
    one then waits for. This one ends with its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield

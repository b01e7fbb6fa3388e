"""Compiles the C++ of this folder, once for each CPU and version of torch, and registers it.

Start at build. Callers call unsupported_reason first, and use PyTorch's layers if it returns a
reason. The operators are torch.ops.gpt_flex.NAME; kernels/cpu/__init__.py lists them. Their schemas
are defined here, at import, so that code can name them before they are compiled.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from host.log import log
from host.measurements import cache_directory
from host.torch_private import has_cpu_kernel

FOLDER = Path(__file__).resolve().parent
SOURCES, HEADERS = sorted(FOLDER.glob("*.cpp")), sorted(FOLDER.glob("*.h"))
NEEDED = "avx512_vnni", "avx512_bf16"  # features of the CPU that all operators use

torch.library.define(
    "gpt_flex::quantized_linear",
    "(Tensor x, Tensor packed, Tensor? bias, int format, int block, int out_features) -> Tensor",
)
torch.library.register_fake("gpt_flex::quantized_linear")(
    lambda x, *rest: x.new_empty(x.shape[0], rest[-1])
)
torch.library.define(
    "gpt_flex::pack", "(Tensor weight, Tensor scales, Tensor? zeros, Tensor(a!) buffer) -> int"
)
torch.library.define("gpt_flex::layout", "() -> int[]")
torch.library.define("gpt_flex::strip_bytes", "(int format, int row_bytes, int block) -> int")
torch.library.define("gpt_flex::attention", "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor")
torch.library.register_fake("gpt_flex::attention")(lambda q, *rest: torch.empty_like(q))
torch.library.define("gpt_flex::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.register_fake("gpt_flex::linear")(
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0])
)


class Layout(NamedTuple):
    """Constants of layout.h, in the order in which the operator layout returns them.

    A strip is a piece of a packed weight: all inputs of some outputs. A format is a way to pack.
    """

    strip: int  # outputs of a strip
    chunk: int  # inputs that are unpacked together
    int8_block: int  # inputs of an int8 product that share an activation scale
    int8: int  # formats of packed weights: int8,
    int4: int  # int4 with scales of one byte,
    int4_half: int  # int4 with float16 scales


@functools.cache
def layout() -> Layout:
    """Return the constants of the compiled operators. Requires that build succeeded."""
    return Layout(*torch.ops.gpt_flex.layout())


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Return why this CPU or dtype of activations cannot use the operators, or None if it can.

    Call it before build. It compiles nothing.
    """
    has = torch.cpu.get_capabilities()
    if lacking := [name for name in NEEDED if not has.get(name)]:
        return f"this CPU lacks {', '.join(lacking)}"
    if dtype != torch.bfloat16:
        return f"the fast products take bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "the fast products need a C++ compiler: install g++"
    return None


def build() -> str | None:
    """Compile the operators, unless an earlier run has, and load them into this process.

    Returns None, or the reason of a failure, after which callers use PyTorch's layers. Takes about
    twenty seconds once for each CPU and version of torch. Requires that unsupported_reason returned
    None. Other calls in this process return at once: the operator then has a CPU kernel.
    """
    if has_cpu_kernel("gpt_flex::quantized_linear"):
        return None
    if (cache := cache_directory()) is None:
        return "no directory keeps what is compiled for this CPU: set XDG_CACHE_HOME"
    folder = cache / f"cpu_products-{build_key():08x}"
    if not list(folder.glob("*.so")):
        log("compiling products for this CPU, once: about twenty seconds ...")
    if not shutil.which("ninja"):  # pip installs it beside Python, which may not be in PATH
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    try:
        with contextlib.redirect_stdout(sys.stderr), locked(folder):
            load_library(folder)
    except (OSError, RuntimeError, ImportError) as error:
        return f"the products for this CPU did not compile ({str(error).splitlines()[0]})"
    return None


def build_key() -> int:
    """Return a checksum of the sources, the version of torch and the features of the CPU.

    It names the library's folder, so that a change of any of them gives a new library. A library is
    compiled for one CPU (-march=native): on another machine with the same home directory it may
    crash.
    """
    kind = torch.__version__, sorted(torch.cpu.get_capabilities().items()), SOURCES
    texts = b"".join(file.read_bytes() for file in (*SOURCES, *HEADERS))
    return zlib.crc32(repr(kind).encode() + texts)


def load_library(folder: Path) -> None:
    """Load the library of operators; compile it first if the folder does not hold it.

    Loading registers the operators in torch.ops. Raises OSError, RuntimeError or ImportError on
    failure. Call it within locked(folder).
    """
    from torch.utils import cpp_extension  # imports setuptools, which takes time

    cpp_extension.load(
        "gpt_flex_cpu_products",
        [str(source) for source in SOURCES],
        build_directory=str(folder),
        extra_cflags=["-O3", "-march=native", "-fopenmp"],
        extra_ldflags=["-fopenmp"],
        is_python_module=False,
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, no other process builds in the folder, which is created if missing.

    Removes torch's own lock file: a killed build leaves it behind, and every later build would wait
    for its removal. This function's lock, on the file "building", ends with its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield

"""Compiles the C++ of this folder, once for each CPU and version of torch, and registers it.

Start at build. Callers ask unsupported_reason first, and use PyTorch where it gives one.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from host.log import log
from host.measurements import cache_directory
from host.torch_private import has_cpu_kernel

SOURCES = sorted(Path(__file__).resolve().parent.glob("*.cpp"))
NEEDED = "avx512_vnni", "avx512_bf16"

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


def unsupported_reason(dtype: torch.dtype) -> str | None:
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
    if has_cpu_kernel("gpt_flex::quantized_linear"):
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

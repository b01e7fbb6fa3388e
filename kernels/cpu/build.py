"""Compiles the C++ of this folder, once for each CPU and version of torch, and registers it.

Start at build. Callers call unsupported_reason first, and use PyTorch's layers if it returns a
reason. The operators are torch.ops.gpt_flex.NAME; kernels/cpu/__init__.py lists them. Their schemas
are defined here, at import, so that code can name them before they are compiled.
"""

import contextlib
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from host.log import log
from host.measurements import cache_directory

FOLDER = Path(__file__).resolve().parent
SOURCES, HEADERS = sorted(FOLDER.glob("*.cpp")), sorted(FOLDER.glob("*.h"))
DTYPES = torch.bfloat16, torch.float16  # of activations; float32 would lose precision
LIBRARY = "cpu_products"  # the name of the compiled library
UNUSED_DAYS = 60  # after which a compiled library is removed
CHOICE = "GPT_FLEX_ISA"  # environment variable: a name of INSTRUCTION_SETS; forbids faster ones


class InstructionSet(NamedTuple):
    """Instructions that the kernels are compiled for.

    architecture: "x86_64" or "arm64"; "" for any. features: keys of torch.cpu.get_capabilities;
    the CPU needs them all. flags: of the compiler.
    """

    architecture: str
    features: tuple[str, ...]
    flags: tuple[str, ...]


AVX2 = "avx2", "fma3", "f16c", "bmi2"
AVX2_FLAGS = "-mavx2", "-mfma", "-mf16c", "-mbmi2"
AVX512 = *AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"
AVX512_FLAGS = *AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"
VNNI, VNNI_FLAGS = (*AVX512, "avx512_vnni"), (*AVX512_FLAGS, "-mavx512vnni")
BF16, BF16_FLAGS = (*VNNI, "avx512_bf16"), (*VNNI_FLAGS, "-mavx512bf16")
AMX_FLAGS = *BF16_FLAGS, "-mamx-tile", "-mamx-int8", "-mamx-bf16"
# From the fastest to the plainest. "scalar" needs nothing, and every CPU can be held to it.
INSTRUCTION_SETS = {
    "amx": InstructionSet("x86_64", (*BF16, "amx_int8", "amx_bf16"), AMX_FLAGS),
    "avx512_bf16": InstructionSet("x86_64", BF16, BF16_FLAGS),
    "avx512_vnni": InstructionSet("x86_64", VNNI, VNNI_FLAGS),
    "avx512": InstructionSet("x86_64", AVX512, AVX512_FLAGS),
    "avx_vnni": InstructionSet("x86_64", (*AVX2, "avx_vnni"), (*AVX2_FLAGS, "-mavxvnni")),
    "avx2": InstructionSet("x86_64", AVX2, AVX2_FLAGS),
    "neon_dot": InstructionSet("arm64", ("dot",), ("-march=armv8.2-a+dotprod",)),
    "neon": InstructionSet("arm64", (), ()),
    "scalar": InstructionSet("", (), ("-DGPT_FLEX_SCALAR",)),
}
ARM_NAMES = "aarch64", "arm64"  # of platform.machine(): Linux, macOS
# The kernels cast pointers between types of numbers. The compiler must not fuse multiplications and
# additions by itself: only the functions fma and fnma of vector.h do, on every CPU alike.
FLAGS = "-O3", "-fno-strict-aliasing", "-ffp-contract=off"

# The schemas of the operators. register_fake: returns an uninitialised result of the right shape
# and strides. torch.compile asks for it while it traces, and reads the result by these strides.
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
torch.library.define(
    "gpt_flex::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor mask, float? scale=None, float? softcap=None) -> Tensor",
)
# Not empty_like: it keeps the order of a permuted q in memory, and the result is contiguous.
torch.library.register_fake("gpt_flex::attention")(lambda q, *rest, **scores: q.new_empty(q.shape))
for name in ("fast_gelu_tanh", "fast_silu"):
    torch.library.define(f"gpt_flex::{name}", "(Tensor x) -> Tensor")
    torch.library.register_fake(f"gpt_flex::{name}")(lambda x: x.new_empty(x.shape))
torch.library.define(
    "gpt_flex::fast_rms_norm", "(Tensor x, Tensor? weight, float eps, float offset) -> Tensor"
)
torch.library.register_fake("gpt_flex::fast_rms_norm")(lambda x, *rest: x.new_empty(x.shape))
torch.library.define("gpt_flex::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.register_fake("gpt_flex::linear")(
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0])
)
torch.library.define(
    "gpt_flex::decoder_layer",
    "(Tensor[] weights, Tensor?[] biases, int[] packings, Tensor?[] norms, float eps, "
    "float offset, str activation, int[] heads) -> Tensor",
)
torch.library.define(
    "gpt_flex::project_heads",
    "(Tensor layer, Tensor x, Tensor? cos, Tensor? sin, int width) -> Tensor",
)
torch.library.register_fake("gpt_flex::project_heads")(
    lambda layer, x, cos, sin, width: x.new_empty(*x.shape[:-1], width)
)
torch.library.define(
    "gpt_flex::finish_layer", "(Tensor layer, Tensor x, Tensor attention) -> Tensor"
)
torch.library.define(
    "gpt_flex::run_layer",
    "(Tensor layer, Tensor x, Tensor cos, Tensor sin, Tensor(a!) k, Tensor(b!) v, Tensor slots, "
    "Tensor mask, float? scale, float? softcap) -> Tensor",
    # It takes any strides, but of the caches. Without the tag, the compiler computes the mask into
    # another buffer for each layer.
    tags=torch.Tag.flexible_layout,
)
for name in ("finish_layer", "run_layer"):
    torch.library.register_fake(f"gpt_flex::{name}")(lambda layer, x, *rest: x.new_empty(x.shape))


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


def supported_sets() -> list[str]:
    """Return the names of INSTRUCTION_SETS that this CPU has, the fastest first.

    If the environment variable GPT_FLEX_ISA names a set, returns this set and the slower ones.
    Raises ValueError if the CPU lacks the named set.
    """
    has = torch.cpu.get_capabilities()
    machine = "arm64" if platform.machine() in ARM_NAMES else "x86_64"
    names = [
        name
        for name, need in INSTRUCTION_SETS.items()
        if need.architecture in ("", machine) and all(has.get(key) for key in need.features)
    ]
    if not (chosen := os.environ.get(CHOICE)):
        return names
    if chosen not in names:
        raise ValueError(f"{CHOICE}={chosen}: this CPU can be held to {', '.join(names)}")
    return names[names.index(chosen) :]


def fastest_set(device: torch.device) -> str | None:
    """Return the name of the fastest supported set, or None if the device is no CPU.

    Saved measurements have the name in their key, since other kernels have other speeds.
    GPT_FLEX_ISA (see supported_sets) changes it.
    """
    return supported_sets()[0] if device.type == "cpu" else None


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Return why this machine or dtype of activations cannot use the operators, or None if it can.

    Call it before build. It compiles nothing.
    """
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the fast products take bfloat16 and float16, not {name}"
    if not shutil.which(compiler()):
        return f"the fast products need a C++ compiler: install {compiler()}"
    return None


def compiler() -> str:
    """Return the name of the C++ compiler that Inductor uses: that of the environment variable CXX,
    or the system's usual one, which torch's extensions (compile_and_load) call c++."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


BUILDING = threading.Lock()  # held by the thread that builds
loaded: list[str] = []  # the name of the instruction set whose library this process has loaded
failures: list[str] = []  # why the build failed in this process; it is not tried again


def build() -> str | None:
    """Compile the operators, unless an earlier run has, and load them into this process.

    Returns None, or the reason of a failure, after which callers use PyTorch's layers. Takes about
    25 seconds on two cores, once for each CPU and version of torch. Requires that
    unsupported_reason returned None. Later calls in this process return the same at once; calls of
    other threads wait. Raises ValueError as supported_sets does.
    """
    with BUILDING:
        if not loaded and not failures:
            try:
                loaded.append(load_best())
            except (OSError, RuntimeError, ImportError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
                failures.append(f"the fast products did not compile: {reason}")
        return None if loaded else failures[0]


def load_best() -> str:
    """Load the operators for the fastest instruction set that this CPU and the compiler have, and
    return its name.

    Raises ValueError as supported_sets does, and OSError, RuntimeError or ImportError on failure.
    """
    if (cache := cache_directory()) is None:
        raise OSError("no directory keeps what is compiled for this CPU: set XDG_CACHE_HOME")
    if not shutil.which("ninja"):  # pip installs it beside Python, which may not be in PATH
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    names = supported_sets()
    # The last set, "scalar", has no flags that a compiler could refuse.
    name = next((name for name in names if is_accepted(name)), names[-1])
    folder = cache / f"{LIBRARY}-{build_key(name):08x}"
    load_library(folder, name)
    remove_unused(cache, folder)
    return name


def is_accepted(name: str) -> bool:
    """Return whether the compiler knows the flags of an instruction set. It may be older than the
    CPU. Raises OSError if it cannot be started."""
    from torch.utils.cpp_extension import get_cxx_compiler  # imports setuptools, which takes time

    needed = INSTRUCTION_SETS[name].flags
    words = [get_cxx_compiler(), *needed, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(words, capture_output=True).returncode == 0


def instruction_set() -> str | None:
    """Return the name of the instruction set that the operators use; None before build."""
    return loaded[0] if loaded else None


def multiplies_bfloat16() -> bool:
    """Return whether the operators' instruction set has products of bfloat16.

    Requires that build succeeded. On a CPU with these instructions PyTorch's own products and
    attention are fast in bfloat16, too.
    """
    return "avx512_bf16" in INSTRUCTION_SETS[loaded[0]].features


def build_key(name: str) -> int:
    """Return a checksum of the sources, the compiler's name, the version of torch, the CPU and an
    instruction set.

    It names the library's folder, so that a change of any of them gives a new library. Copies of
    this repository share it. A library is tuned for one CPU (-mtune=native).
    """
    has = sorted(torch.cpu.get_capabilities().items())
    kind = torch.__version__, has, name, compiler(), flags(name)
    texts = b"".join(file.read_bytes() for file in (*SOURCES, *HEADERS))
    return zlib.crc32(repr(kind).encode() + texts)


def flags(name: str) -> list[str]:
    """Return all flags with which the sources are compiled for an instruction set.

    macOS's clang has no OpenMP of its own: there the operators use one thread.
    """
    openmp = () if sys.platform == "darwin" else ("-fopenmp",)
    return [*FLAGS, "-mtune=native", *INSTRUCTION_SETS[name].flags, *openmp]


def load_library(folder: Path, name: str) -> None:
    """Load the operators for an instruction set; compile them first if the folder lacks them.

    Loading registers the operators in torch.ops. Raises OSError, RuntimeError or ImportError on
    failure.
    """
    # The file "complete" exists once the library was compiled and loaded. A library without it, as
    # a killed linker leaves it, is compiled again. remove_unused reads the file's time.
    library, complete = folder / f"{LIBRARY}.so", folder / "complete"
    if not threading.main_thread().is_alive():  # a thread builds: after Ctrl-C none may go on
        raise RuntimeError("the process ends")
    if not complete.exists():
        log(f"compiling products for this CPU ({name}), once: 25 seconds on two cores ...")
    with locked(folder):
        try:
            if complete.exists():
                # Not by cpp_extension.load, which compiles again for a copy of this repository.
                torch.ops.load_library(library)
            else:
                compile_and_load(folder, name)
        except OSError:  # the file is damaged: the next run compiles it again
            library.unlink(missing_ok=True)
            complete.unlink(missing_ok=True)
            raise
        complete.touch()


def compile_and_load(folder: Path, name: str) -> None:
    """Compile the operators for an instruction set into the folder, and load them. Raises OSError,
    RuntimeError or ImportError on failure."""
    from torch.utils import cpp_extension  # imports setuptools, which takes time

    cpp_extension.load(
        LIBRARY,
        [str(source) for source in SOURCES],
        build_directory=str(folder),
        extra_cflags=flags(name),
        extra_ldflags=["-fopenmp"] if "-fopenmp" in flags(name) else [],
        is_python_module=False,
    )


def remove_unused(cache: Path, own: Path) -> None:
    """Remove the folders of libraries, and of failed builds, that no process has used for
    UNUSED_DAYS: those of other sources, CPUs or versions of torch. cache: the directory of these
    folders. own: the folder of the library that this process has loaded."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in cache.glob(f"{LIBRARY}-*"):
        # Another process may use it or remove it at the same time, or another user may own it.
        with contextlib.suppress(OSError):
            complete = folder / "complete"
            # Without the file "complete", a build has failed or still runs.
            used = (complete if complete.exists() else folder).stat().st_mtime
            if folder != own and used < oldest:
                with (folder / "building").open("w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, no other process builds in the folder, which is created if missing.

    Removes torch's own lock file: a killed build leaves that file behind, and every later build
    would wait for its removal. The system releases this function's lock, on the file "building",
    when the process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield

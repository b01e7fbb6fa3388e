"""The products of cpu_products.cpp: built once, registered as operators, put into a model.

Start at use_tiles. It replaces quantised linears by TiledLinear, which hold the same integers in
the order that the CPU reads them in. Where the CPU, the compiler or the dtype does not allow for
that, a model keeps the linears of quantized.py, which are slower and the reference for these.
"""

import contextlib
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import RMSNorm
from quantized import Int8Linear, QuantizedLinear, unpack_nibbles

SOURCE = Path(__file__).resolve().parent / "cpu_products.cpp"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-flex"
TILE = 16  # outputs
INT8_BLOCK = 128  # inputs that share a scale of the activations
NEEDED = ("avx512_vnni", "avx512_bf16")


def declare(schema: str) -> None:
    """An operator whose last arguments are int block, int out_features."""
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.register_fake(name)(lambda x, *rest: x.new_empty(x.shape[0], rest[-1]))


declare(
    "int8_linear(Tensor x, Tensor tiles, Tensor scales, Tensor? bias, int block, "
    "int out_features) -> Tensor"
)
declare(
    "int4_linear(Tensor x, Tensor tiles, Tensor scales, Tensor zeros, Tensor? bias, int block, "
    "int out_features) -> Tensor"
)


class TiledLinear(nn.Module):
    """A quantised linear in the order that cpu_products.cpp reads: bfloat16 in, bfloat16 out."""

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        eight = isinstance(linear, Int8Linear)
        packed = pack_int8(linear) if eight else pack_int4(linear)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        bias = None if linear.bias is None else pad(linear.bias.detach(), TILE)
        self.register_buffer("bias", bias)
        self._packed = tuple(packed)
        self._op = torch.ops.gpt_flex.int8_linear if eight else torch.ops.gpt_flex.int4_linear
        self._block = INT8_BLOCK if eight else linear.groupsize

    def forward(self, x: Tensor) -> Tensor:
        packed = (getattr(self, name) for name in self._packed)
        y = self._op(x.flatten(0, -2), *packed, self.bias, self._block, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)


def pack_int8(linear: QuantizedLinear) -> dict[str, Tensor]:
    q = (linear.weight ^ -128).view(torch.uint8)  # + 128
    q = pad(pad(q, INT8_BLOCK).t(), TILE).t()  # (N', K')
    tiles = q.reshape(len(q) // TILE, TILE, -1, 4).transpose(1, 2).contiguous()  # (.., K'/4, 16, 4)
    return {"tiles": tiles, "scales": pad(linear.scales, TILE)}


def pack_int4(linear: QuantizedLinear) -> dict[str, Tensor]:
    q = pad(unpack_nibbles(linear.weight).t(), TILE).t()  # (N', P*S)
    q = q.reshape(len(q) // TILE, TILE, -1, 2, 4).permute(0, 2, 3, 1, 4)  # (.., P*S/8, 2, 16, 4)
    scales = pad(linear.scales.t(), TILE)  # (P, N')
    P = len(scales)
    zeros = pad(unpack_nibbles(linear.zeros)[:, :P].t(), TILE).view(P, -1, 8, 2)
    zeros = zeros[..., 0] | (zeros[..., 1] << 4)  # (P, N'/16, 8)
    return {
        "tiles": (q[:, :, 0] | (q[:, :, 1] << 4)).contiguous(),
        "scales": scales.view(P, -1, TILE).transpose(0, 1).contiguous(),  # (N'/16, P, 16)
        "zeros": zeros.transpose(0, 1).contiguous(),  # (N'/16, P, 8)
    }


def pad(x: Tensor, multiple: int) -> Tensor:
    """The last dimension, with zeros, to a multiple."""
    return F.pad(x, (0, -x.shape[-1] % multiple))


def use_tiles(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the quantised linears of a model that is on the CPU, if that is possible here."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if linears and (reason := hindrance(dtype) or build()):
        print(f"quantised layers run slowly here: {reason}", file=sys.stderr)
        return
    for name, linear in linears.items():
        model.set_submodule(name, TiledLinear(linear))  # one layer at a time is there twice
    for module in model.modules():
        if linears and isinstance(module, RMSNorm):
            module.same_bits = False


def hindrance(dtype: torch.dtype) -> str | None:
    """Why the operators cannot be used, None where they can."""
    has = torch.cpu.get_capabilities()
    if lacking := [name for name in NEEDED if not has.get(name)]:
        return f"this CPU lacks {', '.join(lacking)}"
    if dtype != torch.bfloat16:
        return f"the fast products take bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "the fast products need a C++ compiler: install g++"
    return None


def build() -> str | None:
    """Load cpu_products.cpp, compiled once for each torch and kind of CPU. None: it worked."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("gpt_flex::int4_linear", "CPU"):
        return None
    from torch.utils import cpp_extension  # imports setuptools: not before it is needed

    if not shutil.which("ninja"):  # pip puts it beside the Python that runs, in no one's path
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    # -march=native: what one machine compiled may crash another that shares its home directory.
    kind = repr((torch.__version__, sorted(torch.cpu.get_capabilities().items()))).encode()
    folder = CACHE / f"cpu_products-{zlib.crc32(kind):08x}"
    if not list(folder.glob("*.so")):
        print("compiling cpu_products.cpp, once: about ten seconds ...", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cpp_extension.load(
                "gpt_flex_cpu_products",
                [str(SOURCE)],
                build_directory=str(folder),
                extra_cflags=["-O3", "-march=native", "-fopenmp"],
                extra_ldflags=["-fopenmp"],
                is_python_module=False,
            )
        except (OSError, RuntimeError, ImportError) as error:
            return f"cpu_products.cpp did not compile ({str(error).splitlines()[0]})"
    return None

"""int4 checkpoints that others' tools wrote, read as Int4Linear's: GPTQ's layout and AWQ's.

Start at foreign_scheme, which says of a `quantization_config` whether it can be read; then
foreign_fields, what becomes of each tensor. In both layouts an int32 holds eight numbers of four
bits, from the lowest bits up: in GPTQ's those of one output and eight inputs, in AWQ's those of
one input and eight outputs, in an order of its own. Scales and zero points mean what they mean in
quantized.py, but GPTQ's older format stores zero points less one. (AutoGPTQ 0.7.1,
qlinear_cuda_old.py; AutoAWQ 0.2.9, gemm.py.)

Shapes: N out_features, K in_features, S groupsize, P = ceil(K / S) groups.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf import Config, short
from quantized import GROUP_SIZES, pack_nibbles, unpack_nibbles

Translate = Callable[[Tensor], Tensor]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 the first, second, ... output lies
# What a quantization_config has to say to be read, the first where it says nothing; None: it must.
READ = {
    "gptq": {
        "bits": (None, 4),
        "desc_act": (False,),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
    },
    "awq": {"bits": (None, 4), "zero_point": (True,), "version": ("gemm", "GEMM")},
}


def foreign_scheme(config: dict[str, Any]) -> dict[str, Any] | None:
    """How the linears of a Hugging Face checkpoint are quantised, None: not at all.

    Raises ValueError naming what about it cannot be read.
    """
    if not (said := Config(config).section("quantization_config").values):
        return None
    method, sizes = said.get("quant_method", "unknown"), ", ".join(map(str, GROUP_SIZES))
    method = method if isinstance(method, str) else short(method)
    wanted = READ.get(method, {}) | {"group_size": (None, *GROUP_SIZES), "lm_head": (False,)}
    found = {key: said.get(key, known[0]) for key, known in wanted.items()}
    faults = [
        f"{key} {short(found[key])}"
        for key, known in wanted.items()
        if found[key] is None or (type(found[key]), found[key]) not in [(type(k), k) for k in known]
    ]
    if method not in READ or faults:
        what = ", ".join(faults) if method in READ else "which"
        raise ValueError(
            f"the checkpoint is quantised by '{method}' (quantization_config in its config.json), "
            f"{what} cannot be read; gptq without desc_act and awq can, in 4 bits and groups "
            f"of {sizes}: download the unquantised original and use quantize.py"
        )
    kind = found["checkpoint_format"] if method == "gptq" else method
    linears = {"bits": 4, "groupsize": found["group_size"]}
    return {"mode": kind, "linears": linears, "output": {}}


def foreign_fields(scheme: dict[str, Any]) -> dict[str, tuple[str, Translate]]:
    """Their name of a layer's tensor -> that of an Int4Linear's buffer, and how to make it."""
    of_gptq, S = scheme["mode"] != "awq", scheme["linears"]["groupsize"]
    less_one = scheme["mode"] == "gptq"

    def weight(words: Tensor) -> Tensor:  # (K/8, N) or (K, N/8) -> (N, P*S/2)
        q = nibbles(words.t()) if of_gptq else in_order(nibbles(words)).t()  # (N, K)
        return pack_nibbles(F.pad(q, (0, -q.shape[1] % S)))

    def zeros(words: Tensor) -> Tensor:  # (P, N/8) -> (N, ceil(P/2))
        z = nibbles(words) if of_gptq else in_order(nibbles(words))  # (P, N)
        if less_one and not z.is_meta and (z == 15).any():  # meta: asked for its shape alone
            raise ValueError("the checkpoint has zero points that its format cannot say")
        return pack_nibbles((z + less_one).t())

    def scales(theirs: Tensor) -> Tensor:  # (P, N) -> (N, P)
        return theirs.t().half()

    return {"qweight": ("weight", weight), "qzeros": ("zeros", zeros), "scales": ("scales", scales)}


def nibbles(words: Tensor) -> Tensor:
    """(..., n) int32 -> (..., 8n) uint8, from the lowest bits up."""
    return unpack_nibbles(words.contiguous().view(torch.uint8))


def in_order(q: Tensor) -> Tensor:
    """AWQ's outputs, (..., 8n), as they come."""
    return q.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)

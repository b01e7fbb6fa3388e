"""Loads int4 checkpoints in GPTQ's and AWQ's layouts into Int4Linear.

Start at quantization_config, then foreign_scheme, which tells whether it can be read, and
foreign_fields, what becomes of each tensor. In both layouts an int32 holds eight numbers of four
bits, from the lowest bits up: in GPTQ's those of one output and eight inputs, in AWQ's those of
one input and eight outputs, in an order of its own. Scales and zero points mean what they mean in
quantized.py, but GPTQ's older format stores zero points less one. (AutoGPTQ 0.7.1,
qlinear_cuda_old.py; AutoAWQ 0.2.9, gemm.py.)

Shapes: N out_features, K in_features, S groupsize, P = ceil(K / S) groups.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from host.files import read_object, short_json
from quant.linear import GROUP_SIZES, pack_nibbles, unpack_nibbles

Translate = Callable[[Tensor], Tensor]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 the first, second, ... output lies
# What a quantization_config has to say to be read, the first where it says nothing; None: it must.
READ = {
    "gptq": {
        "bits": (None, 4),
        "group_size": (None, *GROUP_SIZES),
        "lm_head": (False,),
        "desc_act": (False,),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
    },
    "awq": {
        "bits": (None, 4),
        "group_size": (None, *GROUP_SIZES),
        "lm_head": (False,),
        "zero_point": (True,),
        "version": ("gemm", "GEMM"),
    },
}
# Files of before config.json had a quantization_config (AutoGPTQ until August 2023, AutoAWQ until
# December): whose they are, and what we call their keys.
FILES = {
    "quantize_config.json": ("gptq", {}),
    "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
}
REMEDY = "download the unquantised original and use quantize.py"


def quantization_config(
    config: dict[str, Any], folder: Path, packed: bool
) -> dict[str, Any] | None:
    """What a checkpoint says about how it is quantised, None: it is not.

    packed: whether it has such tensors. Raises ValueError for what is no object, for mlx's kind,
    and for packed tensors that no file explains.
    """
    for key in ("quantization_config", "quantization"):
        if not isinstance(config.get(key), dict | None):
            raise ValueError(
                f"config.json: {key} is {short_json(config[key])} and must be an object"
            )
    found = config.get("quantization_config")
    if config.get("quantization") and "quant_method" not in (found or {}):
        raise ValueError(
            "the checkpoint is quantised by mlx ('quantization' in its config.json), which cannot "
            f"be read: {REMEDY}"
        )
    if found or not packed:
        return found
    for file, (method, keys) in FILES.items():
        if (folder / file).is_file():
            found = {keys.get(k, k): value for k, value in read_object(folder / file).items()}
            return {"quant_method": method} | found
    raise ValueError(
        "its qweight tensors are GPTQ's or AWQ's, and config.json has no quantization_config, nor "
        f"is there a {' or '.join(FILES)}: download that file, too"
    )


def foreign_scheme(found: dict[str, Any]) -> dict[str, Any]:
    """How a checkpoint's linears are quantised, of its quantization_config.

    Raises ValueError naming what about it cannot be read.
    """
    method = found.get("quant_method", "unknown")
    readable = isinstance(method, str) and method in READ
    wanted = READ[method] if readable else {}
    values = {key: found.get(key, known[0]) for key, known in wanted.items()}
    faults = [
        f"{key} {short_json(values[key])}"
        for key, known in wanted.items()
        if values[key] is None or not any(same(values[key], value) for value in known)
    ]
    if not readable or faults:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(
            f"the checkpoint is quantised by '{str(method)[:40]}' (its quantization_config), "
            f"{', '.join(faults) or 'which'} cannot be read; gptq without desc_act and awq can, "
            f"in 4 bits and groups of {sizes}: {REMEDY}"
        )
    symmetric = method == "gptq" and found.get("sym", True) is True  # as in transformers
    kind = values["checkpoint_format"] if method == "gptq" else method
    return {
        "mode": f"{kind}_sym" if symmetric else kind,
        "linears": {"bits": 4, "groupsize": values["group_size"]},
        "output": {},
    }


def same(a: Any, b: Any) -> bool:
    """Equal, and of one type: True is no 1, and 64.0 no 64."""
    return type(a) is type(b) and a == b


def foreign_fields(mode: str, groupsize: int) -> dict[str, tuple[str, Translate]]:
    """The suffix of a GPTQ or AWQ tensor -> Int4Linear's buffer, and the function that converts."""
    kind, symmetric = mode.removesuffix("_sym"), mode.endswith("_sym")
    of_gptq, less_one = kind != "awq", kind == "gptq"

    def weight(words: Tensor) -> Tensor:  # (K/8, N) or (K, N/8) -> (N, P*S/2)
        check_matrix(words, words.dtype == torch.int32, "int32")
        q = nibbles(words.t()) if of_gptq else in_order(nibbles(words)).t()  # (N, K)
        return pack_nibbles(F.pad(q, (0, -q.shape[1] % groupsize)))

    def zeros(words: Tensor) -> Tensor:  # (P, N/8) -> (N, ceil(P/2))
        check_matrix(words, words.dtype == torch.int32, "int32")
        z = nibbles(words) if of_gptq else in_order(nibbles(words))  # (P, N)
        if words.is_meta:  # asked for its shape alone
            return pack_nibbles(z.t())
        if symmetric and ((z == 7).all() or (z == 8).all()):
            # A symmetric file's zero points are 8, stored as 7 (gptq) or 8 (gptq_v2). The label may
            # be wrong: GPTQModel 5.0 stores 8 and calls it "gptq".
            return pack_nibbles(torch.full_like(z, 8).t())
        if less_one and (z == 15).any():
            raise ValueError(f"has zero points of 16, which do not fit into four bits: {REMEDY}")
        return pack_nibbles((z + less_one).t())

    def scales(theirs: Tensor) -> Tensor:  # (P, N) -> (N, P)
        check_matrix(theirs, theirs.is_floating_point(), "floating-point")
        return theirs.t().half()

    return {"qweight": ("weight", weight), "qzeros": ("zeros", zeros), "scales": ("scales", scales)}


def check_matrix(tensor: Tensor, fits: bool, wanted: str) -> None:
    if tensor.dim() != 2 or not fits:
        found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
        raise ValueError(f"is {found} and should be a matrix, {wanted}: {REMEDY}")


def nibbles(words: Tensor) -> Tensor:
    """(..., n) int32 -> (..., 8n) uint8, from the lowest bits up."""
    return unpack_nibbles(words.contiguous().view(torch.uint8))


def in_order(q: Tensor) -> Tensor:
    """AWQ's outputs, (..., 8n), as they come."""
    return q.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)

"""Converts the int4 layouts of GPTQ and AWQ checkpoints to the buffers of Int4Linear.

Start at quantization_config, then foreign_scheme, which checks that the layout can be read, and
foreign_fields, which converts each tensor. In both layouts an int32 holds eight numbers of four
bits, the first in the lowest bits. In a GPTQ weight these are eight inputs of one output; in AWQ,
eight outputs of one input, in the order AWQ_ORDER; zero points are eight outputs of one group in
both. Scales and zero points mean the same as in quant/linear.py, but GPTQ's older
checkpoint_format, "gptq", stores each zero point minus one; the newer is "gptq_v2".

Words: qweight, qzeros and scales are the packed tensors of a linear layer: its weights as integers
of four bits, and a zero point and a scale for each output and group of inputs; a nibble is half a
byte, one number of four bits; a word is an int32.

Source: AutoGPTQ 0.7.1, qlinear_cuda_old.py; AutoAWQ 0.2.9, gemm.py.

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
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # position in an int32 of the first, second, ... output
# quant_method -> key of a quantization_config -> its default, then the other supported values. A
# default of None is no supported value: the key is required.
SUPPORTED = {
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
# Files that held the settings before config.json did (AutoGPTQ until August 2023, AutoAWQ until
# December 2023): file -> (quant_method, its key -> the key of a quantization_config).
SETTINGS_FILES = {
    "quantize_config.json": ("gptq", {}),
    "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
}
REMEDY = "download the unquantised original and use quantize.py"


def quantization_config(
    config: dict[str, Any], folder: Path, packed: bool
) -> dict[str, Any] | None:
    """Returns a checkpoint's quantization_config, with the keys that transformers uses; None for a
    checkpoint that is not quantised.

    config: the content of config.json. folder: where it lies. packed: whether the checkpoint has
    qweight tensors; if it has and config.json does not describe them, the older files of
    SETTINGS_FILES in the folder are read. Raises ValueError if the value of quantization_config or
    quantization is no object, if mlx has quantised the checkpoint, and if no file describes the
    packed tensors.
    """
    for key in ("quantization_config", "quantization"):
        if not isinstance(config.get(key), dict | None):
            raise ValueError(
                f"config.json: {key} is {short_json(config[key])} and must be an object"
            )
    settings = config.get("quantization_config")
    # mlx repeats its "quantization" as quantization_config, which then has no quant_method.
    if config.get("quantization") and "quant_method" not in (settings or {}):
        raise ValueError(
            "the checkpoint is quantised by mlx ('quantization' in its config.json), which cannot "
            f"be read: {REMEDY}"
        )
    if settings or not packed:
        return settings or None  # config.json may have {}
    for file, (method, keys) in SETTINGS_FILES.items():
        if (folder / file).is_file():
            settings = {keys.get(k, k): value for k, value in read_object(folder / file).items()}
            return {"quant_method": method} | settings
    raise ValueError(
        "its qweight tensors are GPTQ's or AWQ's, and config.json has no quantization_config, nor "
        f"is there a {' or '.join(SETTINGS_FILES)}: download that file, too"
    )


def foreign_scheme(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the quantisation scheme (see quant.linear.make_scheme) that a quantization_config
    describes.

    settings: as quantization_config returns them, not empty. In the scheme, "mode" tells
    foreign_fields the layout: "gptq", "gptq_v2" or "awq", and "_sym" after it for symmetric GPTQ,
    whose zero points should all be 8. "linears" holds the bits and the group size of all linears in
    layers; "output" is empty because the output head is dense (lm_head is False). Raises
    ValueError, which lists the keys whose values are not supported.
    """
    method = settings.get("quant_method", "unknown")
    known_method = isinstance(method, str) and method in SUPPORTED
    supported = SUPPORTED[method] if known_method else {}
    values = {key: settings.get(key, choices[0]) for key, choices in supported.items()}
    faults = [
        f"{key} {short_json(values[key])}"
        for key, choices in supported.items()
        if values[key] is None or not any(same(values[key], value) for value in choices)
    ]
    if not known_method or faults:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(
            f"the checkpoint is quantised by '{str(method)[:40]}' (its quantization_config), "
            f"{', '.join(faults) or 'which'} cannot be read; gptq without desc_act and awq can, "
            f"in 4 bits and groups of {sizes}: {REMEDY}"
        )
    symmetric = method == "gptq" and settings.get("sym", True) is True  # as in transformers
    kind = values["checkpoint_format"] if method == "gptq" else method
    return {
        "mode": f"{kind}_sym" if symmetric else kind,
        "linears": {"bits": 4, "groupsize": values["group_size"]},
        "output": {},
    }


def same(a: Any, b: Any) -> bool:
    """Returns whether the values are equal and of the same type: True is not 1, 64.0 is not 64."""
    return type(a) is type(b) and a == b


def foreign_fields(mode: str, groupsize: int) -> dict[str, tuple[str, Translate]]:
    """Returns kind of a packed tensor, the last word of its name -> (the buffer of Int4Linear that
    it becomes, the function that converts it).

    mode, groupsize: of a scheme of foreign_scheme. The functions also accept meta tensors, for the
    shape of their result. They raise ValueError for a tensor of the wrong dtype or shape, or with a
    zero point of 16.
    """
    kind, symmetric = mode.removesuffix("_sym"), mode.endswith("_sym")
    is_gptq, stores_minus_one = kind != "awq", kind == "gptq"

    def weight(words: Tensor) -> Tensor:  # GPTQ (K/8, N) or AWQ (K, N/8) -> (N, P*S/2)
        """Convert qweight. Integers of 0 fill the last group up to S inputs."""
        check_matrix(words, words.dtype == torch.int32, "int32")
        q = nibbles(words.t()) if is_gptq else in_order(nibbles(words)).t()  # (N, K)
        return pack_nibbles(F.pad(q, (0, -q.shape[1] % groupsize)))

    def zeros(words: Tensor) -> Tensor:  # (P, N/8) -> (N, ceil(P/2))
        """Convert qzeros, the zero points of the groups."""
        check_matrix(words, words.dtype == torch.int32, "int32")
        z = nibbles(words) if is_gptq else in_order(nibbles(words))  # (P, N)
        if words.is_meta:  # only the shape is needed
            return pack_nibbles(z.t())
        if symmetric and ((z == 7).all() or (z == 8).all()):
            # Zero points of a symmetric file are 8, stored as 7 ("gptq") or 8 ("gptq_v2"). The
            # name of the format may be wrong: GPTQModel 5.0 stores 8 and writes "gptq".
            return pack_nibbles(torch.full_like(z, 8).t())
        if stores_minus_one and (z == 15).any():
            raise ValueError(f"has zero points of 16, which do not fit into four bits: {REMEDY}")
        return pack_nibbles((z + stores_minus_one).t())  # True counts as 1

    def scales(theirs: Tensor) -> Tensor:  # (P, N) -> (N, P)
        """Convert the scales of the groups to float16."""
        check_matrix(theirs, theirs.is_floating_point(), "floating-point")
        return theirs.t().half()

    return {"qweight": ("weight", weight), "qzeros": ("zeros", zeros), "scales": ("scales", scales)}


def check_matrix(tensor: Tensor, dtype_fits: bool, expected: str) -> None:
    """Raises ValueError unless the tensor is a matrix and dtype_fits is true.

    expected: the right dtype, in words for the message. The message begins with a verb:
    StoredTensor.converted puts the names of file and tensor before it.
    """
    if tensor.dim() != 2 or not dtype_fits:
        actual = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
        raise ValueError(f"is {actual} and should be a matrix, {expected}: {REMEDY}")


def nibbles(words: Tensor) -> Tensor:
    """Unpack words, (..., n) int32, to (..., 8n) uint8, the lowest bits first."""
    # contiguous: view would refuse a transposed matrix.
    return unpack_nibbles(words.contiguous().view(torch.uint8))


def in_order(q: Tensor) -> Tensor:
    """Put the outputs of an AWQ tensor, unpacked to (..., 8n), into ascending order."""
    return q.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)  # (..., n, 8) -> (..., 8n)

"""How large a program's tile is: a table for each kernel, class of shapes and kind of GPU.

Written from what `benchmarks/gpu_tune.py` measured (benchmarks/results/gpu-tune-*.json); a user's
first token does not wait for an autotuner. GPUs that are not in it use the table of the nearest
older compute capability, which is right, if perhaps not the fastest.
"""

from typing import NamedTuple


class OneRow(NamedTuple):
    """outputs of a program, chunks (16 bytes of weights) of a step, warps."""

    outputs: int
    chunks: int
    warps: int


class FewRows(NamedTuple):
    """outputs of a program, words (4 bytes of weights) of a step, programs that share K, warps."""

    outputs: int
    words: int
    splits: int
    warps: int


def shape_class(N: int, K: int) -> str:
    """head: a vocabulary. wide: w1, w3. long: w2. square: attention's, and small models' all."""
    if N > 65536:
        return "head"
    if N > 16384:
        return "wide"
    return "long" if K > 8192 else "square"


# What is there for capability 8.0 was measured on 9.0: no such card was at hand.
ONE_ROW: dict[str, dict[str, OneRow]] = {
    "dense": {
        "square": OneRow(2, 64, 4),
        "long": OneRow(2, 64, 4),
        "wide": OneRow(2, 64, 4),
        "head": OneRow(4, 64, 4),
    },
    "int8": {
        "square": OneRow(2, 64, 2),
        "long": OneRow(2, 64, 2),
        "wide": OneRow(2, 64, 2),
        "head": OneRow(2, 64, 2),
    },
    "int4": {
        "square": OneRow(2, 32, 1),
        "long": OneRow(2, 32, 1),
        "wide": OneRow(2, 32, 1),
        "head": OneRow(2, 32, 1),
    },
}
FEW_ROWS: dict[str, dict[str, FewRows]] = {
    "int8": {
        "square": FewRows(64, 32, 4, 4),
        "long": FewRows(64, 32, 4, 4),
        "wide": FewRows(64, 32, 1, 4),
        "head": FewRows(64, 32, 1, 4),
    },
    "int4": {
        "square": FewRows(64, 32, 4, 4),
        "long": FewRows(64, 32, 4, 4),
        "wide": FewRows(64, 32, 1, 4),
        "head": FewRows(64, 32, 1, 4),
    },
}

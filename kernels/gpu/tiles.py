"""How large a program's tile is: a table for each kernel, class of shapes and kind of GPU.

Written from what `benchmarks/gpu_tune.py` measured (benchmarks/results/gpu-tune-*.json); a user's
first token does not wait for an autotuner. All of it was measured on an H100; another GPU computes
the same by these tiles, if perhaps not as fast as it could.
"""

from typing import NamedTuple


class OneRow(NamedTuple):
    """outputs of a program, chunks (16 bytes of weights) of a step, warps."""

    outputs: int
    chunks: int
    warps: int


class FewRows(NamedTuple):
    """outputs of a program, words (4 bytes of weights) of a step, programs that divide K, warps,
    and steps that are under way at a time (Triton's num_stages)."""

    outputs: int
    words: int
    splits: int
    warps: int
    stages: int


def shape_class(N: int, K: int) -> str:
    """head: a vocabulary. wide: w1, w3. long: w2. square: attention's, and small models' all."""
    if N > 65536:
        return "head"
    if N > 16384:
        return "wide"
    return "long" if K > 8192 else "square"


ONE_ROW: dict[str, dict[str, OneRow]] = {
    "dense": {
        "square": OneRow(1, 128, 4),
        "long": OneRow(1, 256, 8),
        "wide": OneRow(1, 256, 8),
        "head": OneRow(1, 512, 8),
    },
    "int8": {
        "square": OneRow(2, 128, 4),
        "long": OneRow(1, 256, 8),
        "wide": OneRow(1, 256, 4),
        "head": OneRow(2, 64, 2),
    },
    "int4": {
        "square": OneRow(2, 32, 1),
        "long": OneRow(1, 256, 8),
        "wide": OneRow(2, 32, 1),
        "head": OneRow(2, 64, 1),
    },
}
# By whether there are more than MANY rows: then a program needs more threads for its sums. The bits
# of a row depend on that, and on nothing else about the rows beside it.
MANY = 16
FEW_ROWS: dict[tuple[str, bool], dict[str, FewRows]] = {
    ("int8", False): {
        "square": FewRows(16, 32, 2, 1, 3),
        "long": FewRows(16, 32, 4, 1, 3),
        "wide": FewRows(64, 32, 1, 4, 3),
        "head": FewRows(64, 32, 1, 4, 2),
    },
    ("int4", False): {
        "square": FewRows(64, 32, 4, 4, 3),
        "long": FewRows(64, 32, 4, 4, 2),
        "wide": FewRows(32, 32, 1, 2, 2),
        "head": FewRows(32, 32, 1, 2, 2),
    },
    ("int8", True): {
        "square": FewRows(64, 32, 4, 4, 3),
        "long": FewRows(64, 32, 4, 4, 3),
        "wide": FewRows(64, 32, 1, 4, 2),
        "head": FewRows(64, 32, 1, 4, 3),
    },
    ("int4", True): {
        "square": FewRows(64, 32, 2, 4, 3),
        "long": FewRows(64, 32, 4, 4, 3),
        "wide": FewRows(64, 32, 1, 4, 3),
        "head": FewRows(64, 32, 1, 4, 2),
    },
}


def few_rows_tile(kind: str, M: int, N: int, K: int) -> FewRows:
    return FEW_ROWS[kind, M > MANY][shape_class(N, K)]

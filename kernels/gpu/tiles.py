"""Tile sizes for each kernel and class of shapes. Start at few_rows_tile.

The tables replace an autotuner, which would delay the first token. benchmarks/gpu_tune.py measured
them on an H100 (benchmarks/results/*gpu-tune*). Another GPU computes the same results with them;
other tiles may be faster there. A program is a block of threads that computes a tile, a piece of
the result; warps: the program's threads divided by 32.

Shapes: M rows of activations, N out_features, K in_features.
"""

from typing import NamedTuple


class OneRow(NamedTuple):
    """The tile of a one-row kernel.

    outputs: computed by a program. chunks: of 16 bytes of weights, which a step of the program's
    loop reads from each output's row.
    """

    outputs: int
    chunks: int
    warps: int


class FewRows(NamedTuple):
    """The tile of a few-rows kernel.

    outputs: of each row, computed by a program. words: of 4 bytes of weights, which a step of the
    program's loop reads from each output's row. splits: programs that divide the K inputs among
    them. stages: Triton's num_stages, the steps whose loads are under way at a time.
    """

    outputs: int
    words: int
    splits: int
    warps: int
    stages: int


def shape_class(N: int, K: int) -> str:
    """Return the class of a weight, (N, K), by which the tables below choose a tile.

    The limits lie between the shapes of large models' layers: "head" is the output head, "wide" w1
    and w3 (in one matrix, w13), "long" w2, "square" attention and all layers of small models.
    """
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
# The bool of a key: whether there are more than MAX_SMALL_TILE_ROWS rows, for which a program needs
# more threads. The number of rows changes the bits of a row's result by this bool only.
MAX_SMALL_TILE_ROWS = 16
FEW_ROWS: dict[tuple[str, bool], dict[str, FewRows]] = {
    ("int8", False): {
        "square": FewRows(16, 64, 4, 1, 2),
        "long": FewRows(32, 64, 4, 2, 3),
        "wide": FewRows(32, 64, 1, 2, 2),
        "head": FewRows(32, 64, 1, 2, 2),
    },
    ("int4", False): {
        "square": FewRows(32, 64, 4, 2, 3),
        "long": FewRows(16, 64, 4, 1, 3),
        "wide": FewRows(32, 32, 1, 2, 3),
        "head": FewRows(32, 64, 1, 2, 3),
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
    """Return the tile for (M, K) x (N, K) -> (M, N), M up to 64. kind: "int8" or "int4"."""
    return FEW_ROWS[kind, M > MAX_SMALL_TILE_ROWS][shape_class(N, K)]

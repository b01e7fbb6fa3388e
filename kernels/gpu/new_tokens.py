"""What lies between the products wqkv and wo of a layer, in one kernel: norms and rotary positions
of new queries and keys, the store of keys and values in the cache, and causal attention.

Start at new_tokens_kernel. It takes the place of three kernels: rotate.py, attention.py, and the
conversion before the product wo (to_fixed_point.py or few_rows.scale_kernel). A kernel that follows
another one waits for it, and for its own first loads: about 2 us each, where a layer of Llama 3.1
8B takes 77 us in int4 on an H100.

The programs of a key/value head divide the visible slots among them, as in attention.py. The new
tokens' keys and values are stored by the program to whose share of slots they belong. The other
programs read other slots or other heads, so none reads what this one writes. All programs rotate
the head's queries and new keys.

Shapes: those of attention.py; P pairs of rotated channels.
"""

import triton
import triton.language as tl

from kernels.gpu.attention import arrives_last, attend_share, combine, store_part
from kernels.gpu.few_rows import store_spans
from kernels.gpu.inputs import begin, wait
from kernels.gpu.rotate import rotated
from kernels.gpu.to_fixed_point import store_chunks


@triton.jit
def new_tokens_kernel(
    qkv,  # (B, T, H + 2 G, E): queries, keys, values
    cos,  # (B, T, P) float32
    sin,  # (B, T, P) float32
    pos,  # (B, T) int64: slots of the new tokens
    q_norm,  # (E,), with NORM
    k_norm,  # (E,), with NORM
    k,  # (B, slots + 1, G, E): the cache's, written in place
    v,
    parts,  # see attention_kernel
    tops,
    arrived,
    out,  # (B, T, H, E); q of a FixedPoint, or the numbers of ScaledRows
    units,  # of a FixedPoint or ScaledRows
    sums,  # of a FixedPoint
    T,
    G,
    batch_stride,  # from row to row of a cache, in tokens
    slot_stride,  # from slot to slot, in tokens
    factor,  # see attention_kernel
    cap,
    eps,  # of the norms
    R: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,  # E rounded up to a power of two
    P: tl.constexpr,
    BQ: tl.constexpr,  # R*T rounded up to a power of two, at least 16
    BS: tl.constexpr,
    STEPS: tl.constexpr,  # of BS slots each
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,  # inputs of a chunk of fixed point or of a span; 0: do not convert
    PER_WORD: tl.constexpr,  # see scale_kernel; 0: fixed point, not spans
    DOT: tl.constexpr,  # the type in which tensor cores multiply
    NORM: tl.constexpr,  # whether queries and keys have norms
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with the new queries of a key/value head to a program's share of the slots, after the
    norms, the rotation and the store of what is new.

    The launch has (B * G, SPLITS) programs, see attention_kernel; the new tokens' slots are below
    SPLITS * STEPS * BS. With SIZE > 0 the results are converted for the product that follows: to a
    FixedPoint, which requires B = T = 1 and that SIZE divides E, or to ScaledRows without padding,
    which requires E = BE and that SIZE divides R * E.
    """
    begin(PDL)
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    i, e = tl.arange(0, BQ), tl.arange(0, BE)  # the queries, the channels
    real = i < R * T
    wait(PDL)
    token = b * T + i // R  # (BQ,), of the queries
    head = g * R + i % R
    at = tl.load(pos + token, real, -1)
    address, angle = qkv + (token * (R + 2) * G + head) * E, token * P
    q = rotated(address, cos + angle, sin + angle, q_norm, eps, real, E, BE, P, NORM)
    store_new(
        qkv, cos, sin, pos, k_norm, k, v, T, G, batch_stride, slot_stride, eps,
        R, E, BE, P, BQ, STEPS * BS, NORM,
    )  # fmt: skip
    low, high, top, sum = attend_share(
        q.to(DOT), q.to(DOT), k, v, k, k, v, v, at, real, G, SPLITS * STEPS * BS, batch_stride,
        slot_stride, factor, cap, E, E, 16, BS, STEPS, DOT, True, CAPPED,
    )  # fmt: skip
    row = (token * (G * R) + head) * E
    if SPLITS == 1:
        store_results(low, sum, qkv, out, units, sums, row, real, T, G, R, E, SIZE, PER_WORD)
    else:
        cells = real[:, None] & (e < E)[None, :]
        store_part(parts, tops, low, high, top, sum, e, i, real, cells, R * T, E, 16, SPLITS)
        if arrives_last(arrived, SPLITS):
            low, high, sum = combine(parts, tops, e, i, real, cells, R * T, E, BQ, BE, 16, SPLITS)
            store_results(low, sum, qkv, out, units, sums, row, real, T, G, R, E, SIZE, PER_WORD)


@triton.jit
def store_new(
    qkv,
    cos,
    sin,
    pos,
    k_norm,
    k,
    v,
    T,
    G,
    batch_stride,
    slot_stride,
    eps,
    R: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    P: tl.constexpr,
    BQ: tl.constexpr,
    SHARE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Store keys and values of the new tokens whose slots are among this program's SHARE slots, and
    wait until all its threads can read them from the cache. The other parameters are those of
    new_tokens_kernel."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    i, e = tl.arange(0, BQ), tl.arange(0, BE)  # i: the tokens, of which T are real
    token = b * T + i
    slot = tl.load(pos + token, i < T, -1)
    address, angle = qkv + (token * (R + 2) * G + R * G + g) * E, token * P
    keys = rotated(address, cos + angle, sin + angle, k_norm, eps, i < T, E, BE, P, NORM)
    channel = (e < E)[None, :]
    values = tl.load(address[:, None] + G * E + e[None, :], (i < T)[:, None] & channel, 0)
    mine = (i < T) & (slot // SHARE == tl.program_id(1))  # a slot of -1 is excluded by i < T
    place = ((b * batch_stride + slot * slot_stride) * G + g)[:, None] * E + e[None, :]
    tl.store(k + place, keys.to(k.dtype.element_ty), mine[:, None] & channel)
    tl.store(v + place, values.to(v.dtype.element_ty), mine[:, None] & channel)
    tl.debug_barrier()


@triton.jit
def store_results(
    weighted,
    total,
    qkv,
    out,
    units,
    sums,
    row,
    real,
    T,
    G,
    R: tl.constexpr,
    E: tl.constexpr,
    SIZE: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """Divide sums of weighted values, `weighted`, (BQ, BE), by the sums of their weights, `total`,
    (BQ,). Store the quotients: in their dtype if SIZE is 0, else as a FixedPoint if PER_WORD is 0,
    else as ScaledRows.

    row: (BQ,), where the queries' heads begin in the result; real: False where there is no query.
    qkv: of the dtype to which results are rounded. The others are those of new_tokens_kernel.
    """
    K = G * R * E
    total = tl.where(total > 0, total, 1)[:, None]  # it is 0 where there is no query
    y = (weighted / total).to(qkv.dtype.element_ty)
    e = tl.arange(0, y.shape[1])
    if SIZE == 0:
        tl.store(out + row[:, None] + e[None, :], y, real[:, None] & (e < E)[None, :])
    else:
        COUNT: tl.constexpr = y.shape[0] * y.shape[1] // SIZE  # chunks or spans of the tile
        pieces = tl.reshape(y.to(tl.float32), (COUNT, SIZE))
        if PER_WORD == 0:
            PIECES: tl.constexpr = y.shape[1] // SIZE  # of a query's row of the tile
            piece = tl.arange(0, PIECES)[None, :]
            c = tl.reshape(row[:, None] // SIZE + piece, (COUNT,))
            exists = tl.reshape(real[:, None] & (piece * SIZE < E), (COUNT,))
            store_chunks(pieces, c, exists, out, units, sums, K // SIZE, SIZE)
        else:
            b, g = tl.program_id(0) // G, tl.program_id(0) % G
            first = tl.arange(0, COUNT) * SIZE  # in the tile
            t = first // (R * E)
            input = g * (R * E) + first % (R * E)
            store_spans(pieces, b * T + t, input, t < T, out, units, K, PER_WORD, SIZE)

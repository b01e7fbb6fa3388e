"""Rotary positions of new queries and keys, and the store of keys and values, in one kernel.

Start at rotate_kernel. Its reference is RotaryPositions.rotate (layers/positions.py) and
KVCache.store (layers/kv_cache.py). As three kernels they would take about three times as long.

Shapes: B rows of the batch, T new tokens, H query heads, G key/value heads, E head_dim, P pairs of
rotated channels.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, wait


@triton.jit
def rotate_kernel(
    qkv,  # (B, T, H + 2 G, E): queries, keys, values
    cos,  # (B, T, P) float32
    sin,  # (B, T, P) float32
    pos,  # (B, T) int64: slots of the cache
    q,  # (B, T, H, E): the result
    k,  # (B, slots + 1, G, E): the cache's, written in place
    v,
    T,
    H,
    G,
    batch_stride,  # from row to row of a cache, in tokens
    slot_stride,  # from slot to slot, in tokens
    E: tl.constexpr,
    BE: tl.constexpr,  # E rounded up to a power of two
    P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate one head of one token, if it is a query or a key, and store it: a query in q, a key or
    a value in its slot of the cache.

    The launch has (B * T, H + 2 G) programs. Channel e < P pairs with channel e + P; channels from
    2 P on are not rotated.
    """
    begin(PDL)
    token, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, BE)
    first, rotated = e < P, e < tl.where(head < H + G, 2 * P, 0)
    row = qkv + (token * (H + 2 * G) + head).to(tl.int64) * E
    wait(PDL)
    x = tl.load(row + e, e < E, 0).to(tl.float32)
    partner = tl.load(row + tl.where(first, e + P, e - P), rotated, 0).to(tl.float32)
    cosine = tl.load(cos + token * P + e % P, rotated, 1)
    sine = tl.load(sin + token * P + e % P, rotated, 0)
    x = (x * cosine + tl.where(first, -partner, partner) * sine).to(q.dtype.element_ty)
    if head < H:
        tl.store(q + (token * H + head).to(tl.int64) * E + e, x, e < E)
    else:
        slot = tl.load(pos + token) * slot_stride + (token // T).to(tl.int64) * batch_stride
        if head < H + G:
            tl.store(k + (slot * G + head - H) * E + e, x.to(k.dtype.element_ty), e < E)
        else:
            tl.store(v + (slot * G + head - H - G) * E + e, x.to(v.dtype.element_ty), e < E)

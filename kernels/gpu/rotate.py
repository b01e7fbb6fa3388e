"""Norms and rotary positions of new queries and keys, and the store of keys and values.

Start at rotate_kernel. Its reference is RMSNorm (layers/basic.py), RotaryPositions.rotate
(layers/positions.py) and KVCache.store (layers/kv_cache.py). As three kernels they would take about
three times as long. new_tokens.py calls `rotated`, too.

Shapes: B rows of the batch, T new tokens, H query heads, G key/value heads, E head_dim, P pairs of
rotated channels.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, wait


@triton.jit
def rotated(
    heads,
    cos,
    sin,
    norm,
    eps,
    real,
    E: tl.constexpr,
    BE: tl.constexpr,
    P: tl.constexpr,
    NORM: tl.constexpr,
):
    """Load heads of queries or keys, apply their norm and rotate them: (heads, BE), in their dtype.

    heads: (heads,), the addresses of E numbers each. cos, sin: (heads,), the addresses of the P
    numbers of their tokens. norm: with NORM the weight, (E,), of an RMS norm with eps. real:
    (heads,), which of them exist; the others are 0. Channel e < P pairs with channel e + P;
    channels from 2 P on are not rotated. Rounded where separate layers would round.
    """
    e = tl.arange(0, BE)[None, :]
    other = tl.where(e < P, e + P, e - P)  # the partner's channel
    exists = real[:, None]
    inside, rotates = exists & (e < E), exists & (e < 2 * P)
    x = tl.load(heads[:, None] + e, inside, 0).to(tl.float32)
    partner = tl.load(heads[:, None] + other, rotates, 0).to(tl.float32)
    cosine = tl.load(cos[:, None] + e % P, rotates, 1)
    sine = tl.load(sin[:, None] + e % P, rotates, 0)
    dtype: tl.constexpr = heads.dtype.element_ty
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / E + eps)[:, None]
        weight = tl.load(norm + e, e < E, 0).to(tl.float32)
        partner_weight = tl.load(norm + other, e < 2 * P, 0).to(tl.float32)
        x = (x * factor * weight).to(dtype).to(tl.float32)
        partner = (partner * factor * partner_weight).to(dtype).to(tl.float32)
    return (x * cosine + tl.where(e < P, -partner, partner) * sine).to(dtype)


@triton.jit
def rotate_kernel(
    qkv,  # (B, T, H + 2 G, E): queries, keys, values
    cos,  # (B, T, P) float32
    sin,  # (B, T, P) float32
    pos,  # (B, T) int64: slots of the cache
    q_norm,  # (E,), with NORM
    k_norm,  # (E,), with NORM
    q,  # (B, T, H, E): the result
    k,  # (B, slots + 1, G, E): the cache's, written in place
    v,
    T,
    H,
    G,
    batch_stride,  # from row to row of a cache, in tokens
    slot_stride,  # from slot to slot, in tokens
    eps,  # of the norms
    E: tl.constexpr,
    BE: tl.constexpr,  # E rounded up to a power of two
    P: tl.constexpr,
    NORM: tl.constexpr,  # whether queries and keys have norms
    PDL: tl.constexpr,
):
    """Store one head of one token: a query, after its norm and rotation, in q, a key after them or
    a value in its slot of the cache. The launch has (B * T, H + 2 G) programs."""
    begin(PDL)
    token, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, BE)
    row = qkv + (token * (H + 2 * G) + head).to(tl.int64) * E
    one = tl.zeros((1,), tl.int32)  # rotated takes several heads
    angle = one + token * P
    wait(PDL)
    if head < H:
        x = rotated(row + one, cos + angle, sin + angle, q_norm, eps, one == 0, E, BE, P, NORM)
        tl.store(q + (token * H + head).to(tl.int64) * E + e[None, :], x, e[None, :] < E)
    else:
        slot = tl.load(pos + token) * slot_stride + (token // T).to(tl.int64) * batch_stride
        if head < H + G:
            x = rotated(row + one, cos + angle, sin + angle, k_norm, eps, one == 0, E, BE, P, NORM)
            place = k + (slot * G + head - H) * E + e[None, :]
            tl.store(place, x.to(k.dtype.element_ty), e[None, :] < E)
        else:
            value = tl.load(row + e, e < E, 0).to(v.dtype.element_ty)
            tl.store(v + (slot * G + head - H - G) * E + e, value, e < E)

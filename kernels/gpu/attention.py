"""Attention of a few new tokens over a KV cache that may be quantised: one decoding step.

Start at attention_kernel. The visible slots of a row's cache are divided among SPLITS programs, so
that the whole GPU reads the cache even at batch 1. Each program stores its part, a sum of weighted
values; the last one to finish adds the parts in a fixed order and divides by the sum of the weights
(flash-decoding; the online softmax is that of FlashAttention, arXiv 2205.14135). Quantised keys and
values are dequantised in registers; no dequantised copy is written to memory.

In causal attention a query sees the slots up to its own token's. In a layer with a sliding window,
whose cache may be a ring (layers/kv_cache.py), the kernel reads a mask, which is small beside the
keys.

A query is one new token's vector of one query head. Those of the R heads that share a key/value
head are the R*T queries of one tile; the tile has BQ, of which the rest is padding. Keys and values
of an int4 cache hold two channels in a byte, the even one in the low nibble. So the kernel handles
the even channels (low) and the odd ones (high) apart; for other caches, low are all channels and
high is unused. scales and lows: of a quantised cache, number = low + scale * q (quant/kv_cache.py).

Shapes: B rows of the batch, T new tokens, H query heads, G key/value heads, R = H // G, E head_dim,
S visible slots.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, wait


@triton.jit
def load_numbers(
    data, scales, lows, place, scale_place, mask, HALF: tl.constexpr, BITS: tl.constexpr
):
    """Return the numbers of a cache at `place`. BITS 16: stored as they are; else low + scale * q.

    data: keys or values. scales, lows: of their groups; not read with BITS 16. place, scale_place:
    indices in data and in scales, lows. mask: the numbers to load; the others are 0. With BITS 4,
    HALF 0 loads the low nibbles, HALF 1 the high ones.
    """
    values = tl.load(data + place, mask, 0)
    if BITS != 16:
        if BITS == 4:
            values = (values >> (4 * HALF)) & 15
        scale = tl.load(scales + scale_place, mask, 0).to(tl.float32)
        low = tl.load(lows + scale_place, mask, 0).to(tl.float32)
        values = values.to(tl.float32) * scale + low
    return values


@triton.jit
def visible_slots(at, real, first, S, BS: tl.constexpr, CAUSAL: tl.constexpr):
    """Return which of BS slots each query attends to, (BQ, BS), which of them any query does,
    (BS,), and whether there is one.

    at: (BQ,), with CAUSAL the slots of the queries' own tokens, -1 where there is no query; else
    the addresses of the queries' rows of the mask. real: (BQ,), False where there is no query.
    first: the first slot.
    """
    s = first + tl.arange(0, BS)
    if CAUSAL:
        visible, last = s[None, :] <= at[:, None], tl.max(at, 0)
        used, some = s <= last, first <= last
    else:
        inside = real[:, None] & (s < S)[None, :]
        visible = tl.load(at[:, None] + s[None, :], inside, -1) == 0
        users = tl.sum(visible.to(tl.int32), 0)
        used, some = users > 0, tl.max(users, 0) > 0
    return visible, used, some


@triton.jit
def head_in_slots(b, g, G, first, batch_stride, slot_stride, BS: tl.constexpr):
    """Return the index of key/value head g of row b in each of BS slots, (BS,) int64, where all but
    the last dimension of a cache count as one. first: the first slot; strides: in tokens."""
    s = first + tl.arange(0, BS)
    return (b * batch_stride + s * slot_stride).to(tl.int64) * G + g


@triton.jit
def limited(scores, cap, CAPPED: tl.constexpr):
    """Return cap * tanh(x) for scores 2 * log2(e) * x; without CAPPED, return the scores.

    tanh(x) = 1 - 2 / (1 + e**(2 * x)), and e**(2 * x) = 2**scores.
    """
    return cap * (1 - 2 / (1 + tl.exp2(scores))) if CAPPED else scores


@triton.jit
def softmax_step(scores, visible, top, sum):
    """Turn a step's scores, (BQ, BS), into weights: a step of the online softmax.

    visible: (BQ, BS), whether a query attends to a slot. top, sum: (BQ,), the largest score and the
    sum of weights of the earlier steps. A weight is 2 ** (score - largest score). Returns the
    weights, the factor, (BQ, 1), by which sums over earlier steps must be multiplied, and the
    largest score and the sum of weights so far, (BQ,) each.
    """
    scores = tl.where(visible, scores, -1e38)  # not -inf: -inf - -inf is NaN
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    weights = tl.where(visible, tl.exp2(scores - new_top[:, None]), 0)
    return weights, shrink[:, None], new_top, sum * shrink + tl.sum(weights, 1)


@triton.jit
def attend_share(
    low_q,
    high_q,
    k,
    v,
    k_scales,
    k_lows,
    v_scales,
    v_lows,
    at,
    real,
    G,
    S,
    batch_stride,
    slot_stride,
    factor,
    cap,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BS: tl.constexpr,
    STEPS: tl.constexpr,
    DOT: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Attend with the queries of a key/value head, low_q and high_q, (BQ, WIDTH) each, to the slots
    of this program: STEPS steps of BS slots. A step whose slots no query attends to is skipped.

    Returns the online softmax's low, high, top and sum, see store_part. at, real: see
    visible_slots. The other parameters are those of attention_kernel.
    """
    b, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    BQ: tl.constexpr = low_q.shape[0]
    WIDTH: tl.constexpr = low_q.shape[1]
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    e = tl.arange(0, WIDTH)
    top, sum = tl.full((BQ,), -1e38, tl.float32), tl.zeros((BQ,), tl.float32)
    low, high = tl.zeros((BQ, WIDTH), tl.float32), tl.zeros((BQ, WIDTH), tl.float32)
    for step in range(STEPS):
        first = (split * STEPS + step) * BS
        visible, used, some = visible_slots(at, real, first, S, BS, CAUSAL)
        if some:
            head = head_in_slots(b, g, G, first, batch_stride, slot_stride, BS)  # (BS,)
            place = head[:, None] * (E // HALVES) + e[None, :]
            group = head[:, None] * (E // GROUP) + e[None, :] * HALVES // GROUP
            filled = used[:, None] & (e < E // HALVES)[None, :]
            keys = load_numbers(k, k_scales, k_lows, place, group, filled, 0, BITS)
            if BITS == 16:  # both at once; quantised ones would need too many registers
                values = load_numbers(v, v_scales, v_lows, place, group, filled, 0, BITS)
            scores = tl.dot(low_q, tl.trans(keys.to(DOT)), input_precision="ieee")
            if BITS == 4:
                keys = load_numbers(k, k_scales, k_lows, place, group, filled, 1, BITS)
                scores = tl.dot(high_q, tl.trans(keys.to(DOT)), scores, input_precision="ieee")
            scores = limited(scores * factor, cap, CAPPED)
            weights, shrink, top, sum = softmax_step(scores, visible, top, sum)
            weights = weights.to(DOT)
            if BITS != 16:
                values = load_numbers(v, v_scales, v_lows, place, group, filled, 0, BITS)
            low = tl.dot(weights, values.to(DOT), low * shrink, input_precision="ieee")
            if BITS == 4:
                values = load_numbers(v, v_scales, v_lows, place, group, filled, 1, BITS)
                high = tl.dot(weights, values.to(DOT), high * shrink, input_precision="ieee")
    return low, high, top, sum


@triton.jit
def attention_kernel(
    q,  # (B, T, H, E)
    k,  # (B, slots + 1, G, E), or bytes (B, slots + 1, G, E * BITS / 8)
    v,
    k_scales,  # (B, slots + 1, G, E / GROUP) float16, of quantised caches
    k_lows,
    v_scales,
    v_lows,
    pos,  # (B, T) int64, read with CAUSAL: the slots of the new tokens
    mask,  # (B, R*T, S), read without CAUSAL: 0 where a query attends to a slot, else -inf
    parts,  # (B * G, SPLITS, R*T, E) float32
    tops,  # (B * G, SPLITS, R*T, 2) float32: the largest score and the sum of the weights
    arrived,  # (B * G,) int32: programs that have stored their part; 0 before and after a launch
    out,  # (B, T, H, E)
    T,
    G,
    S,
    batch_stride,  # from row to row of a cache, in tokens
    slot_stride,  # from slot to slot, in tokens
    factor,  # of the products of queries and keys, see launch_attention.exponents
    cap,  # of the scores, with CAPPED
    R: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,  # E rounded up to a power of two
    GROUP: tl.constexpr,  # channels that share a scale and a low
    BITS: tl.constexpr,  # of a number of the cache: 4, 8 or, not quantised, 16
    BQ: tl.constexpr,  # R*T rounded up to a power of two, at least 16
    BS: tl.constexpr,
    STEPS: tl.constexpr,  # of BS slots each
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,  # the type in which tensor cores multiply
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with the queries of a key/value head to a program's share of the slots.

    The launch has (B * G, SPLITS) programs of STEPS steps of BS slots: S <= SPLITS * STEPS * BS.
    at: see visible_slots. low, high, top, sum: see store_part. All heads have the same mask: every
    query reads the mask of the first head.
    """
    begin(PDL)
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    i = tl.arange(0, BQ)  # the queries
    t, r = i // R, i % R
    real = i < R * T
    wait(PDL)
    mask_row = (b * R * T + t).to(tl.int64)  # (BQ,)
    at = tl.load(pos + b * T + t, real, -1) if CAUSAL else mask + mask_row * S  # (BQ,)
    HALVES: tl.constexpr = 2 if BITS == 4 else 1  # int4: even channels, then odd ones
    WIDTH: tl.constexpr = BE // HALVES
    e = tl.arange(0, WIDTH)
    query = q + ((b * T + t) * (G * R) + g * R + r)[:, None] * E + e[None, :] * HALVES
    cells = real[:, None] & (e < E // HALVES)[None, :]
    low_q, high_q = tl.load(query, cells, 0).to(DOT), tl.load(query + HALVES - 1, cells, 0).to(DOT)
    stored = k, v, k_scales, k_lows, v_scales, v_lows
    strides = G, S, batch_stride, slot_stride
    low, high, top, sum = attend_share(
        low_q, high_q, *stored, at, real, *strides, factor, cap,
        E, GROUP, BITS, BS, STEPS, DOT, CAUSAL, CAPPED,
    )  # fmt: skip
    result = out + ((b * T + t) * (G * R) + g * R + r)[:, None] * E + e[None, :] * HALVES
    if SPLITS == 1:
        finish(low, high, sum, result, cells, BITS)
    else:
        store_part(parts, tops, low, high, top, sum, e, i, real, cells, R * T, E, BITS, SPLITS)
        if arrives_last(arrived, SPLITS):
            low, high, sum = combine(
                parts, tops, e, i, real, cells, R * T, E, BQ, WIDTH, BITS, SPLITS
            )
            finish(low, high, sum, result, cells, BITS)


@triton.jit
def store_part(
    parts,
    tops,
    low,
    high,
    top,
    sum,
    e,
    i,
    real,
    mask,
    queries,
    E: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store a program's part for a key/value head, for the program that combines the parts.

    WIDTH: the channels of the tile, of an int4 cache half of them. low: (BQ, WIDTH), sums of
    weighted values, for int4 of the even channels; high: of the odd ones. top, sum: (BQ,), the
    largest score and the sum of weights. e: (WIDTH,), 0, 1, ...: channel e or, for int4, channels
    2e and 2e + 1. i: (BQ,), indices of the queries; queries: R*T. real: (BQ,), False for padding;
    mask: the same for queries and channels. arrives_last must follow.
    """
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    part = (tl.program_id(0) * SPLITS + tl.program_id(1)) * queries + i
    tl.store(tops + part * 2, top, real)
    tl.store(tops + part * 2 + 1, sum, real)
    place = parts + part[:, None] * E + e[None, :] * HALVES
    tl.store(place, low, mask)
    if BITS == 4:
        tl.store(place + 1, high, mask)


@triton.jit
def arrives_last(arrived, SPLITS: tl.constexpr):
    """Count this program, which has stored its part for a key/value head. Return whether it is the
    last of SPLITS; if so, the head's counter is 0 again."""
    tl.debug_barrier()  # all of this program has been stored before it counts as arrived
    counter = arrived + tl.program_id(0)
    last = tl.atomic_add(counter, 1) == SPLITS - 1
    tl.store(counter, 0, last)
    return last


@triton.jit
def finish(low, high, sum, result, mask, BITS: tl.constexpr):
    """Store the weighted values, low and high, divided by the sum of the weights, (BQ,).

    result: the addresses of the outputs, of the even channels with BITS 4. mask: False for padding
    queries and channels.
    """
    sum = tl.where(sum > 0, sum, 1)[:, None]  # padding queries have a sum of 0
    tl.store(result, (low / sum).to(result.dtype.element_ty), mask)
    if BITS == 4:
        tl.store(result + 1, (high / sum).to(result.dtype.element_ty), mask)


@triton.jit
def combine(
    parts,
    tops,
    e,
    i,
    real,
    mask,
    queries,
    E: tl.constexpr,
    BQ: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Combine the SPLITS parts of a key/value head; return low, high and sum of all slots.

    Run by the last program of a head. Parts with different largest scores are scaled to the largest
    of all. The parameters are those of store_part. The loads bypass the L1 cache, which does not
    see what other multiprocessors have stored.
    """
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    top = tl.full((BQ,), -1e38, tl.float32)
    sum = tl.zeros((BQ,), tl.float32)
    low = tl.zeros((BQ, WIDTH), tl.float32)
    high = tl.zeros((BQ, WIDTH), tl.float32)
    for split in range(SPLITS):
        part = (tl.program_id(0) * SPLITS + split) * queries + i
        part_top = tl.load(tops + part * 2, real, -1e38, cache_modifier=".cg")
        part_sum = tl.load(tops + part * 2 + 1, real, 0, cache_modifier=".cg")
        new_top = tl.maximum(top, part_top)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        place = parts + part[:, None] * E + e[None, :] * HALVES
        part_low = tl.load(place, mask, 0, cache_modifier=".cg")
        low = low * shrink[:, None] + part_low * weight[:, None]
        if BITS == 4:
            part_high = tl.load(place + 1, mask, 0, cache_modifier=".cg")
            high = high * shrink[:, None] + part_high * weight[:, None]
        sum, top = sum * shrink + part_sum * weight, new_top
    return low, high, sum

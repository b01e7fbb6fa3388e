"""Launches of the kernels of attention: functions that allocate outputs and launch kernels.

Start at attend_new_tokens. fast_layers/gpu.py chooses between the functions. Tensors may be on a
CPU if Triton interprets its kernels (TRITON_INTERPRET=1), as in the tests.

Shapes: see kernels/gpu/attention.py.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import attention, new_tokens, rotate
from kernels.gpu.fixed_point import FixedPoint, Order
from kernels.gpu.launch import arrivals, empty_fixed_point, empty_scaled_rows, options
from kernels.gpu.prologue import HeadNorms
from kernels.gpu.scaled_rows import ScaledRows, Spans

TENSOR_CORE_TYPES = {  # dtype of the queries -> type in which the attention kernel multiplies
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
Rotation = tuple[Tensor, Tensor]  # cosine and sine, see layers.positions
MAX_NEW_NUMBERS = 32 * 128  # see fits_one_tile
SLOTS_PER_STEP = 64  # of a program of the attention kernel
ATTENTION_PROGRAMS = 128  # about one for each multiprocessor of an H100


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: Sequence[Tensor],
    mask: Tensor,
    pos: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention of q, (B, T, H, E), over the first S slots of a cache -> (B, T, H, E).

    k, v: (B, slots + 1, G, E), or the bytes (B, slots + 1, G, E*bits/8) of a QuantizedKVCache,
    whose scales and lows are `extra`: of the keys, then of the values. Of a dense cache, of any
    float dtype, extra is empty. mask: (B, 1, R*T, S), from Transformer.mask. pos: (B, T), the slots
    of the queries' own tokens, if a query sees all slots up to its own: the kernel then does not
    read the mask; None: it reads the mask. scale, softcap: see layers.kv_cache.Scores. q, mask and
    pos must be contiguous. Only for few new tokens: the R*T queries of a key/value head are one
    tile.
    """
    (B, T, H, E), (G, width) = q.shape, k.shape[2:]
    R, bits = H // G, 8 * width // E if extra else 16
    splits, steps = shares(mask.shape[-1], B * G)
    out = torch.empty_like(q)
    attention.attention_kernel[(B * G, splits)](
        q,
        k,
        v,
        *(extra or (k, k, k, k)),  # of a dense cache: placeholders that the kernel does not read
        pos,
        mask,
        *shared_parts(q, B * G, splits, R * T, E),
        out,
        T,
        G,
        mask.shape[-1],
        *cache_strides(k),
        *exponents(scale, softcap),
        R=R,
        E=E,
        # Tensor cores multiply at least 16 x 16; of 4 bits, half of the channels at a time.
        BE=max(16 * (2 if bits == 4 else 1), triton.next_power_of_2(E)),
        GROUP=E // extra[0].shape[-1] if extra else E,
        BITS=bits,
        BQ=max(16, triton.next_power_of_2(R * T)),
        BS=SLOTS_PER_STEP,
        STEPS=steps,
        SPLITS=splits,
        DOT=TENSOR_CORE_TYPES[q.dtype],
        CAUSAL=pos is not None,
        CAPPED=softcap is not None,
        **options(q, attention_warps(E, pos is not None)),
    )
    return out


def rotate_and_store(
    qkv: Tensor, rotation: Rotation, norms: HeadNorms, pos: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Apply their norms to new queries and keys and rotate them; store keys and values in k and v,
    in place; return the queries, (B, T, H, E) in the dtype of qkv.

    qkv: (B, T, H + 2 G, E), queries, then keys, then values. rotation: cosine and sine, (B, T, 1,
    pairs of channels) float32 each. pos: (B, T) int64, slots of the cache. All of these contiguous.
    k, v: (B, slots + 1, G, E), a cache's buffers or their first rows.
    """
    (B, T, heads, E), G = qkv.shape, k.shape[2]
    q = qkv.new_empty(B, T, heads - 2 * G, E)
    rotate.rotate_kernel[(B * T, heads)](
        qkv,
        *rotation,
        pos,
        norms.q,
        norms.k,
        q,
        k,
        v,
        T,
        heads - 2 * G,
        G,
        *cache_strides(k),
        norms.eps,
        E=E,
        BE=triton.next_power_of_2(E),
        P=rotation[0].shape[-1],
        NORM=norms.q is not None,
        **options(qkv, 1),
    )
    return q


def attend_new_tokens(
    qkv: Tensor,
    rotation: Rotation,
    norms: HeadNorms,
    pos: Tensor,
    cache: tuple[Tensor, Tensor],
    visible: int,
    scores: tuple[float, float | None],
    form: Order | Spans | None = None,
) -> Tensor | FixedPoint | ScaledRows:
    """Compute rotate_and_store and causal attention in one kernel -> (B, T, H, E) or, with a form
    that can_convert allows, B * T rows of H * E in that form.

    cache: k and v, (B, slots + 1, G, E) each. visible: S, above all of pos: keys and values beyond
    are not stored. scores: scale and softcap, see layers.kv_cache.Scores. The other parameters are
    those of rotate_and_store. Only where fits_one_tile(qkv, G).
    """
    (B, T, heads, E), (k, v) = qkv.shape, cache
    G = k.shape[2]
    H = heads - 2 * G
    splits, steps = shares(visible, B * G)
    if form is None:
        result = qkv.new_empty(B, T, H, E)
        outputs = result, None, None
    elif isinstance(form, Order):
        outputs = result = empty_fixed_point(qkv, H * E // form.size, form)
    else:
        result = empty_scaled_rows(qkv, B * T, form)
        outputs = *result, None
    new_tokens.new_tokens_kernel[(B * G, splits)](
        qkv,
        *rotation,
        pos,
        norms.q,
        norms.k,
        k,
        v,
        *shared_parts(qkv, B * G, splits, H // G * T, E),
        *outputs,
        T,
        G,
        *cache_strides(k),
        *exponents(*scores),
        norms.eps,
        R=H // G,
        E=E,
        BE=max(16, triton.next_power_of_2(E)),  # tensor cores multiply at least 16 x 16
        P=rotation[0].shape[-1],
        BQ=max(16, triton.next_power_of_2(H // G * T)),
        BS=SLOTS_PER_STEP,
        STEPS=steps,
        SPLITS=splits,
        SIZE=0 if form is None else form.size,
        PER_WORD=form.per_word if isinstance(form, Spans) else 0,
        DOT=TENSOR_CORE_TYPES[qkv.dtype],
        NORM=norms.q is not None,
        CAPPED=scores[1] is not None,
        **options(qkv, attention_warps(E, True)),
    )
    return result


def fits_one_tile(qkv: Tensor, kv_heads: int) -> bool:
    """Return whether the queries of a key/value head, padded to powers of two, are few enough for
    the registers of a program of new_tokens_kernel. qkv: (B, T, H + 2 G, E). kv_heads: G."""
    T, heads, E = qkv.shape[1:]
    queries = max(16, triton.next_power_of_2((heads // kv_heads - 2) * T))
    return queries * triton.next_power_of_2(E) <= MAX_NEW_NUMBERS


def can_convert(form: Order | Spans, qkv: Tensor, kv_heads: int) -> bool:
    """Return whether attend_new_tokens can convert its results to a form.

    Fixed point: each chunk must lie within a head. Spans: each must lie within the query heads of
    one key/value head, E must be a power of two of at least 16, and rows must have no padding. qkv:
    (B, T, H + 2 G, E). kv_heads: G.
    """
    heads, E = qkv.shape[2:]
    if isinstance(form, Order):
        return E % form.size == 0
    H = heads - 2 * kv_heads
    power_of_two = E >= 16 and triton.next_power_of_2(E) == E
    return power_of_two and form.width == H * E and H // kv_heads * E % form.size == 0


def shared_parts(
    q: Tensor, heads: int, splits: int, queries: int, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments `parts`, `tops` and `arrived` of the attention kernels. heads: B * G;
    splits: the programs of each; queries: R*T; channels: E."""
    parts = q.new_empty(heads, splits, queries, channels, dtype=torch.float32)
    tops = q.new_empty(heads, splits, queries, 2, dtype=torch.float32)
    return parts, tops, arrivals(q.device)


def cache_strides(k: Tensor) -> tuple[int, int]:
    """Return the strides of a cache, (B, slots + 1, G, numbers or bytes of a head), from row to row
    and from slot to slot, in tokens."""
    token = k.shape[2] * k.shape[3]
    return k.stride(0) // token, k.stride(1) // token


def attention_warps(channels: int, causal: bool) -> int:
    """Return the warps of a program of the attention kernel. channels: E. Times were measured with
    4; a mask that is read, or a wider head, would then need more registers than a thread has."""
    return 4 if causal and channels <= 128 else 8


def shares(visible: int, heads: int) -> tuple[int, int]:
    """Return how many programs divide the visible slots of a key/value head among them, and how
    many steps of SLOTS_PER_STEP slots each takes. heads: B * G."""
    all_steps = triton.cdiv(visible, SLOTS_PER_STEP)
    splits = max(1, min(all_steps, ATTENTION_PROGRAMS // heads))
    steps = triton.cdiv(all_steps, splits)
    # As steps is rounded up, fewer programs may suffice.
    return triton.cdiv(all_steps, steps), steps


def exponents(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return the attention kernel's factor, of the products of queries and keys, and its cap (0.0:
    none). They turn scores x into exponents of 2: e**x = 2**(x * log2(e)); see attention.limited.
    """
    base = math.log2(math.e)
    return (base * scale, 0.0) if softcap is None else (2 * base * scale / softcap, base * softcap)

"""Products of 2 to 64 rows, (M, K) x (N, K) -> (M, N), for batches and for verifying drafts.

Start at int4_kernel. Weights are dequantised in registers and multiplied by tensor cores in
float16, which holds 4-bit and 8-bit integers exactly; int4 scales are stored in float16.
scale_kernel first scales the activations of each step of a product, by a power of two of their own,
into the range of float16.

No GPU instruction converts bytes to float16 as fast as memory delivers them. But the bits
0x6400 + b are the number 1024 + b, so that a byte permutation, a logical operation and a
subtraction convert two bytes at once (Kim et al., arXiv 2211.10017, section 3.2). A word of weights
packs eight (int8: four) neighbouring inputs. The words of a tile are unpacked to eight (four)
matrices. Each is multiplied by every eighth (fourth) activation, and the products are added, so
that no weight moves between threads to be converted. The helper functions return one tensor and
work element by element; therefore Triton moves the packed words, once, to the layout that tensor
cores need.

SPLITS programs may divide the K inputs of a product. Each stores its part of the sum; the last one
adds the parts in a fixed order, so that two runs give the same bits.

A weight (q - zero) * scale is rounded to float16 with an error of at most 2**-11 of itself; the
PyTorch formula rounds to bfloat16, which is 8 times as coarse. That formula, in quant/linear.py,
is the reference of each kernel.

Words: a nibble is half a byte, an int4 weight. A word is 32 bits. A tile is the (BN, BM) outputs
that a program computes: BN outputs of BM rows. PDL: whether the launch allows programmatic
dependent launch. PTX: whether inline assembly is available; Triton's interpreter has none.
HAS_BIAS, ADDS: whether bias, (N,), and residual, (M, N), are given. NORM, GATED: see inputs.py.

Shapes: M rows, N out_features, K in_features, W words of a row of weights, P groups of inputs.
"""

import triton
import triton.language as tl

from kernels.gpu.inputs import begin, inputs, units_of, wait

# Load activations through the L1 cache, which the programs of a multiprocessor share: loading them
# from the L2 cache would take as much of its bandwidth as the weights take.
CACHED = tl.constexpr(".ca")
BYTES = tl.constexpr(("0x4400", "0x5511", "0x6622", "0x7733"))  # selectors of prmt


@triton.jit
def bytes_of(words, number: tl.constexpr, PTX: tl.constexpr):
    """Return byte `number`, 0 (the lowest) to 3, of each int32 word as an int16, whose upper byte
    is undefined.

    The inline assembly, here and below, works on two neighbouring elements at once: prmt copies the
    bytes of two words that a selector of BYTES names.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, " + BYTES[number] + ";", "=r,r,r", [words], tl.int16, True, 2
        )
    else:
        return ((words >> (8 * number)) & 255).to(tl.int16)


@triton.jit
def number_above(bytes, MASK: tl.constexpr, PTX: tl.constexpr):
    """Return 1024 + (byte & mask) in float16. bytes: from bytes_of. MASK: a string of PTX, which
    has the mask of an element twice: 00FF (the whole byte), 000F or 00F0 (a nibble of it). lop3
    with the table 0xEA computes (bytes & MASK) | 0x64006400, for two elements at once."""
    if PTX:
        logic: tl.constexpr = "lop3.b32 $0, $1, " + MASK + ", 0x64006400, 0xEA;"
        return tl.inline_asm_elementwise(logic, "=r,r", [bytes], tl.float16, True, 2)
    else:
        bits: tl.constexpr = 255 if MASK == "0x00FF00FF" else 15 if MASK == "0x000F000F" else 240
        return (1024 + (bytes & bits)).to(tl.float16)


@triton.jit
def scale_kernel(
    x,  # (M, K), or (M, 2 K) where GATED
    norm,  # (K,): the weight of an RMS norm; None without NORM
    out,  # (M, PER_WORD, Kp / PER_WORD) float16: input PER_WORD * i + p at (p, i); 0 beyond K
    units,  # (M, ceil(Kp / SPAN)) float32: the row after its prologue = out * unit
    K,
    Kp,  # inputs of a stored row of weights: K, or K padded to whole groups
    x_stride,
    eps,
    PER_WORD: tl.constexpr,  # inputs that a word of weights multiplies: 8 for int4, 4 for int8
    SPAN: tl.constexpr,  # inputs that share a unit
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,  # inputs that NORM squares at a time
    PDL: tl.constexpr,
):
    """Compute the prologue of each row (inputs.py), then scale it to float16 of at most 2**15:
    each span of SPAN inputs by its unit, a power of two.

    The launch has (M, ceil(Kp / SPAN)) programs.
    """
    begin(PDL)
    m, span = tl.program_id(0), tl.program_id(1)
    k = span * SPAN + tl.arange(0, SPAN)
    factor = tl.load(norm + k, k < K, 0).to(tl.float32) if NORM else 0.0
    wait(PDL)
    values = inputs(x + m * x_stride, factor, k, K, eps, NORM, GATED, BLOCK)
    numbers, unit = scaled(values[None, :])
    one = tl.arange(0, 1)
    tl.store(units + m * tl.num_programs(1) + span + one, unit)
    place = out + m * Kp + k % PER_WORD * (Kp // PER_WORD) + k // PER_WORD
    tl.store(place[None, :], numbers, (k < Kp)[None, :])


@triton.jit
def scaled(values):
    """Scale spans of numbers, (spans, SPAN) float32, to float16; return them and the spans' units.

    A span with an infinite or NaN input gets the unit NaN.
    """
    unit, inverse, poison = units_of(values)
    return (values * inverse[:, None]).to(tl.float16), unit + poison


@triton.jit
def store_spans(values, m, k, real, out, units, K, PER_WORD: tl.constexpr, SPAN: tl.constexpr):
    """Scale spans of rows and store them as scale_kernel does, for a kernel that has them.

    values: (spans, SPAN) float32. m, k: (spans,), the row and the first input of each; real: which
    of them to store. K: inputs of a row, a multiple of SPAN; rows have no padding.
    """
    numbers, unit = scaled(values)
    tl.store(units + m * (K // SPAN) + k // SPAN, unit, real)
    input = k[:, None] + tl.arange(0, SPAN)[None, :]
    place = m[:, None] * K + input % PER_WORD * (K // PER_WORD) + input // PER_WORD
    tl.store(out + place, numbers, real[:, None])


@triton.jit
def finish_rows(
    total,  # (BN, BM) float32
    scale,  # (BN,)
    bias,
    residual,
    out,
    parts,  # (SPLITS, M, N) float32
    arrived,  # int32 per tile: programs that have stored their part; 0 before and after a launch
    m,
    n,
    M,
    N,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Store a tile of outputs. With SPLITS > 1 each program stores its part, and the program that
    arrives last adds all parts and stores the outputs.

    total: this program's sums. scale: of the outputs. m, n: (BM,) and (BN,), the tile's rows and
    outputs; mask `inside` leaves out those from M and N on. `place`: their indices in a part.
    """
    inside = (n[:, None] < N) & (m[None, :] < M)
    place = m[None, :] * N + n[:, None]
    if SPLITS == 1:
        store_rows(total, scale, bias, residual, out, m, n, M, N, HAS_BIAS, ADDS)
    else:
        tl.store(parts + tl.program_id(2) * M * N + place, total, inside)
        tl.debug_barrier()  # all of this program has been stored before it counts as arrived
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(arrived + tile, 1) == SPLITS - 1:
            tl.store(arrived + tile, 0)
            whole = tl.zeros_like(total)
            for split in tl.static_range(SPLITS):
                # Bypass the L1 cache, which does not see what other programs have stored.
                part = parts + split * M * N + place
                whole += tl.load(part, inside, 0, cache_modifier=".cg")
            store_rows(whole, scale, bias, residual, out, m, n, M, N, HAS_BIAS, ADDS)


@triton.jit
def store_rows(
    total, scale, bias, residual, out, m, n, M, N, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr
):
    """Multiply (BN, BM) sums, total, by the scale of each output, (BN,), add the bias and the
    residual and store them. m, n: the tile's rows and outputs, see finish_rows."""
    total *= scale[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, n < N, 0).to(tl.float32)[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    place, y = m[None, :] * N + n[:, None], total.to(out.dtype.element_ty)
    if ADDS:
        y = (tl.load(residual + place, inside, 0).to(tl.float32) + y).to(out.dtype.element_ty)
    tl.store(out + place, y, inside)


@triton.jit
def load_zeros(rows, group, real, Z, GROUPS: tl.constexpr):
    """Load the bytes that hold the zero points of GROUPS groups: (BN, GROUPS / 2) or, of one group,
    (BN, 1), uint8. rows: (BN, 1), the addresses of rows of Z bytes. real: (BN, 1), which of them
    exist. group: the index of the first group, a multiple of GROUPS, a power of two. Bytes from Z
    on, and those of rows that do not exist, are 0."""
    HALF: tl.constexpr = GROUPS // 2 if GROUPS > 1 else 1
    byte = group // 2 + tl.arange(0, HALF)[None, :]
    return tl.load(rows + byte, real & (byte < Z), 0)


@triton.jit
def zero_points(bytes, group, GROUPS: tl.constexpr):
    """Return the zero points, (BN, GROUPS) uint8, from the bytes of load_zeros. group: the index of
    the first group; used only if GROUPS is 1, where it selects the nibble."""
    if GROUPS == 1:
        return (bytes >> (group % 2 * 4).to(tl.uint8)) & 15
    else:
        return tl.join(bytes & 15, bytes >> 4).reshape(bytes.shape[0], GROUPS)


@triton.jit
def int4_kernel(
    x,  # (M, 8, W) float16, the numbers of ScaledRows: every eighth input together
    units,  # (M, ceil(W / BW)) float32
    weight,  # (N, W) int32: eight nibbles each
    scales,  # (N, P) float16
    zeros,  # (N, ceil(P / 2)) uint8
    bias,
    residual,  # (M, N): is added to the outputs
    out,  # (M, N)
    parts,  # (SPLITS, M, N) float32
    arrived,  # see finish_rows
    M,
    N,
    W,
    P,
    Z,  # bytes of a row of zeros
    weight_stride,  # from row to row, in chunks of 4 words
    scale_stride,  # from row to row, in numbers
    zero_stride,  # from row to row, in bytes
    WORDS: tl.constexpr,  # words of a group: groupsize / 8
    BN: tl.constexpr,
    BM: tl.constexpr,
    GROUPS: tl.constexpr,  # groups that a step dequantises
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply M rows by int4 weights. The launch has (tiles of outputs, tiles of rows, SPLITS)
    programs.

    A program sums a (BN, BM) tile over 1/SPLITS of the words, from `first` on, BW words in a step.
    It loads the zero points and scales of a step one step ahead. number: the zero point, factor:
    the scale, of each word. low, high: the differences nibble - zero point of the low and the high
    nibbles; number_above has added 1024, and, divided by 16 with a high nibble, 64.
    """
    begin(PDL)
    BW: tl.constexpr = GROUPS * WORDS
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    first = tl.program_id(2) * steps * BW
    row, real = weight + n[:, None] * (weight_stride * 4), n[:, None] < N
    step = tl.arange(0, BW)[None, :]
    # Triton joins loads only if it knows that their mask is the same. So P and Z are parameters, of
    # which it knows whether 16 divides them, and `group` is counted, not computed as a quotient.
    group = tl.program_id(2) * steps * GROUPS
    zero_row, scale_row = zeros + n[:, None] * zero_stride, scales + n[:, None] * scale_stride
    column = group + tl.arange(0, GROUPS)[None, :]  # (1, GROUPS)
    zero = load_zeros(zero_row, group, real, Z, GROUPS)
    scale = tl.load(scale_row + column, real & (column < P), 0)
    total = tl.zeros((BN, BM), tl.float32)
    unit_row = units + m * tl.cdiv(W, BW)
    wait(PDL)
    for start in range(first, tl.minimum(W, first + steps * BW), BW):
        words = tl.load(row + start + step, real & (start + step < W), 0)  # (BN, BW)
        unit = tl.load(unit_row + start // BW, m < M, 0)  # (BM,)
        number = zero_points(zero, group, GROUPS).to(tl.float16)  # (BN, GROUPS)
        factor = scale
        group += GROUPS
        column += GROUPS
        zero = load_zeros(zero_row, group, real, Z, GROUPS)
        scale = tl.load(scale_row + column, real & (column < P), 0)
        number = tl.broadcast_to(number[:, :, None], (BN, GROUPS, WORDS)).reshape(BN, BW)
        factor = tl.broadcast_to(factor[:, :, None], (BN, GROUPS, WORDS)).reshape(BN, BW)
        k = start + tl.arange(0, BW)[:, None]
        mask = (k < W) & (m[None, :] < M)  # (BW, BM)
        part = tl.zeros((BN, BM), tl.float32)
        numbers = x + (m[None, :] * 8) * W + k
        for byte in tl.static_range(4):  # its nibbles multiply inputs 2 * byte and 2 * byte + 1
            both = bytes_of(words, byte, PTX)
            low = number_above(both, "0x000F000F", PTX) - (number + 1024)
            part = tl.dot(
                low * factor, tl.load(numbers + 2 * byte * W, mask, 0, cache_modifier=CACHED), part
            )
            # A high nibble q stays in the upper half of its byte: the number is 1024 + 16 q.
            high = number_above(both, "0x00F000F0", PTX) * 0.0625 - (number + 64)
            part = tl.dot(
                high * factor,
                tl.load(numbers + (2 * byte + 1) * W, mask, 0, cache_modifier=CACHED),
                part,
            )
        total += part * unit[None, :]
    ones = tl.full((BN,), 1, tl.float32)  # the weights are scaled already
    finish_rows(
        total, ones, bias, residual, out, parts, arrived, m, n, M, N, SPLITS, HAS_BIAS, ADDS
    )


@triton.jit
def int8_kernel(
    x,  # (M, 4, W) float16, the numbers of ScaledRows: every fourth input together
    units,  # (M, ceil(W / BW)) float32
    weight,  # (N, W) int32: four int8 each
    scales,  # (N,) float32
    bias,
    residual,  # (M, N): is added to the outputs
    out,  # (M, N)
    parts,  # (SPLITS, M, N) float32
    arrived,  # see finish_rows
    M,
    N,
    W,
    weight_stride,  # from row to row, in words
    BN: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply M rows by int8 weights. The launch has (tiles of outputs, tiles of rows, SPLITS)
    programs.

    A program sums a (BN, BM) tile over 1/SPLITS of the words, from `first` on, BW words in a step.
    1152 = 1024 (see number_above) + 128 (see raised).
    """
    begin(PDL)
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    first = tl.program_id(2) * steps * BW
    row, real = weight + n[:, None] * weight_stride, n[:, None] < N
    step = tl.arange(0, BW)[None, :]
    scale = tl.load(scales + n, n < N, 0)
    total = tl.zeros((BN, BM), tl.float32)
    unit_row = units + m * tl.cdiv(W, BW)
    wait(PDL)
    for start in range(first, tl.minimum(W, first + steps * BW), BW):
        words = tl.load(row + start + step, real & (start + step < W), 0)  # (BN, BW)
        raised = words ^ -2139062144  # 0x80808080: each byte is then q + 128
        k = start + tl.arange(0, BW)[:, None]
        mask = (k < W) & (m[None, :] < M)  # (BW, BM)
        part = tl.zeros((BN, BM), tl.float32)
        numbers = x + (m[None, :] * 4) * W + k
        unit = tl.load(unit_row + start // BW, m < M, 0)  # (BM,)
        for byte in tl.static_range(4):
            weights = number_above(bytes_of(raised, byte, PTX), "0x00FF00FF", PTX) - 1152
            part = tl.dot(
                weights, tl.load(numbers + byte * W, mask, 0, cache_modifier=CACHED), part
            )
        total += part * unit[None, :]
    finish_rows(
        total, scale, bias, residual, out, parts, arrived, m, n, M, N, SPLITS, HAS_BIAS, ADDS
    )

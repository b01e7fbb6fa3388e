"""Products of 2 to 64 rows, (M, K) x (N, K) -> (M, N), for batches and for verifying drafts.

Start at int4_kernel. Weights are dequantised in registers and multiplied by tensor cores in
float16, which holds 4-bit and 8-bit integers exactly; int4 scales are stored in float16.
scale_kernel first scales each row of activations by a power of two into the range of float16.

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

A weight (q - zero) * scale is rounded to float16 with an error of at most 2**-12 of itself; the
PyTorch formula rounds to bfloat16, which is 16 times as coarse. That formula, in quant/linear.py,
is the reference of each kernel.

Words: a nibble is half a byte, an int4 weight. A word is 32 bits. A tile is the (BN, BM) outputs
that a program computes: BN outputs of BM rows. PDL: whether the launch allows programmatic
dependent launch. PTX: whether inline assembly is available; Triton's interpreter has none.
HAS_BIAS: whether bias, (N,), is given.

Shapes: M rows, N out_features, K in_features, W words of a row of weights, P groups of inputs.
"""

import triton
import triton.language as tl

from kernels.gpu.one_row import begin, wait

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
    x,  # (M, K)
    out,  # (M, PER_WORD, Kp / PER_WORD) float16: input PER_WORD * i + p at (p, i); 0 beyond K
    units,  # (M,) float32: x = out * unit
    K,
    Kp,  # K rounded up to the stored width of the weights
    x_stride,
    PER_WORD: tl.constexpr,  # inputs that a word of weights multiplies: 8 for int4, 4 for int8
    BLOCK: tl.constexpr,  # inputs at a time
    PDL: tl.constexpr,
):
    """Scale each row of activations to float16 of at most 2**15 by its unit, a power of two.

    A program scales one row. A row with an infinite or NaN input gets the unit NaN. The arithmetic
    on the exponent's bits is explained in fixed_point.fixed_point.
    """
    begin(PDL)
    m = tl.program_id(0)
    wait(PDL)
    largest = tl.zeros((BLOCK,), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        values = tl.load(x + m * x_stride + k, k < K, 0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        poison += values * 0  # NaN if a value is infinite or NaN, else 0
    exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(exponent, 30 << 23) - (14 << 23)
    inverse = ((254 << 23) - unit).to(tl.float32, bitcast=True)
    tl.store(units + m, unit.to(tl.float32, bitcast=True) + tl.sum(poison, 0))
    for start in range(0, Kp, BLOCK):
        k = start + tl.arange(0, BLOCK)
        values = tl.load(x + m * x_stride + k, k < K, 0).to(tl.float32) * inverse
        place = out + m * Kp + k % PER_WORD * (Kp // PER_WORD) + k // PER_WORD
        tl.store(place, values.to(tl.float16), k < Kp)


@triton.jit
def finish_rows(
    total,  # (BN, BM) float32
    scale,  # (BN,)
    units,
    bias,
    out,
    parts,  # (SPLITS, M, N) float32
    arrived,  # int32 per tile: programs that have stored their part; 0 before and after a launch
    m,
    n,
    M,
    N,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Store a tile of outputs. With SPLITS > 1 each program stores its part, and the program that
    arrives last adds all parts and stores the outputs.

    total: this program's sums. scale: of the outputs. units: (M,), of the rows. m, n: (BM,) and
    (BN,), the tile's rows and outputs; mask `inside` leaves out those from M and N on. `place`:
    their indices in a part.
    """
    inside = (n[:, None] < N) & (m[None, :] < M)
    place = m[None, :] * N + n[:, None]
    if SPLITS == 1:
        store_rows(total, scale, units, bias, out, m, n, M, N, HAS_BIAS)
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
            store_rows(whole, scale, units, bias, out, m, n, M, N, HAS_BIAS)


@triton.jit
def store_rows(total, scale, units, bias, out, m, n, M, N, HAS_BIAS: tl.constexpr):
    """Multiply (BN, BM) sums, total, by the scale of each output, (BN,), and the unit of each row,
    add the bias and store them. m, n: the tile's rows and outputs, see finish_rows."""
    total *= scale[:, None] * tl.load(units + m, m < M, 0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, n < N, 0).to(tl.float32)[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), inside)


@triton.jit
def int4_kernel(
    x,  # (M, 8, W) float16 from scale_kernel: every eighth input together
    units,  # (M,) float32
    weight,  # (N, W) int32: eight nibbles each
    scales,  # (N, P) float16
    zeros,  # (N, ceil(P / 2)) uint8
    bias,
    out,  # (M, N)
    parts,  # (SPLITS, M, N) float32
    arrived,  # see finish_rows
    M,
    N,
    W,
    weight_stride,  # from row to row, in chunks of 4 words
    scale_stride,  # from row to row, in numbers
    zero_stride,  # from row to row, in bytes
    WORDS: tl.constexpr,  # words of a group: groupsize / 8
    BN: tl.constexpr,
    BM: tl.constexpr,
    GROUPS: tl.constexpr,  # groups that a step dequantises
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    first = tl.program_id(2) * steps * BW
    row, real = weight + n[:, None] * (weight_stride * 4), n[:, None] < N
    step = tl.arange(0, BW)[None, :]
    group = first // WORDS + tl.arange(0, GROUPS)[None, :]  # (1, GROUPS)
    inside = real & (group * WORDS < W)
    zero_row, scale_row = zeros + n[:, None] * zero_stride, scales + n[:, None] * scale_stride
    zero, scale = tl.load(zero_row + group // 2, inside, 0), tl.load(scale_row + group, inside, 0)
    total = tl.zeros((BN, BM), tl.float32)
    wait(PDL)
    for start in range(first, tl.minimum(W, first + steps * BW), BW):
        words = tl.load(row + start + step, real & (start + step < W), 0)  # (BN, BW)
        number = ((zero >> (group % 2 * 4).to(tl.uint8)) & 15).to(tl.float16)
        number = tl.broadcast_to(number[:, :, None], (BN, GROUPS, WORDS)).reshape(BN, BW)
        factor = tl.broadcast_to(scale[:, :, None], (BN, GROUPS, WORDS)).reshape(BN, BW)
        k = start + tl.arange(0, BW)[:, None]
        mask = (k < W) & (m[None, :] < M)  # (BW, BM)
        inputs = x + (m[None, :] * 8) * W + k
        for byte in tl.static_range(4):  # its nibbles multiply inputs 2 * byte and 2 * byte + 1
            both = bytes_of(words, byte, PTX)
            low = number_above(both, "0x000F000F", PTX) - (number + 1024)
            total = tl.dot(
                low * factor, tl.load(inputs + 2 * byte * W, mask, 0, cache_modifier=CACHED), total
            )
            # A high nibble q stays in the upper half of its byte: the number is 1024 + 16 q.
            high = number_above(both, "0x00F000F0", PTX) * 0.0625 - (number + 64)
            total = tl.dot(
                high * factor,
                tl.load(inputs + (2 * byte + 1) * W, mask, 0, cache_modifier=CACHED),
                total,
            )
        group += GROUPS
        inside = real & (group * WORDS < W)
        zero = tl.load(zero_row + group // 2, inside, 0)
        scale = tl.load(scale_row + group, inside, 0)
    ones = tl.full((BN,), 1, tl.float32)  # the weights are scaled already
    finish_rows(total, ones, units, bias, out, parts, arrived, m, n, M, N, SPLITS, HAS_BIAS)


@triton.jit
def int8_kernel(
    x,  # (M, 4, W) float16 from scale_kernel: every fourth input together
    units,  # (M,) float32
    weight,  # (N, W) int32: four int8 each
    scales,  # (N,) float32
    bias,
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
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    """Multiply M rows by int8 weights. The launch has (tiles of outputs, tiles of rows, SPLITS)
    programs.

    A program sums a (BN, BM) tile over 1/SPLITS of the words, from `first` on, BW words in a step.
    1152 = 1024 (see number_above) + 128 (see raised).
    """
    begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    first = tl.program_id(2) * steps * BW
    row, real = weight + n[:, None] * weight_stride, n[:, None] < N
    step = tl.arange(0, BW)[None, :]
    scale = tl.load(scales + n, n < N, 0)
    total = tl.zeros((BN, BM), tl.float32)
    wait(PDL)
    for start in range(first, tl.minimum(W, first + steps * BW), BW):
        words = tl.load(row + start + step, real & (start + step < W), 0)  # (BN, BW)
        raised = words ^ -2139062144  # 0x80808080: each byte is then q + 128
        k = start + tl.arange(0, BW)[:, None]
        mask = (k < W) & (m[None, :] < M)  # (BW, BM)
        inputs = x + (m[None, :] * 4) * W + k
        for byte in tl.static_range(4):
            weights = number_above(bytes_of(raised, byte, PTX), "0x00FF00FF", PTX) - 1152
            total = tl.dot(
                weights, tl.load(inputs + byte * W, mask, 0, cache_modifier=CACHED), total
            )
    finish_rows(total, scale, units, bias, out, parts, arrived, m, n, M, N, SPLITS, HAS_BIAS)

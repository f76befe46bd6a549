"""Run-time library of the generated Triton kernels: layout, reductions, random bits.

The counterpart of ``cpp/stq_kernel.h``. A tile is ``BLOCKS`` blocks of 128 elements; a value per
element is 8 planes ``[BLOCKS, 16]`` in a tuple, a value per block is ``[BLOCKS, 1]``. All loops are
unrolled, so a plane is a handful of registers of one thread and no element ever changes its
thread: 8 blocks a warp give each thread 4 neighbouring lanes of a plane, which is a 128-bit access
for float32.

Loops and tuples take the planes in the order 0 4 2 6 1 5 3 7 (the bits of the index reversed), so
that the planes that share a byte follow one another and the byte can leave the registers.

Import this module only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def plane(i):
    """The plane that comes at place ``i`` of loops and tuples, and the other way round."""
    return (0, 4, 2, 6, 1, 5, 3, 7)[i]


# A tensor's row of the table: int64 fields, pointers among them. ------------------------------
@triton.jit
def pointer(row, FIELD: tl.constexpr, type: tl.constexpr, offset, ALIGNMENT: tl.constexpr):
    """The pointer in a field, ``offset`` elements on.

    ``ALIGNMENT`` in bytes decides how wide accesses may be. The hint stands on the sum: Triton
    knows nothing of a pointer that comes out of memory.
    """
    start = tl.load(row + FIELD).to(tl.pointer_type(type))
    return tl.multiple_of(start + offset, ALIGNMENT)


@triton.jit
def slot_float(slot, INDEX: tl.constexpr):
    """A float32 that the scalars kernel left for this tensor."""
    return tl.load(slot + INDEX).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def elements_left(numel, first, BLOCKS: tl.constexpr):
    """How many elements from block ``first`` on exist, at most the tile's, int32."""
    return tl.minimum(numel - first * 128, BLOCKS * 128).to(tl.int32)


@triton.jit
def valid_count(local, count):
    """How many elements of each block exist, float32."""
    return tl.minimum(tl.maximum(count - local * 128, 0), 128).to(tl.float32)


# Memory. What is masked is not defined when read: kernels use it under ``inside`` alone. ---------
@triton.jit
def load_word(place, present):
    """Scale words, zero-extended."""
    return tl.load(place, mask=present).to(tl.int32)


@triton.jit
def store_word(place, word, lane, present):
    """By the block's first lane.

    The hint gives the store the layout of every other access, 4 lanes a thread. Without it Triton
    passes the words through shared memory, to store neighbours together. It is not true of the
    addresses, and makes no access wider: the mask differs from lane to lane.
    """
    place = tl.multiple_of(tl.max_contiguous(place + lane, [1, 16]), [1, 16])
    tl.store(place, word.to(tl.uint16), mask=present & (lane == 0))


# Packed codes: a field of b bits is 16 b bytes; its byte 16 c + lane holds planes c, c + b, ... --
@triton.jit
def load_codes(place, present, WIDTH: tl.constexpr):
    """All bytes of the blocks, by 16."""
    chunks = ()
    for c in tl.static_range(WIDTH):
        chunks = chunks + (tl.load(place + 16 * c, mask=present),)  # noqa: RUF005
    return chunks


@triton.jit
def field(chunks, FIRST: tl.constexpr, BITS: tl.constexpr, p: tl.constexpr):
    """Plane ``p`` of the field whose bytes begin with chunk ``FIRST``."""
    byte = chunks[FIRST + p % BITS].to(tl.int32)
    return (byte >> (BITS * (p // BITS))) & ((1 << BITS) - 1)


@triton.jit
def unpack(chunks, WIDTH: tl.constexpr, p: tl.constexpr):
    """The codes of plane ``p``; 3, 5, 6 and 12 bits are two fields, the low one first."""
    if WIDTH == 3:
        return field(chunks, 0, 2, p) | (field(chunks, 2, 1, p) << 2)
    elif WIDTH == 5:
        return field(chunks, 0, 4, p) | (field(chunks, 4, 1, p) << 4)
    elif WIDTH == 6:
        return field(chunks, 0, 4, p) | (field(chunks, 4, 2, p) << 4)
    elif WIDTH == 12:
        return field(chunks, 0, 8, p) | (field(chunks, 8, 4, p) << 8)
    else:
        return field(chunks, 0, WIDTH, p)


@triton.jit
def gather_field(place, element, present, FIRST: tl.constexpr, BITS: tl.constexpr):
    """The field of every element of ``[blocks, 128]``, each from a byte that it loads itself."""
    p = element // 16
    place = place + 16 * (FIRST + p % BITS) + element % 16
    byte = tl.load(place, mask=present, other=0).to(tl.int32)
    return (byte >> (p // BITS * BITS)) & ((1 << BITS) - 1)


@triton.jit
def gather_codes(place, element, present, WIDTH: tl.constexpr):
    """`unpack` for kernels without planes."""
    if WIDTH == 3:
        return gather_field(place, element, present, 0, 2) | (
            gather_field(place, element, present, 2, 1) << 2
        )
    elif WIDTH == 5:
        return gather_field(place, element, present, 0, 4) | (
            gather_field(place, element, present, 4, 1) << 4
        )
    elif WIDTH == 6:
        return gather_field(place, element, present, 0, 4) | (
            gather_field(place, element, present, 4, 2) << 4
        )
    elif WIDTH == 12:
        return gather_field(place, element, present, 0, 8) | (
            gather_field(place, element, present, 8, 4) << 8
        )
    else:
        return gather_field(place, element, present, 0, WIDTH)


@triton.jit
def store_field(
    place,
    codes,
    present,
    borders,
    FIRST: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    i: tl.constexpr,
):
    """Store the byte of the field that plane ``i`` of the order completes, if there is one."""
    for c in tl.static_range(BITS):
        if i == plane(c + 8 - BITS):
            byte = (codes[plane(c)] >> SHIFT) & ((1 << BITS) - 1)
            for k in tl.static_range(1, 8 // BITS):
                code = (codes[plane(c + BITS * k)] >> SHIFT) & ((1 << BITS) - 1)
                byte |= code << (BITS * k)
            if (borders & (256 << (FIRST + c))) != 0:
                tl.store(place + 16 * (FIRST + c), byte.to(tl.uint8), mask=present)


@triton.jit
def store_codes(place, codes, present, borders, WIDTH: tl.constexpr, i: tl.constexpr):
    """Pack and store what is complete once the codes of ``i + 1`` planes are there."""
    if WIDTH == 3:
        store_field(place, codes, present, borders, 0, 2, 0, i)
        store_field(place, codes, present, borders, 2, 1, 2, i)
    elif WIDTH == 5:
        store_field(place, codes, present, borders, 0, 4, 0, i)
        store_field(place, codes, present, borders, 4, 1, 4, i)
    elif WIDTH == 6:
        store_field(place, codes, present, borders, 0, 4, 0, i)
        store_field(place, codes, present, borders, 4, 2, 4, i)
    elif WIDTH == 12:
        store_field(place, codes, present, borders, 0, 8, 0, i)
        store_field(place, codes, present, borders, 8, 4, 8, i)
    else:
        store_field(place, codes, present, borders, 0, WIDTH, 0, i)


@triton.jit
def planes_of(BLOCKS: tl.constexpr, type: tl.constexpr):
    """Zeros for an element value that a group will make."""
    planes = ()
    for _ in tl.static_range(8):
        planes = planes + (tl.zeros([BLOCKS, 16], type),)  # noqa: RUF005  Triton unpacks no tuples
    return planes


# Reductions, in the order of `reference.block_sum`: planes in order, then lanes by halves. -------
@triton.jit
def halves(x, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Lane ``i`` plus lane ``i + WIDTH``: a sum of two, which has no order to choose."""
    return tl.sum(tl.reshape(x, [BLOCKS, 2, WIDTH]), 1)


@triton.jit
def block_sum(planes, BLOCKS: tl.constexpr):
    x = planes[0]
    for p in tl.static_range(1, 8):
        x = x + planes[plane(p)]
    return sum_lanes(x, BLOCKS)


@triton.jit
def block_squares(planes, BLOCKS: tl.constexpr):
    x = planes[0] * planes[0]
    for p in tl.static_range(1, 8):
        x = tl.fma(planes[plane(p)], planes[plane(p)], x)
    return sum_lanes(x, BLOCKS)


@triton.jit
def sum_lanes(x, BLOCKS: tl.constexpr):
    x = halves(x, BLOCKS, 8)
    x = halves(x, BLOCKS, 4)
    x = halves(x, BLOCKS, 2)
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def block_max(planes):
    x = planes[0]
    for p in tl.static_range(1, 8):
        x = tl.maximum(x, planes[p])
    return tl.max(x, 1, keep_dims=True)


# Random bits from the counter (seed, step, stream, block, element); see rounding.py. ------------
@triton.jit
def mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def step_key(stream, step):
    """`rounding.step_key`: a hash above, below it the step's low 32 bits."""
    hashed = mix64((step & 0xFFFFFFFF00000000) ^ stream)
    return (hashed & 0xFFFFFFFF00000000) | (step & 0xFFFFFFFF)


@triton.jit
def block_key(key, block):
    """Per block: the number of its first element in this step, and what the next ones add."""
    base = key & 0xFFFFFFFF00000000
    mixed = mix64(base + (block + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    first = mixed.to(tl.uint32) + key.to(tl.uint32) * 0x9E3779B9
    return first, (mixed >> 32).to(tl.uint32) | 1


@triton.jit
def random_bits(key, lane, p: tl.constexpr):
    return (lane + 16 * p).to(tl.uint32) * key[1] + key[0]


@triton.jit
def random24(key, lane, p: tl.constexpr):
    return (random_bits(key, lane, p) >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def random(key, lane, p: tl.constexpr):
    return random_bits(key, lane, p).to(tl.int32, bitcast=True)


# Operations without an operator of their own; float32 or float64. ------------------------------
@triton.jit
def copysign(a, b):
    """Through the bits: a zero has a sign too."""
    if a.dtype == tl.float64:
        magnitude = a.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        sign_bit = (b.to(tl.int64, bitcast=True) >> 63) << 63
        return (magnitude | sign_bit).to(tl.float64, bitcast=True)
    else:
        magnitude = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        sign_bit = (b.to(tl.int32, bitcast=True) >> 31) << 31
        return (magnitude | sign_bit).to(tl.float32, bitcast=True)


@triton.jit
def quotient(a, b):
    """``a / b``, correctly rounded, for ``b > 0`` and nothing near to under- or overflow.

    A reciprocal within some ulps, one Newton step for it, one for the quotient (Markstein, "IA-64
    and Elementary Functions", 2000). ``div_rn`` is right for all numbers, and has a branch for
    the rare ones that costs registers wherever it stands.
    """
    root = tl.rsqrt(b)
    y = root * root
    y = tl.fma(tl.fma(-b, y, 1.0), y, y)
    q = a * y
    return tl.fma(tl.fma(-b, q, a), y, q)


@triton.jit
def minimum(a, b):
    """NaN if either argument is, as torch's."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def power(x, y):
    """``x ** y`` in float64: exp(y log|x|), with the sign of an odd whole power."""
    x, y = x.to(tl.float64), y.to(tl.float64)
    magnitude = tl.exp(y * tl.log(tl.abs(x)))
    half = y * 0.5
    whole, odd = tl.floor(y) == y, tl.floor(half) != half
    negative = tl.where(whole, tl.where(odd, -magnitude, magnitude), float("nan"))
    result = tl.where(x < 0, negative, magnitude)
    zero = tl.where(y > 0, 0.0, float("inf"))
    result = tl.where(x == 0, zero, result)
    return tl.where((y == 0) | (x == 1), 1.0, result)


@triton.jit
def exp(x):
    """Through float64: the GPU's own float32 exponential is an approximation."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def log(x):
    return tl.log(x.to(tl.float64)).to(tl.float32)

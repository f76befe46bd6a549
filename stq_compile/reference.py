"""The meaning of every format, in plain torch.

This is the definition; kernels are tested against it bit for bit. Every operation is one IEEE
float32 operation in a stated order, so a kernel that keeps the order gets the same bits; the
fused multiply-add is formed in float64 (a float32 product is exact there, so the one extra
rounding of the sum can differ from a true fma only in a double-rounding case, about one in
2^29).

Stochastic rounding is unbiased in the value for ``softsign``, ``midrise`` (inside its clip)
and ``bfloat16``. For ``adaptive_log`` it is unbiased in the bit pattern at 8 bits, and leans down
from it at fewer: the pattern is nearly a logarithm, and where a logarithm is unbiased, an average
of squares, which is linear in what is stored, grows by half the variance of the noise at every
step, and the updates that it divides shrink (design/0008).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stq_compile import matrices
from stq_compile.errors import FormatMismatchError
from stq_compile.formats import (
    BEND_COEFFICIENTS,
    BLOCK,
    LANES,
    MAX_RANGE,
    MEAN_PULL,
    MIDRISE_CLIP,
    MIDRISE_LARGEST_UNIT,
    MIDRISE_SHRINK,
    MIDRISE_SLACK,
    OCTAVE,
    PLANES,
    PULLED,
    RANGE_STEP,
    TAIL_DEVIATIONS,
    ULP_STEP,
    Format,
    block_count,
)
from stq_compile.layout import pack, unpack
from stq_compile.rounding import Noise, random_bits

INFINITY_BITS = 0x7F800000
ONE_BITS = 0x3F800000
HALF_EXPONENT = 0x3F800000
"""What is left of an exponent that was shifted right by one."""
ROOT_BITS, INVERSE_ROOT_BITS = 64 << 23, 190 << 23
"""What a halved exponent is added to, for a power of two near the root, and subtracted from, for
the inverse of that: biased exponents of a number and of its inverse are 254 together."""
LEAST_SCALE_BITS = {16: 1 << 23, 20: 15 << 23}
"""Patterns of the least scales that are not zero, by the bits that they lose: 2^-126, whose inverse
is finite, and for ``adaptive_log`` 2^-112, from which its widest range ends at 2^-126."""
LOWEST_BITS = int(-(MAX_RANGE + 1) / OCTAVE)
"""Distance of bit patterns below the scale at which elements are cut off: one octave farther than
the widest range."""
FAR_FALL = 6.0 / OCTAVE
"""How far a scale may fall in one step, in bit patterns, until its block is given the widest range
for that step: from there on elements were not seen that lie 9 octaves below the new scale."""
ORIGIN_SLACK = 2.0**-21
"""Of the way from one scale to another, in levels: what rounding it may have added to a position,
which is taken off, so that none lies above the top."""
CHUNK_BLOCKS = 1 << 14
"""Blocks converted at a time, so that temporaries stay at some tens of megabytes."""


def empty_buffers(
    format: Format, numel: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scale words of ``numel`` zeros: all bytes zero decode to zero in every format.

    A ``constant`` has a single code, its value.
    """
    blocks = block_count(numel) if format.blocked else 0
    scales = torch.zeros(blocks, dtype=torch.int16, device=device)
    if format.kind == "constant":
        return torch.zeros(1, device=device), scales
    if format.whole:
        return matrices.empty_buffers(format, numel, device, empty_buffers)
    if format.kind == "float32":
        return torch.zeros(numel, device=device), scales
    if not format.blocked:
        code = torch.int16 if format.kind == "bfloat16" else torch.int8
        return torch.zeros(numel, dtype=code, device=device), scales
    return torch.zeros(blocks, format.block_bytes, dtype=torch.uint8, device=device), scales


def encode(
    x: Tensor,
    format: Format,
    noise: Noise,
    normalizer: Tensor | None = None,
    first_block: int = 0,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode float32 ``x`` ``[numel]``; returns (codes, scale words), shaped as `empty_buffers`.

    ``normalizer`` ``[numel]`` is the state whose square root is the unit of a normalized format;
    ``first_block`` is the block's index in the whole tensor, for the random counter; ``before`` are
    the scale words that the state had, from which ``adaptive_log`` measures its range if it gets
    them (design/0025).
    """
    if format.whole:
        return matrices.encode(x, format, lambda part, coded: encode(part, coded, noise))
    format = format.coded
    codes, scales = empty_buffers(format, x.numel(), x.device)
    if format.kind == "float32":
        return codes.copy_(x), scales
    if format.kind == "constant":
        raise FormatMismatchError(
            where="format constant", found="values to encode", expected="a state at birth"
        )
    span = CHUNK_BLOCKS * BLOCK
    for start in range(0, x.numel(), span):
        part = x[start : start + span]
        count = part.numel()
        block = start // BLOCK
        blocks = block_count(count)
        if format.kind == "bfloat16":
            codes[start : start + count] = _bfloat16_bits(part, noise, first_block + block)
            continue
        tile = _pad(part)
        if format.kind in ("ulp", "softsign"):
            uniform = noise.uniform(first_block + block, blocks, x.device)
        else:
            centered = noise.centered(first_block + block, blocks, x.device)
        if format.kind == "ulp":
            codes[start : start + count] = _ulp_codes(tile, uniform).view(-1)[:count]
            continue
        valid = _pad(torch.ones(count, device=x.device)) > 0
        if format.kind == "softsign":
            code, scale = _encode_softsign(tile, format, uniform)
        elif format.kind == "adaptive_log":
            words = None if before is None else before[block : block + blocks]
            code, scale = _encode_adaptive_log(tile, valid, format, centered, words)
        else:
            assert normalizer is not None
            unit = _pad(normalizer[start : start + span])
            code, scale = _encode_midrise(tile, unit, valid, format, centered)
        codes[block : block + blocks] = pack(torch.where(valid, code, 0), format.width)
        scales[block : block + blocks] = scale.to(torch.int16)
    return codes, scales


def decode(
    codes: Tensor, scales: Tensor, format: Format, numel: int, normalizer: Tensor | None = None
) -> Tensor:
    """Decode to float32 ``[numel]``."""
    if format.whole:
        return matrices.decode(codes, scales, format, numel, decode)
    format = format.coded
    if format.kind == "float32":
        return codes.clone()
    if format.kind == "constant":
        return codes.repeat(numel)
    if format.kind == "bfloat16":
        return codes.view(torch.bfloat16).float()
    if format.kind == "ulp":
        return codes.float() * ULP_STEP
    out = torch.empty(numel, device=codes.device)
    span = CHUNK_BLOCKS * BLOCK
    for start in range(0, numel, span):
        count = min(span, numel - start)
        rows = slice(start // BLOCK, start // BLOCK + block_count(count))
        code = unpack(codes[rows], format.width)
        word = scale_words(scales[rows])[:, None]
        if format.kind == "softsign":
            value = _decode_softsign(code, word, format)
        elif format.kind == "adaptive_log":
            value = _decode_adaptive_log(code, word, format)
        else:
            assert normalizer is not None
            unit = midrise_unit(_pad(normalizer[start : start + count]), format)
            value = _decode_midrise(code, word, format) * unit
        out[start : start + count] = value.view(-1)[:count]
    return out


def _ulp_codes(x: Tensor, uniform: Tensor | float) -> Tensor:
    """Multiples of `ULP_STEP`, rounded at random or to nearest; what is not a number is 0."""
    t = (x / ULP_STEP).clamp(-128.0, 127.0).nan_to_num(0.0)
    below = t.floor()
    return (below + (uniform < t - below).float()).to(torch.int8)


def _pad(x: Tensor) -> Tensor:
    """``[numel]`` to ``[blocks, 128]``, the last block padded with zeros."""
    padded = torch.zeros(block_count(x.numel()) * BLOCK, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x
    return padded.view(-1, BLOCK)


def fma(a: Tensor | float, b: Tensor, c: Tensor | float) -> Tensor:
    """``a * b + c`` rounded once (module docstring)."""
    wide_c = c.double() if isinstance(c, Tensor) else c
    wide_a = a.double() if isinstance(a, Tensor) else a
    return (wide_a * b.double() + wide_c).float()


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root; torch's vectorized float32 one is off in the last bit.

    (Likewise a float divided by a tensor is, in torch, a product with the reciprocal; so both
    operands of a division are tensors here.)
    """
    return x.double().sqrt().float()


def float_from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def magnitude_bits(x: Tensor) -> Tensor:
    """Bits of ``|x|`` as int32; ordered like the magnitudes, with NaN above infinity."""
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def block_sum(x: Tensor) -> Tensor:
    """Sum over a block ``[blocks, 128] -> [blocks, 1]``: planes in order, then lanes by halves."""
    planes = x.view(-1, PLANES, LANES)
    total = planes[:, 0]
    for plane in range(1, PLANES):
        total = total + planes[:, plane]
    return _sum_lanes(total)


def block_squares(x: Tensor) -> Tensor:
    """Sum of squares over a block, in the order of `block_sum`; a square is not rounded by itself
    where it is added to another."""
    planes = x.view(-1, PLANES, LANES)
    total = planes[:, 0] * planes[:, 0]
    for plane in range(1, PLANES):
        total = fma(planes[:, plane], planes[:, plane], total)
    return _sum_lanes(total)


def _sum_lanes(total: Tensor) -> Tensor:
    width = LANES
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total


def log2(x: Tensor) -> Tensor:
    """Polynomial log2 of ``x >= 0``, error 2.2e-6 octaves; log2(0) is -127.

    The bit pattern, which is a logarithm but for a bend between powers of two, and that bend.
    """
    bits = x.contiguous().view(torch.int32)
    line = (bits - ONE_BITS).float() * OCTAVE
    m = float_from_bits((bits & 0x7FFFFF) | ONE_BITS) - 1.5
    p = torch.full_like(m, BEND_COEFFICIENTS[-1])
    for c in reversed(BEND_COEFFICIENTS[:-1]):
        p = fma(p, m, c)
    return fma(p, fma(m, m, -0.25), line)


def _scale_up(absmax: Tensor, drop: int) -> Tensor:
    """Upper bits of a magnitude's pattern, rounded up, after dropping ``drop`` low bits.

    Never below `LEAST_SCALE_BITS` unless zero; never rounded up to infinity; infinity and NaN are
    kept, so that a broken block can be seen.
    """
    rounded = (absmax + ((1 << drop) - 1)) >> drop
    low, high = LEAST_SCALE_BITS[drop] >> drop, (INFINITY_BITS >> drop) - 1
    kept = torch.where(absmax > INFINITY_BITS, 0x7FC00000 >> drop, INFINITY_BITS >> drop)
    bounded = torch.where(absmax == 0, 0, rounded.clamp(low, high))
    return torch.where(absmax >= INFINITY_BITS, kept, bounded)


def block_scale(x: Tensor, drop: int) -> Tensor:
    """The scale word of each block of ``[blocks, 128]``, before the range of ``adaptive_log``."""
    return _scale_up(magnitude_bits(x).amax(1, keepdim=True), drop)


def scale_words(scales: Tensor) -> Tensor:
    """Scale words, which are stored as int16, as int32 without a sign."""
    return scales.to(torch.int32) & 0xFFFF


def scale_pattern(word: Tensor, format: Format) -> Tensor:
    """The bit patterns of scales, from their words as int32."""
    return word >> 5 << 20 if format.kind == "adaptive_log" else word << 16


def reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)


# softsign -----------------------------------------------------------------------------------


def _encode_softsign(x: Tensor, format: Format, uniform: Tensor | float) -> tuple[Tensor, Tensor]:
    """Levels k/(2K-k): the inverse of y = 2a/(1+a) at y = k/K.

    With t = K y, k = floor(t) and f = t - k, the position of ``a`` between the levels k and
    k + 1, measured in values, is f (2K - 1 - k) (1 + a) / 2K; rounding up with that
    probability is unbiased in the value, and comparing it with 1/2 rounds to nearest.
    At a = 1 it is k = K and f = 0.
    """
    top = format.top_code // 2
    scale = block_scale(x, 16)
    inverse = reciprocal(float_from_bits(scale << 16))
    a = torch.fmin(x.abs() * inverse, torch.tensor(1.0))
    w = 1.0 + a
    t = (a * (2.0 * top)) / w
    k = torch.floor(t)
    p = (t - k) * ((2.0 * top - 1.0) - k) * (w * (1.0 / (2.0 * top)))
    level = torch.where(uniform < p, k + 1.0, k)
    code = top + torch.copysign(level, x)
    return torch.nan_to_num(code, nan=0.0).to(torch.int32), scale.view(-1)


def _decode_softsign(code: Tensor, word: Tensor, format: Format) -> Tensor:
    top = format.top_code // 2
    signed = (code - top).float()
    level = signed / (2.0 * top - signed.abs())
    return level * float_from_bits(word << 16)


# adaptive_log -------------------------------------------------------------------------------


def _encode_adaptive_log(
    x: Tensor, valid: Tensor, format: Format, noise: Tensor | float, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Distances are from the scale that the block had, if that is known: mean and deviation then
    need not wait for the new one, and are moved when it is there."""
    levels = float(format.top_code)
    top = block_scale(x, 20)
    bits, scale_bits = magnitude_bits(x), top << 20
    origin = scale_bits if before is None else scale_pattern(scale_words(before), format)[:, None]
    distance, moved = (bits - origin).float(), (origin - scale_bits).float()
    step = adaptive_range(distance, valid, format.width, moved)
    spacing = (step + 1.0) * float(format.spacing)
    number = (scale_bits > 0) & (scale_bits < INFINITY_BITS)
    spacing = torch.where(number, spacing, math.inf)  # else every position is the top
    per_bit = torch.ones_like(spacing) / spacing
    leaning = isinstance(noise, Tensor) and format.width <= PULLED
    pull = torch.clamp_max(spacing * OCTAVE, 1.0) * (MEAN_PULL if leaning else 0.0)
    quarter = 0.25 * pull
    highest = levels + 0.5 - quarter
    offset = moved * per_bit
    highest = fma(offset.abs(), torch.tensor(-ORIGIN_SLACK), highest + offset)
    t = torch.maximum(fma(distance, per_bit, highest), 0.5 - quarter)
    code = _code(t, noise, format, pull)
    word = (top << 5) | step.to(torch.int32)
    word = torch.where(top == 0, 0, word)
    return code, word.view(-1)


def _code(t: Tensor, noise: Tensor | float, format: Format, pull: Tensor | None = None) -> Tensor:
    """The whole part of a position plus 1/2, after the noise; 0 of what is no number.

    With ``pull`` the noise is ``n (1 + pull n)`` for what is ``n`` without.
    """
    if isinstance(noise, Tensor):
        scale = torch.tensor(format.noise_scale)
        if pull is not None:
            scale = fma(noise, pull * format.noise_scale**2, scale)
        t = fma(noise, scale, t)
    return torch.nan_to_num(torch.floor(t), nan=0.0).to(torch.int32)


def adaptive_range(
    distance: Tensor, valid: Tensor, width: int, moved: Tensor | float = 0.0
) -> Tensor:
    """The range of each block at a width in steps - 1, ``[blocks, 1]``.

    ``distance`` is how far the elements' bit patterns lie from a scale's, of which `LOWEST_BITS`
    count at most: mean and deviation need no exact logarithm, and this one is off by 0.09 octaves
    at most. ``moved`` is how far that scale's pattern lies from the one of the block's own scale:
    where it lies so far above that most elements may not count, the range is the widest.
    """
    counted = torch.where(valid, distance.float().clamp_min(LOWEST_BITS), 0.0)
    share = reciprocal(valid.sum(1, keepdim=True).float())
    mean = block_sum(counted) * share
    variance = torch.clamp_min(block_squares(counted) * share - mean * mean, 0.0)
    spread = fma(root(variance), torch.tensor(TAIL_DEVIATIONS[width]), -(mean + moved))
    step = torch.ceil(spread * (OCTAVE / RANGE_STEP)) - 1.0
    return torch.where(torch.as_tensor(moved) > FAR_FALL, 31.0, step.clamp(0.0, 31.0))


def _decode_adaptive_log(code: Tensor, word: Tensor, format: Format) -> Tensor:
    """Where the scale is zero or no number, so is every element."""
    scale = scale_pattern(word, format)
    number = (scale > 0) & (scale < INFINITY_BITS)
    spacing = torch.where(number, ((word & 31) + 1) * format.spacing, 0)
    return float_from_bits(lowest_level(scale, spacing, format) + code * spacing)


def lowest_level(scale_bits: Tensor, spacing: Tensor, format: Format) -> Tensor:
    """The bit pattern that the code 0 of ``adaptive_log`` stands for."""
    return scale_bits - format.top_code * spacing


# midrise ------------------------------------------------------------------------------------


def midrise_unit(normalizer: Tensor, format: Format) -> Tensor:
    """What the values of a normalized format are in units of."""
    if not format.power_unit:
        return torch.fmin(root(normalizer), torch.tensor(MIDRISE_LARGEST_UNIT))
    return float_from_bits(_half_exponent(normalizer) + ROOT_BITS)


def _inverse_unit(normalizer: Tensor, format: Format) -> Tensor:
    """1 / `midrise_unit`; of a root of zero, that of the largest unit."""
    if not format.power_unit:
        inverse = reciprocal(root(normalizer))
        return torch.fmax(inverse, torch.tensor(1.0 / MIDRISE_LARGEST_UNIT))
    return float_from_bits(INVERSE_ROOT_BITS - _half_exponent(normalizer))


def _half_exponent(x: Tensor) -> Tensor:
    """The exponent of ``x >= 0``, halved and rounded down, where a float has its exponent."""
    return (x.contiguous().view(torch.int32) >> 1) & HALF_EXPONENT


def _encode_midrise(
    x: Tensor, normalizer: Tensor, valid: Tensor, format: Format, noise: Tensor | float
) -> tuple[Tensor, Tensor]:
    half = format.top_code / 2
    u = x * _inverse_unit(normalizer, format)
    if format.width in MIDRISE_CLIP:
        share = reciprocal(valid.sum(1, keepdim=True).float())
        reach = root(block_squares(u) * share) * (MIDRISE_CLIP[format.width] / half)
    else:
        reach = float_from_bits(magnitude_bits(u).amax(1, keepdim=True)) * (MIDRISE_SLACK / half)
    step = _scale_up(magnitude_bits(reach), 16)
    inverse = reciprocal(float_from_bits(step << 16))
    if format.width not in MIDRISE_CLIP:
        inverse = inverse * MIDRISE_SHRINK
    t = torch.clamp(fma(u, inverse, half + 0.5), 0.5, format.top_code + 0.5)
    return _code(t, noise, format), step.view(-1)


def _decode_midrise(code: Tensor, word: Tensor, format: Format) -> Tensor:
    half = format.top_code / 2
    return (code.float() - half) * float_from_bits(word << 16)


# bfloat16 -----------------------------------------------------------------------------------


def _bfloat16_bits(x: Tensor, noise: Noise, first_block: int) -> Tensor:
    """Upper half of the pattern after adding random low bits (or rounding half to even)."""
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    if noise.key is None:
        return x.to(torch.bfloat16).view(torch.int16)
    blocks = block_count(x.numel())
    low = (random_bits(noise.key, first_block, blocks, x.device) >> 16).view(-1)[: x.numel()]
    finite = (bits & 0x7FFFFFFF) < INFINITY_BITS
    quiet = torch.where((bits & 0x7FFFFFFF) > INFINITY_BITS, bits | 0x400000, bits)
    return (torch.where(finite, bits + low, quiet) >> 16).to(torch.int16)

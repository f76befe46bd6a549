"""Decoding and encoding of every format as kernel instructions.

The arithmetic is that of `stq_compile.reference`, operation by operation and in the same order, so
that a kernel's codes equal the reference's bit for bit where its inputs do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stq_compile.codegen.halves import at_random
from stq_compile.codegen.ir import Builder, OperandKind, Value
from stq_compile.formats import (
    BEND_COEFFICIENTS,
    EXP2_COEFFICIENTS,
    MEAN_PULL,
    MIDRISE_CLIP,
    MIDRISE_LARGEST_UNIT,
    MIDRISE_SHRINK,
    MIDRISE_SLACK,
    OCTAVE,
    RANGE_STEP,
    TAIL_DEVIATIONS,
    ULP_STEP,
    Format,
)
from stq_compile.reference import INFINITY_BITS, LOWEST_BITS, ONE_BITS


def code_kind(format: Format) -> OperandKind:
    """How a kernel reaches the codes of a format."""
    unblocked = {"bfloat16": OperandKind.HALVES, "ulp": OperandKind.BYTES}
    return unblocked.get(format.kind, OperandKind.CODES)


CODE_STORES = {
    OperandKind.HALVES: "store_half",
    OperandKind.BYTES: "store_byte",
    OperandKind.CODES: "pack",
}


@dataclass(frozen=True)
class Stored:
    """A packed state inside a kernel: the operands' stem and its format."""

    codes: str
    scales: str
    key: str | None
    format: Format


def decode(b: Builder, state: Stored, normalizer: Value | None) -> Value:
    """Read a state from memory."""
    if state.format.kind == "bfloat16":
        return b.op("from_bits", b.op("shift_left", b.read("load_half", state.codes), 16))
    if state.format.kind == "ulp":
        return b.op("mul", b.op("to_float", b.read("load_byte", state.codes)), ULP_STEP)
    code = b.read("unpack", state.codes, width=state.format.width, name="code")
    word = b.read("load_word", state.scales, name="word")
    return decode_block(b, code, word, state.format, normalizer)


def decode_block(
    b: Builder, code: Value, word: Value, format: Format, normalizer: Value | None
) -> Value:
    """The value of a code under a scale word."""
    if format.kind == "softsign":
        top = format.top_code // 2
        signed = b.op("to_float", b.op("int_sub", code, top))
        level = b.op("quotient", signed, b.op("sub", 2.0 * top, b.op("abs", signed)), name="div")
        return b.op("mul", level, b.op("from_bits", b.op("shift_left", word, 16)))
    if format.kind == "adaptive_log":
        if format.width > 4:
            return _square(b, code, word, format)
        octave_range = octave_range_of(b, b.op("to_float", b.op("int_and", word, 31)))
        ratio = b.op("mul", octave_range, 1.0 / format.top_code)
        scale = b.op("from_bits", b.op("shift_left", b.op("shift_right", word, 5), 20))
        below = b.op("to_float", b.op("int_sub", code, format.top_code))
        return b.op("mul", scale, exp2(b, b.op("mul", below, ratio)))
    assert normalizer is not None
    step = b.op("from_bits", b.op("shift_left", word, 16))
    level = b.op("mul", b.op("sub", b.op("to_float", code), format.top_code / 2), step)
    return b.op("mul", level, unit(b, normalizer))


def _square(b: Builder, code: Value, word: Value, format: Format) -> Value:
    """``adaptive_log`` of more than 4 bits: the square of its root, which is a product of two
    tables.

    Where the scale is no number the root is what `unit` says of infinity, in every element, and the
    scale is added to its square: so no element has to be bounded by itself.
    """
    top, step = b.words.get(id(word)) or (b.op("shift_right", word, 5), word)
    octave_range = octave_range_of(b, b.op("to_float", b.op("int_and", step, 31)))
    ratio = b.op("mul", octave_range, 0.5 / format.top_code)
    high = b.op("int_sub", b.op("shift_right", code, 4), format.top_code >> 4)
    high = b.op("to_float", b.op("shift_left", high, 4))
    low = b.op("to_float", b.op("int_sub", b.op("int_and", code, 15), 15))
    coarse, fine = exp2(b, b.op("mul", high, ratio)), exp2(b, b.op("mul", low, ratio))
    scale = b.op("from_bits", b.op("shift_left", top, 20))
    below = root_below(b, scale)
    finite = b.op("int_lt", top, INFINITY_BITS >> 20)
    root = _product(b, finite, below, coarse, fine, MIDRISE_LARGEST_UNIT)
    square = b.op("fma", root, root, b.op("select", finite, 0.0, scale))
    number = b.op("and", finite, b.op("int_lt", 0, top))
    below, coarse, fine = (b.op("div", 1.0, x) for x in (below, coarse, fine))
    inverse = _product(b, number, below, coarse, fine, 1.0 / MIDRISE_LARGEST_UNIT)
    b.units[id(square)] = (root, inverse)
    return square


def _product(
    b: Builder, usual: Value, scale: Value, coarse: Value, fine: Value, otherwise: float
) -> Value:
    """``scale * coarse * fine``, or ``otherwise`` in a whole block, with no choice per element."""
    first = b.op(
        "fma", b.op("select", usual, scale, 0.0), coarse, b.op("select", usual, 0.0, otherwise)
    )
    one = b.op("select", usual, 1.0, 0.0)
    return b.op("mul", first, b.op("fma", one, fine, b.op("sub", 1.0, one)))


def root_below(b: Builder, scale: Value) -> Value:
    """`reference.root_below`."""
    root = b.op("sqrt", scale)
    above = b.op("gt", b.op("mul", root, root), scale)
    bits = b.op("bits_of", root)
    return b.op("from_bits", b.op("int_select", above, b.op("int_sub", bits, 1), bits))


def unit(b: Builder, normalizer: Value) -> Value:
    """What a normalized format counts in: the root of the normalizer, bounded."""
    if id(normalizer) in b.units:
        return b.units[id(normalizer)][0]
    return b.op("min", b.op("sqrt", normalizer), MIDRISE_LARGEST_UNIT)


def inverse_unit(b: Builder, normalizer: Value) -> Value:
    """1 / `unit`; of zero, that of the largest unit."""
    if id(normalizer) in b.units:
        return b.units[id(normalizer)][1]
    return b.op("max", reciprocal(b, b.op("sqrt", normalizer)), 1.0 / MIDRISE_LARGEST_UNIT)


def encode(
    b: Builder, x: Value, state: Stored, normalizer: Value | None
) -> tuple[Value, Value | None]:
    """Encode elements; returns the code and the scale word, not yet stored.

    ``noise`` is uniform in [0, 2^24), or half of that to round to nearest. Codes come as floats
    and are cut off towards zero at the end, which is the floor of what is not negative.
    """
    format = state.format
    if format.kind == "bfloat16":
        return _encode_bfloat16(b, x, state), None
    if format.kind == "ulp":
        return _encode_ulp(b, x, state), None
    noise = 0.5 * 2**24 if state.key is None else b.read("random24", state.key)
    if format.kind == "softsign":
        code, word = _encode_softsign(b, x, format, noise)
    elif format.kind == "adaptive_log":
        code, word = _encode_adaptive_log(b, x, format, noise)
    else:
        assert normalizer is not None
        code, word = _encode_midrise(b, x, normalizer, format, noise)
    return b.op("int_select", b.read("valid"), b.op("to_int", code), 0), word


def octave_range_of(b: Builder, step: Value) -> Value:
    return b.op("mul", b.op("add", step, 1.0), RANGE_STEP)


def log2(b: Builder, x: Value) -> Value:
    bits = b.op("bits_of", x)
    return octaves(b, bits, b.op("int_sub", bits, ONE_BITS), None)


def octaves(b: Builder, bits: Value, distance: Value, unit_bits: Value | None) -> Value:
    """`reference.octaves`; without ``unit_bits`` the unit is 1, which has no bend."""
    line = b.op("to_float", distance)
    if unit_bits is None:
        line = b.op("mul", line, OCTAVE)
    else:
        line = b.op("fma", line, OCTAVE, b.op("neg", b.op("mul", *_bend(b, unit_bits))))
    return b.op("fma", *_bend(b, bits), line)


def _bend(b: Builder, bits: Value) -> tuple[Value, Value]:
    mantissa = b.op("from_bits", b.op("int_or", b.op("int_and", bits, 0x7FFFFF), ONE_BITS))
    x = b.op("sub", mantissa, 1.5)
    return _polynomial(b, x, BEND_COEFFICIENTS), b.op("fma", x, x, -0.25)


def exp2(b: Builder, x: Value) -> Value:
    whole = b.op("floor", b.op("add", x, 0.5))
    f = b.op("sub", x, whole)
    p = _polynomial(b, f, EXP2_COEFFICIENTS)
    power = b.op("shift_left", b.op("int_add", b.op("to_int", whole), 127), 23)
    return b.op("mul", p, b.op("from_bits", power))


def _polynomial(b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    p = b.op("fma", x, coefficients[-1], coefficients[-2])
    for c in reversed(coefficients[:-2]):
        p = b.op("fma", p, x, c)
    return p


def magnitude_bits(b: Builder, x: Value) -> Value:
    return b.op("int_and", b.op("bits_of", x), 0x7FFFFFFF)


def absmax(b: Builder, x: Value) -> Value:
    magnitude = b.op("int_select", b.read("valid"), magnitude_bits(b, x), 0)
    return b.reduce("block_max", magnitude, name="absmax")


def scale_up(b: Builder, absmax: Value, drop: int) -> Value:
    """`reference.scale_up`: the upper bits, rounded up, kept finite and normal."""
    rounded = b.op("shift_right", b.op("int_add", absmax, (1 << drop) - 1), drop)
    low, high = 0x00800000 >> drop, (INFINITY_BITS >> drop) - 1
    bounded = b.op("int_min", b.op("int_max", rounded, low), high)
    bounded = b.op("int_select", b.op("int_eq", absmax, 0), 0, bounded)
    nan = b.op("int_lt", INFINITY_BITS, absmax)
    kept = b.op("int_select", nan, 0x7FC00000 >> drop, INFINITY_BITS >> drop)
    finite = b.op("int_lt", absmax, INFINITY_BITS)
    return b.op("int_select", finite, bounded, kept)


def reciprocal(b: Builder, scale: Value) -> Value:
    """1 / scale, or 0."""
    return b.op("select", b.op("gt", scale, 0.0), b.op("div", 1.0, scale), 0.0)


def _encode_softsign(
    b: Builder, x: Value, format: Format, noise: Value | float
) -> tuple[Value, Value]:
    top = float(format.top_code // 2)
    word = scale_up(b, absmax(b, x), 16)
    inverse = reciprocal(b, b.op("from_bits", b.op("shift_left", word, 16)))
    a = b.op("min", b.op("mul", b.op("abs", x), inverse), 1.0)
    w = b.op("add", a, 1.0)
    t = b.op("quotient", b.op("mul", a, 2.0 * top), w, name="div")
    k = b.op("floor", t)
    p = b.op("mul", b.op("sub", t, k), b.op("sub", 2.0 * top - 1.0, k))
    # The probability in units of the noise: a power of two more in the constant, nothing else.
    p = b.op("mul", p, b.op("mul", w, float(np.float32(1.0 / (2.0 * top))) * 2.0**24))
    level = b.op("select", b.op("lt", noise, p), b.op("add", k, 1.0), k)
    return b.op("add", b.op("copysign", level, x), top), word


def _encode_adaptive_log(
    b: Builder, x: Value, format: Format, noise: Value | float
) -> tuple[Value, Value]:
    levels = float(format.top_code)
    magnitude = magnitude_bits(b, x)
    top = scale_up(b, absmax(b, x), 20)
    scale_bits = b.op("shift_left", top, 20)
    distance = b.op("int_max", b.op("int_sub", magnitude, scale_bits), LOWEST_BITS)
    step = adaptive_range(b, distance, format.width)
    octave_range = octave_range_of(b, step)
    ratio = b.op("div", levels, octave_range)
    below = octaves(b, magnitude, distance, scale_bits)
    bounded = b.op("max", below, b.op("neg", octave_range))
    t = b.op("fma", bounded, ratio, levels)
    if isinstance(noise, Value):
        f = b.op("fraction", t)
        spacing = b.op("min", b.op("mul", octave_range, 1.0 / levels), 1.0)
        pull = b.op("neg", b.op("mul", spacing, MEAN_PULL))
        t = b.op("fma", b.op("fma", f, b.op("neg", f), f), pull, t)
    code = b.op("min", b.op("fma", noise, 2.0**-24, t), levels)
    upper, whole_step = b.op("shift_left", top, 5), b.op("to_int", step)
    word = b.op("int_or", upper, whole_step)
    word = b.op("int_select", b.op("int_eq", top, 0), 0, word)
    b.words[id(word)] = (top, whole_step)
    return code, word


def adaptive_range(b: Builder, distance: Value, width: int) -> Value:
    """`reference.adaptive_range`."""
    counted = b.op("to_float", b.op("int_select", b.read("valid"), distance, 0))
    share = b.op("div", 1.0, b.read("valid_count"))
    mean = b.op("mul", b.reduce("block_sum", counted), share)
    square = b.op("mul", b.reduce("block_sum", b.op("mul", counted, counted)), share)
    variance = b.op("max", b.op("sub", square, b.op("mul", mean, mean)), 0.0)
    spread = b.op("fma", b.op("sqrt", variance), TAIL_DEVIATIONS[width], b.op("neg", mean))
    step = b.op("sub", b.op("ceil", b.op("mul", spread, OCTAVE / RANGE_STEP)), 1.0)
    return b.op("min", b.op("max", step, 0.0), 31.0)


def _encode_midrise(
    b: Builder, x: Value, normalizer: Value, format: Format, noise: Value | float
) -> tuple[Value, Value]:
    half = format.top_code / 2
    u = b.op("mul", x, inverse_unit(b, normalizer))
    if format.width in MIDRISE_CLIP:
        counted = b.op("select", b.read("valid"), u, 0.0)
        share = b.op("div", 1.0, b.read("valid_count"))
        mean = b.op("mul", b.reduce("block_sum", b.op("mul", counted, counted)), share)
        reach = b.op("mul", b.op("sqrt", mean), MIDRISE_CLIP[format.width] / half)
    else:
        reach = b.op("mul", b.op("from_bits", absmax(b, u)), MIDRISE_SLACK / half)
    word = scale_up(b, magnitude_bits(b, reach), 16)
    inverse = reciprocal(b, b.op("from_bits", b.op("shift_left", word, 16)))
    if format.width not in MIDRISE_CLIP:
        inverse = b.op("mul", inverse, MIDRISE_SHRINK)
    code = b.op("fma", noise, 2.0**-24, b.op("fma", u, inverse, half))
    if format.width in MIDRISE_CLIP:
        code = b.op("min", b.op("max", code, 0.0), float(format.top_code))
    return code, word


def _encode_bfloat16(b: Builder, x: Value, state: Stored) -> Value:
    bits = b.op("bits_of", x)
    magnitude = b.op("int_and", bits, 0x7FFFFFFF)
    finite = b.op("int_lt", magnitude, INFINITY_BITS)
    nan = b.op("int_lt", INFINITY_BITS, magnitude)
    quiet = b.op("int_select", nan, b.op("int_or", bits, 0x400000), bits)
    if state.key is None:
        odd = b.op("int_and", b.op("shift_right", bits, 16), 1)
        low = b.op("int_add", odd, 0x7FFF)
    else:
        low = b.op(
            "int_and", b.op("shift_right", b.read("random", state.key, name="random"), 16), 0xFFFF
        )
    rounded = b.op("int_select", finite, b.op("int_add", bits, low), quiet)
    return b.op("int_and", b.op("shift_right", rounded, 16), 0xFFFF)


def _encode_ulp(b: Builder, x: Value, state: Stored) -> Value:
    """`reference._ulp_codes`; of what is not a number, the integer conversion makes 0."""
    t = b.op("min", b.op("max", b.op("mul", x, 1.0 / ULP_STEP), -128.0), 127.0)
    return b.op("to_int", at_random(b, t, state.key))

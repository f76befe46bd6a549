"""Decoding and encoding of every format as kernel instructions.

The arithmetic is that of `stq_compile.reference`, operation by operation and in the same order, so
that a kernel's codes equal the reference's bit for bit where its inputs do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stq_compile.codegen.halves import at_random
from stq_compile.codegen.ir import Argument, Builder, OperandKind, Value
from stq_compile.formats import (
    BEND_COEFFICIENTS,
    MEAN_PULL,
    MIDRISE_CLIP,
    MIDRISE_LARGEST_UNIT,
    MIDRISE_SHRINK,
    MIDRISE_SLACK,
    OCTAVE,
    PULLED,
    RANGE_STEP,
    TAIL_DEVIATIONS,
    ULP_STEP,
    Format,
)
from stq_compile.reference import (
    FAR_FALL,
    HALF_EXPONENT,
    INFINITY_BITS,
    INVERSE_ROOT_BITS,
    LEAST_SCALE_BITS,
    LOWEST_BITS,
    ONE_BITS,
    ORIGIN_SLACK,
    ROOT_BITS,
)


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
        return _decode_adaptive_log(b, code, word, format)
    assert normalizer is not None
    step = b.op("from_bits", b.op("shift_left", word, 16))
    level = b.op("mul", b.op("sub", b.op("to_float", code), format.top_code / 2), step)
    return b.op("mul", level, unit(b, normalizer, format))


def _decode_adaptive_log(b: Builder, code: Value, word: Value, format: Format) -> Value:
    if id(word) in b.words:
        scale_bits, spacing = b.words[id(word)]
    else:
        scale_bits = _scale_pattern(b, word)
        number = _is_number(b, scale_bits)
        spacing = whole_spacing(b, b.op("int_and", word, 31), format)
        spacing = b.op("int_select", number, spacing, 0)
    lowest = lowest_level(b, scale_bits, spacing, format)
    return b.op("from_bits", b.op("int_add", b.op("int_mul", code, spacing), lowest))


def _scale_pattern(b: Builder, word: Value) -> Value:
    """`reference.scale_pattern` of ``adaptive_log``."""
    return b.op("shift_left", b.op("shift_right", word, 5), 20)


def _is_number(b: Builder, scale_bits: Value) -> Value:
    """Whether a scale is neither zero nor infinite nor NaN."""
    return b.op("and", b.op("int_lt", 0, scale_bits), b.op("int_lt", scale_bits, INFINITY_BITS))


def whole_spacing(b: Builder, step: Value, format: Format) -> Value:
    """How far apart the bit patterns of levels are, at a range of so many steps - 1."""
    return b.op("int_mul", b.op("int_add", step, 1), format.spacing)


def lowest_level(b: Builder, scale_bits: Value, spacing: Value, format: Format) -> Value:
    """The bit pattern that the code 0 stands for."""
    return b.op("int_sub", scale_bits, b.op("int_mul", spacing, format.top_code))


def unit(b: Builder, normalizer: Value, format: Format) -> Value:
    """`reference.midrise_unit`."""
    if format.power_unit:
        return b.op("from_bits", b.op("int_add", _half_exponent(b, normalizer), ROOT_BITS))
    return b.op("min", b.op("sqrt", normalizer), MIDRISE_LARGEST_UNIT)


def inverse_unit(b: Builder, normalizer: Value, format: Format) -> Value:
    """1 / `unit`; of a root of zero, that of the largest unit."""
    if format.power_unit:
        return b.op("from_bits", b.op("int_sub", INVERSE_ROOT_BITS, _half_exponent(b, normalizer)))
    return b.op("max", reciprocal(b, b.op("sqrt", normalizer)), 1.0 / MIDRISE_LARGEST_UNIT)


def _half_exponent(b: Builder, x: Value) -> Value:
    """`reference._half_exponent`."""
    return b.op("int_and", b.op("shift_right", b.op("bits_of", x), 1), HALF_EXPONENT)


def encode(
    b: Builder, x: Value, state: Stored, normalizer: Value | None, before: Value | None = None
) -> tuple[Value, Value | None]:
    """Encode elements; returns the code and the scale word, not yet stored.

    Without a key it rounds to nearest. ``before`` is the scale word that the block had, if known.
    """
    format = state.format
    if format.kind == "bfloat16":
        return _encode_bfloat16(b, x, state), None
    if format.kind == "ulp":
        return _encode_ulp(b, x, state), None
    if format.kind == "softsign":
        code, word = _encode_softsign(b, x, state)
    elif format.kind == "adaptive_log":
        code, word = _encode_adaptive_log(b, x, state, before)
    else:
        assert normalizer is not None
        code, word = _encode_midrise(b, x, normalizer, state)
    return b.op("int_select", b.read("valid"), code, 0), word


def _code(b: Builder, t: Value, state: Stored, pull: Value | None = None) -> Value:
    """`reference._code`."""
    scale: Argument = state.format.noise_scale
    if state.key is not None:
        noise = b.op("to_float", b.read("random", state.key))
        if pull is not None:
            scale = b.op("fma", noise, b.op("mul", pull, state.format.noise_scale**2), scale)
        t = b.op("fma", noise, scale, t)
    return b.op("to_int", t)


def log2(b: Builder, x: Value) -> Value:
    """`reference.log2`."""
    bits = b.op("bits_of", x)
    line = b.op("mul", b.op("to_float", b.op("int_sub", bits, ONE_BITS)), OCTAVE)
    mantissa = b.op("from_bits", b.op("int_or", b.op("int_and", bits, 0x7FFFFF), ONE_BITS))
    m = b.op("sub", mantissa, 1.5)
    p = b.op("fma", m, BEND_COEFFICIENTS[-1], BEND_COEFFICIENTS[-2])
    for c in reversed(BEND_COEFFICIENTS[:-2]):
        p = b.op("fma", p, m, c)
    return b.op("fma", p, b.op("fma", m, m, -0.25), line)


def magnitude_bits(b: Builder, x: Value) -> Value:
    return b.op("int_and", b.op("bits_of", x), 0x7FFFFFFF)


def absmax(b: Builder, x: Value) -> Value:
    magnitude = b.op("int_select", b.read("valid"), magnitude_bits(b, x), 0)
    return b.reduce("block_max", magnitude, name="absmax")


def scale_up(b: Builder, absmax: Value, drop: int) -> Value:
    """`reference.scale_up`: the upper bits, rounded up, kept finite and normal."""
    rounded = b.op("shift_right", b.op("int_add", absmax, (1 << drop) - 1), drop)
    low, high = LEAST_SCALE_BITS[drop] >> drop, (INFINITY_BITS >> drop) - 1
    bounded = b.op("int_min", b.op("int_max", rounded, low), high)
    bounded = b.op("int_select", b.op("int_eq", absmax, 0), 0, bounded)
    nan = b.op("int_lt", INFINITY_BITS, absmax)
    kept = b.op("int_select", nan, 0x7FC00000 >> drop, INFINITY_BITS >> drop)
    finite = b.op("int_lt", absmax, INFINITY_BITS)
    return b.op("int_select", finite, bounded, kept)


def reciprocal(b: Builder, scale: Value) -> Value:
    """1 / scale, or 0."""
    return b.op("select", b.op("gt", scale, 0.0), b.op("div", 1.0, scale), 0.0)


def _encode_softsign(b: Builder, x: Value, state: Stored) -> tuple[Value, Value]:
    top = float(state.format.top_code // 2)
    word = scale_up(b, absmax(b, x), 16)
    inverse = reciprocal(b, b.op("from_bits", b.op("shift_left", word, 16)))
    a = b.op("min", b.op("mul", b.op("abs", x), inverse), 1.0)
    w = b.op("add", a, 1.0)
    t = b.op("quotient", b.op("mul", a, 2.0 * top), w, name="div")
    k = b.op("floor", t)
    p = b.op("mul", b.op("sub", t, k), b.op("sub", 2.0 * top - 1.0, k))
    # The probability in units of the noise: a power of two more in the constant, nothing else.
    p = b.op("mul", p, b.op("mul", w, float(np.float32(1.0 / (2.0 * top))) * 2.0**24))
    noise = 0.5 * 2**24 if state.key is None else b.read("random24", state.key)
    level = b.op("select", b.op("lt", noise, p), b.op("add", k, 1.0), k)
    return b.op("to_int", b.op("add", b.op("copysign", level, x), top)), word


def _encode_adaptive_log(
    b: Builder, x: Value, state: Stored, before: Value | None
) -> tuple[Value, Value]:
    format = state.format
    levels = float(format.top_code)
    scale_bits = b.op("shift_left", scale_up(b, absmax(b, x), 20), 20)
    number = _is_number(b, scale_bits)
    origin = scale_bits if before is None else _scale_pattern(b, before)
    moved = None if before is None else b.op("to_float", b.op("int_sub", origin, scale_bits))
    distance = distance_to(b, x, origin)
    step = adaptive_range(b, distance, format.width, moved)
    spacing = b.op("mul", b.op("add", step, 1.0), float(format.spacing))
    spacing = b.op("select", number, spacing, math.inf)  # else every position is the top
    per_bit = b.op("div", 1.0, spacing)
    pull: Value | None = None
    lowest: Argument = 0.5
    highest: Argument = levels + 0.5
    if state.key is not None and format.width <= PULLED:
        pull = b.op("mul", b.op("min", b.op("mul", spacing, OCTAVE), 1.0), MEAN_PULL)
        quarter = b.op("mul", pull, 0.25)
        lowest, highest = b.op("sub", lowest, quarter), b.op("sub", highest, quarter)
    if moved is not None:
        offset = b.op("mul", moved, per_bit)
        highest = b.op("fma", b.op("abs", offset), -ORIGIN_SLACK, b.op("add", highest, offset))
    t = b.op("max", b.op("fma", distance, per_bit, highest), lowest)
    whole_step = b.op("to_int", step)
    word = b.op("int_or", b.op("shift_right", scale_bits, 15), whole_step)
    word = b.op("int_select", b.op("int_eq", scale_bits, 0), 0, word)
    whole = b.op("int_select", number, whole_spacing(b, whole_step, format), 0)
    b.words[id(word)] = (scale_bits, whole)
    return _code(b, t, state, pull), word


def distance_to(b: Builder, x: Value, scale_bits: Value) -> Value:
    """From a scale's bit pattern to an element's; of padding 0."""
    distance = b.op("int_sub", magnitude_bits(b, x), scale_bits)
    return b.op("to_float", b.op("int_select", b.read("valid"), distance, 0))


def adaptive_range(b: Builder, distance: Value, width: int, moved: Value | None = None) -> Value:
    """`reference.adaptive_range`."""
    counted = b.op("max", distance, LOWEST_BITS)
    share = b.op("div", 1.0, b.read("valid_count"))
    mean = b.op("mul", b.reduce("block_sum", counted), share)
    square = b.op("mul", b.reduce("block_squares", counted), share)
    variance = b.op("max", b.op("sub", square, b.op("mul", mean, mean)), 0.0)
    middle = mean if moved is None else b.op("add", mean, moved)
    spread = b.op("fma", b.op("sqrt", variance), TAIL_DEVIATIONS[width], b.op("neg", middle))
    step = b.op("sub", b.op("ceil", b.op("mul", spread, OCTAVE / RANGE_STEP)), 1.0)
    step = b.op("min", b.op("max", step, 0.0), 31.0)
    return step if moved is None else b.op("select", b.op("gt", moved, FAR_FALL), 31.0, step)


def _encode_midrise(b: Builder, x: Value, normalizer: Value, state: Stored) -> tuple[Value, Value]:
    format = state.format
    half = format.top_code / 2
    u = b.op("mul", x, inverse_unit(b, normalizer, format))
    if format.width in MIDRISE_CLIP:
        counted = b.op("select", b.read("valid"), u, 0.0)
        share = b.op("div", 1.0, b.read("valid_count"))
        mean = b.op("mul", b.reduce("block_squares", counted), share)
        reach = b.op("mul", b.op("sqrt", mean), MIDRISE_CLIP[format.width] / half)
    else:
        reach = b.op("mul", b.op("from_bits", absmax(b, u)), MIDRISE_SLACK / half)
    word = scale_up(b, magnitude_bits(b, reach), 16)
    inverse = reciprocal(b, b.op("from_bits", b.op("shift_left", word, 16)))
    if format.width not in MIDRISE_CLIP:
        inverse = b.op("mul", inverse, MIDRISE_SHRINK)
    t = b.op("fma", u, inverse, half + 0.5)
    if format.width in MIDRISE_CLIP:
        t = b.op("min", b.op("max", t, 0.5), format.top_code + 0.5)
    return _code(b, t, state), word


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

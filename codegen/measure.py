"""`stq_compile.error_law` as kernel instructions.

The meaning is the same, the bits are not asked for: these numbers are summed up and compared with
margins of several percent.
"""

from __future__ import annotations

import math

from stq_compile.codegen.expand import (
    absmax,
    adaptive_range,
    distance_to,
    log2,
    lowest_level,
    reciprocal,
    scale_up,
    unit,
    whole_spacing,
)
from stq_compile.codegen.ir import Argument, Builder, Value
from stq_compile.error_law import (
    BFLOAT16_SPACING,
    BOUNDED,
    FARTHEST,
    LARGEST,
    LARGEST_STEP,
    LOWEST_OCTAVE,
    NEAR_END,
    TINY,
)
from stq_compile.formats import FORMATS, MIDRISE_CLIP, OCTAVE, Format


def settled_error(
    b: Builder,
    old: Value,
    new: Value,
    normalizer: Value | None,
    format: Format,
    persistence: Argument,
    rounding: str,
) -> Value:
    """Root mean square of the settled error of an element."""
    law = _Law(b, persistence, rounding)
    if format.kind == "softsign":
        return _softsign(b, new, old, format, law)
    if format.kind == "adaptive_log":
        return _adaptive_log(b, new, old, format, law)
    if format.kind == "midrise":
        assert normalizer is not None
        return _midrise(b, new, old, normalizer, format, law)
    size = b.op("abs", new)
    moved = b.op("div", b.op("abs", b.op("sub", new, old)), b.op("max", size, TINY))
    variance = law.variance(BFLOAT16_SPACING, b.op("min", moved, FARTHEST), 1.0)
    return b.op("mul", size, b.op("sqrt", variance))


class _Law:
    """`error_law._Law`."""

    def __init__(self, b: Builder, persistence: Argument, rounding: str) -> None:
        self.b = b
        self.persistence = persistence
        self.nearest = rounding == "nearest"

    def variance(self, distance: Argument, increment: Value, magnitude: Argument) -> Value:
        b = self.b
        factor: Argument = self.persistence
        if self.persistence == math.inf:
            several = 2.0 if self.nearest else 4.0
            moved = b.op("max", b.op("mul", increment, several), several * TINY)
            factor = b.op("add", b.op("div", magnitude, moved), 1.0)
        square = b.op("mul", distance, distance)
        if self.nearest:
            if self.persistence == math.inf:
                factor = b.op("mul", factor, factor)
            return b.op("mul", b.op("mul", square, factor), 1 / 12)
        ratio = b.op("div", increment, distance)
        position = b.op("fraction", ratio)
        spread = b.op("mul", position, b.op("sub", 1.0, position))
        return b.op("mul", b.op("mul", square, spread), factor)


def _softsign(b: Builder, new: Value, old: Value, format: Format, law: _Law) -> Value:
    scale, magnitude, increment = _relative(b, new, old, 16)
    widened = b.op("add", magnitude, 1.0)
    square = b.op("mul", widened, widened)
    distance = b.op("mul", square, 1 / (2.0 * (format.top_code // 2)))
    return b.op("mul", scale, b.op("sqrt", law.variance(distance, increment, magnitude)))


def _adaptive_log(b: Builder, new: Value, old: Value, format: Format, law: _Law) -> Value:
    scale, magnitude, increment = _relative(b, new, old, 20)
    step, end = _range(b, new, scale, format)
    moved = b.op("div", increment, b.op("max", magnitude, TINY))
    spacing = b.op("mul", b.op("add", step, 1.0), format.spacing * OCTAVE)
    distance = b.op("mul", spacing, math.log(2))
    variance = law.variance(distance, b.op("min", moved, FARTHEST), 1.0)
    square = b.op("mul", magnitude, magnitude)
    lifted = b.op("sub", b.op("mul", end, reciprocal(b, scale)), magnitude)
    lifted = b.op("max", lifted, 0.0)
    total = b.op("fma", variance, square, b.op("mul", lifted, lifted))
    bounded = b.op("min", total, b.op("mul", square, 4.0))
    return b.op("mul", scale, b.op("sqrt", bounded))


def _midrise(
    b: Builder, new: Value, old: Value, normalizer: Value, format: Format, law: _Law
) -> Value:
    of = unit(b, normalizer, format)
    inverse = reciprocal(b, of)
    value = b.op("select", b.read("valid"), b.op("mul", new, inverse), 0.0)
    half = format.top_code / 2
    if format.width in MIDRISE_CLIP:
        share = b.op("div", 1.0, b.read("valid_count"))
        square = b.reduce("block_sum", b.op("mul", value, value))
        rms = b.op("sqrt", b.op("mul", square, share))
        reach = b.op("mul", rms, MIDRISE_CLIP[format.width])
    else:
        reach = b.op("from_bits", absmax(b, value))
    step = b.op("max", b.op("mul", reach, 1.0 / half), TINY)
    moved = b.op("abs", b.op("mul", b.op("sub", new, old), inverse))
    size = b.op("abs", value)
    clipped = b.op("max", b.op("sub", size, b.op("mul", step, half)), 0.0)
    variance = b.op("fma", clipped, clipped, law.variance(step, moved, size))
    return b.op("mul", of, b.op("sqrt", variance))


def range_end(b: Builder, old: Value) -> Value:
    """`error_law.range_end`."""
    word = scale_up(b, absmax(b, old), 20)
    scale = b.op("from_bits", b.op("shift_left", word, 20))
    step, end = _range(b, old, scale, FORMATS[f"adaptive_log{BOUNDED}"])
    near = b.op("le", old, b.op("mul", end, NEAR_END))
    there = b.op("and", near, b.op("ge", step, LARGEST_STEP))
    return b.op("select", there, end, 0.0)


def _range(b: Builder, x: Value, scale: Value, format: Format) -> tuple[Value, Value]:
    """The steps of the range less one, and the lowest level."""
    scale_bits = b.op("bits_of", scale)
    step = adaptive_range(b, distance_to(b, x, scale_bits), format.width)
    spacing = whole_spacing(b, b.op("to_int", step), format)
    end = b.op("from_bits", lowest_level(b, scale_bits, spacing, format))
    return step, b.op("select", b.op("gt", scale, 0.0), end, 0.0)


def factors(b: Builder, old: Value, new: Value, grad: Value) -> list[Value]:
    """`error_law.factors`, in its order."""
    scale, magnitude, increment = _relative(b, new, old, 16)
    square = b.op("mul", magnitude, magnitude)
    octaves = b.op("max", log2(b, magnitude), LOWEST_OCTAVE)
    level = b.op("max", log2(b, scale), -126.0)
    widened = b.op("add", magnitude, 1.0)
    half = b.op("mul", b.op("mul", widened, widened), 0.5 / 14)
    return [
        magnitude,
        square,
        b.op("mul", square, square),
        octaves,
        b.op("mul", octaves, octaves),
        _flag(b, b.op("eq", new, 0.0)),
        increment,
        _flag(b, b.op("lt", increment, half)),
        _flag(b, b.op("gt", b.op("mul", new, grad), 0.0)),
        level,
        b.op("mul", level, level),
    ]


def sums(b: Builder, values: list[Argument]) -> list[Value]:
    """`error_law.sums` over a block; padding counts as zero."""
    totals = []
    for value in values:
        counted = value
        if isinstance(value, Value):
            counted = b.op("select", b.op("lt", b.op("abs", value), LARGEST), value, 0.0)
        counted = b.op("select", b.read("valid"), counted, 0.0)
        totals.append(b.reduce("block_sum", counted))
    return totals


def _relative(b: Builder, new: Value, old: Value, drop: int) -> tuple[Value, Value, Value]:
    """Scale, and magnitude and increment in units of it."""
    word = scale_up(b, absmax(b, new), drop)
    scale = b.op("from_bits", b.op("shift_left", word, drop))
    inverse = reciprocal(b, scale)
    magnitude = b.op("min", b.op("mul", b.op("abs", new), inverse), 1.0)
    moved = b.op("mul", b.op("abs", b.op("sub", new, old)), inverse)
    return scale, magnitude, b.op("min", moved, FARTHEST)


def _flag(b: Builder, mask: Value) -> Value:
    return b.op("select", mask, 1.0, 0.0)

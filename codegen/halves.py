"""Parameters of 16 bits as kernel instructions: `stq_compile.halves`, operation by operation."""

from __future__ import annotations

from stq_compile.codegen.ir import Builder, Value
from stq_compile.halves import EXPONENT, Half

INVERSE = 254
"""Sum of the biased exponents of a power of two and of its inverse."""


def _ulp_bits(b: Builder, x: Value, half: Half) -> Value:
    exponent = b.op("int_and", b.op("bits_of", x), EXPONENT)
    exponent = b.op("int_max", exponent, half.lowest << 23)
    return b.op("int_sub", exponent, half.mantissa << 23)


def _inverse(b: Builder, power_bits: Value) -> Value:
    """One over a power of two: exact, and cheaper than a division."""
    return b.op("from_bits", b.op("int_sub", INVERSE << 23, power_bits))


def rounded(b: Builder, x: Value, half: Half, key: str | None) -> Value:
    """`halves.rounded`; ``key`` names the operand that the random numbers come from."""
    bits = _ulp_bits(b, x, half)
    unit = b.op("from_bits", bits)
    if key is None:
        magic = b.op("mul", unit, 1.5 * 2.0**23)
        on_grid = b.op("sub", b.op("add", x, magic), magic)
    else:
        on_grid = b.op("mul", at_random(b, b.op("mul", x, _inverse(b, bits)), key), unit)
    return b.op("select", b.op("lt", b.op("abs", x), half.limit), on_grid, x)


def at_random(b: Builder, t: Value, key: str | None) -> Value:
    """A whole number beside ``t``, its mean if ``key`` is given; whole numbers stay."""
    noise: Value | float = 0.5 * 2**24 if key is None else b.read("random24", key)
    below = b.op("floor", t)
    # The fraction in units of the noise: a power of two more, nothing else.
    up = b.op("lt", noise, b.op("mul", b.op("sub", t, below), 2.0**24))
    return b.op("select", up, b.op("add", below, 1.0), below)


def error_of(b: Builder, x: Value, p: Value, half: Half) -> Value:
    """`halves.error_of`."""
    left = b.op("mul", b.op("sub", x, p), _inverse(b, _ulp_bits(b, p, half)))
    return b.op("select", b.op("lt", b.op("abs", x), half.limit), left, 0.0)


def with_error(b: Builder, p: Value, error: Value, half: Half) -> Value:
    """`halves.with_error`."""
    return b.op("add", p, b.op("mul", error, b.op("from_bits", _ulp_bits(b, p, half))))

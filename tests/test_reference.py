"""The meaning of the formats, against float64 formulas and a brute-force search over all codes.

Statistical claims. Stochastic rounding is checked by the mean of 1e5 draws a value, which must
lie within 5 standard errors of the value (plus 1e-5 of the gap between the two levels, for
float32 arithmetic). For a right quantizer one such check fails with probability 5.7e-7, and
there are about 120, so a false alarm has a probability below 1e-4; the seeds are fixed.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stq_compile import reference
from stq_compile.errors import FormatMismatchError
from stq_compile.formats import (
    BFLOAT16,
    CONSTANT,
    EXP2_COEFFICIENTS,
    FLOAT32,
    FORMATS,
    LOG2_COEFFICIENTS,
    Format,
)
from stq_compile.layout import pack, unpack
from stq_compile.reference import block_sum, decode, encode, exp2, fma, log2
from stq_compile.rounding import NEAREST, Noise

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

CASES = settings(deadline=None, derandomize=True, database=None, max_examples=60)
BLOCKED = [f for f in FORMATS.values() if f.blocked]
SCALED = [f for f in BLOCKED if not f.normalized]  # the scale is the largest magnitude
DROPPED_BITS = {"softsign": 16, "adaptive_log": 20}
CLIP = {2: 1.6, 3: 2.6}


def by_name(formats: list[Format]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("format", formats, ids=lambda f: f.name)


# The formulas of the documentation, in float64 ----------------------------------------------


def float_of(pattern: Ints) -> Doubles:
    return pattern.astype(np.uint32).view(np.float32).astype(np.float64)


def words_of(scales: Tensor) -> Ints:
    return scales.numpy().astype(np.int64) & 0xFFFF


def all_levels(format: Format, word: Ints) -> Doubles:
    """Values of all codes for each scale word ``[n] -> [n, codes]``, in units of a normalizer."""
    code = np.arange(format.top_code + 1, dtype=np.float64)
    if format.kind == "softsign":
        top = 2 ** (format.width - 1) - 1
        unit_levels = (code - top) / (2 * top - np.abs(code - top))
        return unit_levels * float_of(word << 16)[:, None]
    if format.kind == "midrise":
        return (code - (2**format.width - 1) / 2) * float_of(word << 16)[:, None]
    octaves = ((word & 31) + 1)[:, None] * 14 / 32
    share = code / (2**format.width - 1)
    return float_of((word >> 5) << 20)[:, None] * 2 ** (-octaves * (1 - share))


def measured(format: Format, values: Doubles) -> Doubles:
    """What "nearest" and "unbiased" refer to: the value, or its log2 (zero counts as 2^-300)."""
    if format.kind != "adaptive_log":
        return values
    return np.asarray(np.log2(np.maximum(values, 2.0**-300)))


def sample(format: Format, blocks: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Blocks of many shapes and magnitudes, and a normalizer where the format needs one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((blocks, 128))
    x[0::6] *= 2.0 ** rng.uniform(-20, 0, (len(x[0::6]), 128))  # wide
    x[1::6] *= rng.random((len(x[1::6]), 128)) < 0.3  # mostly zeros
    x[2::6, 5] *= 1e4  # one outlier
    x[3::6] = 1 + 0.1 * x[3::6]  # narrow
    if format.normalized:
        v = 2.0 ** rng.uniform(-60, 60, (blocks, 128))
        v[::7, :9] = 0.0
        x *= 2.0 ** rng.uniform(-30, 30, (blocks, 1))
        unit = torch.from_numpy(v).float().view(-1)
        return (torch.from_numpy(x).float().view(-1) * unit.sqrt()), unit
    x *= 2.0 ** rng.uniform(-140, 105, (blocks, 1))
    values = torch.from_numpy(x).float().view(-1)
    return (values if format.signed else values.abs()), None


# Decode -------------------------------------------------------------------------------------


@by_name(BLOCKED)
def test_every_code_decodes_to_the_documented_level(format: Format) -> None:
    """All codes under 300 scale words over the whole range; float32 rounding allowed, no more."""
    low, high = (0x80, 0x7F7F) if format.kind != "adaptive_log" else (8 << 5, (0x7F7 << 5) + 31)
    word = np.unique(np.linspace(low, high, 300).astype(np.int64))
    codes = torch.arange(256).clamp(max=format.top_code).view(1, 2, 128).int()
    codes = codes.expand(len(word), 2, 128).reshape(-1, 128).contiguous()
    scales = torch.from_numpy(np.repeat(word, 2).astype(np.uint16).view(np.int16))
    v = torch.full((codes.numel(),), 2.0) if format.normalized else None
    got = decode(pack(codes, format.width), scales, format, codes.numel(), v).double().numpy()
    levels = all_levels(format, word) * (math.sqrt(2) if format.normalized else 1)
    expected = np.take_along_axis(np.repeat(levels, 2, axis=0), codes.long().numpy(), 1)
    finite = np.abs(expected) < 3.4e38
    relative = 2e-6 if format.kind == "adaptive_log" else 2e-7
    np.testing.assert_allclose(
        got.reshape(-1, 128)[finite], expected[finite], rtol=relative, atol=2.0**-149
    )


@by_name(SCALED)
def test_the_top_code_decodes_to_the_scale_itself(format: Format) -> None:
    """Or else a block would get the next larger scale each time that it is rewritten."""
    low, high = (0x80, 0x7F7F) if format.kind != "adaptive_log" else (8 << 5, (0x7F7 << 5) + 31)
    word = np.linspace(low, high, 2000).astype(np.int64)
    codes = torch.full((len(word), 128), format.top_code, dtype=torch.int32)
    scales = torch.from_numpy(word.astype(np.uint16).view(np.int16))
    got = decode(pack(codes, format.width), scales, format, codes.numel()).view(-1, 128)
    shift = DROPPED_BITS[format.kind]
    expected = float_of((word >> 5 if shift == 20 else word) << shift)
    assert np.array_equal(got[:, 0].double().numpy(), expected)


@by_name(SCALED)
@pytest.mark.parametrize("noise", [NEAREST, Noise(3)], ids=["nearest", "stochastic"])
def test_rewriting_does_not_inflate_a_block(format: Format, noise: Noise) -> None:
    """What eager operations do to the blocks that they leave as they are."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(1280)).float()
    codes, scales = encode(values if format.signed else values.square(), format, noise)
    top = words_of(scales) >> (5 if format.kind == "adaptive_log" else 0)
    for step in range(20):
        again = noise if noise.key is None else Noise(noise.key + step + 1)
        codes, scales = encode(decode(codes, scales, format, 1280), format, again)
        now = words_of(scales) >> (5 if format.kind == "adaptive_log" else 0)
        assert (now <= top).all(), f"scales grew in rewrite {step + 1}"
        top = now


# Encode: the nearest level, by brute force --------------------------------------------------


def worst_excess(format: Format, noise: Noise, seed: int) -> float:
    """How much farther than the nearest level the chosen one is, in gaps between levels."""
    x, v = sample(format, 96, seed)
    codes, scales = encode(x, format, noise, v)
    code = unpack(codes, format.width).long().numpy()[:, :, None]
    table = all_levels(format, words_of(scales))[:, None, :]
    values = x.view(-1, 128).double().numpy()[:, :, None]
    if v is not None:
        unit = np.sqrt(v.view(-1, 128).double().numpy())[:, :, None]
        table, values = table * unit, np.where(unit > 0, values, 0.0)
    levels = measured(format, table)
    distance = np.abs(measured(format, values) - levels)
    excess = np.take_along_axis(distance, code, 2)[:, :, 0] - distance.min(2)
    gap = np.abs(np.diff(levels, axis=2)).max(2)
    return float(np.max(excess / np.where(gap > 0, gap, 1.0)))


# Where two levels are equally near, float32 arithmetic may take the farther one by this much.
TOLERANCE = {"softsign": 1e-4, "midrise": 1e-5, "adaptive_log": 4e-3}


@by_name(BLOCKED)
def test_nearest_rounding_takes_the_nearest_of_all_codes(format: Format) -> None:
    assert worst_excess(format, NEAREST, seed=format.width) < TOLERANCE[format.kind]


@by_name(BLOCKED)
def test_the_search_sees_a_shifted_threshold(format: Format) -> None:
    class Shifted(Noise):
        def uniform(self, first_block: int, blocks: int) -> float:
            return 0.48

    assert worst_excess(format, Shifted(None), seed=format.width) > 2 * TOLERANCE[format.kind]


@by_name([f for f in FORMATS.values() if f.kind == "softsign"])
def test_softsign_is_odd_and_stable(format: Format) -> None:
    """Values that are levels already are kept, scales included (unless denormal)."""
    x = sample(format, 60, seed=1)[0].view(-1, 128)
    x = x[x.abs().amax(1) > 2.0**-100].view(-1)
    codes, scales = encode(x, format, NEAREST)
    values = decode(codes, scales, format, x.numel())
    assert torch.equal(decode(*encode(-x, format, NEAREST), format, x.numel()), -values)
    again = encode(values, format, NEAREST)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


# Scale words --------------------------------------------------------------------------------


def expected_scale(absmax: float, mantissa_bits: int) -> float:
    """The next number of ``mantissa_bits + 1`` significant bits, within the range of scales."""
    if absmax == 0:
        return 0.0
    fraction, exponent = math.frexp(absmax)
    digits = 2 ** (mantissa_bits + 1)
    largest = math.ldexp(digits - 1, 128 - mantissa_bits - 1)
    return min(max(math.ldexp(math.ceil(fraction * digits), exponent) / digits, 2.0**-126), largest)


def magnitudes() -> Tensor:
    """Patterns of every exponent, denormals included, with mantissas at and around round ones."""
    mantissas = [0, 1, 0xFFFF, 0x10000, 0x10001, 0x0FFFFF, 0x100000, 0x100001, 0x7FFFFF, 0x5A5A5A]
    patterns = [(e << 23) + m for e in range(255) for m in mantissas]
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32)


@by_name(SCALED)
def test_the_scale_is_the_largest_magnitude_rounded_up(format: Format) -> None:
    absmax = magnitudes()
    x = torch.linspace(-0.9, 1, 128)[None, :] * absmax[:, None]
    x[:, 127] = 0
    position = torch.arange(len(absmax))
    x[position, position % 128] = absmax if not format.signed else absmax * (-1.0) ** position
    x = x if format.signed else x.abs()
    word = words_of(encode(x.reshape(-1), format, NEAREST)[1])
    drop = DROPPED_BITS[format.kind]
    scale = float_of((word >> 5 if drop == 20 else word) << drop)
    assert scale.tolist() == [expected_scale(float(m), 23 - drop) for m in absmax]
    wide = absmax.double().numpy()
    inside = (wide >= 2.0**-126) & (wide <= expected_scale(3.4e38, 23 - drop))
    assert (scale[inside] >= wide[inside]).all()
    assert (scale[inside] / wide[inside] < 1 + 2.0 ** (drop - 23)).all()


@by_name([f for f in FORMATS.values() if f.kind == "adaptive_log"])
@pytest.mark.parametrize("tail", [128, 77, 1])
def test_the_range_follows_mean_and_deviation_of_log2(format: Format, tail: int) -> None:
    """Recomputed in float64 from the valid elements alone; the last block has ``tail`` of them."""
    rng = np.random.default_rng(tail)
    spread = np.repeat(rng.uniform(0, 8, 65), 128)[: 64 * 128 + tail]
    x = torch.from_numpy(2 ** (spread * rng.standard_normal(len(spread)))).float()
    x[::97] = 0
    word = words_of(encode(x, format, NEAREST)[1])
    top, step = float_of((word >> 5) << 20), word & 31
    for block in range(65):
        part = x[128 * block : 128 * (block + 1)].double().numpy() / (top[block] or 1.0)
        octaves = np.log2(np.maximum(part, 2.0**-14))
        wanted = (1.2815515 * octaves.std() - octaves.mean()) / (14 / 32)
        near = {np.clip(math.ceil(wanted + e) - 1, 0, 31) for e in (-1e-4, 1e-4)}
        assert top[block] == 0 or step[block] in near


@by_name([f for f in FORMATS.values() if f.normalized])
@pytest.mark.parametrize("tail", [128, 77, 1])
def test_the_step_of_midrise_follows_the_root_mean_square(format: Format, tail: int) -> None:
    x, v = sample(format, 60, seed=tail)
    assert v is not None
    x, v = x[: 59 * 128 + tail], v[: 59 * 128 + tail]
    step = float_of(words_of(encode(x, format, NEAREST, v)[1]) << 16)
    root = np.sqrt(v.double().numpy())
    u = np.divide(x.double().numpy(), root, out=np.zeros_like(root), where=root > 0)
    for block in range(60):
        rms = np.sqrt(np.mean(u[128 * block : 128 * (block + 1)] ** 2))
        wanted = CLIP[format.width] * rms / ((2**format.width - 1) / 2)
        assert wanted * (1 - 1e-6) <= step[block] <= wanted * (1 + 2.0**-7 + 1e-6)

"""The meaning of the formats, against float64 formulas and a brute-force search over all codes.
That stochastic rounding is unbiased is checked in `test_rounding.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

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
    BEND_COEFFICIENTS,
    CONSTANT,
    FLOAT32,
    FORMATS,
    TAIL_DEVIATIONS,
    WEIGHTS_WIDTH,
    Format,
)
from stq_compile.layout import pack, unpack
from stq_compile.reference import decode, encode, fma, log2
from stq_compile.rounding import NEAREST, Noise

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

CASES = settings(deadline=None, derandomize=True, database=None, max_examples=20)
BLOCKED = [f for f in FORMATS.values() if f.blocked]
ADAPTIVE = [f for f in BLOCKED if f.kind == "adaptive_log"]
SCALED = [f for f in BLOCKED if not f.normalized]  # the scale is the largest magnitude
DROPPED_BITS = {"softsign": 16, "adaptive_log": 20}
CLIP = {2: 1.6, 3: 2.6}


def by_name(formats: list[Format]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("format", formats, ids=lambda f: f.name)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The formulas of the documentation, in float64 ----------------------------------------------


def float_of(pattern: Ints) -> Doubles:
    return pattern.astype(np.uint32).view(np.float32).astype(np.float64)


def words_of(scales: Tensor) -> Ints:
    return scales.numpy().astype(np.int64) & 0xFFFF


def spread_words(format: Format, count: int) -> Ints:
    """Scale words from the smallest to the largest finite one."""
    low, high = (8 * 15 << 5, (0x7F7 << 5) + 31) if format.kind == "adaptive_log" else (128, 0x7F7F)
    return np.linspace(low, high, count).astype(np.int64)


def straight_log2(x: Doubles) -> Doubles:
    """Exact at powers of two, straight between them; of zero -300."""
    fraction, exponent = np.frexp(x)
    return np.where(x > 0, exponent - 2 + 2 * fraction, -300.0)


def unit_of(format: Format, v: Doubles) -> Doubles:
    """The root of a normalizer, or the power of two next to it."""
    power = np.where(v > 0, 2.0 ** np.floor(np.frexp(v)[1] / 2), 2.0**-63)
    return np.asarray(power if format.width == 8 else np.sqrt(v))


def all_levels(format: Format, word: Ints) -> Any:
    """Values of all codes for each scale word ``[n] -> [n, codes]``, in units of a normalizer."""
    code = np.arange(format.top_code + 1, dtype=np.float64)
    if format.kind == "softsign":
        top = 2 ** (format.width - 1) - 1
        unit_levels = (code - top) / (2 * top - np.abs(code - top))
        return unit_levels * float_of(word << 16)[:, None]
    if format.kind == "midrise":
        return (code - (2**format.width - 1) / 2) * float_of(word << 16)[:, None]
    octaves = ((word & 31) + 1)[:, None] * (14 / 32 * 2**23 // (2**format.width - 1))
    below = (2**format.width - 1 - code) * octaves
    return float_of((word >> 5 << 20)[:, None] - below.astype(np.int64))


def measured(format: Format, values: Doubles) -> Doubles:
    """What "nearest" refers to: the value, or its bit pattern in octaves."""
    return straight_log2(values) if format.kind == "adaptive_log" else values


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
    lowest = -140 if format.signed else -110
    x *= 2.0 ** rng.uniform(lowest, 105, (blocks, 1))
    values = torch.from_numpy(x).float().view(-1)
    return (values if format.signed else values.abs()), None


# Decode -------------------------------------------------------------------------------------


@by_name(BLOCKED)
def test_every_code_decodes_to_the_documented_level(format: Format) -> None:
    """All codes under 300 scale words over the whole range; float32 rounding allowed, no more."""
    word = spread_words(format, 300)
    codes = torch.arange(256).clamp(max=format.top_code).view(1, 2, 128).int()
    codes = codes.expand(len(word), 2, 128).reshape(-1, 128).contiguous()
    scales = torch.from_numpy(np.repeat(word, 2).astype(np.uint16).view(np.int16))
    v = torch.full((codes.numel(),), 2.0) if format.normalized else None
    got = decode(pack(codes, format.width), scales, format, codes.numel(), v).double().numpy()
    levels = all_levels(format, word)
    if format.normalized:
        levels *= unit_of(format, np.array(2.0))
    expected = np.take_along_axis(np.repeat(levels, 2, axis=0), codes.long().numpy(), 1)
    finite = np.abs(expected) < 3.4e38
    relative = 0 if format.kind == "adaptive_log" else 2e-7
    np.testing.assert_allclose(
        got.reshape(-1, 128)[finite], expected[finite], rtol=relative, atol=2.0**-149
    )


@by_name(SCALED)
def test_the_top_code_decodes_to_the_scale_itself(format: Format) -> None:
    """Or else a block would get the next larger scale each time that it is rewritten."""
    word = spread_words(format, 2000)
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
    range_bits = 5 if format.kind == "adaptive_log" else 0
    first = words_of(scales) >> range_bits
    for step in range(20):
        again = noise if noise.key is None else Noise(noise.key + step + 1)
        codes, scales = encode(decode(codes, scales, format, 1280), format, again)
        assert ((words_of(scales) >> range_bits) <= first).all(), f"rewrite {step + 1}"


@by_name([f for f in FORMATS.values() if f.kind == "adaptive_log"])
def test_denormal_numbers_are_lifted_by_less_than_the_smallest_normal_number(
    format: Format,
) -> None:
    """Their bit patterns are no logarithms; a root of 2^-126 is below any epsilon in use."""
    x = torch.arange(1, 1 << 23, 6554, dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, 2 * x])
    values = decode(*encode(x, format, NEAREST), format, x.numel())
    assert ((values - x).abs() <= 1.001 * 2.0**-126).all()
    assert (values > 0).all()


# Encode: the nearest level, by brute force --------------------------------------------------


def worst_excess(format: Format, noise: Noise, seed: int) -> float:
    """How much farther than the nearest level the chosen one is, in gaps between levels."""
    x, v = sample(format, 96, seed)
    codes, scales = encode(x, format, noise, v)
    code = unpack(codes, format.width).long().numpy()[:, :, None]
    table = all_levels(format, words_of(scales))[:, None, :]
    values = x.view(-1, 128).double().numpy()[:, :, None]
    if v is not None:
        unit = unit_of(format, v.view(-1, 128).double().numpy())[:, :, None]
        table, values = table * unit, np.where(unit > 0, values, 0.0)
    levels = measured(format, table)
    distance = np.abs(measured(format, values) - levels)
    excess = np.take_along_axis(distance, code, 2)[:, :, 0] - distance.min(2)
    gap = np.abs(np.diff(levels, axis=2)).max(2)
    return float(np.max(excess / np.where(gap > 0, gap, 1.0)))


# Where two levels are equally near, float32 arithmetic may take the farther one by this much.
TOLERANCE = {"softsign": 1e-5, "midrise": 5e-4, "adaptive_log": 1e-4}


def tolerance(format: Format) -> float:
    """In gaps between levels, of which float32 sees the less the more there are."""
    return TOLERANCE[format.kind] * 2 ** (format.width - 8) + 1e-5


@by_name(BLOCKED)
def test_nearest_rounding_takes_the_nearest_of_all_codes(format: Format) -> None:
    assert worst_excess(format, NEAREST, seed=format.width) < tolerance(format)


@by_name(BLOCKED)
def test_the_search_sees_a_shifted_threshold(format: Format) -> None:
    class Shifted(Noise):
        def uniform(self, first_block: int, blocks: int, device: Any = None) -> float:
            return 0.48

        def centered(self, first_block: int, blocks: int, device: Any = None) -> Tensor:
            return torch.full((blocks, 128), -0.02 * 2.0**32)

    assert worst_excess(format, Shifted(None), seed=format.width) > 2 * tolerance(format)


@by_name([f for f in FORMATS.values() if f.kind == "softsign"])
def test_softsign_is_odd_and_stable(format: Format) -> None:
    """Values that are levels already are kept, scales included (unless denormal).

    With more levels than scales have digits, the largest value of a block need not be the scale,
    and rewritten it may get the next smaller one: all values stay within a level then.
    """
    x = sample(format, 60, seed=1)[0].view(-1, 128)
    x = x[x.abs().amax(1) > 2.0**-100].view(-1)
    codes, scales = encode(x, format, NEAREST)
    values = decode(codes, scales, format, x.numel())
    assert torch.equal(decode(*encode(-x, format, NEAREST), format, x.numel()), -values)
    again = encode(values, format, NEAREST)
    if format.width < WEIGHTS_WIDTH:
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)
    else:
        moved = (decode(*again, format, x.numel()) - values).abs().view(-1, 128)
        gap = values.view(-1, 128).abs().amax(1, keepdim=True) * (2 / (format.top_code // 2))
        assert bool((moved <= gap).all())


# Scale words --------------------------------------------------------------------------------


def expected_scale(absmax: float, mantissa_bits: int) -> float:
    """The next number of ``mantissa_bits + 1`` significant bits, within the range of scales."""
    if absmax == 0:
        return 0.0
    fraction, exponent = math.frexp(absmax)
    digits = 1 << (mantissa_bits + 1)
    largest = math.ldexp(digits - 1, 128 - mantissa_bits - 1)
    least = 2.0**-126 if mantissa_bits == 7 else 2.0**-112
    return min(max(math.ldexp(math.ceil(fraction * digits), exponent) / digits, least), largest)


def magnitudes() -> Tensor:
    """Patterns of every exponent, denormals included, with mantissas at and around round ones."""
    mantissas = [0, 1, 0xFFFF, 0x10000, 0x10001, 0x100001, 0x7FFFFF]
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
    inside = (wide >= 2.0**-112) & (wide <= expected_scale(3.4e38, 23 - drop))
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
        part = x[128 * block : 128 * (block + 1)].double().numpy()
        octaves = np.maximum(straight_log2(part) - straight_log2(top[block]), -15.0)
        wanted = (TAIL_DEVIATIONS[format.width] * octaves.std() - octaves.mean()) / (14 / 32)
        near = {np.clip(math.ceil(wanted + e) - 1, 0, 31) for e in (-1e-4, 1e-4)}
        assert top[block] == 0 or step[block] in near


# A range measured from the scale that the block had ------------------------------------------


@by_name(ADAPTIVE)
@pytest.mark.parametrize("noise", [NEAREST, Noise(3)], ids=["nearest", "stochastic"])
def test_from_its_own_scale_a_block_is_encoded_as_without(format: Format, noise: Noise) -> None:
    x, _ = sample(format, 60, seed=6)
    plain = encode(x, format, noise)
    assert all(map(torch.equal, encode(x, format, noise, before=plain[1]), plain))


@by_name(ADAPTIVE)
@pytest.mark.parametrize("octaves", [-126, -30, -3, -1, 1, 3, 13])
def test_from_another_scale_codes_lie_where_they_should(format: Format, octaves: int) -> None:
    """The range counts what lies up to 15 octaves below the old scale, in float64; codes are the
    nearest ones to where float64 sees the elements, whatever the old scale was."""
    rng = np.random.default_rng(octaves + 200)
    x = torch.from_numpy(2 ** (rng.uniform(0, 3, (40, 1)) * rng.standard_normal((40, 128)))).float()
    scale = words_of(encode(x.view(-1), format, NEAREST)[1]) >> 5
    old = np.maximum(scale + 8 * octaves, 0)
    before = torch.from_numpy((old << 5).astype(np.uint16).view(np.int16))
    codes, scales = encode(x.view(-1), format, NEAREST, before=before)
    assert (words_of(scales) >> 5 == scale).all()
    step = words_of(scales) & 31
    bits = x.view(torch.int32).numpy().astype(np.int64)
    from_old = np.maximum((bits - (old << 20)[:, None]) / 2.0**23, -15.0)
    mean = from_old.mean(1) + (old - scale) / 8
    wanted = (TAIL_DEVIATIONS[format.width] * from_old.std(1) - mean) / (14 / 32)
    near = [np.clip(np.ceil(wanted + e) - 1, 0, 31) for e in (-1e-3, 1e-3)]
    if octaves > 6:
        near = [31, 31]  # what lies far below the new scale was not seen
    assert ((step >= near[0]) & (step <= near[1])).all()
    below = ((scale << 20)[:, None] - bits) / (format.spacing * (step + 1))[:, None]
    position = np.maximum(format.top_code - below, 0)
    got = unpack(codes, format.width).numpy()
    assert np.abs(got - position).max() <= 0.5 + (0.05 if octaves < -100 else 0.01)


@by_name(ADAPTIVE)
@pytest.mark.parametrize("extreme", [-(2.0**31), 2.0**31], ids=["down", "up"])
def test_no_noise_leads_past_the_codes_wherever_the_old_scale_was(
    format: Format, extreme: float
) -> None:
    """Every scale that a block can have had, with new ones and ranges of all sizes."""
    rng = np.random.default_rng(3)
    old = np.tile(np.arange(2048), 6)
    top = 2.0 ** rng.uniform(-110, 127, (len(old), 1))
    x = torch.from_numpy(top * 2.0 ** -(rng.uniform(0, 9, top.shape) * rng.random((len(old), 128))))
    x[:, ::2] = x.amax(1, keepdim=True)
    before = torch.from_numpy((old << 5).astype(np.uint16).view(np.int16))
    valid, noise = torch.ones(x.shape, dtype=torch.bool), torch.full(x.shape, extreme)
    code, _ = reference._encode_adaptive_log(x.float(), valid, format, noise, before)
    assert code.min() >= 0
    assert code.max() <= format.top_code


@by_name(ADAPTIVE)
def test_a_block_that_becomes_zero_has_the_code_of_zeros(format: Format) -> None:
    """Wherever its scale was: what is decoded before it is stored knows the codes alone."""
    before = torch.from_numpy((np.arange(2040) << 5).astype(np.uint16).view(np.int16))
    codes, scales = encode(torch.zeros(2040 * 128), format, Noise(3), before=before)
    assert (unpack(codes, format.width) == format.top_code).all()
    assert (scales == 0).all()


@by_name(ADAPTIVE)
@pytest.mark.parametrize("octaves", [0, 4, 8, 14, 40])
def test_a_scale_that_falls_far_costs_distance_of_levels_and_no_small_numbers(
    format: Format, octaves: int
) -> None:
    """A state that is set anew within a step: none of its elements ends far too large."""
    rng = np.random.default_rng(octaves)
    x = torch.from_numpy(2.0 ** (2 * rng.standard_normal(64 * 128))).float()
    words = words_of(encode(x, format, NEAREST)[1])
    before = torch.from_numpy((words + (8 * octaves << 5)).astype(np.uint16).view(np.int16))
    codes, scales = encode(x, format, NEAREST, before=before)
    read = decode(codes, scales, format, x.numel())
    lowest = decode(torch.zeros_like(codes), scales, format, x.numel())
    raised = (read > 2 * x) & (read == lowest)
    allowed = 0.08 if octaves < 6 else 0.001  # that a range leaves out, or the widest one
    assert raised.float().mean() <= allowed


def normalized_sample(format: Format, tail: int) -> tuple[Doubles, Doubles]:
    """Values in units of their normalizer's root, and the scales that their blocks get."""
    x, v = sample(format, 60, seed=tail)
    assert v is not None
    x, v = x[: 59 * 128 + tail], v[: 59 * 128 + tail]
    root = unit_of(format, v.double().numpy())
    u = np.divide(x.double().numpy(), root, out=np.zeros_like(root), where=root > 0)
    return u, float_of(words_of(encode(x, format, NEAREST, v)[1]) << 16)


@by_name([f for f in FORMATS.values() if f.kind == "midrise"])
@pytest.mark.parametrize("tail", [128, 77, 1])
def test_midrise_reaches_to_a_multiple_of_the_root_mean_square_or_to_the_largest(
    format: Format, tail: int
) -> None:
    u, step = normalized_sample(format, tail)
    for block in range(60):
        part = u[128 * block : 128 * (block + 1)]
        reach = np.abs(part).max()
        if format.width in CLIP:
            reach = CLIP[format.width] * np.sqrt(np.mean(part**2))
        wanted = reach / ((2**format.width - 1) / 2)
        assert wanted * (1 - 2e-6) <= step[block] <= wanted * (1 + 2.0**-7 + 1e-6)


@by_name([f for f in FORMATS.values() if f.kind == "midrise" and f.width not in CLIP])
@pytest.mark.parametrize("noise", [NEAREST, Noise(7)], ids=["nearest", "stochastic"])
def test_rewriting_a_block_does_not_raise_its_step(format: Format, noise: Noise) -> None:
    x, v = sample(format, 60, seed=3)
    codes, scales = encode(x, format, noise, v)
    first = words_of(scales)
    for _ in range(3):
        codes, scales = encode(decode(codes, scales, format, x.numel(), v), format, noise, v)
    assert (words_of(scales) <= first).all()


# Zeros, broken numbers, tails, chunks -------------------------------------------------------


@by_name(BLOCKED)
def test_zero_blocks_have_scale_zero_and_decode_to_zero(format: Format) -> None:
    x, v = sample(format, 3, seed=2)
    x[128:256] = 0.0
    codes, scales = encode(x, format, Noise(1), v)
    values = decode(codes, scales, format, x.numel(), v).view(3, 128)
    assert int(scales[1]) == 0
    assert not values[1].any()
    assert values[0].any()
    assert values[2].any()


@by_name(BLOCKED)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_number_shows_and_stays_in_its_block(format: Format, broken: float) -> None:
    x, v = sample(format, 4, seed=3)
    good = decode(*encode(x, format, Noise(1), v), format, 512, v)
    x[200] = broken if format.signed else abs(broken)
    bad = decode(*encode(x, format, Noise(1), v), format, 512, v)
    assert not bad[200].isfinite()
    other = torch.arange(512) // 128 != 1
    assert torch.equal(bad[other], good[other])


@by_name([f for f in FORMATS.values() if f != CONSTANT])
@CASES
@given(data=st.data(), numel=st.integers(1, 300))
def test_finite_values_stay_finite(format: Format, data: st.DataObject, numel: int) -> None:
    """Up to a 128th below fp32's largest, as scales are rounded up by that much at most.

    For a normalized format, while the value stays below 1e18 units, of 1.8e19 at most.
    """
    most = 1.8e37 if format.normalized else torch.finfo(torch.float32).max / (1 + 1 / 128)
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    seen = data.draw(st.lists(finite, min_size=1, max_size=20))
    x = torch.tensor(seen).repeat(15)[:numel].clamp(-most, most)
    v = (x / 1e18).square().clamp(1e-30, 3.38e38) if format.normalized else None
    x = x if format.signed else x.abs()
    assert decode(*encode(x, format, Noise(5), v), format, x.numel(), v).isfinite().all()


@by_name([f for f in FORMATS.values() if f != CONSTANT])
@CASES
@given(numel=st.integers(1, 700), chunk=st.sampled_from([1, 2, 3]), key=st.integers(0, 2**63))
def test_chunks_and_parts_do_not_change_anything(
    format: Format, numel: int, chunk: int, key: int
) -> None:
    """Any cut at block borders gives the same codes and values: shards, chunks, tails."""
    x, v = (None if t is None else t[:numel] for t in sample(format, 6, seed=4))
    assert x is not None
    whole = encode(x, format, Noise(key), v)
    values = decode(*whole, format, x.numel(), v)
    cut = min(chunk * 128, x.numel())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BLOCKS", chunk)
        assert all(map(torch.equal, encode(x, format, Noise(key), v), whole))
        assert torch.equal(decode(*whole, format, x.numel(), v), values)
    parts = [(slice(0, cut), 0), (slice(cut, None), chunk)]
    encoded = [encode(x[s], format, Noise(key), v if v is None else v[s], b) for s, b in parts]
    for i in range(2):
        assert torch.equal(torch.cat([buffers[i] for buffers in encoded]), whole[i])


@by_name(BLOCKED)
@pytest.mark.parametrize("count", [1, 2, 16, 32, 64])
def test_a_tail_gets_the_scale_of_its_elements_alone(format: Format, count: int) -> None:
    """As a full block of repetitions does; powers of two keep the sums of both exact."""
    part = 2.0 ** -(torch.arange(count) % 8).float()
    v = torch.full((128,), 4.0) if format.normalized else None
    tail_codes, tail = encode(part, format, NEAREST, v if v is None else v[:count])
    full_codes, full = encode(part.repeat(128 // count), format, NEAREST, v)
    assert torch.equal(tail, full)
    code = unpack(tail_codes, format.width)[0]
    assert torch.equal(code[:count], unpack(full_codes, format.width)[0, :count])
    assert not code[count:].any(), "padding must be code 0"


# Arithmetic and casts -----------------------------------------------------------------------


def test_log2_polynomial() -> None:
    """Every 5th mantissa of an octave, and all magnitudes; half a unit of rounding is added."""
    mantissas = torch.arange(0x3F000000, 0x3F800001, 5, dtype=torch.int32).view(torch.float32)
    x = torch.cat([mantissas, magnitudes()[7:]])
    exact = torch.log2(x.double()).numpy()
    error = np.abs(log2(x).double().numpy() - exact)
    assert (error <= 2.2e-6 + 1e-7 + np.spacing(np.abs(exact).astype(np.float32)) / 2).all()
    assert log2(torch.tensor([0.0, 0.25, 1.0])).tolist() == [-127.0, -2.0, 0.0]
    x = np.linspace(-0.5, 0.5, 10001)
    bend = np.log2(x + 1.5) - (x + 0.5)
    assert np.abs((x**2 - 0.25) * np.polyval(BEND_COEFFICIENTS[::-1], x) - bend).max() < 2.3e-6


def test_fma_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (torch.from_numpy(rng.standard_normal(2000)).float() for _ in range(3))
    c = torch.where(torch.arange(2000) % 2 == 0, -(a * b), c)  # cancels all but the rounding
    exact = [
        Fraction(p) * Fraction(q) + Fraction(r)
        for p, q, r in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert fma(a, b, c).tolist() == [float(np.float32(float(e))) for e in exact]


def test_float32_is_exact_and_a_constant_cannot_be_encoded() -> None:
    x = torch.cat([magnitudes(), torch.tensor([math.nan])])
    values = decode(*encode(x, FLOAT32, Noise(2)), FLOAT32, x.numel())
    assert torch.equal(values.view(torch.int32), x.view(torch.int32))
    with pytest.raises(FormatMismatchError):
        encode(x, CONSTANT, NEAREST)

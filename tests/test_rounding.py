"""Random bits: known answers, a second implementation, statistics; and unbiased rounding.

The statistical test of the bits. The upper 24 bits, which are all that rounding uses, are looked at
over many blocks: of one element, of two elements of a block, of neighbouring blocks, and of two
keys. (Three elements of a block are not independent, by design.) Every statistic is turned into a
standard normal deviate and must stay within ``LIMIT`` = 6. For an ideal generator one deviate
leaves it with probability 2e-9, and some 10,000 of them are looked at, so a false alarm has a
probability below 1e-4. All keys are fixed, so the outcome is too. Further tests show that flawed
generators are caught.

Stochastic rounding is checked by the mean of 1e5 draws of a value, which must lie within 5
standard errors of the value (plus 1e-5 of the gap between its two levels, for float32
arithmetic). For a right quantizer one such check fails with probability 5.7e-7, and there are
about 70, so a false alarm has a probability below 1e-4; the seeds are fixed here too.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stq_compile import rounding
from stq_compile.formats import BFLOAT16, FORMATS, Format
from stq_compile.layout import pack
from stq_compile.reference import decode, encode
from stq_compile.rounding import (
    GOLDEN,
    NEAREST,
    Noise,
    kernel_arguments,
    mix64,
    random_bits,
    signed64,
    step_key,
    stream_id,
)

LIMIT = 6.0
BLOCKS = 1 << 15
ELEMENTS = (0, 1, 2, 17, 64, 126)
KEYS = st.integers(0, 2**64 - 1)
CASES = settings(deadline=None, derandomize=True, database=None, max_examples=50)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_bits(key: int, block: int, element: int) -> int:
    """The 32 bits of one element, in Python integers (splitmix64, then a multiply-add)."""
    base, step = key >> 32 << 32, key % 2**32
    z = (base + (block + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    z ^= z >> 31
    low, high = z % 2**32, z >> 32
    return (element * (high | 1) + low + step * 0x9E3779B9) % 2**32


# Known answers and the second implementation ------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        # Vigna's splitmix64.c; the second list is the one that xoshiro's test vectors use.
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_mix64_gives_the_published_splitmix64_sequence(seed: int, outputs: list[int]) -> None:
    states = [seed + GOLDEN * (i + 1) for i in range(len(outputs))]
    assert [mix64(state) for state in states] == outputs


@CASES
@given(x=st.integers(-(2**70), 2**70))
def test_mix64_depends_on_the_low_64_bits_alone(x: int) -> None:
    assert mix64(x) == mix64(x % 2**64)
    assert 0 <= mix64(x) < 2**64


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, GOLDEN])
@pytest.mark.parametrize("first_block", [0, 2**31 - 2, 2**40])
def test_python_and_torch_agree_bit_for_bit(key: int, first_block: int) -> None:
    expected = [[plain_bits(key, first_block + b, e) for e in range(128)] for b in range(3)]
    bits = random_bits(key, first_block, 3)
    assert bits.shape == (3, 128)
    assert bits.tolist() == expected


@CASES
@given(key=KEYS, first_block=st.integers(0, 2**45), element=st.integers(0, 127))
def test_python_and_torch_agree_anywhere(key: int, first_block: int, element: int) -> None:
    assert int(random_bits(key, first_block, 1)[0, element]) == plain_bits(
        key, first_block, element
    )


@CASES
@given(key=KEYS, start=st.integers(0, 40), count=st.integers(0, 40))
def test_bits_do_not_depend_on_the_range_that_is_asked_for(
    key: int, start: int, count: int
) -> None:
    assert torch.equal(
        random_bits(key, start, count), random_bits(key, 0, 80)[start : start + count]
    )


# Keys and uniform numbers -------------------------------------------------------------------


def test_a_stream_is_named_by_parameter_and_state() -> None:
    assert stream_id(3, "exp_avg") == 3 * 2**32 + zlib.crc32(b"exp_avg")
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "step")
    streams = {stream_id(p, s) for p in range(200) for s in states}
    assert len(streams) == 200 * len(states)


def test_keys_of_seeds_steps_and_streams_differ() -> None:
    streams = [stream_id(p, s) for p in range(10) for s in ("exp_avg", "exp_avg_sq")]
    steps = [*range(20), *range(1 << 48, (1 << 48) + 20)]
    keys = {step_key(*k) for k in itertools.product(range(10), steps, streams)}
    assert len(keys) == 10 * len(steps) * len(streams)
    assert all(0 <= key < 2**64 for key in keys)


@CASES
@given(seed=st.integers(0, 2**32), step=st.integers(0, 2**50), stream=st.integers(0, 2**50))
def test_a_kernel_draws_what_a_key_draws(seed: int, step: int, stream: int) -> None:
    """A kernel hashes the step and the stream itself, as `step_key` does."""
    key = step_key(seed, step, stream)
    step_argument, stream_argument = kernel_arguments(key)
    upper = mix64((step_argument & rounding.UPPER) ^ stream_argument) & rounding.UPPER
    assert upper | (step_argument & rounding.MASK32) == key


@CASES
@given(x=st.integers(0, 2**64 - 1))
def test_signed64_keeps_the_bits(x: int) -> None:
    assert signed64(x) % 2**64 == x
    assert -(2**63) <= signed64(x) < 2**63


def test_uniform_is_the_upper_24_bits() -> None:
    uniform = Noise(99).uniform(7, 50)
    assert isinstance(uniform, Tensor)
    assert uniform.dtype == torch.float32
    assert torch.equal(uniform.double() * 2.0**24, (random_bits(99, 7, 50) >> 8).double())


def test_uniform_never_reaches_one(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, 255, 256, 2**32 - 1]])
    monkeypatch.setattr(rounding, "random_bits", lambda key, first, blocks, device: extremes)
    uniform = Noise(1).uniform(0, 1)
    assert isinstance(uniform, Tensor)
    assert uniform.tolist() == [[0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]]


def test_nearest_rounding_is_a_half_everywhere() -> None:
    assert NEAREST.uniform(3, 4) == 0.5


# Statistics ---------------------------------------------------------------------------------


def chi_square_deviate(counts: Tensor) -> float:
    """Normal deviate of a chi-square test of equal counts (Wilson and Hilferty, 1931)."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def bit_deviates(bits: Tensor) -> Tensor:
    """Deviates of how often each of the upper 24 bits is set, by element: ``[elements, 24]``."""
    single = (bits[..., None] >> torch.arange(8, 32)) & 1
    n = len(bits)
    return (single.sum(0).double() - n / 2) / (n**0.5 / 2)


def worst_deviate(bits: Tensor) -> float:
    """Bytes equally frequent and bits set half the time, at some elements of a block."""
    found = []
    for column in bits[:, ELEMENTS].T:
        for shift in (8, 16, 24):
            counts = torch.bincount(column >> shift & 255, minlength=256)
            found.append(abs(chi_square_deviate(counts.double())))
    return max(*found, float(bit_deviates(bits[:, ELEMENTS]).abs().max()))


def worst_pair_deviate(a: Tensor, b: Tensor) -> float:
    """Independence of ``a`` and ``b``, by column: equal bits, pairs of upper bits, correlation."""
    found = [float(bit_deviates(a ^ b).abs().max())]
    for x, y in zip(a.T, b.T, strict=True):
        pairs = torch.bincount((x >> 27) * 32 + (y >> 27), minlength=1024)
        found.append(abs(chi_square_deviate(pairs.double())))
        correlation = torch.corrcoef(torch.stack([x, y]).double())[0, 1]
        found.append(abs(float(correlation)) * math.sqrt(len(x)))
    return max(found)


def key_of(seed: int = 0, step: int = 0, param: int = 0, state: str = "exp_avg") -> int:
    return step_key(seed, step, stream_id(param, state))


@pytest.mark.parametrize("key", [0, key_of(), key_of(seed=1, step=10**6, param=147)])
@pytest.mark.parametrize("first_block", [0, 2**33])
def test_bits_and_bytes_are_uniform(key: int, first_block: int) -> None:
    assert worst_deviate(random_bits(key, first_block, BLOCKS)) < LIMIT


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 64, 127])
def test_neighbouring_elements_are_independent(distance: int) -> None:
    bits, first = random_bits(key_of(), 0, BLOCKS), torch.arange(0, 128 - distance, 9)
    assert worst_pair_deviate(bits[:, first], bits[:, first + distance]) < LIMIT


@pytest.mark.parametrize("distance", [1, 2, 256])
def test_neighbouring_blocks_are_independent(distance: int) -> None:
    bits = random_bits(key_of(), 0, BLOCKS)[:, ELEMENTS]
    assert worst_pair_deviate(bits[:-distance], bits[distance:]) < LIMIT


@pytest.mark.parametrize(
    "other",
    [
        key_of(step=1 << 48),
        key_of(seed=1),
        key_of(param=1),
        key_of(state="exp_avg_sq"),
    ],
    ids=["eager step", "seed", "parameter", "state"],
)
def test_seeds_streams_and_eager_writes_are_independent(other: int) -> None:
    bits, others = random_bits(key_of(), 0, BLOCKS), random_bits(other, 0, BLOCKS)
    assert worst_pair_deviate(bits[:, ELEMENTS], others[:, ELEMENTS]) < LIMIT


def history_of(steps: range) -> Tensor:
    """What the elements of one block see in training, ``[steps, 128]`` in [0, 1)."""
    return torch.cat([random_bits(key_of(step=step), 5, 1) for step in steps]).double() / 2.0**32


def discrepancy(numbers: Tensor) -> float:
    """Star discrepancy of numbers in [0, 1): 1/2n at the least, about 0.9/sqrt(n) at random."""
    ordered, n = numbers.double().sort().values, numbers.numel()
    rank = torch.arange(n, dtype=torch.float64)
    return float(torch.maximum((rank + 1) / n - ordered, ordered - rank / n).max())


@pytest.mark.parametrize("start", [0, 77_777, 2**32 - 40])
@pytest.mark.parametrize("count", [8, 64, 512])
def test_the_numbers_of_an_element_are_spread_evenly_over_steps(start: int, count: int) -> None:
    """Bound of a Kronecker sequence of the golden ratio: n D* <= 3 + log(n) / log(phi) / 2.

    (Kuipers and Niederreiter, 1974, chapter 2, theorem 3.4, for partial quotients of 1.)
    """
    history = history_of(range(start, min(start + count, 2**32)))
    bound = (3 + math.log(len(history)) / math.log((1 + 5**0.5) / 2) / 2) / len(history)
    assert max(discrepancy(history[:, e]) for e in range(0, 128, 9)) <= bound


def test_an_element_moves_on_by_the_golden_ratio() -> None:
    history = history_of(range(100))
    moved = (history[1:] - history[:-1]) % 1
    assert float((moved - (5**0.5 - 1) / 2).abs().max()) < 1e-9


def test_elements_start_anywhere() -> None:
    """Fixed in time, the numbers of the elements are as random as before."""
    for step in (0, 1, 10**6):
        assert worst_deviate(random_bits(key_of(step=step), 0, BLOCKS)) < LIMIT


# Flawed generators are caught ---------------------------------------------------------------


def stuck_bit(bits: Tensor) -> Tensor:
    return bits & ~(1 << 8)


def missing_byte(bits: Tensor) -> Tensor:
    """A value of the upper byte that never occurs."""
    return torch.where(bits >> 24 == 9, bits ^ 1 << 24, bits)


def without_mixing(bits: Tensor) -> Tensor:
    """A plain multiple of the position: uniform on the whole, but neighbours are tied."""
    return torch.arange(bits.numel()).view_as(bits) * 0x9E3779B9 & 0xFFFFFFFF


def one_multiplier(bits: Tensor) -> Tensor:
    """The same distance between two elements in all blocks."""
    return (bits[:, :1] + torch.arange(128) * 0x9E3779B9) & 0xFFFFFFFF


def leaking_bit(bits: Tensor) -> Tensor:
    """Bit 30 of every second block is the one of the block before."""
    before = bits.roll(1, 0) & 1 << 30
    odd = torch.arange(len(bits))[:, None] % 2 == 1
    return torch.where(odd, (bits & ~(1 << 30)) | before, bits)


def same_in_all_blocks(bits: Tensor) -> Tensor:
    return bits[:1].expand_as(bits)


def by_element(bits: Tensor) -> float:
    return worst_deviate(bits)


def between_elements(bits: Tensor) -> float:
    return worst_pair_deviate(bits[:, 3:4], bits[:, 4:5])


def between_blocks(bits: Tensor) -> float:
    return worst_pair_deviate(bits[:-1, ELEMENTS], bits[1:, ELEMENTS])


@pytest.mark.parametrize(
    ("flaw", "statistic"),
    [
        (stuck_bit, by_element),
        (missing_byte, by_element),
        (one_multiplier, between_elements),
        (without_mixing, between_blocks),
        (same_in_all_blocks, between_blocks),
        (leaking_bit, between_blocks),
    ],
)
def test_the_statistics_see_a_flaw(
    flaw: Callable[[Tensor], Tensor], statistic: Callable[[Tensor], float]
) -> None:
    bits = random_bits(key_of(), 0, BLOCKS)
    assert statistic(bits) < LIMIT
    assert statistic(flaw(bits)) > LIMIT


# Stochastic rounding ------------------------------------------------------------------------


def levels_of(format: Format, word: Tensor, unit: float) -> Tensor:
    """What all codes decode to under one scale word, float64, ascending."""
    count = max(256, 1 << format.width) if format.width < 16 else 256
    codes = torch.arange(count, dtype=torch.int32).clamp(max=format.top_code).view(-1, 128)
    v = torch.full((count,), unit**2) if format.normalized else None
    values = decode(pack(codes, format.width), word.expand(len(codes)), format, count, v)
    return values[: format.top_code + 1].double()


@pytest.mark.parametrize(
    ("name", "decay"), [("softsign4", 0.9), ("softsign4", 0.99), ("adaptive_log4", 0.99)]
)
def test_an_average_settles_with_less_noise_and_without_bias(name: str, decay: float) -> None:
    """A moving average of white noise, stored at every step, beside the exact one.

    Independent random numbers are tried on the same data: the variance that settles is at most
    0.75 of theirs, and the mean error is within 5 of its own standard errors.
    """
    format, count, steps = FORMATS[name], 128 * 128, round(8 / (1 - decay))
    generator = torch.Generator().manual_seed(1)

    def settled(key: Callable[[int], int]) -> Tensor:
        generator.manual_seed(1)
        exact = torch.ones(count) if format.kind == "adaptive_log" else torch.zeros(count)
        stored, errors = exact.clone(), []
        for step in range(steps):
            x = torch.randn(count, generator=generator)
            x = x if format.signed else x * x
            exact = decay * exact + (1 - decay) * x
            stored = decay * stored + (1 - decay) * x
            stored = decode(*encode(stored, format, Noise(key(step))), format, count)
            if step >= steps // 2:
                errors.append(stored - exact if format.signed else (stored / exact).log2())
        return torch.stack(errors)

    even = settled(lambda step: key_of(step=step))
    independent = settled(lambda step: key_of(step=(step + 1) << 32))
    assert float(even.var() / independent.var()) < 0.75
    if format.signed:
        means = even.mean(0)  # the elements are independent of one another
        assert abs(float(means.mean())) < 5 * float(means.std()) / math.sqrt(count)


LEANING = [FORMATS[f"adaptive_log{width}"] for width in (2, 3, 4, 5, 6)]


def pattern_of(x: Tensor) -> Tensor:
    """The bit pattern of a float32 number, in octaves."""
    return x.float().view(torch.int32).double() * 2.0**-23


def bias(format: Format, noise: Noise, target: float) -> float:
    """Deviation of the mean of 1e5 decoded draws of ``target``, in allowed deviations.

    28 elements of every block hold +-1, so that the scale does not depend on the target alone.
    """
    unit = 3.0 if format.normalized else 1.0
    anchors = torch.tensor([1.0, -1.0]).repeat(14) if format.normalized else torch.ones(28)
    x = torch.cat([anchors, torch.full((100,), target)]).repeat(1000) * unit
    v = torch.full_like(x, unit**2) if format.normalized else None
    codes, scales = encode(x, format, noise, v)
    drawn = decode(codes, scales, format, x.numel(), v).view(1000, 128)[:, 28:].double()
    value = x[-1:].double()
    if format == BFLOAT16:
        pattern = x[-1:].view(torch.int32) >> 16
        levels = torch.cat([pattern << 16, (pattern + 1) << 16]).view(torch.float32).double()
    else:
        levels = levels_of(format, scales[:1], unit)
    if format.kind == "adaptive_log":
        levels, drawn, value = map(pattern_of, (levels, drawn, value))
    above = int(torch.searchsorted(levels, value))
    assert 0 < above < len(levels), "the target must lie between two levels"
    gap = float(levels[above] - levels[above - 1])
    share = float(value - levels[above - 1]) / gap
    if noise.key is not None and format in LEANING:  # by so much, and down
        share -= min(gap, 1.0) / 8 * share * (1 - share)
        value = levels[above - 1] + share * gap
    allowed = 5 * gap * math.sqrt(share * (1 - share) / drawn.numel()) + 1e-5 * gap
    return abs(float(drawn.mean() - value)) / allowed


# Between levels of every width, and for midrise inside the clip.
TARGETS = {
    "softsign": [0.9, 0.31, -0.05, 0.0013, -0.7],
    "adaptive_log": [0.93, 0.5, 0.11, 0.02, 0.003],
    "midrise": [0.8, 0.45, 0.1, -0.3, -1.1],
    "bfloat16": [0.9001, 0.2503, 0.0371],
}
# Of what rounding leaves of parameters (ulp8), `test_halves` says it.
by_format = pytest.mark.parametrize(
    "format", [f for f in FORMATS.values() if f.kind in TARGETS], ids=lambda f: f.name
)


@by_format
def test_stochastic_rounding_is_unbiased(format: Format) -> None:
    """In the value; adaptive_log in the bit pattern, from which it leans down as documented."""
    found = {target: bias(format, Noise(11), target) for target in TARGETS[format.kind]}
    assert max(found.values()) < 1, found


@by_format
def test_the_mean_shows_that_nearest_rounding_is_biased(format: Format) -> None:
    assert max(bias(format, NEAREST, target) for target in TARGETS[format.kind]) > 5


@pytest.mark.parametrize(
    ("kind", "width"),
    [(f.kind, f.width) for f in FORMATS.values() if f.kind in ("softsign", "adaptive_log")],
)
@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-24])
def test_zero_and_the_largest_value_stay_whatever_the_random_number(
    kind: str, width: int, extreme: float
) -> None:
    """The outermost random numbers don't move a value that is a level already."""

    format = FORMATS[f"{kind}{width}"]
    x = torch.tensor([1.0, 0.0]).repeat(64)
    values = decode(*encode(x, format, Extreme(number=extreme)), format, 128)
    assert (values[::2] == 1).all()
    if format.signed:
        assert (values[1::2] == 0).all()


@dataclass(frozen=True)
class Extreme(Noise):
    """One number for all elements, in [0, 1)."""

    key: int | None = 1
    number: float = 0.0

    def uniform(self, first_block: int, blocks: int, device: object = None) -> float:
        return self.number

    def centered(self, first_block: int, blocks: int, device: object = None) -> Tensor:
        number = (self.uniform(0, 0) - 0.5) * 2.0**32
        return torch.full((blocks, 128), number)


@pytest.mark.parametrize("width", [f.width for f in FORMATS.values() if f.kind == "adaptive_log"])
@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-24])
def test_what_is_on_a_level_stays_whatever_the_random_number(width: int, extreme: float) -> None:
    """Every level of a non-negative state, where rewriting leaves the range as it is."""
    format, blocks = FORMATS[f"adaptive_log{width}"], 400
    generator = torch.Generator().manual_seed(width)
    x = torch.exp2(2 * torch.randn(blocks, 128, generator=generator)).view(-1)
    codes, scales = encode(x, format, NEAREST)
    again = encode(decode(codes, scales, format, x.numel()), format, Extreme(number=extreme))
    same = again[1] == scales
    assert float(same.float().mean()) > 0.1
    assert torch.equal(again[0][same], codes[same])


def test_bfloat16_keeps_what_it_can_hold_and_shows_broken_numbers() -> None:
    x = torch.tensor([1.5, -0.0, 3.0e-39, math.inf, -math.inf, math.nan])
    x[:3] = x[:3].bfloat16().float()
    values = decode(*encode(x, BFLOAT16, Noise(2)), BFLOAT16, 6)
    assert torch.equal(values[:5], x[:5])
    assert values[5].isnan()


def test_bfloat16_nearest_is_the_cast_of_torch() -> None:
    patterns = torch.arange(-(2**31), 2**31, 104729).int()  # of every exponent and sign
    x = patterns.view(torch.float32)
    values = decode(*encode(x, BFLOAT16, NEAREST), BFLOAT16, x.numel())
    assert torch.equal(values.isnan(), x.isnan())
    assert torch.equal(values.nan_to_num(7.0), x.bfloat16().float().nan_to_num(7.0))

"""The grid of 16-bit types, over all their numbers, against torch's casts and exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stq_compile.formats import ULP8
from stq_compile.halves import HALVES, Half, error_of, rounded, ulp, with_error
from stq_compile.reference import decode, encode
from stq_compile.rounding import NEAREST, Noise

EACH = pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)


def numbers(half: Half) -> Tensor:
    """Every number on the grid, as float32: those that `Half` says it computes on."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(half.dtype).float()
    return own(every, half)


def own(x: Tensor, half: Half) -> Tensor:
    """What of ``x`` is computed on the grid: all of float16, and bfloat16 from 2^-111 on."""
    least = 0.0 if half.dtype == torch.float16 else 2.0 ** (half.lowest - 127)
    return x[(x.abs() < half.limit) & ((x == 0) | (x.abs() >= least))]


def between(half: Half, seed: int = 0) -> Tensor:
    """Float32 values of all magnitudes between the numbers of the grid, and the ties."""
    x = numbers(half)
    generator = torch.Generator().manual_seed(seed)
    inside = x + (torch.rand(x.shape, generator=generator) - 0.5) * ulp(x, half)
    return own(torch.cat([inside, x + 0.5 * ulp(x, half), x]), half)


@EACH
def test_nearest_is_the_cast_of_torch(half: Half) -> None:
    x = between(half)
    assert torch.equal(rounded(x, half, None), x.to(half.dtype).float())


@EACH
def test_stochastic_rounding_has_the_value_as_its_mean(half: Half) -> None:
    """Over 256 evenly spaced numbers in place of random ones, so that the mean is nearly exact."""
    x = between(half)
    total = torch.zeros_like(x, dtype=torch.float64)
    for k in range(256):
        found = rounded(x, half, torch.full_like(x, (k + 0.5) / 256))
        assert torch.equal(found.to(half.dtype).float(), found), "it is on the grid"
        total += found
    unit = ulp(x, half).double()
    assert ((total / 256 - x).abs() / unit).max() <= 0.5 / 256


@EACH
def test_numbers_on_the_grid_stay(half: Half) -> None:
    x = numbers(half)
    for u in (0.0, 0.5, 1.0 - 2.0**-24):
        assert torch.equal(rounded(x, half, torch.full_like(x, u)), x)


@EACH
def test_a_value_is_its_nearest_number_and_its_error(half: Half) -> None:
    x = between(half)
    p = rounded(x, half, None)
    error = error_of(x, p, half)
    assert error.abs().max() == 0.5
    assert torch.equal(p.double() + error.double() * ulp(p, half).double(), x.double())
    codes, _ = encode(error, ULP8, NEAREST)
    kept = with_error(p, decode(codes, torch.empty(0), ULP8, x.numel()), half)
    # Half of a 256th, and a whole one where the nearest code would be 128.
    assert ((kept.double() - x).abs() / ulp(p, half).double()).max() <= 1 / 256
    last = error > 127.5 / 256
    assert ((kept.double() - x).abs() / ulp(p, half).double())[~last].max() <= 0.5 / 256


@EACH
def test_what_is_no_number_stays_what_it_is(half: Half) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -3e38])
    for uniform in (None, torch.full_like(x, 0.3)):
        p = rounded(x, half, uniform).to(half.dtype)
        torch.testing.assert_close(p, x.to(half.dtype), equal_nan=True)
        assert torch.equal(error_of(x, p.float(), half), torch.zeros(5))
        assert torch.equal(with_error(p.float(), torch.zeros(5), half)[:2], x[:2])


def test_codes_of_errors_are_rounded_at_random_with_the_right_mean() -> None:
    x = torch.full((128 * 400,), 0.3 / 256)
    codes, scales = encode(x, ULP8, Noise(12345))
    assert scales.numel() == 0
    assert codes.dtype == torch.int8
    assert set(codes.tolist()) == {0, 1}
    assert float(codes.double().mean()) == pytest.approx(0.3, abs=4 * (0.21 / x.numel()) ** 0.5)


def test_all_codes_of_errors_are_kept() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    values = decode(codes, torch.empty(0), ULP8, 256)
    for noise in (NEAREST, Noise(7)):
        assert torch.equal(encode(values, ULP8, noise)[0], codes)

"""Factor selection against enumeration, and the calibration that follows from it."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stq_compile.planner.regression import ridge_regression, standardized
from stq_compile.planner.selection import (
    GUARANTEE,
    IDENTITY,
    LIMIT,
    REACH,
    Calibration,
    calibrate,
    objective,
    select,
)

Floats = NDArray[np.float64]
many = settings(max_examples=200, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)


def names(count: int) -> list[str]:
    return [f"factor {j:02}" for j in range(count)]


def pool(seed: int, n: int = 40, p: int = 7) -> tuple[Floats, Floats]:
    """Factors that share a few causes, as correlated as the seed says, and a target."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, int(rng.integers(1, p + 1))))
    own = 10 ** rng.uniform(-3, 1)
    X = causes @ rng.normal(size=(causes.shape[1], p)) + own * rng.normal(size=(n, p))
    y = causes @ rng.normal(size=causes.shape[1]) + rng.normal(size=n) * rng.uniform(0, 2)
    return X, y


def trap(n: int = 400) -> tuple[Floats, Floats]:
    """The factor most like y is nearly the sum of two others that are each worth less."""
    rng = np.random.default_rng(1)
    a, b, noise = rng.normal(size=(3, n))
    near = a + b + 0.3 * rng.normal(size=n)
    copies = [near + 0.01 * rng.normal(size=n) for _ in range(4)]
    return np.stack([a, b, near, *copies], axis=1), a + b + 0.1 * noise


# The objective.


@many
@given(SEEDS)
def test_monotone_and_submodular(seed: int) -> None:
    """Along random chains A ⊂ B, j is worth at least 0 and no more to B than to A."""
    X, y = pool(seed)
    f = objective(X, y)
    order = np.random.default_rng(seed).permutation(X.shape[1]).tolist()
    small = order[: seed % 3]
    large = order[: seed % 3 + 1 + seed % 4]
    for j in order[len(large) :]:
        to_small, to_large = f([*small, j]) - f(small), f([*large, j]) - f(large)
        assert to_large >= -1e-10
        assert to_small >= to_large - 1e-10
    assert f([]) == 0
    assert f(large) == pytest.approx(f(large[::-1]))


@many
@given(SEEDS)
def test_one_factor_is_worth_its_mutual_information(seed: int) -> None:
    X, y = pool(seed)
    f = objective(X, y)
    for j in range(X.shape[1]):
        rho = np.corrcoef(X[:, j], y)[0, 1]
        assert f([j]) == pytest.approx(-0.5 * math.log(1 - min(rho**2, 0.999)), abs=1e-9)


def test_a_perfect_factor_is_worth_a_finite_value() -> None:
    y = np.arange(20.0)
    assert objective(y[:, None] * -3 + 5, y)([0]) == pytest.approx(-0.5 * math.log(0.001))


def test_independent_factors_add_up_and_duplicates_share() -> None:
    a, b = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    X, y = np.stack([a, b, a], axis=1), 2 * a + b + np.array([1.0, -1, -1, 1])
    f = objective(X, y)
    assert f([0, 1]) == pytest.approx(f([0]) + f([1]))
    assert f([0, 2]) < 1.5 * f([0])


# Greedy selection.


@many
@given(SEEDS, st.integers(1, 4))
def test_greedy_against_enumeration(seed: int, count: int) -> None:
    X, y = pool(seed)
    found, f = select(X, y, names(7), count), objective(X, y)
    best = max(f(chosen) for chosen in combinations(range(7), count))
    assert found.optimum == pytest.approx(best)
    assert found.value >= GUARANTEE * best - 1e-9
    assert found.bound >= best - 1e-9
    assert found.fraction <= found.value / best + 1e-9
    assert found.value == pytest.approx(f([names(7).index(name) for name in found.factors]))
    assert found.value == pytest.approx(sum(found.gains))
    assert list(found.gains) == sorted(found.gains, reverse=True)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_greedy_on_redundant_pools(count: int) -> None:
    X, y = trap()
    found = select(X, y, names(7), count)
    assert found.optimum is not None
    assert GUARANTEE * found.optimum <= found.value <= found.optimum + 1e-12
    assert found.optimum <= found.bound
    assert found.gamma < 0.01  # five columns say nearly the same


def test_the_bound_is_tight_for_independent_factors() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 6))
    X = np.linalg.qr(X - X.mean(axis=0))[0]
    found = select(X, X @ np.arange(6.0) + 0.3 * rng.normal(size=60), names(6), 3)
    assert found.optimum == pytest.approx(found.value)
    assert found.bound == pytest.approx(found.value)
    assert found.gamma == pytest.approx(1)


def test_enumeration_has_a_limit() -> None:
    X, y = pool(3, p=8)
    assert select(X, y, names(8), 4, enumerate_limit=70).optimum is not None
    assert select(X, y, names(8), 4, enumerate_limit=69).optimum is None


@many
@given(SEEDS, st.integers(1, 4), st.booleans())
def test_the_order_of_factors_does_not_matter(seed: int, count: int, twins: bool) -> None:
    X, y = pool(seed)
    if twins:
        X[:, 3] = X[:, 5]
    order = np.random.default_rng(seed).permutation(7)
    found = select(X, y, names(7), count)
    other = select(X[:, order], y, [names(7)[j] for j in order], count)
    assert found == other
    fit = calibrate(X, y, names(7), count)
    assert fit == calibrate(X[:, order], y, [names(7)[j] for j in order], count)


def test_constant_factors_are_not_chosen() -> None:
    X, y = pool(5)
    X[:, 2] = 0.1  # its mean is not exactly 0.1
    X[:, 4] = 0
    found = select(X, y, names(7), 7)
    assert not {"factor 02", "factor 04"} & set(found.factors)
    assert select(X[:, [2, 4]], y, names(2), 2).factors == ()
    assert select(X, np.full(40, 3.0), names(7), 2).factors == ()
    assert objective(X, y)([2]) == 0


def test_of_duplicates_the_first_by_name_is_chosen() -> None:
    X, y = pool(5)
    best = select(X, y, names(7), 1).factors[0]
    doubled = np.column_stack([X[:, names(7).index(best)], X])
    found = select(doubled, y, ["a twin", *names(7)], 1)
    assert found.factors == ("a twin",)
    assert found.gamma == pytest.approx(0, abs=1e-9)


def test_the_certificate_reads_in_two_lines() -> None:
    X, y = pool(11)
    found = select(X, y, names(7), 2)
    first, second = str(found).splitlines()
    assert all(name in first for name in found.factors)
    assert f"{found.value:.3f} nats" in first
    assert f"at most {found.bound:.3f}; certified {found.fraction:.0%} (guarantee 63%" in second
    assert "not enumerated" in str(select(X, y, names(7), 2, enumerate_limit=0))


# Calibration.


def test_a_linear_relation_is_recovered() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 6)) * [1, 10, 0.1, 1, 1, 1] + [0, 5, 0, 1, 2, 3]
    y = 0.4 * X[:, 0] - 0.05 * X[:, 1] + 0.3 + 0.01 * rng.normal(size=500)
    found = calibrate(X, y, names(6), 2)
    assert set(found.names) == {"factor 00", "factor 01"}
    assert found.certificate is not None
    assert found.certificate.r_squared > 0.99
    assert found.ridge == 1e-4
    near = np.abs((X - X.mean(0)) / X.std(0)).max(1) < REACH
    for row, wanted in zip(X[near][:20], y[near][:20], strict=True):
        factors = dict(zip(names(6), row.tolist(), strict=True))
        assert found.correct(factors) == pytest.approx(wanted, abs=0.05)


def test_a_factor_far_from_what_was_seen_counts_as_the_border_of_it() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 1)) * 3 + 5
    found = calibrate(X, 0.1 * X[:, 0], ["a"], 1)
    mean, deviation = X.mean(), X.std()
    border, far = (found.correct({"a": mean + x * deviation}) for x in (REACH, 9 * REACH))
    assert far == border
    assert border > found.correct({"a": mean + 0.9 * REACH * deviation})


def test_noise_is_not_followed() -> None:
    rng = np.random.default_rng(0)
    spreads = []
    for _ in range(20):
        X, y = rng.normal(size=(30, 6)), rng.normal(size=30)
        found = calibrate(X, y, names(6), 4)
        plain = np.linalg.lstsq(standardized(X)[0], y - y.mean())[0]
        spreads.append(np.linalg.norm(found.coefficients) / np.linalg.norm(plain))
    assert np.mean(spreads) < 0.75


def test_more_noise_more_shrinkage() -> None:
    rng = np.random.default_rng(0)
    z = standardized(rng.normal(size=(40, 3)))[0]
    noise = rng.normal(size=40)
    grid = tuple(10.0**k for k in range(-6, 4))
    ridges = [ridge_regression(z, z @ [1.0, -1, 0.5] + s * noise, grid)[1] for s in (0, 1, 9)]
    assert ridges == sorted(ridges)
    assert ridges[0] < ridges[-1]


@many
@given(SEEDS, st.sampled_from([0.01, 0.3, 5.0]))
def test_ridge_regression_is_the_one_of_the_normal_equations(seed: int, ridge: float) -> None:
    X, y = pool(seed)
    z = standardized(X)[0]
    found, strength = ridge_regression(z, y, (ridge,))
    wanted = np.linalg.solve(z.T @ z + len(y) * ridge * np.eye(7), z.T @ (y - y.mean()))
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)
    assert strength == ridge


def test_cross_validation_is_leave_one_out_for_equal_leverages() -> None:
    """GCV's definition, against refits without each row where all leverages are the same."""
    n, ridge = 16, 0.2
    angle = 2 * np.pi * np.arange(n) / n
    z = np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    y = z @ [1.0, 0.5] + np.random.default_rng(0).normal(size=n)
    design = np.column_stack([np.ones(n), z])
    penalty = n * ridge * np.diag([0.0, 1, 1])
    errors = []
    for i in range(n):
        kept = np.arange(n) != i
        fit = np.linalg.solve(design[kept].T @ design[kept] + penalty, design[kept].T @ y[kept])
        errors.append((y[i] - design[i] @ fit) ** 2)
    coefficients = ridge_regression(z, y, (ridge,))[0]
    rss = float(((y - y.mean() - z @ coefficients) ** 2).sum())
    freedom = n - 1 - 2 / (1 + ridge)
    assert n * rss / freedom**2 == pytest.approx(np.mean(errors))


def test_few_observations_give_a_shrunk_mean() -> None:
    X, y = pool(2, n=40)
    y = y - y.mean() + 1
    assert calibrate(X[:0], y[:0], names(7)) == IDENTITY
    previous = 0.0
    for n in (1, 4, 14):
        found = calibrate(X[:n], np.ones(n), names(7))
        assert found.certificate is None
        assert found.correct({}) == pytest.approx(n / (n + 5))
        assert previous < found.correct({}) < 1
        previous = found.correct({})
    assert calibrate(X[:15], y[:15], names(7)).certificate is not None


def test_corrections_are_bounded() -> None:
    X, y = pool(2)
    found = calibrate(X, y, names(7), limit=0.5)
    far = [found.correct(dict.fromkeys(names(7), s * 1e9)) for s in (-1, 1)]
    assert sorted(far) == [-0.5, 0.5]
    assert calibrate(X[:5], np.full(5, 99.0), names(7)).correct({}) == LIMIT


def test_the_identity_corrects_nothing() -> None:
    assert IDENTITY.correct({}) == 0
    assert IDENTITY.correct({"factor 00": math.nan}) == 0


@pytest.mark.parametrize("n", [0, 9, 40])
def test_round_trip_through_json(n: int) -> None:
    X, y = pool(4)
    found = calibrate(X[:n], y[:n], names(7))
    text = json.dumps(found.to_dict())
    again = Calibration.from_dict(json.loads(text))
    assert again == found
    assert json.dumps(again.to_dict()) == text
    factors = dict(zip(names(7), X[0].tolist(), strict=True))
    assert again.correct(factors) == found.correct(factors)


def test_mistakes_are_named() -> None:
    X, y = pool(4)
    found = calibrate(X, y, names(7))
    with pytest.raises(ValueError, match=f"{found.names[0]} is None"):
        found.correct({})
    with pytest.raises(ValueError, match="is -inf"):
        found.correct(dict.fromkeys(names(7), -math.inf))
    with pytest.raises(ValueError, match="7 factors need as many different names"):
        select(X, y, ["a"] * 7, 2)
    with pytest.raises(ValueError, match="2 or more"):
        select(X[:1], y[:1], names(7), 2)
    with pytest.raises(ValueError, match=r"X has shape \(40, 7\), y \(39,\)"):
        calibrate(X, y[1:], names(7))
    X[3, 1] = math.nan
    with pytest.raises(ValueError, match="factor 01 is not finite"):
        calibrate(X, y, names(7))
    with pytest.raises(ValueError, match="y is not finite"):
        calibrate(X[:, :1], y * math.inf, names(1))

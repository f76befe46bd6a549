"""Which factors correct the predicted error: greedy selection with a certificate.

The analytic law predicts an error; what it misses, the target ``y`` in log units, may follow from
cheap factors, measured once for each state. Let ``C`` be the correlation matrix of the factors,
``rho_j`` the correlation of factor ``j`` with ``y``, and ``w_j = rho_j^2 / (1 - rho_j^2)``, a
signal-to-noise ratio. A set ``F`` of factors is worth, in nats,

    f(F) = 1/2 log det(I + W^(1/2) C_FF W^(1/2))

- One factor is worth ``1/2 log(1 + w) = -1/2 log(1 - rho^2)``, its Gaussian mutual information
  with ``y``.
- ``f(F)`` is the information that the numbers ``z_j + noise_j``, ``j`` in ``F``, carry on the
  Gaussian vector ``z`` with covariance ``W^(1/2) C W^(1/2)``, positive semidefinite as it must be.
  The marginal value of ``j`` is the entropy of ``z_j + noise_j`` given those of ``F``, less the
  entropy of ``noise_j``, which is what would be left if ``z_j`` were given too. Conditioning
  never raises entropy, so marginal values are not negative (``f`` is monotone) and fall as ``F``
  grows (``f`` is submodular; Krause and Guestrin 2005). Factors that say the same share their
  value.
- So the greedy set of ``k`` factors reaches at least ``1 - 1/e`` of the best set's value
  (Nemhauser, Wolsey and Fisher 1978); and by the same two properties, the best set is worth at
  most ``f(F)`` plus the ``k`` largest marginal values given ``F``, for every ``F``: the bound that
  a certificate states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stq_compile.planner.regression import (
    RIDGES,
    Floats,
    checked,
    r_squared,
    ridge_regression,
    standardized,
)

MAX_RHO_SQUARED = 0.999
GUARANTEE = 1 - 1 / math.e
LIMIT = math.log(8)
REACH = 2.0
"""Standard deviations from its mean within which a factor was seen often enough to be trusted.
Where gradients change character, factors leave the range that a calibration was fitted to."""
_NOTHING = 1e-9  # nats: a marginal value below this is rounding
_CHUNK = 4096  # sets at a time in an enumeration


@dataclass(frozen=True)
class Certificate:
    """What was selected, what it is worth and how far from the best that can be."""

    factors: tuple[str, ...]  # chosen, in order
    gains: tuple[float, ...]  # marginal values, nats
    value: float  # their sum, f of the chosen
    guarantee: float  # 1 - 1/e: value / optimum before any data is seen
    bound: float  # no set of that size is worth more, see the module
    optimum: float | None  # by enumeration; None where there are too many sets
    r_squared: float  # of the ridge regression on the chosen factors, in sample
    gamma: float
    """The smallest eigenvalue of the pool's correlation matrix. It bounds the submodularity ratio
    of regression gain from below, so that forward selection by R² would be within 1 - e^-gamma of
    the best (Das and Kempe 2011): 1 for independent factors, 0 with a redundant one."""

    @property
    def fraction(self) -> float:
        """The certified share of the best set's value."""
        return self.value / self.bound if self.bound > 0 else 1.0

    def __str__(self) -> str:
        listed = ", ".join(f"{n} {g:+.3f}" for n, g in zip(self.factors, self.gains, strict=True))
        best = "not enumerated" if self.optimum is None else f"{self.optimum:.3f} by enumeration"
        return (
            f"{listed or 'no factor'}: {self.value:.3f} nats, R² {self.r_squared:.2f}\n"
            f"best set: {best}, at most {self.bound:.3f}; certified {self.fraction:.0%} "
            f"(guarantee {self.guarantee:.0%}, gamma {self.gamma:.2f})"
        )


@dataclass(frozen=True)
class Calibration:
    """A ridge regression of ``y`` on the chosen factors, standardized.

    Attributes:
        certificate: of the selection; None where there were too few observations for one.
        names, mean, scale, coefficients: of the chosen factors, in the order chosen.
        intercept: the correction where all factors have their mean, shrunk to 0.
        limit: bound of the correction's absolute value.
        ridge: strength chosen, per observation.
        observations: how many it was fitted to.
    """

    certificate: Certificate | None
    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    limit: float
    ridge: float
    observations: int

    def correct(self, factors: Mapping[str, float]) -> float:
        """What to add to the predicted log-error of a state with these factors.

        A factor counts up to `REACH` standard deviations from its mean. Those that were not chosen
        may be absent.

        Raises:
            ValueError: a chosen factor is absent or not finite.
        """
        total = self.intercept
        columns = zip(self.names, self.mean, self.scale, self.coefficients, strict=True)
        for name, mean, scale, coefficient in columns:
            value = factors.get(name)
            if value is None or not math.isfinite(value):
                raise ValueError(f"factor {name} is {value}; the calibration needs a number")
            total += coefficient * min(max((value - mean) / scale, -REACH), REACH)
        return min(max(total, -self.limit), self.limit)

    def to_dict(self) -> dict[str, Any]:
        """As plain types: dicts, lists, strings and numbers."""
        fields = asdict(self)
        for part in (fields, fields["certificate"] or {}):
            part.update({k: list(v) for k, v in part.items() if isinstance(v, tuple)})
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Calibration:
        """What `to_dict` wrote."""
        content = _with_tuples(fields)
        if content["certificate"] is not None:
            content["certificate"] = Certificate(**_with_tuples(content["certificate"]))
        return cls(**content)


IDENTITY = Calibration(None, (), (), (), (), 0.0, LIMIT, 0.0, 0)
"""Corrects nothing: before any observation."""


def objective(X: ArrayLike, y: ArrayLike) -> Callable[[Sequence[int]], float]:
    """The value f of a set of columns of ``X`` ``[n, p]`` for the target ``y`` ``[n]``."""
    matrix, target = checked(X, y)
    kernel = _kernel(standardized(matrix)[0], target)
    return lambda chosen: _value(kernel, chosen)


def select(
    X: ArrayLike, y: ArrayLike, names: Sequence[str], count: int, enumerate_limit: int = 20000
) -> Certificate:
    """Greedily chooses up to ``count`` columns of ``X`` ``[n, p]`` for the target ``y`` ``[n]``.

    Stops early at factors that add nothing, constant ones among them. The order of columns does
    not matter; of equally good ones the first by name is chosen.

    Raises:
        ValueError: fewer than two observations, names that do not fit, or a value not finite.
    """
    matrix, target = checked(X, y, names)
    if len(target) < 2 or count < 0:
        raise ValueError(f"{len(target)} observations, {count} factors: needs 2 or more, and >= 0")
    order = sorted(range(len(names)), key=lambda j: names[j])
    z, _, scale = standardized(matrix[:, order])
    kernel = _kernel(z, target)
    chosen, gains, bound = _greedy(kernel, min(count, len(order)))
    value = math.fsum(gains)
    coefficients, _ = ridge_regression(z[:, chosen], target, RIDGES)
    return Certificate(
        factors=tuple(names[order[j]] for j in chosen),
        gains=tuple(gains),
        value=value,
        guarantee=GUARANTEE,
        bound=max(bound, value),
        optimum=_enumerated(kernel, min(count, len(order)), enumerate_limit),
        r_squared=r_squared(z[:, chosen] @ coefficients, target),
        gamma=_smallest_eigenvalue(z[:, scale > 0]),
    )


def calibrate(
    X: ArrayLike,
    y: ArrayLike,
    names: Sequence[str],
    count: int = 4,
    ridge: Sequence[float] = RIDGES,
    limit: float = LIMIT,
) -> Calibration:
    """Selects up to ``count`` factors from ``X`` ``[n, p]`` and fits ``y`` ``[n]`` to them.

    The strength of the ridge is the one of ``ridge`` with the least generalized cross-validation
    error. The intercept is the mean of ``y`` times ``n / (n + count + 1)``: the posterior mean
    under a normal prior at 0 that is worth an observation for each number fitted. With fewer than
    ``3 (count + 1)`` observations that shrunk mean is all there is.

    Raises:
        ValueError: names that do not fit, or a value that is not finite.
    """
    matrix, target = checked(X, y, names)
    n = len(target)
    intercept = float(target.sum()) / (n + count + 1)
    if n < 3 * (count + 1):
        return replace(IDENTITY, intercept=intercept, limit=limit, observations=n)
    certificate = select(matrix, target, names, count)
    columns = [list(names).index(name) for name in certificate.factors]
    z, mean, scale = standardized(matrix[:, columns])
    coefficients, strength = ridge_regression(z, target, ridge)
    return Calibration(
        certificate=replace(certificate, r_squared=r_squared(z @ coefficients, target)),
        names=certificate.factors,
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        coefficients=tuple(coefficients.tolist()),
        intercept=intercept,
        limit=limit,
        ridge=strength,
        observations=n,
    )


def _kernel(z: Floats, y: Floats) -> Floats:
    """``I + W^(1/2) C W^(1/2)`` of standardized columns."""
    target = standardized(y[:, None])[0][:, 0]
    n = max(len(y), 1)
    squared = np.minimum((z.T @ target / n) ** 2, MAX_RHO_SQUARED)
    root = np.sqrt(squared / (1 - squared))
    kernel: Floats = root[:, None] * (z.T @ z / n) * root + np.eye(len(root))
    return kernel


def _value(kernel: Floats, chosen: Sequence[int]) -> float:
    return 0.5 * float(np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1]) if chosen else 0.0


def _greedy(kernel: Floats, count: int) -> tuple[list[int], list[float], float]:
    """The chosen in order, their marginal values, and the least bound met on the way."""
    chosen: list[int] = []
    gains: list[float] = []
    rest = list(range(len(kernel)))
    bound = math.inf
    while True:
        value = _value(kernel, chosen)
        marginal = [max(_value(kernel, [*chosen, j]) - value, 0.0) for j in rest]
        bound = min(bound, value + math.fsum(sorted(marginal, reverse=True)[:count]))
        best = max(marginal, default=0.0)
        if len(chosen) == count or best <= _NOTHING:
            return chosen, gains, bound
        first = next(i for i, gain in enumerate(marginal) if gain >= best - _NOTHING)
        gains.append(marginal[first])
        chosen.append(rest.pop(first))


def _enumerated(kernel: Floats, count: int, limit: int) -> float | None:
    """The best value of any ``count`` columns; by monotony no smaller set is better."""
    if math.comb(len(kernel), count) > limit:
        return None
    best, sets = 0.0, combinations(range(len(kernel)), count)
    for batch in _batches(sets):
        index = np.array(batch, np.int64)
        values = np.linalg.slogdet(kernel[index[:, :, None], index[:, None, :]])[1]
        best = max(best, 0.5 * float(values.max()))
    return best


def _batches(sets: Iterator[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    while batch := list(islice(sets, _CHUNK)):
        yield batch


def _smallest_eigenvalue(z: Floats) -> float:
    if not z.shape[1]:
        return 1.0
    return min(max(float(np.linalg.eigvalsh(z.T @ z / len(z))[0]), 0.0), 1.0)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

"""How well the planner's predictions fit what was measured: correlation, bias, and a scatter plot.

Errors span orders of magnitude, so all of it is of their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stq_compile.planner.history import Comparison

SIZE, MARGIN = 300, 44
FEWEST = 3
"""Points that a correlation needs."""


@dataclass(frozen=True)
class Accuracy:
    """Of predicted (p) and measured (m) relative perturbations of an update.

    Attributes:
        count: comparisons.
        correlation: Pearson's, of log p and log m; NaN where one of them does not vary.
        bias: the geometric mean of p / m: above 1 where errors are overrated.
        spread: the factor of one standard deviation of p / m about that.
    """

    count: int
    correlation: float
    bias: float
    spread: float

    def __str__(self) -> str:
        return (
            f"predicted against measured errors, {self.count} comparisons: correlation "
            f"{self.correlation:.2f}, predictions {self.bias:.2f} times what was measured, within "
            f"a factor of {self.spread:.2f}"
        )


@dataclass(frozen=True)
class Scatter:
    """Points (x, y, comparison) and ticks (place, label) of a square plot, in pixels."""

    points: Sequence[tuple[float, float, Comparison]]
    ticks: Sequence[tuple[float, str]]

    size, margin = SIZE, MARGIN


def usable(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those that have logarithms."""
    return [c for c in comparisons if all(0 < v < math.inf for v in (c.predicted, c.measured))]


def accuracy_of(comparisons: Sequence[Comparison]) -> Accuracy | None:
    """None where there are too few."""
    found = usable(comparisons)
    if len(found) < FEWEST:
        return None
    predicted = np.log([c.predicted for c in found])
    measured = np.log([c.measured for c in found])
    difference = predicted - measured
    varies = float(predicted.std()) > 0 and float(measured.std()) > 0
    correlation = float(np.corrcoef(predicted, measured)[0, 1]) if varies else math.nan
    bias, spread = math.exp(float(difference.mean())), math.exp(float(difference.std()))
    return Accuracy(len(found), correlation, bias, spread)


def scatter(comparisons: Sequence[Comparison]) -> Scatter | None:
    """Measured to the right, predicted upwards, one decade as long on both axes."""
    found = usable(comparisons)
    if not found:
        return None
    logs = [math.log10(v) for c in found for v in (c.predicted, c.measured)]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    def place(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return round(MARGIN + share * (SIZE - 2 * MARGIN), 2)

    return Scatter(
        [(place(c.measured), SIZE - place(c.predicted), c) for c in found],
        [(place(10.0**e), f"1e{e}") for e in range(low, high + 1)],
    )

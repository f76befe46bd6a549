"""A line chart as numbers for a template: scaled points and round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
POINTS = 600
"""Points of a line at most; a longer one is thinned."""


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One line over steps. ``points`` are (x, y, step, value) in pixels and data."""

    title: str
    unit: str
    points: Sequence[tuple[float, float, int, float]]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in self.points)


def line_chart(
    title: str,
    unit: str,
    line: Sequence[tuple[int, float]],
    *,
    end: int,
    steps: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """A chart of a line of (step, value); None without a finite value.

    Args:
        end: last step of the axis.
        steps: a value holds until the next one, to ``end``.
        from_zero: the axis begins at zero.
    """
    known = [(s, v) for s, v in line if math.isfinite(v)]
    if not known:
        return None
    known = known[:: -(-len(known) // POINTS)] + ([known[-1]] if len(known) > POINTS else [])
    if steps:
        known = _staircase(known, end)
    values = [v for _, v in known]
    y_ticks = _ticks(0.0 if from_zero else min(values), max(values))
    low, high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))
    start, stop = known[0][0], max(end, known[-1][0], known[0][0] + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - start) / (stop - start) * (WIDTH - LEFT - RIGHT), 2)

    def y(value: float) -> float:
        span = (high - low) or 1.0
        return round(HEIGHT - BOTTOM - (value - low) / span * (HEIGHT - TOP - BOTTOM), 2)

    return Chart(
        title,
        unit,
        [(x(s), y(v), s, v) for s, v in known],
        [Tick(x(t), f"{t:g}") for t in _ticks(start, stop) if start <= t <= stop],
        [Tick(y(t), f"{t:g}") for t in y_ticks],
    )


def _staircase(line: Sequence[tuple[int, float]], end: int) -> list[tuple[int, float]]:
    corners: list[tuple[int, float]] = []
    for step, value in line:
        if corners:
            corners.append((step, corners[-1][1]))
        corners.append((step, value))
    return [*corners, (max(end, corners[-1][0]), corners[-1][1])]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers around a range."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]

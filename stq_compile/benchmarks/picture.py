"""A picture of a benchmark: time per parameter of every contender, beside the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stq_compile.benchmarks.measure import Timing

OURS, OTHERS, REFERENCE = "#1f77b4", "#b0b0b0", "#d62728"


def draw(title: str, timings: Sequence[Timing], path: Path) -> None:
    """Bars with quartiles, the reference as a line. Needs matplotlib (``pip install .[bench]``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.45 * len(timings) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = [t.name for t in timings]
    errors = [[t.ns - t.low for t in timings], [t.high - t.ns for t in timings]]
    colors = [OURS if t.name.startswith("stq") else OTHERS for t in timings]
    axes.barh(names, [t.ns for t in timings], xerr=errors, color=colors, ecolor="#404040")
    axes.axvline(timings[0].ns, color=REFERENCE, linewidth=1)
    longest = max(t.high for t in timings)
    for row, timing in enumerate(timings):
        axes.text(timing.high + 0.01 * longest, row, f"{timing.ratio:.2f}×", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("nanoseconds per parameter and step")
    axes.set_title(title)
    figure.savefig(path, dpi=120)

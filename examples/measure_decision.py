"""What a decision costs: time against the number of states and of widths.

    python examples/measure_decision.py

States are those of a network with tensors of many sizes; the budget is what 4 bits would take. The
reference is an exhaustive search over all combinations, as far as it ends. Times are CPU time, the
least of several runs. Prints a table and saves a picture with two logarithmic axes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from stq_compile.formats import choose_format
from stq_compile.planner.decision import LADDER, StateCosts, decide_budget, exhaustive

mpl.use("Agg")  # no display is needed

COUNTS = (1, 3, 10, 30, 100, 300, 1000, 2000, 5000, 20_000)
COLORS = {0: "#d9730d", 8: "#1f4e79", 4: "#3d8b9e", 2: "#8fb8a8"}
LARGEST_SEARCH = 8  # states


def states(count: int, widths: tuple[int, ...]) -> list[StateCosts]:
    """Tensors of 4 thousand to 4 million elements; errors that fall as 4^-b and as 2^-b."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        numel, scale = int(2 ** rng.uniform(12, 22)), 10 ** rng.uniform(-4, 0)
        second = bool(number % 2)
        formats = [choose_format(w, nonnegative=second, normalizable=False) for w in widths]
        error = tuple(float(scale * (2.0 if second else 4.0) ** -w) for w in widths)
        nbytes = tuple(f.nbytes(numel) for f in formats)
        made.append(StateCosts((number // 2, "mv"[second]), widths, nbytes, error))
    return made


def budget(listed: list[StateCosts]) -> int:
    """The bytes of 4 bits in every state."""
    return sum(s.nbytes[s.widths.index(4)] for s in listed)


def seconds(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def decision_times(widths: tuple[int, ...]) -> list[tuple[int, float]]:
    """Seconds of a decision for each number of states."""
    points = []
    for count in COUNTS:
        work = partial(decide_budget, listed := states(count, widths), budget(listed))
        points.append((count, seconds(work, runs=20 if count <= 1000 else 5)))
    return points


def search_times(widths: tuple[int, ...]) -> list[tuple[int, float, float]]:
    """Seconds of the search for each number of states, and how far above it the decision is."""
    points = []
    for count in range(1, LARGEST_SEARCH + 1):
        limit = budget(listed := states(count, widths))
        taken = seconds(partial(exhaustive, listed, limit), runs=3)
        gap = decide_budget(listed, limit).error / exhaustive(listed, limit).error - 1
        points.append((count, taken, gap))
    return points


def draw(
    decisions: dict[int, list[tuple[int, float]]], search: list[tuple[int, float, float]]
) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    times = [p[1] * 1e3 for p in search]
    label = "exhaustive search, 8 widths"
    axes.loglog([p[0] for p in search], times, "s--", color=COLORS[0], label=label)
    for widths, points in decisions.items():
        label, times = f"decision, {widths} widths", [t * 1e3 for _, t in points]
        axes.loglog([n for n, _ in points], times, "o-", color=COLORS[widths], label=label)
    axes.set_xlabel("states (tensors × states of each)")
    axes.set_ylabel("CPU time (ms)")
    axes.set_title("One decision for all states, against trying all combinations")
    axes.grid(color="#d0d0d0", linewidth=0.6)
    axes.legend(frameon=False)
    return figure


def main(out: Annotated[Path, typer.Option(help="where the picture goes")] = Path("out")) -> None:
    """Measure, print and draw."""
    decisions = {n: decision_times(w) for n, w in ((8, LADDER), (4, LADDER[1:5]), (2, (3, 4)))}
    search = search_times(LADDER)
    table = Table(title="CPU time of one decision, ms")
    for heading in ("states", *(f"{n} widths" for n in decisions), "search", "error above it"):
        table.add_column(heading, justify="right")
    for count, taken, gap in search:
        table.add_row(str(count), *[""] * len(decisions), f"{taken * 1e3:.2f}", f"{gap:.1%}")
    for row, count in enumerate(COUNTS):
        cells = [f"{points[row][1] * 1e3:.2f}" for points in decisions.values()]
        table.add_row(f"{count:,}", *cells, "", "")
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    draw(decisions, search).savefig(out / "decision_cost.png")
    Console().print(f"saved {out / 'decision_cost.png'}")


if __name__ == "__main__":
    typer.run(main)

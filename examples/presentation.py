"""Shows a comparison: a table (for a terminal or in Markdown), a picture of the curves, JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from comparison import Comparison, Row, Settings
from runs import Run

mpl.use("Agg")  # no display is needed

FP32_COLOR = "#1f4e79"
COLORS = ("#d9730d", "#2a7f3f", "#8e44ad", "#b03a2e", "#117a8b", "#7f6000")
GRID_COLOR = "#d0d0d0"


def results_table(comparison: Comparison) -> Table:
    """One row for each variant; with several seeds mean ± standard deviation."""
    headings, rows = _cells(comparison)
    table = Table(title=f"{comparison.optimizer}: {comparison.title}")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(comparison: Comparison) -> str:
    """The same table, to paste into a document."""
    headings, rows = _cells(comparison)
    lines = [[heading.replace("\n", " ") for heading in headings], ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings, and the rows below them, without columns that are empty in every row."""
    measures = [name for name in comparison.rows[0].runs[0].results if name != "loss"]
    headings = [
        "states",
        f"validation loss\n({comparison.unit})",
        "difference\nto fp32",
        "in σ of\nfp32 seeds",
        *(f"validation\n{name}" for name in measures),
        "true bits\nat the end",
        "at\nmost",
        "saved",
        "step in ms,\nmedian (mean)",
        "first\nstep (s)",
        "width\nchanges",
    ]
    rows = [_row_cells(comparison, row, measures) for row in comparison.rows]
    if comparison.fused_step_ms is not None:
        fused = ["fp32, fused=True", *[""] * (len(headings) - 1)]
        fused[headings.index("step in ms,\nmedian (mean)")] = f"{comparison.fused_step_ms:.2f}"
        rows.append(fused)
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _row_cells(comparison: Comparison, row: Row, measures: Sequence[str]) -> list[str]:
    runs = row.runs
    sizes = [run.size for run in runs if run.size is not None]
    median = statistics.median(run.step_ms for run in runs)
    mean = statistics.fmean(run.mean_step_ms for run in runs)
    return [
        row.variant.label,
        _mean_and_spread([run.valid_loss for run in runs]),
        *_difference_cells(comparison.fp32, row),
        *(_mean_and_spread([run.results[name] for run in runs], digits=2) for name in measures),
        f"{statistics.fmean(size.bits_per_element for size in sizes):.2f}",
        f"{max(run.most_bits for run in runs):.2f}",
        f"{statistics.fmean(size.saved for size in sizes):.1%}",
        f"{median:.2f} ({mean:.2f})",
        f"{statistics.median(run.step_seconds[0] for run in runs):.2f}",
        f"{statistics.fmean(run.transitions for run in runs):.0f}",
    ]


def _difference_cells(fp32: Row | None, row: Row) -> tuple[str, str]:
    """Validation loss minus that of fp32, seed by seed; and its mean in deviations of fp32's."""
    if fp32 is None or row is fp32:
        return "", ""
    losses = {run.seed: run.valid_loss for run in fp32.runs}
    gaps = [run.valid_loss - losses[run.seed] for run in row.runs if run.seed in losses]
    spread = statistics.stdev(losses.values()) if len(losses) > 1 else 0.0
    in_spreads = f"{statistics.fmean(gaps) / spread:+.2f}" if spread else ""
    return _mean_and_spread(gaps, sign="+"), in_spreads


def save_results(comparison: Comparison, settings: Settings, file: Path) -> None:
    """Everything that was measured, as JSON."""
    content = {"settings": asdict(settings), **asdict(comparison)}
    file.write_text(json.dumps(content, indent=1))


def save_picture(comparison: Comparison, file: Path) -> None:
    """The loss curves, and below them how far each is from the fp32 one of its seed."""
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained", facecolor="white")
    losses, difference = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    fp32, packed = comparison.fp32, [r for r in comparison.rows if r is not comparison.fp32]
    if fp32 is not None:
        _draw_losses(losses, fp32, FP32_COLOR, "-", "fp32 states")
    for i, row in enumerate(packed):
        color = COLORS[i % len(COLORS)]
        _draw_losses(losses, row, color, "--", row.variant.label)
        if fp32 is not None:
            _draw_differences(difference, fp32, row, color, row.variant.label)
    losses.set_title(f"{comparison.optimizer}: {comparison.title}")
    losses.set_ylabel(f"loss ({comparison.unit}), log scale")
    losses.set_yscale("log")
    losses.yaxis.set_major_formatter("{x:.1f}")
    losses.yaxis.set_minor_formatter("{x:.1f}")
    losses.legend(frameon=False, title="training (lines), validation (marks)")
    difference.axhline(0, color="black", linewidth=0.8)
    difference.set_ylabel(f"packed − fp32\n({comparison.unit})")
    difference.set_xlabel("step")
    for axes in (losses, difference):
        axes.grid(color=GRID_COLOR, linewidth=0.6, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _draw_losses(axes: Axes, row: Row, color: str, style: str, label: str) -> None:
    """The smoothed training losses as lines, the validation losses as points."""
    for run in row.runs:
        smooth = _smooth(run.train_losses)
        shown = label if run is row.runs[0] else None
        axes.plot(range(1, len(smooth) + 1), smooth, style, color=color, linewidth=1.4, label=shown)
        marker = "o" if style == "-" else "x"
        axes.plot(*_points(run), marker, color=color, markersize=6, mew=1.6)


def _draw_differences(axes: Axes, fp32: Row, row: Row, color: str, label: str) -> None:
    for base, run in zip(fp32.runs, row.runs, strict=False):
        gaps = [b - a for a, b in zip(base.train_losses, run.train_losses, strict=True)]
        axes.plot(range(1, len(gaps) + 1), _smooth(gaps), color=color, linewidth=0.8, alpha=0.6)
        steps, values = _points(run)
        valid = [b - a for a, b in zip(_points(base)[1], values, strict=True)]
        axes.plot(steps, valid, "o", color=color, markersize=5)


def _points(run: Run) -> tuple[list[int], list[float]]:
    return [step for step, _ in run.valid_losses], [loss for _, loss in run.valid_losses]


def _smooth(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average, with the bias correction of Adam."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth


def _mean_and_spread(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"

"""Shows a comparison: a table, a picture of the loss curves, a JSON file."""

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

from comparison import Comparison, Run, Settings

mpl.use("Agg")  # no display is needed

FP32_COLOR = "#1f4e79"
PACKED_COLOR = "#d9730d"
GRID_COLOR = "#d0d0d0"


def results_table(comparison: Comparison) -> Table:
    """One row for each kind of state; with several seeds mean ± standard deviation."""
    table = Table(title=comparison.title)
    table.add_column("states")
    for heading in (
        f"validation loss\n({comparison.unit})",
        "state\nbytes",
        "true bits\nper element",
        "saved",
        "optimizer ms\nper step (median)",
        "first\nstep (s)",
    ):
        table.add_column(heading, justify="right")
    for runs in (comparison.fp32, comparison.packed):
        size = runs[0].size
        assert size is not None, "a run was not finished"
        table.add_row(
            f"{comparison.optimizer} {runs[0].label}",
            _mean_and_spread([run.valid_loss for run in runs]),
            f"{size.state_bytes:,}",
            f"{size.bits_per_element:.2f}",
            f"{size.saved:.1%}",
            f"{statistics.median(run.step_ms for run in runs):.2f}",
            f"{statistics.median(run.step_seconds[0] for run in runs):.2f}",
        )
    if comparison.fused_step_ms is not None:
        fused = f"{comparison.fused_step_ms:.2f}"
        table.add_row(f"{comparison.optimizer} fp32, fused=True", "", "", "", "", fused, "")
    return table


def loss_difference(comparison: Comparison) -> str:
    """The validation loss of packed minus fp32, paired by seed."""
    return _mean_and_spread(
        [packed.valid_loss - fp32.valid_loss for fp32, packed in _pairs(comparison)], sign="+"
    )


def save_results(comparison: Comparison, settings: Settings, file: Path) -> None:
    """Everything that was measured, as JSON."""
    content = {"settings": asdict(settings), **asdict(comparison)}
    file.write_text(json.dumps(content, indent=1))


def save_picture(comparison: Comparison, file: Path) -> None:
    """Both loss curves, and below them how far the packed one is from the fp32 one."""
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained", facecolor="white")
    losses, difference = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    for fp32, packed in _pairs(comparison):
        first = fp32 is comparison.fp32[0]
        _draw_losses(losses, fp32, FP32_COLOR, "-", f"{fp32.label} states" if first else None)
        _draw_losses(losses, packed, PACKED_COLOR, "--", packed.label if first else None)
        _draw_difference(difference, fp32, packed, first)
    losses.set_title(comparison.title)
    losses.set_ylabel(f"loss ({comparison.unit}), log scale")
    losses.set_yscale("log")
    losses.yaxis.set_major_formatter("{x:.1f}")
    losses.yaxis.set_minor_formatter("{x:.1f}")
    losses.legend(frameon=False)
    difference.axhline(0, color="black", linewidth=0.8)
    difference.set_ylabel(f"packed − fp32\n({comparison.unit})")
    difference.set_xlabel("step")
    difference.legend(frameon=False, loc="upper right", ncols=2)
    for axes in (losses, difference):
        axes.grid(color=GRID_COLOR, linewidth=0.6, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _draw_losses(axes: Axes, run: Run, color: str, style: str, label: str | None) -> None:
    """The smoothed training loss as a line, the validation losses as points."""
    smooth = _smooth(run.train_losses)
    axes.plot(range(1, len(smooth) + 1), smooth, style, color=color, linewidth=1.4, label=label)
    steps, values = zip(*run.valid_losses, strict=True)
    marker = "o" if style == "-" else "x"
    label = label and "its validation loss"
    axes.plot(steps, values, marker, color=color, markersize=6, label=label, mew=1.6)


def _draw_difference(axes: Axes, fp32: Run, packed: Run, labelled: bool) -> None:
    gaps = _smooth([b - a for a, b in zip(fp32.train_losses, packed.train_losses, strict=True)])
    label = "training loss, smoothed" if labelled else None
    axes.plot(range(1, len(gaps) + 1), gaps, color="#777777", linewidth=1, label=label)
    steps = [step for step, _ in fp32.valid_losses]
    values = [b - a for (_, a), (_, b) in zip(fp32.valid_losses, packed.valid_losses, strict=True)]
    label = "validation loss" if labelled else None
    axes.plot(steps, values, "o", color=PACKED_COLOR, markersize=6, label=label)


def _smooth(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average, with the bias correction of Adam."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth


def _pairs(comparison: Comparison) -> list[tuple[Run, Run]]:
    return list(zip(comparison.fp32, comparison.packed, strict=True))


def _mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"

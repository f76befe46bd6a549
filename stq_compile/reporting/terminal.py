"""A run in the terminal: totals, and widths by layer and step as a heat map."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from stq_compile.reporting.accuracy import accuracy_of
from stq_compile.reporting.run_file import Run
from stq_compile.reporting.timeline import Timeline, layers_of, timeline_of

SHADES = ((2, 252), (3, 153), (4, 117), (5, 75), (6, 33), (8, 26), (16, 19), (32, 17))
"""From a mean width on, the colour behind it (of the 256 of a terminal): more bits, more ink."""
CELL = 5
NAME = 24


class RunView:
    """Prints as what happened in a run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run = self.run
        title = Text(f" after {run.steps} steps: {summary(run)}")
        yield Text(run.optimizer, style="bold") + title
        if run.losses:
            (first, start), (last, end) = run.losses[0], run.losses[-1]
            yield f"loss {start:.4g} at step {first}, {end:.4g} at step {last}"
        for incident in run.incidents[-8:]:
            yield Text(str(incident), style="bold red")
        accuracy = accuracy_of(run.comparisons)
        if accuracy is not None:
            yield Text(str(accuracy))
        columns = max(2, (options.max_width - NAME - 2) // CELL)
        timeline = timeline_of(run, columns)
        for state in timeline.states:
            yield Text()
            yield _heat_map(timeline, state)
        if run.decisions:
            yield Text()
            yield _last_changes(run)


def summary(run: Run) -> str:
    """``4.2 MB instead of 38 MB: 3.61 true bits per element``."""
    packed, full = (sum(getattr(r, n) for r in run.rows) for n in ("bytes", "fp32_bytes"))
    if not full:
        return "no states"
    changes = sum(c.before is not None for d in run.decisions for c in d.changes)
    return (
        f"{packed / 1e6:.2f} MB of states instead of {full / 1e6:.2f} MB, "
        f"{32 * packed / full:.2f} true bits per element, {changes} changes of width"
    )


def _heat_map(timeline: Timeline, state: str) -> Text:
    """One line a layer, one cell a step of note."""
    text = Text(f"{state}: bits by layer, from step\n", no_wrap=True)
    text.append(" " * NAME)
    for step in timeline.steps:
        text.append(_step(step).rjust(CELL), style="dim")
    for layer in layers_of(timeline.of(state)):
        text.append("\n" + _shortened(layer.name).ljust(NAME))
        for bits in layer.bits:
            shade = max((s for s in SHADES if s[0] <= bits + 0.5), default=SHADES[0])
            ink = "black" if shade[0] < 6 else "white"
            style = Style(color=ink, bgcolor=f"color({shade[1]})")
            text.append(f"{bits:.3g}".rjust(CELL - 1) + " ", style=style)
    return text


def _step(step: int) -> str:
    return str(step) if step < 10_000 else f"{step / 1000:.0f}k"


def _shortened(name: str) -> str:
    return name if len(name) < NAME else "…" + name[-(NAME - 2) :]


def _last_changes(run: Run) -> Table:
    table = Table(title="last changes of width")
    table.add_column("step", justify="right")
    table.add_column("state", overflow="fold")
    table.add_column("bits", no_wrap=True)
    table.add_column("reason", overflow="fold")
    found = [
        (record.step, change)
        for record in run.decisions
        for change in record.changes
        if change.before is not None
    ]
    for step, change in found[-8:]:
        name = f"{change.param}:{change.state}"
        table.add_row(
            str(step), Text(name), f"{change.before} → {change.after}", Text(change.reason)
        )
    if not found:
        table.add_row("", "none yet", "", "")
    return table

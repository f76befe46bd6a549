"""A run as one HTML page that needs nothing else: no network, no library, light and dark.

All text goes through Jinja's escaping, the data of the scripts through its JSON filter (which
escapes ``<``), and a content security policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from stq_compile.formats import WIDTHS
from stq_compile.reporting.accuracy import accuracy_of, scatter
from stq_compile.reporting.chart import Chart, line_chart
from stq_compile.reporting.picture import HEIGHT, Picture, draw
from stq_compile.reporting.run_file import Run
from stq_compile.reporting.timeline import Lane, Timeline, layer_of, timeline_of

CELLS = 40_000
"""Cells of a page at most: beyond it, columns are merged."""
CELL_HEIGHT = 15
LABEL = 240
SPACE = 900
"""Pixels for the cells of a row."""


@dataclass(frozen=True)
class MapRow:
    """One lane of a heat map: its number in the page's data, and where it is drawn."""

    index: int
    lane: Lane
    y: int
    label: str


@dataclass(frozen=True)
class HeatMap:
    """All lanes of one state."""

    state: str
    rows: tuple[MapRow, ...]
    steps: tuple[int, ...]
    cell: float
    height: int

    @property
    def width(self) -> int:
        return round(LABEL + self.cell * len(self.steps) + 10)

    def x(self, column: int) -> float:
        return round(LABEL + self.cell * column, 1)

    @property
    def labelled(self) -> list[int]:
        """Columns whose step is written: as many as have room."""
        every = max(1, -(-44 // int(self.cell)))
        return list(range(0, len(self.steps), every))


@dataclass(frozen=True)
class Drawing:
    """A step graph before and after formats."""

    title: str
    before: Picture
    after: Picture | None
    after_title: str


def render(run: Run) -> str:
    """The page of a run."""
    columns = max(10, CELLS // max(1, len(run.rows)))
    timeline = timeline_of(run, min(columns, 100))
    packed, full = (sum(getattr(r, n) for r in run.rows) for n in ("bytes", "fp32_bytes"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text())
    return template.render(
        run=run,
        bits=32 * packed / full if full else 0.0,
        packed=packed,
        full=full,
        parameters=len({row.param for row in run.rows}),
        charts=_charts(run, full),
        accuracy=accuracy_of(run.comparisons),
        scatter=scatter(run.comparisons),
        widths=WIDTHS,
        maps=list(_maps(timeline)),
        changes=[
            (record.step, change)
            for record in run.decisions
            for change in record.changes
            if change.before is not None
        ],
        drawings=list(_drawings(run)),
        box_height=HEIGHT,
        cell_height=CELL_HEIGHT,
        data=_data(timeline),
    )


def _charts(run: Run, full: int) -> list[Chart]:
    bits = [(d.step, d.bits) for d in run.decisions]
    if not bits and full:
        bits = [(0, 32 * sum(r.bytes for r in run.rows) / full)]
    megabytes = [(step, b / 32 * full / 1e6) for step, b in bits]
    lines = [
        line_chart("loss", "", run.losses, end=run.steps),
        line_chart("true bits per element", "", bits, end=run.steps, steps=True, from_zero=True),
        line_chart("state memory", "MB", megabytes, end=run.steps, steps=True, from_zero=True),
    ]
    return [chart for chart in lines if chart is not None]


def _maps(timeline: Timeline) -> Iterator[HeatMap]:
    number = {(lane.param, lane.state): i for i, lane in enumerate(timeline.lanes)}
    cell = min(46.0, max(9.0, SPACE / len(timeline.steps)))
    for state in timeline.states:
        rows, y, layer = [], 0, ""
        for lane in timeline.of(state):
            if layer and layer_of(lane.param) != layer:
                y += 4
            layer = layer_of(lane.param)
            index = number[lane.param, lane.state]
            rows.append(MapRow(index, lane, y, _shortened(lane.param)))
            y += CELL_HEIGHT
        yield HeatMap(state, tuple(rows), timeline.steps, cell, y + 22)


def _shortened(name: str) -> str:
    return name if len(name) <= 36 else "…" + name[-35:]


def _drawings(run: Run) -> Iterator[Drawing]:
    """Every template, with the kernel of most elements for what became of it."""
    for template in run.templates:
        kernels = [k for k in run.kernels if k.template == template.name]
        best = max(kernels, key=lambda k: k.elements, default=None)
        yield Drawing(
            f"{template.name}: {template.tensors} tensors",
            draw(template.graph),
            None if best is None else draw(best.graph),
            "" if best is None else f"{best.name}: {best.tensors} tensors",
        )


def _data(timeline: Timeline) -> Mapping[str, Any]:
    """What the page's script shows of a cell."""
    transitions = {
        f"{i},{column}": [{"step": t.step, **asdict(t.change)} for t in cell.transitions]
        for i, lane in enumerate(timeline.lanes)
        for column, cell in enumerate(lane.cells)
        if cell.transitions
    }
    lanes = [
        {"param": lane.param, "state": lane.state, "elements": lane.elements,
         "widths": [cell.width for cell in lane.cells]}
        for lane in timeline.lanes
    ]  # fmt: skip
    return {"steps": list(timeline.steps), "lanes": lanes, "transitions": transitions}

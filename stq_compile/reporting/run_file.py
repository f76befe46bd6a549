"""A run in a file: JSON lines, one event each, written at once or while the run goes on.

    {"kind": "run", "version": 1, "optimizer": "AdamW", "options": {...}, ...}
    {"kind": "template", ...}   a step graph before formats
    {"kind": "kernel", ...}     one kernel, with its graph and source
    {"kind": "states", ...}     what every state occupies after a number of steps
    {"kind": "decision", ...}   a `planner.history.Record`
    {"kind": "comparison", ...} a `planner.history.Comparison`
    {"kind": "incident", ...}   a `planner.history.Incident`
    {"kind": "loss", "step": 10, "loss": 4.2}

A later event of the same name replaces an earlier one; a last line that is cut short, as a killed
run leaves it, is ignored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stq_compile.errors import RunFileError
from stq_compile.planner.history import Comparison, History, Incident, Record
from stq_compile.printable import all_printable
from stq_compile.reporting.graph_data import GraphData

VERSION = 1
Event = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One state of one parameter. ``bytes`` counts codes and scales.

    A sharded state is counted as a whole, over all shards of one copy; ``split_bytes`` of its bytes
    would not be there if no border between shards lay inside of a block. ``nonfinite`` counts the
    elements of this process that are not finite any more, and those of their blocks.
    """

    param: str
    state: str
    shape: tuple[int, ...]
    format: str
    width: int
    bytes: int
    fp32_bytes: int
    reason: str = ""
    split_bytes: int = 0
    nonfinite: int = 0


@dataclass(frozen=True)
class Template:
    """A step graph before formats."""

    name: str
    tensors: int
    text: str
    graph: GraphData


@dataclass(frozen=True)
class KernelInfo:
    """A kernel that ran, and the graph that it was made of."""

    name: str
    template: str
    tensors: int
    elements: int
    bytes_per_param: float
    source: str
    text: str
    graph: GraphData


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run."""

    optimizer: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    steps: int = 0
    rows: tuple[Row, ...] = ()
    decisions: tuple[Record, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    incidents: tuple[Incident, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    templates: tuple[Template, ...] = ()
    kernels: tuple[KernelInfo, ...] = ()


def events_of(run: Run) -> Iterator[Event]:
    """A whole run as events."""
    yield head_event(run)
    yield from (template_event(t) for t in run.templates)
    yield from (kernel_event(k) for k in run.kernels)
    yield states_event(run)
    yield from (decision_event(d) for d in run.decisions)
    yield from map(incident_event, run.incidents)
    yield from map(comparison_event, run.comparisons)
    yield from (loss_event(*point) for point in run.losses)


def head_event(run: Run) -> Event:
    return {
        "kind": "run",
        "version": VERSION,
        "optimizer": run.optimizer,
        "options": dict(run.options),
        "versions": dict(run.versions),
    }


def template_event(template: Template) -> Event:
    return {"kind": "template", **asdict(template)}


def kernel_event(kernel: KernelInfo) -> Event:
    return {"kind": "kernel", **asdict(kernel)}


def states_event(run: Run) -> Event:
    return {"kind": "states", "steps": run.steps, "rows": [asdict(row) for row in run.rows]}


def decision_event(record: Record) -> Event:
    return {"kind": "decision", **asdict(record)}


def incident_event(incident: Incident) -> Event:
    return {"kind": "incident", **asdict(incident)}


def comparison_event(comparison: Comparison) -> Event:
    return {"kind": "comparison", **asdict(comparison)}


def loss_event(step: int, loss: float) -> Event:
    """JSON has no NaN: a loss that is not finite is null."""
    return {"kind": "loss", "step": step, "loss": loss if math.isfinite(loss) else None}


def line_of(event: Event) -> str:
    return json.dumps(event, allow_nan=False) + "\n"


def save(run: Run, path: Path) -> None:
    """Write a whole run; the file is complete or as it was before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x") as file:  # a new file: nobody's link is followed
            file.writelines(map(line_of, events_of(run)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Run:
    """Read a run. It may be another's: nothing in it is executed, and its texts are `printable`.

    Raises:
        RunFileError: the file cannot be read or is no run; the line is named.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(file=path, line=1, reason=f"not readable: {error}") from error
    reader = _Reader()
    for number, line in enumerate(lines, 1):
        try:
            event = all_printable(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and number > 1 and not line.endswith("\n"):
                break
            raise RunFileError(file=path, line=number, reason=f"no JSON: {error}") from error
        try:
            reader.take(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"not as expected: {type(error).__name__}: {error}"
            raise RunFileError(file=path, line=number, reason=reason) from error
    if reader.run is None:
        raise RunFileError(file=path, line=1, reason="the file is empty")
    return replace(
        reader.run,
        decisions=tuple(reader.decisions),
        losses=tuple(reader.losses),
        incidents=tuple(reader.incidents),
        comparisons=tuple(reader.comparisons),
        steps=max(reader.run.steps, reader.steps),
    )


class _Reader:
    """A run out of its events; what has no bound in number is gathered aside."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.decisions: list[Record] = []
        self.losses: list[tuple[int, float]] = []
        self.incidents: list[Incident] = []
        self.comparisons: list[Comparison] = []
        self.steps = 0

    def take(self, event: Event) -> None:
        fields = dict(event)
        kind = fields.pop("kind")
        if kind == "run":
            if fields.pop("version") != VERSION:
                raise ValueError(f"version {event['version']}; this release reads {VERSION}")
            self.run, self.steps = Run(**fields), 0  # a second one begins anew
            self.decisions, self.losses = [], []
            self.incidents, self.comparisons = [], []
            return
        run = self.run
        if run is None:
            raise ValueError("the first line is no 'run' event")
        match kind:
            case "template":
                self.run = replace(run, templates=_named(run.templates, Template(**fields)))
            case "kernel":
                self.run = replace(run, kernels=_named(run.kernels, KernelInfo(**fields)))
            case "states":
                rows = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in fields["rows"])
                self.run = replace(run, rows=rows)
                self.steps = max(self.steps, int(fields["steps"]))
            case "decision":
                (record,) = History.from_dict([fields])
                self.decisions.append(record)
                self.steps = max(self.steps, record.step)
            case "incident":
                fields["params"] = tuple(map(str, fields["params"]))
                self.incidents.append(Incident(**fields))
            case "comparison":
                self.comparisons.append(Comparison(**fields))
            case "loss":
                step = int(fields["step"])
                loss = math.nan if fields["loss"] is None else float(fields["loss"])
                self.losses.append((step, loss))
                self.steps = max(self.steps, step)
            case _:
                raise ValueError(f"an event of unknown kind {kind!r}")


def _named(known: tuple[Any, ...], new: Any) -> tuple[Any, ...]:
    return (*(k for k in known if k.name != new.name), new)

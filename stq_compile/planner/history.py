"""What the planner decided, when and why: ``stq.history(optimizer)``."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

LIMIT = 1000
"""Decisions that are kept; the oldest go first."""


@dataclass(frozen=True)
class Change:
    """One state that was given another width, and the reason.

    Errors are predicted relative perturbations of the parameter's own update. ``alternatives`` are
    (width, error, bytes) of every width that was allowed; ``factors`` what was measured.
    """

    param: str
    state: str
    before: int | None  # None: the first plan
    after: int
    error: float
    reason: str
    alternatives: tuple[tuple[int, float, int], ...] = ()
    factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Incident:
    """Something that was not finite: gradients before step number ``step`` (from 1), whose step was
    ``"skipped"`` or ``"raised"``, or states after it, which such a gradient had ``"reached"``.
    """

    step: int
    outcome: str
    params: tuple[str, ...]

    def __str__(self) -> str:
        first = ", ".join(self.params[:3]) + (", ..." if len(self.params) > 3 else "")
        what = "states" if self.outcome == "reached" else "gradients"
        return f"step {self.step} {self.outcome}: {what} of {first} not finite"


@dataclass(frozen=True)
class Comparison:
    """What was predicted of a state at the width in force, and what was measured directly.

    Both are relative perturbations of the parameter's update, at the look that follows ``step``
    steps. The prediction had not seen this measurement.
    """

    step: int
    param: str
    state: str
    width: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Record:
    """One decision.

    ``error`` is the total predicted error that was decided for (elementwise mean over parameters,
    see `Planner`), ``bits`` the true bits per element after it, ``price`` the multiplier.
    """

    step: int
    mode: str  # "prior", "tolerance", "budget"
    error: float
    bits: float
    price: float
    calibration: str
    changes: tuple[Change, ...]


class History:
    """All decisions and incidents, oldest first; prints as a table."""

    def __init__(self, records: Iterable[Record] = (), incidents: Iterable[Incident] = ()) -> None:
        self._records: deque[Record] = deque(records, maxlen=LIMIT)
        self.incidents = tuple(incidents)

    def add(self, record: Record) -> None:
        self._records.append(record)

    def __copy__(self) -> History:
        return History(self._records)

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain types, for JSON and checkpoints."""
        return [asdict(record) for record in self._records]

    @classmethod
    def from_dict(cls, rows: list[dict[str, Any]]) -> History:
        """The inverse of `to_dict`."""
        return cls(
            Record(**{**row, "changes": tuple(_change(c) for c in row["changes"])}) for row in rows
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="decisions on widths")
        for name in ("step", "mode"):
            table.add_column(name)
        for name in ("predicted error", "true bits", "changes"):
            table.add_column(name, justify="right")
        table.add_column("for example")
        for record in self._records:
            table.add_row(
                str(record.step),
                record.mode,
                f"{record.error:.3g}",
                f"{record.bits:.2f}",
                str(len(record.changes)),
                "" if not record.changes else _example(record.changes),
            )
        yield table
        yield from map(str, self.incidents)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self)
        text = console.file
        assert isinstance(text, io.StringIO)
        return text.getvalue()


def _change(row: dict[str, Any]) -> Change:
    alternatives = tuple((int(w), float(e), int(b)) for w, e, b in row["alternatives"])
    return Change(**{**row, "alternatives": alternatives})


def _example(changes: tuple[Change, ...]) -> str:
    """The change of the state with the largest error."""
    change = max(changes, key=lambda c: c.error)
    before = "new" if change.before is None else str(change.before)
    return f"{change.param}:{change.state} {before} -> {change.after}: {change.reason}"

"""What the states occupy: rows, totals, and a rich table when printed."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from stq_compile.reporting import run_file
from stq_compile.reporting.run_file import Row, Run
from stq_compile.reporting.snapshot import run_of
from stq_compile.session import Session

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Report:
    """All states, and their totals in true bits: everything that they occupy is counted.

    ``reencoded`` names the states that the last checkpoint held for another sharding, whose blocks
    were not those of this one. ``look_bytes`` is what this process gave to be added up at the
    planner's last look; none where nothing is sharded. ``nonfinite_steps`` were skipped, or ended
    in an error, by the option ``on_nonfinite``.
    """

    optimizer: str
    rows: tuple[Row, ...]
    transitions: int
    compiles: int
    run: Run = field(repr=False)
    look_bytes: int = 0
    reencoded: tuple[str, ...] = ()
    note: str = ""
    nonfinite_steps: int = 0

    def save(self, path: str | Path) -> None:
        """Write the run so far as JSON lines, which ``stq report`` shows."""
        run_file.save(self.run, Path(path))

    @property
    def state_bytes(self) -> int:
        """Bytes of all states: codes, scales, and what is left in float32."""
        return sum(row.bytes for row in self.rows)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the same states in float32."""
        return sum(row.fp32_bytes for row in self.rows)

    @property
    def bits_per_element(self) -> float:
        """True bits per element: 8 * state_bytes / elements of the states in float32 training."""
        return 32 * self.state_bytes / self.fp32_bytes if self.fp32_bytes else 0.0

    @property
    def split_bytes(self) -> int:
        """Bytes that blocks cost which borders between shards cut in two."""
        return sum(row.split_bytes for row in self.rows)

    @property
    def nonfinite(self) -> int:
        """Elements that are not finite any more, and those that share a block with one."""
        return sum(row.nonfinite for row in self.rows)

    @property
    def saved(self) -> float:
        """The share of float32's state memory that is saved, 0 to 1."""
        return 1 - self.state_bytes / self.fp32_bytes if self.fp32_bytes else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"{self.optimizer}: optimizer states")
        for name in ("parameter", "state", "shape", "format"):
            table.add_column(name)
        for name in ("bits", "bytes", "of fp32"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                row.param,
                row.state,
                " x ".join(map(str, row.shape)) or "scalar",
                row.format + (f" ({row.reason})" if row.reason else ""),
                str(row.width),
                human(row.bytes),
                f"{row.bytes / row.fp32_bytes:.1%}" if row.fp32_bytes else "",
            )
        yield table
        yield (
            f"{human(self.state_bytes)} instead of {human(self.fp32_bytes)}: "
            f"{self.bits_per_element:.2f} true bits per element, {self.saved:.1%} saved, "
            f"{self.transitions} changes of width"
        )
        if self.split_bytes:
            yield f"{human(self.split_bytes)} of it since shards cut blocks in two"
        if self.nonfinite:
            names = [f"{row.param}:{row.state}" for row in self.rows if row.nonfinite]
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            yield f"{self.nonfinite} elements are not finite, or in a block with one: {some}"
        if self.nonfinite_steps:
            yield f"{self.nonfinite_steps} steps not made, since gradients were not finite"
            yield from map(str, self.run.incidents[-3:])
        if self.reencoded:
            yield f"encoded anew when they were loaded: {', '.join(self.reencoded)}"
        if self.note:
            yield self.note

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(self)
        text = console.file
        assert isinstance(text, io.StringIO)
        return text.getvalue()


def human(size: float) -> str:
    """A number of bytes in decimal units."""
    for unit, scale in UNITS:
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def make_report(session: Session) -> Report:
    """The report of a session's optimizer as it stands."""
    run = run_of(session)
    return Report(
        run.optimizer,
        run.rows,
        session.transitions,
        session.compiles,
        run,
        session.look_bytes,
        session.reencoded,
        _note(session),
        session.watch.left_out,
    )


def _note(session: Session) -> str:
    """What does not run in kernels, and why."""
    lines = [f"Steps run eagerly: {session.eager_reason}"] if session.eager_reason else []
    reasons = {
        (region.unfused, unit.rest is not None): len(unit.instances)
        for step in session.compiled
        for unit in step.program.units
        if (region := unit.region) is not None
    }
    lines += [
        f"{'Between' if cut else 'Outside of'} kernels, operator by operator "
        f"({count} parameters): {reason}"
        for (reason, cut), count in reasons.items()
    ]
    return "\n".join(lines)

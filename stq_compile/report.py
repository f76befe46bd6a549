"""What the states occupy: rows, totals, and a rich table when printed."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from stq_compile.compiled_step import StateKey
from stq_compile.formats import BLOCK, FLOAT32
from stq_compile.packed_state import PackedState
from stq_compile.session import Session
from stq_compile.shards import local, split_blocks

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Row:
    """One state of one parameter. ``bytes`` counts codes and scales.

    A sharded state is counted as a whole, over all shards of one copy; ``split_bytes`` of its bytes
    would not be there if no border between shards lay inside of a block.
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


@dataclass(frozen=True)
class Report:
    """All states, and their totals in true bits: everything that they occupy is counted.

    ``reencoded`` names the states that the last checkpoint held for another sharding, whose blocks
    were not those of this one. ``look_bytes`` is what this process gave to be added up at the
    planner's last look; none where nothing is sharded.
    """

    optimizer: str
    rows: tuple[Row, ...]
    transitions: int
    compiles: int
    look_bytes: int = 0
    reencoded: tuple[str, ...] = ()
    note: str = ""

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
    rows = [
        _row(source.name, key, value, _reason(session, (source.param, key)))
        for _, source, key, value in session.states()
        if isinstance(value, Tensor)
    ]
    return Report(
        type(session.optimizer).__name__,
        tuple(rows),
        session.transitions,
        session.compiles,
        session.look_bytes,
        session.reencoded,
        _note(session),
    )


def _note(session: Session) -> str:
    """What does not run in kernels, and why."""
    lines = [f"Steps run eagerly: {session.eager_reason}"] if session.eager_reason else []
    reasons = {
        unit.unfused: len(unit.instances)
        for step in session.compiled
        for unit in step.program.units
        if unit.unfused
    }
    lines += [
        f"Outside of kernels, operator by operator ({count} parameters): {reason}"
        for reason, count in reasons.items()
    ]
    return "\n".join(lines)


def _reason(session: Session, key: StateKey) -> str:
    """Why a state is wider than was asked for."""
    if key in session.weights:
        return "a copy of the weights"
    info = session.info.get(key)
    return "" if info is None else info.reason


def _row(param: str, key: str, value: Tensor, reason: str) -> Row:
    held = local(value)
    packed = held.packed if isinstance(held, PackedState) else None
    format = FLOAT32 if packed is None else packed.format
    nbytes, split = value.numel() * value.element_size(), 0
    if packed is not None:
        split = split_blocks(value) * (format.nbytes(BLOCK) if format.blocked else 0)
        nbytes = packed.nbytes if held is value else format.nbytes(value.numel()) + split
    dtype = str(value.dtype).removeprefix("torch.")
    return Row(
        param,
        key,
        tuple(value.shape),
        dtype if packed is None else format.name,
        8 * value.element_size() if packed is None else format.width,
        nbytes,
        4 * value.numel(),
        reason,
        split,
    )

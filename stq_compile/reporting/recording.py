"""Streams a run into a file while it goes on (option ``record``), and keeps the losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import torch.distributed

from stq_compile.errors import InvalidOptionError
from stq_compile.planner.history import Comparison, Incident, Record
from stq_compile.reporting.run_file import (
    Event,
    Run,
    comparison_event,
    decision_event,
    head_event,
    incident_event,
    kernel_event,
    line_of,
    loss_event,
    states_event,
    template_event,
)

Entry = TypeVar("Entry", Record, Comparison)

LIMIT = 10_000
"""Losses that are kept in memory; beyond it every second one of the older half goes."""


class Recording:
    """What a session remembers of its run, and the file that it goes to, if any."""

    def __init__(self, path: str | None) -> None:
        self.path = None if path is None else Path(path)
        self.losses: list[tuple[int, float]] = []
        self._file: IO[str] | None = None
        self._names: set[str] = set()
        self._last: Record | None = None
        self._compared: Comparison | None = None

    def open(self) -> None:
        """Begin the file; only the first of many processes writes.

        Raises:
            InvalidOptionError: it cannot be written.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.path is None or (distributed and torch.distributed.get_rank() != 0):
            return
        try:
            self._file = self.path.open("w", buffering=1)  # line by line: a killed run is readable
        except OSError as error:
            raise InvalidOptionError(
                name="record", value=str(self.path), reason=f"cannot be written: {error}"
            ) from error

    @property
    def streams(self) -> bool:
        return self._file is not None

    def loss(self, step: int, loss: float) -> None:
        """Take the loss after ``step`` steps."""
        self.losses.append((step, loss))
        if len(self.losses) > LIMIT:
            half = LIMIT // 2
            self.losses[:half] = self.losses[:half:2]
        self._write(loss_event(step, loss))

    def incident(self, incident: Incident) -> None:
        """Take something that was not finite."""
        self._write(incident_event(incident))

    def update(self, run: Run) -> None:
        """Write what is new in a run."""
        if not self.streams:
            return
        self._once("run", partial(head_event, run))
        for template in run.templates:
            self._once(f"template {template.name}", partial(template_event, template))
        for kernel in run.kernels:
            self._once(f"kernel {kernel.name}", partial(kernel_event, kernel))
        self._write(states_event(run))
        for comparison in _after(run.comparisons, self._compared):
            self._write(comparison_event(comparison))
            self._compared = comparison
        for record in _after(run.decisions, self._last):
            self._write(decision_event(record))
            self._last = record

    def _once(self, name: str, make: Callable[[], Event]) -> None:
        if name not in self._names:
            self._names.add(name)
            self._write(make())

    def _write(self, event: Event) -> None:
        if self._file is not None:
            self._file.write(line_of(event))


def _after(records: tuple[Entry, ...], last: Entry | None) -> tuple[Entry, ...]:
    """The entries behind ``last``; all, if it is none of them."""
    places = [i for i, record in enumerate(records) if record is last]
    return records[places[-1] + 1 :] if places else records

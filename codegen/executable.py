"""What a backend makes of a kernel: an `Executable`, and what that makes of a table: a `Run`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Table = np.ndarray[Any, np.dtype[np.int64]]
"""``[tensors, fields]``: addresses, numbers (the bits of a float64), keys, element counts, first
blocks of the random counter; those of a measuring kernel end with a stride and an offset."""
Sums = np.ndarray[Any, np.dtype[np.float64]]


class Run(Protocol):
    """Updates every tensor of a table, as it is at the time of the call."""

    def prepare(self) -> None:
        """Take the memory that the next call needs, so that it takes none by itself."""

    def __call__(self, step: int) -> None:
        """Takes the mixed step (`rounding.mixed_step`). It does not wait for a device, but for the
        sums of a measuring kernel."""

    def replayed(self) -> int:
        """How many steps the device has made since the last call of this, or of a step, that the
        host did not: replays of a captured step, less its capture. It waits for the device."""


class Executable(Protocol):
    """A compiled kernel."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def row_bytes(self) -> int:
        """Bytes of a row of its table."""

    def bind(self, table: Table, sums: Sums | None = None) -> Run:
        """Make ready to run on a table, which stays the caller's to fill in.

        Args:
            table: in the host's memory.
            sums: ``[tensors, slots]``, which a run of a measuring kernel fills; its addresses
                stand in the table.
        """

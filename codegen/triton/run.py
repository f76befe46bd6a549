"""Tables on a device: what a step launches, without waiting for it.

A table is filled in on the host (addresses and hyperparameters) and sent when something in it has
changed; copies from pinned memory are made in the order of the launches. Everything else stays on
the device: step counters, the step's number, the scalars that they give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stq_compile.codegen.executable import Run, Sums, Table
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.kernel import (
    MEASURED_BLOCKS,
    MEASURED_TILES,
    TritonKernel,
    sampled_tile_map,
    tile_map,
    vectors_of,
)
from stq_compile.errors import StepCaptureError
from stq_compile.rounding import MASK64, signed64


@dataclass(frozen=True)
class TritonExecutable:
    """A Triton kernel for one device; a `stq_compile.codegen.executable.Executable`.

    ``blocks``: of a tile of a step, and of one of a measuring kernel.
    """

    kernel: TritonKernel
    device: torch.device
    blocks: int
    measured_blocks: int = MEASURED_BLOCKS

    @classmethod
    def of(cls, kernel: Kernel, device: torch.device, *blocks: int) -> TritonExecutable:
        return cls(TritonKernel.of(emit(kernel)), device, *blocks)

    @property
    def name(self) -> str:
        return self.kernel.emitted.name

    @property
    def source(self) -> str:
        return self.kernel.emitted.source

    @property
    def row_bytes(self) -> int:
        return 8 * self.kernel.emitted.row_fields

    def bind(self, table: Table, sums: Sums | None = None) -> Run:
        sent = DeviceTable(self, table)
        return DeviceStep(self, sent) if sums is None else DeviceLook(self, sent, sums)


class DeviceTable:
    """A table on the device, as it was sent last."""

    def __init__(self, executable: TritonExecutable, table: Table) -> None:
        self.host = table
        self.last: Table | None = None
        device = executable.device
        self.device = torch.zeros(table.shape, dtype=torch.int64, device=device)
        self.slots = executable.kernel.new_slots(len(table), device)
        self.pinned: list[Tensor] = []

    def send(self) -> bool:
        """Send it if it has changed; whether it has."""
        if self.last is not None and np.array_equal(self.last, self.host):
            return False
        self.last = self.host.copy()
        to_device(self.last, self.device, self.pinned)
        return True


def to_device(array: Table, target: Tensor, pinned: list[Tensor]) -> None:
    """Copy ``array`` to ``target`` without waiting.

    A captured CUDA graph copies from the same memory whenever it is replayed; ``pinned`` keeps that
    alive. Otherwise torch's allocator of pinned memory waits until the copy is made.
    """
    source = torch.from_numpy(array)
    if target.device.type == "cuda":
        source = source.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            pinned.append(source)
    target.copy_(source, non_blocking=True)


class DeviceStep:
    """All launches of a step: the scalars, and one for each width of access that occurs."""

    def __init__(self, executable: TritonExecutable, sent: DeviceTable) -> None:
        self.executable, self.kernel, self.sent = executable, executable.kernel, sent
        self.clock = torch.zeros(1, dtype=torch.int64, device=executable.device)
        self.clock_holds: int | None = None
        self.vectors = np.zeros(0, dtype=np.int64)
        self.tiles: list[tuple[int, Tensor]] = []

    def prepare(self) -> None:
        """Send the table, if it has changed."""
        if self.sent.send():
            self._divide()

    def __call__(self, step: int) -> None:
        self.prepare()
        if self.clock_holds != step:
            self._set_clock(step)
        self.clock_holds = (step + 1) & MASK64
        self.launch()

    def _set_clock(self, step: int) -> None:
        """By the host, and not by a graph: every replay would make the same step again."""
        if self.clock.is_cuda and torch.cuda.is_current_stream_capturing():
            raise StepCaptureError(
                what=self.executable.name,
                reason="the device does not know yet which step it is",
                remedy="Call step() once before the capture.",
            )
        self.clock.fill_(signed64(step))

    def replayed(self) -> int:
        """The device's own count of steps beside the host's, which is then the same."""
        if self.clock_holds is None:
            return 0
        ahead = int(self.clock) - signed64(self.clock_holds)
        self.clock_holds = (self.clock_holds + ahead) & MASK64
        return ahead

    def launch(self) -> None:
        """What a captured graph replays: the next step, on the same tensors."""
        self.kernel.scalars(self.sent.device, self.sent.slots, self.clock)
        for vector, tiles in self.tiles:
            self.kernel.update(
                self.sent.device,
                self.sent.slots,
                tiles,
                vector=vector,
                blocks=self.executable.blocks,
            )

    def _divide(self) -> None:
        """Find the tiles again, if other tensors than before can be accessed 4 at a time."""
        table, emitted = self.sent.host, self.kernel.emitted
        numels = table[:, emitted.row_fields - 2]
        vectors = vectors_of(numels, table[:, list(emitted.addresses)])
        if np.array_equal(vectors, self.vectors):
            return
        self.vectors, self.tiles = vectors, []
        for vector in (4, 1):
            mine = tile_map(np.where(vectors == vector, numels, 0), self.executable.blocks)
            if len(mine):
                tiles = torch.empty(mine.shape, dtype=torch.int64, device=self.sent.device.device)
                to_device(mine, tiles, self.sent.pinned)
                self.tiles.append((vector, tiles))


class DeviceLook:
    """A look of the planner: sampled blocks, whose sums are read back. It waits for the device."""

    def __init__(self, executable: TritonExecutable, sent: DeviceTable, sums: Sums) -> None:
        self.executable, self.kernel, self.sent, self.sums = (
            executable, executable.kernel, sent, sums,
        )  # fmt: skip
        self.clock = torch.zeros(1, dtype=torch.int64, device=executable.device)

    def prepare(self) -> None:
        """Nothing: a look takes its memory as it goes, and changes nothing if it fails."""

    def replayed(self) -> int:
        """None: looks are never captured."""
        return 0

    def __call__(self, step: int) -> None:
        self.sent.send()
        numels, first_blocks, strides, offsets = self.sent.host[:, -4:].T
        begins = (offsets - first_blocks) % strides
        blocks = self.executable.measured_blocks
        mine = sampled_tile_map(numels, begins, strides, blocks)
        self.sums[:] = 0
        if not len(mine):
            return
        self.kernel.scalars(self.sent.device, self.sent.slots, self.clock)
        for begin in range(0, len(mine), MEASURED_TILES):
            part = mine[begin : begin + MEASURED_TILES]
            tiles = torch.from_numpy(part).to(self.executable.device)
            found = self.kernel.measure(self.sent.device, self.sent.slots, tiles, blocks=blocks)
            np.add.at(self.sums, part[:, 0], found.cpu().numpy())

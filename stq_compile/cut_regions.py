"""Runs a region that was cut (`passes.cut`), one parameter after the other:

    its rest, operator by operator, with calls of the kernels that make values for it
    -> what the rest changes is encoded -> the kernel that writes all other states and the parameter

Packed states are decoded in registers, and what is between the kernels lives as long as the update
of its parameter. Nothing is written before the last kernel, which takes no memory, so that a
parameter is updated whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stq_compile.codec import CompiledCodec
from stq_compile.compiler import Unit
from stq_compile.half_params import HalfParams
from stq_compile.regions import Cell, Region
from stq_compile.runtime import Place, Resolve, RowBucket
from stq_compile.shards import whole_of
from stq_compile.step_graph import Instance, Operand, Role


class Feeder(nn.Module):
    """A kernel that the rest of a region calls, as a module of its graph.

    ``row``, ``step`` and ``mesh`` are those of the parameter whose rest runs.
    """

    def __init__(self, unit: Unit, resolve: Resolve) -> None:
        super().__init__()
        self.bucket = RowBucket(unit, resolve)
        self.row, self.step, self.mesh = 0, 0, None

    def forward(self, *names: str, **values: Any) -> tuple[Tensor, ...]:
        """The values of these names, whole; all processes call it."""
        param = self.bucket.params[self.row]
        made = {
            name: torch.empty_strided(param.shape, param.stride, device=param.device)
            for name in names
        }
        self.bucket.place(self.row, values, made)
        self.bucket.launch_row(self.row, self.step)
        if param.region is None:
            return tuple(made.values())
        return tuple(whole_of(value, param.region, self.mesh) for value in made.values())


class CutRegion:
    """One cut region and its rows of tensors."""

    def __init__(
        self,
        unit: Unit,
        resolve: Resolve,
        width_of: Callable[[Operand], int],
        codec: CompiledCodec,
        params: HalfParams,
    ) -> None:
        """As `Region`; ``unit`` is the kernel that writes, with those that feed its rest."""
        assert unit.graph.rest is not None
        self.unit = unit
        self.instances = unit.graph.instances
        self.kernel = RowBucket(unit, resolve)
        self.feeders = {f"kernel_{i}": Feeder(feed, resolve) for i, feed in enumerate(unit.feeds)}
        self.rest = Region(unit.graph.rest, resolve, width_of, codec, params, self.feeders)

    @property
    def buckets(self) -> list[RowBucket]:
        """Of all its kernels."""
        return [*(feeder.bucket for feeder in self.feeders.values()), self.kernel]

    def fill(self, args: Any, created: dict[int, Tensor]) -> None:
        """`Region.fill`."""
        for bucket in self.buckets:
            bucket.fill(args, created)
        self.rest.fill(args, created)

    def launch(self, steps: int, mixed: int) -> Iterator[Instance]:
        """`Region.launch`; ``mixed`` is what the kernels draw random numbers from."""
        rows, self.rest.rows = self.rest.rows, []
        try:
            for number, row in enumerate(rows):
                with torch.no_grad():
                    self._run(number, row, steps, mixed)
                yield self.instances[number]
        finally:
            for bucket in self.buckets:
                bucket.held.clear()
                torch.autograd.graph.increment_version(bucket.finish())

    def numbers(self) -> dict[Place, Any]:
        """The intermediates that are one number, as they will be in the next step, whose tensors
        are filled in; nothing is changed."""
        found: dict[Place, Any] = {}
        for number, row in enumerate(self.rest.rows):
            with torch.no_grad():
                values = self.intermediates(row, self._compute(number, row, 0))
            param = self.instances[number].param.source.param
            found |= {
                (param, name): value
                for name, value in values.items()
                if not isinstance(value, Tensor) or value.ndim == 0
            }
        return found

    def _run(self, number: int, row: list[Cell], steps: int, mixed: int) -> None:
        """Update one parameter: whatever takes memory first, then all that changes."""
        results = self._compute(number, row, mixed)
        changes = self.rest.changes(row, results, steps)
        self.kernel.place(number, self.intermediates(row, results), {})
        self.kernel.launch_row(number, mixed)
        changes.make()

    def _compute(self, number: int, row: list[Cell], mixed: int) -> tuple[Any, ...]:
        mesh = next((cell.mesh for cell in row if cell.mesh is not None), None)
        for feeder in self.feeders.values():
            feeder.row, feeder.step, feeder.mesh = number, mixed, mesh
        return self.rest.compute(row)

    def intermediates(self, row: list[Cell], results: tuple[Any, ...]) -> dict[str, Any]:
        """What the rest made for the kernel."""
        outputs = self.rest.outputs
        return {
            cell.operand.name: results[outputs[cell.operand.name]]
            for cell in row
            if cell.operand.role is Role.INTERMEDIATE
        }

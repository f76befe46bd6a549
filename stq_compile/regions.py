"""Runs what is no kernel: a region's graph on ordinary tensors, one parameter after the other.

    decode the packed states of one parameter -> run its graph -> encode the states that it wrote

so that the float32 values of packed states live no longer than the region of their parameter. The
graph runs operator by operator: on the CPU the operators that make a region one (matrix products,
decompositions, sorts) are library calls, and a graph is traced anew for every shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from stq_compile.half_params import HalfParams
from stq_compile.halves import HALF_DTYPES
from stq_compile.packed_state import PackedState
from stq_compile.runtime import Resolve, changed, live
from stq_compile.step_graph import Instance, Operand, Role, StepGraph
from stq_compile.working_set import write_as


class Region:
    """One unfused graph and its rows of tensors."""

    def __init__(
        self,
        unit: StepGraph,
        resolve: Resolve,
        width_of: Callable[[Operand], int],
        params: HalfParams,
    ) -> None:
        """``width_of``: of states that get their format when they are first written; ``params``
        reads and writes 16-bit parameters where the unit is widened."""
        unit = unit.plain or unit
        self.unit = unit
        self.resolve = resolve
        self.width_of = width_of
        self.params = params
        self.module = fx.GraphModule({}, unit.graph)
        self.numbers = [
            isinstance(n.meta.get("val"), (torch.SymFloat, torch.SymInt)) for n in unit.placeholders
        ]
        self.outputs = {name: i for i, name in enumerate(unit.writes or ())}

    def fill(self, args: Sequence[Any], created: dict[int, Tensor]) -> None:
        """Find and check every tensor of this step, before anything is changed.

        Raises:
            ChangedTensorError: a tensor is not what the graph was traced for.
        """
        self.rows = [self._row(instance, args, created) for instance in self.unit.instances]

    def _row(
        self, instance: Instance, args: Sequence[Any], created: dict[int, Tensor]
    ) -> list[Any]:
        row: list[Any] = []
        for operand, number in zip(instance.operands, self.numbers, strict=True):
            if operand.returned >= 0:
                row.append(created[operand.returned])
            elif operand.value is not None:
                row.append(operand.value)
            else:
                value = live(operand, self.resolve(operand), args)
                row.append(float(value) if number else value)
                _check(operand, value)
        return row

    def launch(self, step: int) -> None:
        """Update every tensor; ``step`` counts the steps before."""
        with torch.no_grad():
            for instance, row in zip(self.unit.instances, self.rows, strict=True):
                self._run(instance, row, step)
        self.rows = []

    def _run(self, instance: Instance, row: list[Any], step: int) -> None:
        pairs = zip(instance.operands, row, strict=True)
        results = self.module(*(self._decoded(operand, value) for operand, value in pairs))
        for operand, target in zip(instance.operands, row, strict=True):
            if operand.name not in self.outputs:
                continue
            value = results[self.outputs[operand.name]]
            if isinstance(target, PackedState):
                values = _in_memory_order(value, target)
                write_as(target.packed, values, self.width_of(operand))
            elif self._is_half_param(operand):
                self.params.write(operand, target, value, step)
            else:
                target.copy_(value)

    def _is_half_param(self, operand: Operand) -> bool:
        half = operand.role is Role.PARAM and operand.dtype in HALF_DTYPES
        return self.unit.widened and half

    def _decoded(self, operand: Operand, value: Any) -> Any:
        """What the graph takes: in a widened one, float32 in place of 16 bits."""
        if not isinstance(value, Tensor):
            return value
        if self._is_half_param(operand):
            return self.params.read(operand, value)
        if not isinstance(value, PackedState):
            wide = self.unit.widened and value.dtype in HALF_DTYPES
            return value.float() if wide else value
        values = value.dequantize()
        return values if self.unit.widened else values.to(value.dtype)


def _check(operand: Operand, value: Any) -> None:
    if operand.role is Role.SCALAR or not isinstance(value, Tensor):
        return
    if value.layout != torch.strided or value.shape != operand.shape:
        raise changed(operand, "layout", value)
    if value.stride() != operand.stride:
        raise changed(operand, "layout", value)
    if value.dtype != operand.dtype:
        raise changed(operand, "dtype", value)


def _in_memory_order(value: Tensor, state: PackedState) -> Tensor:
    """The elements of ``value`` in the order in which those of ``state`` are stored."""
    ordered = torch.empty_strided(state.size(), state.stride())
    ordered.copy_(value)
    return ordered.as_strided((ordered.numel(),), (1,))

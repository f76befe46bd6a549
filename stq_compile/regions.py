"""Runs what is no kernel: a region's graph on ordinary tensors, one parameter after the other.

    decode the packed states of one parameter -> run its graph -> encode the states that it wrote

so that the float32 values of packed states live no longer than the region of their parameter. The
graph runs operator by operator: on the CPU the operators that make a region one (matrix products,
decompositions, sorts) are library calls, and a graph is traced anew for every shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from stq_compile.packed_state import PackedState
from stq_compile.runtime import Resolve, changed, live
from stq_compile.step_graph import Instance, Operand, Role, StepGraph, set_device
from stq_compile.storage import PackedStorage, Replacement
from stq_compile.working_set import encoded_as


class Region:
    """One unfused graph and its rows of tensors."""

    def __init__(
        self, unit: StepGraph, resolve: Resolve, width_of: Callable[[Operand], int]
    ) -> None:
        """``width_of``: of states that get their format when they are first written."""
        unit = unit.plain or unit
        self.unit = unit
        self.resolve = resolve
        self.width_of = width_of
        self.module = fx.GraphModule({}, copy.deepcopy(unit.graph))
        for node in self.module.graph.nodes:
            set_device(node, unit.device)
        self.module.recompile()
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

    def launch(self) -> Iterator[Instance]:
        """Update every tensor; yields each parameter's instance when it is done."""
        rows, self.rows = self.rows, []
        for instance, row in zip(self.unit.instances, rows, strict=True):
            with torch.no_grad():
                self._run(instance, row)
            yield instance

    def _run(self, instance: Instance, row: list[Any]) -> None:
        """Update one parameter: whatever takes memory first, then all that changes."""
        results = self.module(*(_decoded(value) for value in row))
        encoded: list[Replacement] = []
        plain: list[tuple[Tensor, Tensor]] = []
        for operand, target in zip(instance.operands, row, strict=True):
            if operand.name not in self.outputs:
                continue
            value = results[self.outputs[operand.name]]
            if isinstance(target, PackedState):
                values = _in_memory_order(value, target)
                made = encoded_as(target.packed, values, self.width_of(operand), encoded)
                encoded += [] if made is None else [made]
            else:
                plain.append((target, value.to(target.dtype)))
        for replacement in encoded:
            PackedStorage.replace(replacement)
        for target, value in plain:
            target.copy_(value)


def _check(operand: Operand, value: Any) -> None:
    if operand.role is Role.SCALAR or not isinstance(value, Tensor):
        return
    if value.layout != torch.strided or value.shape != operand.shape:
        raise changed(operand, "layout", value)
    if value.stride() != operand.stride:
        raise changed(operand, "layout", value)
    if value.dtype != operand.dtype:
        raise changed(operand, "dtype", value)


def _decoded(value: Any) -> Any:
    return value.dequantize() if isinstance(value, PackedState) else value


def _in_memory_order(value: Tensor, state: PackedState) -> Tensor:
    """The elements of ``value`` in the order in which those of ``state`` are stored."""
    ordered = torch.empty_strided(state.size(), state.stride(), device=state.device)
    ordered.copy_(value)
    return ordered.as_strided((ordered.numel(),), (1,))

"""Runs what is no kernel: a region's graph on ordinary tensors, one parameter after the other.

    decode the packed states of one parameter -> run its graph -> encode the states that it wrote

so that the float32 values of packed states live no longer than the region of their parameter. They
are decoded and encoded by kernels where that is enough work for kernels to be built. The
graph runs operator by operator: on the CPU the operators that make a region one (matrix products,
decompositions, sorts) are library calls, and a graph is traced anew for every shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from stq_compile.codec import CompiledCodec
from stq_compile.packed_state import PackedState, memory_order
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
        codec: CompiledCodec,
    ) -> None:
        """``width_of``: of states that get their format when they are first written."""
        unit = unit.plain or unit
        self.unit = unit
        self.resolve = resolve
        self.width_of = width_of
        self.codec = codec
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
        self.codec.amortized(v.packed for row in self.rows for v in row if _is_packed(v))

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

    def launch(self) -> None:
        """Update every tensor."""
        with torch.no_grad():
            for instance, row in zip(self.unit.instances, self.rows, strict=True):
                self._run(instance, row)
        self.rows = []

    def _run(self, instance: Instance, row: list[Any]) -> None:
        results = self.module(*(v.dequantize(self.codec) if _is_packed(v) else v for v in row))
        for operand, target in zip(instance.operands, row, strict=True):
            if operand.name not in self.outputs:
                continue
            value = results[self.outputs[operand.name]]
            if isinstance(target, PackedState):
                values = _in_memory_order(value, target)
                write_as(target.packed, values, self.width_of(operand), self.codec)
            else:
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


def _is_packed(value: Any) -> TypeGuard[PackedState]:
    return isinstance(value, PackedState)


def _in_memory_order(value: Tensor, state: PackedState) -> Tensor:
    """The elements of ``value`` in the order in which those of ``state`` are stored."""
    if value.stride() != state.stride():
        value = torch.empty_strided(state.size(), state.stride()).copy_(value)
    return memory_order(value)

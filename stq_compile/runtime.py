"""Buckets: all tensors of one compiled unit, as a table of pointers, run by one call.

A row of the table is the kernel's ``Row`` struct, 8 bytes a field: pointers, numbers, keys, the
number of elements, and the index of the tensor's first block in the random counter. Rows are
refilled every step, since gradients are new tensors and hyperparameters change; that is some tens
of microseconds for a hundred tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stq_compile.codegen.ir import OperandKind
from stq_compile.compiler import Unit
from stq_compile.packed_state import PackedState
from stq_compile.rounding import GOLDEN, mix64, stream_id
from stq_compile.step_graph import Instance, Operand, Role

Resolve = Callable[[Operand], Any]
"""The live object of an operand: a tensor, a packed state, or a call argument's position."""


@dataclass
class Column:
    """One field of the table: how to fill it for every row."""

    kind: OperandKind
    role: Role
    operands: tuple[Operand, ...]
    objects: list[Any] = field(default_factory=list)


class Bucket:
    """The tensors of one unit and the table through which its kernel reaches them."""

    def __init__(self, unit: Unit, resolve: Resolve) -> None:
        self.unit = unit
        self.instances: tuple[Instance, ...] = unit.graph.instances
        self.columns: list[Column] = []
        for i, operand in enumerate(unit.kernel.operands):
            row = tuple(instance.operands[i] for instance in self.instances)
            column = Column(operand.kind, row[0].role, row)
            column.objects = [None if o.value is not None else resolve(o) for o in row]
            self.columns.append(column)
        fields = len(self.columns) + 2
        if unit.compiled.row_bytes != 8 * fields:
            raise AssertionError(f"{unit.kernel.name}: rows of {unit.compiled.row_bytes} bytes")
        self.table = np.zeros((len(self.instances), fields), dtype=np.int64)
        self.numbers = self.table.view(np.float64)
        self.table[:, -2] = [_numel(i) for i in self.instances]
        for c, column in enumerate(self.columns):
            self._fill_constant(c, column)

    def _fill_constant(self, c: int, column: Column) -> None:
        """Fields that never change: keys of random streams, hoisted constants."""
        if column.kind is OperandKind.KEY:
            streams = [stream_id(o.source.param, o.source.key) for o in column.operands]
            keys = np.array([mix64(s * GOLDEN + 1) for s in streams], dtype=np.uint64)
            self.table[:, c] = keys.view(np.int64)
        elif column.kind is OperandKind.NUMBER:
            self.numbers[:, c] = [0.0 if o.value is None else o.value for o in column.operands]

    def run(self, args: Sequence[Tensor], created: dict[int, Tensor], step: int) -> None:
        """One step of every tensor. ``created`` receives the states that the step makes."""
        alive: list[Tensor] = []  # copies of gradients must outlive the call
        for c, column in enumerate(self.columns):
            if column.kind is OperandKind.KEY:
                continue
            if column.kind is OperandKind.NUMBER:
                for r, (operand, source) in enumerate(
                    zip(column.operands, column.objects, strict=True)
                ):
                    if operand.value is None:
                        self.numbers[r, c] = float(args[source] if type(source) is int else source)
                continue
            tensors = self._tensors(column, args, created)
            if column.role is Role.GRAD:
                tensors = [
                    _like(g, i.param, alive) for g, i in zip(tensors, self.instances, strict=True)
                ]
            self.table[:, c] = [t.data_ptr() for t in tensors]
        self.unit.compiled.run(
            self.table.ctypes.data, len(self.instances), step, torch.get_num_threads()
        )

    def _tensors(
        self, column: Column, args: Sequence[Tensor], created: dict[int, Tensor]
    ) -> list[Tensor]:
        found = []
        for operand, source in zip(column.operands, column.objects, strict=True):
            value = created[operand.returned] if operand.returned >= 0 else source
            if type(value) is int:
                value = args[value]
            if isinstance(value, PackedState):
                storage = value.packed
                value = storage.scales if column.role is Role.SCALES else storage.codes
            found.append(value)
        return found


def _numel(instance: Instance) -> int:
    return torch.Size(instance.param.shape).numel()


def _like(grad: Tensor, param: Operand, alive: list[Tensor]) -> Tensor:
    """The gradient in the parameter's memory order, which the kernel walks; copied if it differs."""
    if grad.stride() == param.stride:
        return grad
    copy = torch.empty_strided(param.shape, param.stride, dtype=grad.dtype).copy_(grad)
    alive.append(copy)
    return copy


def mixed_step(seed: int, step: int) -> int:
    """The step's part of every stream key, as the kernel takes it."""
    return mix64(seed + GOLDEN * (step + 1))

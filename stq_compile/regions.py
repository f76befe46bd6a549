"""Runs what is no kernel: a region's graph on ordinary tensors, one parameter after the other.

    decode the packed states of one parameter -> run its graph -> encode the states that it wrote

so that the float32 values of packed states live no longer than the region of their parameter. They
are decoded and encoded by kernels where that is enough work for kernels to be built. The
graph runs operator by operator: on the CPU the operators that make a region one (matrix products,
decompositions, sorts) are library calls, and a graph is traced anew for every shape.

Of a sharded parameter every process gathers the whole gradient, states and values, runs the graph
on them, and keeps its part of the results (the "distributed Muon" of Liu et al., "Muon is scalable
for LLM training", 2025). So results are those of one process, whatever the operators are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from stq_compile.capture import Argument
from stq_compile.codec import CompiledCodec
from stq_compile.formats import MatrixKind
from stq_compile.half_params import HalfParams
from stq_compile.halves import HALF_DTYPES
from stq_compile.matrices import orthonormal, square_orthonormal
from stq_compile.packed_state import PackedState, in_order_of
from stq_compile.passes.in_place import reuse_memory
from stq_compile.runtime import Resolve, changed, live
from stq_compile.shards import local, part_of, whole_of
from stq_compile.step_graph import Instance, Operand, Role, StepGraph, set_device
from stq_compile.storage import Codec, PackedStorage, Replacement
from stq_compile.working_set import encoded_as


class Cell(NamedTuple):
    """What stands behind an operand in one step, and the mesh of a sharded one."""

    operand: Operand
    value: Any
    mesh: Any = None

    @property
    def is_half_param(self) -> bool:
        """Whether it is a parameter of 16 bits."""
        return self.operand.role is Role.PARAM and self.operand.dtype in HALF_DTYPES

    def read(self, codec: Codec, halves: HalfParams | None) -> Any:
        """The value as the graph takes it: decoded and whole; all processes must call it.

        ``halves``: of a widened graph, which takes float32 in place of 16 bits.
        """
        if self.operand.returned >= 0 or self.operand.role is Role.INTERMEDIATE:
            return None  # what the step makes is only written
        value = self._decoded(codec, halves)
        if self.operand.region is not None:
            value = whole_of(value, self.operand.region, self.mesh)
        if isinstance(self.value, PackedState) and self.value.format.kind == "orthogonal":
            return orthonormal(value) if value.ndim == 2 else square_orthonormal(value)
        return value

    def _decoded(self, codec: Codec, halves: HalfParams | None) -> Any:
        value = self.value
        if isinstance(value, PackedState):
            values = value.dequantize(codec)
            return values.to(value.dtype) if halves is None else values
        if halves is None or not isinstance(value, Tensor) or value.dtype not in HALF_DTYPES:
            return value
        return halves.read(self.operand, value) if self.is_half_param else value.float()

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a result of the graph."""
        region = self.operand.region
        return whole if region is None else part_of(whole, region)

    def encoded(
        self,
        whole: Tensor,
        width: int,
        before: Iterable[Replacement],
        codec: Codec,
        matrix: MatrixKind | None,
    ) -> Replacement | None:
        """A packed state's new buffers; see `working_set.encoded_as`."""
        values = in_order_of(self.part(whole), self.value).float()
        seen = None if self.operand.region is None else whole
        return encoded_as(self.value.packed, values, width, before, seen, codec, matrix)


class Changes(NamedTuple):
    """All that a region is about to change, computed."""

    encoded: list[Replacement]
    plain: list[tuple[Tensor, Tensor]]

    def make(self) -> None:
        """Takes no memory."""
        for replacement in self.encoded:
            PackedStorage.replace(replacement)
        for target, value in self.plain:
            target.copy_(value)


class Region:
    """One unfused graph and its rows of tensors."""

    def __init__(
        self,
        unit: StepGraph,
        resolve: Resolve,
        width_of: Callable[[Operand], int],
        codec: CompiledCodec,
        params: HalfParams,
        modules: Mapping[str, torch.nn.Module] = MappingProxyType({}),
    ) -> None:
        """``width_of``: of states that get their format when they are first written; ``params``
        reads and rounds 16-bit parameters where the unit is widened; ``modules`` are those that the
        graph calls."""
        self.matrices = unit.facts.matrices
        unit = unit.plain or unit
        self.unit = unit
        self.resolve = resolve
        self.width_of = width_of
        self.codec = codec
        self.halves = params if unit.widened else None
        self.instances = unit.instances
        self.module = fx.GraphModule(dict(modules), copy.deepcopy(unit.graph))
        for node in self.module.graph.nodes:
            set_device(node, unit.device)
        reuse_memory(self.module.graph)
        self.module.recompile()
        self.reads = [bool(node.users) for node in unit.placeholders]
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
        self.codec.amortized(
            c.value.packed for row in self.rows for c in row if isinstance(c.value, PackedState)
        )

    def _row(
        self, instance: Instance, args: Sequence[Any], created: dict[int, Tensor]
    ) -> list[Cell]:
        row: list[Cell] = []
        for operand, number in zip(instance.operands, self.numbers, strict=True):
            if operand.role is Role.INTERMEDIATE:
                row.append(Cell(operand, None))
                continue
            if operand.value is not None:
                row.append(Cell(operand, operand.value))
                continue
            if operand.returned >= 0:
                outer: Any = created[operand.returned]
                value = local(outer)
            else:
                source = self.resolve(operand)
                outer = args[source.position] if isinstance(source, Argument) else source
                value = live(operand, source, args)
                _check(operand, value)
            mesh = None if operand.region is None else outer.device_mesh
            row.append(Cell(operand, float(value) if number else value, mesh))
        return row

    def launch(self, step: int) -> Iterator[Instance]:
        """Update every tensor; yields each parameter's instance when it is done.

        ``step`` counts the steps before.
        """
        rows, self.rows = self.rows, []
        for instance, row in zip(self.instances, rows, strict=True):
            with torch.no_grad():
                self._run(row, step)
            yield instance

    def _run(self, row: list[Cell], step: int) -> None:
        """Update one parameter: whatever takes memory first, then all that changes."""
        self.changes(row, self.compute(row), step).make()

    def compute(self, row: list[Cell]) -> tuple[Any, ...]:
        """The graph's results; nothing is changed."""
        inputs = (
            cell.read(self.codec, self.halves) if read else None
            for cell, read in zip(row, self.reads, strict=True)
        )
        results: tuple[Any, ...] = self.module(*inputs)
        return results

    def changes(self, row: list[Cell], results: tuple[Any, ...], step: int) -> Changes:
        """What the results are to become, encoded and rounded."""
        encoded: list[Replacement] = []
        plain: list[tuple[Tensor, Tensor]] = []
        for cell in row:
            if cell.operand.name not in self.outputs or cell.operand.role is Role.INTERMEDIATE:
                continue
            whole = results[self.outputs[cell.operand.name]]
            if isinstance(cell.value, PackedState):
                width, matrix = (
                    self.width_of(cell.operand),
                    self.matrices.get(cell.operand.source.key),
                )
                made = cell.encoded(whole, width, encoded, self.codec, matrix)
                encoded += [] if made is None else [made]
            elif self.halves is not None and cell.is_half_param:
                new = self.halves.rounded(cell.operand, cell.value, cell.part(whole), step)
                plain.append((cell.value, new.param))
                encoded += [] if new.error is None else [new.error]
            else:
                plain.append((cell.value, cell.part(whole).to(cell.value.dtype)))
        return Changes(encoded, plain)


def _check(operand: Operand, value: Any) -> None:
    if operand.role is Role.SCALAR or not isinstance(value, Tensor):
        return
    if value.layout != torch.strided or value.shape != operand.shape:
        raise changed(operand, "layout", value)
    if value.stride() != operand.stride:
        raise changed(operand, "layout", value)
    if value.dtype != operand.dtype:
        raise changed(operand, "dtype", value)

"""Buckets: all tensors of one compiled unit, as a table of pointers, run by one call.

A row of the table is the kernel's ``Row`` struct, 8 bytes a field: pointers, numbers, keys, the
number of elements, and the index of the tensor's first block in the random counter. Rows are
refilled every step, since gradients are new tensors and hyperparameters change; that is some tens
of microseconds for a hundred tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from stq_compile.capture import Argument, Gradient
from stq_compile.codegen.executable import Run, Sums
from stq_compile.codegen.ir import OperandKind
from stq_compile.compiler import Unit
from stq_compile.errors import ChangedTensorError, FormatMismatchError
from stq_compile.formats import BLOCK, Format, block_count
from stq_compile.packed_state import PackedState, memory_order
from stq_compile.passes.measure import slots_of
from stq_compile.rounding import stream_id, stream_key
from stq_compile.shards import gradient, local, part_of
from stq_compile.step_graph import Instance, Operand, Role
from stq_compile.storage import PackedStorage

Resolve = Callable[[Operand], Any]
"""The live object of an operand: a tensor, a packed state, or an argument of the call."""


Place = tuple[int, str]
"""Number of a parameter, and name of one of its intermediates."""


@dataclass
class Column:
    """One field of the table and what fills it: an object per row."""

    index: int
    kind: OperandKind
    role: Role
    operands: tuple[Operand, ...]
    objects: list[Any]
    params: list[Operand]
    format: Format | None = None
    written: bool = False
    versions: list[tuple[int, int]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    @cached_property
    def from_arguments(self) -> bool:
        """Whether Dynamo passes the objects at each call."""
        return any(isinstance(o, Argument) for o in self.objects)

    @cached_property
    def positions(self) -> list[int] | None:
        """Where all objects are found among the arguments of a call; None if not all are there."""
        found = [o.position for o in self.objects if isinstance(o, Argument)]
        return found if len(found) == len(self.objects) else None

    @cached_property
    def owners(self) -> list[Tensor] | None:
        """The parameters whose gradients the objects are; None if not all are."""
        found = [o.param for o in self.objects if isinstance(o, Gradient)]
        return found if len(found) == len(self.objects) else None

    @cached_property
    def expected(self) -> tuple[list[Any], ...]:
        """Strides, shapes, dtypes and devices that the kernel was compiled for."""
        walked = self.params if self.role is Role.GRAD else self.operands
        shapes, dtypes = ([o.shape for o in self.operands], [o.dtype for o in self.operands])
        return [o.stride for o in walked], shapes, dtypes, [p.device for p in self.params]

    @cached_property
    def packed(self) -> bool:
        """Whether the rows are buffers of packed states, which keep their place between steps."""
        return self.role in (Role.CODES, Role.SCALES) and self.operands[0].returned < 0


class Bucket:
    """The tensors of one unit and the table through which its kernel reaches them."""

    extra_fields = 0
    sums: Sums | None = None
    replacements = -1  # of packed states' buffers in the process, when they were looked up

    def __init__(self, unit: Unit, resolve: Resolve) -> None:
        self.unit = unit
        self.instances: tuple[Instance, ...] = unit.graph.instances
        self.params = [instance.param for instance in self.instances]
        self.columns: list[Column] = []
        for i, kernel_operand in enumerate(unit.kernel.operands):
            row = tuple(instance.operands[i] for instance in self.instances)
            objects = [None if o.value is not None else resolve(o) for o in row]
            format = unit.graph.formats.get(kernel_operand.name)
            # Step counters need no version for autograd, and packed states have none.
            written = kernel_operand.written and kernel_operand.kind is OperandKind.FLOATS
            role, kind = row[0].role, kernel_operand.kind
            self.columns.append(Column(i, kind, role, row, objects, self.params, format, written))
        fields = len(self.columns) + 2 + self.extra_fields
        if unit.compiled.row_bytes != 8 * fields:
            raise AssertionError(f"{unit.kernel.name}: rows of {unit.compiled.row_bytes} bytes")
        self.table = np.zeros((len(self.instances), fields), dtype=np.int64)
        self.numbers = self.table.view(np.float64)
        self.table[:, len(self.columns)] = [_numel(i) for i in self.instances]
        self.table[:, len(self.columns) + 1] = [_first_block(p) for p in self.params]
        for column in self.columns:
            self._fill_constant(column)

    def _fill_constant(self, column: Column) -> None:
        """Fields that never change: keys of random streams, hoisted constants."""
        if column.kind is OperandKind.KEY:
            streams = [stream_id(o.source.param, o.source.key) for o in column.operands]
            keys = np.array([stream_key(s) for s in streams], dtype=np.uint64)
            self.table[:, column.index] = keys.view(np.int64)
        elif column.kind is OperandKind.NUMBER:
            values = [0.0 if o.value is None else o.value for o in column.operands]
            self.numbers[:, column.index] = values

    def fill(self, args: Sequence[Any], created: dict[int, Tensor]) -> None:
        """Find every tensor of this step and check it; no kernel runs before all tables are full.

        ``created`` holds the states that this step makes, by output position.

        Raises:
            ChangedTensorError: a tensor is not what the kernel was compiled for.
        """
        self.copies: list[tuple[Tensor, Tensor]] = []
        for fill, column in self.filled:
            fill(self, column, args, created)
        if self.replacements != PackedStorage.replacements:
            replacements = PackedStorage.replacements
            for column in self.resting:
                self._fill_packed(column, args, created)
            self.replacements = replacements  # last: what is interrupted before is not done
        self.prepare()

    @cached_property
    def resting(self) -> list[Column]:
        """Columns of packed states that the step does not pass: their buffers stay where they are
        until one is replaced."""
        return [c for c in self.columns if c.packed and not c.from_arguments]

    @cached_property
    def filled(self) -> list[tuple[Callable[..., None], Column]]:
        """The other columns, with what fills them at every step."""
        fillers = []
        for column in self.columns:
            if column.role is Role.INTERMEDIATE:
                continue  # made later
            if column.packed:
                if column.from_arguments:
                    fillers.append((Bucket._fill_packed, column))
            elif column.kind is OperandKind.NUMBER:
                if any(o.value is None for o in column.operands):
                    fillers.append((Bucket._fill_numbers, column))
            elif column.kind not in (OperandKind.KEY, OperandKind.SUMS):
                fillers.append((Bucket._fill_tensors, column))
        return fillers

    def prepare(self) -> None:
        """Take what memory a run needs."""
        self.run.prepare()

    @cached_property
    def run(self) -> Run:
        """One call of the kernel on the whole table."""
        return self.unit.compiled.bind(self.table, self.sums)

    def launch(self, step: int) -> list[Tensor]:
        """Update every tensor; returns the ordinary tensors that were written and that autograd
        watches. Takes no memory."""
        self.run(step)
        return self.finish()

    def finish(self) -> list[Tensor]:
        """What `launch` returns, after every tensor was updated."""
        written = [t for c in self.columns if c.written for t in c.tensors]
        for original, copy in self.copies:
            if any(t is copy for t in written):
                original.copy_(copy)
        self.release()
        return [t for t in written if not t.is_inference()]

    def replayed(self) -> int:
        """Steps that were made without the host (`Run.replayed`); it may wait for the device."""
        return self.run.replayed()

    def release(self) -> None:
        """Hold no gradient longer than the step: it is the caller's to free."""
        self.copies = []
        for column in self.columns:
            if column.role is Role.GRAD:
                column.tensors = []

    def _fill_packed(self, column: Column, args: Sequence[Any], created: dict[int, Tensor]) -> None:
        """Buffers of packed states: looked up again only when one was replaced."""
        states = column.objects
        if column.from_arguments:
            states = [present(o, args) for o in states]
        storages: list[PackedStorage] = [local(state).packed for state in states]
        versions = [(id(storage), storage.version) for storage in storages]
        if versions == column.versions:
            return
        for storage, operand in zip(storages, column.operands, strict=True):
            if column.format is not None and storage.format != column.format:
                raise FormatMismatchError(
                    where=f"kernel {self.unit.kernel.name}, {operand.source}",
                    found=f"a state in format {storage.format.name}",
                    expected=column.format.name,
                )
        self.table[:, column.index] = [_buffer(s, column.role).data_ptr() for s in storages]
        # Last: what is interrupted before that must not count as done.
        column.versions = versions

    def _fill_numbers(
        self, column: Column, args: Sequence[Any], created: dict[int, Tensor]
    ) -> None:
        """Hyperparameters that are inputs of the step: call arguments, or tensors of a group."""
        for r, (operand, source) in enumerate(zip(column.operands, column.objects, strict=True)):
            if operand.value is None:
                self.numbers[r, column.index] = float(present(source, args))

    def _fill_tensors(
        self, column: Column, args: Sequence[Any], created: dict[int, Tensor]
    ) -> None:
        """Parameters, gradients, states in float32, and states that this step creates."""
        tensors = _as_expected(column, args)
        if tensors is not None:
            column.tensors = tensors
            self.table[:, column.index] = [t.data_ptr() for t in tensors]
            return
        tensors = []
        for operand, source, param in zip(
            column.operands, column.objects, self.params, strict=True
        ):
            found = operand.returned >= 0
            value = local(created[operand.returned]) if found else live(operand, source, args)
            if type(value) is PackedState:
                value = _buffer(value.packed, column.role)
            elif column.role is Role.GRAD:
                value = self._gradient(value, operand, param)
            elif value.stride() != operand.stride or value.shape != operand.shape:
                raise changed(operand, "layout", value)
            if value.device != param.device:
                raise changed(operand, "device", value)
            if value.dtype != operand.dtype and column.role not in (Role.CODES, Role.SCALES):
                raise changed(operand, "dtype", value)
            tensors.append(value)
        column.tensors = tensors
        self.table[:, column.index] = [t.data_ptr() for t in tensors]

    def _gradient(self, grad: Tensor, operand: Operand, param: Operand) -> Tensor:
        """The gradient in the parameter's memory order, which the kernel walks; else a copy."""
        if grad.layout != torch.strided or grad.shape != operand.shape:
            raise changed(operand, "layout", grad)
        if grad.stride() == param.stride:
            return grad
        copy = torch.empty_strided(
            param.shape, param.stride, dtype=grad.dtype, device=grad.device
        ).copy_(grad)
        self.copies.append((grad, copy))
        return copy


class RowBucket(Bucket):
    """A bucket whose tensors are updated one after the other, each with its own intermediates."""

    def __init__(self, unit: Unit, resolve: Resolve) -> None:
        super().__init__(unit, resolve)
        self.held: list[Tensor] = []
        self.between = [c for c in self.columns if c.role is Role.INTERMEDIATE]

    @cached_property
    def runs(self) -> list[Run]:
        """One call of the kernel for each row."""
        rows = range(len(self.instances))
        return [self.unit.compiled.bind(self.table[r : r + 1]) for r in rows]

    def prepare(self) -> None:
        """Nothing yet: rows are completed one by one."""

    def place(self, row: int, values: Mapping[str, Any], made: Mapping[str, Tensor]) -> None:
        """Complete a row, and take the memory that it needs.

        Args:
            row: of the table.
            values: intermediates that the kernel reads, whole; numbers or tensors.
            made: those that it is to write, in the layout of the parameter here.
        """
        for column in self.between:
            operand = column.operands[row]
            if column.kind is OperandKind.NUMBER:
                self.numbers[row, column.index] = float(values[operand.name])
                continue
            tensor = made.get(operand.name)
            if tensor is None:
                tensor = _laid_out(values[operand.name], operand)
            self.held.append(tensor)
            self.table[row, column.index] = tensor.data_ptr()
        self.runs[row].prepare()

    def launch_row(self, row: int, step: int) -> None:
        """Update one tensor; takes no memory."""
        self.runs[row](step)
        self.held.clear()


def _laid_out(value: Tensor, operand: Operand) -> Tensor:
    """This process's part of a value, in the operand's memory order."""
    part = value if operand.region is None else part_of(value, operand.region)
    if part.stride() == operand.stride:
        return part
    ordered = torch.empty_strided(
        operand.shape, operand.stride, dtype=part.dtype, device=part.device
    )
    return ordered.copy_(part)


class MeasuringBucket(Bucket):
    """The tensors of one measuring unit; its kernel samples their blocks and writes only sums."""

    extra_fields = 2

    def __init__(self, unit: Unit, resolve: Resolve) -> None:
        super().__init__(unit, resolve)
        self.slots = slots_of(unit.graph)
        self.sums: Sums = np.zeros((len(self.instances), len(self.slots)))
        (column,) = (c.index for c in self.columns if c.kind is OperandKind.SUMS)
        row = self.sums.strides[0]
        self.table[:, column] = [
            self.sums.ctypes.data + r * row for r in range(len(self.instances))
        ]  # fmt: skip
        self.strides = [sampling_stride(block_count(p.numel)) for p in self.params]
        self.known = [True] * len(self.params)

    def place(self, values: Mapping[Place, Any]) -> None:
        """Fill in the intermediates of the parameters that have them now."""
        for column in (c for c in self.columns if c.role is Role.INTERMEDIATE):
            column.tensors = []
            for row, (operand, param) in enumerate(zip(column.operands, self.params, strict=True)):
                value = values.get((operand.source.param, operand.name))
                self.known[row] = value is not None
                if column.kind is OperandKind.NUMBER:
                    self.numbers[row, column.index] = 1.0 if value is None else float(value)
                    continue
                tensor = torch.ones((), device=param.device) if value is None else value
                column.tensors.append(tensor)
                self.table[row, column.index] = tensor.data_ptr()

    def look(self, number: int) -> dict[int, dict[str, float]]:
        """The sums of every parameter, by its number; look ``number`` decides which blocks.

        Not of those whose intermediates are not known. ``SPOILED`` is above 0 for a parameter
        whose gradient is not finite there: its sums lack the blocks that such elements spoil.
        """
        self.table[:, -2] = self.strides
        self.table[:, -1] = [number % stride for stride in self.strides]
        self.run(0)
        finite = [True] * len(self.params)
        for column in self.columns:
            if column.role is Role.GRAD:
                firsts = [
                    (number - _first_block(param)) % stride
                    for param, stride in zip(self.params, self.strides, strict=True)
                ]
                samples = zip(column.tensors, firsts, self.strides, strict=True)
                finite = [_is_finite(*sample) for sample in samples]
        self.release()
        rows = zip(self.params, self.sums.tolist(), finite, self.known, strict=True)
        return {
            p.source.param: {**dict(zip(self.slots, row, strict=True)), SPOILED: float(not ok)}
            for p, row, ok, known in rows
            if known
        }


def _is_finite(tensor: Tensor, first: int, stride: int) -> bool:
    """Whether the sampled whole blocks are finite; by their sum, which needs no memory."""
    flat = memory_order(tensor.detach())
    if stride > 1:
        flat = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)[first::stride]
    return math.isfinite(flat.sum())


PLAIN = {Tensor, Parameter}


def _as_expected(column: Column, args: Sequence[Any]) -> list[Tensor] | None:
    """The tensors of a column, if they are ordinary ones and all as the kernel expects them.

    A few lists in place of a look at every tensor: some tenths of a microsecond for each.
    """
    if column.role is Role.PARAM or column.role is Role.GRAD:
        tensors = column.objects
        if column.positions is not None:
            tensors = [args[p] for p in column.positions]
        elif column.owners is not None:
            tensors = [p.grad for p in column.owners]
    elif column.role is Role.STATE and column.operands[0].returned < 0:
        tensors = column.objects
    else:
        return None
    if not {type(t) for t in tensors} <= PLAIN:
        return None
    strides, shapes, dtypes, devices = column.expected
    if [t.device for t in tensors] != devices:
        return None
    if [t.dtype for t in tensors] != dtypes or [t.shape for t in tensors] != shapes:
        return None
    try:
        return tensors if [t.stride() for t in tensors] == strides else None
    except RuntimeError:  # a sparse tensor has no strides
        return None


def recording() -> bool:
    """Whether a CUDA graph is being captured. It holds the addresses of codes and scales, and no
    host code runs when it is replayed: from then on the planner leaves widths alone."""
    if not HAS_CUDA:
        return False
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's
    return bool(started) and torch.cuda.is_current_stream_capturing()


HAS_CUDA: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]  # torch's
"""Whether this torch knows CUDA, or ROCm, which goes by that name."""

SPOILED = "spoiled"
"""Name of the sum that counts gradients that are not finite."""

SAMPLED_BLOCKS = 64
"""Blocks of a tensor that a look samples at least, if it has as many."""
WIDEST_STRIDE = 128


def sampling_stride(blocks: int) -> int:
    """Every how many blocks of a tensor (of the whole one, not of a shard) are looked at."""
    return min(max(1, blocks // SAMPLED_BLOCKS), WIDEST_STRIDE)


def present(source: Any, args: Sequence[Any]) -> Any:
    """The object behind an operand in this call.

    Of a sharded tensor it is the local one. In the call that packed a state, Dynamo still passes
    the float32 tensor that it saw.
    """
    if type(source) is Gradient:
        return source.param.grad
    if type(source) is not Argument:
        return local(source)
    value, live = local(args[source.position]), local(source.live)
    packed = isinstance(live, PackedState) and not isinstance(value, PackedState)
    return live if packed else value


def live(operand: Operand, source: Any, args: Sequence[Any]) -> Any:
    """What `present` gives; a gradient that was left partial is added up first."""
    if operand.role is Role.GRAD and type(source) is Argument:
        return gradient(args[source.position], operand.region)
    return present(source, args)


def changed(operand: Operand, what: str, value: Tensor) -> ChangedTensorError:
    def describe(like: Operand | Tensor, stride: Sequence[int]) -> str:
        return f"{like.dtype}{list(like.shape)} with strides {list(stride)} on {like.device}"

    stride = value.stride() if value.layout == torch.strided else ()
    return ChangedTensorError(
        source=operand.source,
        what=f"{operand.role}'s {what}",
        found=describe(value, stride),
        expected=describe(operand, operand.stride),
    )


def _buffer(storage: PackedStorage, role: Role) -> Tensor:
    return storage.scales if role is Role.SCALES else storage.codes


def _first_block(param: Operand) -> int:
    return 0 if param.region is None else param.region.first_block


def _numel(instance: Instance) -> int:
    return torch.Size(instance.param.shape).numel()

"""What a captured step must be like to be compiled; refused before any state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tag, Tensor, strided
from torch._ops import OpOverload

from stq_compile.capture import Argument, Captured
from stq_compile.codegen.backend import check_device
from stq_compile.errors import RandomStepError, ShardedStateError, SharedMemoryError
from stq_compile.packed_state import PackedState
from stq_compile.shards import local
from stq_compile.step_graph import Program, Role, StepGraph, location_of


def check_program(program: Program) -> None:
    """Devices and shards of an analysed program, and that nothing in it is random."""
    for _, operand in program.operands():
        if operand.role in (Role.PARAM, Role.GRAD):
            check_device(operand.device, operand.source)
    for unit in (unit.region or unit for unit in program.units):
        _check_created(unit, program.optimizer)
        for node in unit.calls:
            target = node.target
            if isinstance(target, OpOverload) and Tag.nondeterministic_seeded in target.tags:
                raise RandomStepError(
                    optimizer=program.optimizer, operator=target, location=location_of(node)
                )


def _check_created(unit: StepGraph, optimizer: str) -> None:
    """States that a step makes for a sharded parameter are sharded as it is, or one number."""
    for instance in unit.instances:
        if instance.param.region is None:
            continue
        for operand in instance.operands:
            if operand.returned >= 0 and operand.region is None and operand.shape != ():
                raise ShardedStateError(
                    optimizer=optimizer, source=operand.source, shape=operand.shape
                )


def check_memory(captured: Captured, params: Sequence[Tensor]) -> None:
    """No state of a step lies in the memory of another, of a parameter or of a gradient (a view
    that was kept)."""
    sources = {source.param: source for role, source in captured.bindings if role is Role.PARAM}
    found = []
    for i, param in enumerate(params):
        name = str(sources.get(i, f"parameter {i}"))
        found += _extent(name, param)
        found += [] if param.grad is None else _extent(name, param.grad, gradient=True)
    for (role, source), binding in captured.bindings.items():
        value = binding.live if isinstance(binding, Argument) else binding
        if role is Role.STATE and isinstance(value, Tensor):
            found += _extent(str(source), value)
    for one, other in pairwise(sorted(found)):
        if other.start < one.end and not (one.gradient and other.gradient):
            raise SharedMemoryError(
                optimizer=captured.program.optimizer, first=one.name, second=other.name
            )


class _Extent(NamedTuple):
    """Where a tensor lies in memory, in bytes."""

    start: int
    end: int
    name: str
    gradient: bool


def _extent(name: str, tensor: Tensor, *, gradient: bool = False) -> list[_Extent]:
    """Of an ordinary tensor that has elements; of others nothing."""
    value = local(tensor)
    if isinstance(value, PackedState) or value.layout != strided or value.numel() == 0:
        return []
    last = sum((n - 1) * s for n, s in zip(value.size(), value.stride(), strict=True))
    start, name = value.data_ptr(), f"the gradient of {name}" if gradient else name
    return [_Extent(start, start + (last + 1) * value.element_size(), name, gradient)]

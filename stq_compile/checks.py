"""What a captured step must be like to be compiled; refused before any state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tag, Tensor
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
    """No state of a step lies in the memory of another, or of any parameter (a view, kept)."""
    sources = {source.param: source for role, source in captured.bindings if role is Role.PARAM}
    tensors = [(str(sources.get(i, f"parameter {i}")), p) for i, p in enumerate(params)]
    for (role, source), binding in captured.bindings.items():
        value = binding.live if isinstance(binding, Argument) else binding
        if role is Role.STATE and isinstance(value, Tensor):
            tensors.append((str(source), value))
    found = []
    for name, tensor in tensors:
        value = local(tensor)
        if not isinstance(value, PackedState) and value.numel():
            last = sum((n - 1) * s for n, s in zip(value.size(), value.stride(), strict=True))
            start = value.data_ptr()
            found.append((start, start + (last + 1) * value.element_size(), name))
    for (_, end, first), (start, _, second) in pairwise(sorted(found)):
        if start < end:
            raise SharedMemoryError(
                optimizer=captured.program.optimizer, first=first, second=second
            )

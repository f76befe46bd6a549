"""What a captured step must be like to be compiled; refused before any state is touched."""

from __future__ import annotations

from torch import Tag
from torch._ops import OpOverload

from stq_compile.codegen.backend import check_device
from stq_compile.errors import RandomStepError, ShardedStateError
from stq_compile.step_graph import Program, Role, StepGraph, location_of


def check_program(program: Program) -> None:
    """Devices and shards of an analysed program, and that nothing in it is random."""
    for _, operand in program.operands():
        if operand.role in (Role.PARAM, Role.GRAD):
            check_device(operand.device, operand.source)
    for unit in program.units:
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

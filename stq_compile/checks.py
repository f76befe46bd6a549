"""What a captured step must be like to be compiled; refused before any state is touched."""

from __future__ import annotations

from torch import Tag
from torch._ops import OpOverload

from stq_compile.codegen.backend import check_device
from stq_compile.errors import RandomStepError, ShardedRegionError
from stq_compile.step_graph import Program, Role, location_of


def check_program(program: Program) -> None:
    """Devices and shards of an analysed program, and that nothing in it is random."""
    for unit, operand in program.operands():
        if unit.unfused and operand.region is not None and operand.region.sharded:
            raise ShardedRegionError(
                optimizer=program.optimizer, source=operand.source, reason=unit.unfused
            )
        if operand.role in (Role.PARAM, Role.GRAD):
            check_device(operand.device, operand.source)
    for unit in program.units:
        for node in unit.calls:
            target = node.target
            if isinstance(target, OpOverload) and Tag.nondeterministic_seeded in target.tags:
                raise RandomStepError(
                    optimizer=program.optimizer, operator=target, location=location_of(node)
                )

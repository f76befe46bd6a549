"""What a captured step must be like to be compiled; refused before any state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tag, Tensor
from torch._ops import OpOverload

from stq_compile.capture import Argument, Captured
from stq_compile.errors import (
    RandomStepError,
    ShardedRegionError,
    SharedMemoryError,
    UnsupportedDeviceError,
)
from stq_compile.packed_state import PackedState
from stq_compile.shards import local
from stq_compile.step_graph import Program, Role, location_of


def check_program(program: Program) -> None:
    """Devices and shards of an analysed program, and that nothing in it is random."""
    for unit, operand in program.operands():
        if unit.unfused and operand.region is not None and operand.region.sharded:
            raise ShardedRegionError(
                optimizer=program.optimizer, source=operand.source, reason=unit.unfused
            )
        if operand.role in (Role.PARAM, Role.GRAD) and operand.device.type != "cpu":
            raise UnsupportedDeviceError(source=operand.source, device=operand.device, valid="cpu")
    for unit in program.units:
        for node in unit.calls:
            target = node.target
            if isinstance(target, OpOverload) and Tag.nondeterministic_seeded in target.tags:
                raise RandomStepError(
                    optimizer=program.optimizer, operator=target, location=location_of(node)
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

"""Memory of training before training: parameters, gradients and states, on each of many GPUs.

Arithmetic on shapes. Sharding is FSDP2's: every tensor is cut along its first dimension into
``world_size`` chunks as `torch.chunk` cuts it, and the first rank holds the largest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stq_compile.capture import params_of
from stq_compile.formats import FLOAT32, Format
from stq_compile.inspection import Inspection
from stq_compile.step_graph import Operand

CAPACITIES = (24, 40, 80)
"""GB (10^9 bytes) of common GPUs."""


@dataclass(frozen=True)
class Holding:
    """Bytes on the fullest rank."""

    parameters: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states

    def fits(self, gigabytes: int) -> bool:
        return self.total <= gigabytes * 10**9


@dataclass(frozen=True)
class Tensors:
    """One parameter with its states; ``bytes`` are of the states on the fullest rank."""

    name: str
    shape: tuple[int, ...]
    formats: Mapping[str, str]
    bytes: int
    fp32_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What each choice of states takes: ``fp32``, ``8-bit`` and ``packed``."""

    optimizer: str
    world_size: int
    parameters: int
    elements: int
    state_elements: int
    bits_per_element: float
    holdings: Mapping[str, Holding]
    tensors: Sequence[Tensors]


def plan_memory(found: Inspection, world_size: int = 1) -> MemoryPlan:
    """The memory of an inspected optimizer, its states at their first widths."""
    params = params_of(found.optimizer)
    weights = sum(_bytes_of_shard(p, world_size) for p in params)
    packed = found.states()
    eight = found.states(replace(found.session.options, precision=8, target_bits=None,
                                 tolerance=None))  # fmt: skip
    choices: dict[str, Iterable[tuple[Operand, Format]]] = {
        "fp32": [(operand, FLOAT32) for operand, _ in packed],
        "8-bit": eight,
        "packed": packed,
    }
    holdings = {
        name: Holding(weights, weights, sum(_state_bytes(o, f, world_size) for o, f in states))
        for name, states in choices.items()
    }
    state_elements = sum(math.prod(o.shape) for o, _ in packed)
    whole = sum(_state_bytes(o, f, 1) for o, f in packed)
    return MemoryPlan(
        found.name,
        world_size,
        len(params),
        sum(p.numel() for p in params),
        state_elements,
        8 * whole / state_elements if state_elements else 0.0,
        holdings,
        _tensors(packed, world_size),
    )


def _tensors(states: Iterable[tuple[Operand, Format]], world_size: int) -> list[Tensors]:
    """Parameters by the bytes of their states, the largest first."""
    grouped: dict[int, list[tuple[Operand, Format]]] = defaultdict(list)
    for operand, format in states:
        grouped[operand.source.param].append((operand, format))
    found = [
        Tensors(
            rows[0][0].source.name,
            max((o.shape for o, _ in rows), key=math.prod),
            {o.source.key: f.name for o, f in rows if o.shape != ()},
            sum(_state_bytes(o, f, world_size) for o, f in rows),
            sum(_state_bytes(o, FLOAT32, world_size) for o, _ in rows),
        )
        for rows in grouped.values()
    ]
    return sorted(found, key=lambda t: -t.bytes)


def _state_bytes(operand: Operand, format: Format, world_size: int) -> int:
    return format.nbytes(shard_numel(operand.shape, world_size))


def _bytes_of_shard(param: Tensor, world_size: int) -> int:
    return param.element_size() * shard_numel(tuple(param.shape), world_size)


def shard_numel(shape: tuple[int, ...], world_size: int) -> int:
    """Elements of the first and largest chunk along the first dimension; all of a scalar."""
    if not shape:
        return 1
    return -(-shape[0] // world_size) * math.prod(shape[1:])

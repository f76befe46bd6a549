"""Labels every node with where it runs: once per tensor, once per element, or not at all.

``scalar``: values that one tensor has one of (step counts, bias corrections), computed once per
tensor in float64. ``fused``: elements, computed in float32 registers between the decoding and the
encoding of the packed states. An operator that the code generator has no kernel for is an error
that names the operator and the line of the optimizer that it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from stq_compile.errors import UnsupportedOperatorError
from stq_compile.step_graph import Program, Role, StepGraph, location_of

Supports = Callable[[fx.Node], str]
"""Why the code generator cannot lower a node; empty if it can."""


def partition(program: Program, why_not: Supports) -> Program:
    """Add ``regions`` to every unit; raises `UnsupportedOperatorError` for what cannot be fused."""
    units = tuple(_partition(unit, program.optimizer, why_not) for unit in program.units)
    return Program(program.optimizer, units)


def refuse_unsupported(program: Program, why_not: Supports) -> Program:
    """The program as it is; raises for an operator without a kernel, before any pass runs it."""
    for unit in program.units:
        _refuse(unit, program.optimizer, why_not)
    return program


def _refuse(unit: StepGraph, optimizer: str, why_not: Supports) -> None:
    for node in unit.calls:
        reason = why_not(node)
        if reason:
            raise UnsupportedOperatorError(
                optimizer=optimizer,
                source=unit.instances[0].param.source,
                operator=getattr(node.target, "_name", None) or str(node.target),
                reason=reason,
                location=location_of(node),
            )


def _partition(unit: StepGraph, optimizer: str, why_not: Supports) -> StepGraph:
    _refuse(unit, optimizer, why_not)
    elements = element_nodes(unit)
    regions = {n.name: "fused" if n in elements else "scalar" for n in unit.calls}
    return unit.replace(regions=regions)


def element_nodes(unit: StepGraph) -> set[fx.Node]:
    """Nodes that hold one value per element of the parameter; the others hold one per tensor.

    A 0-dim state is a scalar unless the value written to it is elementwise (the state of a 0-dim
    parameter), which is found by repeating until nothing changes.
    """
    elementwise = {Role.PARAM, Role.GRAD, Role.CODES, Role.SCALES}
    by_name = {n.name: n for n in unit.placeholders}
    elements: set[fx.Node] = {
        n
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.role in elementwise or (o.role is Role.STATE and o.shape != ())
    }
    while True:
        for node in unit.calls:
            inputs: list[Any] = node.all_input_nodes
            if any(a in elements for a in inputs):
                elements.add(node)
        grown = {
            by_name[target]
            for target, value in zip(unit.writes or (), unit.outputs, strict=True)
            if target is not None and value in elements and by_name[target] not in elements
        }
        if not grown:
            return elements
        elements |= grown

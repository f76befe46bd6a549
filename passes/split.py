"""One step graph per parameter: the connected components of the step, scalars aside.

Scalars that all parameters share (``lr`` as an input, and what is computed from it alone) are
copied into each component. Two parameters in one component mean that one's update reads the other's
tensors; that is refused, since their update is not one kernel over independent elements.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from stq_compile.errors import (
    CoupledParametersError,
    SharedScalarError,
    UnsupportedOutputError,
)
from stq_compile.step_graph import Instance, Operand, Program, Role, StepGraph, location_of

IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)


VIEWS = ("detach", "view", "view_as", "reshape")
"""Methods of Dynamo's graph that return their first argument's memory."""


def split(program: Program) -> Program:
    """Split every unit of one instance into one unit per parameter, in parameter order."""
    units = [part for unit in program.units for part in _split(unit, program.optimizer)]
    return Program(program.optimizer, tuple(units))


def _split(unit: StepGraph, optimizer: str) -> list[StepGraph]:
    owner = _owners(unit, optimizer)
    by_name = {o.name: o for o in unit.operands}
    positions = unit.instances[0].returns
    units = []
    for param in sorted({p for p in owner.values() if p is not None}):
        members = {n for n, p in owner.items() if p == param}
        needed = members | _scalars_of(members)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        operands: list[Operand] = []
        for node in _scalars_first(unit.graph, needed, members):
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                operands.append(by_name[node.name])
        kept = [
            (out, position)
            for out, position in zip(unit.outputs, positions, strict=True)
            if isinstance(out, fx.Node) and owner.get(out) == param
        ]
        graph.output(tuple(env[out] for out, _ in kept))
        instance = Instance(tuple(operands), tuple(position for _, position in kept))
        units.append(StepGraph(f"{unit.name}_{param}", graph, (instance,)))
    _check_outputs(unit, optimizer)
    return units


def _check_outputs(unit: StepGraph, optimizer: str) -> None:
    """A returned value must be new: a state of one parameter, or a number (`numbers`)."""
    for out in unit.outputs:
        base = out
        while isinstance(base, fx.Node) and base.target in VIEWS:
            base = base.args[0]
        if isinstance(base, fx.Node) and base.op == "placeholder":
            raise UnsupportedOutputError(
                optimizer=optimizer,
                found=f"a view of {base.name}, where a state of its own is expected",
                location=location_of(out),
            )


def _owners(unit: StepGraph, optimizer: str) -> dict[fx.Node, int | None]:
    """Which parameter each node belongs to; None for what depends on shared scalars only."""
    owner: dict[fx.Node, int | None] = {}
    names: dict[int, str] = {}
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        owner[node] = None if operand.role is Role.SCALAR else operand.source.param
        names[operand.source.param] = operand.source.name
    for node in unit.calls:
        found = {owner[a] for a in node.all_input_nodes if owner[a] is not None}
        if len(found) > 1:
            first, second = (names[p] for p in sorted(p for p in found if p is not None)[:2])
            raise CoupledParametersError(
                optimizer=optimizer, first=first, second=second, location=location_of(node)
            )
        owner[node] = found.pop() if found else None
        if owner[node] is None and _is_in_place(node):
            source = node.all_input_nodes[0].name
            raise SharedScalarError(optimizer=optimizer, source=source, location=location_of(node))
    return owner


def _is_in_place(node: fx.Node) -> bool:
    """Whether a call of Dynamo's graph writes its first argument (``add_``, ``+=``)."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.startswith("__") and bool(node.all_input_nodes)
    return node.target in IN_PLACE_OPERATORS


def _scalars_first(graph: fx.Graph, needed: set[fx.Node], members: set[fx.Node]) -> list[fx.Node]:
    """Placeholders, then shared scalars, then the rest: one order for equal components, wherever
    the whole step happened to compute a shared scalar."""
    kept = [n for n in graph.nodes if n in needed]
    return sorted(kept, key=lambda n: (n.op != "placeholder", n in members))


def _scalars_of(members: set[fx.Node]) -> set[fx.Node]:
    """The shared scalar nodes that ``members`` need, transitively."""
    needed: set[fx.Node] = set()
    stack: list[Any] = [a for node in members for a in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in members and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed

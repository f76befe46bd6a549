"""One step graph per parameter: the connected components of the step, scalars aside.

What depends on shared scalars alone (``lr`` as an input, and what is computed from it) and is not
written in place connects nothing: it is copied into each component. A component with several
parameters is one whose update reads values of all of them (a global norm); it stays together.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from stq_compile.errors import SharedScalarError, UnsupportedOutputError
from stq_compile.step_graph import Instance, Operand, Program, Role, StepGraph, location_of

IN_PLACE_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.setitem),
)

VIEWS = ("detach", "view", "view_as", "reshape")
"""Methods of Dynamo's graph that return their first argument's memory."""


def split(program: Program) -> Program:
    """Split every unit of one instance into one unit per component, in parameter order."""
    units = [part for unit in program.units for part in _split(unit, program.optimizer)]
    return Program(program.optimizer, tuple(units))


def _split(unit: StepGraph, optimizer: str) -> list[StepGraph]:
    _check_outputs(unit, optimizer)
    shared = _copied(unit, optimizer)
    positions = unit.instances[0].returns
    units = []
    for members in _components(unit, shared):
        needed = members | _scalars_of(members)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        operands: list[Operand] = []
        for node in _in_order(unit, needed, members):
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                operands.append(unit.operand_of(node))
        kept = [
            (out, position)
            for out, position in zip(unit.outputs, positions, strict=True)
            if isinstance(out, fx.Node) and out in members
        ]
        graph.output(tuple(env[out] for out, _ in kept))
        instance = Instance(tuple(operands), tuple(position for _, position in kept))
        first = min(o.source.param for o in operands if o.source.param >= 0)
        units.append(StepGraph(f"{unit.name}_{first}", graph, (instance,)))
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


def _copied(unit: StepGraph, optimizer: str) -> set[fx.Node]:
    """Nodes that every component gets a copy of: values of shared scalars, never written."""
    shared: set[fx.Node] = set()
    written: list[tuple[fx.Node, fx.Node]] = []
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            if unit.operand_of(node).role is Role.SCALAR:
                shared.add(node)
        elif node.op != "output" and all(a in shared for a in node.all_input_nodes):
            shared.add(node)
        written += [(node, target) for target in written_by(node) if target in shared]
    for node, base in written:
        while base.op != "placeholder" and base in shared and base.all_input_nodes:
            targets = written_by(base) or (base.all_input_nodes if base.target in VIEWS else [])
            if not targets:
                break
            base = targets[0]
        if base.op == "placeholder":
            raise SharedScalarError(
                optimizer=optimizer, source=base.name, location=location_of(node)
            )
        # A tensor of some component's own, made from nothing: so is all that comes of it.
        owned = {base}
        for other in unit.graph.nodes:
            if other in shared and any(a in owned for a in other.all_input_nodes):
                owned.add(other)
        shared -= owned
    return shared


def _components(unit: StepGraph, shared: set[fx.Node]) -> list[set[fx.Node]]:
    """The connected components of all other nodes that have a parameter's tensor in them.

    All tensors of one parameter are in one component.
    """
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    nodes = [n for n in unit.graph.nodes if n.op != "output" and n not in shared]
    for node in nodes:
        find(node)
        if node.op == "placeholder":
            parent[find(node)] = find(("param", unit.operand_of(node).source.param))
        for other in node.all_input_nodes:
            if other not in shared:
                parent[find(node)] = find(other)
    groups: dict[Any, set[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), set()).add(node)
    owned = [g for g in groups.values() if any(n.op == "placeholder" for n in g)]
    return sorted(owned, key=lambda g: min(_numbers(unit, g)))


def _numbers(unit: StepGraph, group: set[fx.Node]) -> list[int]:
    return [unit.operand_of(n).source.param for n in group if n.op == "placeholder"]


def written_by(node: fx.Node) -> list[fx.Node]:
    """What a call of Dynamo's graph writes in place: its first argument (``add_``, ``+=``,
    ``x[i] = y``), or those after ``out=``."""
    out = node.kwargs.get("out")
    if out is not None:
        outs = out if isinstance(out, (list, tuple)) else [out]
        return [n for n in outs if isinstance(n, fx.Node)]
    if node.op == "call_method":
        name = str(node.target)
    else:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    writes = name.endswith("_") and not name.startswith("__")
    if not writes and node.target not in IN_PLACE_OPERATORS:
        return []
    return node.all_input_nodes[:1]


ROLES = tuple(Role)


def _in_order(unit: StepGraph, needed: set[fx.Node], members: set[fx.Node]) -> list[fx.Node]:
    """Placeholders by role and key, then shared scalars, then the rest.

    One order for equal components, wherever the whole step happened to compute a shared scalar and
    in whatever order Dynamo met the tensors of a parameter.
    """

    def place(node: fx.Node) -> tuple[Any, ...]:
        if node.op != "placeholder":
            return (1, node in members)
        operand = unit.operand_of(node)
        return (0, ROLES.index(operand.role), operand.source.key, operand.source.param)

    return sorted((n for n in unit.graph.nodes if n in needed), key=place)


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

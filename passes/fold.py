"""Equal components become one template with many instances.

Two components are equal if their graphs are: operators, structure, literals that are not floats,
and the inputs' roles, keys, dtypes and devices, in the order that `split` gives them. Shapes don't
count, except that a 0-dim tensor differs from the rest. A float literal in which equal components
differ (a parameter group's own ``lr`` or ``weight_decay``) becomes a scalar input, with each
instance's value.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from stq_compile.step_graph import Instance, Operand, Program, Role, Source, StepGraph


def fold(program: Program) -> Program:
    """Group equal units; the first of each group is its template."""
    groups: dict[str, list[StepGraph]] = defaultdict(list)
    for unit in program.units:
        groups[structural_hash(unit)].append(unit)
    units = tuple(_template(f"template_{i}", units) for i, units in enumerate(groups.values()))
    return Program(program.optimizer, units)


def structural_hash(unit: StepGraph) -> str:
    """Hash of everything in which equal components must agree."""
    number = {node: i for i, node in enumerate(unit.graph.nodes)}
    lines: list[str] = []
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        key = "" if operand.role is Role.SCALAR else operand.source.key
        kind = f"{operand.dtype} {operand.device} {operand.shape == ()}"
        lines.append(f"{number[node]} {operand.role} {key} {kind}")
    for node in unit.graph.nodes:
        if node.op != "placeholder":
            target = f"{getattr(node.target, '__module__', '')}.{node.target}"
            args = _shape_of((node.args, sorted(node.kwargs.items())), number)
            lines.append(f"{number[node]} {node.op} {target} {args}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shape_of(value: Any, number: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{number[value]}"
    if isinstance(value, (list, tuple)):
        return f"({','.join(_shape_of(v, number) for v in value)})"
    return "<float>" if isinstance(value, float) else repr(value)


def _floats(unit: StepGraph) -> list[float]:
    """All float literals, in order of nodes and arguments."""

    def walk(value: Any) -> Iterator[float]:
        if isinstance(value, float):
            yield value
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from walk(v)

    return [
        x
        for node in unit.calls
        for x in walk((node.args, [v for _, v in sorted(node.kwargs.items())]))
    ]


def _template(name: str, units: list[StepGraph]) -> StepGraph:
    literals = [_floats(unit) for unit in units]
    differing = [i for i, column in enumerate(zip(*literals, strict=True)) if len(set(column)) > 1]
    first = units[0]
    graph, names = _hoist(first, differing) if differing else (first.graph, {})
    instances = []
    for unit, values in zip(units, literals, strict=True):
        # Placeholders are named as in the template, whatever the component called them.
        operands = tuple(
            _renamed(o, node.name)
            for o, node in zip(unit.operands, first.placeholders, strict=True)
        )
        hoisted = tuple(
            _constant(names[i], values[i], unit.instances[0].param.source.name) for i in differing
        )
        instances.append(Instance(hoisted + operands, unit.instances[0].returns))
    return StepGraph(name, graph, tuple(instances))


def _hoist(unit: StepGraph, differing: list[int]) -> tuple[fx.Graph, dict[int, str]]:
    graph = fx.Graph()
    inputs: dict[int, fx.Node] = {}
    for i in differing:
        inputs[i] = graph.placeholder(f"constant_{i}")
        inputs[i].meta["example"] = torch.tensor(_floats(unit)[i], dtype=torch.float64)
    holes = {i: graph.call_method("item", (node,)) for i, node in inputs.items()}
    env: dict[fx.Node, fx.Node] = {}
    counter = iter(range(1 << 30))

    def fill(value: Any) -> Any:
        if isinstance(value, float):
            return holes.get(next(counter), value)
        if isinstance(value, (list, tuple)):
            return type(value)(fill(v) for v in value)
        return value

    for node in unit.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.op.startswith("call"):
            env[node].args = fill(env[node].args)
            env[node].kwargs = {k: fill(v) for k, v in sorted(env[node].kwargs.items())}
    return graph, {i: node.name for i, node in inputs.items()}


def _renamed(operand: Operand, name: str) -> Operand:
    return Operand(**{**operand.__dict__, "name": name})


def _constant(name: str, value: float, param: str) -> Operand:
    source = Source(-1, "", f"{name} of {param}")
    return Operand(name, Role.SCALAR, source, (), (), torch.float64, value=value)

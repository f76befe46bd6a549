"""A kernel that makes values for the rest of its region is divided: first make them, then write.

    kernel: ... -> m, v, p, u_value      =>     kernel_0: ... -> u_value
                                                kernel:   ... -> m, v, p

so that everything that may fail is computed before the optimizer's tensors change (`passes.cut`).
Decoding, arithmetic and encoding are already in the graph; each part keeps what it needs of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from stq_compile.step_graph import Program, Role, StepGraph


def feed(program: Program) -> Program:
    """Give every kernel of a cut region the kernels that its rest calls."""
    return Program(program.optimizer, tuple(map(_divided, program.units)))


def without_feeds(unit: StepGraph) -> StepGraph:
    """The kernel of a cut region without what it makes for the rest; any other as it is."""
    made = {o.name for o in unit.operands if o.role is Role.INTERMEDIATE}
    kept = [name for name in unit.writes or () if name not in made]
    return unit if unit.rest is None else _writing(unit, kept)


def _divided(unit: StepGraph) -> StepGraph:
    if unit.rest is None:
        return unit
    calls = [n for n in unit.rest.graph.nodes if n.op == "call_module"]
    kernels = (
        _writing(unit, call.args).replace(name=f"{unit.name}_{call.target}", rest=None, whole=None)
        for call in calls
    )
    return without_feeds(unit).replace(feeds=tuple(kernels))


def _writing(unit: StepGraph, targets: Collection[str]) -> StepGraph:
    """The unit with these of its writes, and the inputs that they need; the parameter stays."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in unit.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, env.__getitem__)
    results = dict(zip(unit.writes or (), unit.outputs, strict=True))
    graph.output(tuple(env[results[name]] for name in targets))
    graph.eliminate_dead_code()
    kept = {*targets, unit.instances[0].param.name}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node.name in kept or node.users:
            kept.add(node.name)
        else:
            graph.erase_node(node)
    instances = tuple(
        replace(instance, operands=tuple(o for o in instance.operands if o.name in kept))
        for instance in unit.instances
    )
    return unit.replace(
        graph=graph,
        instances=instances,
        writes=tuple(targets),
        formats={name: format for name, format in unit.formats.items() if name in kept},
        regions={n.name: unit.regions[n.name] for n in graph.nodes if n.name in unit.regions},
    )

"""Values that a step returns and that belong to no single parameter: its step counters, mostly.

    state["step"] += 1     ->    the step takes the number s0 and returns s0 + 1

They depend on shared scalars alone, and are computed once a step in Python, so that a whole number
stays one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from stq_compile.step_graph import Operand, StepGraph


@dataclass(frozen=True)
class SharedResults:
    """A module that computes them, its inputs in order, and their places in the step's outputs."""

    module: fx.GraphModule
    operands: tuple[Operand, ...]
    positions: tuple[int, ...]


def shared_results(step: StepGraph) -> SharedResults | None:
    """What the captured step (one instance) returns beside states; None if that is nothing."""
    shared = shared_nodes(step)
    found = [
        (out, position)
        for out, position in zip(step.outputs, step.instances[0].returns, strict=True)
        if isinstance(out, fx.Node) and out in shared
    ]
    if not found:
        return None
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    operands = []
    needed = _ancestors([out for out, _ in found])
    for node in step.graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                operands.append(step.operand_of(node))
    graph.output(tuple(env[out] for out, _ in found))
    module = fx.GraphModule({}, graph)
    return SharedResults(module, tuple(operands), tuple(position for _, position in found))


def shared_nodes(step: StepGraph) -> set[fx.Node]:
    """Nodes that depend on shared scalars alone."""
    shared: set[fx.Node] = set()
    for node in step.graph.nodes:
        if node.op == "placeholder":
            if step.operand_of(node).source.param < 0:
                shared.add(node)
        elif node.op != "output" and all(a in shared for a in node.all_input_nodes):
            shared.add(node)
    return shared


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen

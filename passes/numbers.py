"""Values that a step returns and that belong to no parameter's graph: its step counters, mostly.

    state["step"] += 1                 ->   the step takes the number s0 and returns s0 + 1
    state["row"] = torch.zeros(3)      ->   a state made from nothing, and not used yet

They depend on shared scalars alone, and are computed once a step in Python, so that a whole number
stays one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from stq_compile.passes.split import written_by
from stq_compile.step_graph import Operand, StepGraph


@dataclass(frozen=True)
class SharedResults:
    """A module that computes them, its inputs in order, and their places in the step's outputs."""

    module: fx.GraphModule
    operands: tuple[Operand, ...]
    positions: tuple[int, ...]


def shared_results(step: StepGraph, kept: Collection[int]) -> SharedResults | None:
    """What the captured step (one instance) returns beside states; None if that is nothing.

    ``kept``: positions in the step's outputs that parameters' graphs return.
    """
    found = [
        (out, position)
        for out, position in zip(step.outputs, step.instances[0].returns, strict=True)
        if isinstance(out, fx.Node) and position not in kept
    ]
    if not found:
        return None
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    operands = []
    needed = _sources([out for out, _ in found])
    for node in step.graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                operands.append(step.operand_of(node))
    graph.output(tuple(env[out] for out, _ in found))
    module = fx.GraphModule({}, graph)
    return SharedResults(module, tuple(operands), tuple(position for _, position in found))


def _sources(nodes: list[fx.Node]) -> set[fx.Node]:
    """All that ``nodes`` are computed from, and what writes into that in place."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(u for u in node.users if node in written_by(u))
    return seen

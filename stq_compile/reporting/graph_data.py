"""A step graph as plain data: what a picture of it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from stq_compile.passes.ranges import base_name
from stq_compile.step_graph import StepGraph, location_of

GraphData = dict[str, list[Any]]
"""``nodes``: label, kind, note; ``edges``: pairs of node numbers. Kinds are roles of inputs,
``scalar op``, ``element op``, ``op`` (not partitioned), and ``result``."""

SYMBOLS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "sqrt": "√", "pow": "^"}
KINDS = {"fused": "element op", "scalar": "scalar op"}


def graph_data(unit: StepGraph) -> GraphData:
    """Inputs, operators and results of a functional graph, in its order."""
    number: dict[fx.Node, int] = {}
    nodes: list[dict[str, str]] = []
    edges: list[list[int]] = []

    def add(label: str, kind: str, note: str) -> int:
        nodes.append({"label": label, "kind": kind, "note": note})
        return len(nodes) - 1

    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        label = operand.source.key or str(operand.role)
        if operand.role in ("codes", "scales", "key"):
            label = f"{label} {operand.role}"
        number[node] = add(label, str(operand.role), operand.describe())
    for node in unit.calls:
        kind = KINDS.get(unit.regions.get(node.name, ""), "op")
        number[node] = add(_label(node), kind, location_of(node))
        edges += [[number[a], number[node]] for a in node.all_input_nodes]
    by_name: Mapping[str, str] = {o.name: nodes[i]["label"] for i, o in enumerate(unit.operands)}
    for target, out in zip(unit.writes or (), unit.outputs, strict=False):
        if isinstance(out, fx.Node):
            result = add(f"new {by_name.get(target, target)}", "result", target)
            edges.append([number[out], result])
    return {"nodes": nodes, "edges": edges}


def _label(node: fx.Node) -> str:
    """``× 0.999``, ``1 −``, ``√``, ``quantize ratio4``."""
    name = base_name(node)
    symbol = SYMBOLS.get(name, name)
    shown = [
        f"{a:.4g}" if isinstance(a, float) else str(a)
        for a in node.args
        if isinstance(a, (int, float, str)) and not isinstance(a, bool)
    ]
    first = node.args[0] if node.args else None
    if len(node.args) == 2 and isinstance(first, (int, float)):
        return " ".join([*shown, symbol])
    return " ".join([symbol, *shown[:2]])

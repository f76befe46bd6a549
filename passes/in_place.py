"""What a step updates in place is updated in place again, where a region runs by operators.

    div = aten.div(mm, mean)              div = aten.div_(mm, mean)
    clamp = aten.clamp(div, 1e-60)   =>   clamp = aten.clamp_(div, 1e-60)
    mul = aten.mul(clamp, grad)           mul = aten.mul_(clamp, grad)

Functionalization made a new tensor of every update. A pointwise operator may write into its first
argument's memory if that is a temporary which nothing reads any more; it computes the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def reuse_memory(graph: fx.Graph) -> None:
    """Change a functional graph; its inputs are left alone, and so are views and what is viewed."""
    last = {a: node for node in graph.nodes for a in node.all_input_nodes}
    own = {node for node in graph.nodes if _makes_new(node) and not any(map(_views, node.users))}
    for node in graph.nodes:
        target = _in_place(node)
        first = node.args[0] if node.args else None
        if target is None or not isinstance(first, fx.Node) or first not in own:
            continue
        if last[first] is not node:
            continue
        if node.all_input_nodes.count(first) == 1 and _alike(first, node):
            node.target = target


def _makes_new(node: fx.Node) -> bool:
    """Whether the result of a node is a tensor with memory of its own."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or _views(node):
        return False
    return isinstance(node.meta.get("val"), Tensor)


def _views(node: fx.Node) -> bool:
    """Whether a node may return memory of its arguments; the output of the graph does."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    returns = target._schema.returns
    return any(r.alias_info is not None for r in returns) or target.is_view


def _in_place(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that does the same to its first argument, if it is pointwise and has one."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    packet = getattr(aten, f"{target._opname}_", None) if target.namespace == "aten" else None
    found: torch._ops.OpOverload | None = getattr(packet, target._overloadname, None)
    return found


def _alike(first: fx.Node, node: fx.Node) -> bool:
    before, after = first.meta["val"], node.meta.get("val")
    return isinstance(after, Tensor) and (
        (before.shape, before.stride(), before.dtype, before.device)
        == (after.shape, after.stride(), after.dtype, after.device)
    )

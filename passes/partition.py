"""Where every node runs: once per tensor, once per element, or outside of kernels.

A graph whose values all have one number per element of the parameter, or one per tensor, is one
kernel: ``scalar`` nodes are computed once per tensor in float64, ``fused`` ones per element in
float32 registers between the decoding and the encoding of the packed states. A graph with anything
else in it (matrix products, reductions, sorts, states of other shapes, other dtypes) is a *region*:
its packed states are decoded for one parameter at a time, all its nodes run on ordinary tensors,
and what it wrote is encoded (`regions`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from stq_compile.halves import FLOAT_DTYPES
from stq_compile.packed_state import is_dense
from stq_compile.step_graph import Instance, Operand, Program, Role, StepGraph, location_of

Supports = Callable[[fx.Node], str]
"""Why the code generator cannot lower a node; empty if it can."""


def partition(program: Program) -> Program:
    """Add ``regions`` to every unit."""
    return Program(program.optimizer, tuple(_partition(unit) for unit in program.units))


def _partition(unit: StepGraph) -> StepGraph:
    if unit.unfused:
        return unit.replace(regions={n.name: "region" for n in unit.calls})
    elements = element_nodes(unit)
    regions = {n.name: "fused" if n in elements else "scalar" for n in unit.calls}
    return unit.replace(regions=regions)


def why_unfused(unit: StepGraph, why_not: Supports) -> str:
    """Why a functional graph is no kernel: the first node that is in the way, and its line."""
    shapes = ((), unit.instances[0].param.whole_shape)
    for node in unit.calls:
        reason = why_not(node)
        value = node.meta.get("val")
        if not reason and isinstance(value, Tensor) and tuple(value.shape) not in shapes:
            reason = f"its shape {tuple(value.shape)} is not the parameter's"
        if reason:
            name = getattr(node.target, "_name", None) or str(node.target)
            where = location_of(node)
            return f"{name}: {reason}" + (f", at {where}" if where else "")
    return ""


def why_instance_unfused(instance: Instance, widened: bool = False) -> str:
    """Why the tensors of one parameter do not fit a kernel: it walks them in memory order.

    ``widened``: 16-bit elements are computed on in float32 (`passes.widen`).
    """
    params = [o for o in instance.operands if o.role is Role.PARAM]
    if len(params) != 1:
        return f"it updates {len(params)} parameters together"
    reasons = (why_operand_unfused(o, params[0], widened) for o in instance.operands)
    return next(filter(None, reasons), "") or why_layout_unfused(params[0])


def why_operand_unfused(operand: Operand, param: Operand, widened: bool = False) -> str:
    """Why a kernel that walks ``param`` in memory order cannot reach an operand."""
    if operand.role not in (Role.PARAM, Role.GRAD, Role.STATE):
        return ""
    what = f"the {operand.role} {operand.source}"
    if operand.dtype not in (FLOAT_DTYPES if widened else {torch.float32}):
        return f"{what} is {operand.dtype}"
    if operand.role is Role.STATE and operand.shape == ():
        if operand.dtype != torch.float32 and param.shape != ():
            return f"{what} is a scalar of {operand.dtype}"
        return ""
    if operand.whole_shape != param.whole_shape:
        shapes = operand.whole_shape, param.whole_shape
        return f"{what} has the shape {shapes[0]}, the parameter {shapes[1]}"
    if operand.role is Role.STATE and operand.stride != param.stride:
        return f"{what} has the strides {operand.stride}, the parameter {param.stride}"
    return ""


def why_layout_unfused(param: Operand) -> str:
    """Why no kernel walks a parameter."""
    if not is_dense(torch.empty_strided(param.shape, param.stride, device="meta")):
        return f"the memory of {param.source} is not dense (strides {param.stride})"
    return ""


def by_geometry(unit: StepGraph) -> list[StepGraph]:
    """One unit per shape and layout of its tensors, with stand-ins that have them.

    A region is traced for its shapes: that of a mean is in the graph as the number it divides by.
    Of a tensor that is sharded all is there when the region runs, row-major.
    """
    groups: dict[Any, list[Instance]] = {}
    for instance in unit.instances:
        key = tuple((o.whole_shape, _stride(o), o.dtype) for o in instance.operands)
        groups.setdefault(key, []).append(instance)
    parts = []
    for i, instances in enumerate(groups.values()):
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in unit.graph.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
        for node, operand in zip(
            graph.find_nodes(op="placeholder"), instances[0].operands, strict=True
        ):
            if operand.shape != ():
                dtype = node.meta["example"].dtype  # not the operand's in a widened graph
                node.meta["example"] = torch.empty_strided(
                    operand.whole_shape, _stride(operand), dtype=dtype, device="meta"
                )
        name = f"{unit.name}_{i}" if len(groups) > 1 else unit.name
        parts.append(unit.replace(name=name, graph=graph, instances=tuple(instances)))
    return parts


def _stride(operand: Operand) -> tuple[int, ...]:
    if operand.region is None:
        return operand.stride
    return torch.empty(operand.whole_shape, device="meta").stride()


def element_nodes(unit: StepGraph) -> set[fx.Node]:
    """Nodes that hold one value per element of the parameter; the others hold one per tensor.

    A 0-dim state is a scalar unless the value written to it is elementwise (the state of a 0-dim
    parameter), which is found by repeating until nothing changes.
    """
    elementwise = {Role.PARAM, Role.GRAD, Role.CODES, Role.SCALES}
    shaped = {Role.STATE, Role.INTERMEDIATE}
    by_name = {n.name: n for n in unit.placeholders}
    elements: set[fx.Node] = {
        n
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.role in elementwise or (o.role in shaped and o.shape != ())
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

"""Steps on parameters of 16 bits are computed in float32.

    lerp = exp_avg.lerp_(grad, 0.1)      the same lines, traced with float32 stand-ins: a kernel
    param.add_(lerp, alpha=-lr)     =>   loads 16 bits, computes in float32, and rounds once,
    grad = grad.to(torch.bfloat16)       when it stores; grad = grad.to(torch.float32)

What the step itself converts to the parameter's type stays in float32, which stands for that type.
Operands keep the type that they have in memory. Parameters in float32 are left alone, and so is
whatever else of their step is in another type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stq_compile.halves import HALF_DTYPES
from stq_compile.step_graph import Operand, Program, Role, StepGraph

METHODS = {"bfloat16": "float", "half": "float"}
"""Conversions by method."""


def widen(program: Program) -> Program:
    """Give 16-bit inputs of every unit with a 16-bit parameter float32 stand-ins."""
    return Program(program.optimizer, tuple(_widened(unit) for unit in program.units))


def _widened(unit: StepGraph) -> StepGraph:
    if not any(o.role is Role.PARAM and o.dtype in HALF_DTYPES for o in unit.operands):
        return unit
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    operands: dict[str, Operand] = {o.name: o for o in unit.operands}
    for node in unit.graph.nodes:
        new = env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "placeholder":
            if operands[node.name].dtype in HALF_DTYPES:
                new.meta["example"] = node.meta["example"].float()
        elif node.op != "output":
            new.args, new.kwargs = _in_float32(new.args), _in_float32(new.kwargs)
            if node.op == "call_method":
                new.target = METHODS.get(str(node.target), node.target)
    return unit.replace(graph=graph, widened=True)


def _in_float32(value: Any) -> Any:
    """An argument with every 16-bit type in it replaced."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF_DTYPES else value
    if isinstance(value, (list, tuple)):
        return type(value)(_in_float32(v) for v in value)
    if isinstance(value, dict):
        return {k: _in_float32(v) for k, v in value.items()}
    return value


def written_half(unit: StepGraph) -> Operand | None:
    """The 16-bit parameter that a widened kernel writes, of the first instance; None if none."""
    if not unit.widened or unit.unfused:
        return None
    param = unit.instances[0].param
    written = param.role is Role.PARAM and param.name in (unit.writes or ())
    return param if written else None

"""A parameter of 16 bits is rounded stochastically when it is written.

    new = param + update              new = param + update
    # -> param                  =>    on_grid = stq.round_param(new, "bfloat16", param_key)
                                      # -> param

so that updates of less than half a unit in the last place are not lost but made now and then, at
the right rate: the mean of what is stored is the value that was computed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from stq_compile import ops  # noqa: F401  (registers the operators)
from stq_compile.passes.widen import written_half
from stq_compile.step_graph import PARAM_ROUNDING, Instance, Program, Role, StepGraph

ROUND_PARAM = torch.ops.stq.round_param.default


def round_params(program: Program) -> Program:
    """Round what every kernel writes to a 16-bit parameter at random."""
    return Program(program.optimizer, tuple(_round(unit) for unit in program.units))


def _round(unit: StepGraph) -> StepGraph:
    param = written_half(unit)
    if param is None:
        return unit
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    placeholders = unit.placeholders
    for node in placeholders:
        env[node] = graph.node_copy(node)
    name = f"{param.name}_key"
    key = graph.placeholder(name)
    key.meta["example"] = torch.zeros((), dtype=torch.int64)
    for node in unit.calls:
        env[node] = graph.node_copy(node, env.__getitem__)
    dtype = param.dtype_name
    outputs = []
    for target, value in zip(unit.writes or (), unit.outputs, strict=True):
        out = env[value]
        if target == param.name:
            out = graph.create_node(
                "call_function", ROUND_PARAM, (out, dtype, key), name=f"{param.name}_on_grid"
            )
        outputs.append(out)
    graph.output(tuple(outputs))
    instances = tuple(_with_key(instance, name) for instance in unit.instances)
    return unit.replace(graph=graph, instances=instances)


def _with_key(instance: Instance, name: str) -> Instance:
    param = instance.param
    source = replace(param.source, key=PARAM_ROUNDING)
    key = replace(
        param, name=name, role=Role.KEY, source=source, shape=(), stride=(), dtype=torch.int64
    )
    return replace(instance, operands=(*instance.operands, key))

"""A parameter of 16 bits gets an error state of 8, and together they are its value.

                                       value = stq.with_error(param, param_error, "bfloat16")
    new = param + update         =>    new = value + update
    # -> param                         nearest = stq.round_param(new, "bfloat16", None)
                                       left = stq.param_error(new, nearest, "bfloat16")
                                       # -> param, param_error

The error is a state as others are: the next pass reads it from codes and writes it as codes, in the
format ``ulp8``. The idea is that of Kahan's summation, kept between steps; with 8 bits more the
weights have the 16 mantissa bits that an update of a 2^-16th part needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from stq_compile import ops  # noqa: F401  (registers the operators)
from stq_compile.passes.round_params import ROUND_PARAM
from stq_compile.passes.widen import written_half
from stq_compile.step_graph import PARAM_ERROR, Instance, Program, Role, StepGraph

WITH_ERROR = torch.ops.stq.with_error.default
PARAM_ERROR_OP = torch.ops.stq.param_error.default


def compensate(program: Program) -> Program:
    """Keep what rounding leaves of every 16-bit parameter that a kernel writes."""
    return Program(program.optimizer, tuple(_compensate(unit) for unit in program.units))


def _compensate(unit: StepGraph) -> StepGraph:
    param = written_half(unit)
    if param is None:
        return unit
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in unit.placeholders:
        env[node] = graph.node_copy(node)
    (stored,) = (env[n] for n in unit.placeholders if n.name == param.name)
    error = graph.placeholder(f"{param.name}_error")
    error.meta = {k: stored.meta[k] for k in ("example", "val") if k in stored.meta}
    dtype = param.dtype_name
    value = graph.create_node(
        "call_function", WITH_ERROR, (stored, error, dtype), name=f"{param.name}_value"
    )
    env |= {n: value for n, new in env.items() if new is stored}
    for node in unit.calls:
        env[node] = graph.node_copy(node, env.__getitem__)
    results = {t: env[v] for t, v in zip(unit.writes or (), unit.outputs, strict=True)}
    new = results[param.name]
    nearest = graph.create_node(
        "call_function", ROUND_PARAM, (new, dtype, None), name=f"{param.name}_nearest"
    )
    left = graph.create_node(
        "call_function", PARAM_ERROR_OP, (new, nearest, dtype), name=f"{param.name}_left"
    )
    results |= {param.name: nearest, error.name: left}
    graph.output(tuple(results.values()))
    instances = tuple(_with_error(instance, error.name) for instance in unit.instances)
    return unit.replace(graph=graph, instances=instances, writes=tuple(results))


def _with_error(instance: Instance, name: str) -> Instance:
    param = instance.param
    source = replace(param.source, key=PARAM_ERROR)
    error = replace(param, name=name, role=Role.STATE, source=source, dtype=torch.float32)
    return replace(instance, operands=(*instance.operands, error))

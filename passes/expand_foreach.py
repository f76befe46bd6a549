"""``torch._foreach_*`` calls become one call per tensor, so that the step can be split.

added = torch._foreach_add([a, b], [c, d])    ->    add = a.add(c); add_1 = b.add(d)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from stq_compile.step_graph import Program, StepGraph

PREFIX = "_foreach_"


def expand_foreach(program: Program) -> Program:
    """Rewrite every foreach call of every unit; other nodes are copied."""
    return Program(program.optimizer, tuple(_expand(unit) for unit in program.units))


def _expand(unit: StepGraph) -> StepGraph:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in unit.graph.nodes:
        if _is_foreach(node):
            args = _resolve(node.args, env)
            kwargs = _resolve(node.kwargs, env)
            env[node] = _per_tensor(graph, node, args, kwargs)
        elif node.target is operator.getitem and isinstance(env.get(node.args[0]), list):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(_resolve(node.args[0], env))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    return unit.replace(graph=graph)


def _is_foreach(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.startswith(PREFIX)


def _resolve(value: Any, env: dict[fx.Node, Any]) -> Any:
    """``value`` with nodes replaced; a foreach node stands for a list of nodes."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(v, env) for v in value)
    if isinstance(value, dict):
        return {k: _resolve(v, env) for k, v in value.items()}
    return value


def _per_tensor(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any) -> list[fx.Node]:
    base = getattr(node.target, "__name__", "").removeprefix(PREFIX)
    count = max(len(a) for a in args if isinstance(a, (list, tuple)))
    results = []
    for i in range(count):
        row = [a[i] if isinstance(a, (list, tuple)) else a for a in args]
        named = {k: v[i] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
        made = _one(graph, base, row, named)
        for new in made:
            new.meta = {k: node.meta[k] for k in ("stack_trace",) if k in node.meta}
        results.append(made[-1])
    return results


def _one(graph: fx.Graph, base: str, args: list[Any], kwargs: dict[str, Any]) -> list[fx.Node]:
    """One tensor's call of the operator named ``base``: the nodes made, the result last."""
    if base.rstrip("_") in ("addcmul", "addcdiv") and len(args) == 4:
        kwargs = {**kwargs, "value": args.pop()}
    if base.rstrip("_") == "norm":
        return [graph.call_function(torch.linalg.vector_norm, tuple(args), kwargs)]
    if base.rstrip("_") in ("maximum", "minimum") and not _is_tensor(args[1]):
        clamp = {"maximum": "clamp_min", "minimum": "clamp_max"}[base.rstrip("_")]
        base = base.replace(base.rstrip("_"), clamp)
    if hasattr(Tensor, base) and isinstance(args[0], fx.Node):
        return [graph.call_method(base, tuple(args), kwargs)]
    function: Callable[..., Any] = getattr(torch, base.rstrip("_"))
    value = graph.call_function(function, tuple(args), kwargs)
    if base.endswith("_"):
        return [value, graph.call_method("copy_", (args[0], value))]
    return [value]


def _is_tensor(value: Any) -> bool:
    """Whether an argument is a tensor; a node may stand for a Python number as well."""
    number = (torch.SymFloat, torch.SymInt, float, int)
    return isinstance(value, fx.Node) and not isinstance(value.meta.get("example_value"), number)

"""The inverse of `step_graph.print_graph`: a graph from its printed Python function.

Every statement of the text is one node, so names, targets and arguments come back as they were.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
import re
from typing import Any

import torch
from torch import fx

from stq_compile import ops  # noqa: F401  (registers the operators)

_NAMES = {"torch": torch, "operator": operator, "math": math, "builtins": builtins}
_LOCATION = re.compile(r"  # (\S+):(\d+) ([^\[]*)")


def parse_graph(text: str, name: str) -> fx.Graph:
    """The graph of function ``name`` in ``text``, which `print_graph` printed.

    Locations in comments become stack traces, so that the graph prints as the text again.

    Raises:
        ValueError: the text has no such function, or a statement that is no node.
    """
    functions = [
        n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name
    ]
    if not functions:
        raise ValueError(f"no function {name!r}")
    function, lines = functions[0], text.splitlines()
    graph = fx.Graph()
    env: dict[str, Any] = {a.arg: graph.placeholder(a.arg) for a in function.args.args}
    for statement in function.body:
        match statement:
            case ast.Assign([ast.Name(target)], ast.Call() as call):
                env[target] = _node(graph, target, call, env)
                env[target].stack_trace = _trace(lines[statement.lineno - 1])
            case ast.Return(ast.Tuple() as value):
                graph.output(_value(value, env))
            case _:
                raise ValueError(f"line {statement.lineno}: {ast.unparse(statement)} is no node")
    return graph


def _node(graph: fx.Graph, name: str, call: ast.Call, env: dict[str, Any]) -> fx.Node:
    args = tuple(_value(a, env) for a in call.args)
    kwargs = {str(k.arg): _value(k.value, env) for k in call.keywords}
    function = call.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = env.get(function.value.id)
        if owner is not None:
            arguments = (owner, *args)
            return graph.create_node("call_method", function.attr, arguments, kwargs, name=name)
    return graph.create_node("call_function", _value(function, {}), args, kwargs, name=name)


def _value(expression: ast.expr, env: dict[str, Any]) -> Any:
    return eval(ast.unparse(expression), {**_NAMES, **env})


def _trace(line: str) -> str | None:
    """A stack trace that says what the comment says."""
    found = _LOCATION.search(line)
    if found is None:
        return None
    file, number, source = found.groups()
    return f'  File "{file}", line {number}, in step\n    {source.strip()}\n'

"""Does a step do nothing with its closure but call it first?

Then the closure can be called before the step, and the step compiled without it:

    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()

A step that calls it twice, wraps it, passes it on or calls it after it has moved the parameters
(sharpness-aware minimization, line searches) needs it where it stands.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def calls_closure_first(step: Callable[..., Any]) -> bool:
    """Whether ``closure`` is called once, under ``if closure is not None``, before all else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return False
    uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == "closure"]
    if not uses:
        return True
    for statement in function.body:
        if isinstance(statement, ast.If) and _asks_for_closure(statement.test):
            calls = [n for n in ast.walk(statement) if _is_call(n)]
            inside = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n in uses]
            # One name in the question, one in the call.
            return len(calls) == 1 and len(inside) == 2 and len(uses) == 2
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr)) or _moves(statement):
            return False
    return False


def _asks_for_closure(test: ast.expr) -> bool:
    named = test.left if isinstance(test, ast.Compare) else test
    negated = isinstance(test, ast.Compare) and not isinstance(test.ops[0], ast.IsNot)
    return isinstance(named, ast.Name) and named.id == "closure" and not negated


def _is_call(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "closure"
    )


def _moves(statement: ast.stmt) -> bool:
    """Whether a statement before the closure may change something that the closure sees.

    ``loss = None``, a docstring and torch's own health check do not.
    """
    allowed = ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check")
    return any(
        isinstance(n, ast.Call) and getattr(n.func, "attr", "") not in allowed
        for n in ast.walk(statement)
    )

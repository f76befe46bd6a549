"""A step in mathematical notation: the new value of each state, and what the update sees of it.

The functional graph is run on sympy symbols, one per input: states by their key, ``param``,
``grad``, and ``exp_avg'`` for the new value of ``exp_avg``, so that formulas stay short. What has
no closed form (a matrix product, a reduction) becomes a function of its arguments: ``mm(a, b)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from stq_compile.passes.measure import is_smooth
from stq_compile.passes.ranges import alpha_of, base_name
from stq_compile.passes.recurrences import SYMPY
from stq_compile.step_graph import Operand, Role, StepGraph

Expression = Any
"""A sympy expression. (sympy has no types of its own to check against.)"""


@dataclass(frozen=True)
class Formulas:
    """Expressions of one template.

    ``new`` holds the new value of each written input by its symbol's name, in terms of old and
    primed symbols; ``smooth`` the states whose errors the update sees through a derivative.
    """

    unit: StepGraph
    symbols: Mapping[str, Expression]
    new: Mapping[str, Expression]

    def recurrence(self, key: str) -> str:
        """``exp_avg' = 0.9·exp_avg + 0.1·grad``; empty if the state is not written."""
        if key not in self.new:
            return ""
        expression = sympy.expand(self.new[key])
        if sympy.count_ops(expression) > sympy.count_ops(self.new[key]):
            expression = self.new[key]
        return f"{key}' = {notation(expression)}"

    def sensitivity(self, key: str) -> str:
        """``∂param'/∂exp_avg`` as a formula, or why there is none."""
        name = next(o.name for o in self.unit.operands if _symbol_name(o) == key)
        if not is_smooth(self.unit, name):
            return "a sign or a comparison: no derivative, flips are counted"
        found = self._derivative("param", key)
        if found.has(sympy.Derivative, sympy.Subs):
            return "no closed form"
        return f"∂param'/∂{key} = {notation(found)}"

    def _derivative(self, of: str, by: str) -> Expression:
        """The total derivative of a new value: directly, and through the other new values."""
        expression = self.new.get(of)
        if expression is None:
            return sympy.Integer(0)
        total = sympy.diff(expression, self.symbols[by])
        for name in self.new:
            primed = self._primed.get(name)
            if name != of and primed in expression.free_symbols:
                total += sympy.diff(expression, primed) * self._derivative(name, by)
        return total

    @cached_property
    def _primed(self) -> dict[str, Expression]:
        return {name: self.symbols[f"{name}'"] for name in self.new}


def formulas_of(unit: StepGraph) -> Formulas:
    """The formulas of a functional template."""
    written = dict(zip(unit.writes or (), unit.outputs, strict=True))
    symbols: dict[str, Expression] = {}
    values: dict[fx.Node, Expression] = {}
    primes: dict[fx.Node, Expression] = {}
    names: dict[str, str] = {}
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        name = names[node.name] = _symbol_name(operand)
        nonnegative = operand.source.key in unit.facts.nonnegative
        assumptions = {"nonnegative": True} if nonnegative else {"real": True}
        values[node] = symbols[name] = sympy.Symbol(name, **assumptions)
        if node.name in written:
            symbols[f"{name}'"] = sympy.Symbol(f"{name}'", **assumptions)
            if isinstance(written[node.name], fx.Node):
                primes[written[node.name]] = symbols[f"{name}'"]
    made: dict[fx.Node, Expression] = {}
    for node in unit.calls:
        made[node] = _evaluate(node, values)
        values[node] = primes.get(node, made[node])
    new = {names[n]: made.get(out, values.get(out)) for n, out in written.items()}
    return Formulas(unit, symbols, {n: e for n, e in new.items() if e is not None})


def _symbol_name(operand: Operand) -> str:
    if operand.role in (Role.PARAM, Role.GRAD):
        return str(operand.role)
    return operand.source.key if operand.role is Role.STATE else operand.name


def notation(expression: Expression) -> str:
    """One line, with numbers to 4 digits: ``0.9·exp_avg + 0.1·grad``, ``√(x)``, ``x^2``."""
    rounded = expression.xreplace(
        {f: sympy.Float(f"{f:.4g}") for f in expression.atoms(sympy.Float)}
    )
    text = str(sympy.sstr(rounded, full_prec=False))
    text = re.sub(r"\b1\.0\*(?=\w)", "", text)
    return text.replace("**", "^").replace("*", "·").replace("sqrt(", "√(")


# Operators. -----------------------------------------------------------------------------------

_RULES: dict[str, Callable[..., Expression]] = {
    **SYMPY,
    "fma": lambda a, b, c: a * b + c,
    "rsqrt": lambda a: 1 / sympy.sqrt(a),
    "abs": sympy.Abs,
    "exp": sympy.exp,
    "log": sympy.log,
    "sign": sympy.sign,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    **dict.fromkeys(("detach", "item", "_to_copy", "scalar_tensor"), lambda a: a),
}


def _evaluate(node: fx.Node, values: Mapping[fx.Node, Expression]) -> Expression:
    name = base_name(node)
    args = [_argument(a, values) for a in node.args]
    if name in ("add", "sub", "rsub"):
        a, b = args[0], args[1] * _argument(alpha_of(node), values)
        return {"add": a + b, "sub": a - b, "rsub": b - a}[name]
    rule = _RULES.get(name)
    if rule is not None and not any(a is None for a in args):
        return rule(*args)
    known = [a for a in args if a is not None]
    return sympy.Function(name, real=True)(*known) if known else sympy.Symbol(node.name, real=True)


def _argument(value: Any, values: Mapping[fx.Node, Expression]) -> Expression:
    """None for what is no number: a dtype, a list of sizes."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return sympy.Float(value) if isinstance(value, float) else sympy.Integer(value)

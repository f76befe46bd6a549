"""How each state carries over from step to step: ``s' = a s + b``, with ``a`` in closed form.

The coefficient of a state is propagated through the functional graph: a node is ``c * s`` plus
something that does not depend on ``s``, with ``c`` a sympy expression in the step's scalars, or it
depends on ``s`` in some other way. The coefficient of the written value is the decay ``a``.

    m' = m + (g - m) * 0.1            ->   a = 0.9          (average)
    v' = beta2 * v + (1 - beta2) g^2  ->   a = beta2        (average)
    s' = s + g^2                      ->   a = 1            (sum)
    u' = maximum(0.999 u, |g|)        ->   a = 0.999        (maximum)
    p' = g                            ->   a = 0            (replaced)

Unbiased noise of variance 1, injected at every step, settles at variance ``1 / (1 - a^2)``: the
amplification, which a planner multiplies a format's error by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from stq_compile.passes.ranges import alpha_of, base_name
from stq_compile.step_graph import Program, Recurrence, Role, StepGraph

Coefficient = Any
"""Coefficient of the state in a node, a sympy expression; None if the node depends on the state in
no affine way. (sympy has no types of its own to check against.)"""

LEAST_SHARE = 0.5
"""Share of the parameter in a created state from which on it counts as a copy."""

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def find_recurrences(program: Program) -> Program:
    """Add ``recurrences`` and ``copies`` to every unit's facts."""
    return program.map(_find)


def _find(unit: StepGraph) -> StepGraph:
    scalars = scalar_expressions(unit)
    values = scalar_values(unit)
    results = dict(zip(unit.writes or (), unit.outputs, strict=True))
    copies = _copies(unit, results, scalars, values)
    unit = unit.replace(facts=replace(unit.facts, copies=copies))
    if unit.unfused:
        return unit
    found = {
        operand.source.key: _recurrence(unit, node, results[node.name], scalars, values)
        for node, operand in zip(unit.placeholders, unit.operands, strict=True)
        if operand.role is Role.STATE
        and operand.shape != ()
        and node.name in results
        and node.users
    }
    return unit.replace(facts=replace(unit.facts, recurrences=found))


def _copies(
    unit: StepGraph,
    results: Mapping[str, fx.Node],
    scalars: Mapping[fx.Node, sympy.Expr],
    values: Mapping[sympy.Symbol, float],
) -> frozenset[str]:
    """States that the step creates as its parameter plus something else."""
    by_name = {n.name: n for n in unit.placeholders}
    param = by_name[unit.instances[0].param.name]
    created = [o for o in unit.operands if o.returned >= 0 and o.shape != ()]
    found = set()
    for operand in created:
        relation = _recurrence(unit, param, results[operand.name], scalars, values)
        if relation.value is not None and relation.value > LEAST_SHARE:
            found.add(operand.source.key)
    return frozenset(found)


def _recurrence(
    unit: StepGraph,
    state: fx.Node,
    written: fx.Node,
    scalars: Mapping[fx.Node, sympy.Expr],
    values: Mapping[sympy.Symbol, float],
) -> Recurrence:
    coefficients: dict[fx.Node, Coefficient] = {state: ONE}
    maxima: set[fx.Node] = set()
    for node in unit.calls:
        coefficients[node] = _coefficient(node, coefficients, scalars, maxima)
    decay = coefficients.get(written, ZERO)
    if decay is None:
        return Recurrence("unknown")
    decay = sympy.simplify(decay)
    number = float(decay.subs(values))
    if written in maxima:
        return Recurrence("maximum", decay, number)
    if decay.free_symbols and abs(number) <= 1:  # it may be 0 or 1 at this step only
        return Recurrence("average", decay, number)
    if number in (0, 1):
        return Recurrence("sum" if number else "replaced", decay, number)
    return Recurrence("average" if abs(number) < 1 else "unknown", decay, number)


# Scalars. -------------------------------------------------------------------------------------

SYMPY: dict[str, Callable[..., sympy.Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "truediv": lambda a, b: a / b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "sqrt": sympy.sqrt,
    "reciprocal": lambda a: 1 / a,
    "pow": lambda a, b: a**b,
    "alias": lambda a: a,
    "clone": lambda a: a,
}


def scalar_expressions(unit: StepGraph) -> dict[fx.Node, sympy.Expr]:
    """A closed form of every scalar node that has one."""
    found: dict[fx.Node, sympy.Expr] = {}
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        if operand.role is Role.SCALAR or (operand.role is Role.STATE and operand.shape == ()):
            found[node] = sympy.Symbol(node.name, real=True)
    for node in unit.calls:
        rule = SYMPY.get(base_name(node))
        if rule is None or node.kwargs:
            continue
        args = [expression(a, found) for a in node.args]
        if all(a is not None for a in args):
            found[node] = rule(*args)
    return found


def expression(value: Any, scalars: Mapping[fx.Node, sympy.Expr]) -> sympy.Expr | None:
    if isinstance(value, fx.Node):
        return scalars.get(value)
    if isinstance(value, (int, float)):
        return sympy.Float(value) if isinstance(value, float) else sympy.Integer(value)
    return None


def scalar_values(unit: StepGraph) -> dict[sympy.Symbol, float]:
    """Present values of the scalars, to tell an average from a sum."""
    values: dict[sympy.Symbol, float] = {}
    for node, operand in zip(unit.placeholders, unit.operands, strict=True):
        example = node.meta["example"]
        if example.ndim == 0 and example.device.type != "meta":
            value = float(example) if operand.value is None else operand.value
            values[sympy.Symbol(node.name, real=True)] = value
    return values


# Coefficients. --------------------------------------------------------------------------------


def _coefficient(
    node: fx.Node,
    known: Mapping[fx.Node, Coefficient],
    scalars: Mapping[fx.Node, sympy.Expr],
    maxima: set[fx.Node],
) -> Coefficient:
    inputs = [known.get(a, ZERO) for a in node.all_input_nodes]
    if all(c == 0 for c in inputs if c is not None) and None not in inputs:
        return ZERO
    if None in inputs:
        return None
    name, args = base_name(node), node.args
    if name.endswith("_like") or name.startswith("new_"):
        return ZERO  # a factory, which takes the geometry

    def of(value: Any) -> sympy.Expr:
        return known.get(value, ZERO) or ZERO if isinstance(value, fx.Node) else ZERO

    def product(a: Any, b: Any) -> Coefficient:
        for x, y in ((a, b), (b, a)):
            factor = expression(y, scalars)
            if factor is not None and of(y) == 0:
                return of(x) * factor
        return None if of(a) != 0 or of(b) != 0 else ZERO

    if name in ("alias", "clone", "detach", "detach_copy", "_to_copy"):
        return of(args[0])
    if name == "neg":
        return -of(args[0])
    if name == "mul":
        return product(args[0], args[1])
    if name == "fma":
        scaled = product(args[0], args[1])
        return None if scaled is None else scaled + of(args[2])
    if name in ("add", "sub"):
        scaled = product(args[1], alpha_of(node))
        sign = 1 if name == "add" else -1
        return None if scaled is None else of(args[0]) + sign * scaled
    if name == "div":
        divisor = expression(args[1], scalars)
        return None if divisor is None else of(args[0]) / divisor
    if name == "maximum" and (of(args[0]) == 0) != (of(args[1]) == 0):
        maxima.add(node)
        return of(args[0]) + of(args[1])
    return None

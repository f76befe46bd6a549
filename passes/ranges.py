"""Which states are never negative, and which must not be disturbed at all.

Interval analysis by coinduction: assume every state non-negative, propagate intervals through the
update, drop the states whose new value may be negative, and repeat until nothing changes. What
remains is non-negative forever if it starts so (which packing checks).

A root or logarithm of a value that may be negative only by error (RMSprop's centered variance)
makes the states behind it *fragile*: a quantization error there could turn a small positive
difference into NaN, so they stay in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from stq_compile.step_graph import Program, Role, StepGraph, location_of

Interval = tuple[float, float]
INF = math.inf
ANY: Interval = (-INF, INF)
NONNEGATIVE: Interval = (0.0, INF)


def find_ranges(program: Program) -> Program:
    """Add ``nonnegative`` and ``fragile`` to every unit's facts."""
    return Program(program.optimizer, tuple(_analyse(unit) for unit in program.units))


def _analyse(unit: StepGraph) -> StepGraph:
    states = {
        n.name: o.source.key
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.role is Role.STATE
    }
    scalars = {o.source.key for o in unit.operands if o.shape == ()}
    written = dict(zip(unit.writes or (), unit.outputs, strict=True))
    assumed = {name for name in states if name in written}
    while True:
        values = _propagate(unit, assumed)
        proven = {n for n in assumed if _interval(written[n], values)[0] >= 0}
        if proven == assumed:
            break
        assumed = proven
    fragile = {k: v for k, v in _fragile(unit, values, states).items() if k not in scalars}
    nonnegative = frozenset(states[n] for n in proven)
    fragile = {**unit.facts.fragile, **fragile}
    return unit.replace(facts=replace(unit.facts, nonnegative=nonnegative, fragile=fragile))


def _propagate(unit: StepGraph, assumed: set[str]) -> dict[fx.Node, Interval]:
    values: dict[fx.Node, Interval] = {}
    constants = _constants(unit)
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            values[node] = NONNEGATIVE if node.name in assumed else constants.get(node.name, ANY)
        elif node.op == "call_function":
            rule = RULES.get(base_name(node))
            values[node] = ANY if rule is None else rule(node, values)
    return values


def _constants(unit: StepGraph) -> dict[str, Interval]:
    """Hoisted constants: the interval of the instances' values."""
    found: dict[str, list[float]] = {}
    for instance in unit.instances:
        for operand in instance.operands:
            if operand.value is not None:
                found.setdefault(operand.name, []).append(operand.value)
    return {name: (min(v), max(v)) for name, v in found.items()}


def _fragile(
    unit: StepGraph, values: Mapping[fx.Node, Interval], states: Mapping[str, str]
) -> dict[str, str]:
    fragile: dict[str, str] = {}
    for node in unit.calls:
        if base_name(node) not in ("sqrt", "rsqrt", "log", "log2", "log10"):
            continue
        if _interval(node.args[0], values)[0] >= 0:
            continue
        for name in _ancestors(node):
            if name in states:
                fragile[states[name]] = f"{base_name(node)} of a difference at {location_of(node)}"
    return fragile


def _ancestors(node: fx.Node) -> set[str]:
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return {n.name for n in seen if n.op == "placeholder"}


def base_name(node: fx.Node) -> str:
    """Name of a node's operator without namespace and overload."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[1]
    return str(getattr(target, "__name__", target))


def alpha_of(node: fx.Node) -> Any:
    """The factor of the second operand of an addition or subtraction."""
    return node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)


def _interval(value: Any, values: Mapping[fx.Node, Interval]) -> Interval:
    if isinstance(value, fx.Node):
        return values.get(value, ANY)
    if isinstance(value, (int, float)):
        return (float(value), float(value))
    return ANY


# Rules: one per operator, ``(node, intervals so far) -> interval``. ---------------------------

Rule = Callable[[fx.Node, Mapping[fx.Node, Interval]], Interval]


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _mul(a: Interval, b: Interval) -> Interval:
    corners = [_times(x, y) for x in a for y in b]
    return (min(corners), max(corners))


def _div(a: Interval, b: Interval) -> Interval:
    if b[0] < 0 < b[1]:
        return ANY
    inverse = (
        1 / b[1] if b[1] not in (0.0, INF, -INF) else (0.0 if b[1] else -INF),
        1 / b[0] if b[0] not in (0.0, INF, -INF) else (0.0 if b[0] else INF),
    )
    return _mul(a, inverse)


def _add(a: Interval, b: Interval) -> Interval:
    return (a[0] + b[0], a[1] + b[1])


def _neg(a: Interval) -> Interval:
    return (-a[1], -a[0])


def _abs(a: Interval) -> Interval:
    low = 0.0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))
    return (low, max(abs(a[0]), abs(a[1])))


def _sqrt(a: Interval) -> Interval:
    return (math.sqrt(max(a[0], 0.0)), math.sqrt(max(a[1], 0.0)))


def _unary(rule: Callable[[Interval], Interval]) -> Rule:
    return lambda node, values: rule(_interval(node.args[0], values))


def _binary(rule: Callable[[Interval, Interval], Interval]) -> Rule:
    return lambda node, values: rule(
        _interval(node.args[0], values), _interval(node.args[1], values)
    )


def _rule_add(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    alpha = _interval(alpha_of(node), values)
    return _add(_interval(node.args[0], values), _mul(alpha, _interval(node.args[1], values)))


def _rule_sub(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    alpha = _interval(alpha_of(node), values)
    return _add(_interval(node.args[0], values), _neg(_mul(alpha, _interval(node.args[1], values))))


def _rule_rsub(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    alpha = _interval(alpha_of(node), values)
    return _add(_interval(node.args[1], values), _neg(_mul(alpha, _interval(node.args[0], values))))


def _rule_to_copy(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    dtype = node.kwargs.get("dtype")
    floating = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    return _interval(node.args[0], values) if floating else ANY


def _product(a: Any, b: Any, values: Mapping[fx.Node, Interval]) -> Interval:
    """Interval of ``a * b``; a square times constants has the sign of the constants."""
    (base_a, scale_a), (base_b, scale_b) = _unscaled(a, values), _unscaled(b, values)
    product = _mul(_interval(a, values), _interval(b, values))
    if isinstance(base_a, fx.Node) and base_a is base_b:
        square = _mul(_mul(scale_a, scale_b), NONNEGATIVE)
        return (max(product[0], square[0]), min(product[1], square[1]))
    return product


def _unscaled(value: Any, values: Mapping[fx.Node, Interval]) -> tuple[Any, Interval]:
    """``value`` as (base, interval of the constant factors taken off)."""
    scale: Interval = (1.0, 1.0)
    while isinstance(value, fx.Node) and base_name(value) in ("mul", "neg"):
        if base_name(value) == "neg":
            scale, value = _neg(scale), value.args[0]
            continue
        a, b = value.args[:2]
        factor = _interval(b, values)
        if factor[0] != factor[1]:
            break
        scale, value = _mul(scale, factor), a
    return value, scale


def _rule_mul(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    return _product(node.args[0], node.args[1], values)


def _rule_fma(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    a, b, c = node.args[:3]
    return _add(_product(a, b, values), _interval(c, values))


def _rule_pow(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    base, exponent = (_interval(x, values) for x in node.args[:2])
    if exponent[0] == exponent[1] and exponent[0] % 2 == 0:
        return NONNEGATIVE
    if base[0] < 0:
        return ANY
    return (0.0, 1.0) if base[1] <= 1 and exponent[0] >= 0 else NONNEGATIVE


def _rule_where(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    a, b = (_interval(x, values) for x in node.args[1:3])
    return (min(a[0], b[0]), max(a[1], b[1]))


def _rule_clamp(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    low, high = _interval(node.args[0], values)
    floor = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    ceiling = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if floor is not None:
        a, b = _interval(floor, values)
        low, high = max(low, a), max(high, b)
    if ceiling is not None:
        a, b = _interval(ceiling, values)
        low, high = min(low, a), min(high, b)
    return (low, high)


def _rule_maximum(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    a, b = (_interval(x, values) for x in node.args[:2])
    return (max(a[0], b[0]), max(a[1], b[1]))


def _rule_minimum(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    a, b = (_interval(x, values) for x in node.args[:2])
    return (min(a[0], b[0]), min(a[1], b[1]))


def _rule_fill(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    return _interval(node.args[1], values)


def _last(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    return _interval(node.args[1], values)


def _first(node: fx.Node, values: Mapping[fx.Node, Interval]) -> Interval:
    return _interval(node.args[0], values)


RULES: dict[str, Rule] = {
    "add": _rule_add,
    "sub": _rule_sub,
    "rsub": _rule_rsub,
    "mul": _rule_mul,
    "truediv": _binary(_div),
    "div": _binary(_div),
    "fma": _rule_fma,
    "neg": _unary(_neg),
    "abs": _unary(_abs),
    "sqrt": _unary(_sqrt),
    "rsqrt": _unary(lambda a: _div((1.0, 1.0), _sqrt(a))),
    "reciprocal": _unary(lambda a: _div((1.0, 1.0), a)),
    "exp": lambda node, values: NONNEGATIVE,
    "sign": lambda node, values: (-1.0, 1.0),
    "pow": _rule_pow,
    "maximum": _rule_maximum,
    "minimum": _rule_minimum,
    "clamp": _rule_clamp,
    "where": _rule_where,
    "full": _rule_fill,
    "full_like": _rule_fill,
    "scalar_tensor": _first,
    "copy": _last,
    "clone": _first,
    "alias": _first,
    "_to_copy": _rule_to_copy,
}

"""Which states are never negative, and which must not be disturbed at all.

Interval analysis by coinduction: assume every state non-negative, propagate intervals through the
update, drop the states whose new value may be negative, and repeat until nothing changes. What
remains is non-negative forever if it starts so (which packing checks). A state whose new value is
itself under a root counts as non-negative too: if it were not, the step would give NaN.

A root or logarithm of a value that may be negative only by error (RMSprop's centered variance)
makes the states behind it *fragile*: a quantization error there could turn a small positive
difference into NaN, so they stay in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from stq_compile.step_graph import Program, Role, StepGraph, location_of

Interval = tuple[float, float]
INF = math.inf
ROOTS = ("sqrt", "rsqrt", "log", "log2", "log10")
"""Operators that have no value below zero."""
ANY: Interval = (-INF, INF)
NONNEGATIVE: Interval = (0.0, INF)


def find_ranges(program: Program) -> Program:
    """Add ``nonnegative`` and ``fragile`` to every unit's facts."""
    return program.map(_analyse)


def _analyse(unit: StepGraph) -> StepGraph:
    states = {
        n.name: o.source.key
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.role is Role.STATE
    }
    scalars = {o.source.key for o in unit.operands if o.shape == ()}
    written = dict(zip(unit.writes or (), unit.outputs, strict=True))
    assumed = {name for name in states if name in written}
    rooted = _under_roots(unit, states)
    while True:
        values = _propagate(unit, assumed)
        proven = {n for n in assumed if n in rooted or _interval(written[n], values)[0] >= 0}
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
    counters = _counters(unit)
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            counts = node.name in counters
            known = NONNEGATIVE if node.name in assumed or counts else ANY
            values[node] = constants.get(node.name, known)
        elif node.op == "call_function":
            rule = RULES.get(base_name(node))
            values[node] = ANY if rule is None else rule(node, values)
    return values


def _counters(unit: StepGraph) -> set[str]:
    """Whole Python numbers among the inputs: steps are counted in them, from zero or one up."""
    return {
        o.name
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.number and float(n.meta["example"]).is_integer() and float(n.meta["example"]) >= 0
    }


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
    stored = {out for out in unit.outputs if isinstance(out, fx.Node)}
    for node in unit.calls:
        if base_name(node) in ROOTS and _is_difference(node.args[0], values, stored):
            for name in _ancestors(node):
                if name in states:
                    where = location_of(node)
                    fragile[states[name]] = f"{base_name(node)} of a difference at {where}"
    return fragile


def _is_difference(
    node: Any, values: Mapping[fx.Node, Interval], stored: Collection[fx.Node]
) -> bool:
    """Whether a value may be negative because something is subtracted in it.

    Not where the value is itself the new value of a state: what is subtracted there was
    subtracted from the state, and the optimizer's own rule keeps it above zero (Yogi). Nor where
    only the sign of a factor or the meaning of an operator is not known.
    """
    stack, seen = [node], set()
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node, fx.Node) or node in stored:
            continue
        seen.add(node)
        if _interval(node, values)[0] >= 0 or base_name(node) not in RULES:
            continue
        if any(low < 0 and high <= 0 for low, high in _addends(node, values)):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _addends(node: fx.Node, values: Mapping[fx.Node, Interval]) -> list[Interval]:
    """What a node adds up, as intervals; of a value that may be of either sign in a subtraction,
    the worse one."""
    name = base_name(node)
    if name == "fma":
        return [_product(node.args[0], node.args[1], values), _interval(node.args[2], values)]
    if name == "add":
        alpha = _interval(alpha_of(node), values)
        return [_interval(node.args[0], values), _mul(alpha, _interval(node.args[1], values))]
    if name in ("sub", "rsub"):
        taken = _interval(node.args[1 if name == "sub" else 0], values)
        return [(-INF, 0.0) if taken[1] > 0 else (0.0, INF)]
    return []


def _under_roots(unit: StepGraph, states: Mapping[str, str]) -> set[str]:
    """States whose new value is itself under a root or logarithm: a negative one would be NaN.

    Factors and additions of constants (bias corrections, epsilons) on the way are looked through.
    """
    written = {value: name for name, value in zip(unit.writes or (), unit.outputs, strict=True)}
    found = set()
    for node in unit.calls:
        if base_name(node) not in ROOTS:
            continue
        value = node.args[0]
        while isinstance(value, fx.Node) and value not in written:
            if base_name(value) not in ("add", "mul", "div", "clone", "alias"):
                break
            value = value.args[0]
        name = written.get(value, "") if isinstance(value, fx.Node) else ""
        if name in states:
            found.add(name)
    return found


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
    if b[0] <= 0 <= b[1]:
        return ANY  # a zero may have either sign, and what is divided by it an infinity of that
    return _mul(a, (1 / b[1], 1 / b[0]))


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
    "_sym_sqrt": _unary(_sqrt),
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
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "sort", "cumsum"), _first),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "permute", "t"), _first),
    **dict.fromkeys(("squeeze", "unsqueeze", "select", "slice", "index", "detach"), _first),
    "linalg_vector_norm": lambda node, values: NONNEGATIVE,
    "sigmoid": lambda node, values: (0.0, 1.0),
    "sym_float": _first,
    "sym_max": _rule_maximum,
    "sym_min": _rule_minimum,
    "alias": _first,
    "_to_copy": _rule_to_copy,
}

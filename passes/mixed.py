"""Which states have errors that a matrix product mixes and that the update then enlarges.

    m' = m + (g - m) * 0.1
    p' = p - lr * Q (Q^T m' / sqrt(v))        v: an average of (Q^T g)^2, as in SOAP
    x = m' / norm(m');  x' = a x + b x x^T x  as in Muon's Newton-Schulz iteration

Rounding adds to ``m`` errors that are spread evenly over the elements of a block, and a product
spreads them over all directions of the matrix. In SOAP a division makes them large in those in
which ``v`` is small. (Where both are kept in one basis, as in Adam, ``m`` is small where ``v`` is,
and its errors with it; where ``v`` is made of the turned ``m``, it grows with them.) A matrix that
is multiplied by itself is on its way to have equal singular values, and what is noise in those that
were small grows with them. Such states get `formats.MIXED_WIDTH` bits at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from stq_compile.passes.ranges import base_name
from stq_compile.step_graph import Program, Role, StepGraph

PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Matrix products: which of their arguments are multiplied."""
INVERSES = ("reciprocal", "rsqrt")


def find_mixed(program: Program) -> Program:
    """Add ``mixed`` to the facts of every unit that is no kernel."""
    return program.map(_find)


def _find(unit: StepGraph) -> StepGraph:
    """Of states of the parameter's shape that the step writes: it adds no errors to others."""
    if not unit.unfused:
        return unit
    shape = unit.instances[0].param.whole_shape
    states = {
        node: operand.source.key
        for node, operand in zip(unit.placeholders, unit.operands, strict=True)
        if operand.role is Role.STATE
        and operand.whole_shape == shape != ()
        and node.users
        and node.name in (unit.writes or ())
    }
    reached = {state: _reached(unit, state) for state in states}
    found = frozenset(
        key
        for state, key in states.items()
        if key not in unit.facts.matrices
        and (_is_multiplied_by_itself(unit, reached[state]) or _is_divided(unit, state, reached))
    )
    return unit.replace(facts=replace(unit.facts, mixed=found))


def _reached(unit: StepGraph, state: fx.Node) -> Mapping[fx.Node, bool]:
    """The nodes that depend on a state, and whether they do so through a product."""
    found = {state: False}
    for node in unit.calls:
        inputs = [a for a in node.all_input_nodes if a in found]
        if inputs:
            multiplied = [node.args[i] for i in PRODUCTS.get(base_name(node), ())]
            found[node] = any(found[a] or a in multiplied for a in inputs)
    return found


def _is_multiplied_by_itself(unit: StepGraph, reached: Mapping[fx.Node, bool]) -> bool:
    products = (node for node in unit.calls if base_name(node) in PRODUCTS)
    return any(all(node.args[i] in reached for i in PRODUCTS[base_name(node)]) for node in products)


def _is_divided(
    unit: StepGraph, state: fx.Node, reached: Mapping[fx.Node, Mapping[fx.Node, bool]]
) -> bool:
    """Whether what a product makes of a state is divided by another one, which does not see it."""
    return any(
        reached[state].get(above) and _divides(below, state, reached)
        for above, below in _quotients(unit)
    )


def _quotients(unit: StepGraph) -> list[tuple[fx.Node, fx.Node]]:
    """What is divided, and by what, element by element."""
    found = []
    for node in unit.calls:
        pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(pair) < 2:
            continue
        if base_name(node) == "div":
            found.append((pair[0], pair[1]))
        elif base_name(node) == "mul":
            found += [(a, b) for a, b in (pair, pair[::-1]) if _is_inverse(b)]
    return found


def _is_inverse(node: fx.Node) -> bool:
    name, args = base_name(node), node.args
    power: Any = args[1] if name == "pow" and len(args) > 1 else 0
    return name in INVERSES or (isinstance(power, (int, float)) and power < 0)


def _divides(
    below: fx.Node, state: fx.Node, reached: Mapping[fx.Node, Mapping[fx.Node, bool]]
) -> bool:
    """Whether a divisor has many elements that depend on another state, and not on this one."""
    value = below.meta.get("val")
    many = isinstance(value, Tensor) and value.ndim > 0
    others = any(below in nodes for other, nodes in reached.items() if other is not state)
    return many and others and below not in reached[state]

"""Which states are matrices of a kind that a format of their own is made for.

*Semidefinite*: a state whose new value is a sum of symmetric positive semidefinite matrices with
factors that are not negative, by coinduction as in `ranges`: assume every state that the step
writes semidefinite, drop those whose new value may not be, and repeat.

    GG' = GG + (G G^T - GG) * 0.05   ->   0.95 GG + 0.05 G G^T

The matrices of such a sum are states, products of a matrix with its own transpose (written as
``mm`` of two views of one tensor, which is what ``tensordot`` becomes) and identity matrices.

*Orthogonal*: a state whose new value is the Q of a QR decomposition, or the eigenvectors or
singular vectors of one, up to the order and direction of its rows and columns.

A format takes neither on trust: what is encoded as semidefinite is factored, and another format is
chosen if that fails (`working_set.encoded_as`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor, fx

from stq_compile.formats import MatrixKind
from stq_compile.passes.ranges import alpha_of, base_name
from stq_compile.passes.recurrences import expression, scalar_expressions, scalar_values
from stq_compile.step_graph import Program, Role, StepGraph

SAME = ("alias", "clone", "detach", "detach_copy", "contiguous", "_to_copy", "lift_fresh_copy")
VIEWS = ("view", "reshape", "_unsafe_view", "view_copy", "_reshape_copy")
PERMUTATIONS = ("permute", "permute_copy", "t", "t_copy", "transpose", "transpose_copy")
BASES = {"linalg_qr": (0,), "_linalg_eigh": (1,), "_linalg_svd": (0, 2)}
"""Decompositions, and those of their results that have orthonormal columns or rows."""

Sum = Mapping[fx.Node, float]
"""A matrix as a sum of others, each with a factor."""


def find_matrices(program: Program) -> Program:
    """Add ``matrices`` to the facts of every unit that is no kernel."""
    return program.map(_find)


def _find(unit: StepGraph) -> StepGraph:
    written = dict(zip(unit.writes or (), unit.outputs, strict=True))
    keys = {
        o.name: o.source.key
        for n, o in zip(unit.placeholders, unit.operands, strict=True)
        if o.role is Role.STATE and o.name in written and _is_matrix(n)
    }
    if not unit.unfused or not keys:
        return unit
    found: dict[str, MatrixKind] = {
        key: "orthogonal" for name, key in keys.items() if is_orthogonal(written[name])
    }
    sums = _Sums(unit)
    assumed = {name for name, key in keys.items() if key not in found and sums.grows(written[name])}
    while True:
        kept = {name for name in assumed if sums.are_semidefinite(written[name], assumed)}
        if kept == assumed:
            break
        assumed = kept
    found |= {keys[name]: "semidefinite" for name in assumed}
    return unit.replace(facts=replace(unit.facts, matrices=found))


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_matrix(node: fx.Node) -> bool:
    return len(_shape(node)) == 2


def is_orthogonal(node: Any) -> bool:
    """Whether a value has orthonormal columns, or rows."""
    while isinstance(node, fx.Node) and _is_matrix(node):
        name = base_name(node)
        if name == "getitem":
            source, index = node.args
            return isinstance(source, fx.Node) and index in BASES.get(base_name(source), ())
        reordered = name == "index_select" and _is_order(node.args[2])
        unchanged = name in VIEWS and _shape(node) == _shape(node.args[0])
        if not (reordered or unchanged or name in (*SAME, *PERMUTATIONS, "flip", "neg")):
            return False
        node = node.args[0]
    return False


def _is_order(node: Any) -> bool:
    """Whether indices are those that sort something: each of them once."""
    if not isinstance(node, fx.Node) or base_name(node) != "getitem":
        return False
    source, index = node.args
    return isinstance(source, fx.Node) and base_name(source) == "sort" and bool(index == 1)


# Sums of semidefinite matrices. ---------------------------------------------------------------


class _Sums:
    """The matrices of a unit as sums of others."""

    def __init__(self, unit: StepGraph) -> None:
        self.scalars = scalar_expressions(unit)
        self.values = scalar_values(unit)
        self.known: dict[fx.Node, Sum] = {}
        for node in unit.graph.nodes:
            if node.op != "output":
                self.known[node] = self._sum(node)

    def grows(self, node: Any) -> bool:
        """Whether a value is a square matrix, and a sum with a semidefinite matrix in it."""
        shape = _shape(node)
        return len(set(shape)) == 1 and any(map(_is_semidefinite, self.known[node]))

    def are_semidefinite(self, node: Any, states: set[str]) -> bool:
        """Whether all that a value is a sum of is so, if the states of these names are."""
        return all(
            factor >= 0 and (term.name in states or _is_semidefinite(term))
            for term, factor in self.known[node].items()
        )

    def _sum(self, node: fx.Node) -> Sum:
        """A rule for each operator that adds, scales or keeps matrices; others are terms."""
        name, args = base_name(node), node.args
        if name in ("full", "full_like", "zeros", "zeros_like"):
            return {} if name.startswith("zeros") or args[1] == 0 else {node: 1.0}
        if not args or not isinstance(args[0], fx.Node):  # a factory, or a number comes first
            return {node: 1.0}
        if name in SAME or (name in VIEWS and _shape(node) == _shape(args[0])):
            return self._of(args[0])
        if name == "neg":
            return _scaled(self._of(args[0]), -1.0)
        scaled: Sum | None = None
        if name in ("add", "sub"):
            alpha = self._number(alpha_of(node))
            if alpha is not None and isinstance(args[1], fx.Node) and _shape(args[1]):
                sign = 1.0 if name == "add" else -1.0
                scaled = _added(self._of(args[0]), _scaled(self._of(args[1]), sign * alpha))
        elif name in ("mul", "div"):
            factor = self._number(args[1])
            if factor is not None and factor != 0:
                scaled = _scaled(self._of(args[0]), factor if name == "mul" else 1 / factor)
        elif name == "fma":
            factor = self._number(args[1])
            if factor is not None:
                scaled = _added(_scaled(self._of(args[0]), factor), self._of(args[2]))
        return {node: 1.0} if scaled is None else scaled

    def _of(self, value: Any) -> Sum:
        return self.known[value]

    def _number(self, value: Any) -> float | None:
        """A scalar's present value."""
        formula = expression(value, self.scalars)
        if formula is None:
            return None
        number = sympy.sympify(formula).subs(self.values)
        return float(number) if number.is_number else None


def _scaled(terms: Sum, factor: float) -> Sum:
    return {term: factor * own for term, own in terms.items()}


def _added(a: Sum, b: Sum) -> Sum:
    return {
        term: a.get(term, 0.0) + b.get(term, 0.0) for term in (*a, *(t for t in b if t not in a))
    }


def _is_semidefinite(node: fx.Node) -> bool:
    return is_square(node) or is_identity(node)


def is_square(node: fx.Node) -> bool:
    """Whether a node is the product of a matrix with its own transpose."""
    inner = node.args[0] if node.args else None
    if isinstance(inner, fx.Node) and base_name(node) in VIEWS and _shape(node) == _shape(inner):
        node = inner
    if base_name(node) != "mm":
        return False
    left, right = (as_matrix(a) for a in node.args[:2])
    return left is not None and right is not None and left == right.transposed


def is_identity(node: fx.Node) -> bool:
    """Whether a node is an identity matrix: ``arange(n)[:, None] == arange(n)``, as a number."""
    if base_name(node) == "eye":
        return True
    while base_name(node) == "_to_copy" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if base_name(node) != "eq":
        return False
    column, row = node.args[:2]
    if not isinstance(column, fx.Node) or base_name(column) != "unsqueeze":
        return False
    other = column.args[0]
    if not isinstance(row, fx.Node) or not isinstance(other, fx.Node):
        return False
    return base_name(row) == base_name(other) == "arange" and row.args == other.args


@dataclass(frozen=True)
class Unfolded:
    """A tensor laid out as a matrix: which of its axes, in order, are the rows and the columns."""

    base: fx.Node
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def transposed(self) -> Unfolded:
        return Unfolded(self.base, self.columns, self.rows)


def as_matrix(node: Any) -> Unfolded | None:
    """A two-dimensional value as a layout of the tensor that it is a view of."""
    if not isinstance(node, fx.Node) or not _is_matrix(node):
        return None
    shape, name = _shape(node), base_name(node)
    inner = node.args[0] if node.args else None
    if name in SAME or (name in VIEWS and shape == _shape(inner)):
        return as_matrix(inner)
    if name in PERMUTATIONS:
        order = _order(node)
        found = as_matrix(inner)
        return found if found is None or order == (0, 1) else found.transposed
    if name not in VIEWS or not isinstance(inner, fx.Node):
        return Unfolded(node, (0,), (1,))
    order, base = tuple(range(len(_shape(inner)))), inner
    if base_name(inner) in PERMUTATIONS and isinstance(inner.args[0], fx.Node):
        order, base = _order(inner), inner.args[0]
    sizes = _shape(base)
    for split in range(len(order) + 1):
        rows, columns = order[:split], order[split:]
        if (math.prod(sizes[i] for i in rows), math.prod(sizes[i] for i in columns)) == shape:
            return Unfolded(base, rows, columns)
    return Unfolded(node, (0,), (1,))


def _order(node: fx.Node) -> tuple[int, ...]:
    """The axes of its argument in a permutation's order."""
    args: tuple[Any, ...] = node.args
    rank = len(_shape(node))
    if base_name(node).startswith("permute"):
        return tuple(i % rank for i in args[1])
    axes = list(range(rank))
    a, b = args[1:3] if len(args) > 2 else (0, 1)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)

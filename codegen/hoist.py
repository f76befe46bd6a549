"""Tables that depend on a few bits of a block are computed once and for all.

The range of an ``adaptive_log`` block is one of 32, so what its codes decode to, in units of its
scale, is one of 32 tables of 16. They are found by data flow: every value that is made from the
codes of a table and from ``x & 31`` alone, for one ``x`` of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stq_compile.codegen.ir import OPCODES, Kernel, Space, Value

MASK = 31


@dataclass
class Hoisted:
    """What is made of one key: the operations in order, and those of them that others use."""

    key: Value
    body: list[Value] = field(default_factory=list)
    tables: list[Value] = field(default_factory=list)


def hoist(kernel: Kernel) -> list[Hoisted]:
    """What can be computed before any block is seen, by key; keys without a table are left out."""
    constant: list[Value] = []  # made from the codes of tables alone
    owner: dict[int, Hoisted] = {}
    found: list[Hoisted] = []
    known: set[int] = set()
    for v in kernel.body:
        inputs = [a for a in v.args if isinstance(a, Value)]
        groups = {id(owner[id(a)]) for a in inputs if id(a) in owner}
        free = all(id(a) in known or id(a) in owner for a in inputs)
        if v.opcode == "iota":
            known.add(id(v))
        elif v.space is Space.BLOCK and v.opcode == "int_and" and v.args[1] == MASK:
            found.append(Hoisted(v))
            owner[id(v)] = found[-1]
        elif v.opcode not in OPCODES or v.space not in (Space.BLOCK, Space.TABLE) or not free:
            continue
        elif not groups:
            known.add(id(v))
            constant.append(v)
        elif len(groups) == 1:
            group = next(owner[id(a)] for a in inputs if id(a) in owner)
            owner[id(v)] = group
            group.body.append(v)
    for v in kernel.body:
        for a in v.args:
            used = owner.get(id(a)) if isinstance(a, Value) and a.space is Space.TABLE else None
            if isinstance(a, Value) and used is not None and owner.get(id(v)) is not used:
                used.tables += [a] * (a not in used.tables)
    for group in found:
        group.body = _needed([*constant, *group.body], group.tables)
    return [group for group in found if group.tables]


def _needed(body: list[Value], tables: list[Value]) -> list[Value]:
    """The operations that lead to the tables."""
    needed = {id(t) for t in tables}
    for v in reversed(body):
        if id(v) in needed:
            needed |= {id(a) for a in v.args if isinstance(a, Value)}
    return [v for v in body if id(v) in needed]


def only_for_tables(kernel: Kernel, hoisted: list[Hoisted]) -> set[int]:
    """Operations, by ``id``, that nothing needs but the making of hoisted tables."""
    inside = {id(v): v for group in hoisted for v in group.body}
    tables = {id(t) for group in hoisted for t in group.tables}
    needed = {
        id(a) for v in kernel.body if id(v) not in inside for a in v.args if isinstance(a, Value)
    }
    for v in reversed(kernel.body):
        if id(v) in inside and id(v) in needed - tables:
            needed |= {id(a) for a in v.args if isinstance(a, Value)}
    return inside.keys() - needed

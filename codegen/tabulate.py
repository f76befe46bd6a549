"""Decoding by table: what depends on a code of at most 4 bits is computed once per code.

A block at ``w`` bits has ``2^w <= 16`` distinct codes, one register of floats. Every float that is
a function of one such code and of block values is evaluated on ``iota`` in the ``TABLE`` space and
looked up per element, which replaces a root, a division or an exponential by one permutation.
"""

from __future__ import annotations

from dataclasses import replace

from stq_compile.codegen.ir import OPCODES, Kernel, Space, Type, Value

MAX_WIDTH = 4


def tabulate(kernel: Kernel) -> Kernel:
    """The kernel with decoding arithmetic moved into tables; arguments are not changed."""
    roots = [v for v in kernel.body if v.opcode == "unpack" and v.width <= MAX_WIDTH]
    for v in kernel.body:
        code = v.args[0] if v.opcode == "pack" and v.width <= MAX_WIDTH else None
        if isinstance(code, Value):
            roots.append(code)
    iota = Value("iota", "iota", (), Space.TABLE, Type.INT)
    body, replaced = [iota], dict[int, Value]()
    dependents = {id(root): _dependents(kernel, root) for root in roots}
    owner = {id(v): root for root in roots for v in dependents[id(root)]}
    tables: dict[int, Value] = {}
    outside = _used_outside(kernel, {k: id(r) for k, r in owner.items()})
    for v in kernel.body:
        args = tuple(replaced.get(id(a), a) if isinstance(a, Value) else a for a in v.args)
        root = owner.get(id(v))
        if root is None:
            clone = replace(v, args=args)
            replaced[id(v)] = clone
            body.append(clone)
            continue
        inner = tuple(
            (iota if a is root else tables.get(id(a), replaced.get(id(a), a)))
            if isinstance(a, Value)
            else a
            for a in v.args
        )
        table = Value(f"{v.name}_table", v.opcode, inner, Space.TABLE, v.type, origin=v.origin)
        tables[id(v)] = table
        body.append(table)
        if id(v) in outside:
            code = replaced[id(root)]
            found = Value(v.name, "lookup", (table, code), Space.ELEMENT, v.type, origin=v.origin)
            replaced[id(v)] = found
            body.append(found)
    if len(body) == len(kernel.body) + 1:
        body = body[1:]
    return Kernel(kernel.name, kernel.operands, body, kernel.summary)


def _dependents(kernel: Kernel, root: Value) -> list[Value]:
    """Pure element values that are a function of ``root`` and of block and tensor values."""
    found = {id(root)}
    values = []
    for v in kernel.body:
        elements = [a for a in v.args if isinstance(a, Value) and a.space is Space.ELEMENT]
        if v.opcode in OPCODES and elements and all(id(a) in found for a in elements):
            found.add(id(v))
            values.append(v)
    # A value that is needed per element but is not a float ends the table one step earlier.
    while True:
        owner = {id(v): id(root) for v in values}
        outside = _used_outside(kernel, owner)
        kept = [v for v in values if v.type is Type.FLOAT or id(v) not in outside]
        if len(kept) == len(values):
            return values
        values = kept


def _used_outside(kernel: Kernel, owner: dict[int, int]) -> set[int]:
    """Owned values that an operation of another owner, or of none, uses."""
    return {
        id(a)
        for v in kernel.body
        for a in v.args
        if isinstance(a, Value) and id(a) in owner and owner.get(id(v)) != owner[id(a)]
    }

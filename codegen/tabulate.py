"""Decoding by table: what depends on a code of at most 4 bits is computed once per value of it.

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
    roots, widths = list[Value](), dict[int, int]()
    for v in kernel.body:
        code = {"unpack": v, "pack": v.args[0] if v.args else None}.get(v.opcode)
        if isinstance(code, Value) and v.width <= MAX_WIDTH:
            roots.append(code)
            widths[id(code)] = v.width
    iota = Value("iota", "iota", (), Space.TABLE, Type.INT)
    body, replaced = [iota], dict[int, Value]()
    codes: dict[int, Value] = {}  # by width: the code of each entry, over and over
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
        width = widths[id(root)]
        if width == MAX_WIDTH:
            codes[width] = iota
        if width not in codes:
            args = (iota, float((1 << width) - 1))
            codes[width] = Value(
                f"code_of_{width}_bits", "int_and", args, Space.TABLE, Type.INT, origin=root.origin
            )
            body.append(codes[width])
        inner = tuple(
            (codes[width] if a is root else tables.get(id(a), replaced.get(id(a), a)))
            if isinstance(a, Value)
            else a
            for a in v.args
        )
        table = Value(f"{v.name}_table", v.opcode, inner, Space.TABLE, v.type, origin=v.origin)
        tables[id(v)] = table
        body.append(table)
        if id(v) in outside:
            args = (table, replaced[id(root)])
            found = Value(v.name, "lookup", args, Space.ELEMENT, v.type, origin=v.origin)
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
        elements = _element_args(v)
        if v.opcode in OPCODES and elements and elements <= found:
            found.add(id(v))
            values.append(v)
    # A value that is needed per element but is not a float ends the table one step earlier, and so
    # for what is computed from it.
    while True:
        owner = {id(v): id(root) for v in values}
        outside = _used_outside(kernel, owner)
        known = {id(root), *(id(v) for v in values if v.type is Type.FLOAT or id(v) not in outside)}
        kept = [v for v in values if id(v) in known and _element_args(v) <= known]
        if len(kept) == len(values):
            return values
        values = kept


def _element_args(v: Value) -> set[int]:
    return {id(a) for a in v.args if isinstance(a, Value) and a.space is Space.ELEMENT}


def _used_outside(kernel: Kernel, owner: dict[int, int]) -> set[int]:
    """Owned values that an operation of another owner, or of none, uses."""
    return {
        id(a)
        for v in kernel.body
        for a in v.args
        if isinstance(a, Value) and id(a) in owner and owner.get(id(v)) != owner[id(a)]
    }

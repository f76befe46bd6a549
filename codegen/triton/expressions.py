"""Pure operations as Triton expressions."""

from __future__ import annotations

from stq_compile.codegen.ir import OPCODES, Space, Type, Value
from stq_compile.codegen.triton.syntax import (
    BLOCK_TEMPLATES,
    LIBRARY_ARGUMENTS,
    TEMPLATES,
    float_literal,
    python_name,
)


class Expressions:
    """``planar``: the values (by ``id``) that are a tuple of planes, of which ``i`` is meant.

    ``split``: those of them whose plane is a variable of its own for now.
    """

    def __init__(self, planar: set[int]) -> None:
        self.planar = planar
        self.split = set[int]()

    def expression(self, v: Value) -> str:
        types = OPCODES[v.opcode][0]
        tensors = v.opcode in LIBRARY_ARGUMENTS
        args = []
        for a, t in zip(v.args, types, strict=True):
            text = self.argument(a, t)
            if tensors and not isinstance(a, Value):
                text = f"tl.full([1, 1], {text}, tl.float32)"
            args.append(text)
        templates = BLOCK_TEMPLATES if v.space is Space.BLOCK else TEMPLATES
        return templates[v.opcode].format(*args)

    def argument(self, a: Value | float, t: Type) -> str:
        if not isinstance(a, Value):
            return float_literal(a) if t is Type.FLOAT else str(int(a))
        if a.opcode == "valid":
            return "inside"
        if id(a) in self.split:
            return plane_name(a)
        name = python_name(a.name)
        return f"{name}[i]" if id(a) in self.planar else name


def plane_name(v: Value) -> str:
    """One plane of a value, named beside the tuple of its planes."""
    return f"PLANE_{v.name}"

"""What a kernel must satisfy before anything is emitted from it."""

from __future__ import annotations

from typing import NoReturn

from stq_compile.codegen.ir import (
    OPCODES,
    READS,
    REDUCTIONS,
    STORES,
    Kernel,
    KernelOperand,
    OperandKind,
    Space,
    Type,
    Value,
)
from stq_compile.errors import InvalidKernelError

KINDS: dict[str, OperandKind] = {
    "load": OperandKind.FLOATS,
    "load_half": OperandKind.HALVES,
    "load_byte": OperandKind.BYTES,
    "unpack": OperandKind.CODES,
    "random24": OperandKind.KEY,
    "random": OperandKind.KEY,
    "load_word": OperandKind.WORDS,
    "load_scalar": OperandKind.SCALAR,
    "argument": OperandKind.NUMBER,
    "store": OperandKind.FLOATS,
    "store_half": OperandKind.HALVES,
    "store_byte": OperandKind.BYTES,
    "pack": OperandKind.CODES,
    "store_word": OperandKind.WORDS,
    "store_scalar": OperandKind.SCALAR,
    "accumulate": OperandKind.SUMS,
}
"""The kind of operand that each memory operation takes."""


def verify_kernel(kernel: Kernel) -> None:
    """Check definitions, names, types, spaces and operands; raises `InvalidKernelError`."""
    _Verifier(kernel).run()


class _Verifier:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.operands = {o.name: o for o in kernel.operands}
        self.defined: set[int] = set()
        self.names: set[str] = set()
        self.stored: set[str] = set()
        self.slots: set[tuple[str, int]] = set()

    def run(self) -> None:
        for v in self.kernel.body:
            self._definitions(v)
            if v.opcode in OPCODES:
                self._pure(v)
            elif v.opcode in REDUCTIONS:
                self._reduction(v)
            elif v.opcode in STORES:
                self._store(v)
            elif v.opcode in READS:
                self._read(v)
            else:
                self._fail(v, "unknown opcode")
            self.defined.add(id(v))

    def _fail(self, v: Value, reason: str) -> NoReturn:
        raise InvalidKernelError(
            kernel=self.kernel.name, op=f"{v.name} = {v.opcode}", reason=reason
        )

    def _definitions(self, v: Value) -> None:
        if v.name in self.names:
            self._fail(v, "a second value of that name")
        self.names.add(v.name)
        for a in v.args:
            if isinstance(a, Value) and id(a) not in self.defined:
                self._fail(v, f"argument {a.name} is not defined before it")
            table = isinstance(a, Value) and a.space is Space.TABLE and v.space is not Space.TABLE
            if table and (v.opcode != "lookup" or a is not v.args[0]):
                self._fail(v, f"uses the table {getattr(a, 'name', '')} without a lookup")

    def _pure(self, v: Value) -> None:
        self._types(v, OPCODES[v.opcode][0])
        if v.opcode == "lookup":
            table, code = v.args
            spaces = (getattr(table, "space", None), getattr(code, "space", None), v.space)
            if spaces != (Space.TABLE, Space.ELEMENT, Space.ELEMENT):
                self._fail(v, "a lookup takes a table and element codes, and gives elements")
        elif v.space != self._highest(v):
            self._fail(v, f"space {v.space.name} for arguments in {self._highest(v).name}")

    def _reduction(self, v: Value) -> None:
        self._types(v, (REDUCTIONS[v.opcode],))
        if self._highest(v) is not Space.ELEMENT or v.space is not Space.BLOCK:
            self._fail(v, "a reduction takes elements and gives a block value")

    def _store(self, v: Value) -> None:
        space, type_ = STORES[v.opcode]
        self._types(v, (type_,))
        operand = self._operand(v)
        if self._highest(v) > space:
            self._fail(v, f"stores a {self._highest(v).name} value in the {space.name} space")
        if (v.operand, v.slot) in self.slots:
            self._fail(v, f"second store to {v.operand}")
        if not operand.written:
            self._fail(v, f"operand {v.operand} is not declared as written")
        self.stored.add(v.operand)
        self.slots.add((v.operand, v.slot))

    def _read(self, v: Value) -> None:
        space, type_ = READS[v.opcode]
        if (v.space, v.type) != (space, type_):
            self._fail(v, f"is {v.type} in the {v.space.name} space, not {type_} in {space.name}")
        if v.opcode in KINDS:
            self._operand(v)
        if v.operand in self.stored:
            self._fail(v, f"reads {v.operand} after it was stored")

    def _operand(self, v: Value) -> KernelOperand:
        operand = self.operands.get(v.operand)
        if operand is None:
            self._fail(v, f"no operand {v.operand}")
        if operand.kind is not KINDS[v.opcode]:
            self._fail(v, f"operand {v.operand} holds {operand.kind}, not {KINDS[v.opcode]}")
        if v.opcode in ("pack", "unpack") and v.width != operand.width:
            self._fail(v, f"width {v.width} for operand {v.operand} of width {operand.width}")
        return operand

    @staticmethod
    def _highest(v: Value) -> Space:
        return max((a.space for a in v.args if isinstance(a, Value)), default=Space.TENSOR)

    def _types(self, v: Value, expected: tuple[Type, ...]) -> None:
        if len(v.args) != len(expected):
            self._fail(v, f"{len(v.args)} arguments for {len(expected)}")
        for a, t in zip(v.args, expected, strict=True):
            if isinstance(a, Value):
                if a.type is not t:
                    self._fail(v, f"argument {a.name} is {a.type}, expected {t}")
            elif t is Type.INT and not float(a).is_integer():
                self._fail(v, f"literal {a!r} is not a whole number")

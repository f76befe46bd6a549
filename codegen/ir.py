"""The kernel IR: straight-line SSA over values that live in four spaces.

``TENSOR``   one value per tensor, float64: step counts, bias corrections
``BLOCK``    one value per block of 128 elements: scales, ranges
``TABLE``    16 values per block, one per code: decoding tables
``ELEMENT``  one value per element, float32 or int32

A kernel updates one tensor block by block. An operation's space is the highest of its arguments';
reductions (``block_sum``, ``block_squares``, ``block_max``) go from ``ELEMENT`` down to ``BLOCK``.
An emitter needs to know only the table `OPCODES` and the memory operations.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field


class Space(enum.IntEnum):
    TENSOR = 0
    BLOCK = 1
    TABLE = 2
    ELEMENT = 3


class Type(enum.StrEnum):
    """``FLOAT`` is float64 in the tensor space and float32 elsewhere."""

    FLOAT = "float"
    INT = "int"
    BOOL = "bool"
    NONE = "none"


F, I, B = Type.FLOAT, Type.INT, Type.BOOL  # noqa: E741  (the table below reads as signatures)

OPCODES: dict[str, tuple[tuple[Type, ...], Type]] = {
    "add": ((F, F), F),
    "sub": ((F, F), F),
    "mul": ((F, F), F),
    "div": ((F, F), F),
    "quotient": ((F, F), F),  # a quotient, correctly rounded, far from under- and overflow
    "fma": ((F, F, F), F),
    "neg": ((F,), F),
    "abs": ((F,), F),
    "sqrt": ((F,), F),
    "exp": ((F,), F),
    "log": ((F,), F),
    "pow": ((F, F), F),
    "sign": ((F,), F),
    "copysign": ((F, F), F),
    "floor": ((F,), F),
    "fraction": ((F,), F),  # x - floor(x)
    "ceil": ((F,), F),
    "min": ((F, F), F),  # of numbers: either argument if one is NaN
    "max": ((F, F), F),
    "minimum": ((F, F), F),  # NaN if either is, as torch's
    "maximum": ((F, F), F),
    "lt": ((F, F), B),
    "le": ((F, F), B),
    "gt": ((F, F), B),
    "ge": ((F, F), B),
    "eq": ((F, F), B),
    "ne": ((F, F), B),
    "and": ((B, B), B),
    "or": ((B, B), B),
    "not": ((B,), B),
    "select": ((B, F, F), F),
    "int_select": ((B, I, I), I),
    "int_add": ((I, I), I),
    "int_sub": ((I, I), I),
    "int_mul": ((I, I), I),  # the low 32 bits
    "int_and": ((I, I), I),
    "int_or": ((I, I), I),
    "int_min": ((I, I), I),
    "int_max": ((I, I), I),
    "int_lt": ((I, I), B),
    "int_eq": ((I, I), B),
    "shift_left": ((I, I), I),
    "shift_right": ((I, I), I),  # arithmetic
    "bits_of": ((F,), I),
    "from_bits": ((I,), F),
    "to_float": ((I,), F),
    "to_int": ((F,), I),  # towards zero
    "lookup": ((F, I), F),  # (table, code), of which the low 4 bits count
}
"""Pure operations: argument types and result type."""

READS: dict[str, tuple[Space, Type]] = {
    "load": (Space.ELEMENT, F),
    "load_half": (Space.ELEMENT, I),  # 16 bits, zero-extended
    "load_byte": (Space.ELEMENT, I),  # 8 bits, sign-extended
    "unpack": (Space.ELEMENT, I),
    "random24": (Space.ELEMENT, F),  # a whole number in [0, 2^24)
    "random": (Space.ELEMENT, I),
    "valid": (Space.ELEMENT, B),
    "load_word": (Space.BLOCK, I),  # 16 bits, zero-extended
    "valid_count": (Space.BLOCK, F),
    "load_scalar": (Space.TENSOR, F),
    "argument": (Space.TENSOR, F),
    "iota": (Space.TABLE, I),
}
"""Operations that bring values in; ``operand`` names where from."""

REDUCTIONS: dict[str, Type] = {"block_sum": F, "block_squares": F, "block_max": I}

STORES: dict[str, tuple[Space, Type]] = {
    "store": (Space.ELEMENT, F),
    "store_half": (Space.ELEMENT, I),
    "store_byte": (Space.ELEMENT, I),
    "pack": (Space.ELEMENT, I),
    "store_word": (Space.BLOCK, I),
    "store_scalar": (Space.TENSOR, F),
    "accumulate": (Space.BLOCK, F),  # adds to slot ``slot`` of a tensor's sums, in float64
}


class OperandKind(enum.StrEnum):
    """How a kernel reaches an operand: pointers of several element types, or a value."""

    FLOATS = "floats"
    HALVES = "halves"
    BYTES = "bytes"
    CODES = "codes"
    WORDS = "words"
    SCALAR = "scalar"
    NUMBER = "number"
    KEY = "key"
    SUMS = "sums"


@dataclass(frozen=True)
class KernelOperand:
    """A field of the kernel's table of tensors.

    ``dtype`` is the type in memory of an operand of ``FLOATS`` or ``SCALAR``; kernels compute in
    float32, and with scalars in float64.
    """

    name: str
    kind: OperandKind
    written: bool = False
    width: int = 0
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        """Bytes of an element, for operands that have one."""
        if self.kind is OperandKind.BYTES:
            return 1
        halves = self.kind is OperandKind.HALVES or self.dtype in ("bfloat16", "float16")
        return 2 if halves else 4


@dataclass(eq=False)
class Value:
    """One operation and its result. ``origin`` says which graph node it was lowered from."""

    name: str
    opcode: str
    args: tuple[Value | float, ...]
    space: Space
    type: Type
    operand: str = ""
    width: int = 0
    origin: str = ""
    slot: int = 0


Argument = Value | float


@dataclass
class Kernel:
    """A kernel body in execution order."""

    name: str
    operands: tuple[KernelOperand, ...]
    body: list[Value] = field(default_factory=list)
    summary: str = ""

    def operand(self, name: str) -> KernelOperand:
        return next(o for o in self.operands if o.name == name)

    @property
    def slots(self) -> int:
        """How many sums a measuring kernel makes per tensor; 0 for one that steps."""
        return sum(v.opcode == "accumulate" for v in self.body)

    def __str__(self) -> str:
        lines = [f"kernel {self.name}({', '.join(f'{o.kind} {o.name}' for o in self.operands)})"]
        for v in self.body:
            args = [a.name if isinstance(a, Value) else repr(a) for a in v.args]
            args += [v.operand] * bool(v.operand) + [f"width={v.width}"] * bool(v.width)
            args += [f"slot={v.slot}"] * (v.opcode == "accumulate")
            origin = f"  # {v.origin}" if v.origin else ""
            lines.append(
                f"  {v.space.name.lower():<7} {v.name} = {v.opcode}({', '.join(args)}){origin}"
            )
        return "\n".join(lines)


class Builder:
    """Appends operations to a kernel; equal pure operations are made once."""

    def __init__(self, name: str, operands: Sequence[KernelOperand]) -> None:
        self.kernel = Kernel(name, tuple(operands))
        self.origin = ""
        self.prefix = ""
        self._known: dict[tuple[object, ...], Value] = {}
        self._names: dict[str, int] = {o.name: 0 for o in operands}
        self.words: dict[int, tuple[Value, Value]] = {}
        """Of scale words that were made here, by ``id``: the scale's bits, and how far apart those
        of its levels are, both of which are known before the word."""

    def op(self, opcode: str, *args: Argument, name: str = "") -> Value:
        """A pure operation, in the highest space of its arguments.

        A mask where a number is expected counts as 1 and 0.
        """
        args = tuple(
            self.number(a) if t is F else a for a, t in zip(args, OPCODES[opcode][0], strict=True)
        )
        key = (opcode, *(id(a) if isinstance(a, Value) else repr(a) for a in args))
        if key in self._known:
            return self._known[key]
        space = max((a.space for a in args if isinstance(a, Value)), default=Space.TENSOR)
        value = self._append(name or opcode, opcode, args, space, OPCODES[opcode][1])
        self._known[key] = value
        return value

    def number(self, a: Argument) -> Argument:
        """``a`` as a number."""
        is_mask = isinstance(a, Value) and a.type is B
        return self.op("select", a, 1.0, 0.0) if is_mask else a

    def read(self, opcode: str, operand: str = "", *, width: int = 0, name: str = "") -> Value:
        key = (opcode, operand, width)
        if key not in self._known:
            space, type_ = READS[opcode]
            value = self._append(name or operand or opcode, opcode, (), space, type_)
            value.operand, value.width = operand, width
            self._known[key] = value
        return self._known[key]

    def reduce(self, opcode: str, value: Value, name: str = "") -> Value:
        key = (opcode, id(value))
        if key not in self._known:
            args = (value,)
            made = self._append(name or opcode, opcode, args, Space.BLOCK, REDUCTIONS[opcode])
            self._known[key] = made
        return self._known[key]

    def store(
        self, opcode: str, operand: str, value: Argument, *, width: int = 0, slot: int = 0
    ) -> None:
        stored = self._append(f"{opcode}_{operand}", opcode, (value,), STORES[opcode][0], Type.NONE)
        stored.operand, stored.width, stored.slot = operand, width, slot

    def rename(self, value: object, name: str) -> None:
        """Give the newest value the name of the graph node that it stands for."""
        if self.kernel.body and value is self.kernel.body[-1]:
            self.kernel.body[-1].name = self._unique(name)

    def _unique(self, name: str) -> str:
        count = self._names.get(name, -1) + 1
        self._names[name] = count
        return self._unique(f"{name}_{count}") if count else name

    def _append(
        self, name: str, opcode: str, args: tuple[Argument, ...], space: Space, type_: Type
    ) -> Value:
        value = Value(
            self._unique(self.prefix + name), opcode, args, space, type_, origin=self.origin
        )
        self.kernel.body.append(value)
        return value

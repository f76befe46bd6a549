"""Pieces of a generated module: its header, functions, and the notes at the end of lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stq_compile.codegen.ir import (
    OPCODES,
    READS,
    REDUCTIONS,
    STORES,
    Kernel,
    OperandKind,
    Space,
    Value,
)
from stq_compile.codegen.triton.syntax import (
    ELEMENT_TYPES,
    LIBRARY,
    SCALAR_TYPES,
    TEMPLATES,
    WIDE_TEMPLATES,
)
from stq_compile.errors import InvalidKernelError

IMPURE = {*READS, *REDUCTIONS, *STORES} - {"iota"}
"""Operations other than pure ones that the emitter knows."""


@dataclass(frozen=True)
class Emitted:
    """A generated module.

    Attributes:
        row_fields: int64 fields of a tensor's row in the table.
        slot_fields: int64 fields of its slots.
        addresses: the fields of a row that hold addresses of elements, codes or scale words.
        sums: how many sums a measuring kernel makes; 0 for one that steps.
    """

    name: str
    source: str
    row_fields: int
    slot_fields: int
    addresses: tuple[int, ...] = ()
    sums: int = 0


WITH_PLACE = (
    OperandKind.FLOATS,
    OperandKind.HALVES,
    OperandKind.BYTES,
    OperandKind.CODES,
    OperandKind.WORDS,
)
"""Operands that lie in memory, element by element or block by block."""


def row_fields(kernel: Kernel) -> int:
    """One for each operand, elements, first block; of measuring kernels, stride and offset too."""
    return len(kernel.operands) + (4 if kernel.slots else 2)


def module(kernel: Kernel, functions: Sequence[str], slot_fields: int) -> Emitted:
    """The whole text."""
    text = "\n\n\n".join(functions)
    used = [name for name in LIBRARY if re.search(rf"\b{name}\(", text)]
    source = f"{header(kernel, used)}\n\n\n{text}\n"
    places = tuple(i for i, o in enumerate(kernel.operands) if o.kind in WITH_PLACE)
    return Emitted(kernel.name, source, row_fields(kernel), slot_fields, places, kernel.slots)


class Notes:
    """The graph node of a line, with its source line where the node first appears."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, v: Value) -> str:
        if not v.origin:
            return ""
        text = v.origin.split("  ")[0] if v.origin in self.said else v.origin
        self.said.add(v.origin)
        return f"  # {text}"


def function(
    name: str,
    arguments: Sequence[str],
    summary: str,
    lines: Sequence[str],
    fixed: Sequence[str] = (),
) -> str:
    """A jitted function; for ``fixed`` arguments Triton compiles no variants."""
    inner = "".join(f"    {a},\n" for a in arguments)
    names = ", ".join(f'"{a}"' for a in fixed)
    jit = f"@triton.jit(do_not_specialize=[{names}])" if fixed else "@triton.jit"
    head = f'{jit}\ndef {name}(\n{inner}):\n    """{summary}"""'
    return "\n".join([head, *(f"    {line}" for line in lines)])


def header(kernel: Kernel, library: Sequence[str]) -> str:
    """What the kernel does, and the imports."""
    count = len(kernel.operands)
    fields = [f"    {i:2}  {_field(o.kind)}{o.name}" for i, o in enumerate(kernel.operands)]
    fields += [f"    {count:2}  elements", f"    {count + 1:2}  first block of the random counter"]
    if kernel.slots:
        more = ("every how many blocks to look at one", "the first of them, of all shards")
        fields += [f"    {count + 2 + i:2}  {text}" for i, text in enumerate(more)]
    main = "measure" if kernel.slots else "update"
    described = "\n".join(fields)
    imports = "".join(f"    {name},\n" for name in library)
    return (
        f'"""{kernel.summary}\n\n'
        f"Run `scalars` on the table of all tensors, then `{main}` on their tiles. The fields of\n"
        f'a tensor in the table, 8 bytes each:\n\n{described}\n"""\n\n'
        "import triton\nimport triton.language as tl\n"
        f"from stq_compile.codegen.triton.library import (\n{imports})"
    )


def _field(kind: OperandKind) -> str:
    kinds = {OperandKind.NUMBER: "float64 ", OperandKind.KEY: "random stream "}
    return kinds.get(kind, "address of ")


def check_emittable(kernel: Kernel) -> None:
    """Refuse what has no Triton form; raises `InvalidKernelError`."""
    for v in kernel.body:
        templates = WIDE_TEMPLATES if v.space is Space.TENSOR else TEMPLATES
        known = v.opcode in templates if v.opcode in OPCODES else v.opcode in IMPURE
        if v.space is Space.TABLE or not known:
            raise InvalidKernelError(
                kernel=kernel.name,
                op=f"{v.name} = {v.opcode}",
                reason=f"it has no Triton form in the {v.space.name} space",
            )
    for o in kernel.operands:
        dtypes = SCALAR_TYPES if o.kind is OperandKind.SCALAR else ELEMENT_TYPES
        if o.dtype not in dtypes:
            raise InvalidKernelError(
                kernel=kernel.name, op=f"operand {o.name}", reason=f"elements of {o.dtype}"
            )

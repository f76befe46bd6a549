"""Pieces of a generated module: its header, functions, and the notes at the end of lines."""

from __future__ import annotations

from collections.abc import Sequence

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
from stq_compile.codegen.triton.syntax import ELEMENT_TYPES, TEMPLATES, WIDE_TEMPLATES
from stq_compile.errors import InvalidKernelError

IMPURE = {*READS, *REDUCTIONS, *STORES} - {"iota", "accumulate"}
"""Operations other than pure ones that the emitter knows."""


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


def function(name: str, arguments: Sequence[str], summary: str, lines: Sequence[str]) -> str:
    """A jitted function."""
    inner = "".join(f"    {a},\n" for a in arguments)
    head = f'@triton.jit\ndef {name}(\n{inner}):\n    """{summary}"""'
    return "\n".join([head, *(f"    {line}" for line in lines)])


def header(kernel: Kernel, library: Sequence[str]) -> str:
    """What the kernel does, and the imports."""
    count = len(kernel.operands)
    fields = [f"    {i:2}  {_field(o.kind)}{o.name}" for i, o in enumerate(kernel.operands)]
    fields += [f"    {count:2}  elements", f"    {count + 1:2}  first block of the random counter"]
    described = "\n".join(fields)
    imports = "".join(f"    {name},\n" for name in library)
    return (
        f'"""{kernel.summary}\n\n'
        "Run `scalars` on the table of all tensors, then `update` on their tiles. The fields of a\n"
        f'tensor in the table, 8 bytes each:\n\n{described}\n"""\n\n'
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
        if o.dtype not in ELEMENT_TYPES:
            raise InvalidKernelError(
                kernel=kernel.name, op=f"operand {o.name}", reason=f"elements of {o.dtype}"
            )

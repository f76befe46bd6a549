"""Measuring kernels in Triton: ``measure`` sums up what a look of the planner asks for.

It writes no codes, so nothing has to be brought together in bytes, and no order of a sum is
promised. An element value is therefore one tensor ``[BLOCKS, 128]``, and the text a line for each
operation, an eighth of what planes would make of a kernel that evaluates every width of every
state. A program looks at ``BLOCKS`` sampled blocks of one tensor and stores its sums; they are
added up afterwards, tile by tile, so that no order of arrival shows in them.
"""

from __future__ import annotations

from stq_compile.codegen.ir import (
    REDUCTIONS,
    Kernel,
    KernelOperand,
    OperandKind,
    Space,
    Value,
)
from stq_compile.codegen.triton.expressions import Expressions
from stq_compile.codegen.triton.scalars import Slots, emit_scalars, read_slots
from stq_compile.codegen.triton.syntax import ELEMENT_TYPES, POINTEES, python_name
from stq_compile.codegen.triton.text import (
    WITH_PLACE,
    Emitted,
    Notes,
    function,
    module,
    row_fields,
)

ANYWHERE = ("valid", "store_scalar")
"""What is no line of the function: a mask that is there, and what `scalars` does."""

SIZES = {OperandKind.FLOATS: 128, OperandKind.HALVES: 128, OperandKind.WORDS: 1}
"""Units of a block in memory; of codes it depends on the width."""


def emit_measuring(kernel: Kernel) -> Emitted:
    """The module of a kernel that accumulates sums."""
    note, slots = Notes(), Slots(kernel)
    functions = [emit_scalars(kernel, slots, note), _measure(kernel, slots, note)]
    return module(kernel, functions, slots.count)


def _measure(kernel: Kernel, slots: Slots, note: Notes) -> str:
    count = len(kernel.operands)
    words = Expressions(set())
    lines = [
        "program = tl.program_id(0).to(tl.int64)",
        "index = tl.load(tiles + 2 * program)",
        "first = tl.load(tiles + 2 * program + 1)",
        f"row = table + index * {row_fields(kernel)}",
        f"slot = slots + index * {slots.count}",
        f"stride = tl.load(row + {count + 2})",
        f"count = tl.load(row + {count}) - first * 128",
        "local = tl.arange(0, BLOCKS).to(tl.int64)[:, None] * stride",
        "element = tl.arange(0, 128)[None, :]",
        "present = local * 128 < count",
        "inside = local * 128 + element < count",
        *(_place(o, i) for i, o in enumerate(kernel.operands) if o.kind in WITH_PLACE),
        *read_slots(slots, note),
    ]
    for v in kernel.body:
        if v.space is not Space.TENSOR and v.opcode not in ANYWHERE:
            lines.append(f"{_line(v, kernel, words)}{note(v)}")
    summary = "One program per tile: ``tiles`` says of which tensor, and its first block."
    arguments = ("table", "slots", "tiles", "sums", "BLOCKS: tl.constexpr")
    return function("measure", arguments, summary, lines)


def _place(o: KernelOperand, field: int) -> str:
    """The address of every element, of a block's codes, or of its scale word."""
    pointee = ELEMENT_TYPES[o.dtype] if o.kind is OperandKind.FLOATS else POINTEES[o.kind]
    size = SIZES.get(o.kind, 16 * o.width)
    element = " + element" if size == 128 and o.kind is not OperandKind.CODES else ""
    base = f"pointer(row, {field}, {pointee}, first * {size}, 1)"
    return f"{python_name(o.name)} = {base} + local * {size}{element}"


def _line(v: Value, kernel: Kernel, words: Expressions) -> str:
    name, operand = python_name(v.name), python_name(v.operand)
    if v.opcode == "accumulate":
        assert isinstance(v.args[0], Value)
        value = f"tl.where(present, {python_name(v.args[0].name)}, 0.0).to(tl.float64)"
        return f"tl.store(sums + program * {kernel.slots} + {v.slot}, tl.sum({value}))"
    if v.opcode in REDUCTIONS:
        assert isinstance(v.args[0], Value)
        x = python_name(v.args[0].name)
        reduce = "tl.max" if v.opcode == "block_max" else "tl.sum"
        counted = f"{x} * {x}" if v.opcode == "block_squares" else x
        return f"{name} = {reduce}({counted}, 1, keep_dims=True)"
    reads = {
        "load": f"tl.load({operand}, mask=inside, other=0.0).to(tl.float32)",
        "load_half": f"tl.load({operand}, mask=inside, other=0).to(tl.int32)",
        "unpack": f"gather_codes({operand}, element, present, {v.width})",
        "load_word": f"load_word({operand}, present)",
        "valid_count": "valid_count(local, count)",
    }
    return f"{name} = {reads.get(v.opcode) or words.expression(v)}"

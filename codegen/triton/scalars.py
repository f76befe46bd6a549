"""The scalars kernel: the tensor space, float64, one lane per tensor, on the device.

It advances step counters, computes what a graph computes once per tensor (bias corrections), and
mixes the step into the keys of the random streams; the step's number is read from the device and
moved on there, so that a captured CUDA graph makes a new step whenever it is replayed. What the
tile function needs of that lies in the *slots* of each tensor: int64 words that hold float32
patterns or keys.
"""

from __future__ import annotations

from stq_compile.codegen.ir import (
    OPCODES,
    STORES,
    Kernel,
    KernelOperand,
    OperandKind,
    Space,
    Type,
    Value,
)
from stq_compile.codegen.triton.syntax import (
    LIBRARY_ARGUMENTS,
    SCALAR_TYPES,
    WIDE_TEMPLATES,
    double_literal,
    python_name,
)
from stq_compile.codegen.triton.text import Notes, function, row_fields


class Slots:
    """Which slot holds which tensor-space value, and which the key of which operand."""

    def __init__(self, kernel: Kernel) -> None:
        used = {
            id(a)
            for v in kernel.body
            for a in v.args
            if isinstance(a, Value) and a.space is Space.TENSOR and v.space is not Space.TENSOR
        }
        values = [v for v in kernel.body if id(v) in used]
        keys = [o.name for o in kernel.operands if o.kind is OperandKind.KEY]
        self.values = [(v, i) for i, v in enumerate(values)]
        self.keys = [(name, len(values) + i) for i, name in enumerate(keys)]
        self.count = max(1, len(values) + len(keys))


def emit_scalars(kernel: Kernel, slots: Slots, note: Notes) -> str:
    """``scalars(table, slots, clock, rows, ROWS, CHUNKS)``, run by one program.

    One, so that it can move the clock on after everything has read it.
    """
    field = {o.name: i for i, o in enumerate(kernel.operands)}
    lines = [
        "index = chunk * ROWS + tl.arange(0, ROWS).to(tl.int64)",
        "live = index < rows",
        f"row = table + index * {row_fields(kernel)}",
        f"slot = slots + index * {slots.count}",
    ]
    tensor = [v for v in kernel.body if v.space is Space.TENSOR and v.opcode not in STORES]
    for v in tensor:
        lines.append(f"{python_name(v.name)} = {_expression(v, field, kernel)}{note(v)}")
    for v in kernel.body:
        if v.opcode == "store_scalar":
            place = _place(field[v.operand], kernel.operand(v.operand))
            value = _argument(v.args[0], tensor=True)
            lines.append(f"tl.store({place}, {value}.to(tl.float32), mask=live){note(v)}")
    for v, slot in slots.values:
        bits = f"{python_name(v.name)}.to(tl.float32).to(tl.int32, bitcast=True)"
        lines.append(f"tl.store(slot + {slot}, {bits}.to(tl.int64), mask=live)")
    for operand, slot in slots.keys:
        key = f"tl.load(row + {field[operand]}, mask=live, other=0).to(tl.uint64)"
        lines.append(f"{python_name(operand)} = step_key({key}, step.to(tl.uint64))")
        stored = f"{python_name(operand)}.to(tl.int64)"
        lines.append(f"tl.store(slot + {slot}, {stored}, mask=live)")
    body = ["for chunk in range(CHUNKS):", *(f"    {line}" for line in lines)]
    if not kernel.slots:  # a look is no step
        body = ["step = tl.load(clock)", "tl.debug_barrier()", *body, "tl.store(clock, step + 1)"]
    summary = "Once per tensor: step counters, scalars in float64, keys of the random streams."
    constants = ("ROWS: tl.constexpr", "CHUNKS: tl.constexpr")
    arguments = ("table", "slots", "clock", "rows", *constants)
    return function("scalars", arguments, summary, body, fixed=("rows",))


def read_slots(slots: Slots, note: Notes) -> list[str]:
    """What the scalars kernel left: float32 numbers; keys are read where they are used."""
    lines = []
    for v, slot in slots.values:
        convert = "" if v.type is Type.FLOAT else ".to(tl.int32)"
        convert = " != 0.0" if v.type is Type.BOOL else convert
        name = python_name(v.name)
        lines.append(f"{name} = slot_float(slot, {slot}){convert}{note(v)}")
    return lines


def _place(field: int, operand: KernelOperand) -> str:
    pointer = f"tl.load(row + {field}, mask=live, other=0)"
    return f"{pointer}.to(tl.pointer_type({SCALAR_TYPES[operand.dtype]}))"


def _expression(v: Value, field: dict[str, int], kernel: Kernel) -> str:
    if v.opcode == "load_scalar":
        place = _place(field[v.operand], kernel.operand(v.operand))
        return f"tl.load({place}, mask=live, other=0.0).to(tl.float64)"
    if v.opcode == "argument":
        bits = f"tl.load(row + {field[v.operand]}, mask=live, other=0)"
        return f"{bits}.to(tl.float64, bitcast=True)"
    template = WIDE_TEMPLATES[v.opcode]
    # A function, or an operation on literals alone, needs a tensor.
    tensors = (
        v.opcode in LIBRARY_ARGUMENTS
        or template.startswith("tl.")
        or not any(isinstance(a, Value) for a in v.args)
    )
    args = [
        _argument(a, tensor=tensors) if t is Type.FLOAT else _mask(a)
        for a, t in zip(v.args, OPCODES[v.opcode][0], strict=True)
    ]
    return template.format(*args)


def _argument(a: Value | float, *, tensor: bool) -> str:
    if isinstance(a, Value):
        return python_name(a.name)
    return f"tl.full([ROWS], {double_literal(a)}, tl.float64)" if tensor else double_literal(a)


def _mask(a: Value | float) -> str:
    return python_name(a.name) if isinstance(a, Value) else f"tl.full([ROWS], {int(a)}, tl.int1)"

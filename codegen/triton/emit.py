"""Triton from a kernel: a module of three functions.

``scalars`` computes the tensor space, one lane per tensor; ``tile`` computes ``BLOCKS`` blocks of
one tensor; ``update`` is what is launched: a program finds its tensor and its blocks and runs
``tile`` on them. An element value is 8 planes ``[BLOCKS, 16]``, computed in unrolled loops, in
the phases of `stq_compile.codegen.schedule`. Emission is deterministic: the same kernel gives the
same bytes.
"""

from __future__ import annotations

from stq_compile.codegen.ir import (
    REDUCTIONS,
    Kernel,
    KernelOperand,
    OperandKind,
    Space,
    Type,
    Value,
)
from stq_compile.codegen.schedule import Schedule
from stq_compile.codegen.triton.expressions import Expressions, plane_name
from stq_compile.codegen.triton.groups import Group, border, groups
from stq_compile.codegen.triton.measuring import emit_measuring
from stq_compile.codegen.triton.scalars import Slots, emit_scalars, read_slots
from stq_compile.codegen.triton.syntax import (
    DTYPES,
    ELEMENT_TYPES,
    POINTEES,
    python_name,
)
from stq_compile.codegen.triton.text import (
    WITH_PLACE,
    Emitted,
    Notes,
    check_emittable,
    function,
    module,
)


def emit(kernel: Kernel) -> Emitted:
    """The Triton module of a kernel."""
    check_emittable(kernel)
    return emit_measuring(kernel) if kernel.slots else _Emitter(kernel).emitted()


class _Emitter:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.schedule = Schedule(kernel)
        self.slots = Slots(kernel)
        self.field = {o.name: i for i, o in enumerate(kernel.operands)}
        self.note = Notes()
        gathering = [v for v in kernel.body if v.opcode == "pack" or v.opcode in REDUCTIONS]
        arguments = [a for v in gathering for a in v.args if isinstance(a, Value)]
        self.groups = groups(self.schedule)
        leaving = [v for group in self.groups for v in group.leaving]
        self.planar = {id(v) for v in (*leaving, *arguments) if v.space is Space.ELEMENT}
        """Element values that are kept as a tuple of planes."""
        self.words = Expressions(self.planar)

    def emitted(self) -> Emitted:
        body = [emit_scalars(self.kernel, self.slots, self.note), self._tile(), self._update()]
        return module(self.kernel, body, self.slots.count)

    def _update(self) -> str:
        lines = [
            "program = tl.program_id(0).to(tl.int64)",
            "index = tl.load(tiles + 2 * program)",
            "first = tl.load(tiles + 2 * program + 1)",
            f"row = table + index * {len(self.field) + 2}",
            f"slot = slots + index * {self.slots.count}",
            f"numel = tl.load(row + {len(self.field)})",
            "count = elements_left(numel, first, BLOCKS)",
            "tile(row, slot, first, count, borders, BLOCKS, VECTOR, ALIGNMENT)",
        ]
        summary = "One program per tile: ``tiles`` says of which tensor, and its first block."
        constants = [f"{n}: tl.constexpr" for n in ("BLOCKS", "VECTOR", "ALIGNMENT")]
        return function(
            "update", ("table", "slots", "tiles", "borders", *constants), summary, lines
        )

    # The tile function.
    def _tile(self) -> str:
        lines = [
            "local = tl.arange(0, BLOCKS)[:, None]",
            "lane = tl.arange(0, 16)[None, :]",
            "offset = local * 128 + lane",
            "group = local * 128 + lane // VECTOR * VECTOR",
            "present = local * 128 < count",
            *read_slots(self.slots, self.note),
        ]
        for number, group in enumerate(self.groups):
            lines.append(f"# {group.title}")
            lines += [f"{python_name(v.name)} = {self._nothing(v)}" for v in group.leaving]
            lines.append(f"if {border(number)}:")
            lines += [f"    {line}" for line in self._group(group)]
        constants = [f"{n}: tl.constexpr" for n in ("BLOCKS", "VECTOR", "ALIGNMENT")]
        arguments = ("row", "slot", "first", "count", "borders", *constants)
        return function("tile", arguments, "The blocks from ``first`` on, of one tensor.", lines)

    def _operands(self, group: Group) -> list[str]:
        """Addresses and keys that a group uses; made anew in each, not kept in registers."""
        lines = []
        used = {v.operand for v in (*group.uniform, *group.planes, *group.after) if v.operand}
        keys = dict(self.slots.keys)
        for o in self.kernel.operands:
            if o.name in used and o.kind in WITH_PLACE:
                lines.append(self._place(o))
            elif o.name in used and o.name in keys:
                block = f"tl.load(row + {len(self.field) + 1}) + first + local"
                stream = f"tl.load(slot + {keys[o.name]}).to(tl.uint64)"
                lines.append(f"{python_name(o.name)} = block_key({stream}, {block})")
        return lines

    def _place(self, o: KernelOperand) -> str:
        """The address of plane 0, chunk 0 or the scale word of every block of the tile."""
        if o.kind is OperandKind.FLOATS:
            pointee, size, place = ELEMENT_TYPES[o.dtype], 128, "offset"
        elif o.kind in (OperandKind.HALVES, OperandKind.BYTES):
            pointee, size, place = POINTEES[o.kind], 128, "offset"
        elif o.kind is OperandKind.CODES:
            size = 16 * o.width
            pointee, place = POINTEES[o.kind], f"(local * {size} + lane)"
        else:
            pointee, size, place = POINTEES[o.kind], 1, "local"
        first = "first" if size == 1 else f"first * {size}"
        base = f"pointer(row, {self.field[o.name]}, {pointee}, {first}, ALIGNMENT)"
        return f"{python_name(o.name)} = {base} + {place}"

    def _group(self, group: Group) -> list[str]:
        lines = self._operands(group)
        lines += [f"{self._uniform(v)}{self.note(v)}" for v in group.uniform]
        for v in group.planes:
            if v.opcode == "unpack":
                name = python_name(v.operand)
                lines.append(f"{name}_bytes = load_codes({name}, present, {v.width})")
        lines += [f"{python_name(v.name)} = ()" for v in group.planes if id(v) in self.planar]
        packs = [v for v in group.after if v.opcode == "pack"]
        if group.planes or packs:
            if group.split:
                body = self._split(group)
            else:
                body = [f"{self._plane(v)}{self.note(v)}" for v in group.planes]
            body += [f"{self._plane(v)}{self.note(v)}" for v in packs]
            lines.append("for i in tl.static_range(8):")
            lines.append("    inside = group + 16 * plane(i) < count")
            lines += [f"    {line}" for line in body]
        after = [v for v in group.after if v.opcode != "pack"]
        return lines + [f"{self._after(v)}{self.note(v)}" for v in after]

    def _split(self, group: Group) -> list[str]:
        """A plane behind a branch of its own; its values join their tuples after that."""
        kept = [v for v in group.planes if id(v) in self.planar]
        before = [f"{plane_name(v)} = tl.zeros([BLOCKS, 16], {DTYPES[v.type]})" for v in kept]
        self.words.split = {id(v) for v in kept}
        body = [f"    {self._plane(v)}{self.note(v)}" for v in group.planes]
        self.words.split = set()
        names = [(python_name(v.name), plane_name(v)) for v in kept]
        after = [f"{name} = {name} + ({plane},)" for name, plane in names]
        return [*before, "if (borders & (65536 << i)) != 0:", *body, *after]

    def _nothing(self, v: Value) -> str:
        """What stands for a value if its group does not run, which never happens."""
        dtype = DTYPES[v.type]
        if id(v) in self.planar:
            return f"planes_of(BLOCKS, {dtype})"
        return f"tl.zeros([BLOCKS, 1], {dtype})"

    def _uniform(self, v: Value) -> str:
        name, operand = python_name(v.name), python_name(v.operand)
        if v.opcode == "load_word":
            return f"{name} = load_word({operand}, present)"
        if v.opcode == "valid_count":
            return f"{name} = valid_count(local, count)"
        return f"{name} = {self.words.expression(v)}"

    def _plane(self, v: Value) -> str:
        operand = python_name(v.operand)
        if v.opcode in ("store", "store_half", "store_byte"):
            x = self.words.argument(v.args[0], Type.FLOAT if v.opcode == "store" else Type.INT)
            if isinstance(v.args[0], Value):
                x = f"{x}.to({self._stored(v)})"
            return f"tl.store({operand} + 16 * plane(i), {x}, mask=inside)"
        if v.opcode == "pack":
            assert isinstance(v.args[0], Value)
            codes = python_name(v.args[0].name)
            return f"store_codes({operand}, {codes}, present, borders, {v.width}, i)"
        if v.opcode == "load":
            expression = f"tl.load({operand} + 16 * plane(i), mask=inside).to(tl.float32)"
        elif v.opcode in ("load_half", "load_byte"):
            expression = f"tl.load({operand} + 16 * plane(i), mask=inside).to(tl.int32)"
        elif v.opcode == "unpack":
            expression = f"unpack({operand}_bytes, {v.width}, plane(i))"
        elif v.opcode in ("random24", "random"):
            expression = f"{v.opcode}({operand}, lane, plane(i))"
        else:
            expression = self.words.expression(v)
        if id(v) in self.words.split:
            return f"{plane_name(v)} = {expression}"
        name = python_name(v.name)
        if id(v) in self.planar:
            return f"{name} = {name} + ({expression},)"
        return f"{name} = {expression}"

    def _after(self, v: Value) -> str:
        name, operand = python_name(v.name), python_name(v.operand)
        if v.opcode in REDUCTIONS:
            assert isinstance(v.args[0], Value)
            planes = python_name(v.args[0].name)
            blocks = "" if v.opcode == "block_max" else ", BLOCKS"
            return f"{name} = {v.opcode}({planes}{blocks})"
        word = self.words.argument(v.args[0], Type.INT)
        return f"store_word({operand}, {word}, lane, present)"

    def _stored(self, v: Value) -> str:
        """The type of an element in memory, and how it is rounded to."""
        if v.opcode != "store":
            return POINTEES[self.kernel.operand(v.operand).kind]
        dtype = self.kernel.operand(v.operand).dtype
        rounding = "" if dtype == "float32" else ', fp_downcast_rounding="rtne"'
        return f"{ELEMENT_TYPES[dtype]}{rounding}"

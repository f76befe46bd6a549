"""C++ from a kernel: one function per tile of blocks, and the loop over all tiles (`run`).

Elements are computed plane by plane (16 lanes, 8 planes a block), in the phases of
`stq_compile.codegen.schedule`. Before the last phase but one stands the last phase of the tile
before: it fills the time in which ranges and scales are waited for (design/0012). Emission is
deterministic: the same kernel gives the same bytes.
"""

from __future__ import annotations

from stq_compile.codegen.cpp.run import HELD_TILES, MEASURE, STEP, TILES
from stq_compile.codegen.cpp.syntax import (
    TEMPLATES,
    c_name,
    c_type,
    double_literal,
    float_literal,
    int_literal,
    pointer,
)
from stq_compile.codegen.ir import (
    OPCODES,
    REDUCTIONS,
    STORES,
    Kernel,
    OperandKind,
    Space,
    Type,
    Value,
)
from stq_compile.codegen.schedule import Phase, Schedule

WHOLE = (OperandKind.FLOATS, OperandKind.HALVES, OperandKind.BYTES)
"""Operands that have one number for each element."""

LANES = {Type.FLOAT: "stq::f32v", Type.INT: "stq::i32v"}
"""The lanes that a reduction leaves of a block, by its type."""

PLANE_BY_PLANE = {
    "block_sum": "p == 0 ? {1} : {0} + {1}",
    "block_squares": "p == 0 ? {1} * {1} : stq::fma({1}, {1}, {0})",
    "block_max": "stq::max({0}, {1})",
}
"""How a reduction takes another plane {1} into its lanes {0}."""

REDUCED = {"block_sum": "sum_lanes", "block_squares": "sum_lanes", "block_max": "max_lanes"}
"""How the lanes of all blocks of a tile become one number a block."""

INLINED = {
    "iota": "stq::iota()",
    "valid": "(tail ? stq::valid(p, count) : stq::all(true))",
}


def emit(kernel: Kernel) -> str:
    """C++ source of a kernel."""
    return _Emitter(kernel).source()


class _Emitter:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.schedule = Schedule(kernel)
        self.said: set[str] = set()
        self.measures = kernel.slots > 0
        self.held = self._held()
        self.heirs = self.schedule.heirs(self.held)
        self.exact = {
            id(a)
            for v in kernel.body
            if v.opcode != "lookup"
            for a in v.args
            if isinstance(a, Value)
        }

    def source(self) -> str:
        parts = [
            f'// {self.kernel.summary}\n#include "stq_kernel.h"',
            self._row(),
            self._scalars(),
            *self._finish(),
            self._tile(),
            self._run(),
        ]
        return "\n\n".join(parts) + "\n"

    def _row(self) -> str:
        lines = ["struct Row {"]
        lines += [f"  {pointer(o)} {c_name(o.name)};" for o in self.kernel.operands]
        lines += ["  int64_t numel;", "  int64_t first_block;"]
        if self.measures:
            lines += ["  int64_t stride;  // every stride-th block of the whole tensor is sampled"]
            lines += ["  int64_t offset;  // from this one on"]
        return "\n".join([*lines, "};"])

    def _run(self) -> str:
        if not self.measures:
            return STEP.replace("@tiles", HELD_TILES if self.held else TILES)
        (operand,) = (c_name(o.name) for o in self.kernel.operands if o.kind is OperandKind.SUMS)
        return MEASURE.replace("@slots", str(self.kernel.slots)).replace("@sums", operand)

    def _scalars(self) -> str:
        """The tensor space: float64, once per tensor."""
        tensor = [v for v in self.kernel.body if v.space is Space.TENSOR and v.opcode not in STORES]
        stores = [v for v in self.kernel.body if v.opcode == "store_scalar"]
        used = self._used_below()
        keys = [c_name(o.name) for o in self.kernel.operands if o.kind is OperandKind.KEY]
        fields = [f"  uint64_t {key};" for key in keys]
        fields += [f"  {self._field_type(v)} {c_name(v.name)};" for v in tensor if id(v) in used]
        lines = ["struct Scalars {", *fields, "};", ""]
        lines.append("static void scalars(const Row& row, uint64_t step, Scalars& s) {")
        lines += [f"  s.{key} = stq::stream_key(row.{key}, step);" for key in keys]
        for v in tensor:
            type_ = {Type.FLOAT: "double", Type.BOOL: "bool", Type.INT: "int"}[v.type]
            lines.append(f"  const {type_} {c_name(v.name)} = {self._tensor(v)};{self._note(v)}")
        for v in stores:
            lines.append(
                f"  *row.{c_name(v.operand)} = static_cast<float>({self._double(v.args[0])});"
                + self._note(v)
            )
        for v in tensor:
            if id(v) in used:
                cast = f"static_cast<{self._field_type(v)}>({c_name(v.name)})"
                lines.append(f"  s.{c_name(v.name)} = {cast};")
        return "\n".join([*lines, "}"])

    def _used_below(self) -> set[int]:
        return {
            id(a)
            for v in self.kernel.body
            for a in v.args
            if isinstance(a, Value) and a.space is Space.TENSOR and v.space is not Space.TENSOR
        }

    @staticmethod
    def _field_type(v: Value) -> str:
        return {Type.FLOAT: "float", Type.BOOL: "bool", Type.INT: "int"}[v.type]

    def _tensor(self, v: Value) -> str:
        if v.opcode == "load_scalar":
            return f"*row.{c_name(v.operand)}"
        if v.opcode == "argument":
            return f"row.{c_name(v.operand)}"
        types = OPCODES[v.opcode][0]
        args = [
            self._double(a) if t is Type.FLOAT else self._plain(a)
            for a, t in zip(v.args, types, strict=True)
        ]
        return TEMPLATES[v.opcode].format(*args)

    @staticmethod
    def _double(a: Value | float) -> str:
        return c_name(a.name) if isinstance(a, Value) else double_literal(a)

    @staticmethod
    def _plain(a: Value | float) -> str:
        return c_name(a.name) if isinstance(a, Value) else str(int(a)).lower()

    def _note(self, v: Value) -> str:
        """The graph node, with its source line where the node first appears."""
        if not v.origin:
            return ""
        node = v.origin.split("  ")[0]
        text = node if v.origin in self.said else v.origin
        self.said.add(v.origin)
        return f"  // {text}"

    # The last phase, where it is held back.
    def _held(self) -> dict[int, Value]:
        """What the last phase needs of earlier ones, if it waits for the next tile's first ones.

        It does where there are three phases and the last one has no element of a tensor at hand.
        """
        *others, last = self.schedule.phases
        memory = {o.name for o in self.kernel.operands if o.kind in WHOLE}
        if self.measures or len(others) < 2 or any(v.operand in memory for v in last.body):
            return {}
        made = {id(v): v for phase in others for v in phase.body}
        used = (a for v in last.body for a in v.args if isinstance(a, Value))
        return {id(a): a for a in used if id(a) in made}

    def _finish(self) -> list[str]:
        if not self.held:
            return []
        held = ["struct Held {", "  int64_t first;", "  int blocks;"]
        for v in self.held.values():
            size = {Space.TABLE: "[stq::kTile]", Space.ELEMENT: "[stq::kTile][stq::kPlanes]"}
            held.append(f"  {c_type(v)} {c_name(v.name)}{size.get(v.space, '')};")
        lines = [
            "template <bool tail>",
            "STQ_INLINE void finish(const Row& row, const Scalars& s, uint64_t step,",
            "                       const Held& held, int count) {",
            "  constexpr int size = tail ? 1 : stq::kTile;",
            "  const int64_t first = held.first;",
            "  const int blocks = held.blocks;",
            *self._crossing(self.schedule.phases[-1]),
            *self._phase(self.schedule.phases[-1]),
        ]
        return ["\n".join([*held, "};"]), "\n".join([*lines, "}"])]

    # The tile function.
    def _tile(self) -> str:
        more = ", int64_t stride, double* totals" if self.measures else ""
        more = ", Held& held, const Held* before" if self.held else more
        phases = self.schedule.phases[:-1] if self.held else self.schedule.phases
        lines = [
            "template <bool tail>",
            "STQ_INLINE void tile(const Row& row, const Scalars& s, uint64_t step, int64_t first,",
            f"                     int blocks, int count{more}) {{",
            "  constexpr int size = tail ? 1 : stq::kTile;",
            *self._tail_buffers(),
            *self._crossing(*phases),
        ]
        if self.held:
            lines += ["  held.first = first;", "  held.blocks = blocks;"]
        for phase in phases:
            lines += self._phase(phase, gap=bool(self.held) and phase is phases[-1])
        lines += self._copy_back()
        return "\n".join([*lines, "}"])

    def _phase(self, phase: Phase, *, gap: bool = False) -> list[str]:
        """``gap``: the tile before is finished while ranges are waited for, and memory is asked for
        what the next tile reads."""
        place = "first + j * stride" if self.measures else "first + j"
        lines = [f"  {self._block(v)}{self._note(v)}" for v in phase.blocks]
        if gap:
            call = "finish<false>(row, s, step, *before, stq::kBlock)"
            lines.append(f"  if (before != nullptr) {call};")
        tables = [
            f"    {self._assign(v, self._expression(v))}{self._note(v)}" for v in phase.tables
        ]
        elements = self._prefetches() if gap else []
        elements += self._pointers(phase) + self._planes(phase)
        elements += [f"    {self._after(v)}{self._note(v)}" for v in phase.after]
        reductions = [v for v in phase.after if v.opcode in REDUCTIONS]
        for v in reductions:
            lines.append(f"  {LANES[v.type]} {c_name(v.name)}_tile[stq::kTile]{{}};")
        for body in (tables, elements):
            if body:
                lines.append("  for (int j = 0; j < blocks; ++j) {")
                lines.append(f"    const int64_t index = {place};")
                lines += [*body, "  }"]
        return lines + [f"  {self._block(v)}{self._note(v)}" for v in reductions]

    def _tail_buffers(self) -> list[str]:
        """The last, partial block of a tensor is computed in buffers padded with zeros."""
        lines = []
        for o in self.kernel.operands:
            if o.kind not in WHOLE:
                continue
            name, type_ = c_name(o.name), pointer(o).removesuffix("*")
            lines.append(f"  {type_} {name}_tail[tail ? stq::kBlock : 1] = {{}};")
            copy = f"std::memcpy({name}_tail, row.{name} + first * stq::kBlock, count * {o.bytes})"
            lines.append(f"  if constexpr (tail) {copy};")
        return lines

    def _crossing(self, *phases: Phase) -> list[str]:
        arrays, names = [], []
        inside = {id(v) for phase in phases for v in phase.body}
        for v in self.kernel.body:
            if id(v) not in inside:
                continue
            if v.space is Space.BLOCK or id(v) not in self.schedule.crossing or id(v) in self.held:
                continue
            name, heir = c_name(v.name), self.heirs.get(id(v))
            if heir is not None:
                names.append(f"  auto& {name} = {self._name(heir)};  // which begins as this ends")
                continue
            planes = "[stq::kPlanes]" if v.space is Space.ELEMENT else ""
            arrays.append(f"  {c_type(v)} {name}[size]{planes};")
        return arrays + names[::-1]  # an heir may be a name for its own heir, which comes first

    def _pointers(self, phase: Phase) -> list[str]:
        lines = []
        used = {v.operand for v in [*phase.planes, *phase.after]}
        for o in self.kernel.operands:
            name = c_name(o.name)
            if o.name not in used:
                continue
            if o.kind in WHOLE:
                place = f"row.{name} + index * stq::kBlock"
                lines.append(f"    {pointer(o)} {name} = tail ? {name}_tail : {place};")
            elif o.kind is OperandKind.CODES:
                lines.append(f"    uint8_t* {name} = row.{name} + index * {o.width * 16};")
                reads = [v for v in phase.planes if v.opcode == "unpack" and v.operand == o.name]
                if reads and id(reads[0]) not in self.exact:
                    nibbles = f"stq::nibbles<{o.width}>({name})"
                    lines.append(f"    const stq::Nibbles {name}_nibbles = {nibbles};")
            elif o.kind is OperandKind.KEY:
                key = f"stq::block_key(s.{name}, step, row.first_block + index)"
                lines.append(f"    stq::BlockKey {name} = {key};")
        return lines

    def _prefetches(self) -> list[str]:
        """The same block of the next tile; that there is none does no harm."""
        read = {v.operand for v in self.kernel.body if v.opcode == "load"}
        place = "(index + stq::kTile) * stq::kBlock"
        return [
            f"    if constexpr (!tail) stq::prefetch(row.{c_name(o.name)} + {place});"
            for o in self.kernel.operands
            if o.name in read and o.kind in WHOLE
        ]

    def _copy_back(self) -> list[str]:
        lines = []
        for o in self.kernel.operands:
            if o.kind in WHOLE and o.written:
                name = c_name(o.name)
                place = f"row.{name} + first * stq::kBlock"
                copy = f"std::memcpy({place}, {name}_tail, count * {o.bytes})"
                lines.append(f"  if constexpr (tail) {copy};")
        return lines

    def _assign(self, v: Value, expression: str) -> str:
        """Define a value where it lives: in the tile, in the planes of a block, or nowhere else."""
        if id(v) in self.schedule.crossing:
            planes = "[p]" if v.space is Space.ELEMENT else ""
            return f"{self._name(v)}[j]{planes} = {expression};"
        if id(v) in self.schedule.gathered:
            return f"{c_name(v.name)}[p] = {expression};"
        return f"const {c_type(v)} {c_name(v.name)} = {expression};"

    def _block(self, v: Value) -> str:
        """A value of every block of the tile, one lane each."""
        if v.opcode == "load_word":
            stride = "stride" if self.measures else "1"
            expression = f"stq::load_words(row.{c_name(v.operand)} + first, blocks, {stride})"
        elif v.opcode in REDUCTIONS:
            expression = f"stq::{REDUCED[v.opcode]}({c_name(v.name)}_tile)"
        elif v.opcode == "valid_count":
            expression = "stq::each(tail ? static_cast<float>(count) : 128.0f)"
        else:
            expression = self._expression(v)
        type_ = "" if id(v) in self.held else f"const {c_type(v)} "
        return f"{type_}{self._name(v)} = {expression};"

    def _name(self, v: Value) -> str:
        return f"held.{c_name(v.name)}" if id(v) in self.held else c_name(v.name)

    def _planes(self, phase: Phase) -> list[str]:
        if not phase.planes:
            return []
        lines = []
        for v in phase.planes:
            name = c_name(v.name)
            if v.opcode in REDUCTIONS:
                lines.append(f"    {LANES[v.type]} {name}_lanes{{}};")
            elif id(v) in self.schedule.gathered:
                lines.append(f"    {c_type(v)} {name}[stq::kPlanes];")
        # A measuring kernel is large and seldom runs: it is to be compiled soon.
        lines.append(f"#pragma GCC unroll {1 if self.measures else 8}")
        lines.append("    for (int p = 0; p < stq::kPlanes; ++p) {")
        lines += [f"      {self._plane(v)}{self._note(v)}" for v in phase.planes]
        return [*lines, "    }"]

    def _plane(self, v: Value) -> str:
        name, operand = c_name(v.name), c_name(v.operand)
        if v.opcode in REDUCTIONS:
            x = self._argument(v.args[0], Space.ELEMENT)
            return f"{name}_lanes = {PLANE_BY_PLANE[v.opcode].format(f'{name}_lanes', x)};"
        if v.opcode in ("store", "store_half", "store_byte"):
            kind = Type.FLOAT if v.opcode == "store" else Type.INT
            x = self._broadcast(v.args[0], kind)
            return f"stq::{v.opcode}({operand} + p * stq::kLanes, {x});"
        if v.opcode in ("load", "load_half", "load_byte"):
            expression = f"stq::{v.opcode}({operand} + p * stq::kLanes)"
        elif v.opcode == "unpack":
            exact = f"stq::unpack<{v.width}>({operand}, p)"
            expression = exact if id(v) in self.exact else f"stq::index({operand}_nibbles, p)"
        elif v.opcode in ("random24", "random"):
            expression = f"stq::{v.opcode}({operand})"  # planes come in order
        else:
            expression = self._expression(v)
        return self._assign(v, expression)

    def _after(self, v: Value) -> str:
        name, operand = c_name(v.name), c_name(v.operand)
        if v.opcode in REDUCTIONS:
            return f"{name}_tile[j] = {name}_lanes;"
        if v.opcode == "store_word":
            word = self._argument(v.args[0], Space.ELEMENT)
            return f"row.{operand}[index] = static_cast<uint16_t>({word});"
        if v.opcode == "accumulate":
            return f"totals[{v.slot}] += {self._argument(v.args[0], Space.ELEMENT)};"
        code = v.args[0]
        assert isinstance(code, Value)
        planes = self._name(code) + "[j]" * (id(code) in self.schedule.crossing)
        return f"stq::pack<{v.width}>({operand}, {planes});"

    def _expression(self, v: Value) -> str:
        """A pure operation in the block, table or element space."""
        types = OPCODES[v.opcode][0]
        template = TEMPLATES[v.opcode]
        lowest = min(v.space, Space.TABLE)
        wide = any(isinstance(a, Value) and a.space >= lowest for a in v.args)
        args = []
        for a, t in zip(v.args, types, strict=True):
            if t is Type.BOOL or template.startswith("stq::") or not wide:
                args.append(self._broadcast(a, t, v.space))
            else:
                args.append(self._argument(a, v.space, t))
        return template.format(*args)

    def _broadcast(self, a: Value | float, t: Type, space: Space = Space.ELEMENT) -> str:
        """``a`` in all lanes: of a plane, or of the blocks of a tile."""
        text = self._argument(a, space, t)
        if isinstance(a, Value) and a.space >= min(space, Space.TABLE):
            return text
        return f"stq::{'each' if space is Space.BLOCK else 'all'}({text})"

    def _argument(self, a: Value | float, space: Space, t: Type = Type.FLOAT) -> str:
        if not isinstance(a, Value):
            return float_literal(a) if t is Type.FLOAT else int_literal(a)
        name = self._name(a)
        if a.space is Space.TENSOR:
            return f"s.{name}"
        if a.opcode in INLINED:
            return INLINED[a.opcode]
        if a.space is Space.BLOCK:
            return name if space is Space.BLOCK else f"{name}[j]"
        if id(a) in self.schedule.crossing:
            name += "[j]"
        elif id(a) in self.schedule.gathered:
            return f"{name}[p]"
        return f"{name}[p]" if a.space is Space.ELEMENT and name.endswith("[j]") else name

"""Groups: the parts of a phase that share no element values, each a basic block of its own.

LLVM schedules a basic block as a whole, and ptxas too: with a tile in one block, the random numbers
of all planes and states are made at its beginning and kept in registers until they are needed (255
registers for AdamW). So the quantizer of each state is a group, and each group stands in a branch
that is always taken, on the argument ``borders`` (-1), and no two on the same condition: LLVM
would join them. Groups have its bits 0 to 7, stores of packed bytes 8 to 15, and planes that are
split 16 to 23; groups beyond the eighth are on what it is not equal to.

What a group hands on are results of its branch, and not simply variables from an outer scope.
Triton's coalescing pass looks, for every access, at everything that is connected with it, and
results of a branch are where that search ends: without them it took half of the compilation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stq_compile.codegen.ir import REDUCTIONS, Space, Value
from stq_compile.codegen.schedule import Phase, Schedule


@dataclass
class Group:
    """Operations of one basic block: once per block, once per plane, and once per block again."""

    title: str
    uniform: list[Value] = field(default_factory=list)
    planes: list[Value] = field(default_factory=list)
    after: list[Value] = field(default_factory=list)
    leaving: list[Value] = field(default_factory=list)
    """What later groups use of it."""

    split: bool = False
    """Whether each plane is a basic block of its own too."""

    @property
    def body(self) -> list[Value]:
        return [*self.uniform, *self.planes, *self.after]


def border(number: int) -> str:
    """The condition of a group, always true; each group's is its own."""
    return f"(borders & {1 << number}) != 0" if number < 8 else f"borders != {number}"


def groups(schedule: Schedule) -> list[Group]:
    """All groups in execution order."""
    found: list[Group] = []
    for number, phase in enumerate(schedule.phases, 1):
        parts = _split(phase)
        _place(phase.blocks + phase.tables, parts, schedule.users)
        for i, part in enumerate(parts):
            part.title = f"Phase {number}" + (f", part {i + 1}." if len(parts) > 1 else ".")
        found += parts
    for i, group in enumerate(found):
        used = {id(a) for later in found[i + 1 :] for v in later.body for a in v.args}
        group.leaving = [v for v in group.body if id(v) in used]
    return found


def _place(uniform: list[Value], parts: list[Group], users: dict[int, list[Value]]) -> None:
    """Operations for a whole phase go to the first of its groups that needs them."""
    number = {id(v): i for i, part in enumerate(parts) for v in part.planes + part.after}
    for v in reversed(uniform):
        needed = [number[id(u)] for u in users[id(v)] if id(u) in number]
        number[id(v)] = min(needed, default=len(parts) - 1)
        parts[number[id(v)]].uniform.insert(0, v)


def _split(phase: Phase) -> list[Group]:
    """Union of what is connected by element values that are made in this phase."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    # `valid` is a comparison that every loop makes anew; it connects nothing.
    planes = [v for v in phase.planes if v.opcode != "valid"]
    for v in planes:
        parent[id(v)] = id(v)
        for a in v.args:
            if isinstance(a, Value) and id(a) in parent and a.space is Space.ELEMENT:
                parent[root(id(v))] = root(id(a))
    parts: dict[int, Group] = {}
    for v in planes:
        part = parts.setdefault(root(id(v)), Group(""))
        if v.opcode not in REDUCTIONS:
            part.planes.append(v)
    if not parts:
        return [Group("", after=list(phase.after))]
    first = next(iter(parts))
    for v in phase.after:
        anchor = id(v) if v.opcode in REDUCTIONS else id(v.args[0])
        parts[root(anchor) if anchor in parent else first].after.append(v)
    return [half for part in parts.values() for half in _cut(part)]


def _cut(group: Group) -> list[Group]:
    """What is made of a code that the group packs, as a group behind it: the code is stored first.

    So the second moment's bytes have left when the first is brought to its units. In front each
    plane is a basic block of its own: ptxas makes them all at once where their codes live on.
    """
    packed = {id(v.args[0]) for v in group.after if v.opcode == "pack"}
    made = set[int]()
    for v in group.planes:
        if any(id(a) in packed or id(a) in made for a in v.args):
            made.add(id(v))
    if not made:
        return [group]
    behind = [v for v in group.after if any(id(a) in made for a in v.args)]
    return [
        Group(
            "",
            planes=[v for v in group.planes if id(v) not in made],
            after=[v for v in group.after if v not in behind],
            split=True,
        ),
        Group("", planes=[v for v in group.planes if id(v) in made], after=behind),
    ]

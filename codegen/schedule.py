"""Phases of a kernel: a reduction over the elements of a block ends a loop over its planes.

On a CPU a phase runs for all blocks of a *tile* before the next one starts. Within one block the
phases are a chain of latencies (reduce, scale, reciprocal, encode); with 4 blocks in a row the
processor works on several chains at once. Every operation runs in the first phase in which its
arguments are there, or later if that keeps fewer values alive. A value that is used in a later
phase than its own *crosses* and is kept per block of the tile; an element value that is packed at
the end of its own phase is *gathered*, one register per plane.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from stq_compile.codegen.ir import OPCODES, REDUCTIONS, Kernel, Space, Type, Value


@dataclass
class Phase:
    """Operations between two reductions."""

    blocks: list[Value] = field(default_factory=list)  # for all blocks of a tile: scales, ranges
    tables: list[Value] = field(default_factory=list)  # once per block
    planes: list[Value] = field(default_factory=list)  # once per plane
    after: list[Value] = field(default_factory=list)  # reductions' results, packing, scale words

    @property
    def body(self) -> list[Value]:
        return [*self.blocks, *self.tables, *self.planes, *self.after]


INLINE = ("iota", "valid")
"""Reads that are a constant in most kernels: written out wherever they are used."""

MADE_ANYWHERE = ("random24", "random", "valid", "valid_count", "iota")
"""Reads that touch no memory."""


def _movable(v: Value) -> bool:
    """Whether an operation may run at any time. Flags of a block are made as early as can be: with
    them Triton finds the layout of what they decide on (design/0009)."""
    pure = v.opcode in OPCODES or v.opcode in MADE_ANYWHERE
    early = v.space is Space.TENSOR or (v.space is Space.BLOCK and v.type is Type.BOOL)
    return pure and not early


class Schedule:
    """The phases of a kernel, and the values (by ``id``) that cross them or are gathered."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._phase: dict[int, int] = {}
        for v in kernel.body:
            reached = [self._phase[id(a)] for a in v.args if isinstance(a, Value)]
            self._phase[id(v)] = max(reached, default=0) + (v.opcode in REDUCTIONS)
        self._sink()
        self.crossing: set[int] = set()
        self.gathered: set[int] = set()
        self._classify()
        self.phases = self._phases()

    def loop(self, v: Value) -> int:
        """The phase in which an operation runs; a reduction's result counts for the next one."""
        return self._phase[id(v)] - (v.opcode in REDUCTIONS)

    def last(self, v: Value) -> int:
        """The last phase that uses a value."""
        return max(self.loop(u) for u in self.users[id(v)])

    def heirs(self, kept: Container[int]) -> dict[int, Value]:
        """Arrays of elements that end in the loop in which another one begins, by ``id``, with the
        one that takes their place: what a tile keeps is to fit the first-level cache beside what
        streams through it. Those in ``kept`` live on, and may be heirs themselves.

        In that loop nothing is read of the old one after the new one is written.
        """
        crosses = self.crossing
        arrays = [v for v in self.kernel.body if v.space is Space.ELEMENT and id(v) in crosses]
        heirs: dict[int, Value] = {}
        for number, phase in enumerate(self.phases):
            place = {id(v): k for k, v in enumerate(phase.planes)}
            begin = [v for v in arrays if id(v) in place]
            for v in arrays:
                if id(v) in place or id(v) in kept or self.last(v) != number:
                    continue
                uses = (u for u in self.users[id(v)] if self.loop(u) == number)
                # Packing comes after all planes.
                read = max(place.get(id(u), len(place)) for u in uses)
                for heir in begin:
                    if v.type is heir.type and read <= place[id(heir)]:
                        heirs[id(v)] = heir
                        begin.remove(heir)
                        break
        return heirs

    def _sink(self) -> None:
        """Move operations to the phase that needs them, where that makes no more values cross.

        A value that would cross is made later, with everything that leads to it alone, if what
        that needs crosses anyway (random numbers need nothing); a single operation also if one
        other value crosses instead.
        """
        self.users: dict[int, list[Value]] = {id(v): [] for v in self.kernel.body}
        for v in self.kernel.body:
            for a in v.args:
                if isinstance(a, Value):
                    self.users[id(a)].append(v)
        for v in reversed(self.kernel.body):
            if _movable(v) and self.users[id(v)]:
                target = self._needed(v)
                if target > self.loop(v):
                    self._sink_cone(v, target)

    def _needed(self, v: Value) -> int:
        return min(self.loop(u) for u in self.users[id(v)])

    def _sink_cone(self, v: Value, target: int) -> None:
        """Move ``v`` and what leads to it alone to phase ``target``, if that pays."""
        cone, border, stack = {id(v): v}, dict[int, Value](), [v]
        while stack:
            for a in stack.pop().args:
                if not isinstance(a, Value) or a.space < v.space or id(a) in cone:
                    continue
                users = self.users[id(a)]
                if _movable(a) and all(id(u) in cone or self.loop(u) >= target for u in users):
                    cone[id(a)] = a
                    stack.append(a)
                else:
                    border[id(a)] = a
        crossing = [
            a
            for a in border.values()
            if a.opcode not in INLINE
            and id(a) not in cone
            and all(self.loop(u) <= self.loop(a) or id(u) in cone for u in self.users[id(a)])
        ]
        if len(crossing) < (2 if len(cone) == 1 else 1):
            for u in cone.values():
                self._phase[id(u)] = target

    def _classify(self) -> None:
        for v in self.kernel.body:
            for a in v.args:
                if not isinstance(a, Value) or a.space is Space.TENSOR or a.opcode in INLINE:
                    continue
                table = a.space is Space.TABLE and v.space is not Space.TABLE
                if self.loop(v) > self.loop(a) or table:
                    self.crossing.add(id(a))
                elif v.opcode == "pack":
                    self.gathered.add(id(a))
        self.gathered -= self.crossing

    def _phases(self) -> list[Phase]:
        phases = [Phase() for _ in range(max(self._phase.values(), default=0) + 1)]
        for v in self.kernel.body:
            phase = phases[self.loop(v)]
            if v.opcode in REDUCTIONS:
                phase.planes.append(v)
                phase.after.append(v)
            elif v.opcode in ("pack", "store_word", "accumulate"):
                phase.after.append(v)
            elif v.opcode in INLINE:
                continue
            elif v.space is Space.ELEMENT:
                phase.planes.append(v)
            elif v.space in (Space.BLOCK, Space.TABLE):
                (phase.blocks if v.space is Space.BLOCK else phase.tables).append(v)
        return phases

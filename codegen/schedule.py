"""Phases of a kernel: a reduction over the elements of a block ends a loop over its planes.

On a CPU a phase runs for all blocks of a *tile* before the next one starts. Within one block the
phases are a chain of latencies (reduce, scale, reciprocal, encode); with 8 blocks in a row the
processor works on several chains at once. Every operation runs in the first phase in which its
arguments are there, or later if that keeps fewer values alive. A value that is used in a later
phase than its own *crosses* and is kept per block of the tile; an element value that is packed at
the end of its own phase is *gathered*, one register per plane.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stq_compile.codegen.ir import OPCODES, REDUCTIONS, Kernel, Space, Value


@dataclass
class Phase:
    """Operations between two reductions."""

    uniform: list[Value] = field(default_factory=list)  # once per block: scales, tables
    planes: list[Value] = field(default_factory=list)  # once per plane
    after: list[Value] = field(default_factory=list)  # reductions' results, packing, scale words


MADE_ANYWHERE = ("random24", "random", "valid", "valid_count", "iota")
"""Reads that touch no memory."""


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

    def _loop(self, v: Value) -> int:
        """The phase in which an operation runs; a reduction's result counts for the next one."""
        return self._phase[id(v)] - (v.opcode in REDUCTIONS)

    def _sink(self) -> None:
        """Move an operation of at most one argument per block to the phase that needs it.

        That never adds a value that crosses phases, and most often removes one: random numbers
        are made where they are used, not kept.
        """
        needed: dict[int, int] = {}
        for v in reversed(self.kernel.body):
            inputs = [a for a in v.args if isinstance(a, Value) and a.space is not Space.TENSOR]
            elements = [a for a in inputs if a.space is Space.ELEMENT]
            pure = v.opcode in OPCODES or v.opcode in MADE_ANYWHERE
            few = len(elements) <= 1 if v.space is Space.ELEMENT else len(inputs) <= 1
            if v.space is not Space.TENSOR and pure and few and id(v) in needed:
                self._phase[id(v)] = max(self._phase[id(v)], needed[id(v)])
            for a in v.args:
                if isinstance(a, Value):
                    needed[id(a)] = min(needed.get(id(a), self._loop(v)), self._loop(v))

    def _classify(self) -> None:
        for v in self.kernel.body:
            for a in v.args:
                if not isinstance(a, Value) or a.space is Space.TENSOR or a.opcode == "iota":
                    continue
                if self._loop(v) > self._loop(a):
                    self.crossing.add(id(a))
                elif v.opcode == "pack":
                    self.gathered.add(id(a))
        self.gathered -= self.crossing

    def _phases(self) -> list[Phase]:
        phases = [Phase() for _ in range(max(self._phase.values(), default=0) + 1)]
        for v in self.kernel.body:
            phase = phases[self._loop(v)]
            if v.opcode in REDUCTIONS:
                phase.planes.append(v)
                phase.after.append(v)
            elif v.opcode in ("pack", "store_word", "accumulate"):
                phase.after.append(v)
            elif v.space is Space.ELEMENT:
                phase.planes.append(v)
            elif v.space in (Space.BLOCK, Space.TABLE):
                phase.uniform.append(v)
        return phases

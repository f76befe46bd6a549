"""Phases of a CPU kernel: a reduction over the elements of a block ends a loop over its planes.

Every operation runs in the first phase in which its arguments are there, or later if that keeps
fewer values alive. An element value that is used in a later phase than its own is *kept*: it lives
in an array of one register per plane.
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


class Schedule:
    """The phases of a kernel, and the values kept across them (by ``id``)."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._phase: dict[int, int] = {}
        for v in kernel.body:
            reached = [self._phase[id(a)] for a in v.args if isinstance(a, Value)]
            self._phase[id(v)] = max(reached, default=0) + (v.opcode in REDUCTIONS)
        self._sink()
        self.kept = self._crossing()
        self.phases = self._phases()

    def _loop(self, v: Value) -> int:
        """The phase in whose plane loop a value's arguments are used."""
        return self._phase[id(v)] - (v.opcode in REDUCTIONS)

    def _sink(self) -> None:
        """Move an element operation of at most one element argument to the phase that needs it.

        That never adds a value that crosses phases, and most often removes one: random numbers
        are made where they are used, not kept.
        """
        needed: dict[int, int] = {}
        for v in reversed(self.kernel.body):
            elements = [a for a in v.args if isinstance(a, Value) and a.space is Space.ELEMENT]
            pure = v.opcode in OPCODES or v.opcode in ("uniform", "random", "valid")
            if v.space is Space.ELEMENT and pure and len(elements) <= 1 and id(v) in needed:
                self._phase[id(v)] = max(self._phase[id(v)], needed[id(v)])
            for a in v.args:
                if isinstance(a, Value):
                    needed[id(a)] = min(needed.get(id(a), self._loop(v)), self._loop(v))

    def _crossing(self) -> set[int]:
        kept: set[int] = set()
        for v in self.kernel.body:
            for a in v.args:
                if not isinstance(a, Value) or a.space is not Space.ELEMENT:
                    continue
                if v.opcode == "pack" or self._loop(v) > self._phase[id(a)]:
                    kept.add(id(a))
        return kept

    def _phases(self) -> list[Phase]:
        phases = [Phase() for _ in range(max(self._phase.values(), default=0) + 1)]
        for v in self.kernel.body:
            phase = phases[self._loop(v)]
            if v.opcode in REDUCTIONS:
                phase.planes.append(v)
                phase.after.append(v)
            elif v.opcode in ("pack", "store_word"):
                phase.after.append(v)
            elif v.space is Space.ELEMENT:
                phase.planes.append(v)
            elif v.space in (Space.BLOCK, Space.TABLE):
                phase.uniform.append(v)
        return phases

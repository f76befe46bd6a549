"""Widths over time: for every state of every parameter, its width after each step of note."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stq_compile.planner.history import Change
from stq_compile.reporting.run_file import Row, Run


@dataclass(frozen=True)
class Transition:
    """A change of width, and the step after which it was in force."""

    step: int
    change: Change


@dataclass(frozen=True)
class Cell:
    """The width of one state from one step of note to the next, and what changed there."""

    width: int
    transitions: tuple[Transition, ...] = ()


@dataclass(frozen=True)
class Lane:
    """One state of one parameter over the whole run."""

    param: str
    state: str
    elements: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Timeline:
    """Lanes over ``steps``: a cell holds what was in force from its step on."""

    steps: tuple[int, ...]
    lanes: tuple[Lane, ...]

    @cached_property
    def states(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(lane.state for lane in self.lanes))

    def of(self, state: str) -> tuple[Lane, ...]:
        return tuple(lane for lane in self.lanes if lane.state == state)


def timeline_of(run: Run, columns: int = 100) -> Timeline:
    """Lanes of all states that were ever packed or given a width; counters have none.

    Columns begin at steps where a width changed. If there are more than ``columns``, neighbours
    are merged: a cell then shows the last width, and all transitions.
    """
    changes: dict[tuple[str, str], list[Transition]] = defaultdict(list)
    for record in run.decisions:
        for change in record.changes:
            changes[change.param, change.state].append(Transition(record.step, change))
    steps = sorted({0, *(t.step for found in changes.values() for t in found)})
    steps = _thinned(steps, columns)
    lanes = [
        _lane(row, changes.get((row.param, row.state), []), steps)
        for row in run.rows
        if row.shape and (row.width < 32 or (row.param, row.state) in changes)
    ]
    return Timeline(tuple(steps), tuple(lanes))


def _thinned(steps: Sequence[int], columns: int) -> list[int]:
    if len(steps) <= columns:
        return list(steps)
    return [steps[i * len(steps) // columns] for i in range(columns)]


def _lane(row: Row, transitions: Sequence[Transition], steps: Sequence[int]) -> Lane:
    """The width before the first change that is known is the one that it changed from."""
    width = row.width
    if transitions:
        width = transitions[0].change.before or transitions[0].change.after
    elements = row.fp32_bytes // 4
    cells = []
    for i, step in enumerate(steps):
        end = steps[i + 1] if i + 1 < len(steps) else float("inf")
        here = tuple(t for t in transitions if step <= t.step < end)
        if here:
            width = here[-1].change.after
        cells.append(Cell(width, here))
    return Lane(row.param, row.state, elements, tuple(cells))


def layer_of(param: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, or its module.

    ``h.3.attn.c_attn.weight`` is of ``h.3``, ``wte.weight`` of ``wte``.
    """
    numbered = re.match(r"(?:\w+\.)*?\d+(?=\.|$)", param)
    if numbered and numbered[0] != param:
        return numbered[0]
    return param.rpartition(".")[0] or param


@dataclass(frozen=True)
class Layer:
    """Lanes of one block, averaged: bits per element over time."""

    name: str
    bits: tuple[float, ...]


def layers_of(lanes: Sequence[Lane]) -> list[Layer]:
    """Mean widths by layer, weighted by elements, in the order of the parameters."""
    grouped: dict[str, list[Lane]] = defaultdict(list)
    for lane in lanes:
        grouped[layer_of(lane.param)].append(lane)
    found = []
    for name, members in grouped.items():
        elements = sum(lane.elements for lane in members)
        columns = zip(*(lane.cells for lane in members), strict=True)
        sums = [
            sum(c.width * m.elements for c, m in zip(column, members, strict=True))
            for column in columns
        ]
        found.append(Layer(name, tuple(total / elements for total in sums)))
    return found

"""One set of facts for a state that several graphs of an optimizer use.

A step that branches is captured as several graphs, which take turns:

    if step % 10 == 0:                   graph A proves v >= 0; graph B only reads v, and proves
        v.mul_(b).addcmul_(g, g)         nothing of it. Apart they would keep it in two formats.
    p.sub_(m / v.sqrt())

A state is non-negative if every graph that writes it proves so, or if it is now and none writes it;
it is kept in units of another if every graph that uses it says so. What is fragile, a copy of
the weights, or mixed by products, in one graph is so in all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stq_compile.passes.normalizers import find_normalizers
from stq_compile.step_graph import Facts, Program, Role, StepGraph

Place = tuple[int, str]
"""A unit by its number, and the key of a state in it."""
State = tuple[int, str]
"""The number of a parameter, and the key of a state of it."""


def agree(programs: Sequence[Program], is_nonnegative: Callable[[State], bool]) -> list[Program]:
    """The same programs, with facts on which they agree; unchanged ones are the same objects.

    ``is_nonnegative``: of the present values of a state that no graph writes.
    """
    units = _signed(programs, is_nonnegative)
    users, _ = _uses(units)
    places = {place for found in users.values() for place in found}
    normalizers = _common(
        {(i, key): units[i].facts.normalizers.get(key) for i, key in places},
        users,
        lambda found: next(iter(set(found))) if len(set(found)) == 1 else None,
    )
    fragile = _common({(i, k): units[i].facts.fragile.get(k, "") for i, k in places}, users, max)
    copies = _common({(i, k): k in units[i].facts.copies for i, k in places}, users, any)
    mixed = _common({(i, k): k in units[i].facts.mixed for i, k in places}, users, any)
    agreed = []
    for i, unit in enumerate(units):
        keys = [key for j, key in places if i == j]
        rest = {k: n for k, n in unit.facts.normalizers.items() if k not in keys}
        found = {k: normalizers[i, k] for k in keys if normalizers[i, k] is not None}
        facts = replace(
            unit.facts,
            normalizers=rest | found,
            fragile=dict(unit.facts.fragile) | {k: fragile[i, k] for k in keys if fragile[i, k]},
            copies=_decided(unit.facts.copies, {k: copies[i, k] for k in keys}),
            mixed=_decided(unit.facts.mixed, {k: mixed[i, k] for k in keys}),
        )
        agreed.append(unit if _same(facts, unit.facts) else unit.replace(facts=facts))
    return [_with_units(program, agreed) for program in programs]


def _signed(
    programs: Sequence[Program], is_nonnegative: Callable[[State], bool]
) -> list[StepGraph]:
    """All units, with the signs that they agree on, and what these prove of normalizers."""
    units = [unit for program in programs for unit in program.units]
    users, writers = _uses(units)
    states: dict[Place, list[State]] = defaultdict(list)
    for state, places in users.items():
        for place in places:
            states[place].append(state)

    def sign(place: Place) -> bool:
        """What a unit proves; one that does not write leaves it to others, and to the values."""
        i, key = place
        if key in units[i].facts.nonnegative or place in writers:
            return key in units[i].facts.nonnegative
        return all(users[s] & writers or is_nonnegative(s) for s in states[place])

    signs = _common({place: sign(place) for place in states}, users, all)
    signed = []
    for i, unit in enumerate(units):
        keys = [key for j, key in states if i == j]
        nonnegative = _decided(unit.facts.nonnegative, {k: signs[i, k] for k in keys})
        if nonnegative != unit.facts.nonnegative:
            unit = unit.replace(facts=replace(unit.facts, nonnegative=nonnegative))
            (unit,) = find_normalizers(Program("", (unit,))).units
        signed.append(unit)
    return signed


def _with_units(program: Program, agreed: list[StepGraph]) -> Program:
    """Takes as many of the units as the program has."""
    units = tuple(agreed[: len(program.units)])
    del agreed[: len(program.units)]
    same = all(a is b for a, b in zip(units, program.units, strict=True))
    return program if same else Program(program.optimizer, units)


def _uses(units: Sequence[StepGraph]) -> tuple[dict[State, set[Place]], set[Place]]:
    """The units that have a state among their inputs, and the places where they write it."""
    users: dict[State, set[Place]] = defaultdict(set)
    writers: set[Place] = set()
    for i, unit in enumerate(units):
        for part, operand in unit.rows():  # those of the rest of a cut region as well
            if operand.role is Role.STATE and operand.shape != () and operand.returned < 0:
                key = operand.source.key
                users[operand.source.param, key].add((i, key))
                if operand.name in (part.writes or ()):
                    writers.add((i, key))
    return users, writers


def _common(
    facts: dict[Place, Any], users: dict[State, set[Place]], join: Callable[[list[Any]], Any]
) -> dict[Place, Any]:
    """Join the facts of all units that use a state, until nothing changes.

    A unit has one fact for all its parameters' states of one key, so that a disagreement over one
    parameter reaches the others.
    """
    while True:
        before = dict(facts)
        for places in users.values():
            value = join([facts[p] for p in places])
            for place in places:
                facts[place] = value
        if facts == before:
            return facts


def _decided(known: frozenset[str], holds: Mapping[str, bool]) -> frozenset[str]:
    """What was known, but for keys of which something else was found."""
    return frozenset((known - holds.keys()) | {key for key in holds if holds[key]})


def _same(a: Facts, b: Facts) -> bool:
    return (a.nonnegative, dict(a.normalizers), dict(a.fragile), a.copies, a.mixed) == (
        b.nonnegative, dict(b.normalizers), dict(b.fragile), b.copies, b.mixed,
    )  # fmt: skip

"""Which states of a template a planner chooses widths for, and between which widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stq_compile.formats import FLOAT32, Format
from stq_compile.options import Options
from stq_compile.passes.measure import forgotten, formats_of, measured_states, sustained
from stq_compile.planner.planner import Managed
from stq_compile.planner.prior import prior_errors
from stq_compile.step_graph import StepGraph

FEW_LEVELS: Mapping[str, Mapping[int, float]] = {
    "adaptive_log": {2: 2.5, 3: 1.5},
    "softsign": {2: 6.0, 3: 4.0},
}
"""What the error of a state counts for by its kind and width, in units of what the law says of it;
1 where there is none. Fitted to training (`design/0008`): levels that are octaves apart leave more
than the law says, and training pays for it at 2 bits; levels in units of the largest element of a
block leave noise where there is hardly a gradient, so that a GPT under SGD with 3 bits of momentum
falls far behind."""


def managed_states(unit: StepGraph, options: Options) -> Iterator[Managed]:
    """The states of a template that can be measured and that no option pins, one by one."""
    if unit.instances[0].param.name not in (unit.writes or ()):
        return
    for state in measured_states(unit):
        key = state.source.key
        formats = _candidates(unit, key, options)
        prior = prior_errors(unit, key)
        few = {width: FEW_LEVELS.get(format.kind, {}) for width, format in formats.items()}
        weights = {width: said[width] for width, said in few.items() if width in said}
        recurrence = unit.facts.recurrences.get(key)
        varies = recurrence is not None and bool(recurrence.scalars)
        forgetting = 0.0 if varies else forgotten(recurrence, {})  # each look gives what varies
        for instance in unit.instances:
            source, numel = instance.param.source, instance.param.numel
            pinned = options.width_of(source.name, key) is not None
            if pinned or numel < options.min_numel or options.excludes(source.name):
                continue
            nbytes = {width: format.nbytes(numel) for width, format in formats.items()}
            yield Managed(
                (source.param, key), source.name, key, numel, nbytes, prior, forgetting, weights
            )


def _candidates(unit: StepGraph, key: str, options: Options) -> dict[int, Format]:
    """The formats that the planner may choose for a state: those on the ladder that last.

    What another state is stored in units of stays packed: in float32 it would be a unit no longer,
    and the other one's format, and with it all that was measured, another one.
    """
    formats = {**formats_of(unit, key), FLOAT32.width: FLOAT32}
    on_ladder = {w: f for w, f in formats.items() if w in options.ladder}
    if key in unit.facts.normalizers.values() and len(on_ladder) > 1:
        on_ladder.pop(FLOAT32.width, None)
    lasting = {w: f for w, f in on_ladder.items() if sustained(unit, key, f)}
    return lasting or {max(on_ladder): on_ladder[max(on_ladder)]}

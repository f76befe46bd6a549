"""Widths before anything was measured: errors that states have under gradients of white noise.

The numbers were read off `passes.measure` for AdamW (betas 0.9, 0.99), SGD with momentum and Lion
after 300 steps on standard normal gradients; `tests/planner/test_prior.py` measures them again.
What decides is the kind of state, from the graph alone. They are doubled: the first steps of a
training run are not stationary.
"""

from __future__ import annotations

from stq_compile.passes.measure import is_smooth
from stq_compile.step_graph import StepGraph

CAUTION = 2.0

AVERAGE = {2: 3.4, 3: 0.38, 4: 0.070, 5: 0.018, 6: 0.0045, 8: 2.7e-4, 16: 2e-5}
"""A signed state in units of its own block."""
NORMALIZED = {**AVERAGE, 2: 0.45, 3: 0.23}
"""A signed state in units of the root of another one."""
SECOND_MOMENT = {2: 0.090, 3: 0.031, 4: 0.011, 5: 3.5e-3, 6: 1.1e-3, 8: 1.1e-4, 16: 5e-5}
"""A non-negative state."""
ROUGH = {2: 2.0, 3: 1.3, 4: 0.60, 5: 0.30, 6: 0.15, 8: 0.036, 16: 4e-3}
"""A state whose sign, or a comparison of it, makes the update."""


def prior_errors(unit: StepGraph, key: str) -> dict[int, float]:
    """Error by width of state ``key``, before it was ever looked at."""
    name = next(o.name for o in unit.operands if o.source.key == key)
    if not is_smooth(unit, name):
        table = ROUGH
    elif key in unit.facts.nonnegative:
        table = SECOND_MOMENT
    elif key in unit.facts.normalizers:
        table = NORMALIZED
    else:
        table = AVERAGE
    return {width: CAUTION * error for width, error in table.items()}

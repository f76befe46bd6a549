"""Widths before anything was measured: errors that states have under gradients of white noise.

The numbers were read off `passes.measure` for AdamW (betas 0.9, 0.99), SGD with momentum and Lion
after 300 steps on standard normal gradients; `tests/planner/test_prior.py` measures them again.
What decides is the kind of state, from the graph alone. For second moments the elements of a block
differ in size, with a standard deviation of 0.7 octaves in the gradient, as they do in a GPT. The
numbers are raised by a fifth: the first steps of a training run are not stationary.
"""

from __future__ import annotations

from stq_compile.passes.measure import is_smooth
from stq_compile.step_graph import StepGraph

CAUTION = 1.2

AVERAGE = {2: 0.70, 3: 0.30, 4: 0.055, 5: 0.011, 6: 0.0027, 8: 1.6e-4, 16: 1.2e-5}
"""A signed state in units of its own block."""
NORMALIZED = {**AVERAGE, 2: 0.45, 3: 0.25}
"""A signed state in units of the root of another one."""
SECOND_MOMENT = {2: 0.25, 3: 0.065, 4: 0.022, 5: 9.5e-3, 6: 3.4e-3, 8: 4.9e-4, 16: 3.3e-5}
"""A non-negative state."""
ROUGH = {2: 2.0, 3: 0.92, 4: 0.55, 5: 0.27, 6: 0.11, 8: 0.026, 16: 3e-3}
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

"""Which parameters a look measures directly, at which widths, on how many blocks.

All of them while the planner calibrates. Later predictions are only compared with measurements: of
some parameters in turn, at the widths in force, on a few blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stq_compile.planner.direct import BLOCKS, FEW_BLOCKS, WIDTHS, Live, Sums, measure_directly
from stq_compile.planner.planner import Planner
from stq_compile.step_graph import Program, StepGraph

COMPARED_AT_ONCE = 16
"""About how many parameters a look measures after the calibration."""


def measure_in_turn(
    program: Program, planner: Planner, live: Live, params: int, seed: int, rounding: str
) -> Sums:
    """`planner.direct.measure_directly` of those whose turn it is at the planner's next look.

    Args:
        program: the templates as the planner sees them.
        planner: that looks.
        live: the object behind an operand.
        params: how many parameters the optimizer has.
        seed: of the rounding noise.
        rounding: ``"stochastic"`` or ``"nearest"``.
    """
    widths = [w for w in WIDTHS if planner.calibrating or w in planner.widths.values()]
    blocks = BLOCKS if planner.calibrating else FEW_BLOCKS
    found: Sums = {}
    with one_thread():  # samples are too small for a second one to gain anything
        for unit in _whose_turn(program, planner, params):
            look = planner.looks + 1
            found |= measure_directly(unit, live, look, seed, rounding, widths, blocks)
    return found


def _whose_turn(program: Program, planner: Planner, params: int) -> Iterator[StepGraph]:
    """The templates, with the parameters whose turn it is."""
    share = 1 if planner.calibrating else params // COMPARED_AT_ONCE or 1
    for unit in program.units:
        turn = [i for i in unit.instances if i.param.source.param % share == planner.looks % share]
        if turn and not unit.unfused:
            yield unit.replace(instances=tuple(turn))


_ONE_THREAD = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread. That is a setting of the whole process, and what two threads
    set and put back crosswise would stay set: they take turns."""
    with _ONE_THREAD:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)

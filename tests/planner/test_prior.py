"""The tables of the prior, measured again: gradients of white noise for 300 steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphs import only, program, random_inputs, with_sizes
from stq_compile.formats import Format
from stq_compile.passes.measure import formats_of, measure, slots_of
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.planner.prior import (
    AVERAGE,
    NORMALIZED,
    ROUGH,
    SECOND_MOMENT,
)
from stq_compile.reference import decode, encode
from stq_compile.rounding import Noise, step_key
from stq_compile.step_graph import StepGraph
from zoo import adam, lion, sgd

NUMEL = 128 * 24
STEPS = 300
SPREAD = 0.7
CASES = {
    "adam exp_avg": (adam, "exp_avg", NORMALIZED),
    "adam exp_avg_sq": (adam, "exp_avg_sq", SECOND_MOMENT),
    "sgd": (sgd, "momentum_buffer", AVERAGE),
    "lion": (lion, "exp_avg", ROUGH),
}


def analysed(unit: StepGraph) -> StepGraph:
    for node in unit.placeholders:
        if node.meta["example"].dim():
            node.meta["example"] = torch.empty(NUMEL, device="meta")
    sized = with_sizes(unit, [NUMEL])
    return only(find_recurrences(find_normalizers(find_ranges(program(sized)))))


def measured(unit: StepGraph, key: str, width: int, spread: float) -> float:
    """Relative error of ``key`` at ``width``, stored at it all the while."""
    graph = only(measure(program(unit), "stochastic"))
    format = formats_of(unit, key)[width]
    name = next(o.name for o in unit.operands if o.source.key == key)
    values = {k: torch.zeros_like(v) for k, v in random_inputs(unit).items()}
    generator = torch.Generator().manual_seed(4)
    sums: list[float] = []
    octaves = torch.randn(NUMEL, generator=generator) * spread
    size = torch.exp2(octaves)
    for step in range(STEPS):
        values["grad_0"] = torch.randn(NUMEL, generator=generator) * size
        row = [values.get(n.name, n.meta["example"]) for n in unit.placeholders]
        if step == STEPS - 1:
            sums = graph.run(*row, torch.empty(0))[0].tolist()
        new = dict(zip(unit.writes or (), unit.run(*row), strict=True))
        values |= new
        values[name] = stored(new[name], format, unit, key, new, step)
    found = dict(zip(slots_of(graph), sums, strict=True))
    return found[f"{key}:error_{width}"] / found["update"]


def stored(
    x: Tensor, format: Format, unit: StepGraph, key: str, new: dict[str, Tensor], step: int
) -> Tensor:
    v = new.get(f"{unit.facts.normalizers.get(key)}_0") if format.normalized else None
    return decode(*encode(x, format, Noise(step_key(1, step, 2)), v), format, x.numel(), v)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8, 16])
@pytest.mark.parametrize("case", CASES)
def test_the_tables(case: str, width: int) -> None:
    make, key, table = CASES[case]
    found = measured(analysed(make()), key, width, spread=SPREAD * (table is SECOND_MOMENT))
    # Hardly any sign flips at 16 bits: a count of few.
    low, high = (0.3, 3.0) if case == "lion" and width == 16 else (0.65, 1.5)
    assert low < found / table[width] < high

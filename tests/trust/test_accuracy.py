"""What is shown of the planner's predictions is what was recorded of them."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import stq_compile as stq
from models import backward, make_model
from stq_compile.backend import session_of
from stq_compile.planner.history import Comparison
from stq_compile.reporting import run_file
from stq_compile.reporting.accuracy import accuracy_of, scatter
from stq_compile.reporting.page import render
from stq_compile.reporting.run_file import Run
from stq_compile.reporting.terminal import RunView

STEPS, INTERVAL = 20, 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A planned run as it was saved, and as it was streamed."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.named_parameters(), lr=0.01),
        min_numel=64,
        interval=INTERVAL,
        record=str(folder / "stream.jsonl"),
    )
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    assert session.planner is not None
    stq.report(optimizer).save(folder / "saved.jsonl")
    found = run_file.read(folder / "saved.jsonl")
    assert found.comparisons == tuple(session.planner.comparisons)
    return found, run_file.read(folder / "stream.jsonl")


def test_every_decision_has_its_comparisons(runs: tuple[Run, Run]) -> None:
    saved, streamed = runs
    looks = range(INTERVAL - 1, STEPS, INTERVAL)
    states = [(row.param, row.state) for row in saved.rows if row.width < 16]
    assert {c.step for c in saved.comparisons} == set(looks)
    for step in looks:
        compared = [(c.param, c.state) for c in saved.comparisons if c.step == step]
        assert len(compared) == len(set(compared))
        assert set(compared) >= {s for s in states if "weight" in s[0]}
    assert streamed.comparisons == saved.comparisons


def test_the_width_compared_is_the_one_in_force(runs: tuple[Run, Run]) -> None:
    saved, _ = runs
    for c in saved.comparisons:
        (width, *_) = [
            change.after
            for record in reversed(saved.decisions)
            for change in record.changes
            if record.step <= c.step and (change.param, change.state) == (c.param, c.state)
        ]
        assert c.width == width


def test_the_page_and_the_terminal_show_what_was_recorded(runs: tuple[Run, Run]) -> None:
    saved, _ = runs
    page = render(saved)
    titles = re.findall(r"predicted ([\d.e+-]+), measured ([\d.e+-]+)</title>", page)
    shown = [(float(p), float(m)) for p, m in titles]
    usable = [c for c in saved.comparisons if c.measured > 0]
    assert len(shown) == len(usable) > 10
    for (p, m), c in zip(shown, usable, strict=True):
        assert p == pytest.approx(c.predicted, rel=5e-3)
        assert m == pytest.approx(c.measured, rel=5e-3)
    x, y = np.log([c.measured for c in usable]), np.log([c.predicted for c in usable])
    correlation = np.corrcoef(x, y)[0, 1]
    bias, spread = np.exp((y - x).mean()), np.exp((y - x).std())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(RunView(saved))
    terminal = console.export_text()
    assert f"{len(usable)} comparisons: correlation {correlation:.2f}" in terminal
    assert f"{bias:.2f} times what was measured, within a factor of {spread:.2f}" in terminal
    assert (
        f"correlation of the logarithms {correlation:.2f}; predictions are {bias:.2f} times" in page
    )


def test_a_biased_prediction_is_seen_as_such() -> None:
    errors = [1e-4, 1e-3, 0.02, 0.3]
    made = [Comparison(3, "w", "m", 4, 2 * e, e) for e in errors]
    accuracy = accuracy_of(made)
    assert accuracy is not None
    assert (accuracy.correlation, accuracy.bias, accuracy.spread) == pytest.approx((1, 2, 1))
    plot = scatter([*made, replace(made[0], measured=0.0)])
    assert plot is not None
    assert len(plot.points) == len(errors)
    assert all(x < plot.size - y for x, y, _ in plot.points), "above the line"
    assert accuracy_of(made[:2]) is None
    assert scatter([]) is None

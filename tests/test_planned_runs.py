"""Runs with a planner, end to end: repeatable, within their budget, never captured again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.graph_module import _loader

import stq_compile as stq
from models import backward, equal, make_model
from stq_compile.backend import session_of
from stq_compile.planner.planner import Planner
from stq_compile.session import Session

SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"min_numel": 64, "interval": 2, "dwell": 0, "ladder": (4, 8)}
"""Two widths, and the same ones in all tests: every pair of widths is a kernel to be built."""


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return stq.compile(optimizer, **{**OPTIONS, **options})


def session(optimizer: torch.optim.Optimizer) -> Session:
    found = session_of(optimizer)
    assert found is not None
    return found


def planner(optimizer: torch.optim.Optimizer) -> Planner:
    found = session(optimizer).planner
    assert found is not None
    return found


def train(model: nn.Module, step: Callable[[], object], steps: range) -> list[Tensor]:
    for number in steps:
        backward(model, number)
        step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_repeated_run_is_the_same_in_both_forms() -> None:
    # Steps compiled by the string form share the code of torch's wrapper, and so its recompile
    # limit of 8 in a process: other tests have used it up.
    torch._dynamo.reset()
    runs = []
    options = {**OPTIONS, "tolerance": 0.1}  # several changes, one after the other
    for form in ("compile", "compile", "backend"):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step: Callable[[], object]
        if form == "compile":
            step = stq.compile(optimizer, **options).step
        else:
            step = torch.compile(optimizer.step, backend="stq", options=options)
        train(model, step, range(1))
        graphs = counters["stats"]["unique_graphs"]
        values = train(model, step, range(1, 12))
        assert counters["stats"]["unique_graphs"] == graphs
        assert session(optimizer).compiles == 1
        rows = [
            (r.step, r.error, r.bits, [(c.state, c.before, c.after, c.error) for c in r.changes])
            for r in stq.history(optimizer)
        ]
        runs.append((values, rows, list(planner(optimizer).widths.values())))
    for values, rows, widths in runs[1:]:
        assert equal(values, runs[0][0])
        assert rows == runs[0][1]
        assert widths == runs[0][2]
    assert sum(len(changes) for *_, changes in runs[0][1][1:]) >= 3


def test_twenty_planned_transitions_and_no_recompile() -> None:
    """The tolerance alternates, so that every look but the first is followed by changes."""
    model = make_model()
    optimizer = adamw(model, interval=1)
    train(model, optimizer.step, range(1))
    found, graphs = planner(optimizer), counters["stats"]["unique_graphs"]
    tolerances = itertools.cycle((1e-6, 10.0))
    for step in range(1, 23):
        found.options = replace(found.options, tolerance=next(tolerances))
        train(model, optimizer.step, range(step, step + 1))
    changed = [record for record in stq.history(optimizer) if record.changes]
    assert len([r for r in changed if r.mode != "prior"]) >= 20
    assert session(optimizer).compiles == 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "make", ["adamw", *(pytest.param(name, marks=SLOW) for name in ("sgd", "centered"))]
)
def test_a_budget_holds_after_every_step(make: str) -> None:
    """SGD's first step creates its states; centered RMSprop keeps fragile ones in float32; later
    a parameter is unfrozen, the learning rate changes and a group is added."""
    model, extra = make_model(), nn.Parameter(torch.ones(40, 40))
    parameters = list(model.parameters())
    optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "centered": lambda: torch.optim.RMSprop(parameters, 1e-3, momentum=0.9, centered=True),
    }
    target = {"adamw": 7.3, "sgd": 7.3, "centered": 23.9}[make]
    optimizer = stq.compile(optimizers[make](), target_bits=target, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    bits = []
    for step in range(8):
        backward(model, step)
        if step < 2:
            parameters[2].grad = None
        if step == 5:
            optimizer.add_param_group({"params": [extra]})
        extra.grad = torch.randn(40, 40) if step >= 5 else None
        optimizer.step()
        scheduler.step()
        bits.append(stq.report(optimizer).bits_per_element)
    assert max(bits) <= target


def test_looks_leave_no_python_code_behind() -> None:
    """What torch.fx generates stays in its cache of sources for the life of the process."""
    model = make_model()
    optimizer = adamw(model, interval=2)
    train(model, optimizer.step, range(12))
    before = len(_loader.eval_cache)
    train(model, optimizer.step, range(12, 20))
    assert planner(optimizer).looks == 10
    assert len(_loader.eval_cache) == before


@pytest.mark.parametrize("rate", [0.0, 1e-10])
def test_a_learning_rate_that_moves_no_bit_keeps_the_plan(rate: float) -> None:
    """As at the end of a schedule: what is left of the update is the rounding of the parameter."""
    model = make_model()
    optimizer = adamw(model, interval=4)
    train(model, optimizer.step, range(1))
    optimizer.param_groups[0]["lr"] = 5e-3  # from here on an input of the step
    train(model, optimizer.step, range(1, 14))
    found = planner(optimizer)
    looks, measured, widths = found.looks, dict(found.measured), dict(found.widths)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = rate
    train(model, optimizer.step, range(14, 22))
    assert equal(model.parameters(), before) or rate > 0
    compared = [c for c in found.comparisons if c.step >= 14]
    assert not compared
    assert found.looks == looks + 2
    assert found.measured == measured
    assert found.widths == widths
    optimizer.param_groups[0]["lr"] = 1e-2
    train(model, optimizer.step, range(22, 25))
    assert found.measured != measured

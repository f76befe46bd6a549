"""The planner at work: budgets, transitions and failures, end to end on a small model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import stq_compile as stq
from models import backward, equal, make_model
from stq_compile import errors, reference, storage
from stq_compile.backend import session_of
from stq_compile.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"min_numel": 64, "interval": 2, "dwell": 0}


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return stq.compile(optimizer, **{**OPTIONS, **options})


def session(optimizer: torch.optim.Optimizer) -> Session:
    found = session_of(optimizer)
    assert found is not None
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def fail(*_: object, **__: object) -> None:
    raise errors.KernelBuildError(kernel="k", source="generated C++", output="no compiler")


@pytest.mark.parametrize("place", ["build", "encode"])
def test_a_failed_transition_leaves_everything(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model = make_model()
    optimizer = adamw(model, interval=4)
    train(model, optimizer, range(4))
    planner, plan = session(optimizer).planner, dict(session(optimizer).plan)
    assert planner is not None
    before, rows = planner.state_dict(), stq.report(optimizer).rows
    values = [s["exp_avg_sq"] + 0 for s in optimizer.state.values()]
    calls, encode = itertools.count(1), reference.encode

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError("simulated")
        return encode(*args, **kwargs)

    changes = dict.fromkeys(planner.widths, 16)
    with monkeypatch.context() as patch:
        patch.setattr(planner, "decide", lambda *_: planner.widths.update(changes) or changes)
        if place == "build":
            patch.setattr("stq_compile.codegen.cpp.backend.build", fail)
        else:
            patch.setattr(storage.reference, "encode", second_fails)
        with pytest.raises((MemoryError, errors.KernelBuildError)):
            session(optimizer).replan()
    vars(planner).pop("decide", None)
    assert planner.state_dict() == before
    assert session(optimizer).plan == plan
    assert stq.report(optimizer).rows == rows
    assert equal([s["exp_avg_sq"] + 0 for s in optimizer.state.values()], values)
    train(model, optimizer, range(4, 6))


def test_an_infeasible_budget_leaves_the_optimizer_usable() -> None:
    model = make_model()
    optimizer = adamw(model, target_bits=2.0)
    backward(model, 0)
    with pytest.raises(errors.InfeasibleBudgetError, match="Raise target_bits"):
        optimizer.step()
    optimizer.step()
    assert not any(
        isinstance(v, stq.PackedState) for s in optimizer.state.values() for v in s.values()
    )


def test_a_budget_that_leaves_nothing_to_choose_says_where_the_bytes_go() -> None:
    model = make_model()
    numel = sum(p.numel() for p in model.parameters())
    optimizer = adamw(model, target_bits=8.0, min_numel=numel)
    backward(model, 0)
    fixed = 8 * numel + 4 * len(list(model.parameters()))  # two moments and a step
    with pytest.raises(errors.InfeasibleBudgetError, match=rf"{fixed} bytes go to .*0 others"):
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_and_a_zero_learning_rate_do_not_move_the_plan(bad: float) -> None:
    model = make_model()
    optimizer = adamw(model, interval=100)
    train(model, optimizer, range(2))
    planner = session(optimizer).planner
    assert planner is not None
    measured = dict(planner.measured)
    session(optimizer).planner.options.__dict__["interval"] = 1  # type: ignore[union-attr]
    optimizer.param_groups[0]["lr"] = 0.0
    backward(model, 2)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.view(-1)[::3] = bad
    optimizer.step()
    assert planner.looks == 1
    assert planner.measured == measured


def test_a_key_that_matches_no_state_is_an_error() -> None:
    model = make_model()
    optimizer = adamw(model, precision={"exp_avgg": 4})
    backward(model, 0)
    with pytest.raises(errors.UnmatchedPrecisionError, match=r"'exp_avgg'.*exp_avg, exp_avg_sq"):
        optimizer.step()
    optimizer.step()  # its own step again

"""Pins the step graph and the plan; `pytest --stq-update` writes them anew."""

from __future__ import annotations

from typing import Any

from my_optimizer import make_optimizer


def test_the_step_is_what_it_was(stq_golden: Any) -> None:
    stq_golden.step_graph(make_optimizer())


def test_the_plan_is_what_it_was(stq_golden: Any) -> None:
    stq_golden.plan(make_optimizer(), precision={"exp_avg": 4, "exp_avg_sq": 3})

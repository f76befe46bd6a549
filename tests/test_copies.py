"""Copies of the weights that are no farther from them than they are rounded."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from stq_compile.copies import LOOKS, distance, rounding_error
from stq_compile.errors import CopyPrecisionWarning, EagerStepWarning
from stq_compile.formats import FORMATS
from stq_compile.packed_state import PackedState


class Anchored(torch.optim.Optimizer):
    """Goes on from its gradient and its distance from where it began."""

    def __init__(self, params: Any, lr: float, every: int = 0, eager: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.every, self.eager = every, eager

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        if self.eager:
            torch._dynamo.graph_break()
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            if not s:
                s["step"], s["start"] = 0, p.detach().clone()
            s["step"] += 1
            p.sub_(p.grad + 0.1 * (p - s["start"]), alpha=self.param_groups[0]["lr"])
            if self.every and s["step"] % self.every == 0:
                s["start"].copy_(p)


def run(steps: int = LOOKS[-1] + 3, precision: Any = 8, **how: Any) -> list[str]:
    """What was said of copies."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 70))
    optimizer = stq.compile(Anchored([p], **how), precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            p.grad = torch.randn(p.shape)
            optimizer.step()
    eagerly = any(isinstance(w.message, EagerStepWarning) for w in caught)
    assert eagerly == how.get("eager", False)
    return [str(w.message) for w in caught if isinstance(w.message, CopyPrecisionWarning)]


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_drowned_is_said_once_with_the_remedy(eager: bool) -> None:
    (message,) = run(lr=1e-7, eager=eager)
    assert "With 'start': 32 in the option precision" in message
    assert run(lr=1e-7, eager=eager, precision={"*": 8, "start": 32}) == []


def test_what_moves_away_is_not() -> None:
    assert run(lr=1e-3, eager=True) == []


@pytest.mark.parametrize("every", [5, 6, 10])
def test_slow_weights_may_meet_the_weights_now_and_then(every: int) -> None:
    assert run(lr=1e-3, eager=True, every=every) == []


@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_the_error_is_that_of_the_format(factor: float) -> None:
    values = factor * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    state = PackedState.pack(values, FORMATS["softsign12"], seed=1)
    error = float((state.dequantize() - values).norm())
    assert rounding_error(values) == pytest.approx(error, rel=0.1)
    assert distance(state, values) == pytest.approx(1.0, rel=0.1)
    assert distance(state, values + 10 * error / 1000**0.5) == pytest.approx(10.0, rel=0.1)


def test_other_orders_in_memory_are_left_alone() -> None:
    values: Tensor = torch.randn(8, 16)
    state = PackedState.pack(values, FORMATS["softsign12"])
    assert distance(state, values.t().contiguous().t()) == float("inf")

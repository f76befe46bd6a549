"""`param_rounding`: what reaches a 16-bit parameter in many small steps, and what is kept."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from cases import cases
from stepwise import Stepwise
from stq_compile import PackedState
from stq_compile.backend import session_of
from stq_compile.errors import (
    CheckpointError,
    InfeasibleBudgetError,
    InvalidOptionError,
    ParamRoundingWarning,
)
from stq_compile.halves import half_of, ulp, with_error

NUMEL = 1000
ROUNDINGS = ("nearest", "stochastic", "compensated")
Make = Callable[[Any], torch.optim.Optimizer]


class Lazy(Stepwise):
    """Somebody's signed momentum: makes its state inside the step, and converts as it goes."""

    def update(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert p.grad is not None
        if not state:
            state["average"] = torch.zeros_like(p)
        average = state["average"].float().lerp(p.grad.float(), 0.1)
        state["average"].copy_(average.to(p.dtype))
        p.data.add_(average.sign().to(p.dtype), alpha=-group["lr"])


class Sheared(Stepwise):
    """A matrix product in every step: a region. The product is with a permutation."""

    def update(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["average"] = torch.zeros_like(p)
        state["average"].lerp_(p.grad, 0.1)
        turned = state["average"] @ torch.eye(p.shape[1], dtype=p.dtype).flip(0)
        p.sub_(turned, alpha=group["lr"])


MAKERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4, eps=1e-5),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, eps=1e-5, foreach=True),
    "Lazy": lambda p: Lazy(p, lr=1e-4),
    "Sheared": lambda p: Sheared(p, lr=1e-4),
}


def start(dtype: torch.dtype, seed: int = 0) -> nn.Parameter:
    """Weights in [1, 2): an update of 1e-4 is a 78th of a unit of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.rand(10, NUMEL // 10, generator=generator) + 1).to(dtype))


def gradients(dtype: torch.dtype, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        found.append((1 + 0.1 * torch.randn(10, NUMEL // 10, generator=generator)).to(dtype))
    return found


def train(param: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for grad in gradients(torch.bfloat16, steps):
        param.grad = grad.to(param.dtype)
        optimizer.step()


def value_of(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """The parameter with its error, float64."""
    session = session_of(optimizer)
    assert session is not None
    error = session.errors.get(0)
    if error is None:
        return param.detach().double()
    assert isinstance(error, PackedState)
    return with_error(param.detach().float(), error.dequantize(), half_of(param.dtype)).double()


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(
        MAKERS,
        [torch.bfloat16, torch.float16],
        few=[("AdamW", torch.bfloat16), ("Sheared", torch.float16)],
    ),
)
def test_small_updates_are_lost_only_by_nearest(name: str, dtype: torch.dtype) -> None:
    """Against the float64 run of the stock optimizer, on which 100 steps move weights by about
    0.01: rounded to nearest they stand still; at random their mean moves along; with an error each
    of them does."""
    make, before = MAKERS[name], start(dtype).detach().double()
    exact = nn.Parameter(before.clone())
    train(exact, make([exact]), range(100))
    moved = exact.detach() - before
    for rounding in ROUNDINGS:
        param = start(dtype)
        optimizer = stq.compile(make([param]), precision=16, min_numel=1, param_rounding=rounding)
        train(param, optimizer, range(100))
        found = value_of(param, optimizer) - before
        if rounding == "nearest":
            assert bool((found == 0).all()) or dtype == torch.float16
            assert found.norm() < 0.5 * moved.norm()
        elif rounding == "stochastic":
            assert float(found.mean() / moved.mean()) == pytest.approx(1, abs=0.06)
        else:
            assert (found - moved).norm() < 0.05 * moved.norm()
            left = value_of(param, optimizer) - param.detach().double()
            assert bool((left.abs() <= 0.5 * ulp(param.detach().float(), half_of(dtype))).all())
        report = stq.report(optimizer)
        assert bool(report.note) == (name == "Sheared")
        assert report.compiles <= 2


@pytest.mark.parametrize(
    ("rounding", "name"),
    cases(
        ROUNDINGS,
        ["AdamW", "Lazy", "SGD plain", "Sheared"],
        few=[("compensated", "Lazy"), ("compensated", "Sheared"), ("stochastic", "AdamW")],
    ),
)
def test_a_resumed_run_has_the_same_bits(rounding: str, name: str) -> None:
    options: dict[str, Any] = {"precision": 4, "min_numel": 64, "param_rounding": rounding}

    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        param = start(torch.bfloat16)
        return param, stq.compile(MAKERS[name]([param]), **options)

    through, optimizer = made()
    train(through, optimizer, range(20))
    half, first = made()
    train(half, first, range(12))
    file = io.BytesIO()
    torch.save({"weights": half.detach(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second = made()
    train(resumed, second, range(3))  # something else, which loading must replace
    with torch.no_grad():
        resumed.copy_(saved["weights"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(12, 20))
    assert torch.equal(resumed, through)
    assert torch.equal(value_of(resumed, second), value_of(through, optimizer))


def compensated(**more: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    param = start(torch.bfloat16)
    optimizer = MAKERS["AdamW"]([param])
    stq.compile(optimizer, precision=4, min_numel=64, param_rounding="compensated", **more)
    train(param, optimizer, range(5))
    return param, optimizer


def test_the_error_is_counted_and_no_state_that_training_needs() -> None:
    _, optimizer = compensated()
    rows = {row.state: row for row in stq.report(optimizer).rows}
    assert (rows["param_error"].bytes, rows["param_error"].format) == (NUMEL, "ulp8")
    assert rows["param_error"].fp32_bytes == 0
    states = sum(row.bytes for row in rows.values())
    assert stq.report(optimizer).bits_per_element == pytest.approx(8 * states / (2 * NUMEL + 1))
    assert "param_error" not in optimizer.state[optimizer.param_groups[0]["params"][0]]


def test_the_float32_form_has_no_error_and_loads_into_the_stock_optimizer() -> None:
    param, optimizer = compensated()
    form = copy.deepcopy(stq.state_dict(optimizer, format="fp32"))
    assert sorted(form["state"][0]) == ["exp_avg", "exp_avg_sq", "step"]
    assert form["state"][0]["exp_avg"].dtype == torch.float32
    stock = torch.optim.AdamW([nn.Parameter(param.detach().clone())])
    stock.load_state_dict(form)
    optimizer.load_state_dict(form)
    assert torch.equal(value_of(param, optimizer), param.detach().double()), "errors of zero"
    train(param, optimizer, range(5, 8))


def test_errors_are_dropped_where_nobody_keeps_them() -> None:
    _, optimizer = compensated()
    param = start(torch.bfloat16)
    other = stq.compile(MAKERS["AdamW"]([param]), precision=4, min_numel=64)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(param, other, range(5, 7))
    assert {row.state for row in stq.report(other).rows} == {"exp_avg", "exp_avg_sq", "step"}


def test_a_damaged_error_is_refused_whole() -> None:
    param, optimizer = compensated()
    before = value_of(param, optimizer)
    for change in ({"format": "softsign8"}, {"codes": torch.zeros(3, dtype=torch.int8)}):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["param_error"].update(change)
        with pytest.raises(CheckpointError, match=r"state\[0\].param_error"):
            optimizer.load_state_dict(saved)
    assert torch.equal(value_of(param, optimizer), before)


def test_the_budget_counts_errors() -> None:
    """Eight bits a parameter are four for each of Adam's states: of 8.3, some four are left."""
    param = start(torch.bfloat16)
    optimizer = stq.compile(
        MAKERS["AdamW"]([param]), target_bits=8.3, min_numel=64, param_rounding="compensated"
    )
    train(param, optimizer, range(3))
    assert stq.report(optimizer).bits_per_element <= 8.3
    small = start(torch.bfloat16)
    optimizer = stq.compile(
        MAKERS["AdamW"]([small]), target_bits=4.5, min_numel=64, param_rounding="compensated"
    )
    with pytest.raises(InfeasibleBudgetError):
        train(small, optimizer, range(1))


@pytest.mark.parametrize("name", ["AdamW", "Sheared"])
def test_parameters_in_float32_are_left_alone(name: str) -> None:
    found = []
    for rounding in ROUNDINGS:
        param = start(torch.float32)
        optimizer = stq.compile(
            MAKERS[name]([param]), precision=4, min_numel=64, param_rounding=rounding
        )
        train(param, optimizer, range(4))
        assert "param_error" not in {row.state for row in stq.report(optimizer).rows}
        found.append(param.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_string_form_takes_it_too() -> None:
    first, second = start(torch.bfloat16), start(torch.bfloat16)
    options = {"precision": 4, "min_numel": 64, "param_rounding": "compensated"}
    ours = stq.compile(MAKERS["SGD"]([first]), **options)
    other = MAKERS["SGD"]([second])
    step = torch.compile(other.step, backend="stq", options=options)
    for grad in gradients(torch.bfloat16, range(6)):
        first.grad, second.grad = grad, grad
        ours.step()
        step()
    assert session_of(other) is not None
    assert torch.equal(value_of(first, ours), value_of(second, other))


def test_an_eager_step_says_that_it_rounds_to_nearest() -> None:
    class Broken(Lazy):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            torch._dynamo.graph_break()
            super().step()

    param = start(torch.bfloat16)
    optimizer = stq.compile(Broken([param], lr=0.1), param_rounding="compensated", min_numel=64)
    with pytest.warns(ParamRoundingWarning, match=r"compensated.*rounded to nearest"):
        train(param, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(param, optimizer, range(1, 3))
    assert not torch.equal(param, start(torch.bfloat16))


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="'nearest', 'stochastic' or 'compensated'"):
        stq.compile(MAKERS["SGD"]([start(torch.bfloat16)]), param_rounding="up")

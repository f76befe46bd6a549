"""Errors: a class for each mistake, and the optimizer as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stq_compile as stq
from models import make_model
from stq_compile import errors
from stq_compile.backend import session_of


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters())


def test_not_an_optimizer() -> None:
    with pytest.raises(errors.NotAnOptimizerError, match="not Linear"):
        stq.compile(nn.Linear(2, 2))  # type: ignore[type-var]


def test_compiled_twice() -> None:
    optimizer = stq.compile(adamw(make_model()))
    with pytest.raises(errors.AlreadyCompiledError):
        stq.compile(optimizer)


def test_report_needs_a_compiled_optimizer() -> None:
    with pytest.raises(errors.NotCompiledError):
        stq.report(adamw(make_model()))


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_refused_optimizers(name: str) -> None:
    optimizer = getattr(torch.optim, name)(make_model().parameters())
    with pytest.raises(errors.UnsupportedOptimizerError, match=name):
        stq.compile(optimizer)
    assert session_of(optimizer) is None


@pytest.mark.parametrize("option", ["fused", "differentiable"])
def test_refused_options(option: str) -> None:
    optimizer = torch.optim.AdamW(make_model().parameters(), **{option: True})
    with pytest.raises(errors.UnsupportedOptimizerError, match=f"{option}=True"):
        stq.compile(optimizer)
    assert session_of(optimizer) is None


def test_unknown_option_leaves_the_optimizer() -> None:
    optimizer = adamw(make_model())
    with pytest.raises(errors.UnknownOptionError, match="min_numel"):
        stq.compile(optimizer, precison=4)
    assert session_of(optimizer) is None


def refused_step(optimizer: torch.optim.Optimizer, error: type[Exception], match: str) -> None:
    """The first compiled step raises; after that the optimizer is the stock one and works."""
    with pytest.raises(error, match=match):
        optimizer.step()
    assert not optimizer.state
    assert "step" not in optimizer.__dict__
    assert session_of(optimizer) is None
    optimizer.step()


def test_unsupported_dtype() -> None:
    p = nn.Parameter(torch.randn(100, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(torch.optim.AdamW([p]))
    refused_step(optimizer, errors.UnsupportedParameterError, r"AdamW, group0.param0: .*float64")


def test_unsupported_layout() -> None:
    p = nn.Parameter(torch.randn(10, 20)[:, ::2])
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(torch.optim.AdamW([p]))
    refused_step(optimizer, errors.UnsupportedParameterError, "not dense")


class Matrix(torch.optim.Optimizer):
    """An optimizer whose update is a matrix product."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad @ p, alpha=group["lr"])


def test_unsupported_operator_names_the_line() -> None:
    p = nn.Parameter(torch.randn(8, 8))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(Matrix([p]))
    match = r"Matrix, .*mm(.|\n)*test_refusals.py:\d+ p.sub_"
    refused_step(optimizer, errors.UnsupportedOperatorError, match)


class RowMeans(torch.optim.Optimizer):
    """An optimizer with a state of another shape than its parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def _init_group(self, group: Any) -> None:
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["row"] = torch.zeros(p.shape[0], 1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                row = self.state[p]["row"]
                row.mul_(0.9)
                p.sub_(p.grad * row, alpha=group["lr"])


def test_unsupported_state_names_state_and_line() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(RowMeans([p]))
    refused_step(
        optimizer,
        errors.UnsupportedStateError,
        r"RowMeans, state 'row' of group0.param0(.|\n)*test_refusals.py:\d+ row.mul_",
    )


class Printing(torch.optim.SGD):
    """A step that Dynamo cannot capture as one graph."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            print(float(p.sum()))
            p.sub_(p.grad)


def test_graph_break() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(Printing([p]))
    refused_step(optimizer, errors.GraphBreakError, "Printing")


def test_coupled_parameters() -> None:
    class Coupled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            a, b = self.param_groups[0]["params"]
            a.sub_(b.grad)

    params = [nn.Parameter(torch.randn(70)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = stq.compile(Coupled(params))
    refused_step(optimizer, errors.CoupledParametersError, r"group0.param0.*group0.param1")

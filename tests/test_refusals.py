"""Errors: a class for each mistake, and the optimizer as it was; and what is no error any more."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import stq_compile as stq
from models import equal, make_model
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


def twin_of(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[Any], Any]:
    """The parameters, copies of them with their gradients, and the stock optimizer on these."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    twins = [p.detach().clone().requires_grad_() for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    return params, twins, type(optimizer)(twins)  # type: ignore[call-arg]


def not_compiled(optimizer: torch.optim.Optimizer, match: str) -> None:
    """The first step says why it is not compiled, and is the stock optimizer's."""
    params, twins, stock = twin_of(optimizer)
    with pytest.warns(errors.EagerStepWarning, match=match):
        optimizer.step()
    assert session_of(optimizer) is not None
    stock.step()
    assert equal(params, twins)


def in_a_region(optimizer: torch.optim.Optimizer, match: str) -> None:
    """The step is compiled, outside of kernels, and is the stock one's; the report says why."""
    params, twins, stock = twin_of(optimizer)
    optimizer.step()
    stock.step()
    torch.testing.assert_close(params, twins)
    assert re.search(match, stq.report(optimizer).note)


def test_other_dtype() -> None:
    p = nn.Parameter(torch.randn(100, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(torch.optim.AdamW([p]))
    in_a_region(optimizer, "is torch.float64")


def test_other_layout() -> None:
    p = nn.Parameter(torch.randn(10, 20)[:, ::2])
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(torch.optim.AdamW([p]))
    in_a_region(optimizer, "the strides")


class Remembering(torch.optim.SGD):
    """Sets an attribute of its own in the step, which Dynamo would not carry over."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        self.last = self.param_groups[0]["params"][0].grad.clone()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_attributes_of_the_optimizer() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(Remembering([p]))
    not_compiled(optimizer, r"sets last of the optimizer itself(.|\n)*\.py:\d+: self\.last = ")
    assert torch.equal(optimizer.last, p.grad)


def test_attributes_of_the_optimizer_through_the_backend() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = Remembering([p])
    torch._dynamo.reset()  # all string forms of a process share its limit of graphs
    step = torch.compile(optimizer.step, backend="stq")
    with pytest.raises(Exception, match="sets last of the optimizer itself"):
        step()
    assert session_of(optimizer) is None


class Counting(torch.optim.SGD):
    """Counts its steps in an attribute, in a method of its own."""

    calls = 0

    def count(self) -> None:
        self.calls += 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        self.count()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=1 / self.calls)


def test_a_number_of_the_optimizer_that_the_step_counts_up() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(Counting([p]))
    not_compiled(optimizer, r"sets calls of the optimizer itself")
    line = Counting.count.__code__.co_firstlineno + 1
    note = stq.report(optimizer).note
    assert f"kept in `state` or in a parameter group, it would be compiled:\n  {__file__}" in note
    assert f":{line}: self.calls += 1" in note


class Viewing(torch.optim.SGD):
    """Moves the parameter through a view of it that it keeps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for p in self.param_groups[0]["params"]:
            if "view" not in self.state[p]:
                self.state[p]["view"] = p.data
            self.state[p]["view"].sub_(p.grad)


def test_states_in_the_memory_of_parameters() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = Viewing([p])
    optimizer.step()
    stq.compile(optimizer)
    before = p.detach().clone()
    with pytest.warns(errors.EagerStepWarning, match="param0:view and parameter 0 share memory"):
        optimizer.step()
    assert torch.equal(p, before - p.grad)


class Matrix(torch.optim.Optimizer):
    """An optimizer whose update is a matrix product."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad @ p, alpha=group["lr"])


def test_matrix_product() -> None:
    p = nn.Parameter(torch.randn(8, 8))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(Matrix([p]))
    match = r"aten::mm.*test_refusals.py:\d+ p.sub_"
    in_a_region(optimizer, match)


class RowMeans(torch.optim.Optimizer):
    """An optimizer with a state of another shape than its parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def _init_group(self, group: Any) -> None:
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["row"] = torch.zeros(p.shape[0], 1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                row = self.state[p]["row"]
                row.mul_(0.9)
                p.sub_(p.grad * row, alpha=group["lr"])


def test_state_of_another_shape() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(RowMeans([p]))
    in_a_region(
        optimizer,
        r"its shape \(8, 1\) is not the parameter's.*test_refusals.py:\d+ row.mul_",
    )


class Printing(torch.optim.SGD):
    """A step that Dynamo cannot capture as one graph."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for p in self.param_groups[0]["params"]:
            print(float(p.sum()))
            p.sub_(p.grad)


def test_graph_break() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.ones_like(p)
    optimizer = stq.compile(Printing([p]))
    not_compiled(optimizer, "Printing")


def test_coupled_parameters() -> None:
    class Coupled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
            a, b = self.param_groups[0]["params"]
            a.sub_(b.grad * a)
            b.sub_(a.grad * a)

    params = [nn.Parameter(torch.randn(70)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = stq.compile(Coupled(params))
    in_a_region(optimizer, "2 parameters together")

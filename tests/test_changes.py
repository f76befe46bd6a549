"""What users do to tensors between steps, and what the compiled step makes of it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from models import backward, equal, make_model
from stq_compile import PackedState, errors
from stq_compile.backend import session_of


def pair(
    precision: Any = 32, n: int = 2
) -> tuple[Any, Any, list[nn.Parameter], list[nn.Parameter]]:
    """A compiled optimizer and its eager twin on equal parameters, one step made."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(64, 80)) for _ in range(n)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    compiled = stq.compile(torch.optim.AdamW(ours, lr=0.1), precision=precision, min_numel=64)
    eager = torch.optim.AdamW(theirs, lr=0.1)
    both_step(compiled, eager, ours, theirs)
    return compiled, eager, ours, theirs


def both_step(compiled: Any, eager: Any, ours: list[Any], theirs: list[Any]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape, dtype=p.dtype)
        q.grad = p.grad.clone()
    compiled.step()
    eager.step()


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_new_data_of_the_same_layout() -> None:
    compiled, eager, ours, theirs = pair()
    for p, q in zip(ours, theirs, strict=True):
        p.data = p.data.clone() + 1
        q.data = q.data.clone() + 1
    both_step(compiled, eager, ours, theirs)
    assert_same(ours, theirs)


def test_a_new_dtype_is_refused_and_touches_nothing() -> None:
    compiled, _, ours, _ = pair(8)
    ours[0].data = ours[0].data.bfloat16()
    ours[0].grad = torch.ones_like(ours[0])
    before = [p.detach().clone() for p in ours]
    with (
        pytest.warns(errors.EagerStepWarning),
        pytest.raises(RuntimeError, match=r"BFloat16|bfloat16"),
    ):
        compiled.step()  # as the stock optimizer raises
    assert equal(ours, before)
    ours[0].data = ours[0].data.float()
    ours[0].grad = torch.ones_like(ours[0])
    compiled.step()
    assert not stq.report(compiled).note


def test_a_new_layout_is_captured_afresh() -> None:
    compiled, eager, ours, theirs = pair(32)
    ours[0].data = ours[0].data.t().contiguous().t()
    compiled.step()  # its states still have the old one, so that it is no kernel any more
    eager.step()
    torch.testing.assert_close(list(ours), list(theirs))
    assert "strides" in stq.report(compiled).note


def test_a_sparse_gradient_is_refused() -> None:
    compiled, _, ours, _ = pair()
    ours[0].grad = torch.randn(64, 80).to_sparse()
    with pytest.warns(errors.EagerStepWarning), pytest.raises(RuntimeError, match="sparse"):
        compiled.step()  # as the stock optimizer raises


def test_autograd_sees_that_parameters_changed() -> None:
    compiled, _, (w, _), _ = pair(8)
    loss = (w * w).sum()
    compiled.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_training_step_calls_the_step_eagerly() -> None:
    compiled, eager, ours, theirs = pair()

    @torch.compile
    def train() -> None:
        compiled.step()

    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    train()
    eager.step()
    assert_same(ours, theirs)


def test_other_compiled_functions_do_not_read_garbage() -> None:
    compiled, _, ours, _ = pair(8)
    state = compiled.state[ours[0]]["exp_avg"]
    with pytest.raises(Exception, match=r"state.dequantize\(\)"):
        torch.compile(lambda s: s.sum())(state)


def test_many_patterns_of_missing_gradients() -> None:
    compiled, eager, ours, theirs = pair(n=4)
    for pattern in range(1, 13):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn_like(p) if pattern >> i & 1 else None
            q.grad = None if p.grad is None else p.grad.clone()
        compiled.step()
        eager.step()
    assert_same(ours, theirs)


def test_many_loads_keep_one_set_of_states() -> None:
    model = make_model()
    optimizer = stq.compile(torch.optim.AdamW(model.parameters()), precision=4, min_numel=64)
    for step in range(10):
        backward(model, step)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    backward(model, 10)
    optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    gc.collect()
    assert len(session.compiled) == 1


class Momentum(torch.optim.Optimizer):
    """Makes its state inside ``step``, without ``_init_group``."""

    def __init__(self, params: Any, key: Any = "m") -> None:
        super().__init__(params, {"lr": 0.1})
        self.key = key

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state[self.key] = torch.zeros_like(p)
                state[self.key].mul_(0.9).add_(p.grad)
                p.sub_(state[self.key], alpha=group["lr"])


@pytest.mark.parametrize("key", ["m", "exp-avg", 0])
@pytest.mark.parametrize("string_form", [False, True])
def test_states_made_inside_the_step(key: Any, string_form: bool) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 80))
    q = nn.Parameter(p.detach().clone())
    ours, eager = Momentum([p], key), Momentum([q], key)
    options = {"precision": 8, "min_numel": 64}
    step = ours.step
    if string_form:
        step = torch.compile(ours.step, backend="stq", options=options)
    else:
        stq.compile(ours, **options)
        step = ours.step
    for _ in range(4):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        step()
        eager.step()
    assert list(ours.state[p]) == [key]
    assert isinstance(ours.state[p][key], PackedState)
    assert float((p - q).detach().norm() / q.detach().norm()) < 0.01


class Odd(torch.optim.Optimizer):
    """Does what ``body`` says to (parameter, state, group)."""

    def __init__(self, params: Any, body: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.body = body

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                self.body(p, self.state[p], group)


def count_in_python(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    state["t"] = state.get("t", 0) + 1
    p.add_(p.grad, alpha=-0.1 / state["t"])


def keep_the_parameter(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    state["me"] = p.detach()
    p.add_(p.grad, alpha=-0.1)


def train_odd(body: Any, compiled: bool) -> tuple[nn.Parameter, Odd]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 80))
    optimizer = Odd([p], body)
    if compiled:
        stq.compile(optimizer, precision=32)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p, optimizer


def test_a_counter_in_python_is_returned() -> None:
    p, optimizer = train_odd(count_in_python, compiled=True)
    torch.testing.assert_close(p, train_odd(count_in_python, compiled=False)[0])
    assert optimizer.state[p]["t"] == 4
    assert stq.report(optimizer).compiles <= 3
    assert not stq.report(optimizer).note


def test_a_view_of_the_parameter_is_kept_by_an_eager_step() -> None:
    with pytest.warns(errors.EagerStepWarning, match="Odd: the step stores a view"):
        p, optimizer = train_odd(keep_the_parameter, compiled=True)
    assert torch.equal(p, train_odd(keep_the_parameter, compiled=False)[0])
    assert optimizer.state[p]["me"].data_ptr() == p.data_ptr()


def test_a_gradient_that_the_step_writes() -> None:
    def body(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)
        p.sub_(p.grad)

    p = nn.Parameter(torch.randn(64, 80))
    p.grad = torch.randn(80, 64).t()
    expected = p.grad * 0.5
    stq.compile(Odd([p], body), precision=32).step()
    torch.testing.assert_close(p.grad, expected)


def test_a_scheduler_made_before_compile() -> None:
    p = nn.Parameter(torch.randn(64, 80))
    optimizer = torch.optim.AdamW([p])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stq.compile(optimizer)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 1e-5


def test_a_wrapped_step_is_refused() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.randn(64, 80))])
    optimizer.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(errors.UnsupportedOptimizerError, match="replaced on the instance"):
        stq.compile(optimizer)

"""Steps that cannot be compiled run eagerly on packed states: right, packed, and said once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from models import backward, equal, make_model
from stq_compile import PackedState, codec
from stq_compile.backend import session_of
from stq_compile.errors import EagerStepWarning
from stq_compile.formats import BFLOAT16, CONSTANT
from stq_compile.session import MOST_GRAPHS
from stq_compile.state_tree import leaves
from stq_compile.working_set import WorkingSet

PACKED = {"precision": 8, "min_numel": 64}


class Base(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})


class Breaking(Base):
    """Momentum and second moment made inside the step, and a graph break on a tensor's value."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(p)
                    state["v"] = torch.zeros_like(p)
                state["step"] += 1
                state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["v"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                scale = 1.0 if float(p.grad.norm()) > 0 else 0.0
                update = state["m"] / (state["v"].sqrt() + 1e-8)
                p.data.add_(update, alpha=-group["lr"] * scale)


class Nested(Base):
    """States in a list and a dict, one of another shape than the parameter, one replaced."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    continue
                state = self.state[p]
                if not state:
                    state["sides"] = [torch.zeros(n, n) for n in p.shape]
                    state["inner"] = {"old": torch.zeros_like(p)}
                print(end="")  # a graph break
                state["sides"][0].add_(p.grad @ p.grad.T)
                state["sides"][1].add_(p.grad.T @ p.grad)
                state["inner"]["old"] = 0.5 * state["inner"]["old"] + p.grad
                p.sub_(state["inner"]["old"], alpha=group["lr"])


def run(
    cls: type[Base], steps: int = 10, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model()
    optimizer: torch.optim.Optimizer = cls(model.parameters())
    if options:
        optimizer = stq.compile(optimizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EagerStepWarning)
        for step in range(steps):
            backward(model, step)
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("cls", [Breaking, Nested])
def test_width_32_is_the_eager_step(cls: type[Base]) -> None:
    eager, _ = run(cls)
    ours, optimizer = run(cls, precision=32)
    assert equal(eager.parameters(), ours.parameters())
    assert not any(isinstance(leaf.value, PackedState) for leaf in leaves(optimizer))


@pytest.mark.parametrize("cls", [Breaking, Nested])
def test_width_8_is_packed_and_near(cls: type[Base]) -> None:
    start = make_model()
    eager, _ = run(cls)
    ours, optimizer = run(cls, **PACKED)
    for leaf in leaves(optimizer):
        assert isinstance(leaf.value, PackedState) == (leaf.value.numel() >= 64), leaf.key
    report = stq.report(optimizer)
    assert 8 < report.bits_per_element < 12
    moved = distance(eager, start)
    assert 0 < distance(ours, eager) < 0.1 * moved


def test_kernels_decode_and_encode_with_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, _ = run(Nested, **PACKED)
    monkeypatch.setattr(codec, "WORTH_BUILDING", 1)
    ours, optimizer = run(Nested, **PACKED)
    assert equal(ours.parameters(), reference.parameters())
    session = session_of(optimizer)
    assert session is not None
    assert session.codec.kernels


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(sum((p - q).detach().square().sum() for p, q in pairs)) ** 0.5


def test_a_resumed_run_has_the_same_bits() -> None:
    """What is written outside of kernels draws its random numbers by how often it was written."""
    options = {"precision": 4, "min_numel": 64}
    model, optimizer = run(Breaking, 2, **options)
    weights, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = make_model(1)
    resumed = stq.compile(Breaking(other.parameters()), **options)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for m, o in ((model, optimizer), (other, resumed)):
        for step in range(2, 5):
            backward(m, step)
            o.step()
    assert equal(model.parameters(), other.parameters())


def test_it_is_said_once_with_the_line() -> None:
    model = make_model()
    optimizer = stq.compile(Breaking(model.parameters()), **PACKED)
    backward(model, 0)
    with pytest.warns(EagerStepWarning, match=r"Breaking: its step runs eagerly(.|\n)*p.grad.norm"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, 1)
        optimizer.step()
    assert "p.grad.norm" in stq.report(optimizer).note


def test_a_state_is_rounded_once_a_step_and_one_parameter_is_decoded_at_a_time() -> None:
    model, optimizer = run(Breaking, 2, **PACKED)
    states = [leaf.value for leaf in leaves(optimizer) if isinstance(leaf.value, PackedState)]
    writes = [s.packed.eager_writes for s in states]
    decoded = []

    class Watching(Breaking):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
            super().step()
            decoded.append(sum(s.packed.working is not None for s in states))

    optimizer.__class__ = Watching
    backward(model, 2)
    optimizer.step()
    assert decoded == [2]  # of the last parameter that has packed states
    assert [s.packed.eager_writes - w for s, w in zip(states, writes, strict=True)] == [1] * len(
        states
    )
    assert all(s.packed.working is None for s in states)


def test_a_copy_made_within_the_step_has_the_values_of_then() -> None:
    state = PackedState.zeros_like(torch.empty(128), CONSTANT)
    with WorkingSet(lambda: {id(state.packed): (0, 8)}, None):
        state.add_(1.5)
        assert torch.equal(copy.deepcopy(state).dequantize(), torch.full((128,), 1.5))
        assert state.tolist() == [1.5] * 128
        state.add_(1.0)
    assert state.format.width == 8
    assert torch.equal(state.dequantize(), torch.full((128,), 2.5))


def test_a_state_that_turns_negative_gets_a_signed_format() -> None:
    state = PackedState.zeros_like(torch.empty(128), CONSTANT)
    for change, kind in ((1.0, "adaptive_log"), (-3.0, "softsign"), (5.0, "softsign")):
        with WorkingSet(lambda: {id(state.packed): (0, 8)}, None):
            state.add_(change)
        assert state.format.kind == kind
    torch.testing.assert_close(state.dequantize(), torch.full((128,), 3.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_one_pass_hands_to_the_next_is_not_rounded_to_zeros(overwrite: bool) -> None:
    states = [PackedState.zeros_like(torch.empty(256), CONSTANT) for _ in range(2)]
    owners = {id(state.packed): (i, 8) for i, state in enumerate(states)}
    small = torch.where(torch.arange(256) % 2 == 0, -1.0, 2.0**-12)
    for step in range(2):
        with WorkingSet(lambda: owners, None):
            for state in states:  # turns from the one to the other
                if step and overwrite:
                    state.zero_()
                state.add_(small)
            assert (states[0].format == BFLOAT16) == (step == 0 or overwrite)
            exact = torch.equal(states[0] * 1, small)
            assert exact == (step == 0 or overwrite)
        assert [state.format.name for state in states] == ["softsign8"] * 2
        assert all(state.packed.working is None for state in states)


def test_a_foreach_step_that_goes_through_its_lists_has_the_values_of_the_step() -> None:
    """Rounded to one between two operators, a product of rates would be divided by zero (Adai)."""
    states = [PackedState.zeros_like(torch.empty(256), CONSTANT) for _ in range(2)]
    for state in states:
        state.packed.fill(1.0)
    owners = {id(state.packed): (i, 8) for i, state in enumerate(states)}
    factors = 1.0 - torch.linspace(0, 0.9, 256).pow(4).clamp(min=1e-4)
    with WorkingSet(lambda: owners, None):
        torch._foreach_mul_(states, [factors, factors])
        assert all(torch.equal(1.0 - state, 1.0 - factors) for state in states)
    assert [state.format.name for state in states] == ["adaptive_log8"] * 2


class Twice(Base):
    """Sharpness-aware: moves, calls the closure again, and moves on from where it was."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            loss = closure()
        for p in params:
            p.copy_(self.state[p]["old"]).sub_(p.grad, alpha=0.1)
        return loss


def closure_of(model: nn.Module, step: int, calls: list[int]) -> Any:
    def closure() -> Tensor:
        calls.append(step)
        backward(model, step)
        return torch.tensor(float(step))

    return closure


@pytest.mark.parametrize(("cls", "calls_each"), [(Twice, 1), (torch.optim.SGD, 1)])
def test_closures_are_called_where_the_step_calls_them(cls: Any, calls_each: int) -> None:
    eager, ours = make_model(), make_model()
    reference, optimizer = cls(eager.parameters(), lr=0.1), cls(ours.parameters(), lr=0.1)
    stq.compile(optimizer, precision=32)
    calls: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EagerStepWarning)
        for step in range(3):
            backward(eager, step)
            backward(ours, step)
            reference.step(closure_of(eager, step, []))
            assert optimizer.step(closure_of(ours, step, calls)) == step
    assert calls == [step for step in range(3) for _ in range(calls_each)]
    torch.testing.assert_close(list(ours.parameters()), list(eager.parameters()))


class Restless(Base):
    """Its step has another graph every time."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            group["name"] = group.get("name", "") + "x"
            for p in group["params"]:
                for _ in group["name"]:
                    p.sub_(p.grad, alpha=group["lr"])


def test_a_step_that_changes_every_time_is_not_compiled_for_ever() -> None:
    eager, _ = run(Restless, 8)
    ours, optimizer = run(Restless, 8, precision=32)
    torch.testing.assert_close(list(ours.parameters()), list(eager.parameters()))
    assert stq.report(optimizer).compiles == MOST_GRAPHS
    assert "captured 4 times" in stq.report(optimizer).note

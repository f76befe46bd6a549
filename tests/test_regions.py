"""Optimizers with matrix products, reductions and states of other shapes: compiled, and packed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from models import backward, make_model
from stq_compile import PackedState, codec
from stq_compile.backend import session_of
from stq_compile.errors import EagerStepWarning
from stq_compile.formats import WEIGHTS_WIDTH
from stq_compile.state_tree import leaves

MIN_NUMEL = 64


class Whitened(torch.optim.Optimizer):
    """A small Shampoo: two matrices per parameter in a list, a Python step counter, a QR every
    step, momentum made in the step, and a branch on the step number."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                    state["sides"] = [torch.eye(n) for n in p.shape]
                state["m"].lerp_(p.grad, 0.1)
                update = state["m"] / (1 - 0.9 ** group["step"])
                if p.ndim == 2:
                    left, right = state["sides"]
                    left.mul_(0.9).add_(p.grad @ p.grad.T, alpha=0.1)
                    right.mul_(0.9).add_(p.grad.T @ p.grad, alpha=0.1)
                    basis = torch.linalg.qr(left + 0.1 * torch.eye(left.shape[0])).Q
                    update = basis.T @ update / right.diagonal().sqrt().clamp(min=1e-3)
                p.add_(update / update.norm(), alpha=-group["lr"])


class Clipped(torch.optim.Optimizer):
    """The norm of all gradients is in every parameter's update."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        params = [p for g in self.param_groups for p in g["params"]]
        total = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            if "m" not in self.state[p]:
                self.state[p]["m"] = torch.zeros_like(p)
            self.state[p]["m"].mul_(0.9).add_(p.grad / total.clamp(min=0.1))
            p.sub_(self.state[p]["m"], alpha=self.param_groups[0]["lr"])


def muon(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.01)


def adafactor(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=0.01)


MAKERS = [muon, adafactor, Whitened, Clipped]


def train(make: Any, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = make_model().to(dtype)
    optimizer = make(list(model.parameters()))
    if options:
        stq.compile(optimizer, **options)
    for step in range(steps):
        model.float()
        backward(model, step)
        grads = [None if p.grad is None else p.grad.to(dtype) for p in model.parameters()]
        model.to(dtype)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        optimizer.step()
    return model, optimizer


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def _nothing_runs_eagerly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerStepWarning)
        yield


@pytest.mark.parametrize("make", MAKERS)
def test_width_32_equals_eager(make: Any) -> None:
    eager, _ = train(make, 6)
    ours, optimizer = train(make, 6, precision=32)
    assert torch.equal(vector(ours), vector(eager))
    assert stq.report(optimizer).compiles <= 3
    assert "Outside of kernels" in stq.report(optimizer).note


@pytest.mark.parametrize("make", [muon, Whitened, Clipped])
def test_width_8_is_packed_and_near(make: Any) -> None:
    start = vector(make_model())
    eager, _ = train(make, 10)
    ours, optimizer = train(make, 10, precision=8, min_numel=MIN_NUMEL)
    for leaf in leaves(optimizer):
        assert isinstance(leaf.value, PackedState) == (leaf.value.numel() >= MIN_NUMEL), leaf.key
    moved = (vector(eager) - start).norm()
    assert 0 < (vector(ours) - vector(eager)).norm() < 0.25 * moved
    assert stq.report(optimizer).compiles <= 4


def test_one_parameter_is_in_float32_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = train(Whitened, 3, precision=8, min_numel=MIN_NUMEL)
    alive: list[int] = []
    whole = PackedState.dequantize

    def counted(self: PackedState, *codec: Any) -> Tensor:
        value = whole(self, *codec)
        count[0] += 1
        return value

    count = [0]
    monkeypatch.setattr(PackedState, "dequantize", counted)
    session = session_of(optimizer)
    assert session is not None
    (step,) = (s for s in session.compiled if s.number == session.compiles - 1)
    for region in step.regions:
        run = region._run

        def watched(*args: Any, run: Any = run) -> None:
            before = count[0]
            run(*args)
            alive.append(count[0] - before)

        monkeypatch.setattr(region, "_run", watched)
    backward(model, 3)
    optimizer.step()
    assert max(alive) == 3  # the momentum and two matrices of one parameter
    assert sum(alive) == 9  # there are three matrices; those of vectors are never read


@pytest.mark.parametrize("worth", [1, 20_000])
def test_kernels_decode_and_encode_with_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, worth: int
) -> None:
    """From the first step on, or once the reference has done as much work as building is."""
    options: dict[str, Any] = {"precision": 4, "min_numel": MIN_NUMEL}
    reference, slow = train(Whitened, 6, **options)
    monkeypatch.setattr(codec, "WORTH_BUILDING", worth)
    ours, fast = train(Whitened, 6, **options)
    assert torch.equal(vector(ours), vector(reference))
    for a, b in zip(leaves(fast), leaves(slow), strict=True):
        assert torch.equal(a.value, b.value)
    built = [session_of(o).codec.kernels for o in (slow, fast)]  # type: ignore[union-attr]
    assert not built[0]
    # 8: the entries of Cholesky factors, half as many as those of the matrices
    widths = {format.width for way, _ in built[1] for format in way}
    assert widths >= {8, 32}
    assert widths <= {4, 8, 32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype: torch.dtype) -> None:
    """The bits of the eager step."""

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)

    eager, _ = train(sgd, 5, dtype)
    ours, _ = train(sgd, 5, dtype, precision=32)
    assert torch.equal(vector(ours), vector(eager))


class Halved(torch.optim.Optimizer):
    """States of bfloat16, made in the step of a region."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for p in self.param_groups[0]["params"]:
            state, g = self.state[p], p.grad.bfloat16()
            if not state:
                state["m"], state["last"] = torch.zeros_like(g), g.clone()
            state["m"].lerp_(g, 0.1)
            state["last"].mul_(0.5).add_(g)
            update = state["m"].float() + state["last"].float()
            p.sub_(update / update.norm(), alpha=0.1)


def test_states_of_16_bits_that_a_region_makes_are_packed() -> None:
    start = vector(make_model())
    eager, _ = train(Halved, 10)
    ours, optimizer = train(Halved, 10, precision=8, min_numel=MIN_NUMEL)
    for leaf in leaves(optimizer):
        assert leaf.value.dtype == torch.bfloat16
        assert isinstance(leaf.value, PackedState) == (leaf.value.numel() >= MIN_NUMEL)
    assert (vector(ours) - vector(eager)).norm() < 0.25 * (vector(eager) - start).norm()


class Slow(torch.optim.Optimizer):
    """Lookahead: slow weights, which begin as a copy of the parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for p in self.param_groups[0]["params"]:
            if "slow" not in self.state[p]:
                self.state[p]["slow"] = p.clone()
            p.sub_(p.grad, alpha=0.2)
            self.state[p]["slow"].lerp_(p, 0.5)
            p.copy_(self.state[p]["slow"])


def test_a_copy_of_the_weights_keeps_12_bits() -> None:
    start = vector(make_model())
    eager, _ = train(Slow, 10)
    ours, optimizer = train(Slow, 10, precision=4, min_numel=MIN_NUMEL)
    assert (vector(ours) - vector(eager)).norm() < 0.25 * (vector(eager) - start).norm()
    for row in stq.report(optimizer).rows:
        numel = torch.Size(row.shape).numel()
        assert row.width == (WEIGHTS_WIDTH if numel >= MIN_NUMEL else 32)
        assert numel < MIN_NUMEL or row.reason == "a copy of the weights"

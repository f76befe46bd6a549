"""What the planner does by itself: for sign updates, and when gradients change character."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stq_compile as stq
from stq_compile.backend import session_of
from stq_compile.compiled_step import CompiledStep
from stq_compile.passes.measure import NARROWEST_SUM
from stq_compile.planner.history import History
from stq_compile.planner.planner import CALIBRATIONS, Planner

pytestmark = pytest.mark.usefixtures("one_thread")

INTERVAL = 10
TOLERANCE = 0.15
"""A tolerance whose plan in `true_errors` is no narrower after gradients have grown."""
USED_UP = 0.12
"""A tolerance that the plan of `run` comes within 7% of, before anything changes."""


class SignMomentum(torch.optim.Optimizer):
    """Lion: the update is the sign of an average."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                average = self.state[p]["exp_avg"]
                p.sub_((0.9 * average + 0.1 * p.grad).sign() * group["lr"])
                average.mul_(0.99).add_(p.grad, alpha=0.01)


def planner(optimizer: torch.optim.Optimizer) -> Planner:
    session = session_of(optimizer)
    assert session is not None
    assert session.planner is not None
    return session.planner


class Noisy:
    """A quadratic loss of one matrix, seen through noise of its gradient."""

    def __init__(self, *shape: int, pull: float = 0.3) -> None:
        self.data = torch.Generator().manual_seed(0)
        self.target = torch.randn(shape, generator=self.data)
        self.param = nn.Parameter(torch.zeros(shape))
        self.pull = pull

    def gradient(self) -> Tensor:
        noise = torch.randn(self.param.shape, generator=self.data)
        return (self.param.detach() - self.target) * self.pull + noise


def test_the_momentum_of_a_sign_update_is_kept_wide() -> None:
    """With default options, after the looks at steps 20, 50 and 100."""
    problem = Noisy(64, 64)
    optimizer = stq.compile(SignMomentum([problem.param], lr=1e-3))
    for _ in range(101):
        problem.param.grad = problem.gradient()
        optimizer.step()
    assert planner(optimizer).looks == 3
    assert 5 <= planner(optimizer).widths[0, "exp_avg"] <= 8


def run(
    change: str,
    steps: range,
    compiled: bool = True,
    tolerance: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[Tensor, History | None]:
    """AdamW on one matrix; at ``steps.start`` gradients change character, until ``steps.stop``."""
    problem, zeros = Noisy(64, 64), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW([problem.param], lr=1e-2, betas=betas)
    if compiled:
        stq.compile(optimizer, interval=INTERVAL, tolerance=tolerance)
    for step in range(steps.stop):
        grad = problem.gradient()
        if step >= steps.start and change == "scale":
            grad *= 1000
        elif step >= steps.start and change == "zeros":
            grad *= torch.rand(grad.shape, generator=zeros) > 0.95
        problem.param.grad = grad
        optimizer.step()
    return problem.param.detach(), stq.history(optimizer) if compiled else None


def raised(history: History | None, after: int) -> int:
    """How many widths were raised after a step."""
    records = [] if history is None else [r for r in history if r.step > after]
    return sum(c.before is not None and c.after > c.before for r in records for c in r.changes)


@pytest.mark.parametrize("change", ["scale", "zeros"])
def test_gradients_that_change_character_are_lived_with(change: str) -> None:
    """By a factor of 1000, which raises a width within two intervals where the tolerance is used;
    or to 95% zeros, of which second moments hardly take notice. Without a change none rises.

    The distance to stock AdamW in units of how far that moves was measured as 0.08 for the factor
    and 0.11 for zeros at the default tolerance; it is 0.11 where nothing changes.
    """
    steps = range(65, 65 + 2 * INTERVAL)
    param, history = run(change, steps, tolerance=USED_UP)
    exact, _ = run(change, steps, compiled=False)
    assert change == "zeros" or raised(history, steps.start) >= 1
    assert history is not None
    assert all(r.error <= USED_UP for r in history if r.step > steps.start)
    assert (param - exact).norm() <= 0.2 * exact.norm()


def test_neighbours_of_a_giant_are_given_the_range_that_they_need() -> None:
    """One element in each block has gradients 10,000 times as large. At 8 bits and fewer the others
    would be stored 12 octaves too large, and stand still."""
    torch.manual_seed(0)
    size = torch.ones(64, 128)
    size[:, 5] = 1e4
    ours, exact = (nn.Parameter(torch.zeros(64, 128, dtype=d)) for d in (None, torch.float64))
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = stq.compile(torch.optim.AdamW([ours], **options), interval=INTERVAL)
    stock = torch.optim.AdamW([exact], **options)
    pinned = nn.Parameter(torch.zeros(64, 128))
    narrow = stq.compile(torch.optim.AdamW([pinned], **options), precision=8)
    for _ in range(250):
        grad = (torch.randn(64, 128) + 0.3) * size
        ours.grad, exact.grad, pinned.grad = grad, grad.double(), grad.clone()
        for each in (optimizer, stock, narrow):
            each.step()
    assert planner(optimizer).widths[0, "exp_avg_sq"] > 8
    history = stq.history(optimizer)
    reasons = [c.reason for r in history for c in r.changes if c.state == "exp_avg_sq"]
    assert any("below their block's range" in reason for reason in reasons)

    def drift(param: nn.Parameter) -> float:
        return float(((param - exact).norm() / exact.norm()).detach())

    assert drift(pinned) > 0.9
    assert drift(ours) < 0.7  # what was stored too large before the first look fades by 0.95 a step


def test_gradients_that_stay_as_they_are_raise_none() -> None:
    _, history = run("none", range(65, 85), tolerance=USED_UP)
    assert raised(history, 65) == 0


@pytest.mark.parametrize("change", ["zeros", "none"])
def test_zeros_raise_a_width_where_first_moments_use_up_the_tolerance(change: str) -> None:
    """First moments get worse under zeros, which second ones of a longer memory make up for."""
    steps = range(65, 65 + 2 * INTERVAL)
    _, history = run(change, steps, tolerance=0.0625, betas=(0.9, 0.95))
    assert (raised(history, steps.start) >= 1) == (change == "zeros")


def true_errors(change: str, steps: range) -> tuple[list[float], History]:
    """Relative squared error of every update: AdamW packed and stock on the same gradients.

    The packed one starts each step from the stock one's parameters, so only states differ.
    """
    problem, zeros = Noisy(64, 64), torch.Generator().manual_seed(2)
    packed = nn.Parameter(problem.param.detach().clone())
    stock = torch.optim.AdamW([problem.param], lr=1e-3)
    optimizer = stq.compile(torch.optim.AdamW([packed], lr=1e-3), interval=50, tolerance=TOLERANCE)
    errors = []
    for step in range(1, steps.stop):
        grad = problem.gradient()
        if step >= steps.start:
            grad *= 1000 if change == "scale" else torch.rand(grad.shape, generator=zeros) > 0.95
        before = problem.param.detach().clone()
        problem.param.grad, packed.grad = grad, grad.clone()
        stock.step()
        optimizer.step()
        exact = problem.param.detach() - before
        error = packed.detach() - problem.param.detach()
        errors.append(float(error.square().sum() / exact.square().sum()))
        packed.data.copy_(problem.param.detach())
    history = stq.history(optimizer)
    assert history is not None
    return errors, history


@pytest.mark.parametrize("change", ["scale", "zeros"])
def test_the_true_error_stays_within_the_tolerance(change: str) -> None:
    """Though the next look comes 30 steps after the change, when most of what was to be seen is
    over: what the states remember is small beside gradients 1000 times as large, and a predicted
    error that falls is not believed at once."""
    start = 271
    errors, history = true_errors(change, range(start, start + 130))
    late = torch.tensor(errors).unfold(0, 10, 1).mean(1)[start - 10 :]
    assert float(late.max()) <= TOLERANCE
    narrowed = [
        c
        for r in history
        for c in r.changes
        if start < r.step < start + 60 and c.before is not None and c.after < c.before
    ]
    assert not narrowed


def test_a_sum_is_given_bits_that_it_can_live_with() -> None:
    """Adagrad for 1500 steps: at 4 bits its sums would have run away by then."""
    params = []
    for compiled in (True, False):
        problem = Noisy(64, 64)
        optimizer: torch.optim.Optimizer = torch.optim.Adagrad([problem.param], lr=0.1)
        if compiled:
            optimizer = stq.compile(optimizer)
        for _ in range(1500):
            problem.param.grad = problem.gradient()
            optimizer.step()
        if compiled:
            assert planner(optimizer).widths[0, "sum"] >= NARROWEST_SUM
        params.append(problem.param.detach())
    assert (params[0] - params[1]).norm() <= 0.02 * params[1].norm()


class Fresh(TorchDispatchMode):
    """Notes the largest tensor that an operator makes; views are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.largest = self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.calls += 1
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _memory(made) not in known:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_a_look_needs_no_memory_of_the_parameters_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as tensors nor as arrays, once its kernels are built and calibration is over."""
    problem = Noisy(1024, 1024)
    optimizer = stq.compile(
        torch.optim.AdamW([problem.param], lr=1e-2), interval=1, ladder=(4,), min_numel=64
    )
    for _ in range(CALIBRATIONS + 1):
        problem.param.grad = problem.gradient()
        optimizer.step()
    seen = Fresh()
    look = CompiledStep._look

    def watched(self: CompiledStep, args: Sequence[Any], created: dict[int, Tensor]) -> None:
        tracemalloc.start()
        with seen:
            look(self, args, created)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    peaks: list[int] = []
    monkeypatch.setattr(CompiledStep, "_look", watched)
    looks = planner(optimizer).looks
    optimizer.step()
    assert planner(optimizer).looks == looks + 1
    assert seen.calls > 0
    assert seen.largest < 4 * math.prod(problem.param.shape) / 1000
    assert peaks
    assert max(peaks) < 4 * math.prod(problem.param.shape) / 8

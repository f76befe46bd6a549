"""What the optimizers of collections do beside arithmetic, one small optimizer for each habit.

At width 32 every one takes the eager optimizer's steps; at width 8 its states are packed and its
parameters go the eager optimizer's way.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from stq_compile import PackedState
from stq_compile.errors import EagerStepWarning
from stq_compile.state_tree import leaves

MIN_NUMEL = 64
STEPS = 7


class Base(torch.optim.Optimizer):
    """A step that calls ``update`` for every parameter with a gradient."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group["lr"])
        return loss

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        raise NotImplementedError


class NeedsClosure(Base):
    """Does not ask whether there is a closure, and scales by the loss."""

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]  # torch's is overloaded
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            m.mul_(0.9).add_(p.grad)
            p.sub_(m * loss.clamp(max=1), alpha=0.02)
        return loss


class LateStates(Base):
    """States that are made in the first, the third and the fifth step."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        s["step"] = s.get("step", 0) + 1
        for i, first in enumerate((1, 3, 5)):
            if s["step"] >= first:
                if f"m{i}" not in s:
                    s[f"m{i}"] = torch.zeros_like(p)
                s[f"m{i}"].lerp_(p.grad, 0.1 * (i + 1))
                p.sub_(s[f"m{i}"], alpha=lr)


class InContainers(Base):
    """States in a list, a deque, a nested dict, a tuple and an object."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["list"] = [torch.zeros_like(p) for _ in range(2)]
            s["nested"] = defaultdict(dict)
            s["nested"]["a"]["b"] = torch.zeros_like(p)
            s["queue"] = deque([p.grad.clone()], maxlen=3)
            s["object"] = SimpleNamespace(m=torch.zeros_like(p))
        else:
            s["queue"].append(p.grad.clone())
        for i, m in enumerate([*s["list"], s["nested"]["a"]["b"], s["object"].m]):
            m.mul_(0.5 + 0.1 * i).add_(p.grad)
            p.sub_(m, alpha=lr / 4)
        p.sub_(s["queue"][0], alpha=lr)


class PythonNumbers(Base):
    """Numbers of Python among the states, whole ones and others."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(step=0, beta=0.5, m=torch.zeros_like(p))
        s["step"] += 1
        s["beta"] = 1 - (1 - s["beta"]) * 0.9
        s["m"].mul_(s["beta"]).add_(p.grad, alpha=1 - s["beta"])
        p.sub_(s["m"] / (1 - 0.5 ** s["step"]), alpha=lr * math.sqrt(s["step"]))


class Centralized(Base):
    """Takes the mean out of the gradient, in place."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if p.ndim > 1:
            p.grad.add_(-p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True))
        if not s:
            s["m"] = torch.zeros_like(p)
        s["m"].mul_(0.9).add_(p.grad)
        p.data.add_(s["m"], alpha=-lr)


class Branches(Base):
    """Goes another way by a value that it reads."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["m"] = torch.zeros_like(p)
        s["m"].mul_(0.9).add_(p.grad)
        if s["m"].norm().item() > 1:
            lr = lr / s["m"].norm().item()
        p.add_(s["m"], alpha=-lr)


class Aliases(Base):
    """Keeps the parameter itself among its states, and a view of its memory."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(me=p, view=p.data, m=torch.zeros_like(p))
        s["m"].mul_(0.9).add_(p.grad)
        s["view"].sub_(s["m"], alpha=lr)
        s["me"].mul_(0.999)


class SetsData(Base):
    """Gives the parameter new memory, and makes new states in place of the old ones."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["m"] = torch.zeros_like(p)
        s["m"] = 0.9 * s["m"] + p.grad
        p.data = p.data - lr * s["m"]


class OtherDtypes(Base):
    """States in bfloat16, whole numbers and truth values."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["half"] = torch.zeros_like(p, dtype=torch.bfloat16)
            s["count"] = torch.zeros_like(p, dtype=torch.int64)
            s["positive"] = torch.zeros_like(p, dtype=torch.bool)
            s["m"] = torch.zeros_like(p)
        s["half"].mul_(0.9).add_(p.grad.bfloat16())
        s["count"].add_(p.grad > 0)
        s["positive"].copy_(s["half"] > 0)
        s["m"].mul_(0.9).add_(torch.where(s["positive"], p.grad, 0.5 * p.grad))
        p.sub_(s["m"] / (1 + 0.01 * s["count"]), alpha=lr)


class Spectral(Base):
    """Smooths the momentum in the frequencies of its rows."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["m"] = torch.zeros_like(p)
        s["m"].mul_(0.9).add_(p.grad)
        frequencies = torch.fft.rfft(s["m"])
        p.sub_(torch.fft.irfft(frequencies * 0.8, n=p.shape[-1]), alpha=lr)


class Foreach(Base):
    """Lists of tensors, and the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["m"] = torch.zeros_like(p)
                self.state[p]["v"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        ms = [self.state[p]["m"] for p in params]
        vs = [self.state[p]["v"] for p in params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_lerp_(ms, torch._foreach_div(grads, norm.clamp(min=1)), 0.1)
        torch._foreach_mul_(vs, 0.99)
        torch._foreach_addcmul_(vs, grads, grads, value=0.01)
        root = torch._foreach_sqrt(vs)
        torch._foreach_add_(root, 1e-3)
        torch._foreach_addcdiv_(params, ms, root, value=-self.param_groups[0]["lr"])


class Outside(Base):
    """Tensors that are the optimizer's own, or the group's, and no parameter's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not hasattr(self, "scale"):
            self.scale = torch.ones(())
            self.buffers = {p: torch.zeros_like(p) for p in self.param_groups[0]["params"]}
            self.param_groups[0]["total"] = torch.zeros(())
            self.state["all"]["sum"] = torch.zeros(100)
        for group in self.param_groups:
            for p in group["params"]:
                self.buffers[p].mul_(0.9).add_(p.grad)
                group["total"].add_(p.grad.square().mean())
                self.state["all"]["sum"].add_(p.grad.flatten()[:100].sum())
                self.scale.mul_(0.99)
                p.sub_(self.buffers[p] / (1 + group["total"]) * self.scale, alpha=group["lr"])


class Wrapper(torch.optim.Optimizer):
    """Lookahead around another optimizer, with whose groups it is made."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.AdamW(params, lr=0.01)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.calls % 3 == 0:
                    slow.lerp_(p.detach(), 0.5)
                    p.data.copy_(slow)
        return loss


class Noisy(Base):
    """Adds noise to the gradient."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["m"] = torch.zeros_like(p)
        s["m"].mul_(0.9).add_(p.grad + 0.01 * torch.randn_like(p))
        p.sub_(s["m"], alpha=lr)


class Every(Base):
    """Another branch in every third step, and another warmup factor in each."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(step=torch.zeros(()), n=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        s["step"] += 1
        s["n"] += 1
        s["m"].lerp_(p.grad, 0.1)
        if s["n"] % 3 == 1:
            s["v"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
        warmup = min(1.0, s["n"] / 4)
        p.sub_(s["m"] / (s["v"].sqrt() + 0.1), alpha=lr * warmup)


class TwoSteps(Base):
    """Sharpness-aware in two calls of the user's; ``step`` is both of them with a closure."""

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            m.mul_(0.9).add_(p.grad)
            p.data = self.state[p]["old"]
            p.sub_(m, alpha=0.02)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        loss = closure()
        self.second_step()
        return loss


class TwoPasses(Base):
    """Estimates of either sign for all parameters first, in a state; then their squares divide."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        for p in params:
            if "estimate" in self.state[p]:
                self.state[p]["estimate"].zero_()
            else:
                self.state[p]["estimate"] = torch.zeros_like(p)
        for p in params:
            scales = torch.exp2(torch.randint(-8, 1, p.shape))
            self.state[p]["estimate"].addcmul_(scales, torch.randn_like(p).sign())
        for p in params:
            s = self.state[p]
            if "m" not in s:
                s.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
            s["m"].lerp_(p.grad, 0.1)
            s["v"].mul_(0.9).addcmul_(s["estimate"], s["estimate"], value=0.1)
            p.addcdiv_(s["m"], s["v"].sqrt().add_(1e-16), value=-1e-3)


class KeepsGradient(Base):
    """The gradient itself is the state that the next step compares with."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(m=torch.zeros_like(p), last=torch.zeros_like(p))
        s["m"].mul_(0.9).add_(p.grad / (1 + torch.exp(-(s["last"] - p.grad).abs())))
        s["last"] = p.grad
        p.sub_(s["m"], alpha=lr)


class Unmade(torch.optim.Optimizer):
    """A wrapper that never calls ``Optimizer.__init__`` and has no hooks (torch_optimizer's
    Lookahead)."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.AdamW(params, lr=0.01)
        self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults
        self.state = defaultdict(dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            slow.lerp_(p.detach(), 0.5)
            p.data.copy_(slow)
        return loss


class Literals(Base):
    """Counters made of numbers inside the step, one of them whole."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(n=torch.tensor(0), t=torch.tensor(0.0), m=torch.zeros_like(p))
        s["n"] += 1
        s["t"] += 1
        s["m"].lerp_(p.grad, 0.1)
        p.sub_(s["m"] / (1 - 0.9 ** s["t"]) / s["n"] ** 0.5, alpha=lr)


class Copies(Base):
    """Keeps a copy of the weights that moves by less than bfloat16 can tell (A2Grad, Ranger)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(x=p.detach().clone(), m=torch.zeros_like(p))
        s["m"].mul_(0.9).add_(p.grad, alpha=0.1)
        s["x"].sub_(s["m"], alpha=0.4 * lr)
        p.lerp_(s["x"], 0.5).sub_(p.grad, alpha=0.16 * lr)


OPTIMIZERS = [
    NeedsClosure, LateStates, InContainers, PythonNumbers, Centralized, Branches, Aliases, SetsData,
    OtherDtypes, Spectral, Foreach, Outside, Wrapper, Noisy, Every, TwoSteps, TwoPasses,
    KeepsGradient, Unmade, Literals, Copies,
]  # fmt: skip
CLOSURE = (NeedsClosure, TwoSteps)


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in ((12, 20), (20,), (16, 12))]


def run(cls: Any, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Steps down a bowl whose centre moves, so that gradients depend on the parameters."""
    params = make_params()
    optimizer = cls(params)
    if options:
        stq.compile(optimizer, **options)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            targets = [torch.randn(p.shape, generator=generator) for p in params]
            loss = sum(((p - t) ** 2).sum() / 8 for p, t in zip(params, targets, strict=True))
            loss.backward()  # type: ignore[union-attr]  # there is a parameter
            return loss  # type: ignore[return-value]

        torch.manual_seed(step)
        if cls in CLOSURE:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return params, optimizer


def vector(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


@dataclass
class Ways:
    """A run of an optimizer as it comes, and two of it compiled."""

    eager: list[nn.Parameter]
    ours: list[nn.Parameter]  # at 32 bits
    optimizer: torch.optim.Optimizer
    packed: list[nn.Parameter]  # at 8 bits
    packed_optimizer: torch.optim.Optimizer

    @property
    def distance(self) -> float:
        """How far the packed run ends from the eager one, in units of how far that went."""
        moved = (vector(self.eager) - vector(make_params())).norm()
        return float((vector(self.packed) - vector(self.eager)).norm() / moved)


def run_all_ways(cls: Any) -> Ways:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EagerStepWarning)
        eager, _ = run(cls)
        ours, optimizer = run(cls, precision=32)
        packed, packed_optimizer = run(cls, precision=8, min_numel=MIN_NUMEL)
    return Ways(eager, ours, optimizer, packed, packed_optimizer)


FAST = (KeepsGradient, Unmade, Literals, Copies)


@pytest.mark.parametrize(
    "cls", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in OPTIMIZERS]
)
def test_it_takes_the_eager_optimizers_steps(cls: Any) -> None:
    ways = run_all_ways(cls)
    torch.testing.assert_close(ways.ours, ways.eager, rtol=1e-5, atol=1e-6)
    assert stq.report(ways.optimizer).compiles <= 4
    assert ways.distance < 0.25
    memory = {p.untyped_storage().data_ptr() for p in ways.packed}
    for leaf in leaves(ways.packed_optimizer):
        if leaf.value.dtype == torch.float32 and leaf.value.numel() >= MIN_NUMEL:
            mine = isinstance(leaf.value, PackedState)
            assert mine or leaf.value.untyped_storage().data_ptr() in memory, leaf.key


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_kept_gradient_is_the_next_one_if_that_is_written_into_it(set_to_none: bool) -> None:
    """As in the eager step: ``zero_grad(set_to_none=False)`` and accumulation change the state."""
    found = []
    for options in ({}, {"precision": 32}, {"precision": 8, "min_numel": MIN_NUMEL}):
        params = make_params()
        optimizer = KeepsGradient(params)
        if options:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EagerStepWarning)
                stq.compile(optimizer, **options)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=set_to_none)
            for p in params:
                grad = torch.randn(p.shape)
                p.grad = grad if p.grad is None else p.grad.add_(grad)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EagerStepWarning)
                optimizer.step()
        found.append(vector(params))
        last = optimizer.state[params[0]]["last"]
        assert isinstance(last, PackedState) == (options.get("precision") == 8)
    moved = (found[0] - vector(make_params())).norm()
    torch.testing.assert_close(found[1], found[0])
    assert (found[2] - found[0]).norm() < 0.05 * moved


def test_a_copy_of_the_weights_has_12_bits() -> None:
    _, optimizer = run(Copies, precision=8, min_numel=MIN_NUMEL)
    found = {(r.state, r.width) for r in stq.report(optimizer).rows if math.prod(r.shape) >= 64}
    assert found == {("x", 12), ("m", 8)}

"""Steps that go on from an inherited step are captured with it, as one graph."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stq_compile as stq
from stq_compile.errors import EagerStepWarning
from stq_compile.steps import captured_step, raw_step

FACTOR = 0.5


class Clipped(torch.optim.AdamW):
    """AdamW with the gradients clipped before, and a decay of its own after."""

    # torch's is overloaded
    @torch.no_grad()
    def step(self, closure: Any = None, *, decay: float = 0.01) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.clamp_(-FACTOR, FACTOR)
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - decay)
        return loss


class Twice(Clipped):
    """Goes on from a step that goes on from another one."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # torch's is overloaded
        return super().step(closure, decay=0.0) or super().step()


class Private(torch.optim.SGD):
    """Its source does not stand alone: Python completes the name by that of the class."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # torch's is overloaded
        self.__clip()
        return super().step(closure)

    def __clip(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad.clamp_(-FACTOR, FACTOR)


def make_params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(40, 50)), nn.Parameter(torch.randn(50))]


def vector(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def run(cls: Any, **options: Any) -> tuple[Tensor, torch.optim.Optimizer]:
    params = make_params()
    optimizer = cls(params, lr=0.01)
    if options:
        stq.compile(optimizer, **options)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return vector(params), optimizer


@pytest.mark.parametrize("cls", [Clipped, Twice])
def test_the_inherited_step_is_part_of_the_graph(cls: Any) -> None:
    eager, _ = run(cls)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerStepWarning)
        ours, optimizer = run(cls, precision=32)
        packed, packed_optimizer = run(cls, precision=8, min_numel=1000)
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)
    assert (packed - eager).norm() < 0.1 * (eager - vector(make_params())).norm()
    assert stq.report(optimizer).compiles == 1
    assert stq.report(packed_optimizer).bits_per_element < 10


def test_a_step_that_does_not_stand_alone_runs_eagerly() -> None:
    eager, _ = run(Private)
    with pytest.warns(EagerStepWarning, match="super"):
        ours, _ = run(Private, precision=32)
    assert torch.equal(ours, eager)


def test_only_inherited_steps_change_and_lines_stay() -> None:
    assert captured_step(torch.optim.AdamW) is raw_step(torch.optim.AdamW)
    found, raw = captured_step(Clipped), raw_step(Clipped)
    assert found.__code__.co_firstlineno == raw.__code__.co_firstlineno + 1  # no decorator
    lines = [{n for *_, n in f.__code__.co_lines() if n} for f in (found, raw)]
    assert lines[0] - lines[1] <= {found.__code__.co_firstlineno}
    assert found.__kwdefaults__ == {"decay": 0.01}

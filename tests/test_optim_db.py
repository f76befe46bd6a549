"""torch's own database of optimizers, every listed combination of options, in every form.

At width 32 a step is the eager step's; at width 8 the states are packed and the parameters move as
eager's do. What is not compiled is refused, with the reason that `REFUSED` expects, and goes on
working as the stock optimizer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerInput, optim_db

import stq_compile as stq
from stq_compile import PackedState
from stq_compile.backend import session_of
from stq_compile.errors import EagerStepWarning, UnsupportedOptimizerError

STEPS = 5
MIN_NUMEL = 64

REFUSED = {
    "LBFGS": "line search",
    "SparseAdam": "sparse gradients",
    "fused": "hides its arithmetic",
    "differentiable": "autograd sees",
}
"""By the name of the optimizer, or of the form: what the refusal says."""


@dataclass(frozen=True)
class Case:
    """One entry of the database in one form."""

    cls: type[torch.optim.Optimizer]
    entry: OptimizerInput
    form: str

    @property
    def label(self) -> str:
        return f"{self.cls.__name__}-{self.form}-{self.entry.desc}"

    @property
    def options(self) -> dict[str, Any]:
        form = {} if self.form == "only" else {"foreach": self.form == "foreach"}
        if self.form in ("fused", "differentiable"):
            form = {self.form: True}
        return copy.deepcopy(self.entry.kwargs) | form

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Muon is for matrices."""
        mine = [p for p in params if p.ndim == 2] if self.cls is torch.optim.Muon else params
        return self.cls(mine, **self.options)  # type: ignore[call-arg]  # each has its own


def cases() -> Iterator[Case]:
    for info in optim_db:
        forms = [f for f in info.supported_impls if f != "foreach"]
        forms += ["for-loop", "foreach"] if "foreach" in info.supported_impls else ["only"]
        for entry in info.optim_inputs_func(device="cpu"):
            yield from (Case(info.optim_cls, entry, form) for form in forms)


def is_refused(case: Case) -> bool:
    return case.cls.__name__ in REFUSED or case.form in REFUSED


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((12, 20), (20,), (6, 12), (6,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def run(case: Case, **options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Some steps, compiled if there are options; every step must be."""
    params = make_params()
    optimizer = case.optimizer(params)
    if options:
        stq.compile(optimizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerStepWarning)
        for step in range(STEPS):
            set_gradients(params, step)
            optimizer.step()
    return params, optimizer


def vector(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


FAST = ("Adam-foreach-amsgrad", "SGD-for-loop-nesterov", "Adafactor-foreach-maximize")
RUN = [
    pytest.param(case, id=case.label, marks=() if case.label in FAST else pytest.mark.slow)
    for case in cases()
    if not is_refused(case)
]
NOT_RUN = [pytest.param(case, id=case.label) for case in cases() if is_refused(case)]


@pytest.mark.parametrize("case", RUN)
def test_entry(case: Case) -> None:
    try:
        eager, _ = run(case)
    except RuntimeError as error:  # what torch itself refuses on this device
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            run(case, precision=32)
        return
    ours, optimizer = run(case, precision=32)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert stq.report(optimizer).compiles <= 4

    packed, optimizer = run(case, precision=8, min_numel=MIN_NUMEL)
    large = [p for p in packed if p.numel() >= MIN_NUMEL]
    states = [
        v for p in large for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)
    ]
    for state in states:
        if state.numel() >= MIN_NUMEL and state.dtype == torch.float32:
            assert isinstance(state, PackedState)
    moved = vector(eager) - vector(make_params())
    assert (vector(packed) - vector(eager)).norm() <= 0.25 * moved.norm()


@pytest.mark.parametrize("case", NOT_RUN)
def test_refused(case: Case) -> None:
    params = make_params()
    try:
        optimizer = case.optimizer(params)
    except RuntimeError:  # torch refuses the form with these options
        return
    before = copy.deepcopy(optimizer.state_dict())
    reason = REFUSED.get(case.cls.__name__) or REFUSED[case.form]
    with pytest.raises(UnsupportedOptimizerError, match=reason):
        stq.compile(optimizer)
    assert session_of(optimizer) is None
    assert "step" not in vars(optimizer)
    assert str(optimizer.state_dict()) == str(before)  # numbers, strings, small tensors

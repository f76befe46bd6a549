"""A step that is taken through the compiler without being run is the step that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import stq_compile as stq
from models import make_model
from stq_compile.backend import session_of
from stq_compile.errors import InfeasibleBudgetError, UnsupportedOperatorError
from stq_compile.inspection import inspect_optimizer
from stq_compile.options import Options
from stq_compile.targets import make_optimizer

SHAPES = {"a.weight": (64, 128), "a.bias": (64,), "b.weight": (64, 128), "b.bias": (64,)}


class Lazy(Optimizer):
    """Makes its state in the first step, as many third-party optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                state["average"].lerp_(p.grad, 0.1)
                p.sub_(state["average"], alpha=group["lr"])


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own: matrices and the rest."""
    named = list(model.named_parameters())
    return [
        {"params": [p for p in named if p[1].ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named if p[1].ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"target_bits": 5.0},
        pytest.param({"precision": 4}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_formats_and_kernels_are_those_of_the_first_step(options: dict[str, Any]) -> None:
    options = {**options, "min_numel": 64}
    model = make_model()
    optimizer = torch.optim.AdamW(groups(model))
    found = inspect_optimizer(optimizer, Options.from_dict(options))
    expected = {str(o.source): f.name for o, f in found.states() if o.shape != ()}
    sources = {row["source"] for row in found.kernels()}

    optimizer = stq.compile(torch.optim.AdamW(groups(model)), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rows = [r for r in stq.report(optimizer).rows if r.shape != ()]
    assert {f"{r.param}:{r.state}": r.format for r in rows} == expected
    session = session_of(optimizer)
    assert session is not None
    (step,) = session.compiled
    assert {bucket.unit.compiled.source for bucket in step.buckets} == sources


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop, Lazy])
def test_one_of_each_class_stands_for_all(cls: Any) -> None:
    model = nn.Sequential(*(nn.Linear(80, 80) for _ in range(3)), nn.LayerNorm(80))

    def make() -> Optimizer:
        made: Optimizer = cls(groups(model) if cls is not Lazy else model.parameters())
        return made

    options = Options(target_bits=4.5)
    whole = inspect_optimizer(make(), options)
    for p in model.parameters():
        p.grad = None
    optimizer = make()
    few = inspect_optimizer(optimizer, options, whole=False)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8
    assert few.captured.program.nodes < whole.captured.program.nodes
    assert str(few.quantized) == str(whole.quantized)
    assert [unit.instances for unit in few.front.units] == [
        unit.instances for unit in whole.front.units
    ]
    assert few.session.plan == whole.session.plan


def test_nothing_is_compiled_and_parameters_stay() -> None:
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    inspect_optimizer(optimizer, Options())
    assert session_of(optimizer) is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step()


def test_a_class_gets_parameters_without_memory() -> None:
    optimizer = make_optimizer("AdamW", {"huge": (1 << 20, 1 << 20)})
    found = inspect_optimizer(optimizer, Options())
    assert [o.shape for o, _ in found.states() if o.shape != ()] == [(1 << 20, 1 << 20)] * 2


def test_the_graph_is_that_of_parameters_on_the_cpu() -> None:
    """On the meta device optimizers take their branch for accelerators."""
    real = torch.optim.NAdam([(n, nn.Parameter(torch.ones(s))) for n, s in SHAPES.items()])
    fake = make_optimizer("NAdam", SHAPES)
    graphs = [str(inspect_optimizer(o, Options()).quantized) for o in (real, fake)]
    assert graphs[0] == graphs[1]


def test_refusals_keep_the_stages_before() -> None:
    found = inspect_optimizer(make_optimizer("refused_target:make"), Options())
    assert isinstance(found.refused, UnsupportedOperatorError)
    assert [s.name for s in found.stages[:4]] == ["input", "expand_foreach", "split", "fold"]
    assert "partition" not in [s.name for s in found.stages]
    for look in (found.states, found.kernels):
        with pytest.raises(UnsupportedOperatorError):
            look()


def test_options_that_cannot_be_kept_to_are_an_error() -> None:
    with pytest.raises(InfeasibleBudgetError):
        inspect_optimizer(make_optimizer("AdamW"), Options(target_bits=0.5))

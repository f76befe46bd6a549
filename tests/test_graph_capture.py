"""Steps that are captured in a CUDA graph: what is refused, and what the host leaves alone then.

There is no GPU; that a graph is being captured is what torch is made to say. What a replay does is
in `test_interpreted_runs`, and the real thing in `test_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import stq_compile as stq
from stq_compile import runtime
from stq_compile import session as session_module
from stq_compile.backend import session_of
from stq_compile.codegen.cpp.build import CompiledRun
from stq_compile.codegen.lower import lower
from stq_compile.errors import StepCaptureError
from stq_compile.step_graph import Role, StepGraph

Capturing = Callable[[bool], None]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Capturing:
    """Says whether torch is capturing; it is not at first."""
    now = [False]
    monkeypatch.setattr(runtime, "HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0])
    return lambda value: now.__setitem__(0, value)


def compiled(make: Callable[[list[Parameter]], Optimizer], **options: Any) -> Optimizer:
    params = [Parameter(torch.randn(40, 30)) for _ in range(2)]
    for p in params:
        p.grad = torch.randn_like(p)
    return stq.compile(make(params), min_numel=100, **options)


def assert_refused(optimizer: Optimizer, match: str, capturing: Capturing) -> None:
    """The step is refused, changes nothing, and can be made afterwards."""
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    capturing(True)
    with pytest.raises(StepCaptureError, match=match):
        optimizer.step()
    capturing(False)
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_a_step_must_be_compiled_first(capturing: Capturing) -> None:
    optimizer = compiled(torch.optim.AdamW, precision=4)
    assert_refused(optimizer, r"AdamW: .*not compiled yet.*\n.*step\(\) once", capturing)
    capturing(True)
    optimizer.step()
    capturing(False)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_refused(optimizer, "not compiled yet", capturing)


def test_other_gradients_than_before_must_be_compiled_first(capturing: Capturing) -> None:
    optimizer = compiled(torch.optim.AdamW, precision=4)
    optimizer.step()
    optimizer.param_groups[0]["params"][1].grad = None
    assert_refused(optimizer, "not compiled yet", capturing)


def test_gradients_that_are_looked_at_are_refused(capturing: Capturing) -> None:
    optimizer = compiled(torch.optim.AdamW, precision=4, on_nonfinite="skip")
    optimizer.step()
    assert_refused(optimizer, "on_nonfinite='skip' looks at every gradient", capturing)


def test_a_step_that_runs_operator_by_operator_is_refused(capturing: Capturing) -> None:
    optimizer = compiled(torch.optim.Adafactor, precision=8)
    optimizer.step()
    assert_refused(optimizer, "operator by operator", capturing)


@pytest.mark.slow
def test_nothing_is_looked_at_during_a_capture_or_planned_after_it(
    capturing: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = compiled(torch.optim.AdamW, interval=1, dwell=0)
    for _ in range(3):
        optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    assert session.planner is not None
    looks, waits = session.planner.looks, list[int]()
    monkeypatch.setattr(session_module, "find_reached", lambda s: waits.append(s.steps))
    capturing(True)
    optimizer.step()
    assert not waits
    capturing(False)
    optimizer.step()
    assert waits
    assert session.planner.looks == looks


def test_what_a_graph_holds_stays_and_is_counted(
    capturing: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though kernels were built anew since; and nothing is kept where nothing was captured."""
    optimizer = compiled(torch.optim.AdamW, precision=4)
    optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    (step,) = session.compiled
    (first,) = step.buckets
    session.change_widths({(0, "exp_avg"): 5, (1, "exp_avg"): 5})
    assert step.recorded == []
    capturing(True)
    optimizer.step()
    capturing(False)
    (held,) = step.buckets
    assert held is not first
    session.change_widths({(0, "exp_avg"): 6, (1, "exp_avg"): 6})
    assert step.recorded == [[held]]
    replays = {id(held.run): 3}  # beyond its capture
    monkeypatch.setattr(CompiledRun, "replayed", lambda run: replays.pop(id(run), 0))
    for _ in range(2):
        saved = optimizer.state_dict()
        assert saved["stq"]["steps"] == 2 + 3
    replays[id(held.run)] = 1
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["stq"]["steps"] == 2 + 3


# Hyperparameters that are tensors on the device. ----------------------------------------------


def captured_unit(make: Callable[..., Optimizer], lr: torch.Tensor) -> StepGraph:
    optimizer = compiled(lambda params: make(params, lr=lr), precision=4)
    optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    (step,) = session.compiled
    (bucket,) = step.buckets
    return bucket.unit.graph


def moved(unit: StepGraph, *, scalars: bool) -> StepGraph:
    """As if on a GPU, with its scalars or with these on the CPU."""
    instances = []
    for instance in unit.instances:
        operands = (
            replace(o, device=CUDA) if scalars or o.role is not Role.SCALAR else o
            for o in instance.operands
        )
        instances.append(replace(instance, operands=tuple(operands)))
    return unit.replace(instances=tuple(instances))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_beside_the_parameters_is_read_by_the_kernel(
    make: Callable[..., Optimizer], dtype: torch.dtype
) -> None:
    """On a GPU. What lies elsewhere, and everything on the CPU, is read by the host."""
    unit = captured_unit(make, torch.tensor(1e-2, dtype=dtype))
    for graph, resident in (
        (unit, False),
        (moved(unit, scalars=False), False),
        (moved(unit, scalars=True), True),
    ):
        kernel = lower(graph, resident=graph is not unit)
        (operand,) = [o for o in kernel.operands if "lr" in o.name]
        reads = {v.opcode for v in kernel.body if v.operand == operand.name}
        assert operand.kind == ("scalar" if resident else "number")
        assert reads == ({"load_scalar"} if resident else {"argument"})
        assert operand.dtype == (str(dtype).removeprefix("torch.") if resident else "float32")


def test_a_number_that_changes_is_passed_by_the_host() -> None:
    """Dynamo makes a tensor of it, on the CPU."""
    optimizer = compiled(lambda params: torch.optim.SGD(params, lr=1e-2), precision=4)
    for turn in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 / (turn + 1)
        optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    units = [bucket.unit.graph for step in session.compiled for bucket in step.buckets]
    kernels = [lower(moved(unit, scalars=False), resident=True) for unit in units]
    kinds = [{o.kind for o in k.operands if "lr" in o.name} for k in kernels]
    assert {"number"} in kinds
    assert {"scalar"} not in kinds

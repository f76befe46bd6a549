"""Gradients that are not finite: let through as by the stock optimizer, left out whole, refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn

import stq_compile as stq
from models import backward, equal, loss_of, make_model
from processes import run_processes
from sharded import differing, make, mesh_of, outcome, run, step
from stepwise import Stepwise
from stq_compile import PackedState, nonfinite
from stq_compile.backend import session_of
from stq_compile.errors import (
    EagerStepWarning,
    InvalidOptionError,
    NonFiniteGradientError,
    UnskippableStepError,
)
from stq_compile.formats import FORMATS
from stq_compile.reporting import run_file
from stq_compile.state_tree import leaves
from stq_compile.storage import PackedStorage

PACKED = {"precision": 4, "min_numel": 64}
PLANNED = {"min_numel": 64, "interval": 3}
BAD = {2, 3, 6}
"""Numbers of the gradients that are not finite."""
STEPS = 9
VALUES = [float("nan"), float("inf"), -float("inf")]

Make = Callable[[Any], torch.optim.Optimizer]


class Counting(Stepwise):
    """A Python step counter, and a state made in the step."""

    def update(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"], state["m"] = 0, torch.zeros_like(p)
        state["step"] += 1
        state["m"].lerp_(p.grad, 0.1)
        p.sub_(state["m"], alpha=group["lr"] / (1 - 0.9 ** state["step"]))


class Breaking(Counting):
    """The same with a graph break."""

    def update(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        print(end="")  # a graph break
        super().update(p, state, group)


class SharpnessAware(torch.optim.Optimizer):
    """Moves the parameters before it calls the closure again."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # torch's is overloaded
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            closure()
        moves = [0.01 * p.grad for p in params]
        torch._foreach_add_(params, moves)
        for group in self.param_groups:
            group["calls"] += 1
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(params, moves)
        for p in params:
            state = self.state[p]
            if not state:
                state["m"] = torch.zeros_like(p)
            state["m"].lerp_(p.grad, 0.1)
            p.sub_(state["m"], alpha=0.01)
        return loss


def muon(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([(n, p) for n, p in params if p.ndim == 2], lr=1e-2)


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Lion": lambda params: Lion(params, lr=1e-3),
    "a region": muon,
    "counted in Python": Counting,
    "eager": Breaking,
}  # fmt: skip


def poisoned(model: nn.Module, number: int, value: float, element: int = 7) -> None:
    """The gradients of a step, one element of the second matrix not finite if it is a bad one."""
    backward(model, number)
    if number in BAD:
        dict(model.named_parameters())["2.weight"].grad.view(-1)[element] = value


def compiled(make: Make, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return stq.compile(make(model.named_parameters()), **options)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every bit of the states: codes and scales of packed ones."""
    found: list[Tensor] = []
    for leaf in leaves(optimizer):
        value = leaf.value
        packed = isinstance(value, PackedState)
        found += [value.packed.codes, value.packed.scales] if packed else [value]
    return [t.clone() for t in found]


def numbers_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What is counted in Python."""
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, int)]
    return states + [group.get("calls") for group in optimizer.param_groups]


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    return equal(state_of(a), state_of(b)) and numbers_of(a) == numbers_of(b)


@pytest.fixture(autouse=True)
def _alone() -> Any:
    """Nothing of other tests counts against Dynamo's limit of compilations of one function."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EagerStepWarning)
        yield


# skip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", PLANNED), *((name, PACKED) for name in OPTIMIZERS)],
    ids=["planned", *OPTIMIZERS],
)
def test_skipped_steps_leave_no_trace(name: str, options: dict[str, Any]) -> None:
    """The run is, bit for bit, the one in which those steps were never asked for."""
    model, other = make_model(), make_model()
    optimizer = compiled(OPTIMIZERS[name], model, on_nonfinite="skip", **options)
    expected = compiled(OPTIMIZERS[name], other, **options)
    for number in range(STEPS):
        poisoned(model, number, VALUES[number % 3])
        optimizer.step()
        if number not in BAD:
            backward(other, number)
            expected.step()
    assert equal(model.parameters(), other.parameters())
    assert same(optimizer, expected)
    report = stq.report(optimizer)
    assert report.rows == stq.report(expected).rows
    assert report.nonfinite_steps == len(BAD)
    incidents = stq.history(optimizer).incidents
    assert [(i.step, i.outcome) for i in incidents] == [
        (3, "skipped"),
        (3, "skipped"),
        (5, "skipped"),
    ]
    assert "3 steps not made" in str(report)


def test_a_bad_first_step_is_skipped_too() -> None:
    model, other = make_model(), make_model()
    optimizer = compiled(OPTIMIZERS["AdamW"], model, on_nonfinite="skip", **PACKED)
    expected = compiled(OPTIMIZERS["AdamW"], other, **PACKED)
    for number in (2, 3, 0, 1):
        poisoned(model, number, float("nan"))
        optimizer.step()
    for number in (0, 1):
        backward(other, number)
        expected.step()
    assert equal(model.parameters(), other.parameters())
    assert same(optimizer, expected)


def test_a_closure_is_called_and_its_loss_returned() -> None:
    model, other = make_model(), make_model()
    optimizer = compiled(OPTIMIZERS["AdamW"], model, on_nonfinite="skip", **PACKED)
    expected = compiled(OPTIMIZERS["AdamW"], other, **PACKED)
    for number in range(STEPS):

        def closure(number: int = number) -> Tensor:
            poisoned(model, number, float("inf"))
            return loss_of(model, number)

        assert torch.equal(optimizer.step(closure), loss_of(other, number))
        if number not in BAD:
            backward(other, number)
            expected.step()
    assert equal(model.parameters(), other.parameters())
    assert same(optimizer, expected)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_a_step_that_has_moved_the_parameters_is_taken_back(mode: str, call: int) -> None:
    """The closure's gradients are not finite when it is called the first or the second time."""
    model, other = make_model(), make_model()
    optimizer = compiled(SharpnessAware, model, on_nonfinite=mode, **PACKED)
    expected = compiled(SharpnessAware, other, **PACKED)
    for number in range(STEPS):
        calls = 0

        def closure(number: int = number) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == call:
                poisoned(model, number, float("nan"))
            else:
                backward(model, number)
            return loss_of(model, number)

        def clean(number: int = number) -> Tensor:
            backward(other, number)
            return loss_of(other, number)

        if mode == "raise" and number in BAD:
            with pytest.raises(NonFiniteGradientError):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        if number not in BAD:
            expected.step(clean)
    assert equal(model.parameters(), other.parameters())
    assert same(optimizer, expected)


def test_string_form_skips_whole_or_says_that_it_cannot() -> None:
    for name, whole in (("AdamW", True), ("counted in Python", False)):
        model, other = make_model(), make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        expected = OPTIMIZERS[name](other.parameters())
        ours = torch.compile(
            optimizer.step, backend="stq", options={**PACKED, "on_nonfinite": "skip"}
        )
        theirs = torch.compile(expected.step, backend="stq", options=PACKED)
        for number in range(STEPS):
            poisoned(model, number, float("nan"))
            if whole or number not in BAD:
                ours()
            else:
                with pytest.raises(UnskippableStepError, match=r"use stq.compile"):
                    ours()
            if number not in BAD:
                backward(other, number)
                theirs()
        assert equal(model.parameters(), other.parameters())
        assert same(optimizer, expected)


def test_large_finite_gradients_are_no_reason_to_skip() -> None:
    """Their sum overflows."""
    model = make_model()
    optimizer = compiled(OPTIMIZERS["SGD"], model, on_nonfinite="raise", **PACKED)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# raise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "a region", "counted in Python", "eager"])
def test_the_error_names_the_parameter_and_nothing_has_changed(name: str) -> None:
    model = make_model()
    optimizer = compiled(OPTIMIZERS[name], model, on_nonfinite="raise", **PACKED)
    for number in range(2):
        backward(model, number)
        optimizer.step()
    params, states = copy.deepcopy(list(model.parameters())), state_of(optimizer)
    counted = numbers_of(optimizer)
    poisoned(model, 2, float("nan"))
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(NonFiniteGradientError, match=r"step 3: the gradient of 2\.weight is not"):
        optimizer.step()
    assert equal(params, model.parameters())
    assert equal(states, state_of(optimizer))
    assert counted == numbers_of(optimizer)
    left = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(grads, left, strict=True))
    backward(model, 3)
    optimizer.step()
    assert [i.outcome for i in stq.history(optimizer).incidents] == ["raised"]


def test_string_form_raises() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    options = {**PACKED, "on_nonfinite": "raise"}
    step = torch.compile(optimizer.step, backend="stq", options=options)
    for number in range(2):
        backward(model, number)
        step()
    params, states = copy.deepcopy(list(model.parameters())), state_of(optimizer)
    poisoned(model, 2, float("inf"))
    dict(model.named_parameters())["0.bias"].grad[0] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"0\.bias is not finite, nor those of 1"):
        step()
    assert equal(params, model.parameters())
    assert equal(states, state_of(optimizer))


def test_a_wrong_value_is_an_error() -> None:
    with pytest.raises(InvalidOptionError, match="'propagate', 'skip' or 'raise'"):
        compiled(OPTIMIZERS["SGD"], make_model(), on_nonfinite="ignore")


# propagate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", PACKED), ("AdamW", {**PACKED, "precision": 3}), ("AdamW", PLANNED),
     ("SGD", PACKED), ("Adagrad", PACKED)],
)  # fmt: skip
def test_what_the_stock_optimizer_loses_is_lost_and_at_most_its_block(
    name: str, options: dict[str, Any], value: float
) -> None:
    model, other = make_model(), make_model()
    optimizer = compiled(OPTIMIZERS[name], model, **options)
    stock = OPTIMIZERS[name](other.parameters())
    element = 300
    for number in range(12):
        for m, o in ((model, optimizer), (other, stock)):
            generator = torch.Generator().manual_seed(number)
            for p in m.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            if number == 2:
                dict(m.named_parameters())["2.weight"].grad.view(-1)[element] = value
            o.step()
        if number == 2:  # in the step itself, nothing else is touched
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(a.isfinite(), b.isfinite())
    block = torch.zeros(40 * 24, dtype=torch.bool)
    block[element // 128 * 128 :][:128] = True
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        lost, needed = ~a.isfinite().view(-1), ~b.isfinite().view(-1)
        assert bool((lost | ~needed).all()), "what stock shows is shown"
        assert not lost.any() if n != "2.weight" else not (lost & ~block).any()
    assert not dict(model.named_parameters())["2.weight"].view(-1)[element].isfinite()
    report = stq.report(optimizer)
    assert {r.nonfinite for r in report.rows if r.nonfinite} == {128}
    assert "128 elements are not finite" in str(report) or "256 elements" in str(report)
    reached = [i for i in stq.history(optimizer).incidents if i.outcome == "reached"]
    assert {i.params for i in reached} == {("2.weight",)}


def test_a_state_is_well_again_after_it_was_zeroed() -> None:
    """How a user recovers: parameters from a checkpoint, and the states of the block set anew."""
    model = make_model()
    optimizer = compiled(OPTIMIZERS["AdamW"], model, **PACKED)
    good = copy.deepcopy(model.state_dict())
    for number in range(4):
        poisoned(model, number, float("nan"))
        optimizer.step()
    model.load_state_dict(good)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].nan_to_num_(0.0, posinf=0.0, neginf=0.0)
    assert stq.report(optimizer).nonfinite == 0
    backward(model, 4)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["midrise4", "softsign3", "adaptive_log2", "bfloat16", "float32"])
@pytest.mark.parametrize("value", VALUES)
def test_elements_that_are_not_finite_are_counted(name: str, value: float) -> None:
    """Against what the state decodes to."""
    numel = 3 * 128 + 5
    format = FORMATS[name]
    unit = None
    if format.normalized:
        unit = PackedStorage(numel, FORMATS["float32"])
        unit.write(torch.ones(numel))
    storage = PackedStorage(numel, format, normalizer=unit)
    values = torch.linspace(0.5, 1.0, numel)
    values[numel - 2] = abs(value) if not format.signed else value
    values[130] = float("nan")
    storage.write(values)
    state = PackedState(storage, (numel,), (1,))
    wrong = int((~storage.read().isfinite()).sum())
    assert nonfinite.nonfinite_elements(state) == wrong == (2 if format.width >= 16 else 128 + 5)


def test_incidents_are_in_the_run_file(tmp_path: Path) -> None:
    model = make_model()
    record = tmp_path / "stream.jsonl"
    optimizer = compiled(OPTIMIZERS["AdamW"], model, on_nonfinite="skip", record=record, **PACKED)
    for number in range(STEPS):
        poisoned(model, number, float("nan"))
        optimizer.step()
    stq.report(optimizer).save(tmp_path / "saved.jsonl")
    for path in (record, tmp_path / "saved.jsonl"):
        incidents = run_file.read(path).incidents
        assert incidents == stq.history(optimizer).incidents
        assert len(incidents) == len(BAD)


# GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled first"])
def test_grad_scaler_leaves_out_its_steps_itself(mode: str, unscaled: bool) -> None:
    """Gradients are scaled by a power of two, so that unscaled ones have the same bits."""
    model, other = make_model(), make_model()
    optimizer = compiled(OPTIMIZERS["AdamW"], model, on_nonfinite=mode, **PACKED)
    expected = compiled(OPTIMIZERS["AdamW"], other, **PACKED)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    for number in range(STEPS):
        model.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        if number in BAD:
            dict(model.named_parameters())["2.weight"].grad[0, 0] = float("inf")
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if number not in BAD:
            backward(other, number)
            expected.step()
    assert equal(model.parameters(), other.parameters())
    assert same(optimizer, expected)
    assert scaler.get_scale() == 2.0 ** (10 - len(BAD))
    assert stq.report(optimizer).nonfinite_steps == 0


# Shards --------------------------------------------------------------------------------------

SHAPES = {"even": (256, 128), "other": (64, 128), "small": (10,)}


def sharded_run(rank: int, world: int, mode: str) -> Any:
    """The last process alone has a gradient that is not finite, at step 2."""
    model, optimizer = make(SHAPES, "adamw", mesh_of(world), precision=4, on_nonfinite=mode)
    run(model, optimizer, range(2))
    message = ""

    def poison(_: Any, args: Any, kwargs: Any) -> None:
        if rank == world - 1:
            model.get_parameter("even").grad.to_local()[-1, -1] = float("nan")

    handle = optimizer.register_step_pre_hook(poison)
    try:
        step(model, optimizer, 2)
    except NonFiniteGradientError as error:
        message = str(error)
    handle.remove()
    run(model, optimizer, range(3, 5))
    report = stq.report(optimizer)
    return {**outcome(model, optimizer), "message": message, "skipped": report.nonfinite_steps}


@pytest.mark.parametrize("mode", ["skip", pytest.param("raise", marks=pytest.mark.slow)])
def test_all_processes_agree(mode: str) -> None:
    results = run_processes(2, sharded_run, mode)
    model, optimizer = make(SHAPES, "adamw", precision=4)
    run(model, optimizer, (0, 1, 3, 4))
    expected = outcome(model, optimizer)
    for result in results:
        assert not differing(result["params"], expected["params"])
        assert not differing(result["states"], expected["states"])
        assert result["skipped"] == 1
        assert ("even" in result["message"]) == (mode == "raise")


def test_the_default_looks_at_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(params: Any) -> Any:
        raise AssertionError("looked at")

    monkeypatch.setattr("stq_compile.nonfinite.nonfinite_gradients", fail)
    model = make_model()
    optimizer = compiled(OPTIMIZERS["AdamW"], model, **PACKED)
    backward(model, 0)
    optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    assert session.steps == 1

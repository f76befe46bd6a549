"""Changing the width of a live state: what the planner will use."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import stq_compile as stq
from models import backward, make_model
from stq_compile import errors, reference, storage
from stq_compile.backend import session_of
from stq_compile.formats import WIDTHS
from stq_compile.session import Session


def compiled(precision: object = 8) -> tuple[nn.Module, torch.optim.Optimizer, Session]:
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.parameters(), lr=1e-2), precision=precision, min_numel=64
    )
    backward(model, 0)
    optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    return model, optimizer, session


def test_twenty_changes_and_no_recompile() -> None:
    model, optimizer, session = compiled()
    graphs = counters["stats"]["unique_graphs"]
    changes = itertools.cycle(itertools.product((0, 2), ("exp_avg", "exp_avg_sq"), (4, 8, 32)))
    for step in range(20):
        param, key, width = next(changes)
        session.change_widths({(param, key): width})
        backward(model, step + 1)
        optimizer.step()
    assert session.compiles == 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert session.transitions == 20
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("width", [w for w in WIDTHS if w >= 4])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_values_survive(key: str, width: int) -> None:
    model, optimizer, session = compiled()
    first = next(iter(model.parameters()))
    before = optimizer.state[first][key].dequantize()
    session.change_widths({(0, key): width})
    state = optimizer.state[first][key]
    assert state.format.width == width
    error = (state.dequantize() - before).norm() / before.norm()
    assert error <= {4: 0.5, 5: 0.25, 6: 0.15, 8: 0.05, 16: 0.01, 32: 0.0}[width]
    assert stq.report(optimizer).rows[1 if key == "exp_avg" else 2].width == width


def test_below_four_bits_momentum_is_normalized() -> None:
    model, optimizer, session = compiled(4)
    first = next(iter(model.parameters()))
    session.change_widths({(0, "exp_avg"): 3})
    state = optimizer.state[first]["exp_avg"]
    assert state.format.name == "midrise3"
    assert state.packed.normalizer is optimizer.state[first]["exp_avg_sq"].packed
    before = state.dequantize()
    session.change_widths({(0, "exp_avg_sq"): 8})  # the unit changes, the values stay
    after = optimizer.state[first]["exp_avg"].dequantize()
    assert (after - before).norm() <= before.norm()
    session.change_widths({(0, "exp_avg_sq"): 32})  # no packed unit any more: scales of its own
    assert optimizer.state[first]["exp_avg"].format.name == "softsign3"
    backward(model, 1)
    optimizer.step()


def test_unknown_width_changes_nothing() -> None:
    _, optimizer, session = compiled()
    before = stq.report(optimizer)
    with pytest.raises(errors.UnsupportedWidthError, match="7 bits"):
        session.change_widths({(0, "exp_avg"): 7})
    assert stq.report(optimizer) == before


def test_failed_build_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, session = compiled()
    before = stq.report(optimizer)
    first = next(iter(model.parameters()))
    values = optimizer.state[first]["exp_avg"].dequantize()

    def fail(name: str, *_: object) -> None:
        raise errors.KernelBuildError(kernel=name, source="generated C++", output="no compiler")

    with monkeypatch.context() as patch:
        patch.setattr("stq_compile.codegen.cpp.backend.build", fail)
        with pytest.raises(errors.KernelBuildError, match="no compiler"):
            session.change_widths({(0, "exp_avg"): 5})
    assert stq.report(optimizer) == before
    assert torch.equal(optimizer.state[first]["exp_avg"].dequantize(), values)
    backward(model, 1)
    optimizer.step()


@pytest.mark.parametrize("failing_call", [1, 2])
def test_out_of_memory_in_a_transition(monkeypatch: pytest.MonkeyPatch, failing_call: int) -> None:
    """With the normalizer's change two states are re-encoded; either may fail."""
    model, optimizer, session = compiled({"exp_avg": 3, "exp_avg_sq": 4})
    before = stq.report(optimizer)
    calls = itertools.count(1)
    encode = reference.encode

    def fail(*args: object, **kwargs: object) -> object:
        if next(calls) == failing_call:
            raise MemoryError("simulated")
        return encode(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(storage.reference, "encode", fail)
        with pytest.raises(MemoryError):
            session.change_widths({(0, "exp_avg_sq"): 6})
    assert stq.report(optimizer).rows == before.rows
    backward(model, 1)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())

"""The report counts every byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stq_compile as stq
from models import backward, make_model
from stq_compile import PackedState


def test_rows_and_totals_count_what_is_there() -> None:
    model = make_model()
    optimizer = stq.compile(
        torch.optim.RMSprop(model.parameters(), centered=True, momentum=0.9),
        precision=4,
        min_numel=64,
    )
    backward(model, 0)
    optimizer.step()
    report = stq.report(optimizer)
    expected = elements = 0
    for state in optimizer.state.values():
        for value in state.values():
            is_packed = isinstance(value, PackedState)
            buffers = [value.packed.codes, value.packed.scales] if is_packed else [value]
            expected += sum(b.numel() * b.element_size() for b in buffers)
            elements += value.numel()
    assert report.state_bytes == expected
    assert report.fp32_bytes == 4 * elements
    assert report.bits_per_element == pytest.approx(8 * expected / elements)
    assert report.saved == pytest.approx(1 - expected / (4 * elements))


def test_fragile_states_stay_in_fp32_and_say_why() -> None:
    model = make_model()
    optimizer = stq.compile(
        torch.optim.RMSprop(model.parameters(), centered=True), precision=4, min_numel=64
    )
    backward(model, 0)
    optimizer.step()
    rows = [r for r in stq.report(optimizer).rows if r.state == "square_avg" and len(r.shape) > 1]
    assert rows
    for row in rows:
        assert row.width == 32
        assert "sqrt of a difference at rmsprop.py" in row.reason


def test_names_and_exclude() -> None:
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.named_parameters()),
        precision={"*": 8, "0.*:exp_avg": 4},
        exclude="4.*",
        min_numel=64,
    )
    backward(model, 0)
    optimizer.step()
    width = {(r.param, r.state): r.width for r in stq.report(optimizer).rows}
    assert width["0.weight", "exp_avg"] == 4
    assert width["0.weight", "exp_avg_sq"] == 8
    assert width["2.weight", "exp_avg"] == 8
    assert width["4.weight", "exp_avg"] == 32
    assert width["2.bias", "exp_avg"] == 32


def test_prints_as_a_table() -> None:
    model = make_model()
    optimizer = stq.compile(torch.optim.AdamW(model.parameters()), precision=4, min_numel=64)
    backward(model, 0)
    optimizer.step()
    text = str(stq.report(optimizer))
    assert "midrise4" in text
    assert "adaptive_log4" in text
    assert "true bits per element" in text


class Swaps(torch.optim.Optimizer):
    """Gives the parameter a state for its memory (SAM), in a step that runs eagerly."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        torch._dynamo.graph_break()
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            s["old"] = p.data.clone()
            s.setdefault("m", torch.zeros_like(p)).add_(p.grad)
            p.data = s["old"]
            p.sub_(s["m"], alpha=0.1)


@pytest.mark.filterwarnings("ignore::stq_compile.errors.EagerStepWarning")
def test_a_state_in_the_parameters_memory_occupies_none() -> None:
    p = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = stq.compile(Swaps([p]), precision=8)
    p.grad = torch.ones(64, 128)
    optimizer.step()
    assert optimizer.state[p]["old"].data_ptr() == p.data_ptr()
    report = stq.report(optimizer)
    sizes = {row.state: (row.bytes, row.fp32_bytes) for row in report.rows}
    assert sizes == {"old": (0, 0), "m": (64 * 130, 4 * 64 * 128)}
    assert report.bits_per_element == pytest.approx(8 + 1 / 8)

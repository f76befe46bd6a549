"""The report counts every byte."""

from __future__ import annotations

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

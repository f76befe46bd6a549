"""Decays of the states, against derivations by hand."""

from __future__ import annotations

import math

import pytest
import sympy
import torch

import stq_compile as stq
from stq_compile.backend import session_of
from stq_compile.step_graph import Recurrence

# optimizer, options, state -> (kind, decay, amplification)
CASES = [
    ("Adam", {"betas": (0.8, 0.95)}, "exp_avg", "average", 0.8, 1 / 0.36),
    ("Adam", {"betas": (0.8, 0.95)}, "exp_avg_sq", "average", 0.95, 1 / (1 - 0.95**2)),
    ("Adam", {"amsgrad": True}, "max_exp_avg_sq", "maximum", 1, math.inf),
    ("AdamW", {"foreach": True}, "exp_avg_sq", "average", 0.999, 1 / (1 - 0.999**2)),
    ("SGD", {"lr": 0.1, "momentum": 0.7}, "momentum_buffer", "average", 0.7, 1 / 0.51),
    ("RMSprop", {"alpha": 0.9}, "square_avg", "average", 0.9, 1 / 0.19),
    ("Adagrad", {}, "sum", "sum", 1, math.inf),
    ("Adamax", {}, "exp_inf", "maximum", 0.999, 1 / (1 - 0.999**2)),
    ("Adadelta", {}, "square_avg", "average", 0.9, 1 / 0.19),
    ("Adadelta", {}, "acc_delta", "unknown", None, math.inf),  # its update reads its own root
]


def recurrence(name: str, options: dict[str, object], state: str, **change: float) -> Recurrence:
    p = torch.nn.Parameter(torch.randn(64))
    optimizer = getattr(torch.optim, name)([p], **options)
    stq.compile(optimizer, precision=32)
    for step in range(3):
        p.grad = torch.randn(64)
        if step == 2:
            optimizer.param_groups[0].update(change)
        optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    last = max(session.compiled, key=lambda s: s.number)
    return last.program.units[0].facts.recurrences[state]


@pytest.mark.parametrize(("name", "options", "state", "kind", "decay", "amplification"), CASES)
def test_decay(
    name: str,
    options: dict[str, object],
    state: str,
    kind: str,
    decay: float | None,
    amplification: float,
) -> None:
    found = recurrence(name, options, state)
    assert found.kind == kind
    assert found.value == (None if decay is None else pytest.approx(decay))
    assert found.amplification == pytest.approx(amplification)


def test_a_decay_that_changes_is_an_expression_in_its_input() -> None:
    options = {"lr": 0.1, "momentum": 0.7}
    found = recurrence("SGD", options, "momentum_buffer", momentum=0.6)
    assert found.decay is not None
    (symbol,) = found.decay.free_symbols
    assert sympy.simplify(found.decay - symbol) == 0
    assert found.value == pytest.approx(0.6)


def test_amplification_is_the_variance_of_a_simulated_state() -> None:
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(20_000)
    for _ in range(200):
        state = 0.9 * state + torch.randn(20_000, generator=generator)
    assert Recurrence("average", sympy.Float(0.9), 0.9).amplification == pytest.approx(
        float(state.var()), rel=0.05
    )

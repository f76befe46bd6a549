"""The report's bytes are those that torch's allocator gives out for the states, to the byte.

A profiler sees every block of memory that is given out or taken back. While all states are copied,
whatever they are made of, what is given out and stays is what they occupy: that knows nothing of
formats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch.profiler import ProfilerActivity, profile, record_function

import stq_compile as stq

SHAPES = [(130, 7), (1,), (128,), (129,), (5, 3, 11), (4099,), (64, 64)]
"""Whole blocks and cut ones, and some that are smaller than ``min_numel``."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AMSGrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, momentum=0.9),
    "Lion": Lion,
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9),
}


def step(params: list[torch.Tensor], optimizer: torch.optim.Optimizer, number: int) -> None:
    for i, p in enumerate(params):
        assert p.grad is not None
        p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number + i)))
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"precision": 3},
        {"precision": 16},
        {"precision": 32},
        pytest.param({"target_bits": 4.5, "interval": 3}, marks=pytest.mark.slow),
    ],
    ids=["3", "16", "32", "planned"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_allocator_says_the_same(name: str, options: dict[str, Any]) -> None:
    params = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = stq.compile(OPTIMIZERS[name](params), min_numel=100, **options)
    for number in range(4):
        step(params, optimizer, number)
    memo = {id(p): p for p in params}
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
        record_function("copy of the states"),
    ):
        copied = copy.deepcopy(optimizer.state, memo)
    (given,) = [e.cpu_memory_usage for e in seen.events() if e.name == "copy of the states"]
    assert len(copied) == len(optimizer.state) > 0
    assert given == stq.report(optimizer).state_bytes > 0

"""A run of one optimizer as a sequence of states, each known by its bits.

What happens in the middle of a step is judged by them: afterwards everything must be as it was
before the step, or as it would have been after it, to the bit.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import stq_compile as stq
from models import backward, make_model
from stq_compile.backend import session_of
from stq_compile.planner.planner import CALIBRATIONS
from stq_compile.session import Session

RANDOM = threading.Lock()
"""Models and data are made by torch's generator, of which a process has one."""

Make = Callable[[nn.Module], torch.optim.Optimizer]


def planned(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW whose widths change every other step, without hysteresis."""
    chosen = {"min_numel": 64, "interval": 2, "hysteresis": 0.0, "tolerance": 0.1, **options}
    optimizer = stq.compile(torch.optim.AdamW(model.named_parameters(), lr=0.01), **chosen)
    planner = session(optimizer).planner
    assert planner is not None
    planner.looks = CALIBRATIONS  # no direct measurements, which take half a second each
    return optimizer


def session(optimizer: torch.optim.Optimizer) -> Session:
    found = session_of(optimizer)
    assert found is not None
    return found


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of all parameters and states, formats and counters of random numbers included."""
    digest = hashlib.sha256()

    def take(tensor: torch.Tensor) -> None:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(bytes(flat.numpy()))

    for param in model.parameters():
        take(param)
    states = sorted(session(optimizer).leaves(), key=lambda pair: (pair[1].param, pair[0].key))
    for leaf, source in states:
        digest.update(f"{source.param} {leaf.key}".encode())
        if isinstance(leaf.value, stq.PackedState):
            packed = leaf.value.packed
            digest.update(f"{packed.format.name} {packed.eager_writes}".encode())
            take(packed.codes)
            take(packed.scales)
            assert packed.working is None
        else:
            take(leaf.value)
    return digest.hexdigest()


@dataclass
class Run:
    """A model under training; its gradients depend on the number of the step alone."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def start(cls, make: Make) -> Run:
        model = make_model()
        return cls(model, make(model))

    def bits(self) -> str:
        return bits(self.model, self.optimizer)

    def gradients(self) -> None:
        """Those of the present step, computed from a model that never changes."""
        with RANDOM:
            still = make_model()
            backward(still, self.step)
        for param, other in zip(self.model.parameters(), still.parameters(), strict=True):
            param.grad = other.grad

    def advance(self) -> None:
        """One step that is left in peace."""
        self.gradients()
        self.optimizer.step()
        self.step += 1


class Expected:
    """The bits before the first step (0) and after each, from a run that is left in peace."""

    def __init__(self, make: Make) -> None:
        self.run = Run.start(make)
        self.known = [self.run.bits()]

    def __getitem__(self, step: int) -> str:
        while len(self.known) <= step:
            self.run.advance()
            self.known.append(self.run.bits())
        return self.known[step]


def disturbed(run: Run, known: Expected, disturbance: Callable[[Callable[[], Any]], bool]) -> bool:
    """One step that is disturbed; returns whether it was made all the same.

    ``disturbance`` calls the step, and returns False if nothing happened to it. Afterwards a step
    that was not made is made in peace, and must give what it should.
    """
    run.gradients()
    hit = disturbance(run.optimizer.step)
    session(run.optimizer).decide()  # the next step would, were a decision on widths interrupted
    found, before, after = run.bits(), known[run.step], known[run.step + 1]
    assert found in (before, after), f"step {run.step} is half made"
    made = found == after
    assert made or hit
    if made:
        assert session(run.optimizer).steps == run.step + 1
        run.step += 1
    else:
        run.advance()
        assert run.bits() == after, f"step {run.step} cannot be made again"
    return made

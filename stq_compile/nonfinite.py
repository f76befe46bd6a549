"""Gradients that are not finite, and states that hold what came of them.

A gradient is looked at only where `Options.on_nonfinite` asks for it, before a step, since a step
that has begun cannot be taken back: one pass over the gradients by their sums, which are not
finite if an element is not. A sum may also overflow, so that it only says where to look closely.

States tell afterwards: a block whose scale is not finite was reached by such a gradient, and an
average never forgets one. That is a look at two bytes in 128 elements.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from stq_compile.capture import param_sources
from stq_compile.collective import add_up
from stq_compile.errors import NonFiniteGradientError, StqError
from stq_compile.formats import BLOCK
from stq_compile.options import Options
from stq_compile.packed_state import PackedState
from stq_compile.planner.history import LIMIT, Incident
from stq_compile.planner.planner import StateKey
from stq_compile.reference import INFINITY_BITS, scale_pattern, scale_words
from stq_compile.shards import gradient, local, region_of
from stq_compile.step_graph import Source
from stq_compile.storage import PackedStorage

LOG = logging.getLogger(__name__)


@dataclass
class Watch:
    """What was found of one optimizer.

    Attributes:
        incidents: the latest `LIMIT` ones.
        left_out: steps that were skipped, or ended in an error.
        reached: states that were not finite at the last look.
        looked_at: the number of steps before that look.
    """

    incidents: deque[Incident] = field(default_factory=lambda: deque(maxlen=LIMIT))
    left_out: int = 0
    reached: set[StateKey] = field(default_factory=set)
    looked_at: int = 0


class Recorder(Protocol):
    """Writes down what happens."""

    def incident(self, incident: Incident) -> None: ...


class Watched(Protocol):
    """An optimizer's session, as it is looked at here."""

    options: Options
    steps: int
    watch: Watch

    @property
    def recording(self) -> Recorder: ...
    @property
    def optimizer(self) -> Optimizer: ...
    def params(self) -> list[Tensor]: ...
    def states(self) -> Iterator[tuple[Tensor, Source, str, Any]]: ...


def admits_step(session: Watched, error: type[StqError] | None = None) -> bool:
    """Whether the option ``on_nonfinite`` lets a step be made with the present gradients.

    ``error`` is raised in place of an answer of no.

    Raises:
        NonFiniteGradientError: it does not, and asks for an error.
    """
    if session.options.on_nonfinite == "propagate":
        return True
    params = session.params()
    numbers = nonfinite_gradients(params)
    if not numbers:
        return True
    if session.options.on_nonfinite == "raise":
        error = NonFiniteGradientError
    sources, step = param_sources(session.optimizer), session.steps + 1
    names = tuple(sources[id(params[n])].name for n in numbers)
    _note(session, Incident(step, "skipped" if error is None else "raised", names))
    session.watch.left_out += 1
    if error is None:
        return False
    others = f", nor those of {len(names) - 1} others" if len(names) > 1 else ""
    name = type(session.optimizer).__name__
    raise error(optimizer=name, step=step, param=names[0], others=others)


def find_reached(session: Watched) -> None:
    """Note states that a gradient that is not finite has reached since the last look."""
    watch = session.watch
    watch.looked_at = session.steps
    broken = {
        (source.param, key): source.name
        for _, source, key, value in session.states()
        if isinstance(value, Tensor) and nonfinite_elements(value)
    }
    new = {name: None for key, name in broken.items() if key not in watch.reached}
    watch.reached = set(broken)
    if new:
        _note(session, Incident(session.steps, "reached", tuple(new)))


def _note(session: Watched, incident: Incident) -> None:
    session.watch.incidents.append(incident)
    session.recording.incident(incident)
    LOG.warning("%s: %s", type(session.optimizer).__name__, incident)


def nonfinite_gradients(params: Sequence[Tensor]) -> list[int]:
    """The numbers of the parameters whose gradient has a NaN or an infinity.

    Of a sharded parameter on any process: all processes get the same answer, by one all-reduce of
    a number per parameter and mesh (`collective.add_up`); they must all call it.
    """
    grads = {
        n: gradient(p.grad, region_of(p)).detach()
        for n, p in enumerate(params)
        if p.grad is not None
    }
    found = dict.fromkeys(range(len(params)), 0.0)
    for number, total in zip(grads, _sums(list(grads.values())), strict=True):
        found[number] = float(not math.isfinite(total) and not _is_finite(grads[number]))
    counts, _ = add_up({n: {"nonfinite": count} for n, count in found.items()}, params)
    return [n for n, row in counts.items() if row["nonfinite"] > 0]


def _sums(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    sums: list[float] = torch.stack([t.sum(dtype=torch.float32) for t in tensors]).tolist()
    return sums


def _is_finite(values: Tensor) -> bool:
    values = values.coalesce().values() if values.is_sparse else values
    return bool(values.isfinite().all())


def nonfinite_elements(state: Tensor) -> int:
    """How many elements of a state may not be finite: those that are not, or all of their block."""
    held = local(state)
    if not isinstance(held, PackedState):
        return _count(held)
    storage = held.packed
    if not storage.format.blocked:
        return _count(storage.read())
    broken = _broken_blocks(storage).tolist()
    last = storage.codes.shape[0] - 1
    return sum(storage.numel - last * BLOCK if block == last else BLOCK for block in broken)


def _count(values: Tensor) -> int:
    if not values.is_floating_point():
        return 0
    if math.isfinite(values.sum(dtype=torch.float32)):
        return 0
    return int(values.isfinite().logical_not_().sum())


def _broken_blocks(storage: PackedStorage) -> Tensor:
    """The numbers of the blocks whose scale is an infinity or a NaN."""
    patterns = scale_pattern(scale_words(storage.scales), storage.format)
    return ((patterns & INFINITY_BITS) == INFINITY_BITS).nonzero()[:, 0]

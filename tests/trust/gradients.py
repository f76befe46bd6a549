"""Gradients of a bad day, and the stock optimizer in float64 beside the packed one on them.

All cases are parameters of one optimizer, so that one run serves all: they share a template, and
each has blocks of its own. Only where widths are planned each case has an optimizer to itself: all
parameters of one share a tolerance, and what one does not use is another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.optim import Optimizer

import stq_compile as stq

NUMEL = 8 * 128 + 17
"""Elements of a case: eight whole blocks, and one that is mostly padding."""
PLACES = torch.arange(NUMEL)

Gradient = Callable[[Tensor, int], Tensor]
"""From white noise ``[NUMEL]`` and the number of a step, the gradient of that step."""


def _outliers(noise: Tensor, size: float) -> Tensor:
    """One element of every block ``size`` times as large as the others."""
    out = noise.clone()
    out[5::128] *= size
    return out


def _pause(noise: Tensor, step: int) -> Tensor:
    """Gradients for 100 steps, none for 800, and gradients again."""
    return noise if step < 100 or step >= 900 else torch.zeros_like(noise)


@dataclass(frozen=True)
class Case:
    """Gradients, and how far the packed optimizer may end from the stock one, by `Setting.kind`.

    ``narrow`` and ``wide`` bound `Path.drift`. A case is also well if no element is farther than
    ``distance`` learning rates from where it should be: where updates are as small as that, their
    relative error means nothing. ``reference`` is the dtype of the stock optimizer.
    """

    gradient: Gradient
    narrow: float = 0.35
    wide: float = 0.15
    distance: float = 0.0
    reference: torch.dtype = torch.float64


FROZEN = 1.1
"""Not farther from the exact path than a parameter that does not move."""

CASES: Mapping[str, Case] = {
    "noise of 1e-10": Case(lambda z, t: z * 1e-10),
    "noise of 1e-4": Case(lambda z, t: z * 1e-4),
    "noise of 1": Case(lambda z, t: z),
    "noise of 1e4": Case(lambda z, t: z * 1e4),
    "noise of 1e10": Case(lambda z, t: z * 1e10),
    "noise of 1e17": Case(lambda z, t: z * 1e17),
    "constant": Case(lambda z, t: torch.full_like(z, 0.3), 0.06, 0.01),
    "alternating in time": Case(lambda z, t: torch.full_like(z, 0.3 - 0.6 * (t % 2)), 0.6, 0.15),
    "alternating over elements": Case(lambda z, t: 0.3 - 0.6 * (PLACES % 2), 0.06, 0.01),
    "repeated values": Case(lambda z, t: (PLACES % 7 - 3.0) * z[0], 0.5, 0.1),
    "95% zeros": Case(lambda z, t: z * (PLACES * 7919 % 100 < 5), 1.5, 0.1),
    "95% zeros that move": Case(lambda z, t: z * ((PLACES + t) * 7919 % 100 < 5), 0.4, 0.2),
    "blocks of zeros": Case(lambda z, t: z * ((PLACES < 128) | (PLACES >= 512))),
    "one of 10 in a block": Case(lambda z, t: _outliers(z, 10.0), 0.9, 0.15),
    "one of 1e4 in a block": Case(lambda z, t: _outliers(z, 1e4), FROZEN, FROZEN),
    "one of 1e15 in a block": Case(lambda z, t: _outliers(z, 1e15), FROZEN, FROZEN),
    "a pause of 800 steps": Case(_pause, 0.6, 0.3),
    # Squares that are no normal float32 numbers, or have none at all: as stock in float32.
    "noise of 1e30": Case(lambda z, t: z * 1e30, reference=torch.float32),
    "one of 1e30 in a block": Case(
        lambda z, t: _outliers(z, 1e30), FROZEN, FROZEN, reference=torch.float32
    ),
    "noise of 1e-20": Case(lambda z, t: z * 1e-20, reference=torch.float32),
    "noise of 1e-30": Case(lambda z, t: z * 1e-30, distance=1e-15, reference=torch.float32),
    "denormal numbers": Case(lambda z, t: z * 1e-41, FROZEN, FROZEN, 1e-15, torch.float32),
    "zeros": Case(lambda z, t: torch.zeros_like(z), 0.0, 0.0),
}


@dataclass(frozen=True)
class Setting:
    """An optimizer at uniform widths, or planned.

    ``reach`` is the longest move of an element in one step that the stock optimizer can make, in
    units of the learning rate; None where it has no such bound.
    """

    make: Callable[..., Optimizer]
    lr: float
    reach: float | None
    options: Mapping[str, Any]
    kind: str  # "narrow", "wide" or "planned"


def _settings(
    name: str, make: Callable[..., Optimizer], lr: float, reach: float | None, *widths: int
) -> dict[str, Setting]:
    return {
        f"{name}, {w} bits": Setting(
            make, lr, reach, {"precision": w, "min_numel": 0}, "wide" if w == 8 else "narrow"
        )
        for w in widths
    }


def _sgd(params: Any, lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


SETTINGS: Mapping[str, Setting] = {
    # One gradient after long without: (1 - 0.9) / sqrt(1 - 0.999), and what 4 bits add.
    **_settings("AdamW", torch.optim.AdamW, 1e-3, 3.5, 4, 8),  # stock: 3.16 at most
    "AdamW, planned": Setting(torch.optim.AdamW, 1e-3, 3.2, {"min_numel": 0}, "planned"),
    **_settings("SGD", _sgd, 1e-3, None, 4, 8),
    **_settings("RMSprop", torch.optim.RMSprop, 1e-3, 10.1, 4, 8),  # 1 / sqrt(1 - 0.99)
    **_settings("Adagrad", torch.optim.Adagrad, 1e-2, 1.001, 8),
    **_settings("Lion", Lion, 1e-3, 1.001, 5, 8),
}


@dataclass
class Path:
    """How a packed parameter and the stock one moved.

    ``drift`` is the largest relative distance that they were apart when they were compared,
    ``|packed - exact| / |exact|``, both having started at zero; ``distance`` the largest distance
    of an element then; ``reach`` the longest move of an element in one step.
    """

    drift: float = 0.0
    distance: float = 0.0
    reach: float = 0.0
    finite: bool = True


COMPARED = (1, 10, 100, 300, 1000)


def run(setting: Setting, steps: int = 1000) -> dict[str, Path]:
    """Free-running steps of the packed optimizer and of the stock one, by case."""
    apart = setting.kind == "planned"
    groups = [[name] for name in CASES] if apart else [list(CASES)]
    return {name: path for group in groups for name, path in _run(setting, group, steps).items()}


def _run(setting: Setting, names: Sequence[str], steps: int) -> dict[str, Path]:
    cases = [CASES[name] for name in names]
    ours = [torch.zeros(NUMEL, requires_grad=True) for _ in cases]
    theirs = [torch.zeros(NUMEL, dtype=c.reference, requires_grad=True) for c in cases]
    named = list(zip(names, ours, strict=True))
    packed = stq.compile(setting.make(named, lr=setting.lr), **setting.options)
    stock = setting.make(theirs, lr=setting.lr)
    paths = {name: Path() for name in names}
    for step in range(steps):
        before = [p.detach().clone() for p in ours]
        for name, case, mine, other in zip(names, cases, ours, theirs, strict=True):
            generator = torch.Generator().manual_seed(1000 * step + list(CASES).index(name))
            grad = case.gradient(torch.randn(NUMEL, generator=generator), step)
            mine.grad, other.grad = grad, grad.to(case.reference)
        packed.step()
        stock.step()
        moves = torch._foreach_sub([p.detach() for p in ours], before)
        for path, move in zip(paths.values(), torch._foreach_norm(moves, torch.inf), strict=True):
            path.reach = max(path.reach, float(move))
        if step + 1 in COMPARED:
            for path, a, b in zip(paths.values(), ours, theirs, strict=True):
                _compare(path, a.detach().double(), b.detach().double())
    return paths


def _compare(path: Path, packed: Tensor, exact: Tensor) -> None:
    path.finite = path.finite and bool(packed.isfinite().all())
    error = packed - exact
    length = float(exact.norm())
    path.drift = max(path.drift, float(error.norm()) / length if length else float(error.norm()))
    path.distance = max(path.distance, float(error.abs().max()))

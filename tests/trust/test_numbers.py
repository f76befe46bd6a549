"""Packed optimizers on gradients of every kind, free-running for 1,000 steps, against stock ones.

``python tests/trust/test_numbers.py`` prints the table of design/0015.
"""

from __future__ import annotations

import math

import pytest
import torch
from gradients import CASES, SETTINGS, Case, Path, Setting, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stq_compile as stq
from stq_compile.options import DEFAULT_TOLERANCE
from stq_compile.packed_state import PackedState


def bound(case: Case, setting: Setting) -> float:
    """Of the drift of a case. A planned update may err by the root of the tolerance, squared."""
    if setting.kind == "planned":
        return max(case.narrow, DEFAULT_TOLERANCE**0.5)
    return case.wide if setting.kind == "wide" else case.narrow


def longest(setting: Setting) -> float:
    """Bound of an element's move in one step. A planned one may move twice as far as with stock:
    the tolerance is a mean over elements, and a second moment of 3 bits has a tail."""
    if setting.reach is None:
        return math.inf
    return setting.reach * setting.lr * (2.0 if setting.kind == "planned" else 1.0)


def faults(setting: Setting, paths: dict[str, Path]) -> list[str]:
    """What lies beyond its bound."""
    found = []
    for name, path in paths.items():
        case = CASES[name]
        if not path.finite:
            found.append(f"{name}: not finite")
        if path.drift > bound(case, setting) and path.distance > case.distance * setting.lr:
            found.append(f"{name}: drift {path.drift:.3g} above {bound(case, setting):g}")
        if path.reach > longest(setting):
            found.append(f"{name}: an element moved by {path.reach:.3g} in one step")
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (s.kind == "planned"))
        for n, s in SETTINGS.items()
    ],
)
def test_a_thousand_steps_stay_within_their_bounds(name: str) -> None:
    setting = SETTINGS[name]
    assert not faults(setting, run(setting))


# The rest: settings of their own ---------------------------------------------------------------


def adamw(numel: int, **options: float | tuple[float, float]) -> tuple[Tensor, torch.optim.AdamW]:
    param = torch.zeros(numel, requires_grad=True)
    made: torch.optim.AdamW = torch.optim.AdamW([param], **options)
    return param, made


SWAMPING = {4: 0.06, 8: 0.02}
"""Bound of the relative error of the mean second moment over 10,000 steps, by width. (3 bits are
too large by a factor of four here: design/0015.)"""


def swamping(width: int, steps: int = 10_000) -> float:
    """An average that moves by a ten thousandth a step: the relative error of its mean."""
    numel = 1024
    options = {"lr": 1e-3, "betas": (0.9, 0.9999)}
    param, optimizer = adamw(numel, **options)
    stq.compile(optimizer, precision={"exp_avg": 8, "exp_avg_sq": width}, min_numel=0)
    exact = torch.zeros(numel, dtype=torch.float64)
    worst = 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        size = 1.0 if step < steps // 2 else 0.5  # and it has to fall again
        param.grad = size * torch.randn(numel, generator=generator)
        optimizer.step()
        exact.mul_(0.9999).add_(param.grad.double().square(), alpha=1e-4)
        if (step + 1) % (steps // 10) == 0:
            state = optimizer.state[param]["exp_avg_sq"]
            assert isinstance(state, PackedState)
            stored = state.dequantize().double()
            worst = max(worst, abs(float(stored.mean() / exact.mean()) - 1))
    return worst


@pytest.mark.parametrize("width", [4, 8])
def test_tiny_increments_are_not_swamped(width: int) -> None:
    assert swamping(width) < SWAMPING[width]


def test_nearest_rounding_is_swamped() -> None:
    """What the bound above is worth: an average that freezes is far outside of it."""
    param, optimizer = adamw(1024, lr=1e-3, betas=(0.9, 0.9999))
    stq.compile(optimizer, precision=4, min_numel=0, rounding="nearest")
    for step in range(500):
        generator = torch.Generator().manual_seed(step)
        param.grad = (1.0 if step < 100 else 0.1) * torch.randn(1024, generator=generator)
        optimizer.step()
    exact = 1e-4 * (100 + 4)  # about
    stored = float(optimizer.state[param]["exp_avg_sq"].mean())
    assert not abs(stored / exact - 1) < SWAMPING[4]


@pytest.mark.parametrize("width", [2, 4])
def test_eps_of_zero(width: int) -> None:
    """Finite where the gradients are not zero, and no element moves farther than stock can."""
    param, optimizer = adamw(1024 + 9, lr=1e-3, eps=0.0, weight_decay=0.0)
    stq.compile(optimizer, precision=width, min_numel=0)
    for step in range(200):
        generator = torch.Generator().manual_seed(step)
        before = param.detach().clone()
        param.grad = 1e-6 * torch.randn(param.numel(), generator=generator)
        optimizer.step()
        assert (param.detach() - before).abs().max() <= 3.2e-3


def test_learning_rate_of_zero() -> None:
    """Parameters keep every bit, states go on, the planner stays calm."""
    param, optimizer = adamw(4096 + 1, lr=0.0)
    with torch.no_grad():
        param.normal_()
    stq.compile(optimizer, interval=10)
    before = param.detach().clone()
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        param.grad = torch.randn(param.numel(), generator=generator)
        optimizer.step()
    assert torch.equal(param.detach(), before)
    assert float(optimizer.state[param]["exp_avg_sq"].mean()) == pytest.approx(0.03, rel=0.1)
    assert stq.report(optimizer).transitions == 0


PATTERNS = st.sampled_from(["noise", "constant", "alternating", "zeros", "sparse", "outlier"])
SCALES = st.integers(-30, 30)
MEMBERS = 8


class Reused:
    """A compiled AdamW whose parameters and states are set back, so that examples are cheap."""

    def __init__(self, width: int) -> None:
        self.params = [torch.zeros(300, requires_grad=True) for _ in range(MEMBERS)]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-3)
        stq.compile(self.optimizer, precision=width, min_numel=0)

    def reset(self) -> None:
        with torch.no_grad():
            for param in self.params:
                param.zero_()
                for value in self.optimizer.state.get(param, {}).values():
                    value.zero_()


def pattern(kind: str, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(300, generator=generator)
    made = {
        "noise": z,
        "constant": torch.ones(300),
        "alternating": torch.ones(300) * (-1) ** seed,
        "zeros": torch.zeros(300),
        "sparse": z * (torch.rand(300, generator=generator) < 0.05),
        "outlier": torch.cat([z[:1] * 1e6, z[1:]]),
    }
    return (made[kind].double() * scale).clamp(-3e38, 3e38).float()


REUSED: dict[int, Reused] = {}


@given(
    kinds=st.lists(st.tuples(PATTERNS, SCALES), min_size=MEMBERS, max_size=MEMBERS),
    changed=st.lists(st.tuples(PATTERNS, SCALES), min_size=MEMBERS, max_size=MEMBERS),
    width=st.sampled_from([3, 4]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=15)
def test_gradients_that_change_their_kind_never_throw_a_parameter(
    kinds: list[tuple[str, int]], changed: list[tuple[str, int]], width: int, seed: int
) -> None:
    """Whatever finite gradients follow one another, from 1e-30 to 1e30: parameters stay finite,
    and no element moves farther in a step than the stock optimizer can move one."""
    made = REUSED.setdefault(width, Reused(width))
    made.reset()
    for step in range(24):
        before = [p.detach().clone() for p in made.params]
        for i, param in enumerate(made.params):
            kind, exponent = (kinds if step < 12 else changed)[i]
            param.grad = pattern(kind, 10.0**exponent, seed + step)
        made.optimizer.step()
        moves = torch._foreach_sub([p.detach() for p in made.params], before)
        found = [float(m) for m in torch._foreach_norm(moves, torch.inf)]
        assert all(math.isfinite(m) and m <= LONGEST * 1e-3 for m in found), found


LONGEST = 3.2 * 4
"""In learning rates: the stock optimizer's longest move, and four times that for 3 and 4 bits."""


def table() -> str:
    """Measured drift beside its bound, in Markdown."""
    results = {name: run(setting) for name, setting in SETTINGS.items()}
    lines = ["| gradients | bound: 4 and 5 bits; 8 bits | " + " | ".join(SETTINGS) + " |"]
    lines.append("|---|---|" + "---|" * len(SETTINGS))
    for name, case in CASES.items():
        limits = f"{case.narrow:g}; {case.wide:g}"
        if case.distance:
            limits += f" or {case.distance:g} lr"
        row = []
        for setting, paths in results.items():
            path, lr = paths[name], SETTINGS[setting].lr
            tiny = case.distance and path.distance <= case.distance * lr
            row.append(f"{path.distance / lr:.0e} lr" if tiny else f"{path.drift:.3f}")
        lines.append(f"| {name} | {limits} | " + " | ".join(row) + " |")
    cells = [
        f"{max(p.reach for p in paths.values()) / SETTINGS[n].lr:.3g} "
        f"of {longest(SETTINGS[n]) / SETTINGS[n].lr:.3g}"
        for n, paths in results.items()
    ]
    lines.append("| longest move, in lr | as stock | " + " | ".join(cells) + " |")
    swamped = ", ".join(f"{w} bits {swamping(w):.3f} (bound {b})" for w, b in SWAMPING.items())
    return "\n".join([*lines, "", f"Swamping: {swamped}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())

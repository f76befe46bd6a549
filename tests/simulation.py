"""Averages and sums that are stored in a format, beside the same ones kept exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stq_compile import error_law
from stq_compile.formats import FORMATS
from stq_compile.reference import decode, encode
from stq_compile.rounding import NEAREST, Noise, step_key

BLOCKS = 24


@dataclass
class Outcome:
    """Mean squares over elements and steps: of a signed state in units of the block, since such a
    state moves the parameter as it is; of others in units of the normal size of each element, and
    of a non-negative one bounded by twice its value, which is what the law promises."""

    measured: float  # of the stored state's deviation from the exact one
    predicted: float  # of the law's settled error
    size: float  # of the exact state

    @property
    def ratio(self) -> float:
        """Prediction over simulation."""
        return self.predicted / self.measured


def simulate(
    name: str,
    a: float,
    *,
    squares: bool = False,
    spread: float = 0.0,
    rounding: str = "stochastic",
    steps: int = 0,
    seed: int = 0,
) -> Outcome:
    """An average with decay ``a`` (1: a sum) of white noise or of its squares.

    Elements differ in size by ``spread`` octaves of standard deviation. The last half of the
    steps of an average is measured, and the last one of a sum.
    """
    format = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    numel = BLOCKS * 128 - 51
    size = torch.exp2(spread * torch.randn(numel, generator=generator))
    unit = size * size if squares else size
    if not squares and not format.normalized:
        unit = torch.ones(numel)
    gain = 1.0 if a == 1 else 1 - a
    steps = steps or int(5 / (1 - a)) + 20
    exact = torch.zeros(numel)
    if a < 1:  # stationary from the start
        deviation = ((1 - a) / (1 + a)) ** 0.5
        noise = torch.randn(numel, generator=generator)
        exact = (
            size * size * (1 + 1.4 * deviation * noise).abs()
            if squares
            else size * noise * deviation
        )
    v = size * size  # a normalizer that has settled
    amplification = float("inf") if a == 1 else 1 / (1 - a * a)
    kept = error_law.persistence(amplification, rounding)
    key = None if rounding == "nearest" else 0

    def stored(x: Tensor, step: int) -> Tensor:
        noise = NEAREST if key is None else Noise(step_key(seed, step, 5))
        return decode(*encode(x, format, noise, v), format, numel, v)

    state = stored(exact, 10**6)
    errors, laws = [], []
    for step in range(steps):
        g = size * torch.randn(numel, generator=generator)
        x = g * g if squares else g
        new = a * state + gain * x
        exact = a * exact + gain * x
        late = step >= steps // 2 if a < 1 else step == steps - 1
        if late:
            law = error_law.settled_error(state, new, v, format, kept, rounding)
            laws.append((law / unit).double().square().mean())
        state = stored(new, step)
        if late:
            error = (state - exact).abs()
            if squares:
                error = torch.minimum(error, 2 * exact)
            errors.append((error / unit).double().square().mean())
    return Outcome(
        float(torch.stack(errors).mean()),
        float(torch.stack(laws).mean()),
        float((exact / unit).double().square().mean()),
    )

"""What the sums of a measuring kernel say about a state: predicted errors, and factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

FACTOR_NAMES = (
    "range", "crest", "kurtosis", "zeros", "increment", "swamped", "agreement",
    "scale_spread", "scale_drift", "narrowness", "predicted",
)  # fmt: skip
"""The pool that factor selection chooses from.

Of a state: ``range`` (standard deviation of log2 of the magnitudes, octaves), ``crest`` (log2 of
the blocks' maximum over their root mean square), ``kurtosis`` (log2), ``zeros`` (share of
elements), ``increment`` (log2 of the mean increment over the mean magnitude), ``swamped`` (share of
elements whose increment is below half a level of 4 bits), ``agreement`` (share whose sign is the
gradient's: the gradient's signal against its noise), ``scale_spread`` (of the blocks' scales,
octaves), ``scale_drift`` (of their mean since the last look, octaves). Of a width: ``narrowness``
(2^-width) and ``predicted`` (log of the error that the law predicts)."""

BOUNDED = 8
"""Widest width at which a block of a non-negative state spans a bounded range."""
LOST = 0.1
"""Share of a tensor's update, in squares; more of it lost is an alarm."""
LEAST_RATIO = 2.0**-60
SIGNIFICANT_BITS = 24
RESOLUTION = 10 * 2.0**-48
"""Least square of an update, in squares of its parameter. The update is a difference of float32
parameters: it comes with an error of 2^-24 of them over the root of 3, whose square is then at most
a thirtieth of its own."""


@dataclass(frozen=True)
class Measured:
    """One look at one state of one tensor."""

    errors: dict[int, float]
    """Predicted relative perturbation of the update by width: what the settled error does to it,
    squared and summed, over the sum of the update's squares."""
    factors: dict[str, float]
    level: float  # mean log2 of the blocks' scales
    lost: float = 0.0
    """Share of the update, in squares, that is lost at `BOUNDED` bits and fewer: elements that lie
    below their block's range are stored as its end, and divided by that they hardly move."""

    def after(self, before: Measured, kept: float) -> Measured:
        """With each error the geometric mean of this look's and the last one's: a look is a
        sample of one gradient, and what only its noise moves is moved back by the next.

        And at least ``kept`` times the last one: the share of the noise of that time that the
        state still holds. What a look predicts is where the error settles from here on.
        """
        errors = {}
        for width, error in self.errors.items():
            last = before.errors.get(width, error)
            errors[width] = max(math.sqrt(error * last), kept * last)
        return replace(self, errors=errors)

    def lost_at(self, width: int) -> float:
        """The share of the update that is lost at a width: an error beside the rounding's."""
        return self.lost if width <= BOUNDED else 0.0

    def loses(self, width: int) -> bool:
        """Whether so much of the update is lost at a width that it must not wait."""
        return self.lost_at(width) > LOST

    def at(self, width: int) -> dict[str, float]:
        """All factors for one width."""
        predicted = math.log(max(self.errors[width], 1e-30))
        return {**self.factors, "narrowness": 2.0**-width, "predicted": predicted}


def rounded(x: float) -> float:
    """``x`` to 24 significant bits: sums of shards, added in any order, come out the same."""
    if not math.isfinite(x) or x == 0:
        return x
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, SIGNIFICANT_BITS)), exponent - SIGNIFICANT_BITS)


def resolved(sums: Mapping[str, float]) -> bool:
    """Whether a tensor's sums say anything about its update: a learning rate near zero, as at the
    end of a schedule, moves a parameter by less than its last bit, and what is seen is rounding."""
    update = sums["update"]
    lost = RESOLUTION * sums["param"]
    return math.isfinite(update) and update > lost and sums["count"] > 0


def interpret(sums: Mapping[str, float], key: str, before: Measured | None) -> Measured | None:
    """Errors and factors of state ``key`` from a tensor's sums.

    None if the step did not move the parameter visibly (`resolved`): there is no update to compare
    an error with.
    """
    if not resolved(sums):
        return None
    update, count = rounded(sums["update"]), sums["count"]
    prefix = f"{key}:"
    own = {n.removeprefix(prefix): rounded(v) for n, v in sums.items() if n.startswith(prefix)}
    errors = {
        int(name.removeprefix("error_")): value / update
        for name, value in own.items()
        if name.startswith("error_")
    }
    mean = {name: value / count for name, value in own.items()}
    level = mean["scale"]
    energy = max(mean["energy"], 1e-30)
    factors = {
        "range": _deviation(mean["octaves"], mean["octaves_squared"]),
        "crest": -0.5 * math.log2(energy),
        "kurtosis": math.log2(max(mean["fourth"], 1e-30) / energy**2),
        "zeros": mean["zeros"],
        "increment": _log_ratio(mean["increment"], mean["magnitude"]),
        "swamped": mean["swamped"],
        "agreement": mean["agreement"],
        "scale_spread": _deviation(level, mean["scale_squared"]),
        "scale_drift": 0.0 if before is None else level - before.level,
    }
    return Measured(errors, factors, level, _lost(own, update))


def _lost(own: Mapping[str, float], update: float) -> float:
    """`Measured.lost`, from sums over the elements at the end of their block's range.

    With ``r`` the mean of what they are averages of over what they are stored as, and an update
    that goes with the state to the power of ``-k``, such an element moves ``r^k`` times as far as
    it should.
    """
    seen, stored = own.get("end_update", 0.0), own.get("end_stored", 0.0)
    if not (seen > 0 and stored > 0):
        return 0.0
    ratio = max(own["end_fed"] / stored, LEAST_RATIO)
    if ratio >= 1:
        return 0.0
    power = math.sqrt(own["end_effect"] / seen)
    moved: float = ratio**power
    due: float = seen * (own["end_old"] / stored / ratio) ** (2 * power)
    return due * (1 - moved) ** 2 / (update - seen + due)


def _deviation(mean: float, square: float) -> float:
    return math.sqrt(max(square - mean * mean, 0.0))


def _log_ratio(a: float, b: float) -> float:
    return math.log2(max(a, 1e-12) / max(b, 1e-12))

"""How large an error a format leaves in a state: the law by which a planner predicts it.

One stochastic rounding between levels a distance ``D`` apart adds an error of variance
``D^2 f (1 - f)``, where ``f`` is the position of the value between them; averaged over ``f`` that
is ``D^2 / 6``. But a state starts a step *on* a level and moves off it by its increment
``d = |new - old|`` only, so that ``f`` is known, ``d / D`` without its whole part:

    V = D^2 f (1 - f),    f = frac(d / D)

For slow averages that is about ``D d``, far less than ``D^2 / 6``. Noise injected at every step
persists: with ``s' = a s + ...`` it settles at ``V / (1 - a^2)``. A sum (``a = 1``) never forgets,
but it grows, by ``d`` a step, and the error shrinks relative to it: the same argument in relative
terms gives ``V (s / 2 d + 1)``.

That is so for random numbers that are independent from step to step. Those of `rounding` are spread
evenly over steps: the half of an error's variance that the number itself decides does not add up,
and what settles is the mean of ``V`` and all this, ``V (A + 1) / 2`` where it would be ``V A``.

Rounding to nearest is no noise: an increment below ``D / 2`` is lost at every step, so errors add
up coherently, to ``D^2 / 12 (1 - a)^2``.

Levels, with ``x`` the value in units of the block's scale:

    softsign      D = (1 + x)^2 / 2K             (K levels a side)
    adaptive_log  D = x R ln 2 / L               and what lies below the range is lifted to its end
    midrise       D = step, in units of the format's; and the clip, where there is one
    bfloat16      D = 2^-7.5 x                   (2^-8 to 2^-7)

`tests/test_error_law.py` compares the law with what `stq_compile.reference` does to simulated
averages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stq_compile import reference
from stq_compile.formats import (
    BLOCK,
    FORMATS,
    MAX_RANGE,
    MIDRISE_CLIP,
    OCTAVE,
    RANGE_STEP,
    Format,
    block_count,
)

BFLOAT16_SPACING = 2.0**-7.5
FARTHEST = 16.0
"""Bound of a relative increment: what moves farther lands anywhere between two levels."""
TINY = 2.0**-120
LARGEST = 2.0**120
"""What is not below it is not summed, so that the float32 sum of a block stays finite."""
LARGEST_STEP = MAX_RANGE / RANGE_STEP - 1
"""What `reference.adaptive_range` says of a block with the widest range."""
BOUNDED = 8
"""Widest width at which a block of a non-negative state spans a bounded range."""
NEAR_END = 1.03
"""What is at the end of the range, or a rounding above."""
LOWEST_OCTAVE = -24.0
"""log2 of a magnitude relative to its block is cut off here, in the factors."""

FACTORS = (
    "magnitude", "energy", "fourth", "octaves", "octaves_squared", "zeros", "increment",
    "swamped", "agreement", "scale", "scale_squared",
)  # fmt: skip
"""What `factors` gives per element, in order."""


def persistence(amplification: float | Tensor, rounding: str) -> float | Tensor:
    """The factor from one step's variance to the settled one, for `settled_error`.

    ``amplification`` is ``1 / (1 - a^2)``, a number or 0-dim; infinite for a sum, and left so: the
    law of sums needs the increments.
    """
    if not isinstance(amplification, Tensor) and math.isinf(amplification):
        return amplification
    if rounding == "stochastic":
        return (amplification + 1) / 2
    a = (1 - 1 / amplification) ** 0.5
    return 1 / (1 - a) ** 2


def settled_error(
    old: Tensor,
    new: Tensor,
    normalizer: Tensor | None,
    format: Format,
    persistence: float | Tensor,
    rounding: str,
) -> Tensor:
    """Root mean square of the settled error of every element, float32 ``[numel]``.

    Args:
        old: the state before the step, ``[numel]`` in memory order.
        new: the state after it, which is encoded.
        normalizer: the state in whose root a normalized format counts.
        persistence: see `persistence`.
        rounding: ``"stochastic"`` or ``"nearest"``.
    """
    if format.kind in ("float32", "constant"):
        return torch.zeros_like(new)
    x, before = _blocks(new), _blocks(old)
    valid = _blocks(torch.ones_like(new)) > 0
    law = _Law(persistence, rounding)
    if format.kind == "softsign":
        error = _softsign(x, before, format, law)
    elif format.kind == "adaptive_log":
        error = _adaptive_log(x, before, valid, format, law)
    elif format.kind == "midrise":
        assert normalizer is not None
        error = _midrise(x, before, _blocks(normalizer), valid, format, law)
    else:
        one = torch.ones_like(x)
        moved = ((x - before).abs() / x.abs().clamp_min(TINY)).clamp_max(FARTHEST)
        error = x.abs() * law.variance(one * BFLOAT16_SPACING, moved, one).sqrt()
    return torch.where(valid, error, 0.0).view(-1)[: new.numel()]


class _Law:
    """Variance of the settled error for levels a distance ``distance`` apart."""

    def __init__(self, persistence: float | Tensor, rounding: str) -> None:
        self.persistence = persistence
        self.nearest = rounding == "nearest"

    def variance(self, distance: Tensor, increment: Tensor, magnitude: Tensor) -> Tensor:
        factor: Tensor | float = self.persistence
        if self.nearest:
            kept = magnitude / (2 * increment.clamp_min(TINY)) + 1
            factor = kept.square() if self.persistence == math.inf else factor
            return distance.square() * factor / 12
        ratio = increment / distance
        position = ratio - ratio.floor()
        if self.persistence == math.inf:
            factor = magnitude / (4 * increment.clamp_min(TINY)) + 1
        return distance.square() * position * (1 - position) * factor


def _softsign(x: Tensor, before: Tensor, format: Format, law: _Law) -> Tensor:
    scale = _scale(x, 16)
    magnitude, increment = _relative(x, before, scale)
    distance = (1 + magnitude).square() / (2.0 * (format.top_code // 2))
    return scale * law.variance(distance, increment, magnitude).sqrt()


def _adaptive_log(x: Tensor, before: Tensor, valid: Tensor, format: Format, law: _Law) -> Tensor:
    scale, step = _range(x, valid, format)
    magnitude, increment = _relative(x, before, scale)
    spacing = (step + 1) * (format.spacing * OCTAVE)
    moved = (increment / magnitude.clamp_min(TINY)).clamp_max(FARTHEST)
    distance = (spacing * math.log(2)).expand_as(x)
    variance = law.variance(distance, moved, torch.ones_like(x)) * magnitude.square()
    lifted = (_end(scale, step, format) * reference.reciprocal(scale) - magnitude).clamp_min(0.0)
    # An error in a divisor has a bounded effect, its linear one is not: twice the value at most.
    bounded = torch.minimum(variance + lifted.square(), 4 * magnitude.square())
    return scale * bounded.sqrt()


def _midrise(
    x: Tensor, before: Tensor, normalizer: Tensor, valid: Tensor, format: Format, law: _Law
) -> Tensor:
    unit = reference.midrise_unit(normalizer, format)
    inverse = reference.reciprocal(unit)
    value = torch.where(valid, x * inverse, 0.0)
    count = valid.sum(1, keepdim=True).clamp_min(1)
    half = format.top_code / 2
    if format.width in MIDRISE_CLIP:
        rms = (value.square().sum(1, keepdim=True) / count).sqrt()
        reach = rms * MIDRISE_CLIP[format.width]
    else:
        reach = value.abs().amax(1, keepdim=True)
    step = (reach / half).clamp_min(TINY).expand_as(x)
    moved = ((x - before) * inverse).abs()
    clipped = (value.abs() - half * step).clamp_min(0.0)
    variance = law.variance(step, moved, value.abs()) + clipped.square()
    return unit * variance.sqrt()


def range_end(old: Tensor) -> Tensor:
    """The least value of its block, for elements that are there or below; 0 for all others.

    Of blocks whose elements are so far apart that ``adaptive_log`` gives them its widest range:
    what lies below that is stored as its end. ``old`` is a state before the step, ``[numel]``, as
    it was stored or not.
    """
    x, valid = _blocks(old), _blocks(torch.ones_like(old)) > 0
    format = FORMATS[f"adaptive_log{BOUNDED}"]
    scale, step = _range(x, valid, format)
    end = _end(scale, step, format)
    there = valid & (step == LARGEST_STEP) & (x <= NEAR_END * end)
    return torch.where(there, end, 0.0).view(-1)[: old.numel()]


def range_ends(x: Tensor, width: int) -> Tensor:
    """The least value that the block of every element has in ``adaptive_log``, ``[numel]``."""
    blocks, valid = _blocks(x), _blocks(torch.ones_like(x)) > 0
    format = FORMATS[f"adaptive_log{width}"]
    scale, step = _range(blocks, valid, format)
    ends = _end(scale, step, format)
    return ends.expand_as(blocks).reshape(-1)[: x.numel()]


def factors(old: Tensor, new: Tensor, grad: Tensor) -> list[Tensor]:
    """What a planning step sums up about a state, one tensor ``[numel]`` for each of `FACTORS`.

    Magnitudes and increments are in units of the block's largest magnitude.
    """
    x, before = _blocks(new), _blocks(old)
    scale = _scale(x, 16)
    magnitude, increment = _relative(x, before, scale)
    octaves = reference.log2(magnitude).clamp_min(LOWEST_OCTAVE)
    level = reference.log2(scale).clamp_min(-126.0).expand_as(x)
    per_element = (
        magnitude,
        magnitude.square(),
        magnitude.square().square(),
        octaves,
        octaves.square(),
        (x == 0).float(),
        increment,
        # below half of the widest distance between the levels of 4 bits
        (increment < 0.5 * (1 + magnitude).square() / 14).float(),
        (x * _blocks(grad) > 0).float(),
        level,
        level.square(),
    )
    return [value.reshape(-1)[: new.numel()] for value in per_element]


def sums(values: list[Tensor]) -> Tensor:
    """Sum of each ``[numel]`` in float64; NaN and what reaches `LARGEST` count as zero."""
    return torch.stack(
        [torch.where(v.abs() < LARGEST, v, 0.0).sum(dtype=torch.float64) for v in values]
    )


def _blocks(x: Tensor) -> Tensor:
    """``[numel]`` to ``[blocks, 128]``, padded with zeros."""
    padded = x.new_zeros(block_count(x.numel()) * BLOCK)
    padded[: x.numel()] = x
    return padded.view(-1, BLOCK)


def _scale(x: Tensor, drop: int) -> Tensor:
    """The scale that a block gets, ``[blocks, 1]``."""
    return reference.float_from_bits(reference.block_scale(x, drop) << drop)


def _range(x: Tensor, valid: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scale of every block in ``adaptive_log``, and the steps of its range less one."""
    scale = _scale(x, 20)
    distance = reference.magnitude_bits(x) - reference.magnitude_bits(scale)
    distance = distance.clamp_min(reference.LOWEST_BITS)
    return scale, reference.adaptive_range(distance, valid, format.width)


def _end(scale: Tensor, step: Tensor, format: Format) -> Tensor:
    """The lowest level of every block."""
    spacing = (step.to(torch.int32) + 1) * format.spacing
    end = reference.lowest_level(reference.magnitude_bits(scale), spacing, format)
    return torch.where(scale > 0, reference.float_from_bits(end), 0.0)


def _relative(x: Tensor, before: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and increment in units of the scale; at most 1 and `FARTHEST`."""
    inverse = reference.reciprocal(scale)
    magnitude = (x.abs() * inverse).clamp_max(1.0)
    return magnitude, ((x - before).abs() * inverse).clamp_max(FARTHEST)

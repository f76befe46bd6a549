"""Parameters of 16 bits: their grid, how a value is rounded onto it, and what the rounding leaves.

A parameter in bfloat16 or float16 has a *grid*: the multiples of ``ulp(x)``, the unit in the last
place of the binade that ``x`` lies in. Three ways to write a float32 value ``x`` (design/0016):

``nearest``      the nearest number of the grid, as torch casts
``stochastic``   one of its two neighbours on the grid, so that the mean is ``x``
``compensated``  the nearest number ``p``, and beside it the error ``(x - p) / ulp(p)``, which the
                 format ``ulp8`` keeps: the value of the parameter is ``p + error * ulp(p)``

Every function is a few IEEE float32 operations in a stated order, and kernels give its bits. Values
beyond `Half.limit` are left to the cast: they are rounded to nearest, with an error of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT = 0x7F800000


@dataclass(frozen=True)
class Half:
    """A 16-bit type.

    Attributes:
        mantissa: bits after the point.
        lowest: biased float32 exponent of the lowest binade with a grid of its own. That of
            float16 is its first one. bfloat16 has lower ones, whose ulp would be denormal: there
            the grid is that of 2^-111, and what is lost is below 2^-118.
        limit: from this magnitude on nothing is computed on the grid.
    """

    dtype: torch.dtype
    mantissa: int
    lowest: int
    limit: float


HALVES = {
    "bfloat16": Half(torch.bfloat16, 7, 16, 2.0**111),
    "float16": Half(torch.float16, 10, 113, 65504.0),
}
"""The 16-bit types by name."""
HALF_DTYPES = frozenset(half.dtype for half in HALVES.values())
FLOAT_DTYPES = HALF_DTYPES | {torch.float32}
"""The types of states that can be packed."""


def half_of(dtype: torch.dtype) -> Half:
    """The 16-bit type behind a dtype of `HALF_DTYPES`."""
    return HALVES[str(dtype).removeprefix("torch.")]


def ulp(x: Tensor, half: Half) -> Tensor:
    """The unit in the last place of ``x``, float32, a power of two."""
    exponent = (x.view(torch.int32) & EXPONENT).clamp_min(half.lowest << 23)
    return (exponent - (half.mantissa << 23)).view(torch.float32)


def rounded(x: Tensor, half: Half, uniform: Tensor | None) -> Tensor:
    """Float32 ``x`` on the grid, still as float32; ``uniform`` in [0, 1) rounds stochastically.

    To nearest, ties to even, by adding and taking away 1.5 * 2^23 units: what remains of the sum
    are whole units.
    """
    unit = ulp(x, half)
    if uniform is None:
        magic = unit * (1.5 * 2.0**23)
        on_grid = (x + magic) - magic
    else:
        t = x / unit
        below = t.floor()
        on_grid = (below + (uniform < t - below).float()) * unit
    return torch.where(x.abs() < half.limit, on_grid, x)


def error_of(x: Tensor, p: Tensor, half: Half) -> Tensor:
    """What rounding ``x`` to ``p`` left, in ulps of ``p``: exact, in [-1/2, 1/2]."""
    return torch.where(x.abs() < half.limit, (x - p) / ulp(p, half), 0.0)


def with_error(p: Tensor, error: Tensor, half: Half) -> Tensor:
    """The value of a compensated parameter, float32: exact where ``error`` is one of ``ulp8``."""
    return p + error * ulp(p, half)

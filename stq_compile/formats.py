"""The registry of number formats: what a width means for a signed or non-negative state.

A block is 128 consecutive elements that share one 16-bit scale word. Four kinds of code:

``softsign``      signed, unit scale; levels ``+-k / (2K - k)``, ``k = 0..K = 2^(w-1) - 1``
``midrise``       signed, in units of the root ``d`` of a normalizer (a state whose root divides
                  this one in the update), at 8 bits of a power of two near it; evenly spaced
                  levels ``(code - (2^w - 1)/2) * step * d``
``adaptive_log``  non-negative; levels evenly spaced in their bit patterns, from the block's largest
                  element ``s`` down over its range ``R``: ``bits(s) - (L - code) * spacing``,
                  ``L = 2^w - 1``. A float's bit pattern, read as an integer, is its logarithm up to
                  0.086 octaves (Mitchell, "Computer multiplication and division using binary
                  logarithms", 1962), so levels are within 6% of ``s * 2^(-R * (1 - code/L))``
``ulp``           signed, no blocks: multiples of 2^-8 in [-1/2, 1/2), the error of a parameter of
                  16 bits in units of its last place (design/0016)
``orthogonal``    ``softsign`` levels, to nearest; who reads such a matrix makes its columns
                  orthonormal again (`stq_compile.matrices`, design/0021)
``cholesky``      a symmetric positive semidefinite matrix: the triangle of its Cholesky factor, at
                  twice the width, and its diagonal in float32
``bfloat16``, ``float32``  plain casts, no blocks
``constant``      no bytes at all: a state at birth, before its first step, all one value

The exact arithmetic is `stq_compile.reference`; the compiled kernels must reproduce it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stq_compile.errors import FormatMismatchError, UnsupportedWidthError

BLOCK = 128
LANES = 16
PLANES = BLOCK // LANES

Kind = Literal[
    "softsign", "midrise", "adaptive_log", "orthogonal", "cholesky", "ulp", "bfloat16", "float32",
    "constant",
]  # fmt: skip
MatrixKind = Literal["orthogonal", "semidefinite"]
"""What is known of a state that is a matrix: orthonormal columns (or rows), or symmetric and
positive semidefinite."""

FIELDS: dict[int, tuple[int, ...]] = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    8: (8,),
    12: (8, 4),
}
"""Power-of-two fields, low bits first, that make up a code of each width."""

WIDTHS = (2, 3, 4, 5, 6, 8, 16, 32)

WEIGHTS_WIDTH = 12
"""The least width of a state that is a copy of its parameter, in ``softsign``, whose levels lie
some four times as close as those of ``bfloat16``. It is no width to ask for (design/0013)."""

MIXED_WIDTH = 8
"""The least width of a state whose errors a product mixes and the update enlarges (design/0022)."""

MATRIX_WIDTH = 4
"""The least width of ``orthogonal`` and ``cholesky``: at 3 bits neither does its work."""

# adaptive_log: the range R of a block, in octaves, is (k + 1) * RANGE_STEP for a 5-bit k, and the
# spacing of its levels k + 1 times `Format.spacing`.
MAX_RANGE = 14.0
RANGE_STEP = MAX_RANGE / 32
TAIL_DEVIATIONS = {2: 1.2815515, 3: 1.2815515, 4: 1.5, 5: 2.0, 6: 2.0, 8: 2.5}
"""How many standard deviations below the mean of log2 the range ends, by width. What lies below is
raised to its end, and moves too little for good; what lies within has levels that are the closer
the shorter the range is. And noise widens the range, which widens the distance between levels and
with it the noise: at few levels that runs away if the range reaches far and the average is slow
(design/0008). Up to 3 bits it ends at the 10th percentile of a normal distribution."""

MEAN_PULL = 1.0 / 8.0
"""How much stochastic rounding of ``adaptive_log`` leans down, per octave between two levels: up
with probability ``f - c f (1 - f)`` and terms in ``c^2``, ``c`` this times the distance in octaves,
one at most. It is the random number that is bent: ``n + c (n^2 - 1/4)`` for ``n`` in (-1/2, 1/2).
The mean update, whose divisor is the root, is then right within some percent (design/0002).
"""
PULLED = 6
"""The widest width that leans: at 8 bits levels are a 20th of an octave apart at most."""

MIDRISE_CLIP = {2: 1.6, 3: 2.6}
"""Clip of the normalized value in units of its root mean square, from trials on small GPTs; wider
codes reach to the largest value of the block."""

MIDRISE_SLACK = 1.0 - 2.0**-20
"""What the reach of those loses, so that rewriting a block does not round its step up again."""
MIDRISE_LARGEST_UNIT = 2.0**64
"""A unit beyond the root of every finite float32. Where a normalizer has overflowed, this is the
unit, so that its state stays finite; the update divides by the infinity as ever."""
POWER_UNIT_WIDTH = 8
"""The width of ``midrise`` whose unit is a power of two, within a factor of 1.42 of the root: two
integer operations and no root, for an error that is a third larger and small at 8 bits."""
MIDRISE_SHRINK = 1.0 - 2.0**-19
"""What their values lose, so that none lies beyond the last level and no code has to be cut off."""

ULP_STEP = 2.0**-8
"""What a code of ``ulp`` counts: the 256th part of a unit in the last place."""

# Least-maximum polynomials, fitted once in float64 and rounded to float32.
# A float's bit pattern, read as an integer, is its log2 in units of 2^-23 octaves but for a bend
# between powers of two: log2(m) - (m - 1) = (x^2 - 1/4) P(x), x = m - 3/2, for a mantissa m in
# [1, 2). Absolute error 2.2e-6 octaves, none at powers of two. (Not so of denormal numbers.)
BEND_COEFFICIENTS = (
    -0.33985254168510437,
    0.15269805490970612,
    -0.07677639275789261,
    0.044273555278778076,
    -0.02584126964211464,
)
OCTAVE = 2.0**-23
"""The share of an octave that one unit of a bit pattern stands for."""


@dataclass(frozen=True)
class Format:
    """One way to store a state: kind and width say everything else."""

    kind: Kind
    width: int

    @property
    def name(self) -> str:
        return self.kind if self.width >= 16 or self.width == 0 else f"{self.kind}{self.width}"

    @property
    def blocked(self) -> bool:
        """Whether elements share scales in blocks of ``BLOCK``."""
        return 0 < self.width < 16 and self.kind not in ("ulp", "cholesky")

    @property
    def whole(self) -> bool:
        """Whether a tensor is encoded and decoded as one matrix, and not block by block."""
        return self.kind == "cholesky"

    @property
    def coded(self) -> Format:
        """The format of the numbers that it stores."""
        if self.kind == "orthogonal":
            return FORMATS[f"softsign{self.width}"]
        if self.kind == "cholesky":
            return BFLOAT16 if self.width == 8 else FORMATS[f"softsign{2 * self.width}"]
        return self

    @property
    def matrix(self) -> MatrixKind | None:
        """What a matrix that it is made for is."""
        if self.kind == "orthogonal":
            return "orthogonal"
        return "semidefinite" if self.kind == "cholesky" else None

    @property
    def signed(self) -> bool:
        return self.kind != "adaptive_log"

    @property
    def normalized(self) -> bool:
        """Whether values are stored in units of another state."""
        return self.kind == "midrise"

    @property
    def top_code(self) -> int:
        """The largest valid code."""
        return (1 << self.width) - (2 if self.kind in ("softsign", "orthogonal") else 1)

    @property
    def spacing(self) -> int:
        """``adaptive_log``: how far apart the bit patterns of levels are, per step of the range."""
        return int(RANGE_STEP / OCTAVE) // self.top_code

    @property
    def noise_scale(self) -> float:
        """What makes a random int32 a number in (-1/2, 1/2) that, added to a position, never moves
        what is on a level: the ends are cut off by what a position of this width is rounded."""
        return (1.0 - 2.0 ** (self.width - 20)) * 2.0**-32

    @property
    def power_unit(self) -> bool:
        """Whether the unit is a power of two near the normalizer's root, and not the root."""
        return self.normalized and self.width == POWER_UNIT_WIDTH

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of one block."""
        return BLOCK // 8 * self.width

    def nbytes(self, numel: int) -> int:
        """All bytes of ``numel`` elements: codes and scale words."""
        if self.whole:
            n = side(numel)
            return self.coded.nbytes(n * (n - 1) // 2) + 4 * n
        if not self.blocked:
            return numel * self.width // 8
        return block_count(numel) * (self.block_bytes + 2)


FLOAT32 = Format("float32", 32)
BFLOAT16 = Format("bfloat16", 16)
ULP8 = Format("ulp", 8)
CONSTANT = Format("constant", 0)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(Format("softsign", w) for w in FIELDS),
        *(Format("midrise", w) for w in FIELDS if w in WIDTHS),
        *(Format("adaptive_log", w) for w in FIELDS if w in WIDTHS),
        ULP8,
        BFLOAT16,
        FLOAT32,
        CONSTANT,
    )
}

MATRIX_FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(Format("orthogonal", w) for w in FIELDS if w >= MATRIX_WIDTH and w in WIDTHS),
        *(Format("cholesky", w) for w in (MATRIX_WIDTH, 8)),
    )
}
"""Formats for matrices of one kind; those in ``FORMATS`` are for any values."""


def block_count(numel: int) -> int:
    """Blocks that hold ``numel`` elements; the last one may be partly padding."""
    return -(-numel // BLOCK)


def side(numel: int) -> int:
    """The rows of a square matrix of ``numel`` elements."""
    n = math.isqrt(numel)
    if n * n != numel:
        raise FormatMismatchError(
            where="format cholesky", found=f"{numel} elements", expected="a square matrix"
        )
    return n


def choose_format(
    width: int,
    *,
    nonnegative: bool,
    normalizable: bool,
    matrix: MatrixKind | None = None,
    where: str = "state",
) -> Format:
    """The recommended format of a width, from what the graph says about the state.

    A semidefinite matrix that is asked for in 16 bits gets ``cholesky8``, which is nearer to it
    than ``bfloat16`` is and smaller.
    """
    if width == WEIGHTS_WIDTH:
        return FORMATS[f"softsign{width}"]
    if width not in WIDTHS:
        raise UnsupportedWidthError(where=where, width=width, valid=WIDTHS)
    if width == 32:
        return FLOAT32
    if matrix == "semidefinite":
        return MATRIX_FORMATS[f"cholesky{MATRIX_WIDTH if width <= MATRIX_WIDTH else 8}"]
    if width == 16:
        return BFLOAT16
    if matrix == "orthogonal":
        return MATRIX_FORMATS[f"orthogonal{max(width, MATRIX_WIDTH)}"]
    if nonnegative:
        return FORMATS[f"adaptive_log{width}"]
    if normalizable:
        return FORMATS[f"midrise{width}"]
    return FORMATS[f"softsign{width}"]

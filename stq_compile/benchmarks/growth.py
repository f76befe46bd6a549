"""How the cost of a packed step grows: with parameters, with tensors, with threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stq_compile.benchmarks.contenders import Contender
from stq_compile.benchmarks.measure import compare

WIDTH = 4096
PARAMETERS = (1_000_000, 10_000_000, 100_000_000, 500_000_000)
TENSORS = (10, 100, 1000, 2000)
SMALL = 4096
"""Elements of a tensor where tensors are counted."""


@dataclass(frozen=True)
class Point:
    """``size`` parameters, tensors or threads, and what a step costs there."""

    size: int
    value: float


def by_parameters(contender: Contender, most: int, rounds: int) -> list[Point]:
    """Nanoseconds per parameter."""
    found = []
    for size in (s for s in PARAMETERS if s <= most):
        shapes = [(max(1, size // WIDTH), WIDTH)]
        (timing,) = compare(shapes, [contender], rounds=rounds)
        found.append(Point(size, timing.ns))
    return found


def by_tensors(contender: Contender, most: int, rounds: int) -> list[Point]:
    """Microseconds per tensor of 4,096 elements, beyond what one tensor of as many elements as
    all of them takes."""
    found = []
    for count in (t for t in TENSORS if t <= most):
        many, one = (
            compare(shapes, [contender], rounds=rounds)[0].ns
            for shapes in ([(SMALL,)] * count, [(SMALL * count,)])
        )
        found.append(Point(count, (many - one) * SMALL * count / (count - 1) / 1e3))
    return found


def by_threads(
    shapes: Sequence[Sequence[int]],
    make: Callable[[], Sequence[Contender]],
    threads: Sequence[int],
    rounds: int,
) -> dict[int, list[float]]:
    """Nanoseconds per parameter of each contender by number of threads."""
    before = torch.get_num_threads()
    found = {}
    try:
        for count in threads:
            torch.set_num_threads(count)
            found[count] = [t.ns for t in compare(shapes, make(), rounds=rounds)]
    finally:
        torch.set_num_threads(before)
    return found

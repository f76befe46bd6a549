"""Which arrays of a tile take the place of others that end."""

from __future__ import annotations

import pytest

from stq_compile.codegen.ir import Builder, KernelOperand, OperandKind
from stq_compile.codegen.schedule import Schedule
from stq_compile.codegen.verify import verify_kernel

OPERANDS = tuple(KernelOperand(n, OperandKind.FLOATS, written=True) for n in ("p", "q"))


def chain(late: bool = False, integers: bool = False) -> Schedule:
    """Three loops: x for its maximum; y of x and that, for its own maximum; and what is stored of
    y. ``late``: x is read again after y. ``integers``: y is one."""
    b = Builder("chain", OPERANDS)
    x = b.op("mul", b.read("load", "p"), b.read("load", "q"), name="x")
    first = b.op("from_bits", b.reduce("block_max", b.op("bits_of", x)))
    y = b.op("mul", x, first, name="y")
    if integers:
        y = b.op("to_int", y, name="whole")
    if late:
        b.store("store", "q", b.op("sub", x, b.op("to_float", y) if integers else y))
    bits = y if integers else b.op("bits_of", y)
    second = b.op("from_bits", b.reduce("block_max", bits))
    b.store("store", "p", b.op("mul", b.op("to_float", y) if integers else y, second))
    verify_kernel(b.kernel)
    return Schedule(b.kernel)


def heirs(schedule: Schedule, *kept: str) -> dict[str, str]:
    names = {id(v): v.name for v in schedule.kernel.body}
    found = schedule.heirs({i for i, name in names.items() if name in kept})
    return {names[i]: heir.name for i, heir in found.items()}


def test_an_array_that_begins_takes_the_place_of_one_that_ends() -> None:
    assert heirs(chain()) == {"x": "y"}


def test_not_while_the_old_one_is_still_read() -> None:
    assert heirs(chain(late=True)) == {}


def test_not_of_another_type() -> None:
    assert heirs(chain(integers=True)) == {}


@pytest.mark.parametrize(("kept", "expected"), [("x", {}), ("y", {"x": "y"})])
def test_what_is_kept_gives_up_no_place_and_may_take_one(
    kept: str, expected: dict[str, str]
) -> None:
    assert heirs(chain(), kept) == expected

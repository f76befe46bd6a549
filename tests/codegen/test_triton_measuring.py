"""Measuring kernels in Triton, under the interpreter: the sums of the C++ kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_measure_kernel import MOMENTUM, Looks, assert_near

from interpreter import executable, submit
from stq_compile.codegen.lower import lower
from stq_compile.codegen.triton import run
from stq_compile.codegen.triton.emit import emit
from stq_compile.compiler import Unit
from stq_compile.runtime import MeasuringBucket
from zoo import sgd

STRIDE = 2
SIZES = (129, 4096 + 17, 1000)
FAULTS = {
    "the slot of a sum": ("* 21 + 3, tl.sum(", "* 21 + 4, tl.sum("),
    "the stride": ("[:, None] * stride", "[:, None]"),
    "the blocks that exist": ("tl.where(present, block_sum_3,", "tl.where(local > 0, block_sum_3,"),
    "the elements that exist": ("+ element < count", "+ element < count - 1"),
    "the place of a block's codes": ("first * 64", "first * 32"),
    "the word of a scale": ("momentum_buffer_0_word << 16", "momentum_buffer_0_word << 15"),
}
"""What stands once in the source, and what takes its place."""


def look(fault: str, tiles: int, blocks: int) -> tuple[str, int]:
    """What differs from the C++ kernel, and how many launches were made."""
    looks = Looks(sgd(), MOMENTUM, SIZES)
    expected = looks.look(STRIDE, 1)
    right = emit(lower(looks.graph))
    old, new = FAULTS.get(fault, ("", ""))
    assert not fault or right.source.count(old) == 1
    source = right.source.replace(old, new) if fault else right.source
    kernel = executable(replace(right, source=f"# {fault}\n{source}"), blocks)
    launches: list[int] = []
    measure = type(kernel.kernel).measure

    def counted(*args: object, **kwargs: object) -> object:
        launches.append(1)
        return measure(*args, **kwargs)  # type: ignore[arg-type]  # as they came

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "MEASURED_TILES", tiles)
        patch.setattr(type(kernel.kernel), "measure", counted)
        looks.bucket = MeasuringBucket(Unit(looks.graph, looks.kernel, kernel), looks._resolve)
        got = looks.look(STRIDE, 1)
    try:
        for mine, theirs in zip(got, expected, strict=True):
            assert_near(mine, theirs, 1e-5)
    except AssertionError as error:
        return f"seen: {error}", len(launches)
    return "", len(launches)


def test_a_look_in_one_launch_and_in_several_finds_the_same() -> None:
    """A tile of one block as on a GPU, and of many; a look takes no more memory than a launch."""
    one, several = submit(look, "", 1 << 16, 1), submit(look, "", 3, 4)
    assert one.result() == ("", 1)
    assert several.result() == ("", 2)


def test_the_comparison_sees_faults() -> None:
    started = {fault: submit(look, fault, 1 << 16, 64) for fault in ("", *FAULTS)}
    seen = {fault: future.result()[0] for fault, future in started.items()}
    assert not seen.pop("")
    assert all(seen.values()), seen

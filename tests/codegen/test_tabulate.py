"""Decoding by table changes no bit, and leaves nothing per element that a table can hold."""

from __future__ import annotations

import pytest

from graphs import Sketch, aten
from kernels import Rig, compiled, differing, kernel_of, quantized
from stq_compile.codegen.ir import Kernel, Space
from stq_compile.codegen.lower import lower
from stq_compile.codegen.tabulate import MAX_WIDTH, tabulate
from stq_compile.codegen.verify import verify_kernel
from stq_compile.formats import FORMATS, Format
from stq_compile.options import Rounding
from stq_compile.step_graph import StepGraph
from zoo import ADAM_FACTS, adam, sgd

NORMALIZERS = {"exp_avg": "exp_avg_sq"}


def decay() -> StepGraph:
    """``s' = 0.9 s``: with nearest rounding the new code depends on the old one alone."""
    s = Sketch("decay")
    p, g, new = s.param(), s.grad(), {}
    for key in DECAYING:
        state = s.state(key)
        new[state] = s.call(aten.mul.Tensor, state, 0.9)
    total = s.call(aten.add.Tensor, g, s.call(aten.add.Tensor, *new.values()))
    return s.functional(new | {p: s.call(aten.sub.Tensor, p, total)})


def momentum(name: str) -> dict[str, Format]:
    return {"momentum_buffer": FORMATS[name]}


def moments(first: str, second: str) -> dict[str, Format]:
    return {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}


DECAYING = {"signed": FORMATS["softsign3"], "nonnegative": FORMATS["adaptive_log2"]}
CASES: dict[str, tuple[StepGraph, dict[str, Format], Rounding]] = {
    "decay": (decay(), DECAYING, "nearest"),
    "adam": (adam(ADAM_FACTS), moments("softsign4", "adaptive_log3"), "stochastic"),
    "midrise": (adam(ADAM_FACTS), moments("midrise2", "adaptive_log4"), "nearest"),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_bit_equal(name: str) -> None:
    unit, formats, rounding = CASES[name]
    normalizers = {k: v for k, v in NORMALIZERS.items() if k in formats and formats[k].normalized}
    results = []
    for tables in (True, False):
        rig = Rig(unit, formats, rounding, normalizers=normalizers, tables=tables)
        kernel = compiled(rig.kernel)
        for step in range(3):
            rig.run(kernel, step)
        results.append(rig.bits())
    assert not differing(*results)


def lookups(kernel: Kernel) -> int:
    return sum(v.opcode == "lookup" for v in kernel.body)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("kind", ["softsign", "adaptive_log"])
def test_narrow_codes_are_decoded_by_one_lookup(kind: str, width: int) -> None:
    formats = momentum(f"{kind}{width}")
    kernel = kernel_of(quantized(sgd(), formats, "nearest"))
    verify_kernel(kernel)
    assert lookups(kernel) == 1
    decoding = {"shift_left", "to_float", "from_bits"} if kind == "softsign" else {"int_mul"}
    unpacked = next(i for i, v in enumerate(kernel.body) if v.opcode == "unpack")
    found = next(i for i, v in enumerate(kernel.body) if v.opcode == "lookup")
    between = [v for v in kernel.body[unpacked:found] if v.space is Space.ELEMENT]
    assert not decoding & {v.opcode for v in between}


@pytest.mark.parametrize("width", [5, 6, 8])
def test_wide_codes_are_left_alone(width: int) -> None:
    assert width > MAX_WIDTH
    kernel = lower(quantized(sgd(), momentum(f"softsign{width}"), "nearest"))
    assert str(tabulate(kernel)) == str(kernel)


def test_the_argument_is_not_changed() -> None:
    kernel = lower(quantized(adam(ADAM_FACTS), moments("midrise2", "adaptive_log3"), "stochastic"))
    before = str(kernel)
    assert str(tabulate(kernel)) != before
    assert str(kernel) == before


def test_the_root_of_a_normalizer_is_taken_in_its_table() -> None:
    """A midrise state needs ``sqrt(v)`` per element: 16 roots a block, not 128."""
    kernel = kernel_of(quantized(adam(ADAM_FACTS), moments("midrise2", "adaptive_log4"), "nearest"))
    spaces = [v.space for v in kernel.body if v.opcode == "sqrt"]
    assert spaces.count(Space.TABLE) == 2  # v as it was stored, v as it will be
    assert spaces.count(Space.ELEMENT) == 1  # Adam's own, of the new v in float32


def test_origins_survive() -> None:
    kernel = kernel_of(quantized(sgd(), momentum("softsign4"), "nearest"))
    tables = [v for v in kernel.body if v.space is Space.TABLE and v.opcode != "iota"]
    assert tables
    assert all(v.origin for v in tables)

"""Compiled kernels against the reference: codes, scale words and parameters, bit for bit.

The promise is codes equal in 99.5% of the elements and never off by more than a level. Where the
arithmetic is float32 in the reference's order, more is true, and tested: every bit is equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from graphs import Sketch, aten
from kernels import (
    SIZES,
    Bits,
    Math,
    Rig,
    States,
    adam_math,
    codes_of,
    compiled,
    differing,
    sgd_math,
)
from stq_compile import reference
from stq_compile.formats import BLOCK, FORMATS, Format
from stq_compile.options import Rounding
from stq_compile.step_graph import StepGraph
from zoo import ADAM_FACTS, LR, adam, sgd

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
SIGNED = [f.name for f in FORMATS.values() if f.kind in ("softsign", "bfloat16")]
NONNEGATIVE = [f.name for f in FORMATS.values() if f.kind == "adaptive_log"]
MOMENTS = [
    ("softsign4", "adaptive_log3"), ("midrise2", "adaptive_log4"), ("midrise3", "bfloat16"),
    ("midrise3", "float32"), ("bfloat16", "adaptive_log8"),
]  # fmt: skip
NORMALIZER = {"exp_avg": "exp_avg_sq"}
STEPS = 3


def squares() -> StepGraph:
    """``v' = 0.9 v + 0.1 grad²``, a non-negative state; the parameter follows it."""
    s = Sketch("squares")
    p, g, v = s.param(), s.grad(), s.state("v")
    square = s.call(aten.mul.Tensor, s.call(aten.mul.Tensor, g, g), 0.1)
    new = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, v, 0.9), square)
    return s.functional({v: new, p: s.call(aten.sub.Tensor, p, s.call(aten.mul.Tensor, new, LR))})


def squares_math(p: Tensor, g: Tensor, s: States) -> tuple[Tensor, States]:
    v = s["v"] * 0.9 + g * g * 0.1
    return p - v * LR, {"v": v}


def one_state(name: str, rounding: Rounding) -> tuple[Rig, Math]:
    if FORMATS[name].signed:
        return Rig(sgd(), {"momentum_buffer": FORMATS[name]}, rounding), sgd_math
    return Rig(squares(), {"v": FORMATS[name]}, rounding), squares_math


def moments(first: str, second: str, rounding: Rounding) -> Rig:
    formats = {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}
    normalizers = NORMALIZER if FORMATS[first].normalized else {}
    return Rig(adam(ADAM_FACTS), formats, rounding, normalizers=normalizers)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", SIGNED + NONNEGATIVE)
def test_one_state(name: str, rounding: Rounding) -> None:
    rig, math = one_state(name, rounding)
    kernel = compiled(rig.kernel)
    for step in range(STEPS):
        expected = rig.expected(math, step)
        rig.run(kernel, step)
        assert not differing(rig.bits(), expected)
        assert_padding_is_zero(rig.bits(), rig.formats)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("first", "second"), MOMENTS)
def test_two_states(first: str, second: str, rounding: Rounding) -> None:
    """Roots are the reference's own here, which torch does not round correctly everywhere."""
    rig = moments(first, second, rounding)
    kernel = compiled(rig.kernel)
    for step in range(STEPS):
        expected = rig.expected(adam_math, step)
        rig.run(kernel, step)
        assert_codes_agree(rig.bits(), expected, rig.formats)
        assert_padding_is_zero(rig.bits(), rig.formats)


def assert_codes_agree(got: Bits, expected: Bits, formats: Mapping[str, Format]) -> None:
    """The promise, and parameters within two roundings."""
    for row, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(row["param"], wanted["param"], rtol=2.0**-22, atol=1e-9)
        for key, format in formats.items():
            if format.kind == "float32":
                torch.testing.assert_close(row[f"{key} codes"], wanted[f"{key} codes"])
                continue
            pair = [codes_of(bits[f"{key} codes"], format) for bits in (row, wanted)]
            off = (pair[0] - pair[1]).abs()
            assert off.max() <= 1, key
            assert (off == 0).double().mean() >= 0.995, key
            words = [bits[f"{key} scales"].long() for bits in (row, wanted)]
            assert all((a - b).abs().max() <= 1 for a, b in [words] if a.numel()), key


def assert_padding_is_zero(bits: Bits, formats: Mapping[str, Format]) -> None:
    for row in bits:
        numel = row["param"].numel()
        for key, format in formats.items():
            if format.blocked:
                assert not codes_of(row[f"{key} codes"], format)[numel:].any(), key


@pytest.mark.parametrize(
    ("first", "second", "rounding"),
    [("softsign4", "adaptive_log3", "stochastic"), ("midrise2", "adaptive_log4", "nearest")],
)
def test_results_do_not_depend_on_the_number_of_threads(
    first: str, second: str, rounding: Rounding
) -> None:
    """With enough blocks that threads share them, and a border inside of a tensor."""
    formats = {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}
    normalizers = NORMALIZER if FORMATS[first].normalized else {}
    sizes = (*SIZES, 1024 * BLOCK + 77, 5)
    rig = Rig(adam(ADAM_FACTS), formats, rounding, normalizers=normalizers, sizes=sizes)
    kernel = compiled(rig.kernel)
    start = rig.bits()
    results = []
    for threads in (1, 2, 3):
        rig.load(start)
        for step in range(2):
            rig.run(kernel, step, threads)
        results.append(rig.bits())
    assert not differing(results[0], results[1])
    assert not differing(results[0], results[2])
    assert differing(start, results[0])


@pytest.mark.parametrize("name", ["softsign4", "adaptive_log3", "bfloat16"])
def test_stochastic_rounding_depends_on_step_and_tensor_alone(name: str) -> None:
    """The same bits for a tensor alone as among others; others in another step."""
    rig, _ = one_state(name, "stochastic")
    kernel = compiled(rig.kernel)
    start = rig.bits()
    rig.run(kernel, 0)
    first = rig.bits()
    rig.load(start)
    rig.run(kernel, 1)
    assert differing(first, rig.bits())
    rig.load(start)
    rig.run(kernel, 0)
    assert not differing(first, rig.bits())


@pytest.mark.parametrize("name", ["softsign4", "softsign3", "adaptive_log3", "bfloat16"])
def test_states_and_gradients_at_the_edge_of_float32(name: str) -> None:
    """Zeros, denormals, the largest numbers, infinities and NaN: broken blocks stay broken."""
    rig, math = one_state(name, "nearest")
    kernel = compiled(rig.kernel)
    special = [0.0, -0.0, 1e-42, -1e-38, 1.1e19, -3e18, float("inf"), float("nan")]
    for row in rig.rows:
        blocks = row.grad[: row.grad.numel() // BLOCK * BLOCK].view(-1, BLOCK)
        for i, block in enumerate(blocks):
            block[i % 7 :: 5] = special[i % len(special)]
            if i % 3 == 0:
                block.fill_(special[i % len(special)])
    expected = rig.expected(math, 0)
    rig.run(kernel, 0)
    (key,) = rig.formats
    for bits, wanted in zip(rig.bits(), expected, strict=True):
        numel, words = bits["param"].numel(), wanted[f"{key} scales"]
        assert torch.equal(bits[f"{key} scales"], words)
        pairs = [(bits["param"], wanted["param"])]
        codes = [b[f"{key} codes"] for b in (bits, wanted)]
        values = [reference.decode(c, words, rig.formats[key], numel) for c in codes]
        for left, right in [*pairs, tuple(values)]:
            assert torch.equal(left.isnan(), right.isnan())
            assert torch.equal(left.nan_to_num(), right.nan_to_num())

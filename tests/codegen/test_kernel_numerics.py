"""Compiled kernels against the reference: codes, scale words and parameters.

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
    Rig,
    States,
    adam_math,
    codes_of,
    compiled,
    differing,
)
from stq_compile import reference
from stq_compile.formats import BLOCK, FORMATS, Format
from stq_compile.options import Rounding
from stq_compile.step_graph import StepGraph
from zoo import ADAM_FACTS, LR, adam

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
FAMILIES = {
    "signed": {f.name: f for f in FORMATS.values() if f.kind in ("softsign", "bfloat16")},
    "nonnegative": {f.name: f for f in FORMATS.values() if f.kind == "adaptive_log"},
}
"""One kernel has a state in every format of a family; the state's key is the format's name."""
MOMENTS: list[tuple[str, str, Rounding]] = [
    ("softsign4", "adaptive_log3", "stochastic"),
    ("midrise4", "adaptive_log3", "stochastic"),
    ("midrise5", "adaptive_log4", "nearest"),
    ("midrise6", "bfloat16", "stochastic"),
    ("midrise8", "adaptive_log8", "nearest"),
    ("midrise2", "adaptive_log4", "nearest"),
    ("midrise2", "adaptive_log4", "stochastic"),
    ("midrise3", "bfloat16", "nearest"),
    ("midrise3", "bfloat16", "stochastic"),
    ("bfloat16", "adaptive_log8", "nearest"),
]
NORMALIZER = {"exp_avg": "exp_avg_sq"}
STEPS = 3


def momenta(family: str) -> StepGraph:
    """``s' = 0.9 s + 0.1 x`` for every state, x being grad or grad²; the parameter follows all."""
    s = Sketch(family)
    p, g = s.param(), s.grad()
    x = g if family == "signed" else s.call(aten.mul.Tensor, g, g)
    writes, param = {}, p
    for key in FAMILIES[family]:
        state = s.state(key)
        kept, fresh = s.call(aten.mul.Tensor, state, 0.9), s.call(aten.mul.Tensor, x, 0.1)
        writes[state] = s.call(aten.add.Tensor, kept, fresh)
        param = s.call(aten.sub.Tensor, param, s.call(aten.mul.Tensor, writes[state], LR))
    return s.functional(writes | {p: param})


def momenta_math(p: Tensor, g: Tensor, states: States) -> tuple[Tensor, States]:
    x = g if "softsign4" in states else g * g
    new = {key: s * 0.9 + x * 0.1 for key, s in states.items()}
    for s in new.values():
        p = p - s * LR
    return p, new


def family_rig(family: str, rounding: Rounding) -> Rig:
    return Rig(momenta(family), FAMILIES[family], rounding)


def adam_rig(first: str, second: str, rounding: Rounding, sizes: tuple[int, ...] = SIZES) -> Rig:
    formats = {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}
    normalizers = NORMALIZER if FORMATS[first].normalized else {}
    return Rig(adam(ADAM_FACTS), formats, rounding, normalizers=normalizers, sizes=sizes)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_bit_for_bit(family: str, rounding: Rounding) -> None:
    rig = family_rig(family, rounding)
    kernel = compiled(rig.kernel)
    for step in range(STEPS):
        expected = rig.expected(momenta_math, step)
        rig.run(kernel, step)
        assert not differing(rig.bits(), expected)
        assert_padding_is_zero(rig.bits(), rig.formats)


@pytest.mark.parametrize(("first", "second", "rounding"), MOMENTS)
def test_two_moments(first: str, second: str, rounding: Rounding) -> None:
    rig = adam_rig(first, second, rounding)
    kernel = compiled(rig.kernel)
    for step in range(STEPS):
        expected = rig.expected(adam_math, step)
        rig.run(kernel, step)
        assert_codes_agree(rig.bits(), expected, rig.formats)
        assert_padding_is_zero(rig.bits(), rig.formats)


def assert_codes_agree(got: Bits, expected: Bits, formats: Mapping[str, Format]) -> None:
    """The promise: a root inside of an encoding may be rounded otherwise.

    The root of a normalizer of more than 4 bits is a product of two, some ulp beside the root of
    the product; so far the parameters differ too. Else they are equal.
    """
    wide = any(f.kind == "adaptive_log" and f.width > 4 for f in formats.values())
    for row, wanted in zip(got, expected, strict=True):
        tolerance = 1e-6 if wide else 0.0
        # Second moments in a signed format may be negative here, and have no root.
        torch.testing.assert_close(
            row["param"], wanted["param"], rtol=tolerance, atol=tolerance, equal_nan=True
        )
        for key, format in formats.items():
            pair = [codes_of(bits[f"{key} codes"], format) for bits in (row, wanted)]
            off = (pair[0] - pair[1]).abs()
            assert off.max() <= 1, key
            assert (off == 0).double().mean() >= 0.995, key
            words = [bits[f"{key} scales"].long() for bits in (row, wanted)]
            assert (words[0] - words[1]).abs().sum() <= 1, key


def assert_padding_is_zero(bits: Bits, formats: Mapping[str, Format]) -> None:
    for row in bits:
        numel = row["param"].numel()
        for key, format in formats.items():
            if format.blocked:
                assert not codes_of(row[f"{key} codes"], format)[numel:].any(), key


@pytest.mark.parametrize(("first", "second", "rounding"), [MOMENTS[0], MOMENTS[5]])
def test_results_do_not_depend_on_the_number_of_threads(
    first: str, second: str, rounding: Rounding
) -> None:
    """With enough blocks that threads share them, and borders inside of the last tensor."""
    rig = adam_rig(first, second, rounding, (*SIZES[:-1], 1024 * BLOCK + 77))
    kernel = compiled(rig.kernel)
    start = rig.bits()
    results = [rig.after(kernel, start, threads) for threads in (1, 2, 3)]
    assert not differing(results[0], results[1])
    assert not differing(results[0], results[2])
    assert differing(start, results[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_bits_depend_on_the_step_and_are_repeatable(family: str) -> None:
    rig = family_rig(family, "stochastic")
    kernel = compiled(rig.kernel)
    start = rig.bits()
    results = []
    for step in (0, 1, 0):
        rig.load(start)
        rig.run(kernel, step)
        results.append(rig.bits())
    assert not differing(results[0], results[2])
    changed = {name.split(" ", 1)[1] for name in differing(results[0], results[1])}
    assert changed == {f"{key} codes" for key in rig.formats}


SPECIAL = [0.0, -0.0, 1e-42, -1e-38, 1.1e19, -3e18, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_the_edge_of_float32(family: str) -> None:
    """Zeros, denormals, huge numbers, infinities and NaN, in whole blocks and in parts of some."""
    rig = family_rig(family, "nearest")
    kernel = compiled(rig.kernel)
    for row in rig.rows:
        for i, block in enumerate(row.grad[: row.grad.numel() // BLOCK * BLOCK].view(-1, BLOCK)):
            block[i % 7 :: 5 if i % 3 else 1] = SPECIAL[i % len(SPECIAL)]
    expected = rig.expected(momenta_math, 0)
    rig.run(kernel, 0)
    for bits, wanted in zip(rig.bits(), expected, strict=True):
        assert_same_numbers(bits["param"], wanted["param"], "param")
        for key, format in rig.formats.items():
            words = wanted[f"{key} scales"]
            assert torch.equal(bits[f"{key} scales"], words), key
            # In a block that holds a NaN the codes do not matter: its scale is NaN.
            values = [
                reference.decode(b[f"{key} codes"], words, format, bits["param"].numel())
                for b in (bits, wanted)
            ]
            assert_same_numbers(*values, key)


def assert_same_numbers(got: Tensor, expected: Tensor, name: str) -> None:
    same = (got == expected) | (got.isnan() & expected.isnan())
    if not bool(same.all()):
        pytest.fail(f"{name}: {got[~same][:3]} for {expected[~same][:3]}")

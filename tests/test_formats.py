"""The registry of formats: sizes, names and the choice of a format for a width."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stq_compile.errors import UnsupportedWidthError
from stq_compile.formats import (
    BLOCK,
    CONSTANT,
    FIELDS,
    FLOAT32,
    FORMATS,
    LANES,
    PLANES,
    WEIGHTS_WIDTH,
    WIDTHS,
    Format,
    block_count,
    choose_format,
)
from stq_compile.reference import empty_buffers

NAMES = st.sampled_from(sorted(FORMATS))
PACKED_WIDTHS = (2, 3, 4, 5, 6, 8)


def documented_bytes(format: Format, numel: int) -> int:
    """Blocks of 128 codes with a 16-bit scale word each; plain casts have no blocks."""
    if format.kind in ("softsign", "midrise", "adaptive_log"):
        whole, rest = divmod(numel, 128)
        return (whole + (rest > 0)) * (128 * format.width // 8 + 2)
    return {"float32": 4 * numel, "bfloat16": 2 * numel, "constant": 0, "ulp": numel}[format.kind]


def test_widths_and_geometry() -> None:
    assert WIDTHS == (2, 3, 4, 5, 6, 8, 16, 32)
    assert tuple(FIELDS) == (*PACKED_WIDTHS, WEIGHTS_WIDTH)
    assert WEIGHTS_WIDTH == 12
    assert (BLOCK, LANES, PLANES) == (128, 16, 8)


@pytest.mark.parametrize("width", FIELDS)
def test_fields_are_powers_of_two_that_add_up(width: int) -> None:
    assert sum(FIELDS[width]) == width
    assert set(FIELDS[width]) <= {1, 2, 4, 8}
    assert list(FIELDS[width]) == sorted(FIELDS[width], reverse=True)


def test_the_registry_is_complete_and_named_by_kind_and_width() -> None:
    expected = {f"softsign{w}" for w in PACKED_WIDTHS} | {f"adaptive_log{w}" for w in PACKED_WIDTHS}
    expected |= {f"midrise{w}" for w in (2, 3, 4, 5, 6, 8)}
    expected |= {"softsign12", "ulp8", "bfloat16", "float32", "constant"}
    assert set(FORMATS) == expected
    assert all(FORMATS[name].name == name for name in FORMATS)
    assert len(set(FORMATS.values())) == len(FORMATS)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_facts_of_a_format(name: str) -> None:
    format = FORMATS[name]
    kind = name.rstrip("0123456789") if format.blocked else name
    assert format.blocked == (kind in ("softsign", "midrise", "adaptive_log"))
    assert format.signed == (kind != "adaptive_log")
    assert format.normalized == (kind == "midrise")
    if format.blocked:
        # softsign's levels have a zero, and leave the last code unused; others use every code.
        assert format.top_code == 2**format.width - (2 if kind == "softsign" else 1)
        assert format.block_bytes == 16 * format.width


def test_a_format_is_a_value() -> None:
    assert Format("softsign", 4) == FORMATS["softsign4"]
    assert hash(Format("softsign", 4)) == hash(FORMATS["softsign4"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        FLOAT32.width = 16  # type: ignore[misc]


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(name=NAMES, numel=st.integers(0, 3000))
def test_bytes_are_what_the_formula_says_and_what_the_buffers_occupy(name: str, numel: int) -> None:
    format = FORMATS[name]
    codes, scales = empty_buffers(format, numel)
    assert format.nbytes(numel) == documented_bytes(format, numel)
    if format != CONSTANT:  # which keeps one float32, its value, whatever the size
        assert codes.nbytes + scales.nbytes == documented_bytes(format, numel)
    assert codes.untyped_storage().nbytes() + scales.untyped_storage().nbytes() == (
        codes.nbytes + scales.nbytes
    )


def test_a_constant_occupies_one_number() -> None:
    codes, scales = empty_buffers(CONSTANT, 10**12)
    assert codes.nbytes + scales.nbytes == 4


@pytest.mark.parametrize("width", PACKED_WIDTHS)
def test_true_bits_of_full_blocks_are_width_plus_an_eighth(width: int) -> None:
    assert 8 * FORMATS[f"softsign{width}"].nbytes(128 * 1000) == (width + 0.125) * 128 * 1000


@settings(deadline=None, derandomize=True, database=None)
@given(numel=st.integers(0, 10**13))
def test_block_count_is_the_fewest_blocks_that_hold_the_elements(numel: int) -> None:
    blocks = block_count(numel)
    assert 128 * (blocks - 1) < numel <= 128 * blocks


# (width, non-negative, normalizable) -> format, from DESIGN.md, "Formats".
CHOICES = {
    **{(w, True, n): f"adaptive_log{w}" for w in PACKED_WIDTHS for n in (False, True)},
    **{(w, False, False): f"softsign{w}" for w in PACKED_WIDTHS},
    **{(w, False, True): f"midrise{w}" for w in (4, 5, 6, 8)},
    (2, False, True): "midrise2",
    (3, False, True): "midrise3",
    **{(16, s, n): "bfloat16" for s in (False, True) for n in (False, True)},
    **{(32, s, n): "float32" for s in (False, True) for n in (False, True)},
    **{(WEIGHTS_WIDTH, s, n): "softsign12" for s in (False, True) for n in (False, True)},
}


def test_the_table_of_choices_covers_every_width() -> None:
    assert {width for width, _, _ in CHOICES} == {*WIDTHS, WEIGHTS_WIDTH}
    assert len(CHOICES) == 4 * (len(WIDTHS) + 1)


@pytest.mark.parametrize(("asked", "name"), CHOICES.items())
def test_choose_format(asked: tuple[int, bool, bool], name: str) -> None:
    width, nonnegative, normalizable = asked
    chosen = choose_format(width, nonnegative=nonnegative, normalizable=normalizable)
    assert chosen == FORMATS[name]
    assert chosen.width == width


@pytest.mark.parametrize("width", [-4, 0, 1, 7, 9, 13, 64])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_an_unknown_width_is_an_error_that_lists_the_widths(width: int, nonnegative: bool) -> None:
    with pytest.raises(UnsupportedWidthError) as caught:
        choose_format(width, nonnegative=nonnegative, normalizable=False, where="exp_avg of w")
    message = str(caught.value)
    assert message.startswith(f"exp_avg of w: a width of {width} bits")
    assert all(str(valid) in message for valid in WIDTHS)

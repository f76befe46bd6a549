"""Options: what is valid, what is not, and that the message names the option and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stq_compile.errors import (
    ContradictoryOptionsError,
    InvalidOptionError,
    StqError,
    UnknownOptionError,
)
from stq_compile.formats import WIDTHS
from stq_compile.options import DEFAULT_PRECISION, Options

CASES = settings(deadline=None, derandomize=True, database=None)
NAMES = {f.name for f in dataclasses.fields(Options)}

VALID: list[dict[str, Any]] = [
    {},
    *({"precision": width} for width in (2, 3, 4, 5, 6, 8, 16, 32)),
    {"precision": None},
    {"precision": {}},
    {"precision": {"exp_avg": 4, "exp_avg_sq": 3}},
    {"precision": {"embed*:exp_avg": 8, "*": 32}},
    {"interval": 1},
    {"interval": 10**9},
    {"rounding": "nearest"},
    {"rounding": "stochastic"},
    {"seed": 0},
    {"seed": 2**64},
    {"min_numel": 0},
    {"exclude": ()},
    {"exclude": ["head.*", "embed"]},
    {"precision": 4, "interval": 50, "rounding": "nearest", "seed": 3, "min_numel": 1},
    {"precision": {"exp_avg": 8}, "exclude": "head"},
]


@pytest.mark.parametrize("given_", VALID, ids=str)
def test_valid_options_are_kept(given_: dict[str, Any]) -> None:
    options = Options.from_dict(given_)
    for name, value in given_.items():
        expected = (value,) if isinstance(value, str) and name == "exclude" else value
        assert getattr(options, name) == (tuple(expected) if name == "exclude" else expected)
    assert Options.from_dict({}) == Options()


def test_the_defaults() -> None:
    expected = {
        "precision": None,
        "target_bits": None,
        "tolerance": None,
        "interval": 100,
        "rounding": "stochastic",
        "seed": 0,
        "min_numel": 4096,
        "exclude": (),
    }
    assert dataclasses.asdict(Options()) == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["bits", "Precision", "", "target-bits", "min_numels"])
def test_an_unknown_option_is_named_and_the_valid_ones_are_listed(name: str) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        Options.from_dict({"seed": 1, name: 4})
    assert repr(name) in str(caught.value)
    listed = str(caught.value).split("the options are: ")[1].split(", ")
    assert listed == sorted(NAMES)


WIDTH_LIST = "(2, 3, 4, 5, 6, 8, 16, 32)"
NOT_WIDTHS: tuple[Any, ...] = (0, 1, 7, 9, 33, -4, 4.0, True, False, "4")
INVALID: list[tuple[str, Any, str]] = [
    *(("precision", w, WIDTH_LIST) for w in (*NOT_WIDTHS, [4])),
    *(("precision", {"exp_avg": w}, WIDTH_LIST) for w in (*NOT_WIDTHS, None)),
    ("precision", {"exp_avg": 4, "exp_avg_sq": 1}, WIDTH_LIST),
    ("precision", {3: 4}, "state names or globs"),
    ("precision", {("w", "exp_avg"): 4}, "state names or globs"),
    *(("interval", v, "at least 1") for v in (0, -1, 1.5, True, "100", None)),
    *(("min_numel", v, "at least 0") for v in (-1, 4096.0, True, "4k", None)),
    *(("seed", v, "at least 0") for v in (-1, 0.5, True, "0", None)),
    *(("rounding", v, "'stochastic' or 'nearest'") for v in ("up", "", None, 0, ["nearest"])),
    *(("exclude", v, "glob or a list of globs") for v in (5, None, [1], ["a", None], {"a": 1})),
]


@pytest.mark.parametrize(("name", "value", "remedy"), INVALID, ids=str)
def test_an_invalid_value_is_named_with_what_is_valid(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        Options.from_dict({name: value})
    message = str(caught.value)
    assert message.startswith(f"option {name}=")
    assert remedy in message
    if not isinstance(value, dict):  # of a dict, the wrong entry is shown
        assert repr(value) in message


@pytest.mark.parametrize("name", ["target_bits", "tolerance"])
@pytest.mark.parametrize("precision", [4, 32, {"exp_avg": 4}, {}])
def test_pinned_widths_contradict_a_budget(name: str, precision: Any) -> None:
    with pytest.raises(ContradictoryOptionsError) as caught:
        Options.from_dict({name: 4.0, "precision": precision})
    assert "'precision'" in str(caught.value)
    assert repr(name) in str(caught.value)


@CASES
@given(
    name=st.sampled_from(sorted(NAMES)),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text())
    ),
)
def test_any_value_is_accepted_or_refused_with_its_name(name: str, value: Any) -> None:
    """Nothing else than an error of our own may come out, whatever is given."""
    try:
        options = Options.from_dict({name: value})
    except StqError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert isinstance(options.width_of("weight", "exp_avg"), int)
        assert options.excludes("weight") in (False, True)


def test_checks_do_not_change_what_was_given() -> None:
    given_ = {"precision": {"exp_avg": 4}, "exclude": ["a*"]}
    Options.from_dict(given_)
    assert given_ == {"precision": {"exp_avg": 4}, "exclude": ["a*"]}


# Widths by glob -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "param", "state", "width"),
    [
        (None, "weight", "exp_avg", DEFAULT_PRECISION),
        (8, "weight", "exp_avg", 8),
        ({}, "weight", "exp_avg", DEFAULT_PRECISION),
        ({"exp_avg": 3}, "weight", "exp_avg", 3),
        ({"exp_avg": 3}, "weight", "exp_avg_sq", DEFAULT_PRECISION),  # a glob, not a prefix
        ({"exp_avg*": 3}, "weight", "exp_avg_sq", 3),
        ({"exp_avg?sq": 3}, "weight", "exp_avg_sq", 3),
        ({"[em]*": 3}, "weight", "momentum_buffer", 3),
        ({"*": 32}, "h.0.attn.weight", "sum", 32),
        ({"h.*:exp_avg": 8}, "h.0.attn.weight", "exp_avg", 8),  # * crosses the dots
        ({"h.*:exp_avg": 8}, "head.weight", "exp_avg", DEFAULT_PRECISION),
        ({"*.weight:*": 2}, "h.0.attn.weight", "exp_avg_sq", 2),
        ({"*.weight:*": 2}, "weight", "exp_avg_sq", DEFAULT_PRECISION),
        ({":exp_avg": 5}, "weight", "exp_avg", 5),  # an empty parameter pattern is any
        ({"a:b:exp_avg": 6}, "a:b", "exp_avg", 6),  # the last colon separates
        ({"Exp_Avg": 3}, "weight", "exp_avg", DEFAULT_PRECISION),  # case matters
        ({"exp_avg": 3, "*": 8}, "weight", "exp_avg", 8),  # the entry written last wins
        ({"*": 8, "exp_avg": 3}, "weight", "exp_avg", 3),
        ({"*": 8, "exp_avg": 3}, "weight", "sum", 8),
        ({"embed:exp_avg": 16, "exp_avg": 2}, "embed", "exp_avg", 2),
    ],
)
def test_width_of(precision: Any, param: str, state: str, width: int) -> None:
    assert Options.from_dict({"precision": precision}).width_of(param, state) == width


def test_the_default_precision_is_a_width() -> None:
    assert DEFAULT_PRECISION in WIDTHS


@pytest.mark.parametrize(
    ("exclude", "param", "excluded"),
    [
        ((), "weight", False),
        ("head*", "head.weight", True),
        ("head", "head.weight", False),
        (["embed.*", "head.*"], "head.bias", True),
        (("embed.*", "head.*"), "h.0.bias", False),
        ("", "weight", False),
        ("*", "anything", True),
        ("Head*", "head.weight", False),
    ],
)
def test_excludes(exclude: Any, param: str, excluded: bool) -> None:
    assert Options.from_dict({"exclude": exclude}).excludes(param) is excluded

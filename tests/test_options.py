"""Options: what is valid, what is not, and that the message names the option and the remedy."""

from __future__ import annotations

import dataclasses
import math
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
from stq_compile.options import DEFAULT_PRECISION, DEFAULT_TOLERANCE, Options

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
    {"target_bits": 4},
    {"target_bits": 32.0},
    {"tolerance": 1e-6},
    {"precision": {"exp_avg": 4}, "target_bits": 4.0},
    {"precision": {}, "tolerance": 0.1},
    {"ladder": (4,)},
    {"ladder": (2, 8, 32)},
    {"hysteresis": 0, "dwell": 0, "rungs": 7, "alarm": 1.5},
    {"hysteresis": 1.0},
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
        "param_rounding": "nearest",
        "seed": 0,
        "min_numel": 4096,
        "exclude": (),
        "ladder": WIDTHS,
        "hysteresis": 0.1,
        "dwell": 1,
        "rungs": 1,
        "alarm": 4.0,
        "record": None,
        "on_nonfinite": "propagate",
    }
    assert Options().planned
    assert Options().tolerance_or_default == DEFAULT_TOLERANCE
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
NOT_LADDERS: tuple[Any, ...] = (
    (), (4, 3), (3, 3), (3, 7), (4.0,), 4, None, "4", ([4],), (True,)
)  # fmt: skip
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
    *(("target_bits", v, "above 0 and at most 32") for v in (0, -1, 33, True, "4", [4])),
    *(("target_bits", v, "above 0 and at most 32") for v in (math.nan, math.inf)),
    *(("tolerance", v, "above 0") for v in (0, -0.1, False, "low", math.nan)),
    *(("hysteresis", v, "at most 1") for v in (-0.1, 1.1, True, None, math.nan)),
    *(("alarm", v, "above 1") for v in (1, 0, True, None)),
    *(("dwell", v, "at least 0") for v in (-1, 0.5, True, None)),
    *(("rungs", v, "at least 1") for v in (0, 1.5, True, None)),
    *(("ladder", v, "rising widths") for v in NOT_LADDERS),
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
@pytest.mark.parametrize("precision", [4, 32])
def test_one_width_for_all_leaves_nothing_to_plan(name: str, precision: int) -> None:
    with pytest.raises(ContradictoryOptionsError) as caught:
        Options.from_dict({name: 4.0, "precision": precision})
    assert "'precision'" in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_size_and_an_error_contradict_each_other() -> None:
    with pytest.raises(ContradictoryOptionsError, match="'target_bits' and 'tolerance'"):
        Options.from_dict({"target_bits": 4.0, "tolerance": 0.1})


@pytest.mark.parametrize("goal", [{"target_bits": 4.0}, {"tolerance": 0.1}])
def test_a_dict_pins_what_it_matches_and_the_rest_is_planned(goal: dict[str, float]) -> None:
    options = Options.from_dict({"precision": {"head*:exp_avg": 8}, **goal})
    assert options.planned
    assert options.width_of("head.weight", "exp_avg") == 8
    assert options.width_of("head.weight", "exp_avg_sq") is None
    assert options.width_of("body", "exp_avg") is None
    assert not Options.from_dict({"precision": {"exp_avg": 8}}).planned


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 8),
        ({"tolerance": 0.1}, 8),
        ({"ladder": (2, 3)}, 3),
        ({"ladder": (16, 32)}, 16),
        ({"target_bits": 4.0}, 3),  # a scale takes an eighth of a bit
        ({"target_bits": 4.125}, 4),
        ({"target_bits": 30.0}, 8),
        ({"target_bits": 2.0}, 2),
    ],
)
def test_the_width_before_a_planner_can_look(options: dict[str, Any], width: int) -> None:
    assert Options.from_dict(options).unplanned_width == width


def test_a_pin_counts_before_the_state_has_a_name() -> None:
    options = Options.from_dict({"precision": {"head:m": 16, "body:m": 2}, "tolerance": 0.1})
    assert options.width_of_created("head") == 16
    assert options.width_of_created("body") == 8


@pytest.mark.parametrize(
    ("precision", "unmatched"),
    [
        (None, None), (4, None), ({}, None), ({"exp_avg": 4, "*": 8}, None),
        ({"exp_avg": 4, "exp_avgg": 4}, "exp_avgg"),
        ({"head.*:exp_avg": 4}, None), ({"heads.*:exp_avg": 4}, "heads.*:exp_avg"),
        ({"head.*:exp": 4}, "head.*:exp"), ({":step": 32}, None),
    ],
)  # fmt: skip
def test_a_key_that_matches_nothing_is_found(precision: Any, unmatched: str | None) -> None:
    options = Options.from_dict({"precision": precision})
    found = options.unmatched(["head.weight", "body"], ["step", "exp_avg", "exp_avg_sq"])
    assert found == unmatched


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
        width = options.width_of("weight", "exp_avg")
        assert width is None if options.planned else isinstance(width, int)
        assert options.excludes("weight") in (False, True)


def test_checks_do_not_change_what_was_given() -> None:
    given_ = {"precision": {"exp_avg": 4}, "exclude": ["a*"]}
    Options.from_dict(given_)
    assert given_ == {"precision": {"exp_avg": 4}, "exclude": ["a*"]}


# Widths by glob -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "param", "state", "width"),
    [
        (None, "weight", "exp_avg", None),
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
def test_width_of(precision: Any, param: str, state: str, width: int | None) -> None:
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

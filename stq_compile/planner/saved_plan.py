"""Whether what a checkpoint says of a planner is what `Planner.state_dict` wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from stq_compile.errors import CheckpointError
from stq_compile.formats import WIDTHS
from stq_compile.passes.measure import LADDER
from stq_compile.planner.factors import FACTOR_NAMES
from stq_compile.planner.history import Change, Record
from stq_compile.planner.selection import Calibration, Certificate

Check = Callable[[Any, str], None]
"""Raises CheckpointError, with the entry's name, for a value that is wrong."""

OF_WIDTHS = ("narrowness", "predicted")
"""Factors that `Measured.at` makes from a width."""


def check(saved: Any, entry: str, plan: Mapping[tuple[int, str], int]) -> None:
    """Every field of a saved planner, and that its widths are those of ``plan``.

    Raises:
        CheckpointError: names the field.
    """
    _PLANNER(saved, entry)
    widths = {(param, key): width for param, key, width in saved["widths"]}
    for key, width in widths.items():
        if plan.get(key) != width:
            _fail(f"{entry}.widths", f"{width} bits for {key}", f"{plan.get(key)}, as in the plan")


def _fail(entry: str, found: object, expected: object) -> None:
    raise CheckpointError(entry=entry, found=found, expected=expected)


def _value(expected: str, accepts: Callable[[Any], bool]) -> Check:
    def check(value: Any, entry: str) -> None:
        if not accepts(value):
            _fail(entry, repr(value), expected)

    return check


def _optional(inner: Check) -> Check:
    def check(value: Any, entry: str) -> None:
        if value is not None:
            inner(value, entry)

    return check


def _list(inner: Check) -> Check:
    def check(value: Any, entry: str) -> None:
        if not isinstance(value, (list, tuple)):
            _fail(entry, type(value).__name__, "a list")
        for i, item in enumerate(value):
            inner(item, f"{entry}[{i}]")

    return check


def _row(*inner: Check, since: int = 0) -> Check:
    """A list of these values, of which the last ``since`` were not there at first."""

    def check(value: Any, entry: str) -> None:
        least = len(inner) - since
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= len(inner):
            _fail(entry, repr(value)[:80], f"a list of {len(inner)} values")
        for item, one in zip(value, inner, strict=False):
            one(item, entry)

    return check


def _dict(**inner: Check) -> Check:
    """A dict with exactly these keys."""

    def check(value: Any, entry: str) -> None:
        if not isinstance(value, Mapping) or value.keys() != inner.keys():
            found = list(value) if isinstance(value, Mapping) else type(value).__name__
            _fail(entry, found, f"a dict of {', '.join(inner)}")
        for name, one in inner.items():
            one(value[name], f"{entry}.{name}")

    return check


def _mapping(inner: Check) -> Check:
    """A dict from strings."""

    def check(value: Any, entry: str) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            _fail(entry, type(value).__name__, "a dict with string keys")
        for name, item in value.items():
            inner(item, f"{entry}.{name}")

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_WHOLE = _value("a whole number", lambda v: type(v) is int and v >= 0)
_WIDTH = _value(f"one of the widths {WIDTHS}", lambda v: type(v) is int and v in WIDTHS)
_TEXT = _value("a string", lambda v: isinstance(v, str))
_FINITE = _value("a finite number", lambda v: _is_number(v) and math.isfinite(v))
_POSITIVE = _value("a number above 0", lambda v: _is_number(v) and 0 < v < math.inf)
_ERROR = _value("an error of at least 0", lambda v: _is_number(v) and v >= 0)
_ERRORS = _dict(**{str(width): _ERROR for width in LADDER})
_FACTORS = {name: _FINITE for name in FACTOR_NAMES if name not in OF_WIDTHS}
_FACTOR = _value(f"one of {FACTOR_NAMES}", lambda v: v in FACTOR_NAMES)
_STATE = (_WHOLE, _TEXT)

_CERTIFICATE = _dict(
    **{f.name: _FINITE for f in fields(Certificate)}
    | {
        "factors": _list(_FACTOR), "gains": _list(_FINITE), "optimum": _optional(_FINITE)
    }
)  # fmt: skip
_CALIBRATION = _dict(
    **{f.name: _FINITE for f in fields(Calibration)}
    | {
        "certificate": _optional(_CERTIFICATE), "names": _list(_FACTOR), "mean": _list(_FINITE),
        "scale": _list(_POSITIVE), "coefficients": _list(_FINITE), "observations": _WHOLE,
        "limit": _ERROR,
    }
)  # fmt: skip


def _calibration(value: Any, entry: str) -> None:
    _CALIBRATION(value, entry)
    for name in ("mean", "scale", "coefficients"):
        if len(value[name]) != len(value["names"]):
            _fail(f"{entry}.{name}", f"{len(value[name])} values", f"{len(value['names'])}")


_CHANGE = _dict(
    **{f.name: _TEXT for f in fields(Change)}
    | {
        "before": _optional(_WIDTH), "after": _WIDTH, "error": _ERROR,
        "alternatives": _list(_row(_WIDTH, _ERROR, _WHOLE)), "factors": _mapping(_FINITE),
    }
)  # fmt: skip
_RECORD = _dict(
    **{f.name: _ERROR for f in fields(Record)}
    | {"step": _WHOLE, "mode": _TEXT, "calibration": _TEXT, "changes": _list(_CHANGE)}
)
_PLANNER = _dict(
    looks=_WHOLE,
    widths=_list(_row(*_STATE, _WIDTH)),
    waited=_list(_row(*_STATE, _WHOLE)),
    measured=_list(
        _row(
            *(*_STATE, _dict(**{str(w): _ERROR for w in LADDER}), _dict(**_FACTORS)),
            *(_FINITE, _ERROR),  # level, lost
            since=1,
        )
    ),
    observations=_list(_row(_row(*[_FINITE] * len(FACTOR_NAMES)), _FINITE)),
    calibration=_calibration,
    history=_list(_RECORD),
)

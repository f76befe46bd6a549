"""The options of ``stq.compile`` and of ``backend="stq"``: same names, same checks."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stq_compile.errors import (
    ContradictoryOptionsError,
    InvalidOptionError,
    UnknownOptionError,
)
from stq_compile.formats import WIDTHS

Rounding = Literal["stochastic", "nearest"]
ParamRounding = Literal["nearest", "stochastic", "compensated"]
OnNonfinite = Literal["propagate", "skip", "raise"]
Precision = int | Mapping[str, int]

DEFAULT_PRECISION = 4
"""Width of every state that no entry of a pinning ``precision`` names."""

UNPLANNED_PRECISION = 8
"""Width of a state that a planner could not yet look at."""

DEFAULT_TOLERANCE = 0.25
"""Predicted relative perturbation of the update that quality mode keeps to (design/0008)."""


@dataclass(frozen=True)
class Options:
    """Checked options; see the README's table for what each one does.

    ``precision`` maps ``"param-pattern:state-name"`` or ``"state-name"`` globs to widths; an int
    stands for every state. The entry written last that matches wins. A state that no entry
    matches gets ``DEFAULT_PRECISION``, or is left to the planner if ``target_bits`` or
    ``tolerance`` is given as well. Without ``precision`` the planner chooses all widths.
    """

    precision: Precision | None = None
    target_bits: float | None = None
    tolerance: float | None = None
    interval: int = 100
    rounding: Rounding = "stochastic"
    param_rounding: ParamRounding = "nearest"
    seed: int = 0
    min_numel: int = 4096
    exclude: tuple[str, ...] = ()
    ladder: tuple[int, ...] = WIDTHS
    hysteresis: float = 0.1
    dwell: int = 1
    rungs: int = 1
    alarm: float = 4.0
    record: str | None = None
    on_nonfinite: OnNonfinite = "propagate"

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Options:
        """Options from keyword arguments; raises on a name or value that is not valid."""
        names = {f.name for f in dataclasses.fields(cls)}
        for name in given:
            if name not in names:
                raise UnknownOptionError(name=name, valid=", ".join(sorted(names)))
        values = dict(given)
        if isinstance(values.get("ladder"), list):
            values["ladder"] = tuple(values["ladder"])
        if isinstance(values.get("record"), Path):
            values["record"] = str(values["record"])
        if "exclude" in values:
            values["exclude"] = _patterns(values["exclude"])
        options = cls(**values)
        options._check()
        return options

    @property
    def planned(self) -> bool:
        """Whether a planner chooses the widths that ``precision`` leaves open."""
        given = self.target_bits is not None or self.tolerance is not None
        return self.precision is None or given

    @property
    def tolerance_or_default(self) -> float:
        return DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance

    def width_of(self, param: str, state: str) -> int | None:
        """Width pinned for state ``state`` of parameter ``param``; None leaves it to a planner."""
        if isinstance(self.precision, int):
            return self.precision
        width = None if self.planned else DEFAULT_PRECISION
        for pattern, value in (self.precision or {}).items():
            param_pattern, _, state_pattern = pattern.rpartition(":")
            if fnmatch.fnmatchcase(state, state_pattern) and fnmatch.fnmatchcase(
                param, param_pattern or "*"
            ):
                width = value
        return width

    @property
    def as_torch_rounds(self) -> bool:
        """Whether steps on 16-bit parameters round after every operation, as torch does, and not
        once: where nothing is packed, the result is the stock optimizer's."""
        return self.param_rounding == "nearest" and self.precision == 32

    def pins_wide(self, param: str, state: str) -> bool:
        """Whether a state is pinned in float32."""
        return self.width_of(param, state) == 32

    def width_of_created(self, param: str) -> int:
        """Width of a state whose key is not known yet, since the step is about to create it.

        The widest that any entry gives to a state of this parameter, so that nothing is lost
        before the key is known.
        """
        return max(self._widths_of_created(param))

    def may_pack_created(self, param: str) -> bool:
        """Whether such a state may get less than 32 bits when its key is known."""
        return min(self._widths_of_created(param)) < 32 and not self.excludes(param)

    def _widths_of_created(self, param: str) -> list[int]:
        """What the entries, or their absence, give to states of a parameter."""
        if isinstance(self.precision, int):
            return [self.precision]
        unmatched = self.unplanned_width if self.planned else DEFAULT_PRECISION
        splits = [(*key.rpartition(":"), width) for key, width in (self.precision or {}).items()]
        widths = [w for p, _, _, w in splits if fnmatch.fnmatchcase(param, p or "*")]
        return widths if widths and not self.planned else [*widths, unmatched]

    @property
    def unplanned_width(self) -> int:
        """Width of a state before a planner can look at it: the widest within the budget."""
        most = UNPLANNED_PRECISION
        if self.target_bits is not None:
            most = min(most, math.floor(self.target_bits - 0.125))  # a block has a scale of 16 bits
        return max((w for w in self.ladder if w <= most), default=self.ladder[0])

    def unmatched(self, params: Collection[str], states: Collection[str]) -> str | None:
        """A key of ``precision`` that matches none of these parameters, or none of these states."""
        if not isinstance(self.precision, Mapping):
            return None
        for pattern in self.precision:
            param_pattern, _, state_pattern = pattern.rpartition(":")
            if not any(fnmatch.fnmatchcase(s, state_pattern) for s in states):
                return pattern
            if not any(fnmatch.fnmatchcase(p, param_pattern or "*") for p in params):
                return pattern
        return None

    def excludes(self, param: str) -> bool:
        """Whether the states of the parameter named ``param`` stay as they are."""
        return any(fnmatch.fnmatchcase(param, pattern) for pattern in self.exclude)

    def _check(self) -> None:
        self._check_precision()
        self._check_planning()
        _check_int("interval", self.interval, minimum=1)
        _check_int("min_numel", self.min_numel, minimum=0)
        _check_int("seed", self.seed, minimum=0)
        if self.record is not None and not (isinstance(self.record, str) and self.record):
            raise InvalidOptionError(
                name="record", value=self.record, reason="give the name of a file to write"
            )
        _check_choice("rounding", self.rounding, get_args(Rounding))
        _check_choice("param_rounding", self.param_rounding, get_args(ParamRounding))
        _check_choice("on_nonfinite", self.on_nonfinite, get_args(OnNonfinite))

    def _check_planning(self) -> None:
        given = [n for n in ("target_bits", "tolerance") if getattr(self, n) is not None]
        if len(given) == 2:
            raise ContradictoryOptionsError(
                first="target_bits",
                second="tolerance",
                reason="one asks for the least error at a size, the other for the least size",
            )
        if given and isinstance(self.precision, int):
            raise ContradictoryOptionsError(
                first="precision", second=given[0], reason="pinned widths leave nothing to choose"
            )
        if self.target_bits is not None:
            _check_number("target_bits", self.target_bits, above=0.0, most=32.0)
        if self.tolerance is not None:
            _check_number("tolerance", self.tolerance, above=0.0)
        _check_number("alarm", self.alarm, above=1.0)
        _check_number("hysteresis", self.hysteresis, above=-1e-9, most=1.0)
        _check_int("dwell", self.dwell, minimum=0)
        _check_int("rungs", self.rungs, minimum=1)
        rungs = self.ladder
        valid = isinstance(rungs, tuple) and all(type(w) is int and w in WIDTHS for w in rungs)
        if not valid or not rungs or list(rungs) != sorted(set(rungs)):
            raise InvalidOptionError(
                name="ladder", value=self.ladder, reason=f"give rising widths out of {WIDTHS}"
            )

    def _check_precision(self) -> None:
        if self.precision is None:
            return
        entries = (
            self.precision.items()
            if isinstance(self.precision, Mapping)
            else [("*", self.precision)]
        )
        for pattern, width in entries:
            if not isinstance(pattern, str):
                raise InvalidOptionError(
                    name="precision", value=pattern, reason="keys are state names or globs"
                )
            if isinstance(width, bool) or not isinstance(width, int) or width not in WIDTHS:
                raise InvalidOptionError(
                    name="precision", value=width, reason=f"the widths are {WIDTHS}"
                )


def _patterns(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(p, str) for p in value):
        return tuple(value)
    raise InvalidOptionError(
        name="exclude", value=value, reason="give a glob or a list of globs of parameter names"
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        *first, last = map(repr, choices)
        raise InvalidOptionError(name=name, value=value, reason=f"use {', '.join(first)} or {last}")


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidOptionError(
            name=name, value=value, reason=f"give a whole number of at least {minimum}"
        )


def _check_number(name: str, value: object, above: float, most: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value <= most:  # type: ignore[operator]
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise InvalidOptionError(
            name=name, value=value, reason=f"give a number above {max(above, 0.0):g}{limit}"
        )

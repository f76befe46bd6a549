"""The options of ``stq.compile`` and of ``backend="stq"``: same names, same checks."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stq_compile.errors import (
    ContradictoryOptionsError,
    InvalidOptionError,
    UnknownOptionError,
)
from stq_compile.formats import WIDTHS

Rounding = Literal["stochastic", "nearest"]
Precision = int | Mapping[str, int]

DEFAULT_PRECISION = 4
"""Width of every state that no ``precision`` entry names, until a planner chooses: at 4 bits
Adam's states together stay within the spread between fp32 seeds (design/0002)."""


@dataclass(frozen=True)
class Options:
    """Checked options; see the README's table for what each one does.

    ``precision`` maps ``"param-pattern:state-name"`` or ``"state-name"`` globs to widths; an int
    stands for every state. The entry written last that matches wins, and a state that no
    entry matches gets ``DEFAULT_PRECISION``.
    """

    precision: Precision | None = None
    target_bits: float | None = None
    tolerance: float | None = None
    interval: int = 100
    rounding: Rounding = "stochastic"
    seed: int = 0
    min_numel: int = 4096
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Options:
        """Options from keyword arguments; raises on a name or value that is not valid."""
        names = {f.name for f in dataclasses.fields(cls)}
        for name in given:
            if name not in names:
                raise UnknownOptionError(name=name, valid=", ".join(sorted(names)))
        values = dict(given)
        if "exclude" in values:
            values["exclude"] = _patterns(values["exclude"])
        options = cls(**values)
        options._check()
        return options

    def width_of(self, param: str, state: str) -> int:
        """Width asked for state ``state`` of the parameter named ``param``."""
        if self.precision is None:
            return DEFAULT_PRECISION
        if isinstance(self.precision, int):
            return self.precision
        width = DEFAULT_PRECISION
        for pattern, value in self.precision.items():
            param_pattern, _, state_pattern = pattern.rpartition(":")
            if fnmatch.fnmatchcase(state, state_pattern) and fnmatch.fnmatchcase(
                param, param_pattern or "*"
            ):
                width = value
        return width

    def width_of_created(self, param: str) -> int:
        """Width of a state whose key is not known yet, since the step is about to create it.

        The widest that any entry gives to a state of this parameter, so that nothing is lost
        before the key is known.
        """
        if self.precision is None or isinstance(self.precision, int):
            return self.width_of(param, "")
        splits = [(*pattern.rpartition(":"), width) for pattern, width in self.precision.items()]
        widths = [w for p, _, _, w in splits if fnmatch.fnmatchcase(param, p or "*")]
        return max(widths, default=DEFAULT_PRECISION)

    def excludes(self, param: str) -> bool:
        """Whether the states of the parameter named ``param`` stay as they are."""
        return any(fnmatch.fnmatchcase(param, pattern) for pattern in self.exclude)

    def _check(self) -> None:
        self._check_precision()
        for name in ("target_bits", "tolerance"):
            if getattr(self, name) is None:
                continue
            if self.precision is not None:
                raise ContradictoryOptionsError(
                    first="precision", second=name, reason="pinned widths leave nothing to choose"
                )
            raise InvalidOptionError(
                name=name,
                value=getattr(self, name),
                reason="the planner that chooses widths is not part of this version; "
                "pin them with precision=",
            )
        _check_int("interval", self.interval, minimum=1)
        _check_int("min_numel", self.min_numel, minimum=0)
        _check_int("seed", self.seed, minimum=0)
        if self.rounding not in ("stochastic", "nearest"):
            raise InvalidOptionError(
                name="rounding", value=self.rounding, reason="use 'stochastic' or 'nearest'"
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


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidOptionError(
            name=name, value=value, reason=f"give a whole number of at least {minimum}"
        )

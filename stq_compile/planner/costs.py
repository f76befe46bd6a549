"""What a decision is made from, its margins, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

from stq_compile.formats import WIDTHS

LADDER = WIDTHS


@dataclass(frozen=True)
class StateCosts:
    """One state of one tensor, as the decision sees it.

    Bytes need not rise with the width: a block of 8-bit codes that is mostly padding is larger
    than a few fp32 elements. An infinite error forbids a width.
    """

    key: tuple[int, str]  # (parameter number, state key); no two states have the same
    widths: tuple[int, ...]  # candidates, ascending; a pinned state has one
    nbytes: tuple[int, ...]  # all bytes at each width: codes and scales
    error: tuple[float, ...]  # weighted predicted error at each width: its share of the total
    current: int | None = None  # width in force; None before the first plan
    waited: int = 1 << 30  # decisions since its last change; 0 at the one right after it
    alarm: bool = False  # may jump several rungs upward at once, without waiting and at no cost


@dataclass(frozen=True)
class Rules:
    """Margins of the transition decision."""

    hysteresis: float = 0.1
    """A change must lower error + price × bytes by this share of the error at the width in force;
    and a total error that is below the tolerance by less than this share of it stays there."""
    dwell: int = 1
    """Decisions that a state keeps a width after a change, alarms excepted."""
    rungs: int = 1
    """How far a state may move among its widths in one decision, alarms excepted."""

    def __post_init__(self) -> None:
        if not self.hysteresis >= 0 or self.dwell < 0 or self.rungs < 0:
            raise ValueError(f"{self}: all of them are at least 0")


RULES = Rules()


@dataclass(frozen=True)
class Choice:
    """The width of one state."""

    key: tuple[int, str]
    width: int
    error: float
    nbytes: int
    moved: bool  # away from a width in force
    alternatives: tuple[tuple[int, float, int], ...]
    """Width, error and bytes of all candidates that were allowed, the chosen one included."""


@dataclass(frozen=True)
class Decision:
    """The widths of all states."""

    choices: tuple[Choice, ...]  # in the order of the states given
    price: float
    """The multiplier, error per byte: 0 where bytes are not scarce, infinite where forbidden
    widths could not all be avoided."""
    error: float  # total predicted error
    nbytes: int  # total bytes of these states

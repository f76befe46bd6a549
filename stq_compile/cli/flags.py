"""The options of ``stq.compile`` as flags of the same names (`target_bits` is `--target-bits`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from stq_compile.errors import InvalidOptionError

PANEL = "Compile options, as of stq.compile"


def _flag(kind: Any, help: str, metavar: str | None = None) -> Any:
    option = typer.Option(help=help, metavar=metavar, rich_help_panel=PANEL, show_default=False)
    return Annotated[kind, option]


FLAGS: dict[str, Any] = {
    "precision": _flag(
        list[str] | None,
        "Bits of every state, or of one: exp_avg=4, 'h.0.*:exp_avg=4'; may be repeated.",
        "BITS|STATE=BITS",
    ),
    "target_bits": _flag(float | None, "A budget of true bits per element."),
    "tolerance": _flag(float | None, "Predicted relative error of the update; the default mode."),
    "interval": _flag(int | None, "Steps between two looks of the planner."),
    "rounding": _flag(str | None, "stochastic or nearest."),
    "param_rounding": _flag(
        str | None, "How 16-bit parameters are: nearest, stochastic, compensated."
    ),
    "seed": _flag(int | None, "Of stochastic rounding."),
    "min_numel": _flag(int | None, "States of smaller tensors stay fp32."),
    "exclude": _flag(
        list[str] | None, "Parameters whose states stay fp32; may be repeated.", "GLOB"
    ),
    "ladder": _flag(str | None, "Widths that the planner may use, as 2,3,4,8.", "BITS,..."),
    "hysteresis": _flag(float | None, "What a change of width must gain."),
    "dwell": _flag(int | None, "Decisions that a width stays."),
    "rungs": _flag(int | None, "How far a width moves at once."),
    "alarm": _flag(float | None, "Growth of the error that lets a width jump."),
}
"""By option, what typer needs to know; the default of each is that of `options.Options`.

All options but ``record``, which streams a run, and ``on_nonfinite``: nothing is run here."""


def options_from(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``stq.compile`` from parsed flags; those not given are left out."""
    found = {n: given[n] for n in FLAGS if given[n] is not None and given[n] != []}
    if "precision" in found:
        found["precision"] = _precision(found["precision"])
    if "ladder" in found:
        found["ladder"] = tuple(_whole("ladder", w) for w in found["ladder"].split(","))
    return found


def _precision(entries: list[str]) -> int | dict[str, int]:
    pinned: dict[str, int] = {}
    for entry in entries:
        state, equals, width = entry.rpartition("=")
        pinned[state if equals else "*"] = _whole("precision", width)
    return pinned["*"] if list(pinned) == ["*"] else pinned


def _whole(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise InvalidOptionError(name=name, value=text, reason="widths are whole numbers of bits")
    return int(text)

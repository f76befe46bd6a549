"""What is compared: an optimizer as it comes, or compiled with some options of `stq.compile`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Precision = int | dict[str, int]

OPTIONS: dict[str, Callable[[str], object]] = {
    "tolerance": float,
    "target_bits": float,
    "interval": int,
    "min_numel": int,
    "seed": int,
    "rounding": str,
}


@dataclass(frozen=True)
class Variant:
    """A row of the table. `options` are those of `stq.compile`; None leaves the optimizer alone."""

    label: str
    options: Mapping[str, Any] | None

    @property
    def slug(self) -> str:
        """A part of a file name; it depends on the options alone, and may be shortened."""
        if self.options is None:
            return "fp32"
        flat = "-".join(f"{name}-{value}" for name, value in self.options.items()) or "auto"
        return re.sub(r"[^A-Za-z0-9_.]+", "-", flat).strip("-")[:48]


FP32 = Variant("fp32", None)
AUTO = Variant("packed, auto", {})


def parse_variant(text: str) -> Variant:
    """`fp32`, `auto`, or entries split by commas: options (`target_bits=3.1`) and widths.

    Widths are as in `parse_precision`, in their order, since the last that matches wins.

    Raises ValueError on anything else.
    """
    if text in ("fp32", "auto"):
        return FP32 if text == "fp32" else AUTO
    options: dict[str, object] = {}
    widths: list[str] = []
    for entry in text.split(","):
        name, _, value = entry.strip().partition("=")
        if name in OPTIONS:
            options[name] = _converted(name, value)
        else:
            widths.append(entry)
    precision = parse_precision(widths)
    if precision is not None:
        options["precision"] = precision
    return Variant(f"packed, {_described(options)}", options)


def packed(precision: Precision) -> Variant:
    """The variant in which every width is pinned."""
    return Variant(f"packed, {describe_precision(precision)}", {"precision": precision})


def parse_precision(values: Sequence[str]) -> Precision | None:
    """`["4"]` gives 4, `["exp_avg=4,exp_avg_sq=3"]` a dict, `[]` None; values may be split freely.

    Raises ValueError on anything else.
    """
    entries = [entry.strip() for value in values for entry in value.split(",")]
    if not entries:
        return None
    if len(entries) == 1 and entries[0].isdecimal():
        return int(entries[0])
    precision: dict[str, int] = {}
    for entry in entries:
        state, equals, width = entry.rpartition("=")
        if not (state and equals and width.isdecimal()):
            raise ValueError(f"{entry!r} is not STATE=WIDTH, as in exp_avg=4")
        precision.pop(state, None)  # one that is given again counts from its last place
        precision[state] = int(width)
    return precision


def describe_precision(precision: Precision) -> str:
    if isinstance(precision, int):
        return f"{precision} bits"
    return " ".join(f"{state}={width}" for state, width in precision.items())


def _described(options: Mapping[str, Any]) -> str:
    parts = [f"{name}={value}" for name, value in options.items() if name != "precision"]
    if "precision" in options:
        parts.append(describe_precision(options["precision"]))
    return " ".join(parts)


def _converted(name: str, value: str) -> object:
    try:
        return OPTIONS[name](value)
    except ValueError:
        raise ValueError(f"{name}={value} is not a number for {name}") from None

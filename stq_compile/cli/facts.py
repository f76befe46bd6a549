"""``stq facts``: what the graph proves about each state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from stq_compile.cli.common import Subject, console, print_json, print_regions, verb

if TYPE_CHECKING:
    from stq_compile.formulas import Formulas
    from stq_compile.step_graph import StepGraph

app = typer.Typer()

LABELS = {
    "sign": "sign",
    "recurrence": "recurrence",
    "decay": "decay",
    "amplification": "noise settles at",
    "sensitivity": "update sees",
    "normalizer": "in units of",
    "stays_fp32": "stays fp32",
}

LONGEST = 400
"""Characters of a formula that are printed."""


@app.command()
@verb
def facts(subject: Subject, as_json: bool) -> None:
    """List what the graph proves about each state.

    Its sign, its recurrence, how long an error in it persists, and what the update sees of it.

    Examples: [bold]stq facts AdamW[/bold];
    [bold]stq facts SGD --arg momentum=0.9[/bold]; [bold]stq facts RMSprop --json[/bold]
    """
    from stq_compile.formulas import formulas_of

    found = subject.inspect(whole=False)
    rows = []
    for unit in found.front.units:
        formulas = formulas_of(unit)
        rows += [_row(unit, formulas, key) for key in unit.facts.recurrences]
    if as_json:
        print_json({"optimizer": found.name, "facts": rows, "regions": found.regions()})
        return
    print_regions(found)
    if not rows and not found.regions():
        console.print(f"{subject.title} has no states but counters")
    for row in rows:
        many = "" if row["tensors"] == 1 else "s"
        title = f"{row['state']} ({row['template']}, {row['tensors']} tensor{many})"
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, label in LABELS.items():
            if row[name] is not None:
                table.add_row(label, _readable(name, row))
        console.print(table)


def _row(unit: StepGraph, formulas: Formulas, key: str) -> dict[str, Any]:
    """JSON has no infinity: an amplification that is none is null, and so is an unknown decay."""
    recurrence = unit.facts.recurrences[key]
    amplification = recurrence.amplification
    return {
        "state": key,
        "template": unit.name,
        "tensors": len(unit.instances),
        "sign": ">= 0" if key in unit.facts.nonnegative else "any",
        "recurrence": formulas.recurrence(key),
        "kind": recurrence.kind,
        "decay": recurrence.value,
        "decay_formula": None if recurrence.decay is None else str(recurrence.decay),
        "amplification": None if math.isinf(amplification) else round(amplification, 4),
        "sensitivity": formulas.sensitivity(key),
        "normalizer": unit.facts.normalizers.get(key),
        "stays_fp32": unit.facts.fragile.get(key),
    }


def _readable(name: str, row: dict[str, Any]) -> str:
    value = row[name]
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}… ({len(value)} characters; --json shows all)"
    if name == "decay":
        formula = row["decay_formula"]
        shown = "" if formula is None or formula[0].isdigit() else f" = {formula}"
        return f"{value:g}{shown}: {row['kind']}"
    if name == "amplification":
        return f"{value:g} times the variance of one step"
    return f"√{value}" if name == "normalizer" else str(value)

"""``stq passes`` and ``stq show``: what each pass made of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stq_compile.cli.common import (
    Subject,
    console,
    one_line,
    print_code,
    print_json,
    verb,
)
from stq_compile.errors import InvalidTargetError

if TYPE_CHECKING:
    from stq_compile.inspection import Inspection
    from stq_compile.passes.runner import Stage

app = typer.Typer()
PASS_HELP = "Name of a pass; `stq passes` lists them."


@app.command()
@verb
def passes(subject: Subject, as_json: bool) -> None:
    """List the passes: time, graphs and nodes before and after each.

    Examples: [bold]stq passes AdamW[/bold]; [bold]stq passes AdamW --model gpt2 --json[/bold]
    """
    found = subject.inspect()
    refused = None if found.refused is None else one_line(str(found.refused))
    rows = [
        {
            "name": after.name,
            "graphs_before": len(before.program.units),
            "graphs_after": len(after.program.units),
            "nodes_before": before.program.nodes,
            "nodes_after": after.program.nodes,
            "milliseconds": round(after.seconds * 1e3, 2),
        }
        for before, after in zip(found.stages, found.stages[1:], strict=False)
    ]
    if as_json:
        print_json({"optimizer": found.name, "passes": rows, "refused": refused})
    else:
        console.print(_table(subject.title, found))
    if found.refused is not None:
        raise found.refused


def _table(title: str, found: Inspection) -> Table:
    table = Table(title=f"passes on {title}")
    table.add_column("pass", no_wrap=True)
    for name in ("graphs", "nodes", "ms"):
        table.add_column(name, justify="right")
    before = found.stages[0]
    for after in found.stages[1:]:
        table.add_row(
            after.name,
            _change(len(before.program.units), len(after.program.units)),
            _change(before.program.nodes, after.program.nodes),
            f"{after.seconds * 1e3:.1f}",
        )
        before = after
    return table


def _change(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} → {after}"


@app.command()
@verb
def show(
    subject: Subject,
    after: Annotated[str, typer.Option(help=PASS_HELP, metavar="PASS")],
    as_json: bool,
) -> None:
    """Print the step graphs after a pass, as Python.

    Examples: [bold]stq show AdamW --after quantize[/bold];
    [bold]stq show AdamW --after fold --model gpt2[/bold]
    """
    found = subject.inspect()
    text = str(stage_of(found, after).program)
    if as_json:
        print_json({"optimizer": found.name, "pass": after, "graph": text})
    else:
        print_code(text, "python")


def stage_of(found: Inspection, name: str) -> Stage:
    """The stage after a pass; an error of its own if the step did not get that far."""
    stages = {s.name: s for s in found.stages}
    if name in stages:
        return stages[name]
    if found.refused is not None:
        raise found.refused
    raise InvalidTargetError(
        target=name, reason=f"no such pass; the passes are {', '.join(list(stages)[1:])}"
    )

"""``stq doctor``: what this machine has, and what works on it."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from stq_compile.cli.common import console, print_json, progress, verb

app = typer.Typer()


@app.command()
@verb
def doctor(as_json: bool) -> None:
    """Say what is here (versions, compilers, processor, GPU, caches) and try every target.

    Exit code 1 if something does not work.

    Examples: [bold]stq doctor[/bold]; [bold]stq doctor --json[/bold]
    """
    with progress("looking around, and trying a tiny step"):
        from stq_compile.doctor import examine

        found = list(examine())
    if as_json:
        print_json({"findings": [asdict(f) for f in found]})
    else:
        table = Table(show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}
        for finding in found:
            table.add_row(marks[finding.ok], finding.name, Text(finding.found))
        console.print(table)
    if any(finding.ok is False for finding in found):
        raise typer.Exit(1)

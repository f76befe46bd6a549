"""``stq kernels``: the generated code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from stq_compile.cli.common import (
    MACHINES,
    Subject,
    console,
    print_code,
    print_json,
    print_regions,
    verb,
)

app = typer.Typer()


@app.command()
@verb
def kernels(
    subject: Subject,
    as_json: bool,
    machine: Annotated[
        str, typer.Option("--target", help=f"{MACHINES}; no GPU is needed.", metavar="MACHINE")
    ] = "cpu",
) -> None:
    """Print the source of every kernel, with bytes per parameter, registers and predicted times.

    Examples: [bold]stq kernels AdamW[/bold];
    [bold]stq kernels AdamW --target cuda:90 --precision 4[/bold]
    """
    from stq_compile.codegen.target import parse_target

    made_for = parse_target(machine)
    found = subject.inspect(whole=False)
    rows = found.kernels(made_for)
    if as_json:
        print_json({"optimizer": found.name, "kernels": rows, "regions": found.regions()})
        return
    for row in rows:
        print_code(str(row.pop("source")), "python" if made_for.is_gpu else "cpp")
        console.print(_facts(row))
    print_regions(found)


def _facts(row: dict[str, Any]) -> Table:
    """What is known of one kernel."""
    table = Table(title=str(row.pop("name")), show_header=False)
    for name, value in row.items():
        if value is not None:
            table.add_row(name.replace("_", " "), _readable(value))
    return table


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    return str(value)

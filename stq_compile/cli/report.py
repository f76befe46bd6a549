"""``stq report``: what happened in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stq_compile.cli.common import console, errors, print_json, verb
from stq_compile.errors import InvalidTargetError

app = typer.Typer()


@app.command()
@verb
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="What stq.report(optimizer).save(FILE) wrote, or the option record=FILE.",
            show_default=False,
        ),
    ],
    as_json: bool,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that needs no network.", show_default=False)
    ] = None,
) -> None:
    """Show what happened in a run: widths by layer, state and step, and why they changed.

    Examples: [bold]stq report run.jsonl[/bold];
    [bold]stq report run.jsonl --html run.html[/bold]
    """
    from stq_compile.reporting import run_file
    from stq_compile.reporting.page import render
    from stq_compile.reporting.terminal import RunView

    found = run_file.read(run)
    if html is not None and html.exists() and html.samefile(run):
        raise InvalidTargetError(target=html, reason="it is the run itself; write to another file")
    if html is not None:
        try:
            html.write_text(render(found), encoding="utf-8")
        except OSError as error:
            raise InvalidTargetError(target=html, reason=f"cannot be written: {error}") from error
        errors.print(f"wrote {html}", markup=False)
    if as_json:
        print_json({"events": list(run_file.events_of(found))})
    elif html is None:
        console.print(RunView(found))

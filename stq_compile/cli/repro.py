"""``stq repro``: run a script that the compiler wrote when it failed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stq_compile.cli.common import console, print_json, progress, verb
from stq_compile.errors import StqError

app = typer.Typer()


@app.command()
@verb
def repro(
    file: Annotated[
        Path, typer.Argument(help="A script that an error message named.", show_default=False)
    ],
    as_json: bool,
) -> None:
    """Compile the step of a script again, to see whether it still fails.

    Exit code 1 if it does, 0 if it compiles now.

    Example: [bold]stq repro /tmp/stq_repro_a1b2c3d4/repro_AdamW_1a2b3c4d.py[/bold]
    """
    from stq_compile.failures import is_defect
    from stq_compile.repro import run_script

    failure: Exception | None = None
    try:
        with progress(f"compiling the step of {file}"):
            run_script(file)
    except Exception as error:
        if isinstance(error, StqError) and not is_defect(error):
            raise
        failure = error
    shown = None if failure is None else f"{type(failure).__name__}: {failure}"
    if as_json:
        print_json({"file": str(file), "fails": failure is not None, "error": shown})
    elif failure is None:
        console.print("compiles: the failure does not show with this version")
    else:
        console.print(f"fails: {shown}", markup=False)
    if failure is not None:
        raise typer.Exit(1)

"""``stq diff``: what a pass changed, side by side."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from stq_compile.cli.common import Subject, console, print_json, verb
from stq_compile.cli.passes import PASS_HELP, stage_of

app = typer.Typer()

Row = tuple[str, str | None, str | None]
"""What happened (same, changed, removed, added, skipped), and the lines before and after."""

MARKS = {"changed": "~", "removed": "-", "added": "+", "same": " ", "skipped": ""}
STYLES = {
    "changed": ("yellow", "yellow"),
    "removed": ("red", ""),
    "added": ("", "green"),
    "same": ("", ""),
    "skipped": ("dim", "dim"),
}


@app.command()
@verb
def diff(
    subject: Subject,
    name: Annotated[str, typer.Argument(metavar="PASS", help=PASS_HELP)],
    as_json: bool,
    context: Annotated[int, typer.Option(help="Unchanged lines around a change.", min=0)] = 2,
    rows: Annotated[int, typer.Option(help="Rows to print at most; 0 for all.", min=0)] = 200,
) -> None:
    """Show what a pass changed in the step graphs, side by side.

    Examples: [bold]stq diff AdamW quantize[/bold];
    [bold]stq diff AdamW functionalize --model gpt2[/bold]
    """
    found = subject.inspect()
    after = stage_of(found, name)
    index = found.stages.index(after)
    before = found.stages[max(index - 1, 0)]
    lines = list(_rows(str(before.program).splitlines(), str(after.program).splitlines(), context))
    if as_json:
        print_json(
            {
                "optimizer": found.name,
                "pass": name,
                "before": before.name,
                "rows": [{"what": w, "before": b, "after": a} for w, b, a in lines],
            }
        )
        return
    if all(what in ("same", "skipped") for what, _, _ in lines):
        console.print(f"{name} changed nothing in the graphs of {subject.title}")
        return
    shown = lines[:rows] if rows else lines
    table = Table(title=f"{subject.title}: what {name} changed", expand=True, padding=(0, 1, 0, 0))
    table.add_column("", width=1)
    table.add_column(f"before {name}", ratio=1, overflow="fold")
    table.add_column(f"after {name}", ratio=1, overflow="fold")
    for what, left, right in shown:
        styles = STYLES[what]
        table.add_row(
            MARKS[what],
            Text(left or "", style=styles[0]),
            Text(right or "", style=styles[1]),
        )
    console.print(table)
    if len(shown) < len(lines):
        console.print(f"{len(lines) - len(shown)} more rows; --rows 0 shows all")


def _rows(before: list[str], after: list[str], context: int) -> Iterator[Row]:
    """Pairs of lines, with ``context`` unchanged ones around each change."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    end = 0
    for group in matcher.get_grouped_opcodes(context):
        first = group[0][1]
        if first > end:
            yield ("skipped", f"… {first - end} lines", None)
        for tag, i, i_end, j, j_end in group:
            left, right = before[i:i_end], after[j:j_end]
            for k in range(max(len(left), len(right))):
                old = left[k] if k < len(left) else None
                new = right[k] if k < len(right) else None
                what = "same" if tag == "equal" else "changed"
                if old is None:
                    what = "added"
                elif new is None:
                    what = "removed"
                yield (what, old, new)
        end = group[-1][2]
    if 0 < end < len(before):
        yield ("skipped", f"… {len(before) - end} lines", None)

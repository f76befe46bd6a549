"""``stq diff``: what a pass changed, side by side."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from stq_compile.cli.common import Subject, console, print_json, verb
from stq_compile.cli.passes import PASS_HELP, stage_of

app = typer.Typer()

Row = tuple[str, str | None, str | None]
"""What happened, and the lines before and after; ``source`` and ``skipped`` have one text."""

MARKS = {"changed": "~", "removed": "-", "added": "+", "same": " ", "skipped": "", "source": ""}
STYLES = {
    "changed": ("yellow", "yellow"),
    "removed": ("red", ""),
    "added": ("", "green"),
    "same": ("", ""),
    "skipped": ("dim", "dim"),
    "source": ("dim italic", "dim italic"),
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
    if all(what in ("same", "skipped", "source") for what, _, _ in lines):
        console.print(f"{name} changed nothing in the graphs of {subject.title}")
        return
    shown = lines[:rows] if rows else lines
    table = Table(title=f"{subject.title}: what {name} changed", expand=True, padding=(0, 1, 0, 0))
    table.add_column("", width=1)
    table.add_column(f"before {name}", ratio=1, overflow="fold")
    table.add_column(f"after {name}", ratio=1, overflow="fold")
    for what, left, right in shown:
        styles = STYLES[what]
        table.add_row(MARKS[what], Text(_short(left), styles[0]), Text(_short(right), styles[1]))
    console.print(table)
    if len(shown) < len(lines):
        console.print(f"{len(lines) - len(shown)} more rows; --rows 0 shows all")


def _short(line: str | None) -> str:
    """Half of a terminal is narrow."""
    return (line or "").replace("torch.ops.", "")


def _rows(before: list[str], after: list[str], context: int) -> Iterator[Row]:
    """Pairs of lines, with ``context`` unchanged ones around each change.

    The comment that says which line of the optimizer a node came from becomes a row of its own.
    """
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    end = 0
    for group in matcher.get_grouped_opcodes(context):
        first = group[0][1]
        if first > end:
            yield ("skipped", f"… {first - end} lines", None)
        shown = ""
        for tag, i, i_end, j, j_end in group:
            for place, what, old, new in _pairs(tag, before[i:i_end], after[j:j_end]):
                if place and place != shown:
                    yield ("source", place, None)
                    shown = place
                yield (what, old, new)
        end = group[-1][2]
    if 0 < end < len(before):
        yield ("skipped", f"… {len(before) - end} lines", None)


def _pairs(
    tag: str, before: list[str], after: list[str]
) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Source line, what happened, line before, line after: lines of one source line together."""
    left, right = _by_source(before), _by_source(after)
    matcher = difflib.SequenceMatcher(None, [p for p, _ in left], [p for p, _ in right])
    for step, i, i_end, j, j_end in matcher.get_opcodes():
        if step == "equal":
            pairs = zip(left[i:i_end], right[j:j_end], strict=True)
        else:
            olds, news = left[i:i_end], right[j:j_end]
            pairs = zip(
                [*olds, *((p, []) for p, _ in news)], [*((p, []) for p, _ in olds), *news],
                strict=True,
            )  # fmt: skip
        for (place, olds_of), (_, news_of) in pairs:
            for old, new in itertools.zip_longest(olds_of, news_of):
                what = "added" if old is None else "removed" if new is None else "changed"
                yield place, "same" if tag == "equal" else what, old, new


def _by_source(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Neighbouring statements of one source line, with their comments taken off."""
    split = [_split(line) for line in lines]
    return [
        (place, [code for _, code in group])
        for place, group in itertools.groupby(split, key=lambda pair: pair[0])
    ]


def _split(line: str) -> tuple[str, str]:
    """The source line that a statement came from, and its code; an input keeps its comment."""
    code, _, comment = line.partition("  # ")
    is_node = " = " in code and ":" in comment
    return (comment, code) if is_node else ("", line)

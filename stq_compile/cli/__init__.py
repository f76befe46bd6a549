"""``stq``: look into a compiled step.

One module per verb or family of verbs; each has an ``app`` whose commands become the verbs. Modules
of this package import at their top only what is quick: torch is imported when a verb runs, so that
``stq --help`` and the shell's completion answer at once.
"""

from __future__ import annotations

import typer

from stq_compile.cli import bench, diff, doctor, facts, kernels, passes, plan, report, repro, trace

app = typer.Typer(
    name="stq",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help=(
        "Look into a compiled optimizer step.\n\n"
        "Example: [bold]stq facts AdamW[/bold], or [bold]stq plan AdamW --model gpt2[/bold]. "
        "`stq VERB --help` shows more.\n\n"
        "Exit codes: 0 done, 1 something does not work (a defect of the compiler; a target in "
        "doctor; a failure in repro), 2 wrong input or an optimizer that cannot be compiled."
    ),
)
for family in (trace, passes, diff, facts, kernels, plan, report, doctor, bench, repro):
    app.add_typer(family.app)

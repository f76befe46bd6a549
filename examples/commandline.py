"""What the commands of the examples have in common: options, one comparison, what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from comparison import Schedule, Settings, Task, compare
from optimizers import OptimizerChoice, choose_optimizer
from presentation import results_table, save_picture, save_results
from variants import FP32, Variant, packed, parse_precision, parse_variant

OptimizerName = Annotated[str, typer.Option(help="Any optimizer of torch.optim, lion or soap.")]
Precisions = Annotated[
    list[str] | None,
    typer.Option(help="Bits of all states (4), or of each (exp_avg=4,exp_avg_sq=3)."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        help="fp32, auto, tolerance=0.1, target_bits=3.1, 4, exp_avg=4,exp_avg_sq=2 or "
        "*:exp_avg=3,token*:exp_avg=4; repeat it for several rows. "
        "By default fp32 and --precision."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of each run.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each variant.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="The first seed; the others follow it.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate; by default the optimizer's.")
]
Batch = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; by default torch's choice.")]
Out = Annotated[Path, typer.Option(help="Folder for picture, JSON and finished runs.")]
Resume = Annotated[bool, typer.Option(help="Read the runs that are finished in the folder.")]


def choose(
    optimizer: str, lr: float | None, precision: list[str] | None, variant: list[str] | None
) -> tuple[OptimizerChoice, list[Variant]]:
    """The optimizer and the rows of the table that the options ask for.

    Raises ValueError where they are not understood.
    """
    if precision and variant:
        raise ValueError("--precision and --variant do not go together; use --variant for both")
    choice = choose_optimizer(optimizer, lr)
    if variant:
        return choice, [parse_variant(text) for text in variant]
    pinned = parse_precision(precision or [])
    return choice, [FP32, packed(choice.pinned if pinned is None else pinned)]


def prepare(threads: int | None, out: Path) -> Console:
    """Set the number of threads, make the folder, and return where to print."""
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    return console if console.is_terminal else Console(width=150)  # the table needs this much


def run_example(
    name: str,
    task: Task,
    choice: OptimizerChoice,
    variants: Sequence[Variant],
    settings: Settings,
    schedule: Schedule,
    console: Console,
) -> None:
    """Train everything, print the table, save `<name>.png` and `<name>.json`."""
    out = schedule.folder.parent
    console.print(f"{task.title}; {settings.steps} steps, {choice.title}, lr {choice.lr:g}")
    comparison = compare(task, choice, variants, settings, schedule, console)
    console.print(results_table(comparison))
    if len(schedule.seeds) > 1:
        console.print(f"mean ± standard deviation of {len(schedule.seeds)} seeds")
    picture, figures = out / f"{name}.png", out / f"{name}.json"
    save_picture(comparison, picture)
    save_results(comparison, settings, figures)
    console.print(f"loss curves: {picture}   all figures: {figures}   each run: {schedule.folder}")

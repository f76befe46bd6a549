"""``stq plan``: memory before training."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stq_compile.cli.common import Subject, console, print_json, verb

if TYPE_CHECKING:
    from stq_compile.memory import MemoryPlan

app = typer.Typer()
TITLES = {"fp32": "fp32 states", "8-bit": "8-bit states", "packed": "packed"}


@app.command()
@verb
def plan(
    subject: Subject,
    as_json: bool,
    world_size: Annotated[
        int, typer.Option(help="GPUs that share the tensors, as FSDP2 shards them.", min=1)
    ] = 1,
    largest: Annotated[int, typer.Option(help="Tensors to list.", min=0)] = 5,
) -> None:
    """Plan memory before training: parameters, gradients and states, and what fits where.

    States are at their first widths, before anything is measured. Activations and temporary
    buffers come on top.

    Examples: [bold]stq plan AdamW --model gpt2[/bold];
    [bold]stq plan AdamW --model llama-70b --target-bits 4 --world-size 8[/bold]
    """
    from stq_compile.memory import CAPACITIES, plan_memory

    made = plan_memory(subject.inspect(whole=False), world_size)
    if as_json:
        print_json(
            {
                **asdict(made),
                "tensors": [asdict(t) for t in made.tensors[:largest]],
                "fits": {
                    name: {f"{size} GB": h.fits(size) for size in CAPACITIES}
                    for name, h in made.holdings.items()
                },
            }
        )
        return
    _print(subject.title, made, largest, CAPACITIES)


def _count(number: int) -> str:
    """``124.4 M``."""
    for letter, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {letter}"
    return str(number)


def _print(title: str, made: MemoryPlan, largest: int, capacities: tuple[int, ...]) -> None:
    from stq_compile.state_report import human

    gpus = f"on each of {made.world_size} GPUs" if made.world_size > 1 else "on one GPU"
    table = Table(
        title=f"{title}: {_count(made.elements)} parameters, {gpus}",
        caption="activations and temporary buffers come on top",
    )
    table.add_column("", no_wrap=True)
    for name in made.holdings:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    for part in ("parameters", "gradients", "states", "total"):
        sizes = [human(getattr(h, part)) for h in made.holdings.values()]
        table.add_row(part, *sizes, end_section=part in ("states", "total"))
    for size in capacities:
        marks = ["fits" if h.fits(size) else "no" for h in made.holdings.values()]
        styled = [f"[green]{m}[/]" if m == "fits" else f"[red]{m}[/]" for m in marks]
        table.add_row(f"in {size} GB", *styled)
    console.print(table)
    console.print(f"packed states: {made.bits_per_element:.2f} true bits per element")
    if not largest:
        return
    tensors = Table(title="largest states")
    tensors.add_column("parameter", overflow="fold")
    tensors.add_column("shape", no_wrap=True)
    tensors.add_column("formats")
    for name in ("packed", "fp32"):
        tensors.add_column(name, justify="right", no_wrap=True)
    for t in made.tensors[:largest]:
        tensors.add_row(
            t.name, "×".join(map(str, t.shape)), ", ".join(t.formats.values()),
            human(t.bytes), human(t.fp32_bytes),
        )  # fmt: skip
    console.print(tensors)

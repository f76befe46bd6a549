"""Makes the README's evidence: several optimizers and models, each with fp32 and packed states.

python examples/evidence.py --seeds 5                         # everything
python examples/evidence.py --only vit-adamw --seeds 3        # one table
python examples/evidence.py --only gpt-adamw --variant fp32 --variant 4   # with rows of your own
python examples/evidence.py --quick --only gpt-muon --only gpt-soap       # a GPT of 0.14 M

`--variant embeddings` is more bits for embeddings and head than for the body.

A process with another --first-seed and the same --out can run beside it; afterwards
`--resume --seeds N` prints the tables over all seeds, without a run.
"""

from __future__ import annotations

import functools
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import commandline as cli
import train_vit
from comparison import Comparison, Schedule, Settings, Task, compare
from optimizers import KNOWN_OPTIMIZERS, choose_optimizer
from presentation import markdown_table, results_table
from tinygpt import load_text
from tinyvit import ViTConfig, load_digits
from train_gpt import (
    EVIDENCE_ADAMW_LR,
    EVIDENCE_BATCH,
    EVIDENCE_CONFIG,
    EVIDENCE_STEPS,
    QUICK_CONFIG,
    QUICK_STEPS,
    GPTTask,
)
from train_vit import ViTTask
from variants import AUTO, FP32, Variant, packed, parse_variant

EMBEDDINGS_UP = Variant(
    "packed, embeddings and head 4+4, body 3+2",
    {
        "precision": {
            "*:exp_avg": 3,
            "*:exp_avg_sq": 2,
            **{
                f"{name}*:{state}": 4
                for name in ("token", "position", "head")
                for state in ("exp_avg", "exp_avg_sq")
            },
        }
    },
)
ADAMW = [FP32, AUTO, *map(parse_variant, ("target_bits=3.1", "exp_avg=4,exp_avg_sq=2"))]


@dataclass(frozen=True)
class Grid:
    """One table: a task, an optimizer, and the rows."""

    task: Callable[[], Task]
    optimizer: str
    steps: int
    variants: Sequence[Variant] = (FP32, AUTO)
    lr: float | None = None


@functools.cache
def _gpt() -> Task:
    return GPTTask(load_text(), EVIDENCE_CONFIG, EVIDENCE_BATCH)


@functools.cache
def _quick_gpt() -> Task:
    return GPTTask(load_text(), QUICK_CONFIG, EVIDENCE_BATCH)


def _pinned(optimizer: str) -> list[Variant]:
    """Beside the automatic widths, those that are known to do, and 4 bits."""
    return [FP32, AUTO, packed(KNOWN_OPTIMIZERS[optimizer].pinned), packed(4)]


def _vit() -> Task:
    return ViTTask(load_digits(), ViTConfig(), train_vit.BATCH)


GRIDS = {
    "gpt-adamw": Grid(_gpt, "adamw", EVIDENCE_STEPS, [*ADAMW, EMBEDDINGS_UP], EVIDENCE_ADAMW_LR),
    "gpt-lion": Grid(_gpt, "lion", EVIDENCE_STEPS),
    "gpt-sgd": Grid(_gpt, "sgd", EVIDENCE_STEPS),
    "gpt-rmsprop": Grid(_gpt, "rmsprop", EVIDENCE_STEPS),
    "gpt-muon": Grid(_gpt, "muon", EVIDENCE_STEPS, _pinned("muon")),
    "gpt-soap": Grid(_gpt, "soap", EVIDENCE_STEPS, _pinned("soap")),
    "vit-adamw": Grid(_vit, "adamw", train_vit.STEPS, lr=train_vit.LR["adamw"]),
}


@dataclass
class Evidence:
    """The tables so far, and the files that hold them."""

    out: Path
    name: str
    seeds: range
    tables: dict[str, Comparison]

    def write(self, grid: str, comparison: Comparison) -> None:
        """Both files anew, with what is there now for this grid."""
        self.tables[grid] = comparison
        about = {
            "command": shlex.join(["python", "examples/evidence.py", *sys.argv[1:]]),
            "cpu": f"{cpu_model()}, {torch.get_num_threads()} of its threads",
            "torch": torch.__version__,
            "seeds": f"{self.seeds.start} to {self.seeds.stop - 1}",
        }
        tables = {name: _summary(table) for name, table in self.tables.items()}
        content = json.dumps({**about, "tables": tables}, indent=1)
        (self.out / f"{self.name}.json").write_text(content)
        lines = [f"- {key}: `{value}`" for key, value in about.items()]
        for name, table in self.tables.items():
            digests = sorted({run.library for row in table.rows for run in row.runs} - {""})
            lines += ["", f"### {name}", "", f"{table.title}, {table.optimizer}", ""]
            lines += [
                markdown_table(table),
                f"stq_compile's source: {', '.join(digests) or 'none'}",
            ]
        (self.out / f"{self.name}.md").write_text("\n".join(lines) + "\n")


def _summary(comparison: Comparison) -> dict[str, Any]:
    """All but the long lists, which are in the runs' own files."""
    content = asdict(comparison)
    for row, kept in zip(content["rows"], comparison.rows, strict=True):
        for run, full in zip(row["runs"], kept.runs, strict=True):
            del run["train_losses"], run["step_seconds"]
            run["step_ms"], run["mean_step_ms"] = full.step_ms, full.mean_step_ms
    return content


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(GRIDS)}; repeat it for several.")
    ] = None,
    variant: cli.Variants = None,
    seeds: cli.Seeds = 3,
    first_seed: cli.FirstSeed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of each task's.")] = None,
    quick: Annotated[bool, typer.Option(help="A smaller GPT, and fewer steps.")] = False,
    threads: cli.Threads = 1,
    out: cli.Out = Path("out"),
    name: Annotated[str, typer.Option(help="Files to write: NAME.md and NAME.json.")] = "evidence",
    resume: cli.Resume = False,
) -> None:
    """Train every row of every table, print the tables and write them as Markdown and JSON."""
    try:
        unknown = set(only or []) - set(GRIDS)
        if unknown:
            raise ValueError(f"no table {', '.join(unknown)}; there are {', '.join(GRIDS)}")
        own = [_variant(text) for text in variant or []]
        console = cli.prepare(threads, out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    seed_range = range(first_seed, first_seed + seeds)
    evidence = Evidence(out, name, seed_range, {})
    schedule = Schedule(seed_range, out / "runs", resume)
    for grid_name in only or GRIDS:
        grid = GRIDS[grid_name]
        if quick and grid.task is _gpt:
            grid = replace(grid, task=_quick_gpt, steps=QUICK_STEPS, lr=None)
        comparison = compare(
            grid.task(),
            choose_optimizer(grid.optimizer, grid.lr),
            own or grid.variants,
            Settings(steps or grid.steps, evaluations=5),
            schedule,
            console,
            on_row=lambda table, name=grid_name: evidence.write(name, table),  # type: ignore[misc]
        )
        console.print(results_table(comparison))
    console.print(f"tables: {out / f'{name}.md'}   figures: {out / f'{name}.json'}")


def _variant(text: str) -> Variant:
    return EMBEDDINGS_UP if text == "embeddings" else parse_variant(text)


if __name__ == "__main__":
    typer.run(main)

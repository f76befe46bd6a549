"""Trains a model with fp32 and with packed optimizer states, for several seeds, and compares.

An example brings a `Task` (a model, its batches, its losses) and a list of variants; all the rest
is here. All runs of a seed start from the same weights and see the same batches in the same order.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

import stq_compile as stq
from optimizers import OptimizerChoice
from runs import VERSION, Run, StateSize, library_digest, load_run, run_file, save_run
from variants import Variant

BITS_EVERY = 10  # steps between two records of the true bits


class Task(Protocol):
    """What is trained.

    `batch` returns one training batch, in whatever form `loss` takes; `evaluate` the validation
    "loss" in `unit` and any other measures, of a part of the data where `quick`. `identity` holds
    all that decides model and data, as JSON can hold it, and a "name" for files.
    """

    @property
    def title(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def model(self) -> nn.Module: ...

    def batch(self, generator: torch.Generator) -> Any: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def evaluate(self, model: nn.Module, *, quick: bool) -> dict[str, float]: ...


@dataclass(frozen=True)
class Settings:
    """How long and how to train; `warmup` and `final_lr` are fractions of steps and of `lr`."""

    steps: int
    warmup: float = 0.1
    final_lr: float = 0.05
    clip: float = 1.0
    evaluations: int = 10

    def lr_factor(self, step: int) -> float:
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """Which seeds to run, and the folder of finished runs; they are read again if `resume`."""

    seeds: Sequence[int]
    folder: Path
    resume: bool = False


@dataclass(frozen=True)
class Row:
    """All runs of one variant, one for each seed."""

    variant: Variant
    runs: list[Run]


@dataclass(frozen=True)
class Comparison:
    """All runs of one command: the i-th runs of all rows share a seed."""

    title: str
    unit: str
    optimizer: str
    rows: list[Row]
    fused_step_ms: float | None

    @property
    def fp32(self) -> Row | None:
        """The row that the others are compared with, if there is one."""
        return next((row for row in self.rows if row.variant.options is None), None)


def compare(
    task: Task,
    choice: OptimizerChoice,
    variants: Sequence[Variant],
    settings: Settings,
    schedule: Schedule,
    console: Console,
    on_row: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Train `task` in every variant for every seed, under a progress display.

    `on_row` is called with what there is whenever all seeds of a variant are finished. A variant
    whose options are wrong is an error before anything is trained.
    """
    for variant in variants:
        if variant.options is not None:
            _compile(choice, choice.build(task.model()), variant.options)
    rows: list[Row] = []
    result = Comparison(task.title, task.unit, choice.title, rows, _fused_step_ms(task, choice))
    with _progress(console) as progress:
        plan = []
        for variant in variants:
            for seed in schedule.seeds:
                text = f"{choice.title} {variant.label}"
                text += f", seed {seed}" if len(schedule.seeds) > 1 else ""
                bar = progress.add_task(text, total=settings.steps, loss="", start=False)
                plan.append((variant, seed, _Bar(progress, bar)))
        for variant, seed, display in plan:
            if not rows or rows[-1].variant is not variant:
                rows.append(Row(variant, []))
            run = _finished_run(task, choice, settings, variant, seed, schedule, display)
            rows[-1].runs.append(run)
            if not console.is_terminal:  # a log shows no bars
                loss = f"{run.valid_loss:.4f} {task.unit}"
                console.print(
                    f"{choice.title} {variant.label}, seed {seed}: {loss}, {run.seconds:.0f} s"
                )
            if len(rows[-1].runs) == len(schedule.seeds):
                on_row(result)
    return result


def _finished_run(
    task: Task,
    choice: OptimizerChoice,
    settings: Settings,
    variant: Variant,
    seed: int,
    schedule: Schedule,
    bar: _Bar,
) -> Run:
    """The run from its file, where that may be, or made now and filed."""
    identity = {
        "version": VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "task": task.identity,
        "optimizer": choice.identity,
        "settings": asdict(settings),
        "variant": {"slug": variant.slug, "options": variant.options},
        "seed": seed,
    }
    file = run_file(schedule.folder, identity)
    run = load_run(file) if schedule.resume else None
    if run is None:
        run = Run(variant.label, seed)
        _train(task, choice, settings, run, variant.options, bar)
        save_run(run, identity, file)
    run.label = variant.label
    bar.finish(f"valid {run.valid_loss:.3f}")
    return run


def _train(
    task: Task,
    choice: OptimizerChoice,
    settings: Settings,
    run: Run,
    options: Mapping[str, Any] | None,
    bar: _Bar,
) -> None:
    """Fill in `run`; with `options` None the optimizers stay as they were made."""
    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed + 1)
    model = task.model()
    optimizers = choice.build(model)
    if options is not None:
        _compile(choice, optimizers, options)
        run.library = library_digest()
    schedulers = [LambdaLR(optimizer, settings.lr_factor) for optimizer in optimizers]
    evaluate_every = max(1, settings.steps // settings.evaluations)

    bar.start()
    start = time.perf_counter()
    for step in range(1, settings.steps + 1):
        loss = task.loss(model, task.batch(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        run.step_seconds.append(_timed(optimizers))
        for scheduler in schedulers:
            scheduler.step()
        model.zero_grad()
        run.train_losses.append(loss.item())
        bar.advance(f"loss {statistics.fmean(run.train_losses[-20:]):.3f}")
        if step % BITS_EVERY == 0 or step in (1, settings.steps):
            _record_size(run, step, optimizers, packed=options is not None)
        if step % evaluate_every == 0:
            run.valid_losses.append((step, task.evaluate(model, quick=True)["loss"]))
    run.results = task.evaluate(model, quick=False)
    run.seconds = time.perf_counter() - start


def _compile(
    choice: OptimizerChoice,
    optimizers: Sequence[torch.optim.Optimizer],
    options: Mapping[str, Any],
) -> None:
    for optimizer, own in zip(optimizers, choice.options_of_parts(options), strict=True):
        stq.compile(optimizer, **own)


def _timed(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Seconds of a step of each."""
    start = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    return time.perf_counter() - start


def _record_size(
    run: Run, step: int, optimizers: Sequence[torch.optim.Optimizer], *, packed: bool
) -> None:
    if packed:
        reports = [stq.report(optimizer) for optimizer in optimizers]
        sizes = [(report.state_bytes, report.fp32_bytes) for report in reports]
        run.transitions = sum(report.transitions for report in reports)
    else:
        sizes = [_stock_size(optimizer) for optimizer in optimizers]
    size, fp32_size = (sum(parts) for parts in zip(*sizes, strict=True))
    bits = 32 * size / fp32_size if fp32_size else 32.0
    run.size = StateSize(size, bits_per_element=bits, saved=1 - bits / 32)
    run.bits.append((step, bits))


def _stock_size(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of all states that are no numbers, as they are and in float32."""
    values = [value for state in optimizer.state.values() for value in tree_leaves(dict(state))]
    states = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
    return sum(value.nbytes for value in states), 4 * sum(value.numel() for value in states)


def _fused_step_ms(task: Task, choice: OptimizerChoice, steps: int = 100) -> float | None:
    """Median step of torch's own fused kernel on the same model, None where it has none.

    It is the fastest that torch offers, and not what `torch.optim` picks by default on a CPU.
    """
    if "fused" not in inspect.signature(choice.cls).parameters:
        return None
    model = task.model()
    optimizers = choice.build(model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return 1e3 * statistics.median(_timed(optimizers) for _ in range(steps))


@dataclass(frozen=True)
class _Bar:
    """One line of the progress display."""

    progress: Progress
    task: TaskID

    def start(self) -> None:
        self.progress.start_task(self.task)

    def advance(self, loss: str) -> None:
        self.progress.update(self.task, advance=1, loss=loss)

    def finish(self, loss: str) -> None:
        total = self.progress.tasks[self.progress.task_ids.index(self.task)].total
        self.progress.update(self.task, completed=total, loss=loss)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:>11}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )

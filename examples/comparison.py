"""Trains a model twice, with fp32 and with packed optimizer states, and shows the difference.

An example brings a `Task` (a model, its batches, its losses); all the rest is here. Both runs of a
seed start from the same weights and see the same batches in the same order.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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

import stq_compile as stq
from optimizers import OptimizerChoice, Precision, describe_precision


class Task(Protocol):
    """What is trained.

    `batch` returns one training batch, in whatever form `loss` takes; `evaluate` the validation
    loss in `unit`, of a part of the data where `quick`.
    """

    @property
    def title(self) -> str: ...

    @property
    def unit(self) -> str: ...

    def model(self) -> nn.Module: ...

    def batch(self, generator: torch.Generator) -> Tensor: ...

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor: ...

    def evaluate(self, model: nn.Module, *, quick: bool) -> float: ...


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
class StateSize:
    """What an optimizer's states occupy, everything counted."""

    state_bytes: int
    bits_per_element: float
    saved: float  # of the fp32 bytes, 0 to 1


@dataclass
class Run:
    """What one training run showed.

    `valid_losses` are quick evaluations at (step, loss), `valid_loss` is of all validation data at
    the end. Step times are of `optimizer.step()` alone; `seconds` is the whole run.
    """

    label: str
    seed: int
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    valid_loss: float = math.nan
    size: StateSize | None = None
    seconds: float = 0.0

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Comparison:
    """All runs of one command: `fp32[i]` and `packed[i]` share a seed."""

    title: str
    unit: str
    optimizer: str
    fp32: list[Run]
    packed: list[Run]
    fused_step_ms: float | None


def compare(
    task: Task, choice: OptimizerChoice, settings: Settings, seeds: int, console: Console
) -> Comparison:
    """Train `task` with fp32 and with packed states for every seed, under a progress display."""
    labels = (("fp32", None), (f"packed, {describe_precision(choice.precision)}", choice.precision))
    runs: dict[str, list[Run]] = {label: [] for label, _ in labels}
    with _progress(console) as progress:
        plan = []
        for seed in range(seeds):
            for label, precision in labels:
                text = f"{choice.name} {label}" + (f", seed {seed}" if seeds > 1 else "")
                bar = progress.add_task(text, total=settings.steps, loss="", start=False)
                plan.append((Run(label, seed), precision, bar))
        for run, precision, bar in plan:
            _train(task, choice, settings, run, precision, _Bar(progress, bar))
            runs[run.label].append(run)
    fp32, packed = runs.values()
    fused = _fused_step_ms(task, choice)
    return Comparison(task.title, task.unit, choice.name, fp32, packed, fused)


def _train(
    task: Task,
    choice: OptimizerChoice,
    settings: Settings,
    run: Run,
    precision: Precision | None,
    bar: _Bar,
) -> None:
    """Fill in `run`; with `precision` None the optimizer stays as torch made it."""
    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed + 1)
    model = task.model()
    optimizer = choice.build(model)
    if precision is not None:
        stq.compile(optimizer, precision=precision)
    scheduler = LambdaLR(optimizer, settings.lr_factor)
    evaluate_every = max(1, settings.steps // settings.evaluations)

    bar.start()
    start = time.perf_counter()
    for step in range(1, settings.steps + 1):
        loss = task.loss(model, task.batch(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        run.step_seconds.append(_timed(optimizer.step))
        scheduler.step()
        optimizer.zero_grad()
        run.train_losses.append(loss.item())
        bar.advance(f"loss {statistics.fmean(run.train_losses[-20:]):.3f}")
        if step % evaluate_every == 0:
            run.valid_losses.append((step, task.evaluate(model, quick=True)))
    run.valid_loss = task.evaluate(model, quick=False)
    run.seconds = time.perf_counter() - start
    run.size = _fp32_size(optimizer) if precision is None else _packed_size(optimizer)
    bar.finish(f"valid {run.valid_loss:.3f}")


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _packed_size(optimizer: torch.optim.Optimizer) -> StateSize:
    report = stq.report(optimizer)
    return StateSize(report.state_bytes, report.bits_per_element, report.saved)


def _fp32_size(optimizer: torch.optim.Optimizer) -> StateSize:
    states = [value for state in optimizer.state.values() for value in state.values()]
    size = sum(value.nbytes for value in states if isinstance(value, Tensor) and value.dim() > 0)
    return StateSize(size, bits_per_element=32.0, saved=0.0)


def _fused_step_ms(task: Task, choice: OptimizerChoice, steps: int = 100) -> float | None:
    """Median step of torch's own fused kernel on the same model, None where it has none.

    It is the fastest that torch offers, and not what `torch.optim` picks by default on a CPU.
    """
    if "fused" not in inspect.signature(choice.cls).parameters:
        return None
    model = task.model()
    optimizer = choice.build(model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return 1e3 * statistics.median(_timed(optimizer.step) for _ in range(steps))


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
        self.progress.update(self.task, loss=loss)


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

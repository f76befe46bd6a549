"""What planning costs: a planning step next to a plain one, decisions, kernels of new widths.

    python examples/measure_planning.py
    python examples/measure_planning.py --width 256 --layers 4

GPT-2's 148 parameter shapes, AdamW. Steps of one optimizer with and without a look and a decision
are timed in turns, after the looks that calibrate; the widths do not change meanwhile. Amortized is
what a planning step adds, spread over 100 steps. A change of widths re-encodes all states; the
kernels that it needs are built at the first one, unless torch's cache has them already. A decision
is timed in CPU time, least of several. Prints a table and writes all figures as JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import stq_compile as stq
from measure_decision import states
from stq_compile.architectures import gpt2
from stq_compile.backend import session_of
from stq_compile.benchmarks.measure import parameters, seconds
from stq_compile.formats import WIDTHS
from stq_compile.options import Options
from stq_compile.planner.planner import CALIBRATIONS, Managed, Planner
from stq_compile.session import Session

COUNTS = (100, 300, 1000, 3000)
INTERVAL = 100
LATER = {"exp_avg": 4, "exp_avg_sq": 4}


def make(width: int, layers: int) -> tuple[torch.optim.Optimizer, Session]:
    """An optimizer whose widths stay: a single rung, so that no decision changes anything."""
    params = parameters(list(gpt2(layers, width).values()))
    optimizer = stq.compile(torch.optim.AdamW(params, lr=1e-4), ladder=(4,), interval=1)
    session = session_of(optimizer)
    assert session is not None
    return optimizer, session


def step_times(
    optimizer: torch.optim.Optimizer, session: Session, rounds: int
) -> tuple[float, float, list[float]]:
    """Median seconds of a plain and of a planning step; and those of the calibrating steps."""
    planner = session.planner
    assert planner is not None
    calibrating = [seconds(optimizer.step) for _ in range(CALIBRATIONS)]
    due, plain, planning = planner.due, [], []
    for _ in range(rounds + 1):
        planner.due = lambda step: False  # type: ignore[method-assign]  # for this measurement
        plain.append(seconds(optimizer.step))
        planner.due = due  # type: ignore[method-assign]  # for this measurement
        planning.append(seconds(optimizer.step))
    return statistics.median(plain[1:]), statistics.median(planning[1:]), calibrating


def transition_times(session: Session) -> tuple[float, float]:
    """Seconds of a change of all widths: with kernels to be built, and with all kernels there."""
    times = []
    for widths in itertools.islice(itertools.cycle(({"exp_avg": 5, "exp_avg_sq": 3}, LATER)), 7):
        start = time.perf_counter()
        session.change_widths({key: widths[key[1]] for key in session.plan})
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[2:])


def decision_time(tensors: int) -> float:
    """CPU seconds of `Planner.decide` for tensors with two states each."""
    planner = Planner(Options.from_dict({}))
    listed = states(2 * tensors, WIDTHS)
    found = []
    for s in listed:
        numel = s.nbytes[-1] // 4
        nbytes = dict(zip(s.widths, s.nbytes, strict=True))
        errors = dict(zip(s.widths, s.error, strict=True))
        found.append(Managed(s.key, f"p{s.key[0]}", s.key[1], numel, nbytes, errors))
    elements = sum(s.numel for s in found)
    planner.enroll(found, 0, elements, 0)
    times = []
    for step in range(7):
        start = time.process_time()
        planner.decide(step, 0, elements)
        times.append(time.process_time() - start)
    return min(times)


def main(
    width: Annotated[int, typer.Option(help="Width of the model; 768 is GPT-2.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("out"),
) -> None:
    """Measure, print and save."""
    decisions = {n: decision_time(n) for n in COUNTS}
    optimizer, session = make(width, layers)
    plain, planning, calibrating = step_times(optimizer, session, rounds)
    new_widths, known_widths = transition_times(session)
    figures = {
        "width": width, "layers": layers, "threads": torch.get_num_threads(),
        "plain_step": plain, "planning_step": planning, "ratio": planning / plain,
        "amortized": (planning / plain - 1) / INTERVAL, "calibrating_steps": calibrating,
        "new_widths": new_widths, "known_widths": known_widths, "decisions": decisions,
    }  # fmt: skip
    table = Table(title=f"planning, {len(session.plan)} states, {torch.get_num_threads()} threads")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("plain step", f"{plain * 1e3:.1f} ms")
    table.add_row("planning step", f"{planning * 1e3:.1f} ms")
    table.add_row("ratio", f"{planning / plain:.2f}")
    table.add_row(f"amortized over {INTERVAL} steps", f"{(planning / plain - 1) / INTERVAL:.2%}")
    table.add_row("calibrating steps", ", ".join(f"{t:.1f} s" for t in calibrating))
    table.add_row("change of all widths, kernels to be built", f"{new_widths:.1f} s")
    table.add_row("change of all widths, kernels there", f"{known_widths:.2f} s")
    for tensors, taken in decisions.items():
        table.add_row(f"decision, {tensors} tensors x 2 states", f"{taken * 1e3:.1f} ms")
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "planning_cost.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

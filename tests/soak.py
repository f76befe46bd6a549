"""``make soak``: a small model through 20,000 steps with widths that change, and nothing may grow.

    python tests/soak.py [--steps 20000] [--seeds 3]

Trains a small network with fp32 AdamW and with packed states, each with several seeds, and checks
of the packed runs: memory of the process, live tensors and Dynamo's compiled variants are flat, the
planner's history is bounded, the loss does not drift away from that of fp32 by more than seeds are
apart, and the distance to the right answers stays within what the tolerance of the planner allows:
a noise of updates is a noise of what is learned. Prints what it measured, and exits with 1 if a
bound is broken.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stq_compile as stq
from stq_compile.backend import session_of
from stq_compile.codegen.cpp.cache import chosen
from stq_compile.driver import Driver
from stq_compile.planner import history

WARM_UP = 0.5
"""Share of the steps after which everything should have its final size: the history is full after
10,000, at a decision every ten, and the kernels for all widths in use are loaded."""
GROWTH = 4.0
"""Megabytes by which the process may grow after that, what the allocator keeps left out."""


@dataclass(frozen=True)
class Size:
    """What a process holds."""

    step: int
    megabytes: float
    objects: int
    tensors: int
    kernels: int  # shared libraries that were loaded from the cache
    compiled: int  # variants of the step in Dynamo's cache
    decisions: int


def resident() -> float:
    """Megabytes of memory that the process occupies, once the allocator gave back what is free."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def loaded_kernels() -> int:
    """Shared libraries of ours that are mapped into the process."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sum(Path(file).parent == chosen()[0] and file.endswith(".so") for file in files)


def variants(optimizer: torch.optim.Optimizer) -> int:
    """Entries of Dynamo's cache for an optimizer's own step."""
    drivers = [d for d in gc.get_objects() if type(d) is Driver]
    (mine,) = [d for d in drivers if d.session is session_of(optimizer)]
    list_of: Any = torch._dynamo.eval_frame._debug_get_cache_entry_list
    return sum(len(list_of(capture.code)) for capture in (mine.whole, *mine.captures))


def size(step: int, optimizer: torch.optim.Optimizer) -> Size:
    gc.collect()
    found = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in found)
    return Size(
        step, resident(), len(found), tensors, loaded_kernels(), variants(optimizer),
        len(stq.history(optimizer)),
    )  # fmt: skip


EXCESS = 0.3
"""By how much the distance to the right answers may be above that of fp32: twice the tolerance."""
DRIFT = 0.1
"""And by how much more at the end than half-way."""


@dataclass(frozen=True)
class Outcome:
    """Means of a tenth of the steps, before half-way and at the end: losses of fresh batches, and
    squared distances to the right answers."""

    losses: tuple[float, float]
    distances: tuple[float, float]


class Data:
    """A teacher's answers with noise: batches that no run sees twice."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(1000)
        self.teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, answers to learn from, and the right ones."""
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        x = torch.randn(64, 32, generator=generator)
        with torch.no_grad():
            right = self.teacher(x)
        return x, right + 0.3 * torch.randn(64, 8, generator=generator), right


def train(seed: int, steps: int, packed: bool) -> tuple[Outcome, list[Size], torch.optim.Optimizer]:
    data = Data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8)
    )
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.named_parameters(), lr=2e-3)
    if packed:  # it decides as often as it can, and nothing holds a width where it is
        optimizer = stq.compile(
            optimizer, min_numel=512, interval=10, hysteresis=0.0, dwell=0, seed=seed
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    errors: list[float] = []
    sizes: list[Size] = []
    for step in range(steps):
        x, y, right = data.batch(step)
        optimizer.zero_grad()
        answer = model(x)
        loss = nn.functional.mse_loss(answer, y)
        loss.backward()
        optimizer.step()
        schedule.step()
        if packed:
            stq.log(optimizer, loss)
        losses.append(loss.item())
        errors.append(nn.functional.mse_loss(answer.detach(), right).item())
        if packed and (step + 1) % max(1, steps // 20) == 0:
            sizes.append(size(step + 1, optimizer))
    tenth = max(1, steps // 10)
    half = slice(4 * tenth, 5 * tenth)

    def means(values: list[float]) -> tuple[float, float]:
        return statistics.fmean(values[half]), statistics.fmean(values[-tenth:])

    return Outcome(means(losses), means(errors)), sizes, optimizer


def complaints(sizes: list[Size], steps: int, limit: int) -> list[str]:
    """What grew."""
    start = next(s for s in sizes if s.step >= WARM_UP * steps)
    end = sizes[-1]
    found = []
    if end.megabytes - start.megabytes > GROWTH:
        found.append(f"memory grew from {start.megabytes:.1f} to {end.megabytes:.1f} MB")
    if end.tensors > start.tensors:
        found.append(f"live tensors grew from {start.tensors} to {end.tensors}")
    if end.compiled > start.compiled:
        found.append(f"Dynamo's variants grew from {start.compiled} to {end.compiled}")
    if end.decisions > limit:
        found.append(f"the history holds {end.decisions} decisions, more than {limit}")
    return found


def drifts(exact: list[Outcome], kept: list[Outcome]) -> list[str]:
    """Where the packed runs end up elsewhere than those in fp32."""
    pairs = list(zip(kept, exact, strict=True))
    sigma = statistics.stdev(o.losses[1] for o in exact) if len(exact) > 1 else math.inf
    before, after = (
        statistics.fmean(k.losses[at] - e.losses[at] for k, e in pairs) for at in (0, 1)
    )
    halfway, end = (
        statistics.fmean(k.distances[at] / e.distances[at] for k, e in pairs) for at in (0, 1)
    )
    print(f"loss packed - fp32: half-way {before:+.5f}, at the end {after:+.5f}", end="")
    print(f"; spread of fp32's seeds: {sigma:.5f}")
    print(f"distance packed / fp32: half-way {halfway:.3f}, at the end {end:.3f}")
    found = []
    if after - before > 2 * sigma:
        found.append(f"the loss drifts by {after - before:.5f}, more than two spreads of seeds")
    if end > 1 + EXCESS:
        found.append(f"the distance is {end:.3f} times fp32's, more than {1 + EXCESS}")
    if end > halfway + DRIFT:
        found.append(f"the distance drifts: {halfway:.3f} times fp32's half-way, {end:.3f} then")
    return found


def _said(values: tuple[float, float]) -> str:
    return " ".join(f"{value:.5f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact: list[Outcome] = []
    kept: list[Outcome] = []
    broken: list[str] = []
    for seed in range(options.seeds):
        start = time.perf_counter()
        exact.append(train(seed, options.steps, packed=False)[0])
        outcome, sizes, optimizer = train(seed, options.steps, packed=True)
        kept.append(outcome)
        report = stq.report(optimizer)
        print(
            f"seed {seed}: half-way and at the end, losses {_said(exact[-1].losses)} of fp32, "
            f"{_said(outcome.losses)} packed, distances {_said(exact[-1].distances)}, "
            f"{_said(outcome.distances)}; {report.bits_per_element:.2f} true bits, "
            f"{report.transitions} changes of width, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for s in (sizes[0], sizes[len(sizes) // 5], sizes[len(sizes) // 2], sizes[-1]):
            print(
                f"  step {s.step}: {s.megabytes:.1f} MB, {s.objects} objects, {s.tensors} tensors, "
                f"{s.kernels} kernels, {s.compiled} variants, {s.decisions} decisions",
                flush=True,
            )
        broken += [f"seed {seed}: {c}" for c in complaints(sizes, options.steps, history.LIMIT)]
    broken += drifts(exact, kept)
    for complaint in broken:
        print(complaint)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

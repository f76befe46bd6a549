"""``make soak``: a small model through 20,000 steps with widths that change, and nothing may grow.

    python tests/soak.py [--steps 20000] [--seeds 3]

Trains a small network with fp32 AdamW and with packed states, each with several seeds, and checks
of the packed runs: memory of the process, live tensors and Dynamo's compiled variants are flat, the
planner's history is bounded, and the loss is that of fp32 within the spread of seeds. Prints what
it measured, and exits with 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
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


class Data:
    """A teacher's answers with noise; batches depend on the step alone.

    What is compared is the distance to the answers without noise: the noise would hide a drift.
    """

    def __init__(self) -> None:
        torch.manual_seed(1000)
        self.teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, answers to learn from, and the right ones."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 32, generator=generator)
        with torch.no_grad():
            right = self.teacher(x)
        return x, right + 0.3 * torch.randn(64, 8, generator=generator), right


def train(
    seed: int, steps: int, data: Data, packed: bool
) -> tuple[float, list[Size], torch.optim.Optimizer]:
    """The mean squared error of the last tenth of the steps."""
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
    late: list[float] = []
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
        if step >= steps * 0.9:
            late.append(nn.functional.mse_loss(answer.detach(), right).item())
        if packed and (step + 1) % max(1, steps // 20) == 0:
            sizes.append(size(step + 1, optimizer))
    return statistics.fmean(late), sizes, optimizer


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Data()
    exact, kept, broken = [], [], []
    for seed in range(options.seeds):
        start = time.perf_counter()
        exact.append(train(seed, options.steps, data, packed=False)[0])
        loss, sizes, optimizer = train(seed, options.steps, data, packed=True)
        kept.append(loss)
        report = stq.report(optimizer)
        print(
            f"seed {seed}: error fp32 {exact[-1]:.5f}, packed {loss:.5f}, "
            f"{report.bits_per_element:.2f} true bits, {report.transitions} changes of width, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for s in (sizes[0], sizes[len(sizes) // 5], sizes[len(sizes) // 2], sizes[-1]):
            print(
                f"  step {s.step}: {s.megabytes:.1f} MB, {s.objects} objects, {s.tensors} tensors, "
                f"{s.kernels} kernels, {s.compiled} variants, {s.decisions} decisions",
                flush=True,
            )
        broken += [f"seed {seed}: {c}" for c in complaints(sizes, options.steps, history.LIMIT)]
    sigma = statistics.stdev(exact) if len(exact) > 1 else float("inf")
    drift = statistics.fmean(kept) - statistics.fmean(exact)
    print(f"loss packed − fp32: {drift:+.5f}, seed spread of fp32 (σ): {sigma:.5f}")
    if drift > 2 * sigma:
        broken.append(f"the loss drifted by {drift:.5f}, more than two σ")
    for complaint in broken:
        print(complaint)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

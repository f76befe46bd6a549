"""Times in turns: what is compared runs in the same minutes, on the same memory.

Everything is a median over rounds. A round times one step of every contender, so that a ratio
compares two steps a moment apart, and the ratio given is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import Parameter

from stq_compile.benchmarks.contenders import Contender, Step

WARM_UP = 3
COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """One contender on one workload.

    Attributes:
        ns: median nanoseconds per parameter and step; ``low`` and ``high`` are the quartiles.
        ratio: of its time to the reference's.
        bits: true bits per element of its states, of which the reference takes 32.
        moved: bytes per parameter that the step has to move, where that is known.
        bandwidth: share of `memory_bandwidth` at which it moves them.
    """

    name: str
    ns: float
    low: float
    high: float
    ratio: float
    bits: float
    moved: float | None
    bandwidth: float | None


def parameters(
    shapes: Sequence[Sequence[int]], seed: int = 0, device: str = "cpu"
) -> list[Parameter]:
    """Parameters with gradients, of a usual size."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        param = Parameter((torch.randn(*shape, generator=generator) * 0.02).to(device))
        param.grad = (torch.randn(*shape, generator=generator) * 1e-3).to(device)
        params.append(param)
    return params


def memory_bandwidth(rounds: int = 7, device: str = "cpu") -> float:
    """Bytes per second, read and written, with all threads that torch has: the better of a copy
    and of an update in place, which spares the processor fetching what it overwrites."""
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    ways: list[Step] = [lambda: target.copy_(source), lambda: target.mul_(1.0)]
    medians = []
    for way in ways:
        way()
        medians.append(statistics.median(seconds(way, device) for _ in range(rounds)))
    return 2 * COPY_BYTES / min(medians)


def seconds(step: Step, device: str = "cpu") -> float:
    """How long one step takes, until the device has finished it."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _nothing() -> None:
    """The CPU has finished when it returns."""


def compare(
    shapes: Sequence[Sequence[int]],
    entrants: Sequence[Contender],
    *,
    rounds: int = 9,
    bandwidth: float | None = None,
    device: str = "cpu",
    told: Callable[[str], None] = lambda name: None,
) -> list[Timing]:
    """Time the contenders in turns, on the same parameters and gradients; the first is the
    reference.

    ``told`` is called with what is being done, for a progress bar.
    """
    params = parameters(shapes, device=device)
    numel = sum(p.numel() for p in params)
    running = []
    for contender in entrants:
        told(f"{contender.name}: first steps")
        step, nbytes = contender.make(params)
        for _ in range(WARM_UP):
            step()
        running.append((contender, step, nbytes))
    times: list[list[float]] = [[] for _ in running]
    for number in range(rounds):
        told(f"round {number + 1} of {rounds}")
        for (_, step, _), found in zip(running, times, strict=True):
            found.append(seconds(step, device))
    sizes = [nbytes() for _, _, nbytes in running]
    return [
        _timing(contender, found, times[0], numel, size, sizes[0], bandwidth)
        for (contender, _, _), found, size in zip(running, times, sizes, strict=True)
    ]


def _timing(
    contender: Contender,
    times: Sequence[float],
    reference: Sequence[float],
    numel: int,
    nbytes: int,
    reference_nbytes: int,
    bandwidth: float | None,
) -> Timing:
    per_param = [t / numel * 1e9 for t in times]
    low, _, high = statistics.quantiles(per_param, n=4) if len(times) > 1 else per_param * 3
    ns = statistics.median(per_param)
    # Parameter in and out, gradient in, states in and out.
    moved = 12 + 2 * nbytes / numel if contender.ours else contender.moved
    share = None
    if moved is not None and bandwidth is not None:
        share = moved / (ns * 1e-9) / bandwidth
    ratio = statistics.median(t / r for t, r in zip(times, reference, strict=True))
    bits = 32 * nbytes / reference_nbytes
    return Timing(contender.name, ns, low, high, ratio, bits, moved, share)


@dataclass(frozen=True)
class FirstStep:
    """A new process: seconds of its first step, and the most memory it took above parameters and
    gradients, in bytes per parameter."""

    name: str
    cold: float
    warm: float
    memory: float


CHILD = """
import json, re, sys
from pathlib import Path
from stq_compile.benchmarks.contenders import contenders
from stq_compile.benchmarks.measure import WARM_UP, parameters, seconds
family, name, shapes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = parameters(shapes)
(contender,) = [c for c in contenders(family, peers=True) if c.name == name]
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
before = peak()
step, _ = contender.make(params)
first = seconds(step)
for _ in range(WARM_UP):
    step()
print(first, peak() - before)
"""


def first_steps(
    shapes: Mapping[str, Sequence[int]],
    family: str,
    names: Sequence[str],
    told: Callable[[str], None] = lambda name: None,
) -> list[FirstStep]:
    """First steps in new processes, with empty compiler caches and again with full ones."""
    numel = sum(torch.Size(s).numel() for s in shapes.values())
    found = []
    for name in names:
        with TemporaryDirectory() as folder:
            outcomes = []
            for state in ("cold", "warm"):
                told(f"{name}: first step, {state}")
                arguments = [family, name, json.dumps([list(s) for s in shapes.values()])]
                outcomes.append(_child(arguments, Path(folder)))
        (cold, _), (warm, memory) = outcomes
        found.append(FirstStep(name, cold, warm, memory / numel))
    return found


def _child(arguments: Sequence[str], caches: Path) -> tuple[float, float]:
    environment = {
        **os.environ,
        "STQ_CACHE_DIR": str(caches / "stq"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, memory = done.stdout.splitlines()[-1].split()
    return float(seconds), float(memory)

"""What a compiled step costs: the first one with cold caches, and the overhead of a later one.

    python examples/measure_step.py

GPT-2's 148 parameter shapes (124 M parameters), AdamW, states at 4 and 3 bits. The first step runs
in a process of its own with an empty compiler cache. A later step is timed in rounds next to
torch's fused AdamW in fp32, both on the same gradients; the table gives medians and their ratio.
Overhead is the time of a step of 148 tensors of 64 elements, which is next to no arithmetic.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

import stq_compile as stq

PRECISION = {"exp_avg": 4, "exp_avg_sq": 3}
ROUNDS = 9


def gpt2_shapes(width: int = 768, layers: int = 12) -> list[tuple[int, ...]]:
    """The parameter shapes of GPT-2 small."""
    layer: list[tuple[int, ...]] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(50257, width), (1024, width), *layer * layers, (width,), (width,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Parameters and gradients with values of a usual size."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def first_step() -> float:
    """Seconds of the first step in a new process with an empty cache."""
    code = "import measure_step as m; print(m.seconds(m.packed(m.parameters(m.gpt2_shapes()))))"
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "STQ_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        here = os.path.dirname(os.path.abspath(__file__))
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=here,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return float(output.splitlines()[-1])


def packed(params: list[torch.nn.Parameter], **options: object) -> torch.optim.Optimizer:
    return stq.compile(torch.optim.AdamW(params, lr=1e-4), precision=PRECISION, **options)


def later_steps() -> tuple[float, float]:
    """Median seconds of a packed and of torch's fused step, taken in turns."""
    ours = packed(parameters(gpt2_shapes()))
    fused = torch.optim.AdamW(parameters(gpt2_shapes()), lr=1e-4, fused=True)
    times = [(seconds(ours), seconds(fused)) for _ in range(ROUNDS + 2)][2:]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def overhead() -> float:
    """Median seconds of a step of 148 tiny tensors."""
    optimizer = packed(parameters([(64,)] * 148), min_numel=16)
    return statistics.median([seconds(optimizer) for _ in range(200)][20:])


def main() -> None:
    """Measure and print."""
    numel = sum(torch.Size(s).numel() for s in gpt2_shapes())
    table = Table(title=f"AdamW step on GPT-2's shapes, {torch.get_num_threads()} threads")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("first step, cold caches", f"{first_step():.1f} s")
    table.add_row("overhead of a later step", f"{overhead() * 1e3:.2f} ms")
    ours, fused = later_steps()
    table.add_row("packed step, 4 + 3 bits", f"{ours * 1e9 / numel:.2f} ns per parameter")
    table.add_row("torch fused step, fp32", f"{fused * 1e9 / numel:.2f} ns per parameter")
    table.add_row("ratio", f"{ours / fused:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

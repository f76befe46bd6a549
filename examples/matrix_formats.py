"""Trains a small network with Shampoo, whose preconditioners are kept in few bits, in two ways.

python examples/matrix_formats.py              # 3 seeds, a minute

Shampoo multiplies a gradient by inverse fourth roots of sums of G Gᵀ and Gᵀ G. Inverse roots live
on small eigenvalues, and rounding a matrix entry by entry drowns them (Wang et al., "4-bit Shampoo
for memory-efficient network training", 2024). stq_compile finds from the step that these states are
symmetric and positive semidefinite, and keeps a factor of them (design/0021). The table shows the
loss with that, and with the blocks of 128 entries that other states get, at equal widths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import commandline as cli
import stq_compile as stq
from stq_compile.formats import FORMATS, Format
from stq_compile.packed_state import PackedState
from tinyvit import Digits, load_digits

HIDDEN = 96
BATCH = 64
STEPS = 300
LR = 0.8  # of 0.1 to 2, fp32, two seeds: 0.5 0.20, 0.8 0.13, 1.2 0.15, 2 0.18


class Shampoo(torch.optim.Optimizer):
    """Gupta et al., "Shampoo: preconditioned stochastic tensor optimization", 2018: of matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, eps: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad, self.state[p]
                if not state:
                    state["left"] = group["eps"] * torch.eye(p.shape[0])
                    state["right"] = group["eps"] * torch.eye(p.shape[1])
                state["left"].add_(g @ g.T)
                state["right"].add_(g.T @ g)
                update = inverse_fourth_root(state["left"]) @ g
                p.sub_(group["lr"] * update @ inverse_fourth_root(state["right"]))


def inverse_fourth_root(matrix: Tensor) -> Tensor:
    """`A^(-1/4)`; eigenvalues below a millionth of the largest count as that."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=1e-6 * values.max()) ** -0.25) @ vectors.T
    return root


@dataclass(frozen=True)
class Result:
    """The validation loss in nats, and true bits per element of the states."""

    loss: float
    bits: float


Prepare = Callable[[Shampoo], Callable[[], float]]
"""Makes an optimizer keep its states in some way; gives their true bits when asked."""


def fp32(optimizer: Shampoo) -> Callable[[], float]:
    return lambda: 32.0


def matrix_formats(width: int) -> Prepare:
    """As `stq.compile` keeps them."""

    def prepare(optimizer: Shampoo) -> Callable[[], float]:
        stq.compile(optimizer, precision=width, min_numel=0)
        return lambda: stq.report(optimizer).bits_per_element

    return prepare


def blocks(width: int) -> Prepare:
    """In a format for any values: after each step they become what it would give back."""
    format = FORMATS[f"softsign{width}"]

    def prepare(optimizer: Shampoo) -> Callable[[], float]:
        steps = iter(range(1 << 62))

        def round_states(*_: Any) -> None:
            seed = next(steps)
            for state in optimizer.state.values():
                for value in state.values():
                    value.copy_(PackedState.pack(value, format, seed=seed).dequantize())

        optimizer.register_step_post_hook(round_states)
        return lambda: _bits(optimizer, format)

    return prepare


def _bits(optimizer: Shampoo, format: Format) -> float:
    states = optimizer.state.values()
    sizes: list[int] = [value.numel() for state in states for value in state.values()]
    return 8 * sum(map(format.nbytes, sizes)) / sum(sizes)


VARIANTS: dict[str, Prepare] = {
    "fp32": fp32,
    "factors, 8 bits": matrix_formats(8),
    "entries, 8 bits": blocks(8),
    "factors, 4 bits": matrix_formats(4),
    "entries, 4 bits": blocks(4),
}


def train(prepare: Prepare, digits: Digits, steps: int, seed: int) -> Result:
    """A network of two layers on scikit-learn's digits."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, 10, bias=False)
    )
    optimizer = Shampoo(model.parameters(), LR)
    bits = prepare(optimizer)
    for _ in range(steps):
        images, labels = digits.batch(generator, BATCH)
        loss = F.cross_entropy(model(images.flatten(1)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(digits.valid_images.flatten(1))
        return Result(F.cross_entropy(logits, digits.valid_labels).item(), bits())


def results_table(results: dict[str, list[Result]]) -> Table:
    """A row for each variant: means and deviations over the seeds."""
    table = Table(
        title="Shampoo on digits: preconditioners by their Cholesky factors or by entries"
    )
    table.add_column("states")
    for heading in ("validation loss, nats", "− fp32", "true bits per element"):
        table.add_column(heading, justify="right")
    base = statistics.fmean(result.loss for result in results["fp32"])
    for name, runs in results.items():
        losses = [run.loss for run in runs]
        mean = statistics.fmean(losses)
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        gap = "" if name == "fp32" else f"{mean - base:+.4f}"
        table.add_row(name, f"{mean:.4f}{spread}", gap, f"{runs[0].bits:.2f}")
    return table


def main(
    seeds: cli.Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = STEPS,
    threads: cli.Threads = 1,
) -> None:
    """Train with every way to keep the preconditioners, and print the table."""
    if threads is not None:
        torch.set_num_threads(threads)
    digits = load_digits()
    results = {
        name: [train(prepare, digits, steps, seed) for seed in range(seeds)]
        for name, prepare in VARIANTS.items()
    }
    Console().print(results_table(results))


if __name__ == "__main__":
    typer.run(main)

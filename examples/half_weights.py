"""Trains a GPT whose weights are bfloat16, with each `param_rounding`, beside fp32 weights.

python examples/half_weights.py                # 2 seeds, 800 steps
python examples/half_weights.py --seeds 5 --steps 1200
python examples/half_weights.py --quick        # a GPT of 0.2 M parameters, minutes on one core

Forward and backward compute in fp32 on the 16-bit weights, so that nothing differs from the run
with fp32 weights but what is stored between steps, and the gradients' rounding. The loss at the end
is that of the 16-bit weights alone: the error states are no part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import commandline as cli
from comparison import Comparison, Schedule, Settings, compare
from optimizers import choose_optimizer
from presentation import markdown_table, results_table
from tinygpt import TinyGPT, load_text
from train_gpt import EVIDENCE_ADAMW_LR, EVIDENCE_BATCH, EVIDENCE_CONFIG, QUICK_CONFIG, GPTTask
from variants import FP32, Variant

STEPS = 800
STATES = 8  # bits: far from what is compared


class HalfWeights(nn.Module):
    """A model with bfloat16 weights; called with their values in float32, it gives its loss."""

    def __init__(self, inner: TinyGPT) -> None:
        super().__init__()
        self.inner = inner.bfloat16()

    def forward(self, batch: Tensor) -> Tensor:
        return self.inner.loss(batch)


@dataclass(frozen=True)
class HalfTask(GPTTask):
    """`GPTTask` with bfloat16 weights."""

    @property
    def title(self) -> str:
        return f"{super().title}, bfloat16 weights"

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "weights": "bfloat16"}

    def model(self) -> nn.Module:  # type: ignore[override]  # it holds the GPT
        return HalfWeights(TinyGPT(self.config))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        values = {name: p.float() for name, p in model.named_parameters()}
        loss: Tensor = torch.func.functional_call(model, values, (batch,))
        return loss


STOCK = Variant("bf16 weights and states, torch", None)
VARIANTS = [
    STOCK,
    *(
        Variant(f"bf16 weights, {rounding}", {"precision": STATES, "param_rounding": rounding})
        for rounding in ("nearest", "stochastic", "compensated")
    ),
]


def main(
    seeds: cli.Seeds = 2,
    first_seed: cli.FirstSeed = 0,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    quick: Annotated[bool, typer.Option(help="A smaller model.")] = False,
    threads: cli.Threads = 1,
    out: cli.Out = Path("out"),
    resume: cli.Resume = False,
) -> None:
    """Train with fp32 weights, then with bfloat16 ones rounded in each way; print both tables."""
    console = cli.prepare(threads, out)
    schedule = Schedule(range(first_seed, first_seed + seeds), out / "runs", resume)
    text = load_text()
    choice = choose_optimizer("adamw", EVIDENCE_ADAMW_LR)
    settings = Settings(steps, evaluations=4)
    packed = Variant(f"fp32 weights, states {STATES} bits", {"precision": STATES})
    arguments = (text, QUICK_CONFIG if quick else EVIDENCE_CONFIG, EVIDENCE_BATCH)
    full = compare(GPTTask(*arguments), choice, [FP32, packed], settings, schedule, console)
    half = compare(HalfTask(*arguments), choice, VARIANTS, settings, schedule, console)
    rows = [*full.rows, *half.rows]
    table = Comparison(full.title, full.unit, full.optimizer, rows, full.fused_step_ms)
    console.print(results_table(table))
    (out / "half_weights.md").write_text(markdown_table(table) + "\n")


if __name__ == "__main__":
    typer.run(main)

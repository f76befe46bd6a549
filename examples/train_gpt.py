"""Trains a byte-level GPT on real text with fp32 and with packed optimizer states.

python examples/train_gpt.py                                     # what `make demo` runs
python examples/train_gpt.py --precision exp_avg=5,exp_avg_sq=4 --seeds 3
python examples/train_gpt.py --optimizer rmsprop --precision 4 --text war_and_peace.txt
python examples/train_gpt.py --variant fp32 --variant 8 --variant 'exp_avg=3,token*:exp_avg=4'
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import commandline as cli
from comparison import Schedule, Settings
from tinygpt import GPTConfig, Text, TinyGPT, load_text

QUICK_WINDOWS = 256  # of the validation text, while training
FINAL_WINDOWS = 1024  # and at the end
EVALUATION_BATCH = 64
# What evidence.py trains, many times: a run takes about a minute on one thread.
EVIDENCE_CONFIG = GPTConfig(layers=3, context=64)
EVIDENCE_BATCH = 8
EVIDENCE_STEPS = 1200
EVIDENCE_ADAMW_LR = 2e-3
# A smaller one, in minutes for all rows and seeds of a table.
QUICK_CONFIG = GPTConfig(layers=2, width=64, context=64)
QUICK_STEPS = 800


@dataclass(frozen=True)
class GPTTask:
    """Next-byte prediction on `text`."""

    text: Text
    config: GPTConfig
    batch_size: int
    unit: str = "nats per byte"

    @property
    def title(self) -> str:
        parameters = sum(p.numel() for p in TinyGPT(self.config).parameters())
        size = len(self.text.train) + len(self.text.valid)
        return f"GPT, {parameters:,} parameters, {self.text.name} ({size:,} bytes)"

    @property
    def identity(self) -> dict[str, Any]:
        text = bytes(self.text.train) + bytes(self.text.valid)
        return {
            "name": "gpt",
            "model": asdict(self.config),
            "batch": self.batch_size,
            "text": hashlib.sha256(text).hexdigest(),
            "windows": [QUICK_WINDOWS, FINAL_WINDOWS],
        }

    def model(self) -> TinyGPT:
        return TinyGPT(self.config)

    def batch(self, generator: torch.Generator) -> Tensor:
        return self.text.batch(generator, self.batch_size, self.config.context)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, TinyGPT)
        return model.loss(batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, quick: bool) -> dict[str, float]:
        windows = self.text.valid_windows(
            self.config.context, QUICK_WINDOWS if quick else FINAL_WINDOWS
        )
        parts = torch.split(windows, EVALUATION_BATCH)
        total = sum(self.loss(model, part).item() * len(part) for part in parts)
        return {"loss": total / len(windows)}


def main(
    text: Annotated[
        Path | None, typer.Option(help="Text file; by default Python's own documentation.")
    ] = None,
    optimizer: cli.OptimizerName = "adamw",
    precision: cli.Precisions = None,
    variant: cli.Variants = None,
    steps: cli.Steps = 1300,
    seeds: cli.Seeds = 1,
    first_seed: cli.FirstSeed = 0,
    lr: cli.LearningRate = None,
    batch: cli.Batch = 8,
    threads: cli.Threads = None,
    out: cli.Out = Path("out"),
    resume: cli.Resume = False,
) -> None:
    """Train a small GPT from the same start with fp32 and with packed optimizer states."""
    try:
        choice, variants = cli.choose(optimizer, lr, precision, variant)
        task = GPTTask(load_text(text), GPTConfig(), batch)
        console = cli.prepare(threads, out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    schedule = Schedule(range(first_seed, first_seed + seeds), out / "runs", resume)
    cli.run_example("train_gpt", task, choice, variants, Settings(steps), schedule, console)


if __name__ == "__main__":
    typer.run(main)

"""Trains a small vision transformer on handwritten digits, as train_gpt.py does with a GPT.

python examples/train_vit.py
python examples/train_vit.py --variant fp32 --variant auto --seeds 3 --threads 1
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import commandline as cli
from comparison import Schedule, Settings
from tinyvit import Digits, TinyViT, ViTConfig, load_digits

STEPS = 400
BATCH = 64
# AdamW at 400 steps, accuracy and loss: 1e-3 96.3%, 0.124; 2e-3 97.2%, 0.107; 4e-3 96.0%, 0.132.
LR = {"adamw": 2e-3}


@dataclass(frozen=True)
class ViTTask:
    """Classification of `digits`."""

    digits: Digits
    config: ViTConfig
    batch_size: int
    unit: str = "nats"

    @property
    def title(self) -> str:
        parameters = sum(p.numel() for p in TinyViT(self.config).parameters())
        return f"ViT, {parameters:,} parameters, scikit-learn's digits"

    @property
    def identity(self) -> dict[str, Any]:
        images = self.digits.train_images.numpy().tobytes() + bytes(self.digits.train_labels)
        return {
            "name": "vit",
            "model": asdict(self.config),
            "batch": self.batch_size,
            "images": hashlib.sha256(images).hexdigest(),
        }

    def model(self) -> TinyViT:
        return TinyViT(self.config)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.digits.batch(generator, self.batch_size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, quick: bool) -> dict[str, float]:
        """On all validation images, which are few; the accuracy is in percent."""
        model.eval()
        logits = model(self.digits.valid_images)
        model.train()
        right = (logits.argmax(dim=1) == self.digits.valid_labels).float().mean().item()
        loss = F.cross_entropy(logits, self.digits.valid_labels).item()
        return {"loss": loss, "accuracy, %": 100 * right}


def main(
    optimizer: cli.OptimizerName = "adamw",
    precision: cli.Precisions = None,
    variant: cli.Variants = None,
    steps: cli.Steps = STEPS,
    seeds: cli.Seeds = 1,
    first_seed: cli.FirstSeed = 0,
    lr: cli.LearningRate = None,
    batch: cli.Batch = BATCH,
    threads: cli.Threads = None,
    out: cli.Out = Path("out"),
    resume: cli.Resume = False,
) -> None:
    """Train a small ViT from the same start with fp32 and with packed optimizer states."""
    try:
        lr = LR.get(optimizer.lower()) if lr is None else lr
        choice, variants = cli.choose(optimizer, lr, precision, variant)
        task = ViTTask(load_digits(), ViTConfig(), batch)
        console = cli.prepare(threads, out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    schedule = Schedule(range(first_seed, first_seed + seeds), out / "runs", resume)
    cli.run_example("train_vit", task, choice, variants, Settings(steps), schedule, console)


if __name__ == "__main__":
    typer.run(main)

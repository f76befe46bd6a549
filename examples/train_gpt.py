"""Trains a byte-level GPT on real text with fp32 and with packed optimizer states.

python examples/train_gpt.py                                     # what `make demo` runs
python examples/train_gpt.py --precision exp_avg=5,exp_avg_sq=4 --seeds 3
python examples/train_gpt.py --optimizer rmsprop --precision 4 --text war_and_peace.txt
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from comparison import Settings, compare
from optimizers import choose_optimizer, parse_precision
from presentation import loss_difference, results_table, save_picture, save_results
from tinygpt import GPTConfig, Text, TinyGPT, load_text

QUICK_WINDOWS = 256  # of the validation text, while training
FINAL_WINDOWS = 1024  # and at the end
EVALUATION_BATCH = 64


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
        return f"GPT, {parameters:,} parameters, {self.text.name}"

    def model(self) -> TinyGPT:
        return TinyGPT(self.config)

    def batch(self, generator: torch.Generator) -> Tensor:
        return self.text.batch(generator, self.batch_size, self.config.context)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, TinyGPT)
        return model.loss(batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, quick: bool) -> float:
        windows = self.text.valid_windows(
            self.config.context, QUICK_WINDOWS if quick else FINAL_WINDOWS
        )
        parts = torch.split(windows, EVALUATION_BATCH)
        total = sum(self.loss(model, part).item() * len(part) for part in parts)
        return total / len(windows)


def main(
    text: Annotated[
        Path | None, typer.Option(help="Text file; by default Python's own documentation.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="Any optimizer of torch.optim.")] = "adamw",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Bits of all states (4), or of each (exp_avg=4,exp_avg_sq=3)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 1300,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; by default the optimizer's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("out"),
) -> None:
    """Train a small GPT twice from the same start: with fp32 and with packed optimizer states."""
    try:
        choice = choose_optimizer(optimizer, lr, parse_precision(precision or []))
        task = GPTTask(load_text(text), GPTConfig(), batch)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error

    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a file or a pipe; the table needs this much
    size = len(task.text.train) + len(task.text.valid)
    console.print(f"{task.title} ({size:,} bytes); {steps} steps, {choice.name}, lr {choice.lr:g}")
    settings = Settings(steps)
    comparison = compare(task, choice, settings, seeds, console)

    console.print(results_table(comparison))
    console.print(
        f"validation loss, packed − fp32: {loss_difference(comparison)} {task.unit}"
        + (f" (mean ± standard deviation of {seeds} seeds)" if seeds > 1 else "")
    )
    save_picture(comparison, out / "train_gpt.png")
    save_results(comparison, settings, out / "train_gpt.json")
    console.print(f"loss curves: {out / 'train_gpt.png'}   all figures: {out / 'train_gpt.json'}")


if __name__ == "__main__":
    typer.run(main)

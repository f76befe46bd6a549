"""PyTorch Lightning, Accelerate and transformers' Trainer, each with the real package.

Every run is made with the stock optimizer too; at 32 bits the weights must agree, and a packed run
that is saved half-way and resumed must end in the bits of the one that went through. The packages
are the extra `integrations`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import stq_compile as stq
from models import make_model
from stq_compile import PackedState

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = 6
WIDE = {"precision": 32}
PACKED = {"precision": 4, "min_numel": 64}


class Data(Dataset[tuple[Tensor, Tensor]]):
    """``STEPS`` batches of 8, the same each time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(8 * STEPS, 16, generator=generator)
        self.y = torch.randint(0, 8, (8 * STEPS,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def optimizer_of(model: nn.Module, options: dict[str, Any] | None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer if options is None else stq.compile(optimizer, **options)


def assert_near(ours: nn.Module, stock: nn.Module, atol: float = 1e-5) -> None:
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=atol)


def assert_same_bits(ours: nn.Module, other: nn.Module) -> None:
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def packed(optimizer: torch.optim.Optimizer) -> int:
    """How many states are packed."""
    states = [s for entries in optimizer.state.values() for s in entries.values()]
    return sum(isinstance(s, PackedState) for s in states)


# Lightning. -----------------------------------------------------------------------------------


def lightning_run(
    folder: Path, options: dict[str, Any] | None, epochs: int, load: Path | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Fit until some epochs are done, from a checkpoint if there is one, and leave another one in
    ``folder``; the model and its optimizer."""
    lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra: integrations")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.model, options)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=100)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        gradient_clip_val=1.0, accumulate_grad_batches=2,
    )  # fmt: skip
    data = DataLoader(Data(), batch_size=8)
    trainer.fit(module, data, ckpt_path=None if load is None else str(load / "last.ckpt"))
    trainer.save_checkpoint(str(folder / "last.ckpt"))
    return module.model, trainer.optimizers[0]


def test_lightning(tmp_path: Path) -> None:
    stock, _ = lightning_run(tmp_path / "stock", None, 2)
    wide, optimizer = lightning_run(tmp_path / "wide", WIDE, 2)
    assert_near(wide, stock)
    assert stq.report(optimizer).compiles <= 2
    assert not stq.report(optimizer).note


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    through, optimizer = lightning_run(tmp_path / "through", PACKED, 4)
    assert packed(optimizer) == 6
    lightning_run(tmp_path / "half", PACKED, 2)
    resumed, optimizer = lightning_run(tmp_path / "rest", PACKED, 4, load=tmp_path / "half")
    assert packed(optimizer) == 6
    assert_same_bits(resumed, through)


# Accelerate. ----------------------------------------------------------------------------------


def accelerate_run(
    options: dict[str, Any] | None, steps: range, save: Path | None = None, load: Path | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    accelerate = pytest.importorskip("accelerate", reason="needs the extra: integrations")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    optimizer = optimizer_of(model, options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    data = DataLoader(Data(), batch_size=8)
    prepared, wrapped, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    if load is not None:
        accelerator.load_state(str(load))
    for step, (x, y) in enumerate(data):
        if step not in steps:
            continue
        with accelerator.accumulate(prepared):
            loss = nn.functional.cross_entropy(prepared(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
    if save is not None:
        accelerator.save_state(str(save))
    accelerator.free_memory()
    return model, optimizer


def test_accelerate() -> None:
    stock, _ = accelerate_run(None, range(STEPS))
    wide, optimizer = accelerate_run(WIDE, range(STEPS))
    assert_near(wide, stock)
    assert stq.report(optimizer).compiles <= 2
    assert not stq.report(optimizer).note


def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    through, optimizer = accelerate_run(PACKED, range(STEPS))
    assert packed(optimizer) == 6
    accelerate_run(PACKED, range(4), save=tmp_path)
    resumed, optimizer = accelerate_run(PACKED, range(4, STEPS), load=tmp_path)
    assert packed(optimizer) == 6
    assert_same_bits(resumed, through)


# Trainer. -------------------------------------------------------------------------------------


def trainer_run(
    folder: Path, options: dict[str, Any] | None, steps: int, *, resume: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A GPT-2 of two small layers, made from its configuration."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: integrations")
    pytest.importorskip("accelerate", reason="needs the extra: integrations")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (64, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = optimizer_of(model, options)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        save_steps=3, disable_tqdm=True, lr_scheduler_type="linear", logging_steps=2,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return model, optimizer


def test_trainer(tmp_path: Path) -> None:
    """The gradient of the keys' bias is zero but for rounding, which Adam divides by its own size:
    hence the wider tolerance, a 600th of the way that a weight can have gone."""
    stock, _ = trainer_run(tmp_path / "stock", None, STEPS)
    wide, optimizer = trainer_run(tmp_path / "wide", WIDE, STEPS)
    assert_near(wide, stock, atol=1e-4)
    assert stq.report(optimizer).compiles <= 2
    assert not stq.report(optimizer).note


def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The checkpoint of the middle; the later one is taken away, as if the run had ended."""
    import shutil

    through, optimizer = trainer_run(tmp_path, PACKED, STEPS)
    assert packed(optimizer) > 10
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    resumed, optimizer = trainer_run(tmp_path, PACKED, STEPS, resume=True)
    assert packed(optimizer) > 10
    assert_same_bits(resumed, through)

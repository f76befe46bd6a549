"""What stands around an optimizer in torch itself: the same run as with the stock optimizer.

At 32 bits the weights must be those of the stock run; at few bits the run must go through, with
packed states, and no more graphs than it needs. Lightning, Accelerate and Trainer are in
`test_integrations`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import stq_compile as stq
from cases import cases
from models import loss_of, make_model
from stq_compile import PackedState

PACKED = {"precision": {"exp_avg": 4, "exp_avg_sq": 4}, "min_numel": 64}
STEPS = 12
Run = Callable[[nn.Module, Optimizer], Any]


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def same_as_stock(
    run: Run, graphs: int, make: Callable[[nn.Module], Optimizer] = adamw, **packed: Any
) -> tuple[Any, Optimizer]:
    """Run with the stock optimizer, at 32 bits, and packed; what the last one gave.

    ``graphs``: how many the packed run may capture.
    """
    results = []
    for options in (None, {"precision": 32}, packed or PACKED):
        model = make_model()
        optimizer = make(model)
        if options is not None:
            stq.compile(optimizer, **options)
        results.append((run(model, optimizer), [p.detach().clone() for p in model.parameters()]))
    stock, wide, narrow = (weights for _, weights in results)
    start = list(make_model().parameters())
    for before, a, b, c in zip(start, stock, wide, narrow, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert not torch.equal(c, before)
    moved = torch.cat([(a - s.detach()).flatten() for a, s in zip(stock, start, strict=True)])
    error = torch.cat([(a - c).flatten() for a, c in zip(stock, narrow, strict=True)])
    assert error.norm() < 0.35 * moved.norm()
    report = stq.report(optimizer)
    assert report.compiles <= graphs
    assert not report.note
    assert any(row.width == 4 for row in report.rows)
    return results[-1][0], optimizer


@pytest.mark.slow
def test_gradients_that_are_accumulated_and_clipped() -> None:
    def run(model: nn.Module, optimizer: Optimizer) -> None:
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for micro in range(3):
                (loss_of(model, 3 * step + micro) / 3).backward()
            total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert total > 0.1
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            optimizer.step()

    same_as_stock(run, graphs=1)


def test_grad_scaler_that_meets_infinity() -> None:
    """The scaler unscales for clipping, skips the broken step, and halves its scale."""

    def run(model: nn.Module, optimizer: Optimizer) -> float:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, step) * (float("inf") if step == 4 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return float(scaler.get_scale())

    scale, optimizer = same_as_stock(run, graphs=1)
    assert scale == 2.0**12  # halved once, doubled once
    step = next(iter(optimizer.state.values()))["step"]
    assert float(step) == STEPS - 1


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}  # fmt: skip
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}
GRAPHS = {"adamw": 2, "sgd": 3}
"""With the first values and with others; SGD makes its momentum in a step of its own."""


@pytest.mark.parametrize(
    ("name", "optimizer"), cases(SCHEDULERS, OPTIMIZERS, few=[("OneCycleLR", "adamw")])
)
def test_schedulers(name: str, optimizer: str) -> None:
    """Whatever a scheduler changes (the cyclic ones change momentum too) becomes an input at its
    first change, and costs no further graph."""

    def run(model: nn.Module, optimizer: Optimizer) -> None:
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            if name == "ReduceLROnPlateau":
                scheduler.step(float(loss))
            else:
                scheduler.step()

    options = PACKED if optimizer == "adamw" else {"precision": 4, "min_numel": 64}
    same_as_stock(run, GRAPHS[optimizer], OPTIMIZERS[optimizer], **options)


@pytest.mark.slow
def test_averaged_weights() -> None:
    """SWA and an exponential average, over the weights that compiled steps write."""

    def run(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        swa, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=5e-3, anneal_epochs=3)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            ema.update_parameters(model)
            if step >= STEPS // 2:
                swa.update_parameters(model)
                scheduler.step()
        update_bn([torch.randn(4, 16)], swa)
        averages = [*ema.module.parameters(), *swa.module.parameters()]
        found.append([p.detach().clone() for p in averages])
        return averages

    found: list[list[Tensor]] = []
    same_as_stock(run, graphs=2)
    stock, wide, _ = found
    for a, b in zip(stock, wide, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def in_backward(options: dict[str, Any] | None) -> tuple[nn.Module, list[Optimizer], int]:
    """Train with one optimizer per parameter, stepped by a hook in the backward pass; also the
    most gradients that were alive at a time."""
    model = make_model()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}
    grads: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def hook(param: Tensor) -> None:
        nonlocal most
        assert param.grad is not None
        grads.add(param.grad)
        most = max(most, len(grads))
        optimizers[param].step()
        optimizers[param].zero_grad()

    for p, optimizer in optimizers.items():
        if options is not None:
            stq.compile(optimizer, **options)
        p.register_post_accumulate_grad_hook(hook)
    for step in range(STEPS):
        loss_of(model, step).backward()
    return model, list(optimizers.values()), most


def test_the_optimizer_in_the_backward_pass() -> None:
    stock, _, _ = in_backward(None)
    wide, optimizers, most = in_backward({"precision": 32})
    for p, q in zip(wide.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert most == 1  # a gradient is gone when the next one is there
    assert [stq.report(o).compiles for o in optimizers] == [1] * 6
    _, optimizers, most = in_backward(PACKED)
    assert most == 1
    states = [s for o in optimizers for s in next(iter(o.state.values())).values()]
    assert sum(isinstance(s, PackedState) for s in states) == 6  # three matrices


@pytest.mark.slow
def test_a_compiled_training_step() -> None:
    """`torch.compile` of forward, backward and step: the step is called as one piece, and nothing
    is compiled anew from step to step."""
    from torch._dynamo.utils import counters

    def run(model: nn.Module, optimizer: Optimizer) -> int:
        torch.compiler.reset()
        counters.clear()

        @torch.compile(backend="eager")
        def train(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, 16, generator=generator)
            train(x, torch.randint(0, 8, (32,), generator=generator))
            if step == 2:
                captured.append(counters["stats"]["unique_graphs"])
        return int(counters["stats"]["unique_graphs"])

    captured: list[int] = []
    unique, _ = same_as_stock(run, graphs=1)
    assert unique == captured[-1]

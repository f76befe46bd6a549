"""A small model, its data and its gradients, shared by the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def make_model(seed: int = 0) -> nn.Module:
    """Three linear layers: matrices large enough to pack at ``min_numel=64``, small biases."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)
    )


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 16, generator=generator)
    y = torch.randint(0, 8, (32,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    loss_of(model, step).backward()


def equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

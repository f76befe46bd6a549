"""Optimizers of somebody's own, which make their states as they go."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Stepwise(torch.optim.Optimizer):
    """Goes from parameter to parameter; a subclass says what it does with each."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change ``p`` by its gradient; ``state`` is empty at first. Each test's has its own."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group)

"""An optimizer with an operator that cannot be compiled, for looking at refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Undefined(Optimizer):
    """Adds what memory happens to hold."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.empty_like(p) * p.grad, alpha=-group["lr"])


def make() -> Optimizer:
    return Undefined([torch.nn.Parameter(torch.ones(64, 64))])

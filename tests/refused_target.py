"""An optimizer with an operator that cannot be compiled, for looking at refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Sorting(Optimizer):
    """Adds the sorted gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.sort(p.grad.flatten())[0].view_as(p), alpha=-group["lr"])


def make() -> Optimizer:
    return Sorting([torch.nn.Parameter(torch.ones(64, 64))])

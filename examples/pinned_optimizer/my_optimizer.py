"""The optimizer of a project that pins what its step compiles to."""

from __future__ import annotations

import torch


def make_optimizer() -> torch.optim.Optimizer:
    """AdamW as this project uses it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    return torch.optim.AdamW(model.named_parameters(), lr=0.001, weight_decay=0.1)

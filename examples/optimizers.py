"""The optimizers that the examples offer, with settings that train well, and their state widths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

Precision = int | dict[str, int]


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer class of `torch.optim`, its arguments, and the widths of its states."""

    name: str
    lr: float
    arguments: Mapping[str, Any]
    precision: Precision

    @property
    def cls(self) -> Callable[..., torch.optim.Optimizer]:
        return _optimizer_class(self.name)

    def build(self, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
        """Weight decay goes to matrices only, as is usual: hence two parameter groups."""
        arguments = dict(self.arguments)
        decay = arguments.pop("weight_decay", None)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors}]
        if decay is not None:
            groups[0]["weight_decay"], groups[1]["weight_decay"] = decay, 0.0
        arguments |= {"lr": self.lr, **more}
        return self.cls([group for group in groups if group["params"]], **arguments)


# Tuned for the GPT of train_gpt.py. The widths are those that lost nothing on smaller GPTs.
KNOWN_OPTIMIZERS: dict[str, OptimizerChoice] = {
    choice.name.lower(): choice
    for choice in (
        OptimizerChoice(
            "AdamW",
            lr=3e-3,
            arguments={"betas": (0.9, 0.99), "weight_decay": 0.1},
            precision={"exp_avg": 4, "exp_avg_sq": 3},
        ),
        OptimizerChoice(
            "Adam",
            lr=3e-3,
            arguments={"betas": (0.9, 0.99)},
            precision={"exp_avg": 4, "exp_avg_sq": 3},
        ),
        OptimizerChoice(
            "SGD",
            lr=0.1,
            arguments={"momentum": 0.9, "nesterov": True},
            precision={"momentum_buffer": 4},
        ),
        OptimizerChoice("RMSprop", lr=1e-3, arguments={"alpha": 0.99}, precision={"square_avg": 4}),
    )
}
OTHER_LR = 1e-3
# They need a closure, sparse gradients, matrices only.
UNUSABLE = {"optimizer", "lbfgs", "sparseadam", "muon"}
OTHER_PRECISION = 8


def choose_optimizer(name: str, lr: float | None, precision: Precision | None) -> OptimizerChoice:
    """The optimizer of `torch.optim` called `name` in any case; None picks the default for it.

    Raises ValueError where there is none of that name that can train any model.
    """
    known = KNOWN_OPTIMIZERS.get(name.lower())
    if known is None:
        known = OptimizerChoice(_optimizer_class(name).__name__, OTHER_LR, {}, OTHER_PRECISION)
    return replace(
        known,
        lr=known.lr if lr is None else lr,
        precision=known.precision if precision is None else precision,
    )


def parse_precision(values: Sequence[str]) -> Precision | None:
    """`["4"]` gives 4, `["exp_avg=4,exp_avg_sq=3"]` a dict, `[]` None; values may be split freely.

    Raises ValueError on anything else.
    """
    entries = [entry.strip() for value in values for entry in value.split(",")]
    if not entries:
        return None
    if len(entries) == 1 and entries[0].isdecimal():
        return int(entries[0])
    precision: dict[str, int] = {}
    for entry in entries:
        state, equals, width = entry.rpartition("=")
        if not (state and equals and width.isdecimal()):
            raise ValueError(f"{entry!r} is not STATE=WIDTH, as in exp_avg=4")
        precision[state] = int(width)
    return precision


def describe_precision(precision: Precision) -> str:
    if isinstance(precision, int):
        return f"{precision} bits"
    return " ".join(f"{state}={width}" for state, width in precision.items())


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    classes: dict[str, type[torch.optim.Optimizer]] = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    usable = sorted(set(classes) - UNUSABLE)
    if name.lower() not in usable:
        raise ValueError(f"no optimizer {name!r} to train with; there are {', '.join(usable)}")
    return classes[name.lower()]

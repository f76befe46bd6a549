"""The optimizers that the examples offer, with settings that train well, and their state widths."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from tinygpt import Block
from variants import Precision


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer class, its arguments, and the widths of its states if they are to be pinned.

    With `rest`, it gets the matrices of transformer blocks, and `rest` what is left: embeddings,
    head, and vectors. Both have the same learning rate.
    """

    name: str
    lr: float
    arguments: Mapping[str, Any]
    precision: Precision
    rest: OptimizerChoice | None = None

    @property
    def cls(self) -> Callable[..., torch.optim.Optimizer]:
        return _optimizer_class(self.name)

    @property
    def parts(self) -> list[OptimizerChoice]:
        """One for each optimizer that `build` gives."""
        return [self] if self.rest is None else [self, *self.rest.parts]

    @property
    def title(self) -> str:
        return " and ".join(part.name for part in self.parts)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides how it trains, as JSON can hold it."""
        own = {"name": self.name.lower(), "lr": self.lr, "arguments": dict(self.arguments)}
        return own if self.rest is None else {**own, "rest": self.rest.identity}

    @property
    def pinned(self) -> Precision:
        """The widths of the states of all parts."""
        if self.rest is None:
            return self.precision
        return {state: width for part in self.parts for state, width in part.widths.items()}

    @property
    def widths(self) -> dict[str, int]:
        return self.precision if isinstance(self.precision, dict) else {"*": self.precision}

    def options_of_parts(self, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Options of `stq.compile` for each part: without the widths of states of other parts.

        A width that is for nobody's states stays with all of them, for `stq.compile` to refuse.
        """
        precision = options.get("precision")
        if self.rest is None or not isinstance(precision, dict):
            return [options for _ in self.parts]

        def has(part: OptimizerChoice, pattern: str) -> bool:
            return any(fnmatchcase(state, pattern.rpartition(":")[2]) for state in part.widths)

        owned = {p for p in precision if any(has(part, p) for part in self.parts)}
        return [
            {
                **options,
                "precision": {
                    pattern: width
                    for pattern, width in precision.items()
                    if has(part, pattern) or pattern not in owned
                },
            }
            for part in self.parts
        ]

    def at(self, lr: float) -> OptimizerChoice:
        """The same with another learning rate."""
        return replace(self, lr=lr, rest=None if self.rest is None else self.rest.at(lr))

    def build(self, model: nn.Module, **more: Any) -> list[torch.optim.Optimizer]:
        """The optimizers of the model's parameters; they get `more` as arguments as well."""
        named = dict(model.named_parameters())
        if self.rest is None:
            return [self._build(named, **more)]
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        hidden = {id(p) for block in blocks for p in block.parameters() if p.dim() == 2}
        mine = {name: p for name, p in named.items() if id(p) in hidden}
        others = {name: p for name, p in named.items() if id(p) not in hidden}
        return [self._build(mine, **more), self.rest._build(others, **more)]

    def _build(self, parameters: Mapping[str, nn.Parameter], **more: Any) -> torch.optim.Optimizer:
        """Weight decay goes to matrices only, as is usual: hence two parameter groups.

        The optimizer gets the parameters' names too, for patterns of names to match.
        """
        arguments = dict(self.arguments)
        decay = arguments.pop("weight_decay", None)
        matrices = [(name, p) for name, p in parameters.items() if p.dim() >= 2]
        vectors = [(name, p) for name, p in parameters.items() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors}]
        if decay is not None:
            groups[0]["weight_decay"], groups[1]["weight_decay"] = decay, 0.0
        arguments |= {"lr": self.lr, **more}
        return self.cls([group for group in groups if group["params"]], **arguments)


# Tuned for GPTs: Adam and AdamW on train_gpt.py's own; on the smaller one of evidence.py a sweep of
# 700 steps with one seed gave these losses in nats per byte (weight decay in brackets):
#   AdamW    1e-3 2.129, 2e-3 2.029, 3e-3 2.040
#   Lion     1e-4 (1.0) 2.546, 3e-4 (0.3) 2.300, 3e-4 (0.1) 2.301, 6e-4 (0.1) 2.263,
#            1e-3 (0.1) 2.351
#   SGD      0.1 2.149, 0.3 2.158, 0.5 2.369, 1.0 2.643
#   RMSprop  3e-4 2.438, 1e-3 2.112, 2e-3 2.199
# On the GPT of `evidence.py --quick`, 800 steps with one seed:
#   Muon     4e-3 2.092, 8e-3 1.997, 1.6e-2 2.040 (and AdamW, at the same rates)
#   SOAP     3e-3 2.089, 6e-3 1.945, 1.2e-2 1.896
#   AdamW    2e-3 2.420, 4e-3 2.332, 8e-3 2.394
# The widths are those that lost nothing on smaller GPTs.
ADAMW = OptimizerChoice(
    "AdamW",
    lr=3e-3,
    arguments={"betas": (0.9, 0.99), "weight_decay": 0.1},
    precision={"exp_avg": 4, "exp_avg_sq": 3},
)
KNOWN_OPTIMIZERS: dict[str, OptimizerChoice] = {
    choice.name.lower(): choice
    for choice in (
        ADAMW,
        OptimizerChoice(
            "Adam",
            lr=3e-3,
            arguments={"betas": (0.9, 0.99)},
            precision={"exp_avg": 4, "exp_avg_sq": 3},
        ),
        OptimizerChoice(
            "SGD",
            lr=0.2,
            arguments={"momentum": 0.9, "nesterov": True},
            precision={"momentum_buffer": 4},
        ),
        OptimizerChoice(
            "Lion",
            lr=6e-4,
            arguments={"betas": (0.9, 0.99), "weight_decay": 0.1},
            precision={"exp_avg": 5},
        ),
        OptimizerChoice("RMSprop", lr=1e-3, arguments={"alpha": 0.99}, precision={"square_avg": 4}),
        OptimizerChoice(
            "Muon",
            lr=8e-3,
            arguments={
                "momentum": 0.95,
                "weight_decay": 0.1,
                "adjust_lr_fn": "match_rms_adamw",  # so that AdamW's learning rate serves as well
            },
            precision={"momentum_buffer": 8},
            rest=ADAMW,
        ),
        OptimizerChoice(
            "SOAP",
            lr=1.2e-2,
            arguments={"betas": (0.95, 0.95), "weight_decay": 0.1, "max_precondition_dim": 256},
            precision={"exp_avg": 8, "exp_avg_sq": 4, "GG.*": 4, "Q.*": 4},
        ),
    )
}
OTHER_LR = 1e-3
# They need a closure, or sparse gradients.
UNUSABLE = {"optimizer", "lbfgs", "sparseadam"}
OTHER_PRECISION = 8
# Optimizers of other packages: module and class.
PACKAGES = {"lion": ("lion_pytorch", "Lion"), "soap": ("pytorch_optimizer", "SOAP")}


def choose_optimizer(name: str, lr: float | None = None) -> OptimizerChoice:
    """The optimizer called `name` in any case; None picks its usual learning rate.

    Raises ValueError where there is none of that name that can train any model, or where the
    package that has it is not installed.
    """
    cls = _optimizer_class(name)
    known = KNOWN_OPTIMIZERS.get(name.lower())
    if known is None:
        known = OptimizerChoice(cls.__name__, OTHER_LR, {}, OTHER_PRECISION)
    return known if lr is None else known.at(lr)


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    classes: dict[str, type[torch.optim.Optimizer]] = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    usable = sorted((set(classes) | set(PACKAGES)) - UNUSABLE)
    if name.lower() not in usable:
        raise ValueError(f"no optimizer {name!r} to train with; there are {', '.join(usable)}")
    return classes.get(name.lower()) or _from_package(name)


def _from_package(name: str) -> type[torch.optim.Optimizer]:
    """An optimizer that torch does not bring; its package is imported only when asked for."""
    module, attribute = PACKAGES[name.lower()]
    try:
        cls: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(
            f"{attribute} comes with the package {module.replace('_', '-')}, which is not "
            "installed; install the extra that has it: pip install -e '.[evidence]'"
        ) from None
    return cls

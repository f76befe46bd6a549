"""Whoever takes part in a benchmark: stock optimizers, other packages, and packed ones."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from stq_compile import api

Step = Callable[[], Any]
Make = Callable[[list[Parameter]], tuple[Step, Callable[[], int]]]
"""From parameters with gradients: a step, and what tells the bytes of its states."""


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Contender:
    """One row of a benchmark.

    ``moved`` is how many bytes of memory a parameter's step has to read and write, with float32
    parameters and gradients; None where the implementation moves more than its states would need.
    """

    name: str
    make: Make
    ours: bool = False
    moved: float | None = None
    package: str = ""

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return not self.package or _is_installed(self.package)


@dataclass(frozen=True)
class Family:
    """An optimizer that can be measured: its class, arguments, and states of a parameter's shape.

    ``module`` is the package that has to be installed for it.
    """

    name: str
    arguments: dict[str, Any]
    states: tuple[str, ...]
    module: str = "torch.optim"

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return _is_installed(self.module)

    @property
    def cls(self) -> type[Optimizer]:
        """The class; raises ImportError where its package is not installed."""
        found: type[Optimizer] = getattr(importlib.import_module(self.module), self.name)
        return found

    def forms(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and arguments of the stock forms that are not slow on purpose, fastest first."""
        parameters = inspect.signature(self.cls).parameters
        found = [form for form in ("fused", "foreach") if form in parameters]
        for form in found:
            yield f"torch {form}", {**self.arguments, form: True}
        if not found:
            yield "stock", self.arguments


FAMILIES = {
    "adamw": Family("AdamW", {"lr": 1e-4}, ("exp_avg", "exp_avg_sq")),
    "sgd": Family("SGD", {"lr": 1e-4, "momentum": 0.9}, ("momentum_buffer",)),
    "rmsprop": Family("RMSprop", {"lr": 1e-4}, ("square_avg",)),
    "adagrad": Family("Adagrad", {"lr": 1e-4}, ("sum",)),
    "lion": Family("Lion", {"lr": 1e-4}, ("exp_avg",), "lion_pytorch"),
    "adafactor": Family("Adafactor", {"lr": 1e-4}, ()),
}
"""The optimizers that can be measured. Adafactor's states are rows and columns."""

WIDTHS: tuple[tuple[int, ...], ...] = ((4, 4), (4, 3), (8, 8), (3, 2))
"""Pinned widths of first and second moments; of one state, the first of each."""


def contenders(family: str, *, peers: bool = False) -> Iterator[Contender]:
    """All that are installed, the reference first: the stock optimizer's fastest form in fp32.

    Args:
        family: one of `FAMILIES`.
        peers: whether to add what is slow: for-loop, Inductor, torchao and bitsandbytes.

    Raises:
        ImportError: the package that has the optimizer is not installed.
    """
    chosen = FAMILIES[family]
    cls, arguments, states = chosen.cls, chosen.arguments, chosen.states
    for name, form in chosen.forms():
        yield Contender(name, partial(_stock, cls, form), moved=12.0 + 8.0 * len(states))
    for widths in dict.fromkeys(w[: max(1, len(states))] for w in WIDTHS):
        name = "stq " + " + ".join(map(str, widths))
        precision = dict(zip(states, widths, strict=True)) if states else widths[0]
        make = partial(_packed, cls, arguments, {"precision": precision})
        yield Contender(name, make, ours=True)
    yield Contender("stq auto", partial(_packed, cls, arguments, {}), ours=True)
    if peers:
        everyone = list(_peers(family, cls, arguments))
        yield from (c for c in everyone if c.available)


def _peers(family: str, cls: type[Optimizer], arguments: dict[str, Any]) -> Iterator[Contender]:
    if "foreach" in inspect.signature(cls).parameters:
        yield Contender("torch for-loop", partial(_stock, cls, {**arguments, "foreach": False}))
    yield Contender("torch Inductor", partial(_inductor, cls, arguments))
    if family == "adamw":
        lr = arguments["lr"]
        yield Contender("bitsandbytes 8", partial(_bitsandbytes, lr), package="bitsandbytes")
        yield Contender("torchao 8", partial(_torchao, "AdamW8bit", lr), package="torchao")
        yield Contender("torchao 4", partial(_torchao, "AdamW4bit", lr), package="torchao")


def _stock(
    cls: type[Optimizer], arguments: dict[str, Any], params: list[Parameter]
) -> tuple[Step, Callable[[], int]]:
    optimizer = cls(params, **arguments)
    return optimizer.step, partial(state_bytes, optimizer)


def _inductor(
    cls: type[Optimizer], arguments: dict[str, Any], params: list[Parameter]
) -> tuple[Step, Callable[[], int]]:
    optimizer = cls(params, **arguments)
    return torch.compile(optimizer.step), partial(state_bytes, optimizer)


def _packed(
    cls: type[Optimizer],
    arguments: dict[str, Any],
    options: dict[str, Any],
    params: list[Parameter],
) -> tuple[Step, Callable[[], int]]:
    optimizer = api.compile(cls(params, **arguments), **options)
    return optimizer.step, lambda: api.report(optimizer).state_bytes


def _bitsandbytes(lr: float, params: list[Parameter]) -> tuple[Step, Callable[[], int]]:
    optim: Any = importlib.import_module("bitsandbytes.optim")
    optimizer = optim.AdamW8bit(params, lr=lr)
    return optimizer.step, partial(state_bytes, optimizer)


def _torchao(name: str, lr: float, params: list[Parameter]) -> tuple[Step, Callable[[], int]]:
    optim: Any = importlib.import_module("torchao.optim")
    optimizer = getattr(optim, name)(params, lr=lr)
    return optimizer.step, partial(state_bytes, optimizer)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state, those inside of tensor subclasses included."""
    return sum(
        _nbytes(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _nbytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    names, _ = flatten()
    return sum(_nbytes(getattr(tensor, name)) for name in names)

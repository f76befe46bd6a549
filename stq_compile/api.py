"""`compile`, `report`, `state_dict`: what a user calls."""

from __future__ import annotations

import types
from typing import Any, TypeVar

import torch
from torch.optim import LBFGS, Optimizer, SparseAdam

from stq_compile.backend import open_session, session_of
from stq_compile.checkpoint import StateFormat
from stq_compile.driver import Driver
from stq_compile.errors import (
    AlreadyCompiledError,
    InvalidOptionError,
    NotAnOptimizerError,
    NotCompiledError,
    UnsupportedOptimizerError,
)
from stq_compile.nonfinite import find_reached
from stq_compile.options import Options
from stq_compile.planner.history import History
from stq_compile.session import Session
from stq_compile.state_report import Report, make_report

REFUSED_OPTIONS = {
    "differentiable": "asks for a step that autograd sees",
    "fused": "hides its arithmetic in one operator; leave it out, the compiled step is fused too",
}

Opt = TypeVar("Opt", bound=Optimizer)

REFUSED: dict[type[Optimizer], str] = {
    LBFGS: "its step runs a line search that calls the model, which is no fixed graph",
    SparseAdam: "sparse gradients touch other elements every step; use Adam",
}


def compile(optimizer: Opt, **options: Any) -> Opt:
    """Compile ``optimizer.step`` with packed states; returns the same optimizer.

    A closure is called before the step, once, and its loss is returned.

    States are packed from birth: no float32 copy of a packed state is ever allocated. Everything
    else (``param_groups``, schedulers, hooks, ``state_dict``, ``zero_grad``) works as before.

    Args:
        optimizer: any optimizer that follows `torch.optim.Optimizer`, with float32 parameters.
        **options: see `stq_compile.options.Options`.

    Raises:
        StqError: here for a wrong option or an optimizer that is refused; at the first ``step()``
            if that step cannot be compiled, in which case the optimizer is its old self again.
    """
    if not isinstance(optimizer, Optimizer):
        raise NotAnOptimizerError(found=type(optimizer).__name__)
    checked = Options.from_dict(options)
    name = type(optimizer).__name__
    if session_of(optimizer) is not None:
        raise AlreadyCompiledError(optimizer=name)
    reason = refusal(optimizer)
    if reason:
        raise UnsupportedOptimizerError(optimizer=name, reason=reason)
    scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    driver = Driver(open_session(optimizer, checked))
    step = types.MethodType(driver.step_function(scheduled), optimizer)
    optimizer.step = step  # type: ignore[method-assign]  # bound to it, like the class's
    return optimizer


def refusal(optimizer: Optimizer) -> str:
    """Why an optimizer cannot be compiled at all; empty if it may be."""
    for refused, reason in REFUSED.items():
        if isinstance(optimizer, refused):
            return reason
    for group in optimizer.param_groups:
        for option, reason in REFUSED_OPTIONS.items():
            if group.get(option):
                return f"{option}=True {reason}"
    own = optimizer.__dict__.get("step")
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return "its step was replaced on the instance; compile first and wrap the step afterwards"
    return ""


def report(optimizer: Optimizer) -> Report:
    """What every state occupies now; prints as a table.

    Raises:
        NotCompiledError: neither `compile` nor ``backend="stq"`` has seen the optimizer.
    """
    return make_report(_session(optimizer))


def _session(optimizer: Optimizer) -> Session:
    session = session_of(optimizer)
    if session is None:
        raise NotCompiledError(optimizer=type(optimizer).__name__)
    return session


def history(optimizer: Optimizer) -> History:
    """Every decision of the planner with its reason, none where all widths are pinned; and what
    was not finite.

    Raises:
        NotCompiledError: the optimizer is not compiled.
    """
    session = _session(optimizer)
    find_reached(session)
    records = () if session.planner is None else session.planner.history.records
    return History(records, session.watch.incidents)


def log(optimizer: Optimizer, loss: float | torch.Tensor) -> None:
    """Note the loss of the last step, for the report of the run (`Report.save`, ``record``).

    A closure's loss is noted by itself.

    Raises:
        NotCompiledError: the optimizer is not compiled.
    """
    _session(optimizer).log(loss)


def state_dict(optimizer: Optimizer, format: StateFormat = "packed") -> dict[str, Any]:
    """The optimizer's state dict, packed (as ``optimizer.state_dict()``) or in float32.

    The float32 form is what the stock optimizer would save, up to quantization; it loads into the
    stock optimizer and into a compiled one.

    Raises:
        NotCompiledError: the optimizer is not compiled.
        InvalidOptionError: ``format`` is neither ``"packed"`` nor ``"fp32"``.
    """
    session = _session(optimizer)
    if format not in ("packed", "fp32"):
        raise InvalidOptionError(name="format", value=format, reason="use 'packed' or 'fp32'")
    session.checkpoint_format = format
    try:
        return optimizer.state_dict()
    finally:
        session.checkpoint_format = "packed"

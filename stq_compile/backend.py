"""``torch.compile(optimizer.step, backend="stq", options={...})``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.optim import Optimizer

from stq_compile.checkpoint import attach
from stq_compile.compiled_step import CompiledStep
from stq_compile.dynamo import traced_changes, traced_frame, traced_optimizer
from stq_compile.errors import OptimizerNotFoundError, UnskippableStepError
from stq_compile.nonfinite import admits_step
from stq_compile.options import Options
from stq_compile.session import Session

_SESSIONS: weakref.WeakKeyDictionary[Optimizer, Session] = weakref.WeakKeyDictionary()


def session_of(optimizer: Optimizer) -> Session | None:
    """The session of an optimizer, if stq_compile has compiled it in either way."""
    return _SESSIONS.get(optimizer)


def open_session(optimizer: Optimizer, options: Options) -> Session:
    """Make and register the session of an optimizer."""
    session = Session(optimizer, options)
    session.recording.open()
    _register(session)
    return session


def _register(session: Session) -> None:
    _SESSIONS[session.optimizer] = session
    attach(session)


def close_session(optimizer: Optimizer) -> None:
    """Forget an optimizer's session and take its hooks off."""
    session = _SESSIONS.pop(optimizer, None)
    for handle in session.hooks if session else ():
        handle.remove()


def stq(
    gm: fx.GraphModule, example_inputs: list[Tensor], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The ``torch.compile`` backend, registered as ``"stq"`` by entry point.

    Args:
        gm: Dynamo's graph of an optimizer's ``step``.
        example_inputs: its inputs (unused; the graph carries them).
        options: the options of `stq_compile.compile`.

    Raises:
        OptimizerNotFoundError: the compiled function is not an optimizer's step.
        StqError: an option is wrong, or the step can't be compiled; nothing is changed.
    """
    optimizer = traced_optimizer()
    if optimizer is None:
        raise OptimizerNotFoundError(frame=traced_frame())
    numbers = traced_changes()
    session = _SESSIONS.get(optimizer)
    if session is None:
        session = Session(optimizer, Options.from_dict(options or {}))
        session.recording.open()
    compiled = session.compile(gm)
    if optimizer not in _SESSIONS:
        _register(session)
    if session.options.on_nonfinite == "propagate":
        return compiled
    return partial(_checked, session, compiled, compiled.writes_only_tensors and not numbers)


def _checked(session: Session, step: CompiledStep, skippable: bool, *args: Any) -> tuple[Any, ...]:
    """Run a captured step with the gradients that its parameters have, if the options allow it.

    What is no tensor is changed by Dynamo after the call, which only an error prevents.
    """
    if admits_step(session, None if skippable else UnskippableStepError):
        return step(*args)
    return ()

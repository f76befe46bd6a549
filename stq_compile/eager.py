"""What happens to a step that cannot be compiled: it runs as it is, on packed states.

The optimizer's own ``step`` runs under a `WorkingSet`, its states are born packed (`birth`), and
what it stored as ordinary tensors is packed after the step. Correct for any optimizer, packed
between steps, and slow: states are decoded and encoded in plain torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from stq_compile.errors import (
    EagerStepMemoryError,
    EagerStepWarning,
    MixedErrorsWarning,
    NonFiniteGradientError,
    ParamRoundingWarning,
    first_line,
    is_out_of_memory,
)
from stq_compile.formats import FLOAT32, MIXED_WIDTH
from stq_compile.halves import HALF_DTYPES
from stq_compile.nonfinite import admits_step
from stq_compile.packed_state import PackedState
from stq_compile.session import Session
from stq_compile.shards import local
from stq_compile.state_tree import Leaf
from stq_compile.step_graph import Source
from stq_compile.storage import Codec
from stq_compile.working_set import WorkingSet, can_be_packed, format_for, is_like


def announce(session: Session, reason: str) -> None:
    """Say once why steps of an optimizer are not compiled; the report says it too."""
    if session.eager_reason:
        return
    session.eager_reason = reason
    optimizer = type(session.optimizer).__name__
    warning = EagerStepWarning(optimizer=optimizer, reason=session.eager_reason)
    warnings.warn(warning, stacklevel=2)
    rounding = session.options.param_rounding
    if rounding != "nearest" and any(p.dtype in HALF_DTYPES for p in session.params()):
        warnings.warn(ParamRoundingWarning(optimizer=optimizer, rounding=rounding), stacklevel=2)


def run_eagerly(session: Session, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``step(*args, **kwargs)`` on packed states and pack what it leaves unpacked.

    Functions among the arguments (closures) run as outside of the step.
    """
    try:
        return _run(session, step, args, kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        optimizer = type(session.optimizer).__name__
        raise EagerStepMemoryError(optimizer=optimizer, reason=first_line(error)) from error


def _run(
    session: Session, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    _warn_of_products(session)
    wide = session.options.precision == FLOAT32.width
    _give_back_gradients(session)
    calls = any(map(callable, (*args, *kwargs.values())))
    if not calls and not admits_step(session):
        return None
    before = Before(session) if calls and session.options.on_nonfinite != "propagate" else None
    outside = partial(_outside, session)
    held = (leaf.value for leaf, _ in session.leaves())
    codec = session.codec.amortized(v.packed for v in held if isinstance(v, PackedState))
    try:
        with nullcontext() if wide else _packed(session, codec):
            result = step(*map(outside, args), **{k: outside(v) for k, v in kwargs.items()})
    except BaseException as error:
        if before is not None and isinstance(error, (_Skipped, NonFiniteGradientError)):
            before.restore()
        if isinstance(error, _Skipped):
            return error.loss
        raise
    try:
        pack_states(session)
    finally:
        session.steps += 1  # the step is made; what is left in float32 is packed after the next one
    return result


@contextmanager
def _packed(session: Session, codec: Codec) -> Iterator[None]:
    """Packed states are decoded for the operators of the block.

    What the step has compiled itself (functions under ``torch.compile``) runs eagerly, since
    Dynamo would trace into packed states.
    """
    min_numel = max(session.options.min_numel, 1)
    working = WorkingSet(lambda: _owners(session), min_numel, codec)
    with working, torch.compiler.set_stance("force_eager"):
        yield
    session.multiplies = session.multiplies or working.multiplied


def _warn_of_products(session: Session) -> None:
    """Say once of which states it is not known whether a product mixes their errors (design/0022).

    Before a step and not after it: a warning may be an error.
    """
    if session.warned_of_products or not session.multiplies:
        return
    session.warned_of_products = True
    keys = []
    for leaf, _ in session.leaves():
        value = leaf.value
        if isinstance(value, PackedState) and value.ndim > 1 and value.format.kind == "softsign":
            keys += [leaf.key] if value.format.width < MIXED_WIDTH else []
    if keys:
        names = list(dict.fromkeys(keys))
        optimizer = type(session.optimizer).__name__
        warning = MixedErrorsWarning(
            optimizer=optimizer, states=", ".join(names), key=names[0], width=MIXED_WIDTH
        )
        warnings.warn(warning, stacklevel=3)


class _Skipped(Exception):
    """Ends a step whose closure gave gradients that are not finite."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss


def _outside(session: Session, argument: Any) -> Any:
    """A closure that runs the model as it would without this step around it.

    Its gradients are looked at as those of other steps are before they begin.
    """
    if not callable(argument):
        return argument

    def closure(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), torch.compiler.set_stance("default"):
            loss = argument(*args, **kwargs)
            if not admits_step(session):
                raise _Skipped(loss)
            return loss

    return closure


class Before:
    """An optimizer as it was, for a step that may have to be taken back while it goes on.

    A step that calls its closure as it goes has moved the parameters by then. Packed states are
    kept by reference, since what is written gets new buffers; parameters and ordinary states are
    copied.
    """

    def __init__(self, session: Session) -> None:
        self.optimizer = session.optimizer
        held = [local(leaf.value) for leaf, _ in session.leaves()]
        self.packed = [(s.packed, s.packed.kept()) for s in held if isinstance(s, PackedState)]
        plain = [*map(local, session.params()), *held]
        self.tensors = [(t, t.detach().clone()) for t in plain if not isinstance(t, PackedState)]
        self.states = {key: copy(value) for key, value in self.optimizer.state.items()}
        self.groups = [dict(group) for group in self.optimizer.param_groups]

    def restore(self) -> None:
        """Parameters, states, and the numbers in states and groups; gradients stay."""
        for storage, kept in self.packed:
            storage.restore(kept)
        with torch.no_grad():
            for tensor, values in self.tensors:
                tensor.copy_(values)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.states)
        for group, former in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.clear()
            group.update(former)


def pack_states(session: Session) -> None:
    """Bring every state into packed form: newborn ones, and ordinary tensors that were stored."""
    memory = {p.untyped_storage().data_ptr() for p in session.params()}
    packed: dict[int, PackedState] = {}
    for leaf, source, width in _widths(session):
        value = leaf.value
        if id(value) in packed:
            leaf.put(packed[id(value)])
        elif isinstance(value, PackedState):
            _settle(session, leaf, source, value, width)
        elif width < FLOAT32.width and can_be_packed(value) and not _shares(value, memory):
            if is_like(value, leaf.owner):
                width = session.keep_as_weights(source, width)
            if _is_gradient(value, leaf.owner):
                session.gradients[source.param, leaf.key] = _memory_of(value)
            format = format_for(value, width)
            state = PackedState.pack(value, format, **session.rounding_options(source))
            state.packed.eager_writes = session.steps  # other random numbers than last time
            packed[id(value)] = state
            leaf.put(state)


def keeps_gradients(session: Session) -> str:
    """Why steps run eagerly that keep a gradient itself as a state; empty if none does.

    Such a state is another tensor after every step, and each would need another graph. One that is
    so after the first step only is none.
    """
    for leaf, source in session.leaves():
        if _is_gradient(local(leaf.value), leaf.owner):
            kept = f"{source.name}, state {leaf.key!r}"
            return (
                f"{type(session.optimizer).__name__} cannot be compiled: its step keeps the "
                f"gradient itself as a state ({kept}); with a clone of it, it would be."
            )
    return ""


def _is_gradient(value: Tensor, param: Any) -> bool:
    grad = param.grad if isinstance(param, Tensor) else None
    if grad is None or isinstance(value, PackedState) or value.numel() == 0:
        return False
    here = value.shape == grad.shape and value.stride() == grad.stride()
    return here and value.data_ptr() == grad.data_ptr()


def _give_back_gradients(session: Session) -> None:
    """States that are packed gradients become the gradients again where these are still there.

    What keeps ``p.grad`` has the next gradient if that is written into the same memory (by
    ``zero_grad(set_to_none=False)``, or by accumulation).
    """
    kept, session.gradients = session.gradients, {}
    for leaf, source in session.leaves() if kept else ():
        memory = kept.get((source.param, leaf.key))
        grad = None if memory is None else leaf.owner.grad
        if grad is not None and memory == _memory_of(grad):
            leaf.put(grad.detach())


def _memory_of(tensor: Tensor) -> StorageWeakRef:
    """Equal for the same memory, which it does not keep; its address is not given to another."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's


def _settle(session: Session, leaf: Leaf, source: Source, state: PackedState, width: int) -> None:
    """Give a state that was born in this step its format, and its own random numbers."""
    storage = state.packed
    if width == FLOAT32.width:
        leaf.put(state.dequantize().to(state.dtype))
        return
    if storage.format == FLOAT32:  # written before the optimizer had stored it
        if is_like(state, leaf.owner):
            width = session.keep_as_weights(source, width)
        storage.rewrite(storage.read(), format_for(storage.codes, width))
    for name, option in session.rounding_options(source).items():
        setattr(storage, name, option)


def _shares(value: Tensor, memory: set[int]) -> bool:
    return value.untyped_storage().data_ptr() in memory


def _widths(session: Session) -> Iterator[tuple[Leaf, Source, int]]:
    """Every state with its source and its width."""
    for leaf, source in session.leaves():
        numel = leaf.value.numel() if leaf.value.ndim else 0
        yield leaf, source, session.width_of_state(source, numel)


def _owners(session: Session) -> dict[int, tuple[int, int]]:
    return {
        id(leaf.value.packed): (source.param, width)
        for leaf, source, width in _widths(session)
        if isinstance(leaf.value, PackedState)
    }

"""Runs the compiled step in the place of ``optimizer.step``: captures, hooks, and what fails.

Driver.step     closures; what cannot be compiled at all
 -> run         one step, and the decision that it makes due
 -> _one_step   states are born, checkpoints taken in; errors translated, or the step run eagerly
 -> _captured   the capture that serves: of the whole optimizer, or of exemplars
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import exc as dynamo_exc
from torch.optim import Optimizer

from stq_compile import interrupts
from stq_compile.attributes import set_at
from stq_compile.backend import close_session
from stq_compile.birth import forget, init_states
from stq_compile.closures import calls_closure_first
from stq_compile.copies import look_at_copies
from stq_compile.eager import announce, keeps_gradients, pack_states, run_eagerly
from stq_compile.errors import (
    ChangedTensorError,
    GraphBreakError,
    InternalError,
    LostAttributeError,
    ShardedEagerStepError,
    StepCaptureError,
    StepMemoryError,
    StqError,
    TooManyGraphsError,
    UncompiledStepError,
    first_line,
    is_out_of_memory,
)
from stq_compile.exemplars import Exemplars, NotExemplaryError, may_have_exemplars
from stq_compile.nonfinite import admits_step
from stq_compile.passes.runner import TRACING
from stq_compile.runtime import recording
from stq_compile.session import GRAPH_WINDOW, MOST_GRAPHS, Session
from stq_compile.state_tree import Leaf
from stq_compile.steps import captured_step, followed_step, own_code, raw_step
from stq_compile.symbolic_math import symbolic_math

Backend = Callable[[Any, Exemplars | None], Any]
"""Compiles a graph module that was captured of exemplars, or of the whole optimizer."""

LOG = logging.getLogger(__name__)

OTHERS_TRACE = "symbolically trace a dynamo-optimized function"
"""What Dynamo says where any thread of the process is tracing (`passes.runner.TRACING`)."""
MOST_WAITS = 1000


class Driver:
    """Runs compiled steps of one optimizer: births before, errors translated after."""

    def __init__(self, session: Session) -> None:
        self.session = session
        session.driven = True
        self.lock = threading.RLock()  # one optimizer's tables serve one step at a time
        self.closure_first = calls_closure_first(raw_step(type(session.optimizer)))
        self.for_good = False  # whether no step is compiled any more
        self.exemplary = may_have_exemplars(type(session.optimizer))
        self.whole = _Capture(self._backend, type(session.optimizer))
        self.captures: list[_Capture] = []  # of exemplars, the oldest first
        self.counters: frozenset[str] = frozenset()  # keys of whole numbers that the step changes

    def _backend(self, gm: Any, exemplars: Exemplars | None) -> Any:
        if self.session.out_of_graphs:
            raise self._too_many_graphs()
        return self.session.compile(gm, exemplars)

    def _forget(self) -> None:
        """Let Dynamo go of all that it captured, and so of the states."""
        for capture in (self.whole, *self.captures):
            capture.forget()
        self.captures.clear()

    def _capture(self, optimizer: Optimizer) -> _Capture:
        """What is captured of the step for parameters, gradients and states as they are now."""
        if not self.exemplary:
            self.session.move_counters()
            return self.whole
        found = next((c for c in self.captures if c.serves(optimizer)), None)
        if found is not None:
            return found
        self.session.move_counters()
        if self.session.out_of_graphs:
            raise self._too_many_graphs()
        if len(self.captures) == MOST_GRAPHS:
            self.captures.pop(0).forget()
        self.captures.append(_Capture(self._backend, type(optimizer), Exemplars(optimizer)))
        return self.captures[-1]

    def _too_many_graphs(self) -> TooManyGraphsError:
        name = type(self.session.optimizer).__name__
        return TooManyGraphsError(optimizer=name, graphs=MOST_GRAPHS, steps=GRAPH_WINDOW)

    def step_function(self, scheduled: bool) -> Callable[..., Any]:
        """A function to bind as ``optimizer.step``; hooks run around it as around the original.

        Dynamo does not look into it: a compiled training step that calls it calls it eagerly.
        ``scheduled`` keeps a learning rate scheduler's mark, by which it sees that steps are made.
        """
        driver = self

        @functools.wraps(type(self.session.optimizer).step)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if scheduled:
                self._opt_called = True  # type: ignore[attr-defined]  # the schedulers' own mark
            return driver.step(self, args, kwargs)

        bound: Any = followed_step(step, self.session.optimizer)
        bound = torch.compiler.disable(bound)  # type: ignore[no-untyped-call]  # torch's
        if scheduled:
            bound._wrapped_by_lr_sched = True
        return cast("Callable[..., Any]", bound)

    def step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step with the arguments that the user gave.

        A closure that the step merely calls first is called here, before the compiled step. What
        else a step does with its arguments, it does eagerly.
        """
        look_at_copies(self.session)
        arguments = [a for a in (*args, *kwargs.values()) if a is not None]
        if not arguments:
            return self.run(optimizer)
        if self.for_good or len(arguments) > 1 or not self.closure_first:
            reason = "its step makes use of the closure or of other arguments as it goes"
            if self.session.sharded:
                raise ShardedEagerStepError(optimizer=type(optimizer).__name__, reason=reason)
            announce(self.session, f"{type(optimizer).__name__} cannot be compiled: {reason}.")
            return self._eagerly(optimizer, *args, **kwargs)
        with torch.enable_grad():
            loss = arguments[0]()
        self.run(optimizer)
        if isinstance(loss, float) or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            self.session.log(loss)
        return loss

    def _eagerly(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        cls = type(optimizer)
        hooked: Any = cls.step  # functools.wraps gives it what its type doesn't say
        step = hooked.__wrapped__ if hasattr(hooked, "hooked") else hooked
        return run_eagerly(self.session, step, optimizer, *args, **kwargs)

    def run(self, optimizer: Optimizer) -> Any:
        """One step and the decision that it makes due. Signals that come while tensors change wait
        until what the step returned is stored as well (`interrupts`)."""
        with self.lock:
            self.session.decide()  # one that was interrupted
            with interrupts.scope():
                result = self._one_step(optimizer)
            self.session.decide()
        return result

    def _one_step(self, optimizer: Optimizer) -> Any:
        session = self.session
        if self.for_good and not recording():
            return self._eagerly(optimizer)
        if recording():
            self._check_capture(optimizer)
        if not admits_step(session):
            return None
        before, session.changing = session.steps, False
        numbers = {} if session.compiles else whole_numbers(optimizer)
        born: list[torch.Tensor] = []
        loaded: list[tuple[Leaf, torch.Tensor]] = []
        try:
            if session.loaded:
                loaded = self._take_loaded()
            born = init_states(optimizer, session.options.min_numel)
            session.unpack_wide(born)
            compiles = session.compiles
            with torch.set_grad_enabled(False):  # half the calls of `no_grad`
                result = self._captured(optimizer)
        except BaseException as error:
            untouched = session.steps == before and not session.changing
            if untouched:
                forget(optimizer, born)
            if not isinstance(error, Exception):
                raise
            return self._failed(optimizer, error, untouched, loaded)
        if compiles == 0:
            now = whole_numbers(optimizer).items()
            self.counters = frozenset(place[1] for place, n in now if numbers.get(place) != n)
        again = 0 < compiles < session.compiles
        reason = keeps_gradients(session) if again else ""
        if reason and not session.sharded:
            announce(session, reason)
            pack_states(session)
            self.for_good = True
        return result

    def _check_capture(self, optimizer: Optimizer) -> None:
        """Raises `StepCaptureError` where a CUDA graph cannot hold the step."""
        session = self.session
        served = not self.exemplary or any(c.serves(optimizer) for c in self.captures)
        if self.for_good or any(s.regions or s.cut_regions for s in session.compiled):
            reason = "it runs operator by operator, with random numbers that the host chooses"
            remedy = "Call step() outside of the graph."
        elif session.options.on_nonfinite != "propagate":
            reason = f"on_nonfinite={session.options.on_nonfinite!r} looks at every gradient first"
            remedy = "Call step() outside of the graph, or compile with on_nonfinite='propagate'."
        elif session.loaded or not session.compiles or not served:
            reason = "it is not compiled yet for its parameters, gradients and states"
            remedy = "Call step() once before the capture."
        else:
            return
        raise StepCaptureError(what=type(optimizer).__name__, reason=reason, remedy=remedy)

    def _failed(
        self,
        optimizer: Optimizer,
        error: Exception,
        untouched: bool,
        loaded: list[tuple[Leaf, torch.Tensor]],
    ) -> Any:
        """Do in another way what failed, or raise what says why; ``loaded`` is what the optimizer
        held before it was to be packed."""
        session, name = self.session, type(optimizer).__name__
        memory = next((e for e in causes(error) if is_out_of_memory(e)), None)
        if untouched and memory is not None:
            raise StepMemoryError(optimizer=name, reason=first_line(memory)) from error
        known = translated(error, type(optimizer))
        if untouched and isinstance(known, UncompiledStepError) and not self.session.sharded:
            return self._fall_back(optimizer, known)
        if session.compiles == 0:
            for leaf, value in loaded:
                leaf.put(value)
            self._uninstall(optimizer)
        if known is None:
            raise error
        raise known from error

    def _take_loaded(self) -> list[tuple[Leaf, torch.Tensor]]:
        """Pack what a checkpoint brought, and capture afresh."""
        session = self.session
        found = session.pack_loaded()
        session.compiled_at.clear()  # captures that are due to loading say nothing of the step
        self._forget()  # what was captured holds the states of before
        session.loaded = False
        return found

    def _fall_back(self, optimizer: Optimizer, reason: UncompiledStepError) -> Any:
        """Run this step eagerly, and all later ones but after a mere excess of graphs.

        If that fails as well, the mistake is in what the step was given, and the next one may be
        compiled again.
        """
        before = self.session.eager_reason
        announce(self.session, reason.explanation)
        try:
            result = self._eagerly(optimizer)
        except BaseException:
            self.session.eager_reason = before
            raise
        self.for_good = not isinstance(reason, TooManyGraphsError)
        return result

    def _captured(self, optimizer: Optimizer) -> Any:
        """Run the step; capture afresh where the old capture cannot serve."""
        if self.session.out_of_graphs:
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    return self._run(self._capture(optimizer), optimizer)
            except RuntimeError as error:
                if "fail_on_recompile" in str(error):
                    raise self._too_many_graphs() from error
                raise
        with symbolic_math(self.counters):
            capture = self._capture(optimizer)
            try:
                return self._run(capture, optimizer)
            except (ChangedTensorError, dynamo_exc.FailOnRecompileLimitHit):
                capture.forget()
                if capture in self.captures:
                    self.captures.remove(capture)
                return self._run(self._capture(optimizer), optimizer)

    def _run(self, capture: _Capture, optimizer: Optimizer) -> Any:
        """One step; of the whole optimizer, where exemplars do not show that all are alike."""
        compiles = self.session.compiles
        try:
            return self._enter(capture, optimizer)
        except Exception as error:
            if not any(isinstance(e, NotExemplaryError) for e in causes(error)):
                raise
            LOG.info("%s: captured whole, since %s", type(optimizer).__name__, error)
            capture.take_whole()
            return self._enter(capture, optimizer)
        finally:
            if self.session.compiles > compiles and not capture.note_states(optimizer):
                self.captures.remove(capture)

    @staticmethod
    def _enter(capture: _Capture, optimizer: Optimizer) -> Any:
        """Run the step under Dynamo, when no other thread is tracing."""
        for _ in range(MOST_WAITS):
            try:
                return capture(optimizer)
            except RuntimeError as error:  # before anything of the step has run
                if OTHERS_TRACE not in str(error):
                    raise
            with TRACING:
                pass
            time.sleep(0.01)
        return capture(optimizer)

    @staticmethod
    def _uninstall(optimizer: Optimizer) -> None:
        """Give the optimizer its own step back."""
        optimizer.__dict__.pop("step", None)
        close_session(optimizer)


class _Capture:
    """An optimizer's step under Dynamo: of the whole optimizer, or of exemplars."""

    def __init__(
        self, backend: Backend, optimizer: type[Optimizer], exemplars: Exemplars | None = None
    ) -> None:
        self.backend = weakref.WeakMethod(backend)
        self.raw = captured_step(optimizer)
        self.exemplars = exemplars
        self.code: types.CodeType | None = None
        self.forget()

    def forget(self) -> None:
        """Let Dynamo go of what it captured, and so of the states."""
        if self.code is not None:
            reset_code(self.code)
        step = own_code(self.raw)
        self.code = step.__code__
        # Dynamo keeps the backend for as long as the twin lives, so that it must not hold the twin.
        compile = weakref.WeakMethod(self._compile)
        self.step = torch.compile(step, backend=lambda gm, _: _live(compile)(gm), fullgraph=True)

    def _compile(self, gm: Any) -> Any:
        exemplars = self.exemplars
        return _live(self.backend)(gm, exemplars if exemplars and exemplars.twin else None)

    def __call__(self, optimizer: Optimizer) -> Any:
        if self.exemplars is None or self.exemplars.twin is None:
            return self.step(optimizer)
        self.exemplars.update()
        return self.step(self.exemplars.twin)

    def take_whole(self) -> None:
        """Capture the whole optimizer from now on."""
        assert self.exemplars is not None
        self.exemplars.twin = None
        self.forget()

    def serves(self, optimizer: Optimizer) -> bool:
        """Whether it is of the parameters, gradients and states that there are now."""
        return self.exemplars is not None and self.exemplars.serve(optimizer)

    def note_states(self, optimizer: Optimizer) -> bool:
        """Remember the states that were packed; False if the capture is of no more use."""
        return self.exemplars is None or self.exemplars.note_states(optimizer)


def _live(method: weakref.WeakMethod[Callable[..., Any]]) -> Callable[..., Any]:
    found = method()
    assert found is not None, "a step outlived its optimizer"
    return found


def whole_numbers(optimizer: Optimizer) -> dict[tuple[int, str], int]:
    """Those in the states of parameters and in the groups, by the ``id`` of their owner and key."""
    owners = [*optimizer.state.items(), *((group, group) for group in optimizer.param_groups)]
    return {
        (id(owner), key): value
        for owner, held in owners
        if isinstance(held, dict)
        for key, value in held.items()
        if type(value) is int and isinstance(key, str)
    }


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, out of Dynamo's wrapping."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "inner_exception", None) or cause.__cause__


def translated(error: BaseException, cls: type[Optimizer]) -> StqError | None:
    """Our own error out of Dynamo's wrapping; a graph break as an error of ours."""
    optimizer = cls.__name__
    known = next((e for e in causes(error) if isinstance(e, StqError)), None)
    if known is not None:
        return known
    if isinstance(error, dynamo_exc.Unsupported):
        *_, last = error.real_stack or [None]
        setting = None if last is None else set_at(cls, last.filename, last.lineno or 0)
        if setting is not None:
            name = setting.attribute
            return LostAttributeError(optimizer=optimizer, attributes=name, places=setting)
        return GraphBreakError(optimizer=optimizer, reason=str(error))
    if isinstance(error, dynamo_exc.BackendCompilerFailed):
        inner = error.inner_exception
        reason = f"{type(inner).__name__}: {inner}"
        return InternalError(optimizer=optimizer, reason=reason, repro="")
    if isinstance(error, dynamo_exc.TorchDynamoException):
        return GraphBreakError(optimizer=optimizer, reason=str(error))
    return None

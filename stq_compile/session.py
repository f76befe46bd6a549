"""A `Session` ties one optimizer to its compiled steps, its packed states and its widths.

It is the one place that changes the optimizer's state, and it does so last: a step is analysed,
checked and compiled completely before the first state is packed, so that an error leaves the
optimizer as it was.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stq_compile import interrupts
from stq_compile.attributes import places
from stq_compile.capture import Argument, Captured, capture, param_sources, params_of
from stq_compile.checks import check_memory, check_program
from stq_compile.codec import CompiledCodec
from stq_compile.compiled_step import CompiledStep, StateInfo, agreement
from stq_compile.compiler import analyse
from stq_compile.dump import Dump
from stq_compile.dynamo import lost_attributes
from stq_compile.errors import (
    InfeasibleBudgetError,
    KernelBuildError,
    LostAttributeError,
    PlanningWarning,
    UnmatchedPrecisionError,
    UnsupportedWidthError,
    first_line,
    is_out_of_memory,
)
from stq_compile.exemplars import Exemplars, bind, extend
from stq_compile.failures import reporting_defects
from stq_compile.formats import (
    FLOAT32,
    MIXED_WIDTH,
    WEIGHTS_WIDTH,
    WIDTHS,
    Format,
    choose_format,
)
from stq_compile.half_params import new_error, uncompensated
from stq_compile.nonfinite import Watch, find_reached
from stq_compile.options import Options
from stq_compile.packed_state import PackedState
from stq_compile.passes.measure import with_packed_normalizers
from stq_compile.passes.runner import Stage
from stq_compile.planner.managed import managed_states
from stq_compile.planner.planner import Planner, StateKey
from stq_compile.reporting.recording import Recording
from stq_compile.reporting.snapshot import run_of
from stq_compile.rounding import stream_id
from stq_compile.runtime import recording
from stq_compile.shards import Region, is_sharded, local, region_of, wrap
from stq_compile.state_tree import Leaf, leaves
from stq_compile.step_graph import PARAM_ERROR, Operand, Program, Role, Source, StepGraph
from stq_compile.working_set import can_be_packed, is_like

MOST_GRAPHS, GRAPH_WINDOW = 4, 100
"""How many graphs `stq.compile` captures in how many steps; a step that needs yet another one
runs eagerly, since what changes so often will change again."""

LOG = logging.getLogger(__name__)


class Session:
    """Everything that stq_compile keeps for one optimizer."""

    def __init__(self, optimizer: Optimizer, options: Options) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.options = options
        self.dump = Dump(type(optimizer).__name__)
        self.recording = Recording(options.record)
        self.seed = options.seed
        self.checkpoint_format: Literal["packed", "fp32"] = "packed"
        self.loaded = False
        self.hooks: list[RemovableHandle] = []
        self.steps = 0
        self.changing = False  # whether a step has begun to change tensors, and has not ended
        self.driven = False  # whether somebody calls `decide` after each step
        self.decision_due = False
        self.compiles = 0
        self.compiled_at: list[int] = []
        self.weights: set[StateKey] = set()
        self.distances: dict[str, float] = {}  # the largest from copies of weights, by key
        self.gradients: dict[StateKey, StorageWeakRef] = {}  # whose gradients were packed as states
        self.eager_reason = ""
        self.multiplies = False  # whether an eager step multiplied matrices
        self.warned_of_products = False
        self.transitions = 0
        self.look_bytes = 0
        self.recorded = False
        self.reencoded: tuple[str, ...] = ()
        self.plan: dict[StateKey, int] = {}
        self.planner = Planner(options) if options.planned else None
        self.created_width = options.unplanned_width
        self.info: dict[StateKey, StateInfo] = {}
        self.errors: dict[int, Tensor] = {}
        self.codec = CompiledCodec(options.rounding)
        self.compiled: weakref.WeakSet[CompiledStep] = weakref.WeakSet()
        self.watch = Watch()

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None, "the session outlived its optimizer"
        return optimizer

    def compile(self, gm: fx.GraphModule, exemplars: Exemplars | None = None) -> CompiledStep:
        """Compile one captured graph; the backend's entry. Nothing is changed if it fails.

        ``exemplars``: whose step was captured, in place of the whole optimizer's.
        """
        start = time.perf_counter()
        lost = lost_attributes()
        if lost:
            cls = type(self.optimizer)
            raise LostAttributeError(
                optimizer=cls.__name__, attributes=", ".join(lost), places=places(cls, lost)
            )
        captured = capture(gm, self.optimizer)
        with reporting_defects(self, captured.program):
            stages = analyse(captured.program, self.options, self.dump.folder("analyse"))
        if exemplars is not None:
            captured, stages[-1] = self._for_all(captured, stages[-1], exemplars)
        check_memory(captured, self.params())
        program = stages[-1].program
        check_program(program)
        self.check_precision(program)
        step = CompiledStep(self, captured, stages)
        self._find_weights(captured)
        steps = [*self.compiled, step]
        with interrupts.scope() as hold:
            with self._attempt(), agreement(steps, self._is_nonnegative):
                self._add_errors(program)
                changes = self.enroll(step.planned_program)
                known = self.plan.keys() & changes.keys()
                self._transition(changes, steps, hold)
                self.transitions += len(known)
            step.release(gm)
            self.compiled.add(step)
            self.compiles += 1
            self.compiled_at.append(self.steps)
        LOG.info(
            "%s: compiled %d templates to %d kernels in %.2f s",
            captured.program.optimizer,
            len(program.units),
            len(step.buckets),
            time.perf_counter() - start,
        )
        self._record()
        return step

    def _for_all(
        self, captured: Captured, last: Stage, exemplars: Exemplars
    ) -> tuple[Captured, Stage]:
        """What was captured of exemplars, and its templates, for all that they stand for."""
        sources = list(param_sources(self.optimizer).values())
        program = extend(last.program, sources, exemplars.classes)
        states = {(source.param, key): value for _, source, key, value in self.states()}
        captured = bind(captured, program, exemplars.params, states)
        return captured, replace(last, program=program)

    @property
    def out_of_graphs(self) -> bool:
        """Whether so many graphs were captured lately that another would only be one more."""
        recent = [step for step in self.compiled_at if step > self.steps - GRAPH_WINDOW]
        return len(recent) >= MOST_GRAPHS

    def log(self, loss: float | Tensor) -> None:
        """Note the loss of the last step."""
        value = loss.item() if isinstance(loss, Tensor) else float(loss)
        self.recording.loss(self.steps, value)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Losses that were logged, with the number of steps before each."""
        return self.recording.losses

    def _record(self) -> None:
        if self.recording.streams:
            self.recording.update(run_of(self))

    def _add_errors(self, program: Program) -> None:
        """Give every compensated parameter of a new program its error state."""
        if self.options.param_rounding != "compensated":
            return
        params = self.params()
        for number, source in uncompensated(program):
            if number not in self.errors:
                self.errors[number] = self._new_error(params[number], source)

    def _new_error(self, param: Tensor, source: Source) -> Tensor:
        return new_error(param, **self.storage_options(source, region_of(param)))

    def load_errors(self, loaded: Mapping[int, Tensor]) -> None:
        """Take the error states of a checkpoint; parameters for which it has none are exact.

        Steps that were compiled keep their objects, so these stay and get other buffers.
        """
        if self.options.param_rounding != "compensated":
            return
        params = self.params()
        for number in self.errors.keys() | loaded.keys():
            source = Source(number, "", PARAM_ERROR)
            new = loaded.get(number)
            new = self._new_error(params[number], source) if new is None else new
            held, old = local(new), local(self.errors.setdefault(number, new))
            assert isinstance(held, PackedState)
            assert isinstance(old, PackedState)
            old.packed.restore(held.packed.kept())

    def _find_weights(self, captured: Captured) -> None:
        """Of the states not packed yet, find those that are copies of their parameter."""
        params = self.params()
        for (role, source), binding in captured.bindings.items():
            value = binding.live if isinstance(binding, Argument) else binding
            if role is not Role.STATE or not isinstance(value, Tensor):
                continue
            # A packed one was created as a copy, or loaded.
            wide = isinstance(value, PackedState) and value.format.width >= WEIGHTS_WIDTH
            if (wide or can_be_packed(value)) and is_like(value, params[source.param]):
                self.weights.add((source.param, source.key))

    def _is_nonnegative(self, state: StateKey) -> bool:
        """Whether no value of a state is negative now; of a sharded one nobody sees all values."""
        for leaf, source in self.leaves():
            if (source.param, leaf.key) == state:
                if is_sharded(leaf.value) or leaf.value.is_complex():
                    return False
                return not bool((leaf.value < 0).any())
        return False

    def check_precision(self, program: Program) -> None:
        """Refuse a key of ``precision`` that names no state, once all states exist."""
        states = {leaf.key for leaf, _ in self.leaves()}
        if not states or any(o.returned >= 0 for _, o in program.operands()):
            return
        params = [source.name for source in param_sources(self.optimizer).values()]
        key = self.options.unmatched(params, states)
        if key is not None:
            raise UnmatchedPrecisionError(
                optimizer=type(self.optimizer).__name__,
                key=key,
                states=", ".join(sorted(states)),
                params=", ".join(params[:3]) + (", ..." if len(params) > 3 else ""),
            )

    def enroll(self, program: Program) -> dict[StateKey, int]:
        """Let the planner give first widths to the states of a new program.

        States that the step is about to create have no key yet and share one width: the widest
        that leaves the budget enough for the others.
        """
        if self.planner is None:
            return {}
        found = [m for unit in program.units for m in managed_states(unit, self.options)]
        managed = self.planner.managed.keys() | {m.key for m in found}
        widest = self.options.unplanned_width
        for width in sorted((w for w in self.options.ladder if w <= widest), reverse=True):
            self.created_width = width
            try:
                with self.planner.attempt():
                    return self.planner.enroll(found, *self._sizes(managed, program), self.steps)
            except InfeasibleBudgetError:
                if width == self.options.ladder[0]:
                    raise
        raise AssertionError("the ladder has no width")

    def plan_first(self, program: Program) -> None:
        """Give the states of an analysed program the widths that a first step would give them."""
        seen = with_packed_normalizers(program, self.options.pins_wide)
        self.plan.update(self.enroll(seen))

    def _sizes(
        self, managed: Collection[StateKey], program: Program | None = None
    ) -> tuple[int, int]:
        """Bytes of the states that are not managed, and elements of all states.

        With ``program``, as its states will be: born ones in their formats, created ones as well.
        """
        formats: dict[StateKey, Format] = {}
        fixed = elements = 0
        for unit, operand in _states_of(program):
            if operand.returned < 0:
                key = (operand.source.param, operand.source.key)
                formats[key] = self.format_of(operand, unit)
                continue
            elements += operand.numel
            fixed += self.format_of(operand, unit).nbytes(operand.numel)
        for _, source, name, value in self.states():
            if name == PARAM_ERROR:
                fixed += _whole_bytes(value)  # float32 training has no such elements
            elif isinstance(value, Tensor):
                elements += value.numel()
                key = (source.param, name)
                if key in formats and key not in managed:
                    fixed += formats[key].nbytes(value.numel())
                elif key not in managed:
                    fixed += _whole_bytes(value)
        return fixed, elements

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Plan, planner and facts are as before if the block fails."""
        plan, info, errors = dict(self.plan), dict(self.info), dict(self.errors)
        try:
            with nullcontext() if self.planner is None else self.planner.attempt():
                yield
        except BaseException:
            self.plan, self.info = plan, info
            self.errors.clear()
            self.errors.update(errors)
            raise

    def count_replays(self) -> None:
        """Count the steps that replayed CUDA graphs made, which the device alone has counted.

        It waits for the device; a captured step that was not replayed yet was counted and is none.
        """
        if self.recorded and not recording():
            self.steps += sum(step.replayed() for step in self.compiled)

    def decide(self) -> None:
        """Do what a step has made due; the step is made, whatever becomes of it.

        A look is followed by a decision; and now and then it is seen what is not finite any more.
        """
        if recording():  # what follows waits for the device
            return
        if self.steps % self.options.interval == 0 and self.steps != self.watch.looked_at:
            find_reached(self)
        if not self.decision_due:
            return
        try:
            self.replan()
        except Exception as error:
            self.decision_due = False
            self.without_planning("change widths", error)

    def without_planning(self, action: str, error: Exception) -> None:
        """Go on with the widths in force where planning failed for want of memory or a compiler.

        Anything else is a defect and raised; and so is everything where parameters are sharded,
        since other processes decide, or wait for this one.
        """
        memory = is_out_of_memory(error)
        missing = isinstance(error, KernelBuildError)
        if not (memory or missing) or self.sharded:
            raise error
        warning = PlanningWarning(
            optimizer=type(self.optimizer).__name__,
            step=self.steps,
            action=action,
            reason=first_line(error),
            remedy="free some memory" if memory else "see `stq doctor` about the compiler",
        )
        warnings.warn(warning, stacklevel=2)

    def replan(self) -> None:
        """Decide on the widths after a look, and change them; all or nothing."""
        planner = self.planner
        assert planner is not None
        with interrupts.scope() as hold, self._attempt():
            changes = planner.decide(self.steps, *self._sizes(planner.managed))
            self.change_widths(changes)
            hold()
            self.decision_due = False  # an interrupted decision is made before the next step
        record = planner.history.records[-1]
        LOG.info(
            "%s: step %d, %d changes of width, %.2f true bits, predicted error %.3g",
            type(self.optimizer).__name__,
            self.steps,
            len(changes),
            record.bits,
            record.error,
        )
        self._record()

    def width_of_state(self, source: Source, numel: int) -> int:
        """The width that plan or options give a state of ``numel`` elements, 0 for a 0-dim one."""
        key = (source.param, source.key)
        if key in self.plan:
            return self.plan[key]
        if numel < max(self.options.min_numel, 1) or self.options.excludes(source.name):
            return 32
        pinned = self.options.width_of(source.name, source.key)
        width = self.options.unplanned_width if pinned is None else pinned
        return max(width, WEIGHTS_WIDTH) if key in self.weights else width

    def keep_as_weights(self, source: Source, width: int) -> int:
        """Remember that a state is a copy of its parameter; its width from now on."""
        self.weights.add((source.param, source.key))
        return max(width, WEIGHTS_WIDTH)

    def width_of(self, operand: Operand) -> int:
        """The width of an operand; of a state that the step will create, whose key is unknown."""
        numel = operand.numel if operand.shape != () else 0
        known = (operand.source.param, operand.source.key) in self.plan
        wide = numel < self.options.min_numel or self.options.excludes(operand.source.name)
        if operand.returned >= 0 and not known and not wide and operand.shape != ():
            if self.options.target_bits is not None:
                return self.created_width
            return self.options.width_of_created(operand.source.name)
        return self.width_of_state(operand.source, numel)

    def format_of(self, operand: Operand, unit: StepGraph) -> Format:
        """The format of a state: its width, and what the graph proved about it."""
        key, facts = operand.source.key, unit.facts
        if key in facts.fragile:
            return FLOAT32
        normalizer = facts.normalizers.get(key)
        normalizable = False
        if normalizer is not None and normalizer not in facts.fragile:
            other = Operand(
                "", Role.STATE, Source(operand.source.param, operand.source.name, normalizer),
                operand.shape, operand.stride, operand.dtype, region=operand.region,
            )  # fmt: skip
            normalizable = self.width_of(other) < 32
        width = self.width_of(operand)
        if width < FLOAT32.width and key in facts.copies:
            width = max(width, WEIGHTS_WIDTH)
        if key in facts.mixed and self.options.target_bits is None:  # a budget is kept
            width = max(width, MIXED_WIDTH)
        return choose_format(
            width,
            nonnegative=key in facts.nonnegative,
            normalizable=normalizable,
            matrix=None if operand.region is not None else facts.matrices.get(key),
            where=f"{type(self.optimizer).__name__}, {operand.source}",
        )

    def change_widths(self, changes: Mapping[StateKey, int]) -> None:
        """Change the widths of live states: re-encoded now, in use from the next step on.

        Neither Dynamo nor the front passes run again; only kernels for widths that were not in
        use before are built, and before any state is touched. If anything fails, the old widths
        are in force again.
        """
        if not changes:
            return
        with interrupts.scope() as hold, self._attempt():
            self._transition(changes, list(self.compiled), hold)
            self.transitions += len(changes)
            if self.planner is not None:
                known = self.planner.widths
                known.update({key: width for key, width in changes.items() if key in known})

    def _transition(
        self,
        changes: Mapping[StateKey, int],
        steps: list[CompiledStep],
        hold: Callable[[], None],
    ) -> None:
        """Bring states and steps to changed widths.

        Buffers that are replaced are kept until all is done, and put back if it fails. ``hold``
        lets signals wait until the caller has noted what was done; kernels are built before that.
        """
        for (_, key), width in changes.items():
            if width not in WIDTHS:
                raise UnsupportedWidthError(where=f"state {key!r}", width=width, valid=WIDTHS)
        self.plan.update(changes)
        units = [step.generate() for step in steps]
        codec = self.codec.prepare([c for step in steps for c in step.conversions()])
        hold()
        held = [local(value) for _, _, _, value in self.states()]
        packed = [value.packed for value in held if isinstance(value, PackedState)]
        kept = [(storage, storage.kept()) for storage in packed]
        before = [(step, {**vars(step), "bindings": dict(step.bindings)}) for step in steps]
        ordinary = [
            (leaf, leaf.value)
            for leaf, _ in self.leaves()
            if not isinstance(local(leaf.value), PackedState)
        ]
        try:
            for step, generated in zip(steps, units, strict=True):
                step.adopt(generated, codec)
        except BaseException:
            for storage, buffers in kept:
                storage.restore(buffers)
            for leaf, value in ordinary:
                leaf.put(value)
            for step, attributes in before:
                vars(step).update(attributes)
            raise

    @property
    def sharded(self) -> bool:
        """Whether other processes hold parts of a parameter."""
        return any(is_sharded(p) for p in self.params())

    def params(self) -> list[Tensor]:
        """All parameters, in the order of `Source.param`."""
        return params_of(self.optimizer)

    def leaves(self) -> Iterator[tuple[Leaf, Source]]:
        """Every tensor among the states, and its source.

        What belongs to no parameter of the optimizer is numbered after the parameters.
        """
        sources = param_sources(self.optimizer)
        for leaf in leaves(self.optimizer):
            owner = sources.get(id(leaf.owner))
            if owner is None:
                name = leaf.owner if isinstance(leaf.owner, str) else type(leaf.owner).__name__
                owner = sources[id(leaf.owner)] = Source(len(sources), name)
            yield leaf, Source(owner.param, owner.name, leaf.key)

    def states(self) -> Iterator[tuple[Tensor, Source, str, Tensor]]:
        """Every tensor among the states: (parameter, its source, key, value).

        The error states of parameters come last; the optimizer does not know them.
        """
        for leaf, source in self.leaves():
            yield leaf.owner, source, leaf.key, leaf.value
        if self.errors:
            params, sources = self.params(), list(param_sources(self.optimizer).values())
            for number, error in self.errors.items():
                source = replace(sources[number], key=PARAM_ERROR)
                yield params[number], source, PARAM_ERROR, error

    def pack_loaded(self) -> list[tuple[Leaf, Tensor]]:
        """Mark the float32 states that a loaded checkpoint brought as waiting to be packed.

        May be done again where it was interrupted; `loaded` is the caller's to clear. Returns what
        they were, so that this can be undone.
        """
        found = []
        for leaf, source in list(self.leaves()):
            info = self.info.get((source.param, leaf.key))
            held = local(leaf.value)
            if isinstance(held, PackedState) or not can_be_packed(held):
                continue
            numel = leaf.value.numel() if leaf.value.ndim else 0
            width = self.width_of_state(source, numel) if info is None else info.format.width
            if width < FLOAT32.width:
                found.append((leaf, leaf.value))
                state = self.unencoded(held, source, region_of(leaf.value))
                leaf.put(wrap(state, leaf.value))
        return found

    def move_counters(self) -> None:
        """Put step counters, which torch keeps on the CPU, where their parameters are.

        Kernels read and advance them there; otherwise every step would wait for the device.
        """
        if all(p.is_cpu for p in self.params()):
            return
        for leaf, _ in list(self.leaves()):
            value, owner = leaf.value, leaf.owner
            if isinstance(owner, Tensor) and value.ndim == 0 and value.device != owner.device:
                leaf.put(value.to(owner.device))

    def unpack_wide(self, born: list[Tensor]) -> None:
        """Make ordinary tensors of newborn states that are to stay in float32."""
        newborn = set(map(id, born))
        for leaf, source in self.leaves() if born else ():
            held = local(leaf.value)
            if id(leaf.owner) not in newborn or not isinstance(held, PackedState):
                continue
            wide = self.options.excludes(source.name) or self.options.pins_wide(
                source.name, leaf.key
            )
            if wide and (held.dtype == torch.float32 or self.options.as_torch_rounds):
                leaf.put(wrap(held.dequantize().to(held.dtype), leaf.owner))

    def unencoded(self, value: Tensor, source: Source, region: Region | None) -> PackedState:
        """A packed state of values that are yet to be encoded."""
        return PackedState.wrap(value, **self.storage_options(source, region))

    def rounding_options(self, source: Source) -> dict[str, Any]:
        """How a state is rounded, and the random numbers that are its own."""
        return {
            "rounding": self.options.rounding,
            "seed": self.seed,
            "stream": stream_id(source.param, source.key),
        }

    def storage_options(self, source: Source, region: Region | None) -> dict[str, Any]:
        """What the storage of a state is made with that lies in ``region`` of a whole one."""
        return {
            **self.rounding_options(source),
            "first_block": 0 if region is None else region.first_block,
            "sharded": region is not None and region.sharded,
        }


def _whole_bytes(state: Tensor) -> int:
    """Bytes of a state over all shards; what blocks that they cut cost is left to the report."""
    held = local(state)
    if not isinstance(held, PackedState):
        return state.numel() * state.element_size()
    return held.packed.nbytes if held is state else held.format.nbytes(state.numel())


def _states_of(program: Program | None) -> Iterator[tuple[StepGraph, Operand]]:
    """The states of a program that are no scalars, and the scalars that it creates."""
    for unit, operand in program.operands() if program is not None else ():
        if operand.role is Role.STATE and (operand.shape != () or operand.returned >= 0):
            yield unit, operand

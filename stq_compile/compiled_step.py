"""`CompiledStep`: one captured step with the kernels for the widths in use.

It holds the templates, the live objects behind their operands and the tables of tensors that the
kernels run on; which width a state has is the `Session`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from stq_compile import interrupts
from stq_compile.capture import Argument, Captured, Gradient
from stq_compile.codec import CompiledCodec, Conversion
from stq_compile.collective import Sums, add_up, anywhere
from stq_compile.compiler import (
    Generated,
    Unit,
    generate,
    generate_measuring,
    measuring_program,
)
from stq_compile.cut_regions import CutRegion
from stq_compile.dump import Dump
from stq_compile.errors import FormatMismatchError, PartialStepError, first_line
from stq_compile.failures import reporting_defects
from stq_compile.formats import BFLOAT16, CONSTANT, FLOAT32, Format, MatrixKind, choose_format
from stq_compile.half_params import HalfParams
from stq_compile.halves import FLOAT_DTYPES, HALF_DTYPES
from stq_compile.options import Options
from stq_compile.packed_state import PackedState
from stq_compile.passes.agree import agree
from stq_compile.passes.measure import forgetting, with_packed_normalizers
from stq_compile.passes.numbers import shared_results
from stq_compile.passes.runner import Stage
from stq_compile.planner.direct import perturbations
from stq_compile.planner.factors import resolved
from stq_compile.planner.planner import Planner, StateKey
from stq_compile.planner.turns import measure_in_turn
from stq_compile.regions import Region
from stq_compile.rounding import mixed_step
from stq_compile.runtime import SPOILED, Bucket, MeasuringBucket, live, present, recording
from stq_compile.shards import local, wrap
from stq_compile.state_tree import Leaf
from stq_compile.step_graph import (
    PARAM_ERROR,
    PARAM_ROUNDING,
    Facts,
    Operand,
    Program,
    Role,
    Source,
    StepGraph,
)
from stq_compile.storage import Codec, PackedStorage
from stq_compile.working_set import can_be_packed, format_for


@contextmanager
def agreement(
    steps: Sequence[CompiledStep], is_nonnegative: Callable[[StateKey], bool]
) -> Iterator[None]:
    """Steps of one optimizer go by facts that they share; by their former ones if this fails."""
    former = [step.program for step in steps]
    agreed = agree([step.front[-1].program for step in steps], is_nonnegative)
    try:
        for step, program in zip(steps, agreed, strict=True):
            step.take(program)
        yield
    except BaseException:
        for step, program in zip(steps, former, strict=True):
            step.take(program)
        raise


@dataclass
class StateInfo:
    """What the compiler knows about one state of one parameter."""

    source: Source
    format: Format
    facts: Facts
    reason: str = ""
    widened: bool = False


class Owner(Protocol):
    """What a step needs of the session that it belongs to."""

    options: Options
    dump: Dump
    codec: CompiledCodec
    seed: int
    steps: int
    compiles: int
    changing: bool
    driven: bool
    info: dict[StateKey, StateInfo]
    plan: dict[StateKey, int]
    planner: Planner | None
    look_bytes: int
    recorded: bool
    decision_due: bool
    errors: dict[int, Tensor]

    @property
    def optimizer(self) -> Optimizer: ...
    def params(self) -> list[Tensor]: ...
    def leaves(self) -> Iterator[tuple[Leaf, Source]]: ...
    def format_of(self, operand: Operand, unit: StepGraph) -> Format: ...
    def unencoded(self, value: Tensor, source: Source, region: Any) -> PackedState: ...
    def rounding_options(self, source: Source) -> dict[str, Any]: ...
    def storage_options(self, source: Source, region: Any) -> dict[str, Any]: ...
    def decide(self) -> None: ...
    def without_planning(self, action: str, error: Exception) -> None: ...


class CompiledStep:
    """One captured graph: templates, live objects, and the buckets for the widths in use.

    ``program`` holds the templates before formats, with facts on which all graphs agree.
    """

    def __init__(self, session: Owner, captured: Captured, stages: list[Stage]) -> None:
        self.session = session
        self.number = session.compiles
        self.bindings = captured.bindings
        self.attributes = captured.attributes
        self.handed_back = captured.handed_back
        self.front = stages
        self.stages = stages
        self.program = stages[-1].program
        self.buckets: list[Bucket] = []
        self.recorded: list[list[Bucket]] = []  # those whose tables a CUDA graph may hold
        self.regions: list[Region] = []
        self.cut_regions: list[CutRegion] = []
        self.measured: Program | None = None
        self.measuring: list[MeasuringBucket] | None = None
        self.created: list[Operand] = []
        kept = {operand.returned for _, operand in self._created_by()}
        self.shared = shared_results(captured.program.units[0], kept)

    def take(self, program: Program) -> None:
        """Go on with other facts of the same templates, from the next `generate` on."""
        if program is not self.program:
            self.program = program
            self.measured = None
            vars(self).pop("planned_program", None)

    @cached_property
    def planned_program(self) -> Program:
        """The templates as the planner sees them."""
        return with_packed_normalizers(self.program, self.session.options.pins_wide)

    def generate(self) -> Generated:
        """Compile kernels for the widths in force; changes nothing."""
        session = self.session
        with reporting_defects(session, self.front[0].program):
            return generate(
                self.program,
                session.format_of,
                session.options,
                session.dump.folder("generate"),
            )

    def conversions(self) -> list[Conversion]:
        """The changes of format that `adopt` will make, at the widths in force."""
        found = []
        for operand, info in self._wanted():
            value = local(self._live((Role.STATE, operand.source)))
            if isinstance(value, PackedState) and value.packed.newborn:
                continue
            old = value.format if isinstance(value, PackedState) else FLOAT32
            numel = torch.Size(operand.shape).numel()
            found.append(Conversion(operand.source.param, numel, old, info.format, operand.device))
        return found

    def adopt(self, generated: Generated, codec: Codec) -> None:
        """Bring the states into the formats generated for, and use these from the next step on."""
        self._move_counters()
        self._commit(self._wanted(), codec)
        self._build_buckets(generated)
        self.stages = [*self.front, *generated.stages[1:]]

    def release(self, gm: fx.GraphModule) -> None:
        """Let Dynamo's module hold the packed states, so that the float32 ones are freed."""
        for key, target in self.attributes.items():
            value = self._live(key)
            if isinstance(local(value), PackedState):
                setattr(gm, target, value)

    @property
    def writes_only_tensors(self) -> bool:
        """Whether a call returns nothing that the optimizer is to take over."""
        return not self.created and self.shared is None and not self.handed_back

    def _live(self, key: tuple[Role, Source]) -> Tensor | None:
        """The object that the optimizer holds."""
        binding = self.bindings[key]
        assert not isinstance(binding, Gradient)
        return binding.live if isinstance(binding, Argument) else binding

    def _wanted(self) -> list[tuple[Operand, StateInfo]]:
        """The states that exist, and the formats that they are to have."""
        session = self.session
        found = []
        for unit, operand in self.program.operands():
            if operand.role is Role.STATE and operand.shape != () and operand.returned < 0:
                format = session.format_of(operand, unit)
                reason = unit.facts.fragile.get(operand.source.key, "")
                if unit.unfused:
                    matrix = unit.facts.matrices.get(operand.source.key)
                    format = self._format_now(operand, format, matrix)
                info = StateInfo(operand.source, format, unit.facts, reason, unit.widened)
                found.append((operand, info))
        return found

    def _move_counters(self) -> None:
        """Have step counters where kernels can reach them (`Session.move_counters`)."""
        places = {(source.param, leaf.key): leaf.put for leaf, source in self.session.leaves()}
        for unit, operand in self.program.operands():
            if operand.role is not Role.STATE or operand.shape != () or operand.returned >= 0:
                continue
            value = self._live((Role.STATE, operand.source))
            if value is not None and value.device != unit.device:
                put = places[(operand.source.param, operand.source.key)]
                self._replace_state(operand.source, value.to(unit.device), put)

    def _format_now(self, operand: Operand, format: Format, matrix: MatrixKind | None) -> Format:
        """The format of a region's state: what it is in, if that has the width asked for.

        The graph of a region proves little, so the sign is that of the values, of all shards; and
        what kind of matrix it is, if the graph does not say so, that of the format it is in.
        """
        value = local(self._live((Role.STATE, operand.source)))
        if isinstance(value, PackedState):
            matrix = matrix or value.format.matrix
            asked = choose_format(
                format.width, nonnegative=False, normalizable=False, matrix=value.format.matrix
            )
            waiting = value.format == CONSTANT or value.format.width == asked.width
            if waiting and value.format != FLOAT32:
                return value.format
            value = value.dequantize()
        if format == FLOAT32 or value.dtype not in FLOAT_DTYPES:
            return FLOAT32
        if operand.region is None:
            return format_for(value, format.width, matrix)
        if matrix == "semidefinite":
            return BFLOAT16  # no process can factor its part
        signed = bool((value < 0).any())
        signed = anywhere(signed, [self.session.params()[operand.source.param]])
        return choose_format(
            format.width, nonnegative=not signed, normalizable=False, matrix=matrix
        )

    def _commit(self, wanted: list[tuple[Operand, StateInfo]], codec: Codec) -> None:
        """Pack and re-encode; normalizers before the states that they divide."""
        session = self.session
        held = [(local(self._live((Role.STATE, o.source))), info) for o, info in wanted]
        following = {v.packed: info.format for v, info in held if isinstance(v, PackedState)}
        places = {(source.param, leaf.key): leaf.put for leaf, source in session.leaves()}
        for operand, info in sorted(wanted, key=lambda pair: pair[1].format.normalized):
            where = (Role.STATE, operand.source)
            value = local(self._live(where))
            if not isinstance(value, PackedState):
                assert isinstance(value, Tensor)
                wide = info.format == FLOAT32 and not (info.widened and value.dtype in HALF_DTYPES)
                if wide or not can_be_packed(value):
                    session.info[(operand.source.param, operand.source.key)] = info
                    continue
                value = session.unencoded(value, operand.source, operand.region)
                put = places[(operand.source.param, operand.source.key)]
                self._replace_state(operand.source, value, put)
            storage = value.packed
            for name, option in session.storage_options(operand.source, operand.region).items():
                setattr(storage, name, option)
            normalizer = self._normalizer(operand.source, info)
            storage.reencode(info.format, normalizer, codec=codec, following=following)
            session.info[(operand.source.param, operand.source.key)] = info

    def _normalizer(self, source: Source, info: StateInfo) -> PackedStorage | None:
        if not info.format.normalized:
            return None
        key = info.facts.normalizers[source.key]
        other = local(self._live((Role.STATE, Source(source.param, source.name, key))))
        assert isinstance(other, PackedState)
        return other.packed

    def _replace_state(self, source: Source, value: Tensor, put: Callable[[Tensor], None]) -> None:
        """Let the step hold another tensor where it held a state, and the optimizer."""
        where = (Role.STATE, source)
        binding, former = self.bindings[where], self._live(where)
        assert former is not None
        state = wrap(value, former)
        self.bindings[where] = (
            Argument(binding.position, state) if isinstance(binding, Argument) else state
        )
        put(state)

    def _build_buckets(self, generated: Generated) -> None:
        codec, params = self.session.codec, self._params
        if self.session.recorded:
            self.recorded = [*self.recorded, self.buckets]
        self.buckets, self.regions, self.cut_regions = [], [], []
        for unit in generated.units:
            if unit.graph.rest is None:
                self.buckets.append(Bucket(unit, self._resolve))
            else:
                width_of = partial(self._width_of, unit.graph.rest)
                self.cut_regions.append(CutRegion(unit, self._resolve, width_of, codec, params))
        for graph in generated.stages[-1].program.units:
            if graph.unfused:
                width_of = partial(self._width_of, graph)
                self.regions.append(Region(graph, self._resolve, width_of, codec, params))
        self.measuring = None
        self.created = [operand for _, operand in self._created_by()]
        self._formats = {
            o.returned: self._format_at_birth(o, u) for u, o in self._created_by() if o.shape != ()
        }
        self._packed_wide = {
            o.returned
            for u, o in self._created_by()
            if o.shape != () and self._is_packed_wide(o, u)
        }

    @cached_property
    def _params(self) -> HalfParams:
        """How regions read and write parameters of 16 bits."""
        session = self.session
        return HalfParams(session.options.param_rounding, session.errors, lambda: session.seed)

    def _width_of(self, unit: StepGraph, operand: Operand) -> int:
        return self.session.format_of(operand, unit).width

    def _created_by(self) -> Iterator[tuple[StepGraph, Operand]]:
        return ((u, o) for u, o in self.program.operands() if o.returned >= 0)

    def _format_at_birth(self, operand: Operand, unit: StepGraph) -> Format:
        """A region's states get their format when they are first written, from their values."""
        format = self.session.format_of(operand, unit)
        if operand.dtype not in FLOAT_DTYPES:
            return FLOAT32
        return CONSTANT if unit.unfused and format != FLOAT32 else format

    def _is_packed_wide(self, operand: Operand, unit: StepGraph) -> bool:
        """Whether a created state of 32 bits is a `PackedState` nevertheless: one that stands for
        16 bits, or that may get fewer when its key is known. Then an ordinary tensor would have to
        be replaced while Dynamo is tracing it."""
        if unit.widened and operand.dtype in HALF_DTYPES:
            return True
        options = self.session.options
        large = operand.dtype == torch.float32 and operand.numel >= options.min_numel
        return large and options.may_pack_created(operand.source.name)

    def _resolve(self, operand: Operand) -> Any:
        key = operand.source.key
        made = operand.role in (Role.SUMS, Role.INTERMEDIATE)
        if operand.returned >= 0 or made or key == PARAM_ROUNDING:
            return None
        if key == PARAM_ERROR:
            return self.session.errors[operand.source.param]
        role = Role.STATE if operand.role in (Role.CODES, Role.SCALES, Role.KEY) else operand.role
        return self.bindings[(role, operand.source)]

    def __call__(self, *args: Tensor) -> tuple[Any, ...]:
        session = self.session
        created: dict[int, Any] = {o.returned: self._create(o) for o in self.created}
        shared = self._shared_results(args)
        step = mixed_step(session.seed, session.steps)
        try:
            self._fill(args, created)
        except FormatMismatchError:  # another graph of this optimizer, or an eager step, ran last
            self._commit(self._wanted(), session.codec)
            self._fill(args, created)
        session.recorded = session.recorded or recording()
        looked = self._planned_look(args, created)
        results = created | shared | self._handed_back(args)
        returned = tuple(results[i] for i in sorted(results))
        with interrupts.scope() as hold:
            hold()  # whole from here on; nothing below takes memory, but for regions
            session.changing = True
            written = [tensor for bucket in self.buckets for tensor in bucket.launch(step)]
            if self.regions or self.cut_regions:
                self._launch_regions(step)
            torch.autograd.graph.increment_version(written)  # autograd must see that they changed
            session.steps += 1
            session.changing = False
            session.decision_due = looked
        if not session.driven:
            session.decide()
        return returned

    def replayed(self) -> int:
        """Steps that replayed CUDA graphs made, beyond what the host has counted.

        Every bucket counts them all, by a clock of its own.
        """
        found = [[bucket.replayed() for bucket in each] for each in (*self.recorded, self.buckets)]
        return sum(max(counts, default=0) for counts in found)

    def _launch_regions(self, step: int) -> None:
        """One parameter after the other, each of them whole or not at all."""
        done = sum(len(bucket.instances) for bucket in self.buckets)
        total = done + sum(len(region.instances) for region in self.regions)
        total += sum(len(region.instances) for region in self.cut_regions)
        steps = self.session.steps
        try:
            for _ in chain(
                *(region.launch(steps) for region in self.regions),
                *(region.launch(steps, step) for region in self.cut_regions),
            ):
                done += 1
        except Exception as error:
            if done == 0:
                self.session.changing = False
                raise
            raise PartialStepError(
                optimizer=type(self.session.optimizer).__name__, done=done, total=total,
                reason=first_line(error),
            ) from error  # fmt: skip

    def _planned_look(self, args: Sequence[Any], created: dict[int, Tensor]) -> bool:
        """Measure if a look is due; returns whether it was made.

        A look is no part of the step: one that fails for want of memory or of a compiler is left
        out, unless other processes wait for its sums.
        """
        session = self.session
        kernels = self.buckets or self.cut_regions
        planner = session.planner if kernels and not session.recorded else None
        if planner is None or not planner.due(session.steps + 1):
            return False
        try:
            self._look(args, created)
        except Exception as error:
            session.without_planning("measure", error)
            return False
        return True

    def _fill(self, args: Sequence[Any], created: dict[int, Any]) -> None:
        """Find and check all tensors of this step; nothing is changed before all are found."""
        for bucket in self.buckets:
            bucket.fill(args, created)
        for region in self.regions:
            region.fill(args, created)
        for cut_region in self.cut_regions:
            cut_region.fill(args, created)

    def _shared_results(self, args: Sequence[Any]) -> dict[int, Any]:
        """The step's new numbers, by output position; from its inputs before they change."""
        if self.shared is None:
            return {}
        inputs = [present(self._resolve(operand), args) for operand in self.shared.operands]
        found = dict(zip(self.shared.positions, self.shared.module(*inputs), strict=True))
        return {position: self._packed_at_birth(v, position) for position, v in found.items()}

    def _handed_back(self, args: Sequence[Any]) -> dict[int, Any]:
        """The states that the step stores again as they are, by output position."""
        found = {}
        for position, key in self.handed_back.items():
            binding = self.bindings[key]
            given = isinstance(binding, Argument) and args[binding.position]
            live = self._live(key)
            packed = isinstance(local(live), PackedState)
            keep = isinstance(given, Tensor) and (
                not packed or isinstance(local(given), PackedState)
            )
            found[position] = given if keep else live
        return found

    def _packed_at_birth(self, value: Any, position: int) -> Any:
        """A state that was made from nothing and is of no parameter's graph yet, packed."""
        options = self.session.options
        if not isinstance(value, Tensor) or value.numel() < max(options.min_numel, 2):
            return value
        width = options.width_of_created("")
        if width == FLOAT32.width or not can_be_packed(value):
            return value
        source = Source(len(self.session.params()), "", f"created_{position}")
        format = format_for(value, width)
        return PackedState.pack(value, format, **self.session.rounding_options(source))

    def _look(self, args: Sequence[Any], created: dict[int, Tensor]) -> None:
        """Measure the states as they are before the step, for the planner."""
        session, planner = self.session, self.session.planner
        assert planner is not None
        if self.measuring is None:
            with reporting_defects(session, self.front[0].program):
                units = self._measuring_units()
            self.measuring = [MeasuringBucket(unit, self._resolve) for unit in units]
        sums: Sums = {}
        numbers = {k: v for region in self.cut_regions for k, v in region.numbers().items()}
        for bucket in self.measuring:
            bucket.fill(args, created)
            bucket.place(numbers)
            sums |= bucket.look(planner.looks)
        calibrating = planner.calibrating
        params, rounding = session.params(), session.options.rounding

        def live_now(operand: Operand) -> Any:
            if operand.role is Role.INTERMEDIATE:
                return numbers[operand.source.param, operand.name]
            return live(operand, self._resolve(operand), args)

        program, seed = _measurable(self.planned_program, sums), session.seed
        direct = measure_in_turn(program, planner, live_now, len(params), seed, rounding)
        for param, row in direct.items():
            sums[param] |= row
        sums, session.look_bytes = add_up(sums, params)
        finite = {param: row for param, row in sums.items() if not row[SPOILED]}
        with planner.attempt():
            planner.look(finite, forgetting(program, live_now))
            errors = perturbations({param: r for param, r in finite.items() if resolved(r)})
            planner.compare(errors, session.steps)
            if calibrating:
                planner.observe(errors)

    def _measuring_units(self) -> list[Unit]:
        session = self.session
        if self.measured is None:  # it depends on no format: traced once
            rounding = session.options.rounding
            folder = session.dump.folder("measure")
            self.measured = measuring_program(self.planned_program, rounding, folder)
        folder = session.dump.folder("generate_measuring")
        return generate_measuring(self.measured, session.format_of, folder).units

    def _create(self, operand: Operand) -> Tensor:
        format = self._formats.get(operand.returned, FLOAT32)
        state: Tensor
        if format == FLOAT32 and operand.returned not in self._packed_wide:
            state = torch.empty_strided(
                operand.shape, operand.stride, dtype=operand.dtype, device=operand.device
            )
        else:
            like = torch.empty_strided(
                operand.shape, operand.stride, dtype=operand.dtype, device="meta"
            )
            options = self.session.storage_options(operand.source, operand.region)
            state = PackedState.zeros_like(like, format, device=operand.device, **options)
        if operand.region is None:
            return state
        return wrap(state, self.session.params()[operand.source.param])


def _measurable(program: Program, sums: Sums) -> Program:
    """The program without the parameters of cut regions that were not looked at."""
    units = []
    for unit in program.units:
        if unit.rest is not None:
            unit = unit.of([i for i in unit.instances if i.param.source.param in sums])
        if unit.instances:
            units.append(unit)
    return Program(program.optimizer, tuple(units))

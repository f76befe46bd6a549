"""`CompiledStep`: one captured step with the kernels for the widths in use.

It holds the templates, the live objects behind their operands and the tables of tensors that the
kernels run on; which width a state has is the `Session`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from stq_compile.capture import Argument, Captured
from stq_compile.compiler import (
    Generated,
    Unit,
    generate,
    generate_measuring,
    measuring_program,
)
from stq_compile.formats import FLOAT32, Format
from stq_compile.options import Options
from stq_compile.packed_state import PackedState
from stq_compile.passes.numbers import shared_results
from stq_compile.passes.runner import Stage
from stq_compile.planner.direct import measure_directly
from stq_compile.planner.planner import Planner
from stq_compile.rounding import mixed_step
from stq_compile.runtime import Bucket, MeasuringBucket, present
from stq_compile.step_graph import Facts, Operand, Program, Role, Source, StepGraph
from stq_compile.storage import PackedStorage

StateKey = tuple[int, str]
"""A state: (number of its parameter over all groups, its key)."""


@dataclass
class StateInfo:
    """What the compiler knows about one state of one parameter."""

    source: Source
    format: Format
    facts: Facts
    reason: str = ""


class Owner(Protocol):
    """What a step needs of the session that it belongs to."""

    options: Options
    dump: Path | None
    seed: int
    steps: int
    compiles: int
    info: dict[StateKey, StateInfo]
    planner: Planner | None

    @property
    def optimizer(self) -> Optimizer: ...
    def params(self) -> list[Tensor]: ...
    def format_of(self, operand: Operand, unit: StepGraph) -> Format: ...
    def pack(self, value: Tensor, source: Source, format: Format) -> PackedState: ...
    def storage_options(self, source: Source) -> dict[str, Any]: ...
    def replan(self) -> None: ...


class CompiledStep:
    """One captured graph: templates, live objects, and the buckets for the widths in use."""

    def __init__(self, session: Owner, captured: Captured, stages: list[Stage]) -> None:
        self.session = session
        self.number = session.compiles
        self.bindings = captured.bindings
        self.attributes = captured.attributes
        self.front = stages
        self.stages = stages
        self.buckets: list[Bucket] = []
        self.measured: Program | None = None
        self.measuring: list[MeasuringBucket] | None = None
        self.created: list[Operand] = []
        self.shared = shared_results(captured.program.units[0])

    @property
    def program(self) -> Program:
        """The templates, before formats."""
        return self.front[-1].program

    def generate(self) -> Generated:
        """Compile kernels for the widths in force; changes nothing."""
        session = self.session
        return generate(self.program, session.format_of, session.options.rounding, session.dump)

    def adopt(self, generated: Generated) -> None:
        """Bring the states into the formats generated for, and use these from the next step on."""
        self._commit(self._wanted())
        self._build_buckets(generated.units)
        self.stages = [*self.front, *generated.stages[1:]]

    def release(self, gm: fx.GraphModule) -> None:
        """Let Dynamo's module hold the packed states, so that the float32 ones are freed."""
        for key, target in self.attributes.items():
            value = self._live(key)
            if isinstance(value, PackedState):
                setattr(gm, target, value)

    def _live(self, key: tuple[Role, Source]) -> Tensor | None:
        """The object that the optimizer holds."""
        binding = self.bindings[key]
        return binding.live if isinstance(binding, Argument) else binding

    def _wanted(self) -> list[tuple[Operand, StateInfo]]:
        session = self.session
        found = []
        for unit in self.program.units:
            for instance in unit.instances:
                for operand in instance.operands:
                    if operand.role is Role.STATE and operand.shape != ():
                        format = session.format_of(operand, unit)
                        reason = unit.facts.fragile.get(operand.source.key, "")
                        info = StateInfo(operand.source, format, unit.facts, reason)
                        found.append((operand, info))
        return found

    def _commit(self, wanted: list[tuple[Operand, StateInfo]]) -> None:
        """Pack and re-encode; normalizers before the states that they divide."""
        session = self.session
        for operand, info in sorted(wanted, key=lambda pair: pair[1].format.normalized):
            if operand.returned >= 0:
                continue
            where = (Role.STATE, operand.source)
            value = self._live(where)
            if not isinstance(value, PackedState):
                if info.format == FLOAT32:
                    session.info[(operand.source.param, operand.source.key)] = info
                    continue
                assert isinstance(value, Tensor)
                value = session.pack(value, operand.source, info.format)
                self._replace_state(operand.source, value)
            storage = value.packed
            for name, option in session.storage_options(operand.source).items():
                setattr(storage, name, option)
            storage.reencode(info.format, self._normalizer(operand.source, info))
            session.info[(operand.source.param, operand.source.key)] = info

    def _normalizer(self, source: Source, info: StateInfo) -> PackedStorage | None:
        if not info.format.normalized:
            return None
        key = info.facts.normalizers[source.key]
        other = self._live((Role.STATE, Source(source.param, source.name, key)))
        assert isinstance(other, PackedState)
        return other.packed

    def _replace_state(self, source: Source, value: PackedState) -> None:
        """Put a packed state where the float32 one was; the latter is dropped."""
        binding = self.bindings[(Role.STATE, source)]
        if isinstance(binding, Argument):
            self.bindings[(Role.STATE, source)] = Argument(binding.position, value)
        else:
            self.bindings[(Role.STATE, source)] = value
        entries = self.session.optimizer.state[self.session.params()[source.param]]
        key = next((k for k in entries if str(k) == source.key), source.key)
        entries[key] = value

    def _build_buckets(self, units: list[Unit]) -> None:
        self.buckets = [Bucket(unit, self._resolve) for unit in units]
        self.measuring = None
        self.created = [
            operand
            for unit in self.program.units
            for instance in unit.instances
            for operand in instance.operands
            if operand.returned >= 0
        ]
        self._formats = {
            o.returned: self.session.format_of(o, u)
            for u in self.program.units
            for i in u.instances
            for o in i.operands
            if o.returned >= 0 and o.shape != ()
        }

    def _resolve(self, operand: Operand) -> Any:
        if operand.returned >= 0 or operand.role is Role.SUMS:
            return None
        role = Role.STATE if operand.role in (Role.CODES, Role.SCALES, Role.KEY) else operand.role
        return self.bindings[(role, operand.source)]

    def __call__(self, *args: Tensor) -> tuple[Any, ...]:
        session = self.session
        created: dict[int, Any] = {o.returned: self._create(o) for o in self.created}
        shared = self._shared_results(args)
        step = mixed_step(session.seed, session.steps)
        for bucket in self.buckets:
            bucket.fill(args, created)
        looks = session.planner is not None and session.planner.due(session.steps + 1)
        if looks:
            self._look(args, created)
        written = [tensor for bucket in self.buckets for tensor in bucket.launch(step)]
        tracked = [tensor for tensor in written if not tensor.is_inference()]
        torch.autograd.graph.increment_version(tracked)  # autograd must see that they changed
        session.steps += 1
        if looks:
            session.replan()
        results = created | shared
        return tuple(results[i] for i in sorted(results))

    def _shared_results(self, args: Sequence[Any]) -> dict[int, Any]:
        """The step's new numbers, by output position; from its inputs before they change."""
        if self.shared is None:
            return {}
        inputs = [present(self._resolve(operand), args) for operand in self.shared.operands]
        return dict(zip(self.shared.positions, self.shared.module(*inputs), strict=True))

    def _look(self, args: Sequence[Any], created: dict[int, Tensor]) -> None:
        """Measure the states as they are before the step, for the planner."""
        session, planner = self.session, self.session.planner
        assert planner is not None
        if self.measuring is None:
            if self.measured is None:  # it depends on no format: traced once
                rounding = session.options.rounding
                self.measured = measuring_program(self.program, rounding, session.dump)
            units = generate_measuring(self.measured, session.format_of, session.dump).units
            self.measuring = [MeasuringBucket(unit, self._resolve) for unit in units]
        sums: dict[int, dict[str, float]] = {}
        for bucket in self.measuring:
            bucket.fill(args, created)
            sums |= bucket.look(planner.looks)
        calibrating = planner.calibrating
        with planner.attempt():
            planner.look(sums)
            if calibrating:
                self._measure_directly(args)

    def _measure_directly(self, args: Sequence[Any]) -> None:
        """Calibrate on samples; they are too small for a second thread to gain anything."""
        session, planner = self.session, self.session.planner
        assert planner is not None
        found: dict[StateKey, dict[int, float]] = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for unit in self.program.units:
                found |= measure_directly(
                    unit,
                    lambda operand: present(self._resolve(operand), args),
                    planner.looks,
                    session.seed,
                    session.options.rounding,
                )
        finally:
            torch.set_num_threads(threads)
        planner.observe(found)

    def _create(self, operand: Operand) -> Tensor:
        format = self._formats.get(operand.returned, FLOAT32)
        if format == FLOAT32:
            return torch.empty_strided(operand.shape, operand.stride, dtype=operand.dtype)
        like = torch.empty_strided(operand.shape, operand.stride, device="meta")
        return PackedState.zeros_like(like, format, **self.session.storage_options(operand.source))

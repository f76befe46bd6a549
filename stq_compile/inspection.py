"""A step taken through the compiler without being run: what ``stq`` and the goldens look at.

Nothing is packed and nothing is built: the optimizer's step is captured, the passes run, widths
are given as `stq_compile.compile` would give them at first, and kernels are printed.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.optim import Optimizer

from stq_compile.api import refusal
from stq_compile.birth import init_states
from stq_compile.capture import Captured, capture, param_sources, params_of
from stq_compile.checks import check_program
from stq_compile.codegen.target import CPU, Target
from stq_compile.compiler import FRONT, back, front
from stq_compile.driver import translated
from stq_compile.errors import StqError, UnsupportedOptimizerError
from stq_compile.exemplars import extend
from stq_compile.failures import reporting_defects
from stq_compile.formats import FLOAT32, Format
from stq_compile.kernels import kernel_row
from stq_compile.options import Options
from stq_compile.passes.runner import Pass, Stage, iter_passes
from stq_compile.session import Session
from stq_compile.step_graph import Operand, Program, Role, Source
from stq_compile.steps import captured_step, own_code, raw_step

LOG = logging.getLogger(__name__)

Progress = Callable[[str], AbstractContextManager[Any]]
"""Says what is being done for as long as its context is open."""

INPUT = "input"


def _silent(_: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Inspection:
    """What was found: the captured step, and the stages of its passes.

    ``refused`` is why the step cannot be compiled; the stages are then those before that.
    """

    optimizer: Optimizer
    session: Session
    captured: Captured
    stages: list[Stage]
    refused: StqError | None = None
    progress: Progress = field(default=_silent, repr=False)

    @property
    def name(self) -> str:
        return self.captured.program.optimizer

    @property
    def front(self) -> Program:
        """The analysed templates, before formats.

        Raises:
            StqError: why there are none.
        """
        if self.refused is not None:
            raise self.refused
        return next(s.program for s in self.stages if s.name == FRONT[-1].name)

    @property
    def quantized(self) -> Program:
        """The templates with formats, as kernels are made of them; raises as `front` does."""
        if self.refused is not None:
            raise self.refused
        return self.stages[-1].program

    def kernels(self, target: Target = CPU) -> list[dict[str, Any]]:
        """One row per kernel, its source included; see `stq_compile.kernels.kernel_row`."""
        rows = []
        with reporting_defects(self.session, self.captured.program):
            parts = (part for unit in self.quantized.units for part in unit.parts)
            for graph in (part for part in parts if not part.unfused):
                with self.progress(f"kernel {graph.name} for {target.name}"):
                    rows.append(kernel_row(graph, target))
        return rows

    def regions(self) -> list[dict[str, Any]]:
        """Templates that run operator by operator, outside of kernels: their states, and why.

        ``cut`` ones have kernels for what is pointwise in them.
        """
        return [
            {
                "template": unit.name,
                "tensors": len(unit.instances),
                "states": sorted(
                    {o.source.key for _, o in unit.rows() if o.role is Role.STATE and o.shape != ()}
                ),
                "matrices": dict(sorted(unit.facts.matrices.items())),
                "mixed": sorted(unit.facts.mixed),
                "reason": unit.region.unfused,
                "cut": unit.rest is not None,
            }
            for unit in self.front.units
            if unit.region is not None
        ]

    def states(self, options: Options | None = None) -> list[tuple[Operand, Format]]:
        """Every state of every parameter and its first format, in the parameters' order.

        ``options``: other ones than those that were inspected with.
        """
        session = self.session if options is None else Session(self.optimizer, options)
        if options is not None:
            session.plan_first(self.front)
        found = [
            (operand, session.format_of(operand, unit) if operand.shape != () else FLOAT32)
            for unit, operand in self.front.operands()
            if operand.role is Role.STATE
        ]
        return sorted(found, key=lambda pair: pair[0].source)


def inspect_optimizer(
    optimizer: Optimizer,
    options: Options,
    *,
    whole: bool = True,
    progress: Progress = _silent,
) -> Inspection:
    """Capture the step of ``optimizer`` and run the passes on it.

    Args:
        optimizer: is not compiled, but gets gradients and states where it has none.
        options: as of `stq_compile.compile`.
        whole: capture all parameters; otherwise one of each class of equal ones (group, shape,
            strides, dtype), whose templates then serve all. Dynamo's time grows with parameters.
        progress: told what takes time.

    Raises:
        StqError: the step cannot be captured, or the options cannot be kept to.
    """
    reason = refusal(optimizer)
    if reason:
        raise UnsupportedOptimizerError(optimizer=type(optimizer).__name__, reason=reason)
    classes = _classes(optimizer)
    chosen = {i for members in classes for i in (members if whole else members[:1])}
    sources = param_sources(optimizer)
    with _reduced(optimizer, chosen):
        _prepare(optimizer, progress)
        with progress(f"capturing {len(chosen)} parameters"):
            captured = _capture(optimizer, sources)
    if not whole:
        _share_states(optimizer, classes)
    session = Session(optimizer, options)
    found = Inspection(optimizer, session, captured, [], progress=progress)
    with reporting_defects(session, captured.program):
        try:
            program = _analyse(found, () if whole else classes)
        except StqError as error:
            found.refused = error
            return found
        session.check_precision(program)
        session.plan_first(program)
        passes = back(session.format_of, options.rounding, options.param_rounding)
        _keep(found, program, passes, "generate")
    return found


def _analyse(found: Inspection, classes: Sequence[Sequence[int]]) -> Program:
    """Run the passes that need no formats, keeping the stages that were reached."""
    program = found.captured.program
    _keep(found, program, front(found.session.options), "analyse")
    if classes:
        last = found.stages[-1]
        sources = list(param_sources(found.optimizer).values())
        found.stages[-1] = replace(
            last, program=extend(last.program, sources, classes, exemplars=1)
        )
    program = found.stages[-1].program
    check_program(program)
    return program


def _keep(found: Inspection, program: Program, passes: Sequence[Pass], run: str) -> None:
    """Append the stages of ``passes``; the program given is a stage only at the beginning."""
    with found.progress(f"passes {passes[0].name} to {passes[-1].name}"):
        for stage in iter_passes(program, passes, dump=found.session.dump.folder(run)):
            if stage.name != INPUT or not found.stages:
                found.stages.append(stage)


def _classes(optimizer: Optimizer) -> list[list[int]]:
    """Numbers of parameters that nothing but their values tells apart."""
    classes: dict[Any, list[int]] = defaultdict(list)
    number = 0
    for g, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            classes[g, p.shape, p.stride(), p.dtype, p.device, p.layout].append(number)
            number += 1
    return list(classes.values())


@contextmanager
def _reduced(optimizer: Optimizer, chosen: Collection[int]) -> Iterator[None]:
    """The optimizer with only the chosen ones of its parameters."""
    before = [dict(group) for group in optimizer.param_groups]
    first = 0
    for group in optimizer.param_groups:
        kept = [i for i in range(len(group["params"])) if first + i in chosen]
        first += len(group["params"])
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
    try:
        yield
    finally:
        for group, original in zip(optimizer.param_groups, before, strict=True):
            group.update((k, original[k]) for k in ("params", "param_names") if k in original)


def _prepare(optimizer: Optimizer, progress: Progress) -> None:
    """Give all parameters gradients and states."""
    params = params_of(optimizer)
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if all(optimizer.state.get(p) for p in params):
        return
    init_states(optimizer, sys.maxsize)
    with progress("a first step, in which states are made"), torch.no_grad():
        try:
            raw_step(type(optimizer))(optimizer)
        except DataDependentOutputException as error:
            # It needs the value of a tensor that has none; what Dynamo says of that is clearer.
            LOG.debug("%s: no first step: %s", type(optimizer).__name__, error)


class _Stop(Exception):
    """Ends a compiled step before it changes anything."""


def _capture(optimizer: Optimizer, sources: Mapping[int, Source]) -> Captured:
    """What Dynamo captures of the step, which is not run."""
    found: list[Captured] = []

    def backend(gm: Any, _: Any) -> Callable[..., Any]:
        found.append(capture(gm, optimizer, sources))
        return _stop

    step = torch.compile(own_code(captured_step(type(optimizer))), backend=backend, fullgraph=True)
    try:
        with torch.no_grad():
            step(optimizer)
    except _Stop:
        return found[0]
    except Exception as error:
        known = translated(error, type(optimizer))
        if known is None:
            raise
        raise known from error
    raise UnsupportedOptimizerError(
        optimizer=type(optimizer).__name__, reason="its step does nothing to its parameters"
    )


def _stop(*_: Any) -> Any:
    raise _Stop


def _share_states(optimizer: Optimizer, classes: Sequence[Sequence[int]]) -> None:
    """Let all parameters of a class have the states of the first, so that sizes add up."""
    params = params_of(optimizer)
    for first, *others in classes:
        entries: Mapping[str, Tensor] = optimizer.state.get(params[first], {})
        for i in others:
            optimizer.state[params[i]] = dict(entries)

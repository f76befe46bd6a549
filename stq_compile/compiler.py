"""The pipeline, top to bottom: from a captured program to compiled kernels.

``FRONT`` needs the graph alone and runs once per capture. ``BACK`` needs the formats too and runs
again, without Dynamo, whenever the widths change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from stq_compile.codegen.backend import backend_of
from stq_compile.codegen.executable import Executable
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.lower import lower, why_not
from stq_compile.codegen.tabulate import tabulate
from stq_compile.codegen.target import CPU, Target
from stq_compile.codegen.verify import verify_kernel
from stq_compile.formats import FLOAT32
from stq_compile.options import Options, ParamRounding, Rounding
from stq_compile.passes.compensate import compensate
from stq_compile.passes.cut import cut
from stq_compile.passes.expand_foreach import expand_foreach
from stq_compile.passes.feed import feed
from stq_compile.passes.fold import fold
from stq_compile.passes.functionalize import functionalize
from stq_compile.passes.matrices import find_matrices
from stq_compile.passes.measure import measure
from stq_compile.passes.mixed import find_mixed
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.partition import partition
from stq_compile.passes.quantize import FormatOf, insert_quantize
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.passes.round_params import round_params
from stq_compile.passes.runner import Pass, Stage, run_passes
from stq_compile.passes.split import split
from stq_compile.passes.widen import widen
from stq_compile.step_graph import Program, StepGraph

FRONT: Sequence[Pass] = (
    Pass("expand_foreach", expand_foreach),
    Pass("split", split),
    Pass("fold", fold),
    Pass("widen", widen),
    Pass("functionalize", partial(functionalize, why_not=why_not)),
    Pass("matrices", find_matrices),
    Pass("mixed", find_mixed),
    Pass("cut", partial(cut, why_not=why_not)),
    Pass("ranges", find_ranges),
    Pass("normalizers", find_normalizers),
    Pass("recurrences", find_recurrences),
)


def front(options: Options) -> Sequence[Pass]:
    """``FRONT`` for these options.

    Without ``widen`` where 16-bit parameters are to be rounded as torch does.
    """
    passes = [p for p in FRONT if p.run is not widen or not options.as_torch_rounds]
    if options.precision != FLOAT32.width:
        return passes
    exact = Pass("functionalize", partial(functionalize, why_not=why_not, exact=True))
    return [exact if p.name == exact.name else p for p in passes]


PARAM_PASSES: Mapping[ParamRounding, Sequence[Pass]] = {
    "nearest": (),  # what the store of an element does
    "stochastic": (Pass("round_params", round_params),),
    "compensated": (Pass("compensate", compensate),),
}


def back(
    format_of: FormatOf, rounding: Rounding, param_rounding: ParamRounding = "nearest"
) -> Sequence[Pass]:
    """The passes that depend on the formats."""
    return (
        *PARAM_PASSES[param_rounding],
        Pass("quantize", partial(insert_quantize, format_of=format_of, rounding=rounding)),
        Pass("partition", partition),
        Pass("feed", feed),
    )


@dataclass(frozen=True)
class Unit:
    """One template at one assignment of formats, compiled, and the kernels that feed its rest."""

    graph: StepGraph
    kernel: Kernel
    compiled: Executable
    feeds: tuple[Unit, ...] = ()


def analyse(program: Program, options: Options, dump: Path | None = None) -> list[Stage]:
    """Run the front passes; the last stage holds one unit per template."""
    return run_passes(program, front(options), dump=dump)


@dataclass(frozen=True)
class Generated:
    """The back passes' stages, and the kernels of their last one; regions have none."""

    stages: list[Stage]
    units: list[Unit]


def generate(
    program: Program, format_of: FormatOf, options: Options, dump: Path | None = None
) -> Generated:
    """Quantize every template at the formats given and compile its kernels."""
    passes = back(format_of, options.rounding, options.param_rounding)
    return _compile(program, passes, dump)


def measuring_program(program: Program, rounding: Rounding, dump: Path | None = None) -> Program:
    """The graphs that measure every template, before formats."""
    passes = (Pass("measure", partial(measure, rounding=rounding)),)
    fused = tuple(unit for unit in program.units if not unit.unfused)
    return run_passes(Program(program.optimizer, fused), passes, dump=dump)[-1].program


def generate_measuring(
    program: Program, format_of: FormatOf, dump: Path | None = None
) -> Generated:
    """Compile the kernels of a `measuring_program` at the formats given.

    They only read, so they need no random numbers: nothing is written back.
    """
    return _compile(program, back(format_of, "nearest"), dump)


def _compile(program: Program, passes: Sequence[Pass], dump: Path | None) -> Generated:
    stages = run_passes(program, passes, dump=dump)
    fused = [unit for unit in stages[-1].program.units if not unit.unfused]
    units: list[Unit] = []
    for device in dict.fromkeys(unit.device for unit in fused):
        mine = [unit for unit in fused if unit.device == device]
        graphs = [graph for unit in mine for graph in (unit, *unit.feeds)]
        target = backend_of(device).target(device)
        kernels = [lower_kernel(graph, target) for graph in graphs]
        distinct = {_text(kernel): kernel for kernel in reversed(kernels)}
        built = compile_kernels(list(distinct.values()), device, dump)
        found = dict(zip(distinct, built, strict=True))
        compiled = [found[_text(kernel)] for kernel in kernels]
        made = iter([Unit(*parts) for parts in zip(graphs, kernels, compiled, strict=True)])
        for unit in mine:
            whole = next(made)
            feeds = tuple(next(made) for _ in unit.feeds)
            units.append(dataclasses.replace(whole, feeds=feeds))
    return Generated(stages, units)


def _text(kernel: Kernel) -> tuple[object, ...]:
    """A kernel but for its name: those of a region that is traced for every shape may be equal."""
    return kernel.operands, str(kernel).partition("(")[2]


def compile_kernels(
    kernels: Sequence[Kernel], device: torch.device, dump: Path | None = None
) -> list[Executable]:
    """Emit and build for a device, by its backend."""
    backend = backend_of(device)
    if dump is not None:
        for kernel in kernels:
            (dump / f"{kernel.name}{backend.suffix}").write_text(backend.emit(kernel))
    return backend.compile(kernels, device)


def lower_kernel(graph: StepGraph, target: Target = CPU) -> Kernel:
    """The verified kernel of a quantized and partitioned unit."""
    return for_target(lower(graph, resident=target.is_gpu), target)


def for_target(kernel: Kernel, target: Target) -> Kernel:
    """A kernel as the target is to have it."""
    target.check(kernel)
    if target.tables:
        kernel = tabulate(kernel)
        verify_kernel(kernel)
    return kernel

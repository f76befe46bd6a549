"""The pipeline, top to bottom: from a captured program to compiled kernels.

``FRONT`` needs the graph alone and runs once per capture. ``BACK`` needs the formats too and runs
again, without Dynamo, whenever the widths change.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stq_compile.codegen.cpp.build import CompiledKernel, build
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.lower import lower, why_not
from stq_compile.codegen.tabulate import tabulate
from stq_compile.codegen.target import CPU, Target
from stq_compile.codegen.verify import verify_kernel
from stq_compile.options import Rounding
from stq_compile.passes.expand_foreach import expand_foreach
from stq_compile.passes.fold import fold
from stq_compile.passes.functionalize import functionalize
from stq_compile.passes.measure import measure
from stq_compile.passes.normalizers import find_normalizers
from stq_compile.passes.partition import partition
from stq_compile.passes.quantize import FormatOf, insert_quantize
from stq_compile.passes.ranges import find_ranges
from stq_compile.passes.recurrences import find_recurrences
from stq_compile.passes.runner import Pass, Stage, run_passes
from stq_compile.passes.split import split
from stq_compile.step_graph import Program, StepGraph

FRONT: Sequence[Pass] = (
    Pass("expand_foreach", expand_foreach),
    Pass("split", split),
    Pass("fold", fold),
    Pass("functionalize", partial(functionalize, why_not=why_not)),
    Pass("ranges", find_ranges),
    Pass("normalizers", find_normalizers),
    Pass("recurrences", find_recurrences),
)


def back(format_of: FormatOf, rounding: Rounding) -> Sequence[Pass]:
    """The passes that depend on the formats."""
    return (
        Pass("quantize", partial(insert_quantize, format_of=format_of, rounding=rounding)),
        Pass("partition", partition),
    )


@dataclass(frozen=True)
class Unit:
    """One template at one assignment of formats, compiled."""

    graph: StepGraph
    kernel: Kernel
    compiled: CompiledKernel


def analyse(program: Program, dump: Path | None = None) -> list[Stage]:
    """Run the front passes; the last stage holds one unit per template."""
    return run_passes(program, FRONT, dump=dump)


@dataclass(frozen=True)
class Generated:
    """The back passes' stages, and the kernels of their last one; regions have none."""

    stages: list[Stage]
    units: list[Unit]


def generate(
    program: Program, format_of: FormatOf, rounding: Rounding, dump: Path | None = None
) -> Generated:
    """Quantize every template at the formats given and compile its kernels."""
    return _compile(program, back(format_of, rounding), dump)


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
    graphs = [unit for unit in stages[-1].program.units if not unit.unfused]
    kernels = [lower_kernel(graph) for graph in graphs]
    if dump is not None:
        for kernel in kernels:
            (dump / f"{kernel.name}.cpp").write_text(emit(kernel))
    compiled = compile_kernels(kernels)
    units = [Unit(*parts) for parts in zip(graphs, kernels, compiled, strict=True)]
    return Generated(stages, units)


def compile_kernels(kernels: Sequence[Kernel]) -> list[CompiledKernel]:
    """Emit and build, several at a time: the C++ compiler runs in processes of its own."""
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        # torch's settings (which compiler to take) are those of a context.
        jobs = [pool.submit(copy_context().run, build, k.name, emit(k), stop) for k in kernels]
        try:
            return [job.result() for job in jobs]
        except BaseException:  # Ctrl-C too: it does not reach the compilers by itself
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def lower_kernel(graph: StepGraph, target: Target = CPU) -> Kernel:
    """The verified kernel of a quantized and partitioned unit."""
    kernel = lower(graph)
    target.check(kernel)
    if target.tables:
        kernel = tabulate(kernel)
        verify_kernel(kernel)
    return kernel

"""The kernels of a compiled step on any target, with what is known of each: ``stq kernels``."""

from __future__ import annotations

import re
from typing import Any

from stq_compile.codegen.cpp.emit import emit as emit_cpp
from stq_compile.codegen.lower import bytes_per_element
from stq_compile.codegen.target import CPU, Target
from stq_compile.codegen.triton.emit import emit as emit_triton
from stq_compile.codegen.triton.report import static_report
from stq_compile.compiler import lower_kernel
from stq_compile.step_graph import StepGraph


def kernel_row(graph: StepGraph, target: Target = CPU) -> dict[str, Any]:
    """The kernel of a quantized unit; what only a GPU's compiler knows is None for the CPU."""
    row = _gpu_row(graph, target) if target.is_gpu else _cpu_row(graph)
    return {**row, "tensors": len(graph.instances)}


def _cpu_row(graph: StepGraph) -> dict[str, Any]:
    kernel = lower_kernel(graph)
    widths = {o.name.removesuffix("_codes"): o.width for o in kernel.operands if o.width}
    unknown = dict.fromkeys(("registers", "spill_bytes", "shared_bytes", "barriers"))
    return {
        "name": kernel.name,
        "template": template_of(graph),
        "widths": widths,
        "target": CPU.name,
        **unknown,
        "bytes_per_param": bytes_per_element(kernel),
        "source": emit_cpp(kernel),
    }


def _gpu_row(graph: StepGraph, target: Target) -> dict[str, Any]:
    kernel = lower_kernel(graph, target)
    return static_report(kernel, emit_triton(kernel), template_of(graph), target).as_dict()


def template_of(graph: StepGraph) -> str:
    """A quantized unit is named after its template, with its formats behind."""
    return re.sub(r"^(template_\d+).*", r"\1", graph.name)

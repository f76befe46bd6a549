"""The kernels of a compiled step on any target, with what is known of each: ``stq kernels``."""

from __future__ import annotations

from typing import Any

from stq_compile.codegen.ir import OperandKind
from stq_compile.codegen.lower import bytes_per_element
from stq_compile.codegen.target import CPU, Target
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.report import static_report
from stq_compile.compiled_step import CompiledStep
from stq_compile.compiler import Unit, lower_kernel


def kernel_rows(step: CompiledStep, target: Target = CPU) -> list[dict[str, Any]]:
    """One row per kernel; what only a GPU's compiler knows is None for the CPU."""
    templates = [unit.name for unit in step.program.units]
    rows = []
    for bucket in step.buckets:
        template = _template_of(bucket.unit, templates)
        if target.is_gpu:
            row = _gpu_row(bucket.unit, template, target)
        else:
            row = _cpu_row(bucket.unit, template)
        rows.append({**row, "tensors": len(bucket.instances)})
    return rows


def _cpu_row(unit: Unit, template: str) -> dict[str, Any]:
    widths = {
        o.name.removesuffix("_codes"): o.width
        for o in unit.kernel.operands
        if o.kind in (OperandKind.CODES, OperandKind.HALVES)
    }
    unknown = dict.fromkeys(("registers", "spill_bytes", "shared_bytes", "barriers"))
    return {
        "name": unit.kernel.name,
        "template": template,
        "widths": widths,
        "target": CPU.name,
        **unknown,
        "bytes_per_param": bytes_per_element(unit.kernel),
        "source": unit.compiled.source,
    }


def _gpu_row(unit: Unit, template: str, target: Target) -> dict[str, Any]:
    kernel = lower_kernel(unit.graph, target)
    return static_report(kernel, emit(kernel), template, target).as_dict()


def _template_of(unit: Unit, templates: list[str]) -> str:
    """A quantized unit is named after its template, with its formats behind."""
    return max((t for t in templates if unit.graph.name.startswith(t)), key=len)

"""The static report of a kernel: what it needs of a GPU and how long it should take, unseen.

Bandwidth and the rate of float32 instructions are the vendors' figures: NVIDIA A100 80GB SXM data
sheet (2,039 GB/s; 19.5 TFLOPS, two operations a fused multiply-add), NVIDIA H100 SXM data sheet
(3.35 TB/s; 67 TFLOPS), AMD Instinct MI300X data sheet (5.3 TB/s; 163.4 TFLOPS with two
instructions issued at a time, so a quarter of that many instructions).

A kernel takes at least the time of its bytes and at least the time of its instructions. Nothing
here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.lower import bytes_per_element
from stq_compile.codegen.target import Target
from stq_compile.codegen.triton.aot import Resources, compile_for
from stq_compile.codegen.triton.kernel import WARPS
from stq_compile.codegen.triton.text import Emitted
from stq_compile.formats import BLOCK

FUSED_FLOAT32_BYTES = 28.0
"""AdamW with float32 states reads 4 and writes 3 numbers of 4 bytes per parameter."""


@dataclass(frozen=True)
class Machine:
    """A GPU: bytes and lane-instructions per nanosecond; registers and warps of each processor."""

    name: str
    target: str
    bandwidth: float
    instructions: float
    registers: int = 65536
    warps: int = 64


MACHINES = (
    Machine("A100", "cuda:80", 2039.0, 9750.0),
    Machine("H100", "cuda:90", 3350.0, 33500.0),
    Machine("MI300X", "hip:gfx942", 5300.0, 40850.0, registers=131072, warps=32),
)


@dataclass(frozen=True)
class StaticReport:
    """One kernel on one target; times in nanoseconds per parameter."""

    name: str
    template: str
    widths: dict[str, int]
    target: str
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    barriers: int
    widest_access_bits: int
    bytes_per_param: float
    counted_bytes_per_param: float | None
    fused_float32_bytes_per_param: float
    instructions_per_param: float
    occupancy_limit: float | None
    memory_time: dict[str, float]
    instruction_time: dict[str, float]
    fused_float32_time: dict[str, float]
    compile_seconds: float
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def static_report(kernel: Kernel, emitted: Emitted, template: str, target: Target) -> StaticReport:
    """Compile ``emitted`` for ``target`` and read off what it uses."""
    resources = compile_for(emitted, target)
    moved = bytes_per_element(kernel)
    per_thread = target.blocks_per_warp * BLOCK / target.lanes
    instructions = resources.instructions / per_thread
    machines = [m for m in MACHINES if m.target == target.name]
    return StaticReport(
        name=kernel.name,
        template=template,
        widths={o.name.removesuffix("_codes"): o.width for o in kernel.operands if o.width},
        target=target.name,
        registers=resources.registers,
        spill_bytes=resources.spill_bytes,
        local_bytes=resources.local_bytes,
        shared_bytes=resources.shared_bytes,
        barriers=resources.barriers,
        widest_access_bits=max(units * bits for _, units, bits, _ in resources.accesses),
        bytes_per_param=round(moved, 4),
        counted_bytes_per_param=_counted(resources, target),
        fused_float32_bytes_per_param=FUSED_FLOAT32_BYTES,
        instructions_per_param=round(instructions, 1),
        occupancy_limit=_occupancy(resources, machines[0]) if machines else None,
        memory_time={m.name: _round(moved / m.bandwidth) for m in machines},
        instruction_time={m.name: _round(instructions / m.instructions) for m in machines},
        fused_float32_time={m.name: _round(FUSED_FLOAT32_BYTES / m.bandwidth) for m in machines},
        compile_seconds=round(resources.seconds, 2),
        source=emitted.source,
    )


def _round(x: float) -> float:
    return float(f"{x:.3g}")


def _counted(resources: Resources, target: Target) -> float | None:
    """Bytes per parameter by the memory instructions of a thread; None where they were not split.

    A thread has 4 lanes of every plane of one block. Its 64-bit loads are the table's, once per
    program; a scale word is loaded once and stored by one of 4 instructions, for its block.
    """
    if not target.name.startswith("cuda"):
        return None
    elements = target.blocks_per_warp * BLOCK / target.lanes
    tile = elements * target.lanes * WARPS
    total = 0.0
    for kind, units, bits, count in resources.accesses:
        size = count * units * bits / 8
        if bits == 16:
            total += size / BLOCK / (4 if kind == "store" else 1)
        elif bits == 64:
            total += size / tile
        else:
            total += size / elements
    return round(total, 4)


def _occupancy(resources: Resources, machine: Machine) -> float:
    """The share of a multiprocessor's warps that its registers allow; programs are whole."""
    granted = -(-resources.registers // 8) * 8
    threads = 64 if machine.target.startswith("hip") else 32
    warps = machine.registers // (granted * threads) // WARPS * WARPS
    return min(warps, machine.warps) / machine.warps

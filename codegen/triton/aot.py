"""Compiling for a GPU that is not there, and reading what came out: `compile_for`."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stq_compile.codegen.target import Target
from stq_compile.codegen.triton.kernel import (
    CUDA_OPTIONS,
    MEASURE_OPTIONS,
    MEASURED_BLOCKS,
    OPTIONS,
    SCALAR_ROWS,
    WARPS,
)
from stq_compile.codegen.triton.load import load, require_triton
from stq_compile.codegen.triton.text import Emitted
from stq_compile.errors import TritonCompileError

POINTER, INTEGER, CONSTANT = "*i64", "i32", "constexpr"
UPDATE = {"table": POINTER, "slots": POINTER, "tiles": POINTER, "borders": INTEGER}
SCALARS = {"table": POINTER, "slots": POINTER, "clock": POINTER, "rows": INTEGER}
MEASURE = {"table": POINTER, "slots": POINTER, "tiles": POINTER, "sums": "*fp64"}


@dataclass(frozen=True)
class Resources:
    """What a compiled function uses; bytes of stack hold spilled registers."""

    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    barriers: int
    instructions: int
    accesses: tuple[tuple[str, int, int, int], ...]
    """(``load`` or ``store``, units, bits of a unit, how many such accesses), per thread."""
    seconds: float
    """Processor time of the compilation."""
    assembly: str
    """PTX, or AMD's assembly."""


def compile_for(
    emitted: Emitted, target: Target, *, function: str = "update", vector: int = 4
) -> Resources:
    """Compile one function ahead of time; raises `TritonCompileError`."""
    triton = require_triton()
    importlib.import_module("triton.backends.compiler")
    module = load(emitted.source)
    backend, _, arch = target.name.partition(":")
    gpu = triton.backends.compiler.GPUTarget(
        backend, int(arch) if backend == "cuda" else arch, target.lanes
    )
    options = OPTIONS
    if function == "scalars":
        signature, constants = SCALARS, {"ROWS": SCALAR_ROWS, "CHUNKS": 1}
    elif function == "measure":
        signature, constants = MEASURE, {"BLOCKS": MEASURED_BLOCKS}
        options = MEASURE_OPTIONS
    else:
        blocks = target.blocks_per_warp * WARPS
        alignment = 16 if vector == 4 else 1
        signature = UPDATE
        constants = {"BLOCKS": blocks, "VECTOR": vector, "ALIGNMENT": alignment}
        options = CUDA_OPTIONS if backend == "cuda" else OPTIONS
    source = triton.compiler.ASTSource(
        fn=getattr(module, function),
        signature={**signature, **dict.fromkeys(constants, CONSTANT)},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    start = _processor_seconds()
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # of many classes, some of them not Triton's own
        raise TritonCompileError(kernel=emitted.name, target=target.name, output=error) from error
    seconds = _processor_seconds() - start
    read = _cuda_resources if backend == "cuda" else _hip_resources
    return read(compiled, seconds)


def _processor_seconds() -> float:
    """Of this process and of the assembler that it ran: what else runs here does not count."""
    return sum(os.times()[:4])


def _cuda_resources(compiled: Any, seconds: float) -> Resources:
    ptx: str = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        assembly = _tool("nvdisasm", str(cubin))
    number = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=number["REG"],
        spill_bytes=number["STACK"],
        local_bytes=number["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        barriers=len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", ptx)),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[@A-Z][^\n]*;", assembly)),
        accesses=_accesses(re.findall(r"\b(ld|st)\.global\w*\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)),
        seconds=seconds,
        assembly=ptx,
    )


def _hip_resources(compiled: Any, seconds: float) -> Resources:
    text: str = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

    sizes = {"dword": 1, "dwordx2": 2, "dwordx3": 3, "dwordx4": 4, "b32": 1, "b64": 2, "b128": 4}
    found = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text)
    accesses = [
        ("ld" if kind == "load" else "st", str(sizes.get(s, 1)), _unit(s, sizes))
        for kind, s in found
    ]
    lines = [line.strip() for line in text.splitlines()]
    return Resources(
        registers=field("vgpr_count"),
        spill_bytes=4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
        local_bytes=field("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        barriers=len(re.findall(r"\bs_barrier\b", text)),
        instructions=sum(bool(re.match(r"[vs]_|global_|buffer_|ds_", line)) for line in lines),
        accesses=_accesses(accesses),
        seconds=seconds,
        assembly=text,
    )


def _unit(suffix: str, words: dict[str, int]) -> str:
    """Bits of the unit of an AMD access: dwords, or what is smaller than one."""
    if suffix in words:
        return "32"
    return "8" if "byte" in suffix or suffix.endswith("8") else "16"


def _accesses(found: list[tuple[str, str, str]]) -> tuple[tuple[str, int, int, int], ...]:
    counts: dict[tuple[str, int, int], int] = {}
    for kind, vector, bits in found:
        key = ("load" if kind == "ld" else "store", int(vector or 1), int(bits))
        counts[key] = counts.get(key, 0) + 1
    return tuple((*key, n) for key, n in sorted(counts.items()))


def _tool(name: str, *arguments: str) -> str:
    """The output of a CUDA tool that comes with Triton."""
    place = Path(require_triton().__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(place), *arguments], capture_output=True, text=True, check=True)
    return done.stdout

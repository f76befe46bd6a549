"""Kernels for another processor: cross-compiled for aarch64 (NEON) and run in an emulator.

Zig's Clang compiles and links statically against musl; Unicorn executes. Memory of the emulated
process is copied in before a call, and what the kernel declares as written is copied back.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile
from unicorn import UC_ARCH_ARM64, UC_MODE_ARM, Uc
from unicorn.arm64_const import (
    UC_ARM64_REG_CPACR_EL1,
    UC_ARM64_REG_LR,
    UC_ARM64_REG_SP,
    UC_ARM64_REG_X0,
    UC_ARM64_REG_X1,
    UC_ARM64_REG_X2,
    UC_ARM64_REG_X3,
    UC_ARM64_REG_X4,
)

from stq_compile.codegen.cpp.build import FLAGS
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.executable import Sums, Table
from stq_compile.codegen.ir import Kernel, KernelOperand, OperandKind
from stq_compile.formats import block_count

ARGUMENTS = (
    UC_ARM64_REG_X0,
    UC_ARM64_REG_X1,
    UC_ARM64_REG_X2,
    UC_ARM64_REG_X3,
    UC_ARM64_REG_X4,
)
PAGE = 1 << 16
STACK, STACK_BYTES = 0x10_0000_0000, 1 << 20
STOP = 0x20_0000_0000
"""Where a function returns to; nothing is there."""
HEAP, HEAP_BYTES = 0x30_0000_0000, 1 << 24
FMUL_4S, FMUL_4S_MASK = 0x6E20DC00, 0xFFE0FC00
"""The encoding of ``fmul vd.4s, vn.4s, vm.4s``, and which of its bits are no registers."""


@dataclass(frozen=True)
class EmulatedKernel:
    """A `stq_compile.codegen.executable.Executable` for aarch64."""

    kernel: Kernel
    source: str
    binary: Path

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def row_bytes(self) -> int:
        return _Process(self.binary).call("row_bytes")

    def bind(self, table: Table, sums: Sums | None = None) -> EmulatedRun:
        return EmulatedRun(self, table)

    def vector_products(self) -> int:
        """Instructions in the code that multiply four floats by four."""
        with self.binary.open("rb") as file:
            text = ELFFile(file).get_section_by_name(".text").data()
        words = struct.unpack(f"<{len(text) // 4}I", text)
        return sum(word & FMUL_4S_MASK == FMUL_4S for word in words)


@dataclass(frozen=True)
class EmulatedRun:
    """A call of ``run`` in a fresh process."""

    kernel: EmulatedKernel
    table: Table

    def prepare(self) -> None:
        pass

    def replayed(self) -> int:
        return 0

    def __call__(self, step: int) -> None:
        process = _Process(self.kernel.binary)
        rows, written = self.table.copy(), []
        operands = self.kernel.kernel.operands
        for row in rows:
            numel = int(row[len(operands)])
            for column, operand in enumerate(operands):
                size = _bytes(operand, numel)
                if size and row[column]:  # an operand of no elements has no address
                    host, row[column] = int(row[column]), process.room(size)
                    process.memory.mem_write(int(row[column]), ctypes.string_at(host, size))
                    written += [(host, int(row[column]), size)] * operand.written
        table = process.room(rows.nbytes)
        process.memory.mem_write(table, rows.tobytes())
        scratch = process.room(process.call("scratch_bytes", len(rows), 1))
        process.call("run", table, len(rows), step, 1, scratch)
        for host, guest, size in written:
            ctypes.memmove(host, bytes(process.memory.mem_read(guest, size)), size)


def _bytes(operand: KernelOperand, numel: int) -> int:
    """Bytes of a tensor's operand in memory; 0 if the table holds its value."""
    if operand.kind in (OperandKind.NUMBER, OperandKind.KEY):
        return 0
    blocks = block_count(numel)
    sizes = {
        OperandKind.CODES: blocks * 16 * operand.width,
        OperandKind.WORDS: blocks * 2,
        OperandKind.SCALAR: 4,
    }
    return sizes.get(operand.kind, numel * operand.bytes)


class _Process:
    """A program in memory, its constructors run."""

    def __init__(self, binary: Path) -> None:
        self.memory: Any = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.memory.reg_write(UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector instructions do not trap
        self.memory.mem_map(STACK, STACK_BYTES)
        self.memory.mem_map(HEAP, HEAP_BYTES)
        self.memory.mem_map(STOP, PAGE)
        self.free = HEAP
        with binary.open("rb") as file:
            elf = ELFFile(file)
            self._load(elf)
            table = elf.get_section_by_name(".symtab")
            self.symbols = {s.name: int(s["st_value"]) for s in table.iter_symbols()}
            constructors = list(_constructors(elf))
        for address in constructors:
            self._call(address)

    def _load(self, elf: Any) -> None:
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        first = min(s["p_vaddr"] for s in segments) // PAGE * PAGE
        end = max(s["p_vaddr"] + s["p_memsz"] for s in segments)
        self.memory.mem_map(first, -(-(end - first) // PAGE) * PAGE)
        for s in segments:
            self.memory.mem_write(s["p_vaddr"], s.data())

    def room(self, size: int) -> int:
        """Address of memory that nothing else has, on a border of 64 bytes."""
        address = self.free
        self.free += -(-size // 64) * 64
        assert self.free <= HEAP + HEAP_BYTES
        return address

    def call(self, name: str, *arguments: int) -> int:
        return self._call(self.symbols[name], *arguments)

    def _call(self, address: int, *arguments: int) -> int:
        for register, value in zip(ARGUMENTS, arguments, strict=False):
            self.memory.reg_write(register, value)
        self.memory.reg_write(UC_ARM64_REG_SP, STACK + STACK_BYTES - 64)
        self.memory.reg_write(UC_ARM64_REG_LR, STOP)
        self.memory.emu_start(address, STOP)
        return int(self.memory.reg_read(UC_ARM64_REG_X0))


def _constructors(elf: Any) -> Iterator[int]:
    section = elf.get_section_by_name(".init_array")
    if section is not None:
        yield from struct.unpack(f"<{section['sh_size'] // 8}Q", section.data())


def cross_compiled(kernel: Kernel, folder: Path) -> EmulatedKernel:
    """Compile with the build's own flags, but for threads."""
    source, text, binary = emit(kernel), folder / "kernel.cpp", folder / "kernel"
    text.write_text(source)
    flags = [flag for flag in FLAGS if flag != "-fopenmp"]
    command = [
        sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl",
        "-std=c++20", "-O3", *flags, "-Wno-unknown-pragmas",
        "-nostartfiles", "-static", "-Wl,-e,run", str(text), "-o", str(binary),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return EmulatedKernel(kernel, source, binary)

"""Compiles emitted C++ with torch's own C++ builder, and loads it from `cache`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch._inductor.cpp_builder import CppBuilder, CppOptions, get_compiler_version_info
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from stq_compile.codegen.cpp import cache
from stq_compile.codegen.cpp.compiler import CompilerHungError, introduce, run
from stq_compile.codegen.executable import Sums, Table
from stq_compile.errors import KernelBuildError, first_line

INCLUDE = Path(__file__).parent
FLAGS = (
    f"-I{INCLUDE}",
    "-fopenmp",
    "-ffp-contract=off",
    "-fsigned-zeros",
    "-fwrapv",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
)
NOTHING = 'extern "C" int nothing() { return 0; }\n'


@dataclass(frozen=True)
class CompiledKernel:
    """A loaded kernel, which updates every tensor of a table of ``row_bytes`` rows."""

    name: str
    source: str
    library: ctypes.CDLL

    @property
    def row_bytes(self) -> int:
        return int(self.library.row_bytes())

    def scratch(self, n_rows: int, threads: int) -> NDArray[np.uint8]:
        """Memory for `run` to work in; it takes none of its own."""
        return np.empty(self.library.scratch_bytes(n_rows, threads), dtype=np.uint8)

    def run(
        self, table: NDArray[np.int64], step: int, threads: int, scratch: NDArray[np.uint8]
    ) -> None:
        """Update every tensor of a table ``[rows, fields]``; ``step`` is the mixed counter."""
        self.run_at(table.ctypes.data, len(table), step, threads, scratch.ctypes.data)

    def run_at(self, table: int, n_rows: int, step: int, threads: int, scratch: int) -> None:
        """`run`, of addresses."""
        self.library.run(table, n_rows, step, _TEAM.usable(threads), scratch)

    def bind(self, table: Table, sums: Sums | None = None) -> CompiledRun:
        """`Executable.bind`; sums are found by their addresses in the table."""
        return CompiledRun(self, table)


class CompiledRun:
    """A kernel and its table, with the memory that a call works in."""

    def __init__(self, kernel: CompiledKernel, table: Table) -> None:
        self.kernel, self.table = kernel, table
        self.threads, self.scratch = 0, np.empty(0, dtype=np.uint8)
        self.addresses = (0, 0)  # of table and scratch: numpy takes microseconds to tell them

    def prepare(self) -> None:
        """Take memory for as many threads as torch has now."""
        threads = torch.get_num_threads()
        if threads != self.threads:
            self.threads = 0  # what is interrupted here begins anew
            self.scratch = self.kernel.scratch(len(self.table), threads)
            self.addresses = self.table.ctypes.data, self.scratch.ctypes.data
            self.threads = threads

    def __call__(self, step: int) -> None:
        if not self.threads:
            self.prepare()
        table, scratch = self.addresses
        self.kernel.run_at(table, len(self.table), step, self.threads, scratch)

    def replayed(self) -> int:
        """None: nothing runs but by the host."""
        return 0


class _Team:
    """The threads of the kernels' OpenMP. A forked process has inherited the belief that they are
    there, and would wait for them for ever; it computes with one."""

    def __init__(self) -> None:
        self.started = self.lost = False

    def usable(self, threads: int) -> int:
        if self.lost:
            return 1
        self.started = self.started or threads > 1
        return threads

    def forked(self) -> None:
        self.lost = self.started


_TEAM = _Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TEAM.forked)


def load(name: str, source: str, path: Path) -> CompiledKernel:
    """The kernel of a library; raises OSError if the system does not load it."""
    library = ctypes.CDLL(str(path))
    pointer, number, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.run.argtypes = [pointer, number, ctypes.c_uint64, count, pointer]
    library.run.restype = None
    library.row_bytes.restype = number
    library.scratch_bytes.argtypes = [number, count]
    library.scratch_bytes.restype = number
    return CompiledKernel(name, source, library)


def build(name: str, source: str, stop: threading.Event | None = None) -> CompiledKernel:
    """Compile (or take from the cache) and load.

    A folder of kernels that is full, was made read-only or holds nothing that can be loaded is
    given up for this process, with a warning; then kernels are built in a folder of its own.

    Args:
        name: for messages.
        source: C++.
        stop: ends the compiler when set.

    Raises:
        KernelBuildError: there is no compiler, or it fails or hangs. Only where it refuses this
            source and takes another one, the cause is its `CppCompileError`.
    """
    try:
        introduce()
        folder = cache.folder()
        try:
            return load(name, source, _library(source, folder, stop))
        except (OSError, CppCompileError) as error:
            if not cache.to_blame(folder, error):
                raise
            private = cache.give_up(folder, first_line(error))
        return load(name, source, _library(source, private, stop))
    except (OSError, InvalidCxxCompiler, CompilerHungError) as error:
        raise KernelBuildError(kernel=name, source="generated C++", output=error) from error
    except CppCompileError as error:
        broken = _broken()
        output = f"{broken}\n{error}" if broken else error
        failure = KernelBuildError(kernel=name, source="generated C++", output=output)
        raise failure from (None if broken else error)


def _library(source: str, folder: Path, stop: threading.Event | None) -> Path:
    options = CppOptions(extra_flags=FLAGS)
    toolchain = _toolchain(options.get_compiler())
    whole = "\0".join([_run_time_library(), source, *toolchain, *options.get_cflags(), *FLAGS])
    key = hashlib.sha256(whole.encode()).hexdigest()
    found = cache.find(folder, key)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(dir=folder) as work:
        return cache.keep(folder, key, compile_in(Path(work), source, options, stop))


def compile_in(
    folder: Path, source: str, options: CppOptions, stop: threading.Event | None = None
) -> Path:
    """The library that the compiler makes of a source."""
    text = folder / "kernel.cpp"
    text.write_text(source)
    builder = CppBuilder("kernel", [str(text)], options, output_dir=str(folder))
    run(builder.get_command_line(), folder, stop)
    return Path(builder.get_target_file_path())


def _broken() -> str:
    """What the compiler says to a source that every compiler takes; empty if it takes it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            compile_in(Path(folder), NOTHING, CppOptions(extra_flags=FLAGS))
    except (OSError, CppCompileError, CompilerHungError) as error:
        return f"It compiles nothing, not even an empty file ({first_line(error)})."
    return ""


@lru_cache(maxsize=1)
def _run_time_library() -> str:
    return (INCLUDE / "stq_kernel.h").read_text()


@lru_cache(maxsize=8)
def _toolchain(compiler: str) -> tuple[str, ...]:
    """What decides about the machine code beside source and flags: ``-march=native`` is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    system = (platform.system(), platform.machine(), platform.processor(), features)
    return (compiler, get_compiler_version_info(compiler), *system)

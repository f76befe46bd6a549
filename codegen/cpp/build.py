"""Compiles emitted C++ with torch's own C++ builder, and loads it from `cache`."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch._inductor import exc as inductor_exc
from torch._inductor.cpp_builder import CppBuilder, CppOptions, get_compiler_version_info

from stq_compile.codegen.cpp import cache
from stq_compile.codegen.executable import Run, Sums, Table
from stq_compile.errors import KernelBuildError

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


@dataclass(frozen=True)
class CompiledKernel:
    """A loaded kernel: ``run(rows, n_rows, step, threads)`` on a table of ``row_bytes`` rows."""

    name: str
    source: str
    library: ctypes.CDLL

    @property
    def row_bytes(self) -> int:
        return int(self.library.row_bytes())

    def run(self, rows: int, n_rows: int, step: int, threads: int) -> None:
        """Update every tensor of the table at address ``rows``; ``step`` is the mixed counter."""
        self.library.run(rows, n_rows, step, threads)

    def bind(self, table: Table, sums: Sums | None = None) -> Run:
        """`Executable.bind`; sums are found by their addresses in the table."""

        def run(step: int) -> None:
            self.run(table.ctypes.data, len(table), step, torch.get_num_threads())

        return run


def build(name: str, source: str) -> CompiledKernel:
    """Compile (or take from the cache) and load; raises `KernelBuildError`."""
    try:
        path = _library(source)
        library = ctypes.CDLL(str(path))
    except (inductor_exc.CppCompileError, inductor_exc.InvalidCxxCompiler, OSError) as error:
        raise KernelBuildError(kernel=name, source="generated C++", output=error) from error
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int]
    library.run.restype = None
    library.row_bytes.restype = ctypes.c_int64
    return CompiledKernel(name, source, library)


def _library(source: str) -> Path:
    options = CppOptions(extra_flags=FLAGS)
    toolchain = _toolchain(options.get_compiler())
    whole = "\0".join([_run_time_library(), source, *toolchain, *options.get_cflags(), *FLAGS])
    key = hashlib.sha256(whole.encode()).hexdigest()
    found = cache.find(key)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
        text = Path(folder) / "kernel.cpp"
        text.write_text(source)
        builder = CppBuilder("kernel", [str(text)], options, output_dir=folder)
        builder.build()
        return cache.keep(key, Path(builder.get_target_file_path()))


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

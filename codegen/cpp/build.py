"""Compiles emitted C++ through torch's own C++ builder and cache, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch._inductor import exc as inductor_exc
from torch._inductor.codecache import CppCodeCache

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


@lru_cache(maxsize=1)
def _library_hash() -> str:
    """Part of every source, so that the cache knows when the run-time library changed."""
    return hashlib.sha256((INCLUDE / "stq_kernel.h").read_bytes()).hexdigest()[:16]


def build(name: str, source: str) -> CompiledKernel:
    """Compile (or take from the cache) and load; raises `KernelBuildError`."""
    text = f"// stq_kernel.h {_library_hash()}\n{source}"
    try:
        library = CppCodeCache.load(text, "cpu", extra_flags=FLAGS, needs_vec_isa=False)
    except (inductor_exc.CppCompileError, inductor_exc.InvalidCxxCompiler, OSError) as error:
        raise KernelBuildError(kernel=name, source="generated C++", output=error) from error
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int]
    library.run.restype = None
    library.row_bytes.restype = ctypes.c_int64
    return CompiledKernel(name, source, library)

"""C++ for the CPU: `CppBackend`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from stq_compile.codegen.cpp.build import build
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.executable import Executable
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.target import CPU, Target


class CppBackend:
    """A `stq_compile.codegen.backend.Backend`."""

    suffix = ".cpp"

    def emit(self, kernel: Kernel) -> str:
        return emit(kernel)

    def target(self, device: torch.device) -> Target:
        return CPU

    def compile(self, kernels: Sequence[Kernel], device: torch.device) -> list[Executable]:
        """Several at a time: the C++ compiler runs in processes of its own."""
        names, sources = [k.name for k in kernels], [emit(k) for k in kernels]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(build, names, sources))

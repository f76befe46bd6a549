"""C++ for the CPU: `CppBackend`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

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
